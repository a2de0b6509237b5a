"""Entropic optimal transport against plans that are known: LightSB, its authors' formulation in torch, and the energy-guided potential.

    python experiments/transport/eot_benchmark.py [--preset smoke|default] [--out DIR] [--dims 2 16] [--torch-python PATH] …

A pair is made from its plan, as in the benchmark of Gushchin et al. 2023 (arXiv:2306.10161): the source is N(0, I) in d dimensions, the potential a
mixture of five components (centres uniform on a sphere of radius 5, diagonal scales uniform on [0.2, 0.8], each with a fifth of the source), and the
target what that plan makes of the source. Models see fresh samples of both ends, never pairs. They have 50 components, so the truth is among them but
not given away. All ε and seeds of one dimension train in one program. For each model

- KL(π* ‖ π), the mean over x₀ of the KL of the conditional plans: the mean of log r + 1/r - 1 over draws of π*, r = π*/π;
- cBW₂-UVP: 100 E BW₂²(π*(·|x₀), π(·|x₀)) over the variance of the target, from exact moments; beside the paper's own, on pairs it did not print;
- CPU seconds of training, and of compiling beside it. With `--torch-python`, an interpreter with torch, the authors' formulation
  (`benchmarks/light_sb_torch.py`: 10 000 steps) trains on the same pairs, on one thread.

Everything is written to DIR (see `ergodax.core.run`).
"""

import dataclasses
import io
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ergodax import nn
from ergodax.core import fit
from ergodax.core.check import check_count, check_range
from ergodax.core.config import parse
from ergodax.core.report import Report
from ergodax.core.run import Run
from ergodax.transport.eg_entropic_not import EnergyGuidedLoss
from ergodax.transport.light_sb import LightSB, LightSBLoss
from ergodax.transport.samples import Minibatches, Samples


sys.path.append(str(Path(__file__).resolve().parent.parent))

from common import ROOT, axes


#: cBW₂-UVP of LightSB in Table 2 of arXiv:2310.01174, by (d, ε), on its own pairs.
PAPER = {
    **{(2, 0.1): 0.03, (16, 0.1): 0.08, (64, 0.1): 0.28, (128, 0.1): 0.60},
    **{(2, 1.0): 0.05, (16, 1.0): 0.09, (64, 1.0): 0.24, (128, 1.0): 0.62},
    **{(2, 10.0): 0.07, (16, 10.0): 0.11, (64, 10.0): 0.21, (128, 10.0): 0.37},
}
METHODS = {"light_sb": "LightSB", "torch": "LightSB, authors' formulation (torch)", "energy": "energy-guided potential"}


@dataclasses.dataclass(frozen=True)
class Energy:
    """The energy-guided model: a network f, trained and sampled by Langevin chains of steps η = `relative_step` ε."""

    dims: tuple[int, ...] = (2,)  # those it is trained in; chains make it slow
    width: int = 64
    depth: int = 2
    steps: int = 600
    batch_size: int = 128
    learning_rate: float = 3e-3
    relative_step: float = 0.05
    chain: int = 60
    draws: int = 1000  # for each x₀, in evaluation, from chains of four times the length


@dataclasses.dataclass(frozen=True)
class Config:
    """`experiments/transport/eot_benchmark.py`"""

    seed: int = 0
    dims: tuple[int, ...] = (2, 16, 64, 128)
    epsilons: tuple[float, ...] = (0.1, 1.0, 10.0)
    components: int = 50
    steps: int = 5000
    batch_size: int = 128
    learning_rate: float = 0.02
    seeds: int = 3  # of the model, vmapped
    true_components: int = 5
    radius: float = 5.0
    kl_samples: int = 20000
    conditions: int = 100  # x₀ that cBW₂-UVP is a mean over
    torch_python: str = ""  # an interpreter with torch; without one its rows are left out
    torch_steps: int = 10000
    energy: Energy = dataclasses.field(default_factory=Energy)

    def __post_init__(self):
        for name in ("components", "steps", "batch_size", "seeds", "true_components", "conditions", "torch_steps"):
            check_count(name, getattr(self, name))
        check_count("kl_samples", self.kl_samples, low=2)
        for name in ("learning_rate", "radius"):
            check_range(name, getattr(self, name), low=0.0, open_low=True)
        for d in self.dims:
            check_count("dims", d)
        if not self.dims or not self.epsilons:
            raise ValueError("`dims` and `epsilons` must not be empty.")
        check_range("epsilons", self.epsilons, low=0.0, open_low=True)
        if self.torch_python and not shutil.which(self.torch_python):
            raise ValueError(f"`torch_python` {self.torch_python} is no program.")


# Pairs


class Normal(eqx.Module):
    """N(0, I), the source."""

    dim: int = eqx.field(static=True)

    def sample(self, key, n):
        """(n, d)."""
        return jax.random.normal(key, (n, self.dim))


class Target(eqx.Module):
    """What a plan makes of the source."""

    plan: LightSB

    def sample(self, key, n):
        """(n, d)."""
        key_source, key_plan = jax.random.split(key)
        return self.plan.sample(key_plan, Normal(self.plan.centres.shape[1]).sample(key_source, n))


def make_plan(config: Config, dim: int, key, epsilon) -> LightSB:
    """The true plan of a pair, whose components share the source alike."""
    key_centres, key_scales, key_balance = jax.random.split(key, 3)
    centres = jax.random.normal(key_centres, (config.true_components, dim))
    centres = config.radius * centres / jnp.linalg.norm(centres, axis=1, keepdims=True)
    scales = jax.random.uniform(key_scales, centres.shape, minval=0.2, maxval=0.8)
    plan = LightSB(jnp.zeros(config.true_components), centres, jnp.log(scales), epsilon)
    return plan.balanced(Normal(dim).sample(key_balance, 4096), 2000)


# Models


def train(config: Config, plan: LightSB, key) -> LightSB:
    """LightSB from samples of both ends of one pair."""
    source, target = Normal(plan.centres.shape[1]), Target(plan)
    key_source, key_target, key_start, key_fit = jax.random.split(key, 4)
    ends = Samples(source.sample(key_source, 2048)), Samples(target.sample(key_target, 2048))
    start = LightSB.initialise(key_start, *ends, config.components, plan.epsilon)
    optimiser = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))
    data = Minibatches((source, target), config.batch_size)
    return fit(LightSBLoss(), start, optimiser, data, key_fit, num_steps=config.steps, every=config.steps).model


def train_energy(config: Config, plan: LightSB, points, key) -> tuple[jax.Array, jax.Array]:
    """Means and covariances of the energy-guided plan at `points`, from samples of both ends of one pair."""
    chosen, dim = config.energy, plan.centres.shape[1]
    key_network, key_fit, key_draw = jax.random.split(key, 3)
    network = Potential(nn.TimeMLP((dim,), chosen.width, chosen.depth, key=key_network))
    loss = EnergyGuidedLoss(plan.epsilon, chosen.relative_step * plan.epsilon, chosen.chain, start=lambda key, x: x)
    data = Minibatches((Normal(dim), Target(plan)), chosen.batch_size)
    optimiser = optax.adam(optax.cosine_decay_schedule(chosen.learning_rate, chosen.steps))
    model = fit(loss, network, optimiser, data, key_fit, num_steps=chosen.steps, every=chosen.steps).model
    draw = dataclasses.replace(loss, num_steps=4 * chosen.chain).plan(model).sample

    def moments(x, key):
        draws = jax.vmap(draw, (0, None))(jax.random.split(key, chosen.draws), x)
        return draws.mean(0), jnp.atleast_2d(jnp.cov(draws.T))

    return jax.lax.map(lambda both: moments(*both), (points, jax.random.split(key_draw, len(points))))


class Potential(eqx.Module):
    """f(y): the sum of a network's outputs, of linear growth, so that the cost confines the chains."""

    network: eqx.Module

    def __call__(self, y):
        """A number."""
        return jnp.sum(self.network(jnp.zeros(()), y, None))


# Scores


def kl_of(config: Config, plan: LightSB, model: LightSB, key) -> tuple[jax.Array, jax.Array]:
    """KL(π* ‖ π) and its standard error."""
    key_source, key_plan = jax.random.split(key)
    x0 = Normal(plan.centres.shape[1]).sample(key_source, config.kl_samples)
    x1 = plan.sample(key_plan, x0)
    log_ratio = jax.lax.map(lambda pair: plan.log_prob(*pair) - model.log_prob(*pair), (x1, x0), batch_size=500)
    terms = log_ratio + jnp.expm1(-log_ratio)
    return terms.mean(), terms.std() / np.sqrt(config.kl_samples)


def moments_of(model: LightSB, points) -> tuple[jax.Array, jax.Array]:
    """Means and covariances of the conditional plans."""
    return jax.lax.map(lambda x: (model.mean(x), model.covariance(x)), points)


def uvp(first, second, total_variance) -> jax.Array:
    """100 E BW₂² over the variance of the target, of two lists of means and covariances."""

    def bures_wasserstein(both):
        (mean, covariance), (other, other_covariance) = both
        values, basis = jnp.linalg.eigh(covariance)
        root = (basis * jnp.sqrt(jnp.maximum(values, 0))) @ basis.T
        cross = jnp.linalg.eigvalsh(root @ other_covariance @ root)
        shared = jnp.sum(jnp.sqrt(jnp.maximum(cross, 0)))
        return jnp.sum((mean - other) ** 2) + jnp.trace(covariance) + jnp.trace(other_covariance) - 2 * shared

    return 100 * jnp.mean(jax.lax.map(bures_wasserstein, (first, second))) / total_variance


def timed(run: Run, stage: str, function, *args) -> tuple:
    """The result, the CPU seconds that it took, and those that compiling took."""
    started = time.process_time()
    compiled = run.compiled(stage, function, *args)
    ready = time.process_time()
    result = jax.block_until_ready(compiled(*args))
    return result, time.process_time() - ready, ready - started


def solve(config: Config, run: Run, dim: int) -> dict[str, np.ndarray]:
    """All ε of one dimension: `method/measure` -> (ε, seeds) of each measure, and the seconds of one training."""
    epsilons, count = jnp.array(config.epsilons), len(config.epsilons)
    key_pair, key_train, key_score, key_energy = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), dim), 4)
    plans = eqx.filter_jit(jax.vmap(partial(make_plan, config, dim, key_pair)))(epsilons)
    key_points, key_variance, key_kl = jax.random.split(key_score, 3)
    points = Normal(dim).sample(key_points, config.conditions)
    variance = jax.jit(jax.vmap(lambda plan: jnp.sum(jnp.var(Target(plan).sample(key_variance, 20000), axis=0))))(plans)
    truth = jax.jit(jax.vmap(lambda plan: moments_of(plan, points)))(plans)

    @jax.jit
    def scored(models):
        """Models are stacked as (ε, seeds)."""

        def one(plan, exact, variance, model):
            kl, error = kl_of(config, plan, model, key_kl)
            return {"kl": kl, "kl_se": error, "uvp": uvp(exact, moments_of(model, points), variance)}

        return jax.lax.map(lambda part: jax.lax.map(partial(one, *part[:3]), part[3]), (plans, truth, variance, models))

    stage = f"d = {dim}, LightSB"

    def light_sb():
        keys = jax.random.split(key_train, config.seeds)
        everything = jax.vmap(jax.vmap(partial(train, config), (None, 0)), (0, None))
        models, seconds, compile_seconds = timed(run, stage, everything, plans, keys)
        return scored(models) | {"seconds": seconds / (count * config.seeds), "compile_seconds": compile_seconds}

    out = {f"light_sb/{name}": value for name, value in run.stage(stage, light_sb).items()}
    if config.torch_python:

        def torch():
            models, seconds = train_torch(config, plans)
            return scored(models) | {"seconds": seconds}

        out |= {f"torch/{name}": value for name, value in run.stage(f"d = {dim}, torch", torch).items()}
    if dim in config.energy.dims:
        stage_energy = f"d = {dim}, energy"

        def energy():
            one = jax.vmap(lambda plan: train_energy(config, plan, points, key_energy))
            moments, seconds, compile_seconds = timed(run, stage_energy, one, plans)
            scores = jax.jit(jax.vmap(uvp))(truth, moments, variance)
            return {"uvp": scores[:, None], "seconds": seconds / count, "compile_seconds": compile_seconds}

        out |= {f"energy/{name}": value for name, value in run.stage(stage_energy, energy).items()}
    return out


def train_torch(config: Config, plans: LightSB) -> tuple[LightSB, np.ndarray]:
    """The authors' formulation on the same pairs, in a process of its own: models stacked as (ε, 1), and the CPU seconds of each."""
    pairs = {"epsilons": np.asarray(config.epsilons)}
    for i in range(len(config.epsilons)):
        plan = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), plans)
        pairs |= {f"log_weights_{i}": plan.log_weights, f"centres_{i}": plan.centres, f"scales_{i}": np.exp(plan.log_scales)}
    given = io.BytesIO()
    np.savez(given, **pairs)
    options = {"--steps": config.torch_steps, "--components": config.components, "--batch-size": config.batch_size, "--seed": config.seed}
    script = ROOT / "benchmarks" / "light_sb_torch.py"
    command = [config.torch_python, str(script), *(str(part) for option in options.items() for part in option)]
    done = subprocess.run(command, input=given.getvalue(), capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{script.name} failed: {done.stderr.decode().strip().splitlines()[-1]}")
    found = np.load(io.BytesIO(done.stdout))
    parts = [jnp.stack([found[f"{name}_{i}"] for i in range(len(config.epsilons))])[:, None] for name in ("log_weights", "centres", "log_scales")]
    models = jax.vmap(jax.vmap(LightSB))(*parts, plans.epsilon[:, None])
    return models, np.array([found[f"seconds_{i}"][1] for i in range(len(config.epsilons))])


# What came of it


def rows_of(config: Config, scores: dict[int, dict]) -> list[dict]:
    """A row for each pair and method; ± is twice the standard error over seeds."""
    rows = []
    for dim, values in scores.items():
        for i, epsilon in enumerate(config.epsilons):
            for method, title in METHODS.items():
                if f"{method}/uvp" not in values:
                    continue
                kl, distance = values.get(f"{method}/kl"), values[f"{method}/uvp"][i]
                seconds = np.broadcast_to(values[f"{method}/seconds"], len(config.epsilons))[i]
                rows.append(
                    {
                        "d": dim,
                        "ε": epsilon,
                        "method": title,
                        "KL": None if kl is None else float(kl[i].mean()),
                        "KL ±": None if kl is None else _band(kl[i]),
                        "cBW₂-UVP, %": float(distance.mean()),
                        "cBW₂-UVP ±": _band(distance),
                        "in the paper": PAPER.get((dim, epsilon)) if method == "light_sb" else None,
                        "CPU s": float(seconds),
                        "compile CPU s": float(values[f"{method}/compile_seconds"]) if f"{method}/compile_seconds" in values else None,
                    }
                )
    return rows


def _band(values):
    return float(2 * values.std(ddof=1) / np.sqrt(values.size)) if values.size > 1 else None


def verdicts(config: Config, rows: list[dict]) -> list[dict]:
    """LightSB here beside the authors' formulation, for each pair that both ran on."""
    table = {(row["d"], row["ε"], row["method"]): row for row in rows}
    out = []
    for dim, epsilon in dict.fromkeys((row["d"], row["ε"]) for row in rows):
        ours, theirs = (table.get((dim, epsilon, METHODS[name])) for name in ("light_sb", "torch"))
        if ours is None or theirs is None:
            continue
        # One program trains all ε of a dimension.
        whole = ours["CPU s"] + ours["compile CPU s"] / len(config.epsilons)
        times = {"times faster": theirs["CPU s"] / ours["CPU s"], "with compiling": theirs["CPU s"] / whole}
        out.append(
            {"d": dim, "ε": epsilon, "KL": ours["KL"], "KL, authors' formulation": theirs["KL"], "at or below": ours["KL"] <= theirs["KL"]} | times
        )
    return out


def draw_scores(config: Config, rows: list[dict]):
    """KL, cBW₂-UVP and CPU seconds against the dimension, a colour for each ε."""
    figure, panels = axes(1, 3, width=4.4)
    for axis, measure in zip(panels, ("KL", "cBW₂-UVP, %", "CPU s")):
        for title, style in zip(METHODS.values(), ("-o", "--s", ":^")):
            for i, epsilon in enumerate(config.epsilons):
                here = [row for row in rows if (row["method"], row["ε"]) == (title, epsilon) and row[measure] is not None]
                if here:
                    axis.plot(
                        [row["d"] for row in here],
                        [row[measure] for row in here],
                        style,
                        color=f"C{i}",
                        ms=4,
                        lw=1.2,
                        label=f"{title}, ε = {epsilon:g}",
                    )
        axis.set(xscale="log", yscale="log", xlabel="dimension", ylabel=measure)
        axis.set_xticks(config.dims, [str(dim) for dim in config.dims])
        axis.minorticks_off()
    panels[0].legend(frameon=False, fontsize=6)
    return figure


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    config, folder = parse(Config, ROOT / "configs" / "transport" / "eot_benchmark", argv, out=ROOT / "runs" / "eot_benchmark")
    with Run(folder, config) as run:
        scores = {}
        with run.bar("pairs", len(config.dims)) as update:
            for i, dim in enumerate(config.dims):
                scores[dim] = solve(config, run, dim)
                update(i + 1, f"d = {dim}")
        report(config, run, scores)


def report(config: Config, run: Run, scores: dict[int, dict]) -> None:
    """Tables, figures and the page."""
    rows = rows_of(config, scores)
    found = verdicts(config, rows)
    run.results({"pairs": rows, "verdicts": found})
    lead = f"{config.components} components, {config.steps} steps of {config.batch_size}; ± is twice the standard error over {config.seeds} seeds."
    page = Report("Entropic optimal transport with known plans", lead)
    page.heading("How near the learned plans are")
    page.figure(run.figure("scores", draw_scores(config, rows), {"pairs": rows}), "Solid: here. Dashed: the authors' formulation.")
    page.table(rows, sortable=True)
    page.text("CPU s: of one training among those that were trained together. The paper's numbers are from pairs of its own.")
    if found:
        page.heading("Beside the authors' formulation")
        page.text("With compiling: its seconds are shared by the ε of a dimension, which one program trains.")
        page.table(found)
    page.write(run.folder / "report.html")
    for row in rows:
        shown = "" if row["KL"] is None else f"KL {row['KL']:.4f}, "
        text = f"d = {row['d']}, ε = {row['ε']:g}, {row['method']}: {shown}cBW₂-UVP {row['cBW₂-UVP, %']:.3f} %, {row['CPU s']:.1f} s"
        run.console.print(text, highlight=False, soft_wrap=True)
    run.console.print(f"report: {run.folder / 'report.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
