"""Train a class-conditional diffusion model on real digits, sample it with several solvers, sweep hyper-parameters in one program, and report.

    python experiments/digits.py [--preset smoke|default|mnist] [--out DIR] [--seed N] [--train.steps N --no-train.immiscible …]

Methods of four papers meet here, each a plug that can be left out: score-based SDEs (path, samplers), min-SNR weighting, immiscible noise
assignment, and the WSD schedule. Everything is written to DIR (see `ergodax.core.run`); the same command on the same DIR goes on where it stopped.
"""

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Literal

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ergodax import data, nn
from ergodax.core import CosinePath, Denoiser, DenoiserTerm, Fit, FlowMatchingPath, VelocityPrediction, VPPath, VPrediction, given_pairs, integrate
from ergodax.core.check import check_count, check_range
from ergodax.core.config import parse
from ergodax.core.report import Report
from ergodax.core.run import Run
from ergodax.core.space import grid, traced
from ergodax.core.sweep import sweep
from ergodax.diffusion import (
    DDIM,
    Ancestral,
    ClassifierFreeGuidance,
    DenoisingLoss,
    DPMSolverPP2M,
    EulerMaruyama,
    Heun,
    Immiscible,
    MinSNR,
    karras_grid,
    uniform_weight,
)
from ergodax.schedules import sqrt_cooldown, wsd_schedule


ROOT = Path(__file__).resolve().parent.parent
DATA = {"digits": data.digits, "mnist": data.mnist}
PATHS = {"vp": (VPPath(), VPrediction()), "cosine": (CosinePath(), VPrediction()), "flow": (FlowMatchingPath(), VelocityPrediction())}
# Each with its network calls per step. On `karras_grid` all of them are asked at the same noise levels.
SOLVERS = {
    "Euler": (dfx.Euler(), 1),
    "Heun": (Heun(), 2),
    "DDIM": (DDIM(), 1),
    "DPM-Solver++(2M)": (DPMSolverPP2M(), 1),
    "ancestral": (Ancestral(), 1),
    "Euler–Maruyama": (EulerMaruyama(), 1),
}
STOCHASTIC = ("ancestral", "Euler–Maruyama")


@dataclasses.dataclass(frozen=True)
class Network:
    """The network: what kind, and how large."""

    kind: Literal["mlp", "unet", "dit"] = "mlp"
    width: int = 256
    depth: int = 3


@dataclasses.dataclass(frozen=True)
class Training:
    """The main training run."""

    steps: int = 3000
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    warmup: float = 0.02  # share of the steps
    decay: float = 0.3  # share of the steps
    ema_decay: float = 0.999
    label_dropout: float = 0.1
    gamma: float = 5.0
    log_every: int = 50
    min_snr: bool = True
    immiscible: bool = True
    wsd: bool = True


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What is sampled after training."""

    nfe: tuple[int, ...] = (5, 10, 20, 50)
    sigma_min: float = 0.02  # the noise levels of the grid, relative to the data
    sigma_max: float = 80.0
    guidance: tuple[float, ...] = (0.0, 1.0, 1.5, 2.0, 3.0)


@dataclasses.dataclass(frozen=True)
class Sweeping:
    """The sweep over learning rate and seed: shorter runs of the same training."""

    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    seeds: int = 2
    steps: int = 500
    batch_size: int = 1  # runs vmapped together on a device


@dataclasses.dataclass(frozen=True)
class Config:
    """`experiments/digits.py`"""

    data: Literal["digits", "mnist"] = "digits"
    path: Literal["vp", "cosine", "flow"] = "vp"
    seed: int = traced(0)
    network: Network = Network()
    train: Training = Training()
    sample: Sampling = Sampling()
    sweep: Sweeping = Sweeping()

    def __post_init__(self):
        train, sample = self.train, self.sample
        for name in ("steps", "batch_size", "log_every"):
            check_count(f"train.{name}", getattr(train, name))
        if train.steps % train.log_every or self.sweep.steps % train.log_every:
            raise ValueError(
                f"`train.steps` {train.steps} and `sweep.steps` {self.sweep.steps} must be multiples of `train.log_every` {train.log_every}."
            )
        check_range("train.learning_rate", train.learning_rate, low=0.0, open_low=True)
        check_range("train.warmup", train.warmup, low=0.0, high=1.0)
        check_range("train.decay", train.decay, low=0.0, high=1.0)
        check_range("train.warmup + train.decay", train.warmup + train.decay, high=1.0)
        for nfe in sample.nfe:
            check_count("sample.nfe", nfe, low=4)
        check_range("sample.sigma_min", sample.sigma_min, low=0.0, high=sample.sigma_max, open_low=True, open_high=True)
        check_count("sweep.steps", self.sweep.steps)
        check_count("sweep.seeds", self.sweep.seeds)


def make_network(config: Config, shape: tuple[int, ...], key: jax.Array):
    """The network on one image."""
    size, options = config.network, {"num_classes": 10, "key": key}
    if size.kind == "mlp":
        return nn.TimeMLP(shape, size.width, size.depth, **options)
    if size.kind == "unet":
        return nn.UNet(shape, size.width, **options)
    return nn.DiT(shape, patch=shape[0] // 4, width=size.width, depth=size.depth, heads=4, **options)


def make_loss(config: Config) -> DenoisingLoss:
    """The training loss, with the plugs that the flags leave in."""
    path, prediction = PATHS[config.path]
    weight = MinSNR(config.train.gamma) if config.train.min_snr else uniform_weight
    coupling = Immiscible(within_condition=True) if config.train.immiscible else given_pairs
    return DenoisingLoss(path, prediction, weight=weight, coupling=coupling, label_dropout=config.train.label_dropout)


def make_optimiser(config: Config, steps: int) -> optax.GradientTransformation:
    """AdamW with the WSD schedule."""
    train, rate = config.train, config.train.learning_rate
    if train.wsd:
        rate = wsd_schedule(rate, steps, warmup_steps=train.warmup * steps, decay_steps=train.decay * steps, cooldown=sqrt_cooldown)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=train.weight_decay))


def make_fit(config: Config, split: data.Split, steps: int) -> Fit:
    """The training run; its test loss is the plain denoising loss, so that runs with other plugs compare."""
    path, prediction = PATHS[config.path]
    plain = DenoisingLoss(path, prediction)

    def evaluate(model, key):
        return {"test_loss": plain(model, (split.test_x, split.test_y), key)[0]}

    network = make_network(config, split.train_x.shape[1:], jax.random.key(config.seed))
    options = {"batch_size": config.train.batch_size, "every": config.train.log_every, "ema_decay": config.train.ema_decay}
    return Fit(make_loss(config), network, make_optimiser(config, steps), (split.train_x, split.train_y), evaluate=evaluate, **options)


def sampler(config: Config, solver, num_steps: int, guided: bool = False):
    """`(model, starts, keys, labels, guidance_scale) -> images`, one per start, key and label."""
    path, prediction = PATHS[config.path]
    # The last of the levels is followed by a step to no noise: num_steps network evaluations for a solver with one per step.
    times = karras_grid(path, num_steps, sigma_min=config.sample.sigma_min, sigma_max=config.sample.sigma_max)

    def sample(model, starts, keys, labels, guidance_scale=1.0):
        denoised = Denoiser(model, path, prediction)
        field = ClassifierFreeGuidance(denoised, guidance_scale) if guided else denoised
        term = DenoiserTerm(field, path, times)

        return jax.vmap(lambda start, key, label: integrate(term, solver, start, label, key=key))(starts, keys, labels)

    return sample


def start(config: Config, seed: int, labels, shape: tuple[int, ...]):
    """Where sampling starts: noise and a key for each label, the same for all solvers."""
    key_prior, key_noise = jax.random.split(jax.random.key(seed))
    return PATHS[config.path][0].prior(key_prior, (len(labels), *shape)), jax.random.split(key_noise, len(labels)), labels


class Judge:
    """What samples are measured by: each number beside the one that real training images have against the same test images."""

    def __init__(self, split: data.Split, seed: int):
        from sklearn.svm import SVC

        flat = np.asarray(split.train_x).reshape(len(split.train_x), -1)
        self.classifier = SVC(C=10.0, gamma="scale").fit(flat, np.asarray(split.train_y))
        self.split, self.key = split, jax.random.key(seed)
        self.measure = jax.jit(self._measure)
        real = self.measure(split.train_x)
        self.floor = {
            "class_accuracy": self.accuracy(split.test_x, split.test_y),
            "sliced_wasserstein": float(real["sliced_wasserstein"]),
            "energy_distance": float(real["energy_distance"]),
            "memorised_share": 0.05,  # what fresh real images would score, by its definition
        }

    def accuracy(self, images, labels) -> float:
        """Share of images that the classifier gives their label; a NaN image counts as wrong."""
        flat = np.asarray(images).reshape(len(images), -1)
        finite = np.isfinite(flat).all(1)
        return float(np.mean(finite & (self.classifier.predict(np.where(finite[:, None], flat, 0)) == np.asarray(labels))))

    def _measure(self, images):
        split = self.split
        return {
            "sliced_wasserstein": data.sliced_wasserstein(self.key, images, split.test_x),
            "energy_distance": data.energy_distance(images, split.test_x),
            "memorised_share": data.memorised_share(images, split.train_x, split.test_x),
        }

    def __call__(self, images, labels) -> dict[str, float]:
        """All measures."""
        return {"class_accuracy": self.accuracy(images, labels)} | {name: float(value) for name, value in self.measure(images).items()}


def steps_for(nfe: int, calls: int) -> int:
    """Steps that stay within `nfe` network calls."""
    return nfe // calls


def sample_all(config: Config, run: Run, model, split: data.Split, judge: Judge) -> dict[str, np.ndarray]:
    """Every solver at every NFE, from the same noise: measures, and ten images a class of the best at NFE 20."""
    labels = split.train_y
    begin = start(config, config.seed + 1, labels, split.train_x.shape[1:])
    out, jobs = {}, [(name, nfe) for name in SOLVERS for nfe in config.sample.nfe]
    arrays, static = eqx.partition(model, eqx.is_array)

    def draw(solver, num_steps):
        make = sampler(config, solver, num_steps)
        return run.compiled("samples", lambda arrays, *begin: make(eqx.combine(arrays, static), *begin), arrays, *begin)(arrays, *begin)

    with run.bar("samples", len(jobs) + 1) as update:
        fine = draw(Heun(), 200)
        for i, (name, nfe) in enumerate(jobs):
            solver, calls = SOLVERS[name]
            images = draw(solver, steps_for(nfe, calls))
            out |= {f"{name}/{nfe}/{measure}": value for measure, value in judge(images, labels).items()}
            if name not in STOCHASTIC:
                out[f"{name}/{nfe}/flow_error"] = float(jnp.sqrt(jnp.mean((images - fine) ** 2)))
            out[f"{name}/{nfe}/images"] = np.stack([np.asarray(images[np.asarray(labels) == label][:10]) for label in range(10)])
            update(i + 2, f"{name} NFE {nfe}")
    return out


def guide(config: Config, model, split: data.Split, judge: Judge) -> dict[str, np.ndarray]:
    """Guidance scales, vmapped in one program: accuracy against closeness to real digits."""
    begin = start(config, config.seed + 2, split.test_y, split.test_x.shape[1:])
    make = sampler(config, DPMSolverPP2M(), 20, guided=True)
    scales = jnp.asarray(config.sample.guidance)
    images = eqx.filter_jit(lambda model: jax.vmap(lambda scale: make(model, *begin, scale))(scales))(model)
    measures = [judge(batch, split.test_y) for batch in images]
    # As many real images, spread over the training set: its order is that of the writers.
    rows = np.linspace(0, len(split.train_y) - 1, len(split.test_y)).astype(int)
    real = judge(split.train_x[rows], split.train_y[rows])["sliced_wasserstein"]
    return {"scale": scales, "real_sliced_wasserstein": real} | {name: np.array([m[name] for m in measures]) for name in measures[0]}


def run_sweep(config: Config, run: Run, split: data.Split) -> dict[str, np.ndarray]:
    """Learning rate × seed, every run of it the training above, only shorter."""

    def train(config: Config):
        fitted = make_fit(config, split, config.sweep.steps).run(jax.random.key(config.seed), config.sweep.steps)
        return {"test_loss": fitted.metrics["test_loss"][-1], "curve": fitted.metrics["test_loss"], "failed_at": fitted.failed_at}

    overrides = grid(**{"train.learning_rate": config.sweep.learning_rates, "seed": range(config.sweep.seeds)})
    with run.bar("sweep", len(overrides)) as update:
        result = sweep(
            train,
            config,
            overrides,
            batch_size=config.sweep.batch_size,
            folder=run.folder / "sweep",
            announce=lambda plan: run.console.print(plan, highlight=False),
            progress=lambda done, total: update(done),
        )
    run.timing["sweep"] = {"compile_seconds": sum(group.compile_seconds for group in result.groups)}
    rates, seeds, losses = result.pivot("test_loss", "train.learning_rate", "seed")
    curves = np.stack([output["curve"] for output in result.outputs])
    return {"rates": rates, "seeds": seeds, "losses": losses, "curves": curves, "compiles": len(result.groups)}


# Figures


def _axes(columns: int = 1, height: float = 3.6, width: float = 5.2):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width * columns, height), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def draw_samples(samples: dict, name: str, nfe: int, real: np.ndarray):
    """Real test images above, samples of every class below."""
    figure, axes = _axes(2, 5.2, 5)
    for axis, images, title in zip(axes, (real, samples[f"{name}/{nfe}/images"]), ("real test images", f"samples: {name}, NFE {nfe}")):
        images = np.pad(images, [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)], constant_values=0.0)  # a grey frame round each
        rows, columns, height, width, _ = images.shape
        axis.imshow(images[..., 0].transpose(0, 2, 1, 3).reshape(rows * height, columns * width), cmap="gray", vmin=-1, vmax=1)
        axis.set_title(title)
        axis.axis("off")
    return figure


def draw_curves(rows: list[dict]):
    """Training and test loss."""
    figure, (axis,) = _axes()
    step = [row["step"] for row in rows]
    axis.plot(step, [row["loss"] for row in rows], label="training loss (weighted)", lw=1)
    axis.plot(step, [row["test_loss"] for row in rows], label="test loss (plain)", lw=1.5)
    axis.set(xlabel="step", yscale="log")
    axis.legend(frameon=False)
    return figure


def draw_solvers(config: Config, samples: dict, floor: dict):
    """Closeness to real digits, and error of the flow, against network calls."""
    figure, (left, right) = _axes(2)
    used = {name: [calls * steps_for(nfe, calls) for nfe in config.sample.nfe] for name, (_, calls) in SOLVERS.items()}
    for name in SOLVERS:
        ratio = [samples[f"{name}/{nfe}/sliced_wasserstein"] / floor["sliced_wasserstein"] for nfe in config.sample.nfe]
        left.plot(used[name], ratio, marker="o", ms=4, ls="--" if name in STOCHASTIC else "-", label=name)
        if name not in STOCHASTIC:
            right.plot(used[name], [samples[f"{name}/{nfe}/flow_error"] for nfe in config.sample.nfe], marker="o", ms=4, label=name)
    left.axhline(1, color="gray", lw=0.8)
    # What is far off the scale (a solver that has not converged at all) is in the table.
    left.set(xlabel="network calls", ylabel="sliced Wasserstein / floor", xscale="log", ylim=(0.8, 5), title="distance to real digits")
    right.set(xlabel="network calls", ylabel="RMS distance to the fine solution", xscale="log", yscale="log", title="error of the flow")
    for axis in (left, right):
        axis.set_xticks(config.sample.nfe, [str(nfe) for nfe in config.sample.nfe])
        axis.minorticks_off()
    left.legend(frameon=False, fontsize=8)
    return figure


def draw_guidance(guided: dict, floor: dict):
    """What guidance buys, and what it costs."""
    figure, (left, right) = _axes(2, 3.2)
    left.plot(guided["scale"], guided["class_accuracy"], marker="o")
    left.axhline(floor["class_accuracy"], color="gray", lw=0.8)
    left.set(xlabel="guidance scale", ylabel="class accuracy", ylim=(None, 1.01))
    right.plot(guided["scale"], guided["sliced_wasserstein"], marker="o")
    right.axhline(guided["real_sliced_wasserstein"], color="gray", lw=0.8)
    right.set(xlabel="guidance scale", ylabel="sliced Wasserstein")
    return figure


def draw_sweep(rates: np.ndarray, seeds: np.ndarray, losses: np.ndarray):
    """Final test loss for each learning rate and seed."""
    figure, (axis,) = _axes(height=1.6 + 0.5 * len(rates))
    image = axis.imshow(losses, cmap="viridis_r", aspect="auto")
    axis.set_xticks(range(len(seeds)), [f"seed {seed}" for seed in seeds])
    axis.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axis.set(ylabel="learning rate", title="test loss")
    middle = (np.nanmin(losses) + np.nanmax(losses)) / 2
    for (i, j), value in np.ndenumerate(losses):
        axis.text(j, i, f"{value:.4f}", ha="center", va="center", color="black" if value < middle else "white")
    figure.colorbar(image)
    return figure


# The run


def main(argv: list[str] | None = None) -> None:
    """Everything, start to end."""
    config, folder = parse(Config, ROOT / "configs" / "digits", argv, out=ROOT / "runs" / "digits")
    # One device per core, so that a sweep on a CPU uses them all; an accelerator is used where there is one.
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    with Run(folder, config) as run:
        split = DATA[config.data]()
        fitted, rows = run.train(make_fit(config, split, config.train.steps), jax.random.key(config.seed), config.train.steps)
        judge = Judge(split, config.seed)
        samples = run.stage("samples", lambda: sample_all(config, run, fitted.average, split, judge))
        guided = run.stage("guidance", lambda: guide(config, fitted.average, split, judge))
        swept = run.stage("sweep", lambda: run_sweep(config, run, split))
        report(config, run, split, judge, rows, samples, guided, swept)


def report(config, run, split, judge, rows, samples, guided, swept) -> None:
    """Results, figures and the page."""
    floor = judge.floor
    table = []
    for name, nfe in itertools.product(SOLVERS, config.sample.nfe):
        measures = {measure: float(samples[f"{name}/{nfe}/{measure}"]) for measure in floor}
        ratio = measures["sliced_wasserstein"] / floor["sliced_wasserstein"]
        error = None if name in STOCHASTIC else float(samples[f"{name}/{nfe}/flow_error"])
        table.append({"solver": name, "nfe": nfe} | measures | {"sliced_wasserstein_ratio": ratio, "flow_error": error})
    at = min(config.sample.nfe, key=lambda nfe: abs(nfe - 20))
    best = min((row for row in table if row["nfe"] == at), key=lambda row: row["sliced_wasserstein"])
    metrics = {
        "best": best,
        "floor": floor,
        "solvers": table,
        "guidance": guided,
        "sweep": swept,
        "final_loss": rows[-1]["loss"],
        "final_test_loss": rows[-1]["test_loss"],
    }
    results = run.results(metrics)

    real = np.stack([np.asarray(split.test_x[np.asarray(split.test_y) == label][:10]) for label in range(10)])
    curves = {name: [row[name] for row in rows] for name in ("step", "loss", "test_loss")}
    figures = {
        "samples": (draw_samples(samples, best["solver"], at, real), best, "Ten images a class: real ones the model never saw, and its samples."),
        "solvers": (
            draw_solvers(config, samples, floor),
            {"rows": table},
            "Dashed: stochastic solvers. The grey line is what real training images score.",
        ),
        "guidance": (draw_guidance(guided, floor), guided, "DPM-Solver++(2M), 20 steps; the grey lines are real images."),
        "losses": (draw_curves(rows), curves, "Training with the plugs of the config; the test loss is plain and comparable between configs."),
        "sweep": (draw_sweep(**{name: swept[name] for name in ("rates", "seeds", "losses")}), swept, "Plain test loss of shorter runs."),
    }
    paths = {name: (run.figure(name, figure, numbers), caption) for name, (figure, numbers, caption) in figures.items()}

    page = Report(
        "Digits: a class-conditional diffusion model",
        f"{len(split.train_x)} real training images; {config.train.steps} steps of min-SNR weighted, immiscible training under a WSD schedule "
        "(as far as the config leaves them in). Every measure stands beside what real training images score against the same test images.",
    )
    page.heading(f"Best solver at NFE {at}: {best['solver']}")
    page.table([{"measure": name, "samples": best[name], "real images": floor[name]} for name in floor])
    page.figure(*paths["samples"])
    page.heading("Solvers against network calls")
    page.figure(*paths["solvers"])
    page.table(table)
    page.heading("Classifier-free guidance, one vmapped program")
    page.figure(*paths["guidance"])
    page.heading("Training")
    page.figure(*paths["losses"])
    page.heading(f"Sweep: {swept['losses'].size} runs, {int(swept['compiles'])} compile")
    page.figure(*paths["sweep"])
    page.heading("Timing (seconds)")
    page.table([{"part": name, "all": timing["seconds"], "of it compiling": timing.get("compile_seconds")} for name, timing in run.timing.items()])
    page.heading("Config and environment")
    page.code(json.dumps({"config": results["config"], "environment": results["environment"]}, indent=2))
    page.write(run.folder / "report.html")
    run.console.print(
        f"best at NFE {at}: {best['solver']}, class accuracy {best['class_accuracy']:.3f}, "
        f"sliced Wasserstein {best['sliced_wasserstein_ratio']:.2f}x its floor\nreport: {run.folder / 'report.html'}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
