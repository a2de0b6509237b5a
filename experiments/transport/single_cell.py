"""A day of the bone marrow that nobody looked at: predict the cells of each middle day of a CITE-seq time course from those of the other days.

    python experiments/transport/single_cell.py --data cite_pca50.npz [--preset smoke|default] [--out DIR] [--methods LightSB "OT midpoint" …] …

The file holds the first 50 principal components of some 7000 cells on each of days 2, 3, 4 and 7 (the folder of `ERGODAX_DATA` is looked in without
`--data`). Every middle day is held out in turn and predicted from all others, by methods that know nothing of it:

- `nearest day`, `random midpoint`, `OT midpoint`: its neighbours unchanged, and pairs of their cells interpolated, at random or by optimal transport;
- `OT flow matching`, `action matching`, `multi-marginal interpolant`: learned flows, the last two over all days, run from the day before;
- `LightSB`, `SBIRR`: Schrödinger bridges between the neighbours, with Brownian reference for several ε, or with a reference that is learned.

Judged by W1 and W2 (exact, between equal numbers of cells), energy distance and the MMD of a Gaussian kernel, with bootstrap bands over cells and the
floor of the held-out day against itself. W1 in 50 dimensions depends on the number of cells and punishes noise; read all columns.

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
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist, pdist

from ergodax import nn
from ergodax.core import Fit, integrate
from ergodax.core.check import check_count, check_range
from ergodax.core.config import UsageError, parse, quit_with
from ergodax.core.report import Report
from ergodax.core.run import Run
from ergodax.transport import (
    ActionMatchingLoss,
    ActionVelocity,
    BarycentricLoss,
    Brownian,
    ConsistentFields,
    EdgePath,
    InterpolatedSnapshots,
    LinearInterpolant,
    Minibatches,
    OptimalCoupling,
    ParametricReference,
    PathVelocity,
    PotentialAction,
    Samples,
    Snapshots,
    VelocityLoss,
    ZeroGamma,
    fit_light_sb,
    fit_sbirr,
    sample_bridge,
)


sys.path.append(str(Path(__file__).resolve().parent.parent))

from common import ROOT, axes


@dataclasses.dataclass(frozen=True)
class Config:
    """`experiments/transport/single_cell.py`"""

    data: str = ""  # the .npz file; empty: cite_pca50.npz in the folder of ERGODAX_DATA
    seed: int = 0
    methods: tuple[str, ...] = ()  # all of them if empty
    dimensions: int = 50  # leading principal components
    cells: int = 2000  # compared at a time
    bootstraps: int = 10
    epsilons: tuple[float, ...] = (1.0, 10.0, 100.0)  # of LightSB, in units of the data squared per gap between the neighbours
    components: int = 50
    sb_steps: int = 2500
    sbirr_epsilon: float = 100.0  # in the same units
    rounds: int = 4  # of SBIRR
    particles: int = 1000  # of SBIRR, from each day
    steps: int = 3000  # of networks
    batch_size: int = 128
    width: int = 128
    depth: int = 2
    learning_rate: float = 1e-3

    def __post_init__(self):
        for name in ("dimensions", "components", "sb_steps", "rounds", "particles", "steps", "batch_size", "width", "depth"):
            check_count(name, getattr(self, name))
        for name in ("cells", "bootstraps"):
            check_count(name, getattr(self, name), low=2)
        check_range("learning_rate", self.learning_rate, low=0.0, open_low=True)
        check_range("epsilons", self.epsilons, low=0.0, open_low=True)
        check_range("sbirr_epsilon", self.sbirr_epsilon, low=0.0, open_low=True)
        if unknown := sorted(set(self.methods) - set(METHODS)):
            raise ValueError(f"unknown `methods` {', '.join(unknown)}; there are {', '.join(METHODS)}.")


# Data


def load(config: Config) -> dict[int, np.ndarray]:
    """Day -> cells."""
    path = Path(config.data) if config.data else Path(os.environ.get("ERGODAX_DATA", "")) / "cite_pca50.npz"
    if not path.is_file():
        raise UsageError(f"no data at {path}: give the file cite_pca50.npz by --data, or its folder in the environment variable ERGODAX_DATA.")
    with np.load(path) as arrays:
        days = {int(name.removeprefix("day")): arrays[name][:, : config.dimensions].astype(np.float32) for name in arrays.files}
    return dict(sorted(days.items()))


@dataclasses.dataclass(frozen=True)
class Task:
    """A held-out day: what is known, in units of `scale` = the known cells' standard deviation, and how many cells to predict."""

    days: tuple[float, ...]
    cells: tuple[np.ndarray, ...]
    day: float
    scale: float
    count: int

    @classmethod
    def hold_out(cls, config: Config, data: dict[int, np.ndarray], day: int) -> "Task":
        """All days but `day`."""
        known = {other: cells for other, cells in data.items() if other != day}
        scale = float(np.sqrt(np.concatenate(list(known.values())).var(0).mean()))
        return cls(tuple(map(float, known)), tuple(cells / scale for cells in known.values()), float(day), scale, config.cells)

    @property
    def before(self) -> int:
        """The index of the last known day before the held-out one; the next is the first after it."""
        return max(k for k, day in enumerate(self.days) if day < self.day)

    @property
    def share(self) -> float:
        """Where the day lies between its neighbours, in (0, 1)."""
        first, last = self.days[self.before : self.before + 2]
        return (self.day - first) / (last - first)

    @property
    def times(self) -> np.ndarray:
        """The known days, scaled to [0, 1]."""
        days = np.array(self.days)
        return (days - days[0]) / (days[-1] - days[0])

    @property
    def time(self) -> float:
        """The held-out day on that scale."""
        return (self.day - self.days[0]) / (self.days[-1] - self.days[0])

    def neighbours(self, key):
        """`count` cells of the day before and of the day after, drawn without replacement where there are enough."""
        return [
            jax.random.choice(k, jnp.asarray(cells), (self.count,), replace=len(cells) < self.count)
            for k, cells in zip(jax.random.split(key), self.cells[self.before : self.before + 2])
        ]


# Methods: `(config, task, key) -> {name: predicted cells}`


def nearest_day(config: Config, task: Task, key) -> dict:
    """The neighbour that is nearer in time, the one before of two that are equally near."""
    return {"nearest day": task.neighbours(key)[int(task.share > 0.5)]}


def random_midpoint(config: Config, task: Task, key) -> dict:
    """Pairs at random."""
    before, after = task.neighbours(key)
    return {"random midpoint": (1 - task.share) * before + task.share * after}


def ot_midpoint(config: Config, task: Task, key) -> dict:
    """Pairs of least squared distance: displacement interpolation between the samples."""
    before, after = map(np.asarray, task.neighbours(key))
    rows, columns = linear_sum_assignment(cdist(before, after, "sqeuclidean"))
    return {"OT midpoint": (1 - task.share) * before[rows] + task.share * after[columns]}


def light_sb(config: Config, task: Task, key) -> dict:
    """x_t of the bridge between the neighbours: both its ends, and the Brownian bridge between them."""
    found = {}
    before, after = (jnp.asarray(cells) for cells in task.cells[task.before : task.before + 2])
    for epsilon in config.epsilons:
        key_fit, key_cells, key_end, key_bridge = jax.random.split(key, 4)
        scaled = epsilon / task.scale**2
        bridge = eqx.filter_jit(fit_light_sb)(key_fit, before, after, scaled, config.components, num_steps=config.sb_steps)
        start = task.neighbours(key_cells)[0]
        end = bridge.sample(key_end, start)
        keys = jax.random.split(key_bridge, task.count)
        middle = jax.vmap(lambda k, x0, x1, scaled=scaled: sample_bridge(Brownian(scaled), k, task.share, x0, x1))(keys, start, end)
        found[f"LightSB, ε = {epsilon:g}"] = middle
    return found


def trained(config: Config, loss, model, batch, key):
    """The average of a network's weights over its training."""
    optimiser = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))
    fitting = Fit(loss, model, optimiser, batch, every=config.steps, ema_decay=0.999)
    return eqx.filter_jit(lambda fitting, key: fitting.run(key, config.steps).average)(fitting, key)


def carried(task: Task, velocity, key, start_time: float, end_time: float, num_steps: int = 50):
    """The cells of the day before, carried by a flow between two of its times."""
    times = jnp.linspace(start_time, end_time, num_steps + 1, dtype=jnp.float32)
    start = task.neighbours(key)[0]
    return jax.jit(jax.vmap(lambda x: integrate(dfx.ODETerm(velocity), dfx.Heun(), x, times=times)))(start)


def network(config: Config, task: Task, key):
    """The network that all learned flows share."""
    return nn.TimeMLP((task.cells[0].shape[1],), config.width, config.depth, key=key)


def flow_matching(config: Config, task: Task, key) -> dict:
    """Between the neighbours, paired by optimal transport in each mini-batch."""
    key_model, key_fit, key_cells = jax.random.split(key, 3)
    ends = tuple(Samples(jnp.asarray(cells)) for cells in task.cells[task.before : task.before + 2])
    loss = VelocityLoss(LinearInterpolant(ZeroGamma()), coupling=OptimalCoupling(), antithetic=False)
    velocity = trained(config, loss, network(config, task, key_model), Minibatches(ends, config.batch_size), key_fit)
    return {"OT flow matching": carried(task, velocity, key_cells, 0.0, task.share)}


class Fields(eqx.Module):
    """The conditional means of the multi-marginal interpolant, by a network that reads the weights beside x."""

    network: eqx.nn.MLP

    def __call__(self, a, x, args=None):
        """g_k, (K + 1, d)."""
        return self.network(jnp.concatenate([a, x])).reshape(len(a), len(x))


def multimarginal(config: Config, task: Task, key) -> dict:
    """Over all known days with independent draws; the flow goes along the edge between the neighbours."""
    key_model, key_fit, key_cells = jax.random.split(key, 3)
    laws, size = tuple(Samples(jnp.asarray(cells)) for cells in task.cells), task.cells[0].shape[1]
    mlp = eqx.nn.MLP(len(laws) + size, len(laws) * size, 2 * config.width, 2 * config.depth, jax.nn.silu, key=key_model)
    fields = trained(config, BarycentricLoss(), ConsistentFields(Fields(mlp)), Minibatches(laws, config.batch_size), key_fit)
    velocity = PathVelocity(fields, EdgePath(task.before, task.before + 1, len(laws)))
    return {"multi-marginal interpolant": carried(task, velocity, key_cells, 0.0, task.share)}


def relaxing(parameters, t, x):
    """A reference that pulls every component towards a centre at a rate of its own."""
    rate, centre = parameters
    return rate * (centre - x)


def sbirr(config: Config, task: Task, key) -> dict:
    """Bridges between neighbours over all known days, whose reference, an Ornstein-Uhlenbeck process for each component, is learned from them."""
    key_fit, key_cells, key_paths = jax.random.split(key, 3)
    snapshots = Snapshots(jnp.asarray(task.times, jnp.float32), task.cells)
    size, steps = task.cells[0].shape[1], 8
    epsilon = config.sbirr_epsilon / task.scale**2 / (task.times[task.before + 1] - task.times[task.before])
    start = ParametricReference(relaxing, (jnp.zeros(size, jnp.float32), jnp.zeros(size, jnp.float32)), epsilon)
    fit = eqx.filter_jit(fit_sbirr)
    cells, index = task.neighbours(key_cells)[0], steps * task.before + round(task.share * steps)
    found = {}
    for name, rounds in (("piecewise bridges", 0), ("SBIRR", config.rounds)):
        bridges = fit(key_fit, snapshots, start, rounds=rounds, steps=steps, particles=min(config.particles, snapshots.points.shape[1]))
        found[name] = bridges.trajectories(key_paths, task.before, cells)[index]
    return found


def action_matching(config: Config, task: Task, key) -> dict:
    """Over all known days, with neighbouring cells paired by optimal transport."""
    key_model, key_fit, key_cells = jax.random.split(key, 3)
    snapshots = Snapshots(jnp.asarray(task.times, jnp.float32), task.cells)
    batch = InterpolatedSnapshots(snapshots, config.batch_size, coupling=OptimalCoupling())
    action = trained(config, ActionMatchingLoss(), PotentialAction(network(config, task, key_model)), batch, key_fit)
    return {"action matching": carried(task, ActionVelocity(action), key_cells, task.times[task.before], task.time)}


#: Name: the method; its results may be several.
METHODS: dict[str, Callable] = {
    "nearest day": nearest_day,
    "random midpoint": random_midpoint,
    "OT midpoint": ot_midpoint,
    "OT flow matching": flow_matching,
    "action matching": action_matching,
    "multi-marginal interpolant": multimarginal,
    "LightSB": light_sb,
    "SBIRR": sbirr,
}


# Measures


def measures(config: Config, task: Task, predicted: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """Distances between as many cells of each, in the units of the data: for the sample itself first, then for its bootstraps."""
    rng = np.random.default_rng(config.seed)
    out = {name: [] for name in ("W1", "W2", "energy distance", "MMD")}
    truth = truth[rng.permutation(len(truth))]
    for repeat in range(1 + config.bootstraps):
        ours = predicted if repeat == 0 else predicted[rng.integers(len(predicted), size=len(predicted))]
        theirs = truth[: len(predicted)] if repeat == 0 else truth[rng.integers(len(truth), size=len(predicted))]
        distance = cdist(ours, theirs)
        for name, power in (("W1", 1), ("W2", 2)):
            cost = distance**power
            out[name].append(cost[linear_sum_assignment(cost)].mean() ** (1 / power))
        within = [pdist(sample) for sample in (ours, theirs)]
        out["energy distance"].append(2 * distance.mean() - within[0].mean() - within[1].mean())
        bandwidth = np.median(within[1])

        def kernel(d, bandwidth=bandwidth):
            return np.exp(-((d / bandwidth) ** 2) / 2).mean()

        out["MMD"].append(np.sqrt(max(kernel(within[0]) + kernel(within[1]) - 2 * kernel(distance), 0)))
    return {name: np.array(values) for name, values in out.items()}


def compare(config: Config, run: Run, data: dict[int, np.ndarray], day: int) -> dict[str, dict]:
    """All methods on one held-out day: name -> measures, first two components of the cells, and seconds of CPU; and the `floor`."""
    task, truth = Task.hold_out(config, data, day), data[day]
    out = {}

    def floor():
        rows = np.random.default_rng(config.seed).permutation(len(truth))
        half = min(config.cells, len(rows) // 2)
        return measures(config, task, truth[rows[:half]], truth[rows[half:]]) | {"plane": truth[rows[:half], :2], "seconds": np.array(0.0)}

    out["half of the day itself"] = run.stage(f"day {day}, floor", floor)
    for name, method in METHODS.items():
        if config.methods and name not in config.methods:
            continue

        def stage(method=method):
            started = time.process_time()
            predicted = {
                label: np.asarray(jax.block_until_ready(cells)) for label, cells in method(config, task, jax.random.key(config.seed)).items()
            }
            seconds = (time.process_time() - started) / len(predicted)
            found = {}
            for label, cells in predicted.items():
                cells = cells * task.scale
                scores = measures(config, task, cells, truth) | {"plane": cells[:, :2], "seconds": np.array(seconds)}
                found |= {f"{label}/{key}": value for key, value in scores.items()}
            return found

        for key, value in run.stage(f"day {day}, {name}", stage).items():
            label, measure = key.rsplit("/", 1)
            out.setdefault(label, {})[measure] = value
    return out


# What came of it

MEASURES = ("W1", "W2", "energy distance", "MMD")


def rows_of(day: int, result: dict) -> list[dict]:
    """A row for each prediction: the value, and the standard deviation over bootstraps."""
    rows = []
    for name, scores in result.items():
        row = {"day": day, "method": name}
        for measure in MEASURES:
            row[measure], row[f"± {measure}"] = float(scores[measure][0]), float(scores[measure][1:].std(ddof=1))
        rows.append(row | {"CPU seconds": float(scores["seconds"])})
    return rows


def draw_scores(results: dict[int, dict]):
    """All measures of all methods."""
    figure, panels = axes(len(results), len(MEASURES), 3.2, 3.0)
    for row, (day, result) in enumerate(results.items()):
        for column, measure in enumerate(MEASURES):
            axis = panels[row * len(MEASURES) + column]
            names = list(result)[::-1]
            values = [result[name][measure][0] for name in names]
            spread = [2 * result[name][measure][1:].std(ddof=1) for name in names]
            axis.barh(range(len(names)), values, xerr=spread, color=["0.8" if name == names[-1] else "tab:blue" for name in names], height=0.7)
            axis.set_yticks(range(len(names)), names if column == 0 else [], fontsize=8)
            axis.set(title=f"day {day}: {measure}", xlim=(0.9 * min(values) if measure in ("W1", "W2") else 0, None))
            axis.title.set_fontsize(9)
    return figure


def draw_cells(data: dict[int, np.ndarray], results: dict[int, dict]):
    """The first two components: the held-out cells in grey, what was predicted on top."""
    columns = max(map(len, results.values()))
    figure, panels = axes(len(results), columns, 2.2, 2.3)
    for axis in panels:
        axis.set_axis_off()
    for row, (day, result) in enumerate(results.items()):
        for column, (name, scores) in enumerate(result.items()):
            axis = panels[row * columns + column]
            axis.scatter(*data[day][:2000, :2].T, s=1, color="0.75")
            axis.scatter(*scores["plane"].T, s=1, color="tab:blue", alpha=0.5)
            axis.set_title(f"day {day}: {name}", fontsize=7)
    return figure


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    config, folder = parse(Config, ROOT / "configs" / "transport" / "single_cell", argv, out=ROOT / "runs" / "single_cell")
    try:
        data = load(config)
    except UsageError as error:
        quit_with(error)
    with Run(folder, config) as run:
        report(config, run, data, {day: compare(config, run, data, day) for day in list(data)[1:-1]})


def report(config: Config, run: Run, data: dict[int, np.ndarray], results: dict[int, dict]) -> None:
    """Tables, figures and the page."""
    rows = [row for day, result in results.items() for row in rows_of(day, result)]
    run.results({"predictions": rows})
    lead = (
        f"{config.dimensions} components; {config.cells} cells compared at a time; ± is the standard deviation over {config.bootstraps} bootstraps."
    )
    page = Report("Single cells", lead)
    page.figure(run.figure("scores", draw_scores(results), {"rows": rows}), "Bars: ± two standard deviations. Grey: the day against itself.")
    page.table(rows, sortable=True)
    page.text("A bootstrap repeats cells, so its W1 and W2 lie above those of the sample itself: the bands are widths, not intervals around them.")
    shown = {day: {name: scores["plane"][:300] for name, scores in result.items()} for day, result in results.items()}
    page.figure(run.figure("cells", draw_cells(data, results), shown), "The first two components; grey: the cells of that day.")
    page.write(run.folder / "report.html")
    for row in rows:
        shown = ", ".join(f"{measure} {row[measure]:.3g}" for measure in MEASURES)
        run.console.print(f"day {row['day']}, {row['method']}: {shown}; {row['CPU seconds']:.0f} s", highlight=False, soft_wrap=True)
    run.console.print(f"report: {run.folder / 'report.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
