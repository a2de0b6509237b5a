"""Which process? Each one trained with the same network, optimiser and budget, on eight Gaussians of the plane and on the digits (told their labels).

    python experiments/diffusion/processes.py [--preset smoke|default] [--out DIR] [--processes VP "flow matching" …] [--problems digits] …

Data are centred and scaled to unit variance, and all numbers are in these units. All processes sample deterministically with one network call a step,
each on one grid: the exponential Euler step (DDIM) where the process has one, else Euler's method. Networks have EDM's input and output scaling where
there is one, so that Gaussian processes on affine paths differ in nothing but the law of the training times, the weight and the grid. The scaling is
the default, for data of standard deviation ½: at 1 nothing linear is left to learn, and a network whose output starts at 0 then learns slowly. Over
several seeds, whose range the bands show:

- energy distance of samples to held-out data against network calls, beside that of fresh data;
- negative log-likelihood of held-out data with a little noise, by the probability flow, beside the exact one on the plane;
- curvature of the trajectories at the most calls, ∫|dx/dτ - (x₁ - x₀)|² dτ / |x₁ - x₀|² in the process's own time τ, scaled to [0, 1];
- calls needed: the fewest from which on the distance stays within two standard deviations of fresh data of what it is at the most calls.

Everything is written to DIR (see `ergodax.core.run`).
"""

import dataclasses
import math
import os
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
import lab
import numpy as np
import optax
import training
from jaxtyping import Array
from trained_processes import PROCESSES, Process

from ergodax import data
from ergodax.core import ExactDivergence, Fit, HutchinsonDivergence, log_likelihood
from ergodax.core.check import check_count, check_range
from ergodax.core.config import parse
from ergodax.core.report import Report
from ergodax.core.run import Run


@dataclasses.dataclass(frozen=True)
class Budget:
    """Of one problem: network, training, and what is measured."""

    seeds: int = 8
    level: float = 0.02  # noise on the data whose likelihood is taken
    width: int = 128
    depth: int = 3
    steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 1e-3

    def __post_init__(self):
        for name in ("seeds", "width", "depth", "steps", "batch_size"):
            check_count(name, getattr(self, name))
        check_range("learning_rate", self.learning_rate, low=0.0, open_low=True)
        check_range("level", self.level, low=0.01)  # what some processes end with


@dataclasses.dataclass(frozen=True)
class Config:
    """`experiments/diffusion/processes.py`"""

    seed: int = 0
    processes: tuple[str, ...] = ()  # all of them if empty
    problems: tuple[str, ...] = tuple(lab.PROBLEMS)
    nfe: tuple[int, ...] = (3, 5, 7, 10, 15, 20, 30, 50, 100)
    samples: int = 512
    points: int = 128  # held-out ones, for the likelihood
    likelihood_steps: int = 100
    redraws: int = 64  # of fresh data, for the floor
    metric_nodes: int = 65  # of the kinetic optimal path's table
    metric_points: int = 1500  # of the data it is estimated from
    mixture_components: int = 8  # of each class, where a short diffusion ends
    plane: Budget = dataclasses.field(default_factory=Budget)
    digits: Budget = dataclasses.field(default_factory=lambda: Budget(seeds=4, level=0.05))

    def __post_init__(self):
        for name in ("points", "likelihood_steps", "metric_points", "mixture_components"):
            check_count(name, getattr(self, name))
        for name in ("samples", "redraws", "metric_nodes"):
            check_count(name, getattr(self, name), low=2)
        for nfe in self.nfe:
            check_count("nfe", nfe, low=2)
        if list(self.nfe) != sorted(set(self.nfe)):
            raise ValueError(f"`nfe` must increase, got {self.nfe}.")
        if unknown := sorted(set(self.processes) - set(PROCESSES)):
            raise ValueError(f"unknown `processes` {', '.join(unknown)}; there are {', '.join(PROCESSES)}.")
        if not self.problems or set(self.problems) - set(lab.PROBLEMS):
            raise ValueError(f"`problems` must be some of {', '.join(lab.PROBLEMS)}, got {', '.join(self.problems) or 'none'}.")

    def budget(self, problem: lab.Problem) -> Budget:
        """That of the problem."""
        return self.plane if problem.shape == (2,) else self.digits


# Measures


def standardised(problem: lab.Problem) -> tuple[lab.Problem, Any]:
    """The problem with data of mean 0 and variance 1 over all entries, and the exact law on the plane."""
    x, labels = problem.train
    mean, std = jnp.mean(x, axis=0), jnp.std(x - jnp.mean(x, axis=0))

    def scaled(x):
        return (x - mean) / std

    law = None
    if problem.shape == (2,):
        exact = data.eight_gaussians()
        law = data.GaussianMixture(exact.weights, scaled(exact.means), exact.covariances / std**2)
    return (
        dataclasses.replace(
            problem,
            train=(scaled(x), labels),
            reference=scaled(problem.reference),
            fresh=lambda key, n: scaled(problem.fresh(key, n)),
        ),
        law,
    )


def measures(config: Config, problem: lab.Problem, law, process: Process, model, key) -> dict[str, Array]:
    """Of one trained model."""
    key_labels, key_starts, key_likelihood = jax.random.split(key, 3)
    labels = jax.random.choice(key_labels, problem.train[1], (config.samples,))
    starts = jax.vmap(lambda k, label: process.start(model, k, label, problem.shape))(jax.random.split(key_starts, config.samples), labels)

    def advance(i, n, states, labels):
        times = jnp.stack([process.time(j.astype(float), n) for j in (i, i + 1)])
        return jax.vmap(lambda state, label: process.step(model, times, state, label))(states, labels)

    keeps = problem.shape == (2,)

    def solve(n):
        # one program for all numbers of steps
        def body(i, carry):
            before, action, kept = carry
            after = advance(i, n.astype(float), before, labels)
            moved = jax.vmap(process.data)(after) - jax.vmap(process.data)(before)
            length = process.time((i + 1).astype(float), n.astype(float)) - process.time(i.astype(float), n.astype(float))
            kept = jax.lax.dynamic_update_index_in_dim(kept, shown(after), i + 1, 0) if keeps else kept
            return after, action + jnp.sum(moved**2) / length, kept

        def shown(states):
            return jax.vmap(process.data)(states[:SHOWN])

        kept = jnp.broadcast_to(shown(starts), (config.nfe[-1] + 1 if keeps else 1, *shown(starts).shape))
        final, action, kept = jax.lax.fori_loop(0, n, body, (starts, jnp.zeros(()), kept))
        final, first = (jax.vmap(process.data)(states) for states in (final, starts))
        span = process.time(n.astype(float), n.astype(float)) - process.time(jnp.zeros(()), n.astype(float))
        curvature = span * action / jnp.sum((final - first) ** 2) - 1
        return {
            "distance": data.energy_distance(final, problem.reference),
            "curvature": curvature,
            "paths": kept if keeps else final[None, :SHOWN],
        }

    solved = jax.lax.map(solve, jnp.asarray(config.nfe))
    out = {"distance": solved["distance"], "curvature": solved["curvature"][-1], "paths": solved["paths"][-1], "labels": labels[:SHOWN]}
    level = config.budget(problem).level

    def nll(key, x, label):
        flow = process.flow(model, label, config, level, problem.shape)
        if flow is None:
            return None
        key_noise, key_probe = jax.random.split(key)
        noised = flow.noised(key_noise, x)
        divergence = ExactDivergence() if x.size == 2 else HutchinsonDivergence(key_probe)
        log_prob, _ = log_likelihood(flow.velocity, noised.state, flow.log_prior, flow.times, dfx.Heun(), label, divergence)
        exact = jnp.nan if law is None else -data.GaussianMixture(law.weights, law.means, law.covariances + noised.covariance).log_prob(noised.point)
        return -log_prob - noised.correction, exact

    points, their_labels = held_out(problem, config)
    scores = jax.vmap(nll)(jax.random.split(key_likelihood, len(points)), points, their_labels)
    if scores is not None:
        out |= {"nll": jnp.mean(scores[0]), "exact_nll": jnp.mean(scores[1])}
    return out


SHOWN = 24


def fitting(budget: Budget, loss, model, batch) -> Fit:
    """The optimiser and budget that all share."""
    rate = optax.warmup_cosine_decay_schedule(0.0, budget.learning_rate, budget.steps // 20, budget.steps)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    return Fit(loss, model, optimiser, batch, every=budget.steps, ema_decay=0.999)


def held_out(problem: lab.Problem, config: Config):
    """Points that no model was trained on, with their labels."""
    labels = data.digits().test_y if problem.num_classes else jnp.zeros(len(problem.reference), int)
    rows = np.random.default_rng(config.seed).permutation(len(problem.reference))[: config.points]
    return problem.reference[rows], jnp.asarray(labels)[rows]


def compare(config: Config, run: Run, name: str) -> dict[str, dict]:
    """All processes on one problem: `process` -> its measures for all seeds, and the `floor`."""
    problem, law = standardised(lab.PROBLEMS[name]())
    budget, out = config.budget(problem), {}

    def floor():
        scores = lab.floor(jax.random.key(config.seed), problem.fresh, config.samples, problem.reference, config.redraws)
        return {"energy_distance": scores["energy_distance"]}

    floors = run.stage(f"{name}, floor", floor)
    for label in config.processes or PROCESSES:

        def batch(key, step):
            rows = jax.random.randint(key, (budget.batch_size,), 0, len(problem.train[0]))
            return jax.tree.map(lambda leaf: leaf[rows], problem.train)

        def stage(label=label):
            process = PROCESSES[label](config, problem)
            if process is None:
                return {}

            def train(key):
                key_model, key_run, key_measures = jax.random.split(key, 3)
                model = process.model(problem, budget, key_model)
                done = fitting(budget, process.loss, model, batch).run(key_run, budget.steps)
                scores = measures(config, problem, law, process, done.average, key_measures)
                return scores | {"loss": done.metrics["loss"][-1], "failed_at": done.failed_at}

            return lab.over_seeds(run, f"{name}: {label}", train, budget.seeds)

        if scores := run.stage(f"{name}, {label}", stage):
            out[label] = scores
    return {"floor": floors, "processes": out}


# What came of it


def needed(config: Config, distances: np.ndarray, noise: float) -> np.ndarray:
    """For each seed the fewest calls from which on the distance is no more than `noise` above what it is at the most; (seeds, calls) -> (seeds,)."""
    good = distances <= distances[:, -1:] + noise
    stays = np.flip(np.logical_and.accumulate(np.flip(good, 1), axis=1), 1)
    return np.where(good[:, -1], np.asarray(config.nfe)[np.argmax(stays, axis=1)], np.nan)


def rows_of(config: Config, name: str, result: dict) -> list[dict]:
    """A row for each process."""
    floor = result["floor"]["energy_distance"]
    rows = []
    for process, scores in result["processes"].items():
        calls = needed(config, scores["distance"], 2 * floor.std(ddof=1))
        row = {"problem": name, "process": process, "failed seeds": int((scores["failed_at"] >= 0).sum())}
        for nfe, values in zip(config.nfe, scores["distance"].T):
            row |= {f"NFE {nfe}": (distance := training.mean_of(values))["mean"], f"± at {nfe}": distance["±"]}
        row |= {"calls needed": float(np.median(calls)), "fewest": float(calls.min()), "most": float(calls.max())}
        row |= {"curvature": (curvature := training.mean_of(scores["curvature"]))["mean"], "± curvature": curvature["±"]}
        nll = training.mean_of(scores["nll"]) if "nll" in scores else {"mean": None, "±": None}
        exact = float(scores["exact_nll"].mean()) if "exact_nll" in scores else np.nan
        row |= {"nats": nll["mean"], "± nats": nll["±"], "exact nats": None if np.isnan(exact) else exact}
        rows.append(row)
    return rows


def style(i: int) -> dict:
    """Of the i-th process."""
    return {"color": f"C{i % 8}", "ls": ("-", "--", ":")[i // 8 % 3], "marker": "os^"[i // 8 % 3], "ms": 3.5, "lw": 1.3}


def draw_distances(config: Config, results: dict[str, dict]):
    """Mean over seeds, and the band of them all, against network calls."""
    figure, panels = lab.axes(1, len(results), width=6.0, height=4.4)
    for axis, (name, result) in zip(panels, results.items()):
        floor = result["floor"]["energy_distance"]
        low = max(np.quantile(floor, 0.95), floor.std())
        for process, scores in result["processes"].items():
            values, line = scores["distance"], style(list(PROCESSES).index(process))
            axis.plot(config.nfe, values.mean(0), label=process, **line)
            axis.fill_between(config.nfe, np.maximum(values.min(0), low / 10), values.max(0), color=line["color"], alpha=0.15, lw=0)
        axis.axhspan(max(np.quantile(floor, 0.05), low / 3), low, color="0.85", zorder=0)
        axis.set(xscale="log", yscale="log", ylim=(low / 3, 5.0), xlabel="network calls", title=name)
        axis.set_xticks(config.nfe, [str(nfe) for nfe in config.nfe])
        axis.minorticks_off()
    panels[0].set_ylabel("energy distance")
    panels[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def draw_curvature(config: Config, rows: list[dict]):
    """Does the one foretell the other?"""
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    figure, panels = lab.axes(1, len(problems), width=6.0, height=4.4)
    for axis, problem in zip(panels, problems):
        for i, row in enumerate(sorted((row for row in rows if row["problem"] == problem), key=lambda row: row["curvature"])):
            line = style(list(PROCESSES).index(row["process"])) | {"ls": "none", "ms": 6}
            spread = [[row["calls needed"] - row["fewest"]], [row["most"] - row["calls needed"]]]
            axis.errorbar([row["curvature"]], [row["calls needed"]], yerr=spread, elinewidth=0.8, **line)
            axis.annotate(
                row["process"], (row["curvature"], row["calls needed"]), xytext=(4, (4, -10, 13)[i % 3]), textcoords="offset points", fontsize=7.5
            )
        axis.set(xscale="log", yscale="log", xlabel="curvature in its own time", title=problem)
        axis.set_yticks(config.nfe, [str(nfe) for nfe in config.nfe])
        axis.minorticks_off()
    panels[0].set_ylabel("network calls needed")
    return figure


def draw_paths(processes: dict[str, dict], columns: int = 5, reach: float = 2.6):
    """A few trajectories of the first seed."""
    columns = min(columns, len(processes))
    figure, panels = lab.axes(math.ceil(len(processes) / columns), columns, width=2.3, height=2.4)
    for axis, (process, scores) in zip(panels, processes.items()):
        path = scores["paths"][0]
        axis.plot(path[..., 0], path[..., 1], lw=0.7, color="C0", alpha=0.7)
        axis.plot(*path[0].T, "o", ms=2.5, color="0.5")
        axis.plot(*path[-1].T, "o", ms=2.5, color="C3")
        axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
        axis.set_title(process, fontsize=9)
    for axis in panels[len(processes) :]:
        axis.axis("off")
    return figure


def draw_images(processes: dict[str, dict]):
    """Samples of the first seed, by label."""
    figure, panels = lab.axes(len(processes), 1, width=9.0, height=0.5)
    real = np.asarray(data.digits().train_x)
    mean, std = real.mean(0), (real - real.mean(0)).std()
    for axis, (process, scores) in zip(panels, processes.items()):
        images = scores["paths"][0, -1][np.argsort(scores["labels"][0], kind="stable")]
        images = (images * std + mean)[..., 0]
        axis.imshow(np.concatenate(np.pad(images, [(0, 0), (1, 1), (1, 1)]), axis=1), cmap="gray", vmin=-1, vmax=1)
        axis.set_ylabel(process, rotation=0, ha="right", va="center", fontsize=9)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    config, folder = parse(Config, lab.ROOT / "configs" / "diffusion" / "processes", argv, out=lab.ROOT / "runs" / "diffusion_processes")
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    with Run(folder, config) as run:
        report(config, run, {name: compare(config, run, name) for name in config.problems})


def report(config: Config, run: Run, results: dict[str, dict]) -> None:
    """Tables, figures and the page."""
    rows = [row for name, result in results.items() for row in rows_of(config, name, result)]
    floors = {name: result["floor"]["energy_distance"] for name, result in results.items()}
    run.results({"processes": rows, "floors": floors})
    distances = {name: {process: scores["distance"] for process, scores in result["processes"].items()} for name, result in results.items()}
    page = Report(
        "Processes",
        "Each with the same network, optimiser and budget; one network call a step. Energy distances are unbiased: fresh data score about 0 on the "
        f"plane. {config.plane.seeds} seeds on the plane, {config.digits.seeds} on the digits; bands span the seeds.",
    )
    page.heading("Energy distance against network calls")
    page.figure(run.figure("distance", draw_distances(config, results), {"nfe": config.nfe, "distance": distances}), "Grey: fresh data.")
    page.heading("Does curvature foretell the calls needed?")
    caption = "Median over seeds, fewest and most. Where the noise is far larger than the data (VE, EDM, PFGM++), it hides the bend at the end."
    page.figure(run.figure("curvature", draw_curvature(config, rows), {"rows": rows}), caption)
    for name, result in results.items():
        kind = "paths" if name == "eight Gaussians" else "images"
        page.heading(name)
        draw, caption = {
            "paths": (draw_paths, "From noise (grey) to data (red), the first seed. Those of large noise start far outside."),
            "images": (draw_images, "Samples by label, the first seed."),
        }[kind]
        shown = {process: scores["paths"][0] for process, scores in result["processes"].items()}
        page.figure(run.figure(f"{kind}_{name.replace(' ', '_')}", draw(result["processes"]), shown), caption)
        page.text(
            f"Fresh data: energy distance {np.mean(floors[name]):.2g} ± {np.std(floors[name], ddof=1):.2g}. Likelihoods are of data with noise "
            f"{(config.plane if kind == 'paths' else config.digits).level:g} on them; those of PSLD and MALDA are upper bounds of the nats."
        )
        page.table([row for row in rows if row["problem"] == name], sortable=True)
    page.write(run.folder / "report.html")
    for row in rows:
        nats = "" if row["nats"] is None else f", {row['nats']:.2f} nats" + ("" if row["exact nats"] is None else f" (exact {row['exact nats']:.2f})")
        shown = " ".join(f"{row[f'NFE {nfe}']:.2g}" for nfe in config.nfe)
        line = f"{row['problem']}, {row['process']}: distance {shown}; {row['calls needed']:.0f} calls needed; curvature {row['curvature']:.2g}{nats}"
        run.console.print(line, highlight=False, soft_wrap=True)
    run.console.print(f"report: {run.folder / 'report.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
