"""Trajectories and rates from snapshots: predator and prey (Lotka-Volterra), and three genes that repress each other in a ring (the repressilator).

    python experiments/transport/ecology.py [--preset smoke|default] [--out DIR] [--systems Lotka-Volterra …] [--rounds N …]

A population is seen at several times, in other individuals each time; every second snapshot is held out. What lies between is filled in by
Schrödinger bridges from one snapshot to the next, relative to

- `Brownian`: no dynamics, the usual piecewise bridge;
- `affine family`, `true family`: SBIRR, which refines the parameters of a family in turn with the bridges: any affine drift, and the system's
  equations with all rates unknown, from no drift (the repressilator from weak, wrong rates);
- `true parameters`: the reference that made the data, which is as well as bridges can do.

Judged on fresh individuals: W2 and energy distance at the held-out times, beside their floor between two fresh populations; the error of the drift
along true trajectories, relative to the drift; and the parameters, round by round. Systems, sizes and noise are those of Shen, Berlinghieri and
Broderick 2024 (arXiv:2408.06277). Everything is written to DIR (see `ergodax.core.run`).
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ergodax.core.check import check_count, check_range
from ergodax.core.config import parse
from ergodax.core.report import Report
from ergodax.core.run import Run
from ergodax.data import energy_distance
from ergodax.transport.bridge_solvers import KernelRegressor, RegressionBridgeSolver
from ergodax.transport.reference import ParametricReference
from ergodax.transport.sbirr import LeastSquaresRefit, LinearRefit, fit_sbirr
from ergodax.transport.snapshots import Snapshots


sys.path.append(str(Path(__file__).resolve().parent.parent))

from common import ROOT, axes, interval, over_seeds, wasserstein


@dataclasses.dataclass(frozen=True)
class System:
    """dX = f(θ, t, X) dt + √ε dW from a small box.

    - `family`: f, in coordinates θ without bounds; `rates` are those with a meaning.
    - `gap`: time between neighbouring snapshots that are known; half-way is one that is held out.
    """

    family: Callable
    rates: Callable
    names: tuple[str, ...]
    truth: tuple[float, ...]
    start: tuple[float, ...]
    corner: tuple[float, ...]  # of the box, of width 0.1
    gap: float
    refit: Callable


def lotka_volterra(parameters, t, x):
    """Prey grow and are eaten, predators eat and die."""
    growth, eaten, death, eating = parameters
    return jnp.stack([growth * x[0] - eaten * x[0] * x[1], eating * x[0] * x[1] - death * x[1]])


def repressilator(parameters, t, x):
    """Each gene's product is made the less, the more there is of the one before it."""
    production, power, threshold, decay = jnp.exp(parameters)
    before = jnp.roll(jnp.maximum(x, 1e-6), 1)
    return production / (1 + (before / threshold) ** power) - decay * x


def affine(parameters, t, x):
    """Any matrix and shift."""
    return parameters[0] @ x + parameters[1]


SYSTEMS = {
    "Lotka-Volterra": System(
        lotka_volterra,
        lambda p: p,
        ("growth", "eaten", "death", "eating"),
        (1.0, 0.4, 0.4, 0.1),
        (0.0, 0.0, 0.0, 0.0),
        (5.0, 4.0),
        2.0,
        LinearRefit(),
    ),
    "repressilator": System(
        repressilator,
        np.exp,
        ("production", "power", "threshold", "decay"),
        tuple(np.log([10.0, 3.0, 1.0, 1.0])),
        tuple(np.log([1.0, 1.0, 1.0, 0.1])),
        (1.0, 1.0, 2.0),
        1.5,
        LeastSquaresRefit(),
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """`experiments/transport/ecology.py`"""

    seed: int = 0
    systems: tuple[str, ...] = tuple(SYSTEMS)
    seeds: int = 5
    cells: int = 200  # individuals a snapshot
    intervals: int = 5  # between known snapshots
    epsilon: float = 0.01
    resolution: int = 200  # Euler steps of the truth in an interval
    steps: int = 60  # and of the bridges
    rounds: int = 20
    sweeps: int = 3
    inducing: int = 16
    shown: int = 30  # trajectories in the figure

    def __post_init__(self):
        for name in ("seeds", "intervals", "rounds", "sweeps", "inducing"):
            check_count(name, getattr(self, name))
        for name in ("cells", "resolution", "steps"):
            check_count(name, getattr(self, name), low=2)
        check_count("shown", self.shown)
        check_range("shown", self.shown, high=self.cells)
        check_range("epsilon", self.epsilon, low=0.0, open_low=True)
        for name in ("steps", "resolution"):
            if getattr(self, name) % 2:
                raise ValueError(f"`{name}` must be even, so that half-way lies on the grid, got {getattr(self, name)}.")
        if not self.systems or set(self.systems) - set(SYSTEMS):
            raise ValueError(f"`systems` must be some of {', '.join(SYSTEMS)}, got {', '.join(self.systems) or 'none'}.")


def simulate(config: Config, system: System, key):
    """A fresh population at all known and held-out times, (2 K + 1, cells, d)."""
    key_start, key_run = jax.random.split(key)
    corner, truth = jnp.array(system.corner), jnp.array(system.truth)
    dt = system.gap / config.resolution

    def step(x, key):
        drift = jax.vmap(lambda x: system.family(truth, 0.0, x))(x)
        return x + dt * drift + jnp.sqrt(config.epsilon * dt) * jax.random.normal(key, x.shape), x

    start = corner + 0.1 * jax.random.uniform(key_start, (config.cells, len(corner)))
    last, paths = jax.lax.scan(step, start, jax.random.split(key_run, config.intervals * config.resolution))
    return jnp.concatenate([paths[:: config.resolution // 2], last[None]])


def references(config: Config, system: System) -> dict[str, tuple]:
    """Name -> (reference to start from, rounds, refit)."""
    d = len(system.corner)
    nothing = jnp.zeros((d, d)), jnp.zeros(d)

    def reference(family, parameters):
        return ParametricReference(family, parameters, config.epsilon)

    return {
        "Brownian": (reference(affine, nothing), 0, LinearRefit()),
        "affine family": (reference(affine, nothing), config.rounds, LinearRefit()),
        "true family": (reference(system.family, jnp.array(system.start)), config.rounds, system.refit),
        "true parameters": (reference(system.family, jnp.array(system.truth)), 0, system.refit),
    }


def populations(config: Config, system: System, key):
    """For each time its own population: known and held-out ones are other individuals at every time."""
    count = 2 * config.intervals + 1
    return jax.vmap(lambda key, k: simulate(config, system, key)[k])(jax.random.split(key, count), jnp.arange(count))


def fill_in(config: Config, system: System, reference, rounds: int, refit):
    """`train(key) -> dict` for `over_seeds`."""

    def train(key):
        key_data, key_fit, key_fresh, key_paths = jax.random.split(key, 4)
        rows = populations(config, system, key_data)
        times = jnp.arange(config.intervals + 1) * system.gap
        solver = RegressionBridgeSolver(KernelRegressor(config.inducing), config.sweeps)
        options = {"rounds": rounds, "steps": config.steps, "solver": solver, "refit": refit}
        fitted = fit_sbirr(key_fit, Snapshots(times, list(rows[::2])), reference, **options)
        half = config.steps // 2
        # the drift where true individuals are, at the held-out times
        fresh = simulate(config, system, key_fresh)[1::2]
        found = jax.vmap(lambda t, x: jax.vmap(lambda x: fitted(t, x))(x))(fitted.grid[:, half] + 1e-4 * system.gap, fresh)
        true = jax.vmap(jax.vmap(lambda x: system.family(jnp.array(system.truth), 0.0, x)))(fresh)
        middle = config.intervals // 2
        return {
            "held_out": rows[1::2],
            "filled": fitted.bridges.paths[:, half],
            "drift_error": jnp.sqrt(jnp.sum((found - true) ** 2) / jnp.sum(true**2)),
            "parameters": jnp.concatenate([leaf.reshape(rounds + 1, -1) for leaf in jax.tree.leaves(fitted.parameters)], axis=1),
            "kl": fitted.kl,
            "paths": fitted.trajectories(key_paths, middle, rows[2 * middle, : config.shown]),
        }

    return train


def distances(x, y) -> dict[str, np.ndarray]:
    """Over leading axes (seeds, times)."""
    pairs = list(np.ndindex(x.shape[:2]))
    energies = [float(energy_distance(jnp.asarray(x[pair]), jnp.asarray(y[pair]))) for pair in pairs]
    return {
        "w2": np.reshape([wasserstein(x[pair], y[pair]) for pair in pairs], x.shape[:2]),
        "energy_distance": np.reshape(energies, x.shape[:2]),
    }


def compare(config: Config, run: Run, name: str) -> dict[str, dict]:
    """All references on one system, and the floor."""
    system, out = SYSTEMS[name], {}

    def floor():
        def draw(key):
            key_first, key_second, key_paths = jax.random.split(key, 3)
            first, second = (populations(config, system, k)[1::2] for k in (key_first, key_second))
            return {"first": first, "second": second, "truth": simulate(config, system, key_paths)[:, : config.shown]}

        found = over_seeds(run, f"{name}: truth", draw, config.seeds, batch_size=1)
        return distances(found["first"], found["second"]) | {"truth": found["truth"][0]}

    out["floor"] = run.stage(f"{name}, floor", floor)
    for label, parts in references(config, system).items():

        def stage(label=label, parts=parts):
            started = time.perf_counter()
            found = over_seeds(run, f"{name}: {label}", fill_in(config, system, *parts), config.seeds, batch_size=1)
            seconds = time.perf_counter() - started
            kept = {key: found[key] for key in ("drift_error", "parameters", "kl")}
            shown = {"paths": found["paths"][0], "held_out": found["held_out"][0]}
            return distances(found["filled"], found["held_out"]) | kept | shown | {"seconds": np.array(seconds)}

        out[label] = run.stage(f"{name}, {label}", stage)
    return out


# What came of it


def rows_of(name: str, result: dict) -> list[dict]:
    """A row for each reference, and the floor; means over held-out times."""
    rows = []
    for label, scores in result.items():
        row = {"system": name, "reference": "fresh data" if label == "floor" else label}
        for measure, title in (("w2", "W2"), ("energy_distance", "energy distance")):
            row[title], row[f"± {title}"] = interval(scores[measure].mean(1))
        row["of Brownian"] = row["W2"] / result["Brownian"]["w2"].mean()
        if label != "floor":
            row["drift error"], row["± drift error"] = interval(scores["drift_error"])
            row["nats"] = float(scores["kl"][:, -1].mean())
            row["seconds"] = float(scores["seconds"])
        rows.append(row)
    return rows


def rates_of(name: str, result: dict) -> list[dict]:
    """A row for each rate: the truth, and what the last round of the true family says."""
    system, last = SYSTEMS[name], result["true family"]["parameters"][:, -1]
    found = np.asarray(system.rates(last))
    truth = np.asarray(system.rates(np.array(system.truth)))
    rows = []
    for rate, true, values in zip(system.names, truth, found.T):
        mean, error = interval(values)
        rows.append({"system": name, "rate": rate, "truth": float(true), "found": mean, "±": error, "relative error": float(np.abs(mean / true - 1))})
    return rows


def draw_distances(results: dict[str, dict], gaps: dict[str, float]):
    """W2 at each held-out time."""
    figure, panels = axes(1, len(results), 4.6, 3.4)
    for axis, (name, result) in zip(panels, results.items()):
        times = (np.arange(result["floor"]["w2"].shape[1]) + 0.5) * gaps[name]
        for i, (label, scores) in enumerate(result.items()):
            style = {"color": "0.6", "ls": "--"} if label == "floor" else {"color": f"C{i - 1}", "marker": "o", "ms": 4}
            axis.plot(times, scores["w2"].mean(0), lw=1.3, label="fresh data" if label == "floor" else label, **style)
            axis.fill_between(times, scores["w2"].min(0), scores["w2"].max(0), color=style["color"], alpha=0.15, lw=0)
        axis.set(yscale="log", xlabel="held-out time", title=name)
    panels[0].set_ylabel("W2")
    panels[-1].legend(frameon=False, fontsize=8)
    return figure


def draw_rates(results: dict[str, dict]):
    """Relative to the truth, round by round, the mean and the band of all seeds."""
    figure, panels = axes(1, len(results), 4.6, 3.4)
    for axis, (name, result) in zip(panels, results.items()):
        system = SYSTEMS[name]
        shares = np.asarray(system.rates(result["true family"]["parameters"])) / np.asarray(system.rates(np.array(system.truth)))
        rounds = np.arange(shares.shape[1])
        for i, rate in enumerate(system.names):
            axis.plot(rounds, shares[..., i].mean(0), color=f"C{i}", label=rate)
            axis.fill_between(rounds, shares[..., i].min(0), shares[..., i].max(0), color=f"C{i}", alpha=0.15, lw=0)
        axis.axhline(1, color="0.6", lw=0.8, ls="--")
        axis.set(xlabel="round", title=name)
        axis.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("rate / true rate")
    return figure


def draw_paths(results: dict[str, dict]):
    """The first two coordinates: the truth and what was filled in."""
    labels = ["truth", "Brownian", "affine family", "true family"]
    figure, panels = axes(len(results), len(labels), 2.9, 2.7)
    for row, (name, result) in enumerate(results.items()):
        first = panels[row * len(labels)]
        for column, label in enumerate(labels):
            axis = panels[row * len(labels) + column]
            paths = result["floor"]["truth"] if label == "truth" else result[label]["paths"]
            axis.plot(paths[..., 0], paths[..., 1], lw=0.5, color="C0", alpha=0.5)
            held_out = result["Brownian"]["held_out"].reshape(-1, paths.shape[-1])
            axis.plot(held_out[:, 0], held_out[:, 1], ".", ms=1, color="C3")
            axis.set_title(f"{name}: {label}", fontsize=9)
            if column:
                axis.sharex(first)
                axis.sharey(first)
    return figure


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    config, folder = parse(Config, ROOT / "configs" / "transport" / "ecology", argv, out=ROOT / "runs" / "transport_ecology")
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    with Run(folder, config) as run:
        report(config, run, {name: compare(config, run, name) for name in config.systems})


def report(config: Config, run: Run, results: dict[str, dict]) -> None:
    """Tables, figures and the page."""
    rows = [row for name, result in results.items() for row in rows_of(name, result)]
    rates = [row for name, result in results.items() for row in rates_of(name, result)]
    run.results({"references": rows, "rates": rates})
    lead = (
        f"{config.seeds} populations, {config.cells} individuals at each of {config.intervals + 1} known times, {config.intervals} more held out; "
        f"{config.rounds} rounds. ± is twice the standard error over seeds."
    )
    page = Report("Dynamics from snapshots", lead)
    page.heading("Held-out snapshots")
    measures = {name: {label: scores["w2"] for label, scores in result.items()} for name, result in results.items()}
    gaps = {name: SYSTEMS[name].gap for name in results}
    page.figure(run.figure("distances", draw_distances(results, gaps), measures), "Bands span the seeds. Dashed: two fresh populations.")
    page.table(rows)
    page.text("drift error: root of the mean squared error over that of the drift, where fresh individuals are. nats: KL of bridges to reference.")
    page.heading("Rates")
    histories = {name: result["true family"]["parameters"] for name, result in results.items()}
    page.figure(run.figure("rates", draw_rates(results), histories), "Of the true family. Bands span the seeds.")
    page.table(rates)
    page.heading("Trajectories")
    shown = {name: {label: scores["paths"] for label, scores in result.items() if label != "floor"} for name, result in results.items()}
    page.figure(run.figure("paths", draw_paths(results), shown), "The first seed, from the middle snapshot both ways. Red: held-out individuals.")
    page.write(run.folder / "report.html")
    for row in rows:
        drift = f", drift error {row['drift error']:.3f}" if "drift error" in row else ""
        line = f"{row['system']}, {row['reference']}: W2 {row['W2']:.3f} ({row['of Brownian']:.0%} of Brownian){drift}"
        run.console.print(line, highlight=False, soft_wrap=True)
    for row in rates:
        line = f"{row['system']}, {row['rate']}: {row['found']:.3f} ± {row['±']:.3f}, truth {row['truth']:.3f}"
        run.console.print(line, highlight=False, soft_wrap=True)
    run.console.print(f"report: {run.folder / 'report.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
