"""Does convex theory know real training runs? The last-iterate bound against the final losses of some 230 language models of 33M to 360M parameters.

    python experiments/schedules/real_runs.py --data llm_runs.csv [--preset smoke|default] [--out DIR] [--bootstraps N …]

The table has one run a row: data set, size, scheduler, cooldown, rate, steps, final loss (Schaipp et al. 2025, arXiv:2501.18965; without `--data` the
folder of `ERGODAX_DATA` is looked in). The bound is computed from the schedule alone, with constant gradient norms. Three questions:

- does it rank runs? Spearman's correlation of the tuned bound with the final loss, within each data set and size, over schedules, cooldowns and
  horizons: all runs, runs with one rate, the best rate of each schedule; and of the bound at each run's own rate, with one number (D/G) for all;
- does it carry the best rate from one schedule to another? The rate that was best for one, times the ratio of the bound's best rates, against the
  best of the other's own grid, and against leaving the rate as it was;
- do schedules refined from recorded gradient norms help? Small classifiers, trained here, against linear decay and others.

Bands are 95 % bootstrap intervals over runs or schedules. Everything is written to DIR (see `ergodax.core.run`).
"""

import csv
import dataclasses
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import rankdata
from sklearn.datasets import load_diabetes

from ergodax import data
from ergodax.core import Fit
from ergodax.core.check import check_count, check_range
from ergodax.core.config import UsageError, parse, quit_with
from ergodax.core.report import Report
from ergodax.core.run import Run
from ergodax.schedules import (
    ConvexScheduleBound,
    cosine_cooldown,
    l1_norm,
    linear_cooldown,
    median_filtered,
    record_gradient_norms,
    refined_rates,
    sqrt_cooldown,
    tabulated_schedule,
    wsd_schedule,
)


sys.path.append(str(Path(__file__).resolve().parent.parent))

from common import ROOT, axes, interval, over_seeds


@dataclasses.dataclass(frozen=True)
class Config:
    """`experiments/schedules/real_runs.py`"""

    data: str = ""  # the .csv file; empty: llm_runs.csv in the folder of ERGODAX_DATA
    seed: int = 0
    bootstraps: int = 2000
    min_runs: int = 6  # of a group that is ranked
    min_rates: int = 3  # of a schedule whose best rate is looked for
    classifiers: tuple[str, ...] = ()  # to refine schedules for; all of them if empty
    seeds: int = 8
    steps: int = 600
    batch_size: int = 32
    width: int = 64
    window_share: float = 0.2  # of the median filter
    multiples: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # of each classifier's middle peak

    def __post_init__(self):
        for name in ("bootstraps", "seeds", "batch_size", "width"):
            check_count(name, getattr(self, name))
        for name in ("min_runs", "min_rates", "steps"):
            check_count(name, getattr(self, name), low=3)
        check_range("window_share", self.window_share, low=0.0, high=0.5, open_low=True)
        check_range("multiples", self.multiples, low=0.0, open_low=True)
        if unknown := sorted(set(self.classifiers) - set(CASES)):
            raise ValueError(f"unknown `classifiers` {'; '.join(unknown)}; there are {'; '.join(CASES)}.")
        if not self.multiples:
            raise ValueError("`multiples` must hold at least one number, got none.")


# Runs


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What the bound sees of a run: the kind of its decay, the share of the run that it takes, and the steps."""

    cooldown: str
    share: float
    steps: int
    warmup: int

    @property
    def kind(self) -> str:
        """Without the horizon."""
        if self.cooldown == "cosine":
            return "cosine"
        return f"{self.cooldown} {self.share:.1%}" if self.share else "constant"


@dataclasses.dataclass(frozen=True)
class Row:
    """A run."""

    size: tuple[str, int]  # data set and parameters
    name: tuple  # its schedule as the table says it
    schedule: Schedule
    rate: float
    loss: float


COOLDOWNS = {"linear": linear_cooldown, "sqrt": sqrt_cooldown, "cosine": cosine_cooldown}
COLUMNS = ("dataset", "parameters", "scheduler", "decay_type", "cooldown", "lr", "warmup_steps", "iterations", "final_val_loss")


def load(config: Config) -> list[Row]:
    """All runs but those of `slimpajama_chunk1`, which went on from others."""
    path = Path(config.data) if config.data else Path(os.environ.get("ERGODAX_DATA", "")) / "llm_runs.csv"
    if not path.is_file():
        raise UsageError(f"no data at {path}: give the file llm_runs.csv by --data, or its folder in the environment variable ERGODAX_DATA.")
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    if not table or (missing := [column for column in COLUMNS if column not in table[0]]):
        raise UsageError(f"{path} must have rows and the columns {', '.join(COLUMNS)}; missing: {', '.join(missing) if table else 'rows'}.")
    return [_row(row) for row in table if row["dataset"] != "slimpajama_chunk1"]


def _row(row):
    steps, warmup = int(row["iterations"]), int(row["warmup_steps"])
    if row["scheduler"] == "cos":
        schedule = Schedule("cosine", 1 - warmup / steps, steps, warmup)
    else:
        share = float(row["cooldown"] or 0)
        schedule = Schedule("sqrt" if share and row["decay_type"] == "sqrt" else "linear", share, steps, warmup)
    name = row["scheduler"], row["decay_type"], row["cooldown"], steps
    return Row((row["dataset"], int(row["parameters"])), name, schedule, float(row["lr"]), float(row["final_val_loss"]))


def bounds(rows: list[Row]) -> dict[str, np.ndarray]:
    """The best base rate γ* and the tuned bound of each run's schedule, D = G = 1. Schedules of one kind share a program."""
    schedules = sorted({row.schedule for row in rows}, key=dataclasses.astuple)
    longest = max(schedule.steps for schedule in schedules)
    found = {}
    for name, cooldown in COOLDOWNS.items():
        ours = [schedule for schedule in schedules if schedule.cooldown == name]
        if not ours:
            continue

        def tuned(numbers, cooldown=cooldown):
            share, steps, warmup = numbers
            rates = wsd_schedule(jnp.ones(()), steps, warmup_steps=warmup, decay_steps=share * steps, cooldown=cooldown)(jnp.arange(longest))
            return ConvexScheduleBound().tuned(rates, steps)

        with jax.enable_x64(True):  # the last rate of a long cosine is 0 in float32, and then the bound infinite
            numbers = tuple(jnp.array([float(getattr(s, field)) for s in ours]) for field in ("share", "steps", "warmup"))
            values = jax.jit(lambda numbers, tuned=tuned: jax.lax.map(tuned, numbers))(numbers)
        found |= dict(zip(ours, np.stack(values, 1).tolist()))
    both = np.array([found[row.schedule] for row in rows])
    return {"base_rate": both[:, 0], "value": both[:, 1]}


# Ranks


def spearman(x, y) -> np.ndarray:
    """Spearman's correlation along the last axis; NaN where one side does not vary."""
    x, y = (rankdata(values, axis=-1) for values in (x, y))
    x, y = (values - values.mean(-1, keepdims=True) for values in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))


def banded(config: Config, x, y, statistic: Callable = spearman) -> tuple[float, float, float]:
    """A statistic of pairs, and its 95 % bootstrap interval."""
    x, y = np.asarray(x), np.asarray(y)
    rng = np.random.default_rng(config.seed)
    picks = rng.integers(0, len(x), (config.bootstraps, len(x)))
    low, high = np.nanpercentile(statistic(x[picks], y[picks]), [2.5, 97.5])
    return float(statistic(x, y)), float(low), float(high)


def best_of(rows: list[Row], key: Callable) -> list[int]:
    """The index of the run with the lowest loss for each value of `key`."""
    best = {}
    for i, row in enumerate(rows):
        if key(row) not in best or row.loss < rows[best[key(row)]].loss:
            best[key(row)] = i
    return list(best.values())


def sweeps(config: Config, rows: list[Row]) -> dict[tuple, dict[float, int]]:
    """(size, schedule) -> rate -> the best run with it, for schedules with enough rates."""
    found = {}
    for i in best_of(rows, lambda row: (row.size, row.schedule, row.rate)):
        found.setdefault((rows[i].size, rows[i].schedule), {})[rows[i].rate] = i
    return {key: dict(sorted(runs.items())) for key, runs in found.items() if len(runs) >= config.min_rates}


def rank(config: Config, rows: list[Row], theory: dict[str, np.ndarray]) -> list[dict]:
    """A row for each group of runs that is ranked."""
    swept = sweeps(config, rows)
    table = []

    def add(size, label, members, values):
        if len(members) >= config.min_runs:
            names = ("Spearman", "low", "high")
            numbers = dict(zip(names, banded(config, values[members], np.array([rows[i].loss for i in members]))))
            table.append({"data": size[0], "parameters": size[1], "runs of": label, "runs": len(members)} | numbers)

    for size in sorted({row.size for row in rows}):
        members = [i for i, row in enumerate(rows) if row.size == size]
        add(size, "all", members, theory["value"])
        ours = {schedule: runs for (other, schedule), runs in swept.items() if other == size}
        if not ours:
            continue
        inside = [rows[i] for i in members]
        for label, key in (("best rate, schedules as named", lambda row: row.name), ("best rate, schedules as they are", lambda row: row.schedule)):
            add(size, label, [members[j] for j in best_of(inside, key)], theory["value"])
        for rate in sorted({row.rate for row in inside}):
            add(size, f"rate {rate:g}", [i for i in members if rows[i].rate == rate], theory["value"])
        # one number for all: observed best rates over γ*, in the middle
        best = [min(runs.values(), key=lambda i: rows[i].loss) for runs in ours.values()]
        observed = [rows[i].rate / theory["base_rate"][i] for i in best]
        relative = np.array([row.rate for row in rows]) / (np.median(observed) * theory["base_rate"])
        add(size, "all, bound at the run's rate", members, theory["value"] * (relative + 1 / relative) / 2)
    return table


# Rates


def vertex(rates: np.ndarray, losses: np.ndarray) -> float:
    """Where the parabola through the best run and its neighbours (in log rate) is lowest; an end of the grid if that is best."""
    i = int(np.argmin(losses))
    if i in (0, len(rates) - 1):
        return float(rates[i])
    a, b, _ = np.polyfit(np.log(rates[i - 1 : i + 2]), losses[i - 1 : i + 2], 2)
    return float(np.exp(-b / (2 * a)))


def transfer(config: Config, rows: list[Row], theory: dict[str, np.ndarray]) -> tuple[list[dict], list[dict]]:
    """The schedules with a sweep of rates; and how well the rate that is best for one does for another, moved by the bound or left as it is."""
    swept, schedules, pairs = sweeps(config, rows), [], []
    for (size, schedule), runs in swept.items():
        rates, losses = np.array(list(runs)), np.array([rows[i].loss for i in runs.values()])
        i = int(np.argmin(losses))
        row = {"data": size[0], "parameters": size[1], "cooldown": schedule.kind, "steps": schedule.steps, "rates": len(rates)}
        row |= {"best rate": float(rates[i]), "parabola": vertex(rates, losses), "at an end": i in (0, len(rates) - 1)}
        schedules.append(row | {"γ*": float(theory["base_rate"][next(iter(runs.values()))]), "loss": float(losses[i])})
    grids = [{rate: rows[i].loss for rate, i in runs.items()} for runs in swept.values()]
    for i, j in itertools.permutations(range(len(schedules)), 2):
        old, new, grid = schedules[i], schedules[j], grids[j]
        if (old["data"], old["parameters"]) != (new["data"], new["parameters"]):
            continue
        ratio = new["γ*"] / old["γ*"]
        pair = {"from": i, "to": j, "schedule": old["cooldown"] != new["cooldown"], "horizon": old["steps"] != new["steps"]}
        for name, factor in (("moved", ratio), ("kept", 1.0)):
            nearest = min(grid, key=lambda rate: abs(np.log(rate / (old["best rate"] * factor))))
            pair[f"{name}, extra loss"] = grid[nearest] - new["loss"]
            pair[f"{name}, hit"] = float(nearest == new["best rate"])
            pair[f"{name}, factor off"] = abs(np.log2(old["parabola"] * factor / new["parabola"]))
        pairs.append(pair)
    return schedules, pairs


CHANGES = {
    "schedule, same steps": lambda pair: pair["schedule"] and not pair["horizon"],
    "steps, same schedule": lambda pair: pair["horizon"] and not pair["schedule"],
    "both": lambda pair: pair["horizon"] and pair["schedule"],
    "any": lambda pair: True,
}


def changes(config: Config, pairs: list[dict], count: int) -> list[dict]:
    """Means over pairs of schedules, by what changes between them; the bootstrap draws schedules, not pairs."""
    rng = np.random.default_rng(config.seed)
    draws = rng.multinomial(count, np.full(count, 1 / count), config.bootstraps)
    table = []
    for label, chosen in CHANGES.items():
        ours = [pair for pair in pairs if chosen(pair)]
        if not ours:
            continue
        weights = np.stack([draws[:, pair["from"]] * draws[:, pair["to"]] for pair in ours], 1).astype(float)
        row = {"what changes": label, "pairs": len(ours)}
        for measure in ("extra loss", "hit", "factor off"):
            moved, kept = (np.array([pair[f"{name}, {measure}"] for pair in ours]) for name in ("moved", "kept"))
            unit = 2.0 if measure == "factor off" else None
            row |= {f"moved, {measure}": _mean(moved, unit), f"kept, {measure}": _mean(kept, unit)}
            if measure == "extra loss":
                total = weights.sum(1)
                gains = (weights @ (kept - moved))[total > 0] / total[total > 0]
                row["gain"] = float((kept - moved).mean())
                row["gain, low"], row["gain, high"] = (float(x) for x in np.percentile(gains, [2.5, 97.5]))
        table.append(row)
    return table


def _mean(values, base):
    return float(values.mean() if base is None else base ** values.mean())


def slopes(config: Config, schedules: list[dict]) -> list[dict]:
    """How observed best rates follow γ*: Spearman's correlation and the slope of log on log, which the theory says is 1."""
    table = []

    def slope(x, y):
        x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (x * y).sum(-1) / (x**2).sum(-1)

    groups = {"all": schedules}
    for steps in sorted({row["steps"] for row in schedules}):
        groups[f"{steps} steps"] = [row for row in schedules if row["steps"] == steps]
    for label, ours in groups.items():
        x, y = (np.log([row[name] for row in ours]) for name in ("γ*", "parabola"))
        if len(ours) >= config.min_runs:
            row = {"schedules with": label, "number": len(ours)}
            row |= dict(zip(("Spearman", "low", "high"), banded(config, x, y)))
            table.append(row | dict(zip(("slope", "slope, low", "slope, high"), banded(config, x, y, slope))))
    return table


# Refinement


@dataclasses.dataclass(frozen=True)
class Case:
    """A classifier: its data, hidden layers and optimiser, the norm that is recorded, the power of the weights, a middle peak."""

    split: Callable
    depth: int
    optimiser: Callable
    norm: Callable
    power: float
    peak: float


def digits():
    """Training and test part, flat."""
    split = data.digits()
    return tuple((x.reshape(len(x), -1), y) for x, y in ((split.train_x, split.train_y), (split.test_x, split.test_y)))


def diabetes():
    """Ten measurements of 442 patients: does the disease progress faster than in most? Nothing separates them; every fourth is tested on."""
    table = load_diabetes()
    x = jnp.asarray(table.data / table.data.std(0), jnp.float32)
    y = jnp.asarray(table.target > np.median(table.target), jnp.int32)
    tested = np.arange(len(y)) % 4 == 3
    return tuple((x[part], y[part]) for part in (~tested, tested))


CASES = {
    "logistic regression of diabetes, SGD, l2": Case(diabetes, 0, optax.sgd, optax.tree.norm, 2.0, 0.4),
    "softmax regression, SGD, l2": Case(digits, 0, optax.sgd, optax.tree.norm, 2.0, 3.2),
    "network, SGD, l2": Case(digits, 2, optax.sgd, optax.tree.norm, 2.0, 0.4),
    "network, Adam, l1": Case(digits, 2, optax.adam, l1_norm, 1.0, 0.01),
}
BASELINES = ("constant", "cosine", "linear")


def refine(config: Config, case: Case):
    """`train(key) -> dict` for `over_seeds`: a run of linear decay at the middle peak that records, then all schedules and peaks."""
    steps = config.steps
    whole, test = case.split()
    classes = int(whole[1].max()) + 1
    shapes = [
        jnp.ones(steps),
        wsd_schedule(jnp.ones(()), steps, decay_steps=steps, cooldown=cosine_cooldown)(jnp.arange(steps)),
        wsd_schedule(jnp.ones(()), steps, decay_steps=steps, cooldown=linear_cooldown)(jnp.arange(steps)),
    ]

    def loss(model, batch, key):
        x, y = batch
        return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y).mean(), {}

    def run(key, shape, peak):
        key_model, key_fit = jax.random.split(key)
        model = eqx.nn.MLP(whole[0].shape[1], classes, config.width, case.depth, key=key_model)
        optimiser = optax.chain(record_gradient_norms(steps, case.norm), case.optimiser(tabulated_schedule(shape, peak)))
        training = Fit(loss, model, optimiser, whole, batch_size=config.batch_size, every=steps)
        state, _ = training.advance(training.init(key_fit), steps)
        model = training.result(state, {}).model
        return optax.tree.get(state.optimiser, "norms"), loss(model, whole, None)[0], loss(model, test, None)[0]

    def train(key):
        norms, _, _ = run(key, shapes[-1], case.peak)
        filtered = median_filtered(norms, config.window_share)
        refined = refined_rates(filtered, case.power)
        candidates, peaks = jnp.stack([*shapes, refined]), case.peak * jnp.array(config.multiples)
        _, trained, tested = jax.vmap(lambda shape: jax.vmap(lambda peak: run(key, shape, peak))(peaks))(candidates)
        bound = ConvexScheduleBound(filtered)
        # the last rate of a refined schedule is 0, and makes no step that is judged
        values = jax.vmap(lambda shape: bound.tuned(shape, steps - 1).value)(candidates)
        return {"norms": norms, "filtered": filtered, "refined": refined, "train": trained, "test": tested, "bound": values}

    return train


# What came of it


def refinement_rows(config: Config, results: dict[str, dict]) -> list[dict]:
    """Each schedule at its best peak (lowest mean training loss)."""
    table = []
    for name, found in results.items():
        linear = found["train"][:, BASELINES.index("linear")]
        reference = linear[:, linear.mean(0).argmin()]
        for k, label in enumerate((*BASELINES, "refined")):
            losses = found["train"][:, k]
            best = int(np.nan_to_num(losses.mean(0), nan=np.inf).argmin())
            row = {"classifier": name, "schedule": label, "peak": CASES[name].peak * config.multiples[best]}
            row["training loss"], row["±"] = interval(losses[:, best])
            row["over linear"], row["± over linear"] = interval(losses[:, best] / reference - 1)
            row["test loss"], row["± test"] = interval(found["test"][:, k, best])
            row["tuned bound over linear's"] = float((found["bound"][:, k] / found["bound"][:, BASELINES.index("linear")]).mean())
            table.append(row)
    return table


def draw_ranks(rows: list[Row], theory: dict[str, np.ndarray], table: list[dict]):
    """Bound and loss: the size with most runs, all sizes, and the correlations."""
    figure, (left, middle, right) = axes(1, 3, 4.6, 4.2)
    sizes = sorted({row.size for row in rows}, key=lambda size: size[1])
    largest = max(sizes, key=lambda size: sum(row.size == size for row in rows))
    members = [i for i, row in enumerate(rows) if row.size == largest]
    best = [members[j] for j in best_of([rows[i] for i in members], lambda row: row.schedule)]
    horizons = sorted({rows[i].schedule.steps for i in best})
    marks = {"cosine": "s", "linear": "o", "sqrt": "^"}
    for k, steps in enumerate(horizons):
        for name, mark in marks.items():
            ours = [i for i in best if (rows[i].schedule.steps, rows[i].schedule.cooldown) == (steps, name)]
            label = f"{steps} steps" if name == "linear" else None
            left.plot(theory["value"][ours], [rows[i].loss for i in ours], mark, color=f"C{k}", ms=4.5, label=label)
    left.set(xlabel="tuned bound, D = G = 1", ylabel="final loss", title=f"{largest[1] / 1e6:.0f}M, best rate of each schedule")
    left.legend(frameon=False, fontsize=7)
    for k, size in enumerate(sizes):
        ours = best_of(rows, lambda row, size=size: (row.size == size, row.schedule))
        ours = sorted((i for i in ours if rows[i].size == size), key=lambda i: theory["value"][i])
        style = {"color": f"C{k % 10}", "ls": "-" if k < 10 else ":", "marker": ".", "ms": 4, "lw": 0.8}
        middle.plot(theory["value"][ours], [rows[i].loss for i in ours], label=f"{size[0][:6]} {size[1] / 1e6:.0f}M", **style)
    middle.set(xlabel="tuned bound, D = G = 1", title="every size, best rate")
    middle.legend(frameon=False, fontsize=6, ncols=2)
    places = np.arange(len(table))[::-1]
    centres = np.array([row["Spearman"] for row in table])
    errors = np.abs(np.array([[row["low"], row["high"]] for row in table]).T - centres)
    right.errorbar(centres, places, xerr=errors, fmt="o", ms=3.5, lw=1, color="C0")
    right.set_yticks(places, [f"{row['data'][:6]} {row['parameters'] / 1e6:.0f}M: {row['runs of']} ({row['runs']})" for row in table], fontsize=6)
    right.axvline(1, color="0.8", lw=0.8)
    right.set(xlabel="Spearman's correlation", xlim=(min(0.0, float(np.nanmin(centres)) - 0.05), 1.05))
    return figure


def _ticks(axis, places):
    """These and no others, short: for logarithmic axes of about a decade."""
    axis.set_ticks(list(places), [f"{place:.2g}" for place in places], fontsize=7)
    axis.set_ticks([], minor=True)


def draw_rates(rows: list[Row], schedules: list[dict], table: list[dict], swept: dict[tuple, dict[float, int]]):
    """Observed best rates against γ*; some sweeps; what moving the rate is worth."""
    from matplotlib import colormaps

    figure, (left, middle, right) = axes(1, 3, 4.6, 3.8)
    horizons = sorted({row["steps"] for row in schedules})
    scale = np.exp(np.mean([np.log(row["parabola"] / row["γ*"]) for row in schedules]))
    for k, steps in enumerate(horizons):
        ours = [row for row in schedules if row["steps"] == steps]
        left.plot([row["γ*"] for row in ours], [row["parabola"] for row in ours], "o", color=f"C{k}", ms=4.5, label=f"{steps} steps")
        ends = [row for row in ours if row["at an end"]]
        left.plot([row["γ*"] for row in ends], [row["parabola"] for row in ends], "x", color="k", ms=4)
    line = np.array([min(row["γ*"] for row in schedules), max(row["γ*"] for row in schedules)])
    left.plot(line, scale * line, color="0.6", lw=0.8, ls="--")
    left.set(xscale="log", yscale="log", xlabel="γ* of the bound", ylabel="best rate, observed", title="dashed: slope 1; crosses: an end of the grid")
    round_numbers = np.outer(10.0 ** np.arange(-6, 3), [1, 2, 5]).ravel()
    _ticks(left.xaxis, round_numbers[(round_numbers > 0.7 * line[0]) & (round_numbers < 1.4 * line[1])])
    _ticks(left.yaxis, sorted({row["best rate"] for row in schedules}))
    left.legend(frameon=False, fontsize=7)
    longest = max(horizons)
    shown = sorted((key for key in swept if key[1].steps == longest), key=lambda key: (key[1].cooldown, key[1].share))
    colours = colormaps["viridis"]
    for k, key in enumerate(shown):
        runs = swept[key]
        colour = colours(k / max(1, len(shown) - 1))
        middle.plot(list(runs), [rows[i].loss for i in runs.values()], ".-", color=colour, lw=1, label=key[1].kind)
    middle.set(xscale="log", xlabel="rate", ylabel="final loss", title=f"{longest} steps")
    lowest = min(rows[i].loss for key in shown for i in swept[key].values())
    middle.set_ylim(lowest - 0.01, lowest + 0.12)
    middle.legend(frameon=False, fontsize=6)
    places = np.arange(len(table))
    for shift, name, colour in ((-0.2, "moved", "C0"), (0.2, "kept", "0.7")):
        right.bar(places + shift, [row[f"{name}, extra loss"] for row in table], 0.38, color=colour, label=f"rate {name}")
    right.set_xticks(places, [row["what changes"].replace(", ", ",\n") for row in table], fontsize=7)
    right.set(ylabel="loss above the best of the grid")
    right.legend(frameon=False, fontsize=8)
    return figure


def draw_refinement(config: Config, results: dict[str, dict]):
    """Norms, schedules, and losses over peaks, a row for each classifier."""
    figure, panels = axes(len(results), 3, 4.2, 2.9)
    for row, (name, found) in enumerate(results.items()):
        left, middle, right = panels[3 * row : 3 * row + 3]
        left.plot(found["norms"][0], color="0.7", lw=0.5)
        left.plot(found["filtered"][0], color="C3", lw=1.3)
        left.set(yscale="log", ylabel="gradient norm", title=name, xlabel="step")
        t = np.linspace(0, 1, config.steps)
        middle.plot(t * config.steps, 1 - t, color="C2", lw=1)
        middle.plot(found["refined"].T, color="C3", lw=0.5, alpha=0.5)
        middle.set(ylabel="rate / peak", xlabel="step", title="refined (red), linear (green)")
        for k, label in enumerate((*BASELINES, "refined")):
            right.plot(CASES[name].peak * np.array(config.multiples), found["train"][:, k].mean(0), ".-", color=f"C{k}", lw=1.2, label=label)
        right.set(xscale="log", yscale="log", xlabel="peak", ylabel="training loss")
        _ticks(right.xaxis, CASES[name].peak * np.array(config.multiples))
        means = found["train"].mean(0)
        right.set_ylim(0.97 * np.nanmin(means), min(10.0, 1.3 * np.nanmax(means[1:])))  # whatever a constant rate does
        right.legend(frameon=False, fontsize=7)
    return figure


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    config, folder = parse(Config, ROOT / "configs" / "schedules" / "real_runs", argv, out=ROOT / "runs" / "real_runs")
    try:
        rows = load(config)
    except UsageError as error:
        quit_with(error)
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    with Run(folder, config) as run:
        theory = run.stage("bounds", lambda: bounds(rows))
        refined = {
            name: run.stage(name, lambda name=name, case=case: over_seeds(run, name, refine(config, case), config.seeds))
            for name, case in CASES.items()
            if name in (config.classifiers or CASES)
        }
        report(config, run, rows, theory, refined)


def report(config: Config, run: Run, rows: list[Row], theory: dict[str, np.ndarray], refined: dict[str, dict]) -> None:
    """Tables, figures and the page."""
    ranks = rank(config, rows, theory)
    schedules, pairs = transfer(config, rows, theory)
    moves, follows = changes(config, pairs, len(schedules)), slopes(config, schedules)
    refinements = refinement_rows(config, refined)
    run.results({"ranks": ranks, "rates": schedules, "changes": moves, "slopes": follows, "refinement": refinements})
    page = Report("The convex bound on real runs", f"{len(rows)} runs. Bands are 95 % bootstrap intervals, {config.bootstraps} draws.")
    page.heading("Does the bound rank runs?")
    points = [{"parameters": row.size[1], "schedule": str(row.name), "loss": row.loss} for row in rows]
    page.figure(run.figure("ranks", draw_ranks(rows, theory, ranks), {"runs": points} | theory), "Squares: cosine; triangles: 1 - √ cooldown.")
    page.table(ranks)
    page.text("The bound is tuned, so it does not know the rate, but in the last row of a size: there one D/G is taken from all its sweeps.")
    page.heading("Does it carry the best rate?")
    page.figure(run.figure("rates", draw_rates(rows, schedules, moves, sweeps(config, rows)), {"schedules": schedules}), "Schedules with a sweep.")
    page.table(moves)
    page.text("moved: times the ratio of γ*; kept: as it was; both at the nearest rate of the grid. factor off: of the parabolas' rates.")
    page.table(follows)
    page.table(schedules, sortable=True)
    page.heading("Refined schedules")
    page.figure(run.figure("refinement", draw_refinement(config, refined), refined), "Grey: the first seed's norms; red: filtered.")
    page.table(refinements)
    page.text("Norms are those of a run with linear decay at the middle peak. ± is twice the standard error over seeds.")
    page.write(run.folder / "report.html")
    for row in ranks:
        line = f"{row['data']} {row['parameters'] / 1e6:.0f}M, {row['runs of']}, {row['runs']} runs: {row['Spearman']:.3f}"
        run.console.print(f"{line} ({row['low']:.3f} to {row['high']:.3f})", highlight=False, soft_wrap=True)
    for row in moves:
        line = f"{row['what changes']}: {row['moved, extra loss']:.4f} above the best if moved, {row['kept, extra loss']:.4f} if kept"
        run.console.print(line, highlight=False, soft_wrap=True)
    for row in refinements:
        line = f"{row['classifier']}, {row['schedule']}: {row['training loss']:.4f} ± {row['±']:.4f}, test {row['test loss']:.4f}"
        run.console.print(line, highlight=False, soft_wrap=True)
    run.console.print(f"report: {run.folder / 'report.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
