"""Which coupling? Flow matching from eight Gaussians to two moons, alone and told a condition, with each coupling of the mini-batch.

    python experiments/transport/couplings.py [--preset smoke|default] [--out DIR] [--tasks plain labels position] [--couplings optimal …] …

The laws are those of torchcfm's examples: eight modes of variance 0.1 on a circle of radius 5; moons with noise 0.2, times three, less 1. Models are
told nothing (`plain`), which moon a point is of (`labels`), or where on the x-axis it lies (`position`). Over several seeds in one program:

- W2 of samples to fresh data after 1, 2, 4 and 100 Euler steps, exact between samples of one size, beside fresh data against fresh data. With labels
  within each moon; with a position jointly in (x, position), so that a sample which ignores what it was told pays for it;
- how far samples miss their condition: the share on the wrong moon, or the mean distance to the position;
- path energy ∫E|v|²dt of the flow, and by how much it exceeds the least possible, the squared W2 of the two laws.

Everything is written to DIR (see `ergodax.core.run`).
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.spatial.distance import cdist

from ergodax import data, nn
from ergodax.core import Fit, integrate
from ergodax.core.check import check_count, check_range
from ergodax.core.config import parse
from ergodax.core.report import Report
from ergodax.core.run import Run
from ergodax.transport import (
    EntropicCoupling,
    IndependentCoupling,
    LinearInterpolant,
    MatchedShare,
    OptimalCoupling,
    VelocityLoss,
    ZeroGamma,
    ode_term,
)


sys.path.append(str(Path(__file__).resolve().parent.parent))

from common import ROOT, axes, interval, over_seeds, wasserstein


TASKS = ("plain", "labels", "position")


@dataclasses.dataclass(frozen=True)
class Config:
    """`experiments/transport/couplings.py`"""

    seed: int = 0
    seeds: int = 10
    tasks: tuple[str, ...] = TASKS
    couplings: tuple[str, ...] = ()  # all of them if empty
    steps: int = 2000
    batch_size: int = 128
    learning_rate: float = 2e-3
    width: int = 64
    depth: int = 2
    epsilon: float = 2.0  # of the entropic coupling, in units of x²
    nfe: tuple[int, ...] = (1, 2, 4, 100)
    samples: int = 1000
    redraws: int = 10  # of fresh data, for the floor

    def __post_init__(self):
        for name in ("seeds", "steps", "batch_size", "width", "depth"):
            check_count(name, getattr(self, name))
        for name in ("samples", "redraws"):
            check_count(name, getattr(self, name), low=2)
        for nfe in self.nfe:
            check_count("nfe", nfe)
        for name in ("learning_rate", "epsilon"):
            check_range(name, getattr(self, name), low=0.0, open_low=True)
        if list(self.nfe) != sorted(set(self.nfe)):
            raise ValueError(f"`nfe` must increase, got {self.nfe}.")
        if not self.tasks or set(self.tasks) - set(TASKS):
            raise ValueError(f"`tasks` must be some of {', '.join(TASKS)}, got {', '.join(self.tasks) or 'none'}.")
        known = sorted({name for task in TASKS for name in couplings(self, task)})
        if unknown := sorted(set(self.couplings) - set(known)):
            raise ValueError(f"unknown `couplings` {', '.join(unknown)}; there are {', '.join(known)}.")


# Data


def source(key, n):
    """Eight Gaussians."""
    return data.eight_gaussians(5.0, 0.1**0.5).sample(key, n)


def moons(key, n):
    """Two moons and which of them each point is of."""
    key_moon, key_points, key_noise = jax.random.split(key, 3)
    upper = jax.random.bernoulli(key_moon, shape=(n,))
    angle = jax.random.uniform(key_points, (n,), maxval=np.pi)
    x, y = jnp.cos(angle), jnp.sin(angle)
    points = jnp.stack([jnp.where(upper, x, 1 - x), jnp.where(upper, y, 0.5 - y)], -1) + 0.2 * jax.random.normal(key_noise, (n, 2))
    return 3 * points - 1, upper


def conditioned(task: str, key, n):
    """Points of the target and the condition of each, (n, 0) or (n, 1)."""
    points, upper = moons(key, n)
    told = {"plain": jnp.zeros((n, 0)), "labels": 2.0 * upper[:, None] - 1, "position": points[:, :1]}
    return points, told[task]


def couplings(config: Config, task: str) -> dict[str, Callable]:
    """Those that make sense for a task."""
    found = {"independent": IndependentCoupling(), "optimal": OptimalCoupling(), "entropic": EntropicCoupling(config.epsilon)}
    if task == "labels":
        found["optimal by condition"] = OptimalCoupling(within_condition=True)
    if task == "position":
        found["optimal by condition"] = OptimalCoupling(MatchedShare())
    return found


class Conditioned(eqx.Module):
    """A network that reads the condition beside x."""

    network: nn.TimeMLP

    def __call__(self, t, x, args, *, key=None):
        """`args` is the condition."""
        return self.network(t, jnp.concatenate([x, args]), None)[: x.size]


# Stages


def train_and_sample(config: Config, task: str, coupling: Callable) -> Callable:
    """`key -> dict of arrays`, a whole run of one seed."""
    size = 2 + (task != "plain")
    loss = VelocityLoss(LinearInterpolant(ZeroGamma()), coupling=coupling, antithetic=False)

    def batch(key, step):
        key_source, key_target = jax.random.split(key)
        return source(key_source, config.batch_size), *conditioned(task, key_target, config.batch_size)

    def one(key):
        key_model, key_run, key_start, key_target = jax.random.split(key, 4)
        model = Conditioned(nn.TimeMLP((size,), config.width, config.depth, key=key_model))
        optimiser = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))
        fitted = Fit(loss, model, optimiser, batch, every=config.steps, ema_decay=0.999).run(key_run, config.steps)
        starts = source(key_start, config.samples)
        targets, told = conditioned(task, key_target, config.samples)
        term = ode_term(fitted.average)

        def solve(start, condition, nfe):
            times = jnp.linspace(0.0, 1.0, nfe + 1)
            end, path = integrate(term, dfx.Euler(), start, condition, times=times, save=lambda t, x: x)
            steps = jnp.diff(jnp.concatenate([start[None], path]), axis=0)
            return end, path, jnp.sum(steps**2) * nfe

        ends = {nfe: jax.vmap(lambda start, condition, nfe=nfe: solve(start, condition, nfe))(starts, told) for nfe in config.nfe}
        finest = ends[config.nfe[-1]]
        return {
            "samples": jnp.stack([end for end, _, _ in ends.values()]),
            "energy": jnp.mean(finest[2]),
            "starts": starts,
            "targets": targets,
            "told": told,
            "paths": finest[1][:200],
            "failed_at": fitted.failed_at,
        }

    return one


def distance(task: str, samples, told, targets, their) -> float:
    """Between samples told a condition and targets with theirs; W2 within the moons, jointly with the position, or plain."""
    if task == "labels":
        parts = []
        for label in (-1, 1):
            ours, others = samples[told[:, 0] == label], targets[their[:, 0] == label]
            n = min(len(ours), len(others))
            parts.append(wasserstein(ours[:n], others[:n]) ** 2)
        return float(np.sqrt(np.mean(parts)))
    return wasserstein(np.concatenate([samples, told], 1), np.concatenate([targets, their], 1))


def missed(task: str, samples, told) -> float:
    """How far samples are from what they were told: the share nearer to the middle line of the other moon, or the mean distance along the x-axis."""
    if task == "plain":
        return np.nan
    if task == "position":
        return float(np.abs(samples[:, 0] - told[:, 0]).mean())
    angle = np.linspace(0, np.pi, 200)
    arcs = [3 * np.stack(arc, -1) - 1 for arc in ((1 - np.cos(angle), 0.5 - np.sin(angle)), (np.cos(angle), np.sin(angle)))]
    lower, upper = (cdist(samples, arc).min(1) for arc in arcs)
    return float(((upper < lower) != (told[:, 0] > 0)).mean())


def compare(config: Config, run: Run, task: str) -> dict[str, dict]:
    """All couplings of a task: `coupling` -> measures of all seeds, and the `floor`."""

    def floor():
        scores, gaps = [], []
        for key in jax.random.split(jax.random.key(config.seed + 1), config.redraws):
            keys = jax.random.split(key, 3)
            (a, told_a), (b, told_b) = (map(np.asarray, conditioned(task, k, config.samples)) for k in keys[:2])
            scores.append(distance(task, a, told_a, b, told_b))
            gaps.append(wasserstein(np.asarray(source(keys[2], config.samples)), a) ** 2)
        return {"distance": np.array(scores), "least energy": np.array(gaps)}

    out = {"floor": run.stage(f"{task}, floor", floor)}
    for name, coupling in couplings(config, task).items():
        if config.couplings and name not in config.couplings:
            continue

        def stage(name=name, coupling=coupling):
            started = time.perf_counter()
            found = over_seeds(run, f"{task}: {name}", train_and_sample(config, task, coupling), config.seeds)
            seconds = time.perf_counter() - started
            # against fresh data, not the ones whose conditions were told
            fresh = [
                map(np.asarray, conditioned(task, jax.random.fold_in(jax.random.key(config.seed), i), config.samples)) for i in range(config.seeds)
            ]
            fresh = [tuple(pair) for pair in fresh]
            scores = [[distance(task, x, told, *fresh[i]) for x in found["samples"][i]] for i, told in enumerate(found["told"])]
            misses = [[missed(task, x, told) for x in found["samples"][i]] for i, told in enumerate(found["told"])]
            shown = {"starts": found["starts"][0, :200], "paths": found["paths"][0], "told": found["told"][0, :200]}
            measures = {"distance": np.array(scores), "missed": np.array(misses), "energy": found["energy"], "failed_at": found["failed_at"]}
            return measures | {"seconds": np.array(seconds)} | shown

        out[name] = run.stage(f"{task}, {name}", stage)
    return out


# What came of it


def rows_of(config: Config, task: str, result: dict) -> list[dict]:
    """A row for each coupling."""
    least, rows = result["floor"]["least energy"].mean(), []
    for name, scores in result.items():
        if name == "floor":
            continue
        row = {"task": task, "coupling": name}
        for i, nfe in enumerate(config.nfe):
            row[f"W2, {nfe} steps"], row[f"± {nfe}"] = interval(scores["distance"][:, i])
        row["missed"] = interval(scores["missed"][:, -1])[0]
        row["path energy"], row["± energy"] = interval(scores["energy"])
        row["over the least"] = row["path energy"] / least - 1
        rows.append(row | {"seconds": float(scores["seconds"])})
    return rows


def draw_distances(config: Config, results: dict[str, dict]):
    """W2 against steps."""
    figure, panels = axes(1, len(results), 4.4, 3.4)
    for axis, (task, result) in zip(panels, results.items()):
        for name, scores in result.items():
            if name == "floor":
                continue
            means, errors = np.array([interval(scores["distance"][:, i]) for i in range(len(config.nfe))]).T
            axis.errorbar(config.nfe, means, np.nan_to_num(errors), marker="o", ms=4, lw=1.2, capsize=2, label=name)
        axis.axhspan(*np.quantile(result["floor"]["distance"], [0.0, 1.0]), color="0.85", zorder=0)
        axis.set(xscale="log", yscale="log", xlabel="Euler steps", title=task)
        axis.set_xticks(config.nfe, [str(nfe) for nfe in config.nfe])
        axis.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("W2 to fresh data")
    return figure


def draw_paths(results: dict[str, dict]):
    """From source to target, a row for each task."""
    columns = max(len(result) - 1 for result in results.values())
    figure, panels = axes(len(results), columns, 2.6, 2.6)
    for axis in panels:
        axis.set_axis_off()
    for row, (task, result) in enumerate(results.items()):
        for column, name in enumerate(name for name in result if name != "floor"):
            axis, scores = panels[row * columns + column], result[name]
            told = scores["told"][:, 0] if scores["told"].shape[1] else np.zeros(len(scores["starts"]))
            paths = np.concatenate([scores["starts"][:, None], scores["paths"]], 1)
            for path in paths:
                axis.plot(*path.T, color="0.75", lw=0.4, zorder=0)
            axis.scatter(*paths[:, 0].T, s=3, color="0.4")
            axis.scatter(*paths[:, -1].T, s=5, c=told, cmap="coolwarm")
            axis.set_axis_on()
            axis.set(title=f"{task}: {name}", xticks=[], yticks=[], aspect="equal")
            axis.title.set_fontsize(9)
            axis.spines[:].set_visible(False)
    return figure


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    config, folder = parse(Config, ROOT / "configs" / "transport" / "couplings", argv, out=ROOT / "runs" / "transport_couplings")
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    with Run(folder, config) as run:
        report(config, run, {task: compare(config, run, task) for task in config.tasks})


def report(config: Config, run: Run, results: dict[str, dict]) -> None:
    """Tables, figures and the page."""
    rows = [row for task, result in results.items() for row in rows_of(config, task, result)]
    floors = {task: dict(zip(("mean", "±"), interval(result["floor"]["distance"]))) for task, result in results.items()}
    least = {task: interval(result["floor"]["least energy"])[0] for task, result in results.items()}
    run.results({"couplings": rows, "floors": floors, "least energy": least})
    lead = f"{config.seeds} seeds, batches of {config.batch_size}, {config.steps} steps; ± is twice the standard error over seeds."
    page = Report("Couplings", lead)
    page.heading("W2 to fresh data")
    distances = {task: {name: scores["distance"] for name, scores in result.items()} for task, result in results.items()}
    page.figure(run.figure("distances", draw_distances(config, results), distances), "Grey: fresh data against fresh data.")
    page.table(rows)
    page.text("missed: with labels the share of samples on the wrong moon, with positions their mean distance from it, at the most steps.")
    page.text("over the least: path energy over the squared W2 of the two laws (between samples, which is a little less), less one.")
    page.heading("Paths")
    shown = {task: {name: scores["paths"] for name, scores in result.items() if name != "floor"} for task, result in results.items()}
    page.figure(run.figure("paths", draw_paths(results), shown), "The first seed at the most steps. Colour: what the model was told.")
    page.write(run.folder / "report.html")
    for row in rows:
        shown = ", ".join(f"{nfe}: {row[f'W2, {nfe} steps']:.3f}" for nfe in config.nfe)
        line = f"{row['task']}, {row['coupling']}: W2 {shown}; missed {row['missed']:.3f}; energy {row['path energy']:.2f}"
        run.console.print(line, highlight=False, soft_wrap=True)
    run.console.print(f"report: {run.folder / 'report.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
