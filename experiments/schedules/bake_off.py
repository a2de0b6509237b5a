"""Which schedule? All of them on four small real tasks, at budgets from 1 % to 100 % of a full run, each at its own best peak.

    python experiments/schedules/bake_off.py [--preset smoke|default] [--out DIR] [--tasks digits text flow table] [--seeds N] [--text.steps N] …

- `digits`: an MLP with one hidden layer on scikit-learn's digits; SGD with momentum 0.9.
- `text`: a transformer of one layer on characters of Python's own standard library, whose text depends on the version of Python; Adam, no decay.
- `flow`: flow matching on the digits, told their class; Adam.
- `table`: logistic regression with a ridge on breast-cancer data (569 × 30), which is strongly convex; plain SGD.

A run of a budget knows it: the schedule ends there. Nothing is warmed up but what rises by itself (one-cycle), so that a run of ten updates spends
none at rate 0. A schedule is judged by the held-out loss at the peak with the lowest mean over seeds, from one grid for all schedules and budgets of
a task; a run that diverged counts as infinitely bad. Seeds share starts and batches (drawn with replacement) between schedules. Bands are 5 % to
95 % of the bootstrap over seeds, which chooses the peak anew each time.

- `bound`: the shape that the convex bound promises most for equal gradient norms; `refined`: from the norms that one pilot run with linear decay at
  the middle peak recorded, medians over a tenth of it. Both are made at one length and stretched to all budgets.
- `inverse √` is 1/√(1 + k/τ) with τ = `timescale` updates at all budgets; WSD cools down over the last `cooldown` of a run; WSD-S has the budgets as
  its own, so that one run would serve them all.
- How the convex bound, tuned, ranks the shapes at each budget is compared with how they came out (Spearman), and its best base rates with the best
  peaks. Since the small data sets are fitted too closely in a full run, ranks by training loss, with peaks chosen by it, stand beside the others.

Three more questions, at the full budget: does merging the last checkpoints of a constant run (WSM) replace the decay that it imitates, at the same
steps and seed? What does AutoLRS find, once its search is paid for? And does the best timescale of AdamW, τ = B/(η λ D), stay where it is when the
batch changes (`text`, linear decay, the same number of characters in every run)?

Everything is written to DIR (see `ergodax.core.run`).
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import rankdata

from ergodax.core import grid, sweep, traced
from ergodax.core.check import check_count, check_range
from ergodax.core.config import parse
from ergodax.core.report import Report
from ergodax.core.run import Run
from ergodax.laws import sweep_optimum, weight_decay
from ergodax.schedules import (
    ConvexScheduleBound,
    RateSearch,
    budget_aware_schedule,
    cosine_cooldown,
    cosine_schedule,
    exponential_cooldown,
    hybrid_schedule,
    inverse_sqrt_schedule,
    linear_cooldown,
    linear_schedule,
    median_filtered,
    one_cycle_schedule,
    optimise_schedule,
    record_gradient_norms,
    refined_rates,
    rex_schedule,
    sqrt_cooldown,
    stage_lengths,
    step_schedule,
    tabulated_schedule,
    train_autolrs,
    wsd_s_schedule,
    wsd_schedule,
)
from ergodax.weights import WSM


sys.path.append(str(Path(__file__).resolve().parent.parent))

from tasks import CONTEXT, MAKE, Size, Task, make_task

from common import ROOT, axes, heat, interval


POINTS = 200  # of the shapes that are made by optimisation
NUM_CHECKPOINTS = 11  # of a merge
MERGES = {"linear": linear_cooldown, "sqrt": sqrt_cooldown, "cosine": cosine_cooldown}
KAPPAS = (1e6, 1.0)  # of AutoLRS: that of its authors' code, and a sharper search
MAX_STAGES = 4
DRAWS = 1000  # of the bootstrap


def stages_of(steps: int) -> dict[str, int]:
    """Three or four stages of a run, or one if they would be too short for a forecast."""
    first = max(40, steps // 10) if steps >= 200 else steps
    return {"first": first, "longest": 4 * first}


@dataclasses.dataclass(frozen=True)
class Timescale:
    """AdamW's timescale on `text`; no batches, no part."""

    batch_sizes: tuple[int, ...] = (2, 4, 8, 16)
    taus: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8)
    peaks: tuple[float, ...] = (0.005, 0.01, 0.02)
    windows: int = 1600  # each of `CONTEXT` characters, in every run
    seeds: int = 3

    def __post_init__(self):
        check_range("taus", self.taus, low=0.0, open_low=True)
        check_range("peaks", self.peaks, low=0.0, open_low=True)
        check_count("seeds", self.seeds)
        if self.batch_sizes and (len(self.taus) < 3 or not self.peaks):
            raise ValueError(f"a timescale's optimum needs at least 3 `taus` and 1 of `peaks`, got {self.taus} and {self.peaks}.")
        if bad := [size for size in self.batch_sizes if size < 1 or self.windows % size]:
            raise ValueError(f"`batch_sizes` must divide `windows`, {self.windows}, got {bad}.")


@dataclasses.dataclass(frozen=True)
class Config:
    """`experiments/schedules/bake_off.py`"""

    tasks: tuple[str, ...] = tuple(MAKE)
    seeds: int = 5
    budgets: tuple[float, ...] = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
    cooldown: float = 0.2  # of WSD and of the window of a merge, a share of the run
    timescale: float = 10.0  # of the inverse square root, in updates
    digits: Size = dataclasses.field(default_factory=lambda: Size(1000, 32, 32, (0.003, 0.01, 0.03, 0.1, 0.3, 1.0), 355, 8))
    text: Size = dataclasses.field(default_factory=lambda: Size(400, 4, 32, (2e-3, 4.5e-3, 1e-2, 2.2e-2, 5e-2), 100, 1))
    flow: Size = dataclasses.field(default_factory=lambda: Size(1000, 16, 32, (3e-3, 6e-3, 1.2e-2, 2.5e-2, 5e-2), 400, 1))
    table: Size = dataclasses.field(default_factory=lambda: Size(2000, 16, 30, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), 113, 8))
    autolrs: tuple[str, ...] = ("digits", "table")  # the tasks on which it is tried
    adamw: Timescale = dataclasses.field(default_factory=Timescale)

    def __post_init__(self):
        check_count("seeds", self.seeds)
        check_range("budgets", self.budgets, low=0.01, high=1.0)
        check_range("cooldown", self.cooldown, low=0.0, high=1.0, open_low=True)
        check_range("timescale", self.timescale, low=0.0, open_low=True)
        if not self.tasks or set(self.tasks) - set(MAKE):
            raise ValueError(f"`tasks` must be some of {', '.join(MAKE)}, got {', '.join(self.tasks) or 'none'}.")
        if list(self.budgets) != sorted(set(self.budgets)) or self.budgets[-1] != 1:
            raise ValueError(f"`budgets` must increase and end with 1, got {self.budgets}.")
        for name in self.autolrs:
            steps = getattr(self, name).steps if name in self.tasks else 0
            if any(min(stage_lengths(total, **stages_of(total))) < 40 for total in (steps, steps // 2) if total) or not steps:
                raise ValueError(
                    f"AutoLRS needs a task of `tasks` whose full and half budget make stages of at least 40 updates, got {name}, {steps}."
                )
        window = [round(self.cooldown * getattr(self, name).steps) for name in self.tasks]
        if any(steps % (NUM_CHECKPOINTS - 1) for steps in window):
            raise ValueError(f"`cooldown` times `steps` must be a multiple of {NUM_CHECKPOINTS - 1}, the checkpoints of a merge, got {window}.")


# Schedules


def schedules(config: Config, best_shape, refined) -> dict[str, Callable]:
    """`(T, T of the full budget) -> optax.Schedule` of peak 1. Every one of them is its peak times a shape."""
    budgets = np.array(config.budgets, np.float32)
    cooldowns = {"linear": linear_cooldown, "sqrt": sqrt_cooldown, "exponential": exponential_cooldown(), "cosine": cosine_cooldown}
    return {
        "constant": lambda t, full: lambda step: jnp.ones_like(step, float),
        "linear": lambda t, full: linear_schedule(1.0, t),
        "cosine": lambda t, full: cosine_schedule(1.0, t),
        "step 30-60-90": lambda t, full: step_schedule(1.0, jnp.array([0.3, 0.6, 0.9]) * t),
        "one-cycle": lambda t, full: one_cycle_schedule(1.0, t),
        "inverse √": lambda t, full: inverse_sqrt_schedule(1.0, config.timescale),
        "REX": lambda t, full: rex_schedule(1.0, t),
        **{f"UBA φ = {phi:g}": lambda t, full, phi=phi: budget_aware_schedule(1.0, t, phi) for phi in (0.25, 1.0, 5.0)},
        **{
            f"WSD {name}": lambda t, full, shape=shape: wsd_schedule(1.0, t, decay_steps=config.cooldown * t, cooldown=shape)
            for name, shape in cooldowns.items()
        },
        "WSD-S": lambda t, full: wsd_s_schedule(1.0, budgets * full),
        "StableLM2 hybrid": lambda t, full: hybrid_schedule(1.0, t, warmup_steps=0.0),
        "bound": lambda t, full: tabulated_schedule(best_shape, 1.0, t),
        "refined": lambda t, full: tabulated_schedule(refined, 1.0, t + 1),  # the last of its rates is 0
    }


NAMES = tuple(schedules(Config(), None, None))


@functools.cache
def shapes_of(config: Config) -> Callable:
    """`(refined, T, T of the full budget)` -> rates of all schedules at peak 1, (schedules, T), and the best base rate and bound of each.

    Horizons are traced, so that all budgets of all tasks share one program.
    """
    longest = max(getattr(config, name).steps for name in config.tasks)
    best_shape, _ = jax.jit(lambda start: optimise_schedule(ConvexScheduleBound(), start))(jnp.ones(POINTS))

    @jax.jit
    def padded(refined, t, full):
        rows = jnp.stack([make(t, full)(jnp.arange(longest)) for make in schedules(config, best_shape, refined).values()])
        return rows, jax.vmap(lambda row: jnp.stack(ConvexScheduleBound().tuned(row, t)))(rows)

    def shapes(refined, steps, full):
        rows, tuned = padded(jnp.asarray(refined), float(steps), float(full))
        return np.asarray(rows)[:, :steps], np.asarray(tuned)

    return shapes


# Runs


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a task."""

    steps: int = 1
    batch_size: int = 1
    schedule: int = traced(0)
    peak: float = 1.0
    tau: float = 1.0
    kappa: float = 1.0
    seed: int = traced(0)


def swept(run: Run, label: str, trial: Callable, lanes: int | None, **leaves) -> dict[str, np.ndarray]:
    """`trial` over the grid of `leaves`: each metric as an array of its shape. Interrupted, it goes on at the last chunk."""
    overrides, lengths = grid(**leaves), [len(values) for values in leaves.values()]
    with run.bar(label, len(overrides)) as update:
        result = sweep(
            trial,
            Trial(),
            overrides,
            batch_size=lanes,
            chunk_size=None if lanes is None else max(lanes, 32),
            folder=run.folder / "sweeps" / label.replace(" ", "_"),
            announce=lambda plan: run.console.print(plan, highlight=False),
            progress=lambda done, total: update(done),
        )
    timing = run.timing.setdefault(label, {})
    timing["compile_seconds"] = timing.get("compile_seconds", 0.0) + sum(group.compile_seconds for group in result.groups)
    return {name: values.reshape(*lengths, *values.shape[1:]) for name, values in result.metrics.items()}


def pilot(task: Task, size: Size) -> np.ndarray:
    """The refined shape, `POINTS` rates."""

    def optimiser(rate):
        return optax.chain(record_gradient_norms(size.steps, task.norm), task.optimiser(rate))

    schedule = linear_schedule(size.peaks[len(size.peaks) // 2], size.steps)

    @jax.jit
    def refined():
        fit = task.fit(size.batch_size, schedule, 0, optimiser)
        state, _ = fit.advance(fit.init(jax.random.key(0)), size.steps)
        norms = jnp.maximum(optax.tree.get(state.optimiser, "norms"), 1e-12)
        rates = refined_rates(median_filtered(norms, 0.1), task.power)
        return jnp.interp(jnp.linspace(0, 1, POINTS), jnp.linspace(0, 1, size.steps), rates)

    return np.asarray(refined())


def compare(config: Config, run: Run, name: str) -> dict[str, np.ndarray]:
    """All schedules, budgets, peaks and seeds of a task: measures of shape (budgets, schedules, peaks, seeds)."""
    size = getattr(config, name)
    task = make_task(name, size)
    refined = pilot(task, size)
    steps = [round(share * size.steps) for share in config.budgets]
    shapes = shapes_of(config)
    rates, tuned = zip(*(shapes(refined, t, size.steps) for t in steps))
    tables = dict(zip(steps, rates))

    def trial(trial: Trial):
        shape = jnp.asarray(tables[trial.steps])[trial.schedule]
        fit = task.fit(size.batch_size, lambda k: trial.peak * shape[k], trial.seed)
        fitted = fit.run(jax.random.key(trial.seed), trial.steps)
        return task.measure(fitted.model, fitted.failed_at)

    found = swept(run, name, trial, size.lanes, steps=steps, schedule=range(len(NAMES)), peak=size.peaks, seed=range(config.seeds))
    return found | {"tuned": np.stack(tuned), "shapes": rates[-1]}


def merged(config: Config, run: Run, name: str) -> dict[str, np.ndarray]:
    """Constant runs of the full budget, and merges of checkpoints of their last stretch: held-out losses of shape (peaks, seeds)."""
    size = getattr(config, name)
    task, every = make_task(name, size), round(config.cooldown * size.steps) // (NUM_CHECKPOINTS - 1)

    def trial(trial: Trial):
        fit = task.fit(size.batch_size, lambda k: trial.peak, trial.seed)
        state, _ = fit.advance(fit.init(jax.random.key(trial.seed)), size.steps - (NUM_CHECKPOINTS - 1) * every)
        ring = WSM(NUM_CHECKPOINTS)

        def on(carry, _):
            state, kept = carry
            state, _ = fit.advance(state, every)
            return (state, ring.update(kept, state.model)), None

        kept = ring.update(ring.init(state.model), state.model)
        (state, kept), _ = jax.lax.scan(on, (state, kept), length=NUM_CHECKPOINTS - 1)
        models = {"constant": state.model}
        models |= {kind: WSM(NUM_CHECKPOINTS, decay).merge(kept, state.model) for kind, decay in MERGES.items()}
        return {kind: task.measure(model, state.failed_at)["loss"] for kind, model in models.items()}

    return swept(run, f"{name} merged", trial, size.lanes, peak=size.peaks, seed=range(config.seeds))


def searched(config: Config, run: Run, name: str) -> dict[str, np.ndarray]:
    """AutoLRS over the range of the peaks: trained for the whole budget, and for half of it, which with the search makes the whole.

    Measures of shape (2, `KAPPAS`, seeds); the rates of the stages in a further axis, NaN behind the last.
    """
    size = getattr(config, name)
    task = make_task(name, size)

    def trial(trial: Trial):
        def train(state, rate, steps):
            state, metrics = task.fit(size.batch_size, lambda k: rate, trial.seed).advance(state, steps)
            return state, metrics["loss"]

        start = task.fit(size.batch_size, lambda k: 0.0, trial.seed).init(jax.random.key(trial.seed))
        search = RateSearch(jnp.float32(size.peaks[0]), jnp.float32(size.peaks[-1]), trial.kappa)
        state, stages = train_autolrs(train, start, search, trial.steps, **stages_of(trial.steps))
        rates = jnp.stack([stage.rate for stage in stages])
        found = {"rates": jnp.pad(rates, (0, MAX_STAGES - len(stages)), constant_values=jnp.nan)}
        return task.measure(state.model, state.failed_at) | found

    leaves = {"steps": [size.steps, size.steps // 2], "kappa": KAPPAS, "seed": range(config.seeds)}
    return swept(run, f"{name} AutoLRS", trial, size.lanes, **leaves)


def timescale(config: Config, run: Run) -> dict[str, np.ndarray]:
    """AdamW over batches, timescales, peaks and seeds, at one number of windows: held-out losses of that shape."""
    part, task = config.adamw, make_task("text", config.text)

    def trial(trial: Trial):
        steps = part.windows // trial.batch_size
        decay = weight_decay(trial.tau, trial.batch_size, trial.peak, part.windows)
        schedule = linear_schedule(trial.peak, steps)
        fit = task.fit(trial.batch_size, schedule, trial.seed, lambda rate: optax.adamw(rate, b2=0.98, weight_decay=decay))
        fitted = fit.run(jax.random.key(trial.seed), steps)
        return task.measure(fitted.model, fitted.failed_at)

    leaves = {"batch_size": part.batch_sizes, "tau": part.taus, "peak": part.peaks, "seed": range(part.seeds)}
    return {"loss": swept(run, "timescale", trial, config.text.lanes, **leaves)["loss"]}


# What came of it


def resampled(values: np.ndarray) -> np.ndarray:
    """Means over seeds, the last axis: of all of them, then of `DRAWS` draws with replacement."""
    seeds = values.shape[-1]
    draws = np.random.default_rng(0).integers(seeds, size=(DRAWS, seeds))
    return values[..., np.concatenate([np.arange(seeds)[None], draws])].mean(-1)


def band(draws: np.ndarray) -> tuple[float, float]:
    """From 5 % to 95 %."""
    low, high = np.nanquantile(draws, [0.05, 0.95], axis=-1)
    return low, high


class Outcome(NamedTuple):
    """Of a task; the last axis is that of `resampled`.

    - `losses`, `ranks`: at the best peak, and 1 for the best, (budgets, schedules, draws). `peaks`: places of the best peaks, (budgets, schedules).
    - `agreement`: rank correlation with the convex bound, (budgets, draws). `rates`: of the best peaks with the bound's, (budgets,).
    """

    losses: np.ndarray
    ranks: np.ndarray
    peaks: np.ndarray
    agreement: np.ndarray
    rates: np.ndarray


def outcome(found: dict[str, np.ndarray], measure: str) -> Outcome:
    """Best peaks, ranks and what the bound knew of them, by the held-out or the training loss."""
    means = resampled(found[measure])
    losses, peaks = means.min(2), means[..., 0].argmin(2)
    tuned = found["tuned"]
    rates = [correlation(tuned[i, :, 0], row) for i, row in enumerate(peaks)]
    agreement = np.stack([correlation(tuned[i, :, 1, None], losses[i]) for i in range(len(losses))])
    return Outcome(losses, rankdata(losses, axis=1), peaks, agreement, np.array(rates))


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's, along the first axis."""
    a, b = (rankdata(values, axis=0) for values in (a, b))
    a, b = a - a.mean(0), b - b.mean(0)
    with np.errstate(invalid="ignore"):  # all equal
        return (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))


def rank_rows(config: Config, outcomes: dict[str, Outcome], trained: dict[str, Outcome]) -> list[dict]:
    """A row for each schedule, the best first: mean ranks with bands, over all, by budget, by task; then over all by training loss."""
    ranks, others = (np.stack([result.ranks for result in results.values()]) for results in (outcomes, trained))  # (tasks, budgets, schedules, draws)
    rows = []
    for i in np.argsort(ranks[..., 0].mean((0, 1))):
        mine = ranks[:, :, i]
        low, high = band(mine.mean((0, 1))[1:])
        row = {"schedule": NAMES[i], "mean rank": float(mine[..., 0].mean()), "5 %": float(low), "95 %": float(high)}
        row |= {f"{share:.0%}": float(mine[:, j, 0].mean()) for j, share in enumerate(config.budgets)}
        row |= {task: float(mine[k, :, 0].mean()) for k, task in enumerate(outcomes)}
        low, high = band(others[:, :, i].mean((0, 1))[1:])
        rows.append(row | {"by training loss": float(others[:, :, i, 0].mean()), "5 % there": float(low), "95 % there": float(high)})
    return rows


def budget_rows(config: Config, outcomes: dict[str, Outcome]) -> list[dict]:
    """The mean rank of each schedule at each budget with its band."""
    ranks = np.stack([result.ranks for result in outcomes.values()]).mean(0)
    rows = []
    for j, share in enumerate(config.budgets):
        for i, name in enumerate(NAMES):
            low, high = band(ranks[j, i, 1:])
            rows.append({"budget": share, "schedule": name, "mean rank": float(ranks[j, i, 0]), "5 %": float(low), "95 %": float(high)})
    return rows


def final_rows(config: Config, name: str, found: dict, result: Outcome) -> list[dict]:
    """The full budget of a task."""
    peaks, rows = getattr(config, name).peaks, []
    for i in np.argsort(result.losses[-1, :, 0]):
        place = result.peaks[-1, i]
        row = {"task": name, "schedule": NAMES[i], "peak": peaks[place], "at the grid's edge": bool(place in (0, len(peaks) - 1))}
        for measure in ("loss", "training loss", "accuracy"):
            row[measure], row[f"± {measure}"] = interval(found[measure][-1, i, place])
        row["rank"] = float(result.ranks[-1, i, 0])
        row["5 %"], row["95 %"] = map(float, band(result.ranks[-1, i, 1:]))
        rows.append(row)
    return rows


def edge_rows(config: Config, outcomes: dict[str, Outcome]) -> list[dict]:
    """How many schedules were best at the lowest and at the highest peak."""
    rows = []
    for name, result in outcomes.items():
        for j, share in enumerate(config.budgets):
            last, places = len(getattr(config, name).peaks) - 1, result.peaks[j]
            row = {"task": name, "budget": share, "schedules": len(NAMES), "at the lowest peak": int((places == 0).sum())}
            rows.append(row | {"at the highest peak": int((places == last).sum())})
    return rows


def bound_rows(config: Config, outcomes: dict[str, Outcome], trained: dict[str, Outcome]) -> list[dict]:
    """Rank correlations of the convex bound, tuned, with the losses, and of its best base rates with the best peaks."""
    rows = []
    for name in outcomes:
        for j, share in enumerate(config.budgets):
            row: dict[str, Any] = {"task": name, "budget": share}
            for label, result in (("held-out", outcomes[name]), ("training", trained[name])):
                low, high = band(result.agreement[j, 1:])
                row |= {f"{label} loss": float(result.agreement[j, 0]), f"{label}, 5 %": float(low), f"{label}, 95 %": float(high)}
                row[f"{label}, best peak"] = float(result.rates[j])
            rows.append(row)
    return rows


def merge_rows(config: Config, name: str, found: dict, merges: dict) -> list[dict]:
    """Merging beside the decay it imitates: each at its own best peak, and at the decay's; differences are paired by seed."""
    peaks, rows = getattr(config, name).peaks, []
    for kind in MERGES:
        decayed, replayed = found["loss"][-1, NAMES.index(f"WSD {kind}")], merges[kind]
        best, own, level = (int(losses.mean(1).argmin()) for losses in (decayed, replayed, merges["constant"]))
        row = {"task": name, "decay": kind, "constant": interval(merges["constant"][level])[0]}
        row |= {"decayed": interval(decayed[best])[0], "its peak": peaks[best], "merged": interval(replayed[own])[0], "its own peak": peaks[own]}
        row["merged - decayed"], row["±"] = interval(replayed[own] - decayed[best])
        row["at the decay's peak"], row["± there"] = interval(replayed[best] - decayed[best])
        rows.append(row)
    return rows


def timescale_rows(config: Config, losses: np.ndarray) -> tuple[list[dict], list[dict]]:
    """The best τ of each batch, and how it moves: slopes of log τ*, log η* and log λ* in log B. At each peak, and at the best one for each batch."""
    part = config.adamw
    taus, peaks = np.array(part.taus), np.array(part.peaks)
    means = resampled(losses)  # (batches, taus, peaks, draws)
    at = jax.jit(jax.vmap(lambda row: sweep_optimum(jnp.asarray(taus), row), -1))

    def optima(losses):
        """Of each batch and draw: between points of the grid where it can be, else at the best of them."""
        best = losses.argmin(1)
        between = np.stack([np.asarray(at(jnp.asarray(rows))) for rows in losses])
        inside = (best > 0) & (best < len(taus) - 1) & np.isfinite(between)
        return np.where(inside, between, taus[best])

    rows, slopes = [], []
    best = means.min(1).argmin(1)  # the place of the best peak, (batches, draws)
    cases = {f"{peak:g}": np.full_like(best, place) for place, peak in enumerate(peaks)} | {"best": best}
    for label, places in cases.items():
        chosen = np.take_along_axis(means, places[:, None, None], 2)[:, :, 0]
        tau, rate = optima(chosen), peaks[places]
        decay = np.array(part.batch_sizes)[:, None] / (rate * tau * part.windows)
        for i, size in enumerate(part.batch_sizes):
            low, high = band(tau[i, 1:])
            row = {"peak": label, "batch": size, "best peak": float(rate[i, 0]), "best τ": float(tau[i, 0]), "5 %": float(low), "95 %": float(high)}
            row |= {"best λ": float(decay[i, 0]), "loss": float(chosen[i, :, 0].min())}
            rows.append(row | {"at the grid's edge": bool(chosen[i, :, 0].argmin() in (0, len(taus) - 1))})
        row = {"peak": label}
        for name, values in (("τ*", tau), ("η*", rate), ("λ*", decay)):
            slope = np.polyfit(np.log(part.batch_sizes), np.log(values), 1)[0] if len(part.batch_sizes) > 1 else np.full(values.shape[1], np.nan)
            row[f"slope of {name}"] = float(slope[0])
            row[f"{name}, 5 %"], row[f"{name}, 95 %"] = map(float, band(slope[1:]))
        slopes.append(row)
    return rows, slopes


def search_rows(config: Config, name: str, found: dict, result: Outcome, search: dict) -> list[dict]:
    """AutoLRS beside the schedules, whose peaks were tuned in as many full runs as the grid has peaks."""
    size, tuned = getattr(config, name), result.losses[-1, :, 0]
    rows = []
    for i, cost in enumerate(("not counted", "counted")):
        for j, kappa in enumerate(KAPPAS):
            row = {"task": name, "κ": kappa, "search": cost, "updates trained": size.steps // (1 + i), "with search": 2 * size.steps // (1 + i)}
            row["loss"], row["±"] = interval(search["loss"][i, j])
            row["rank among the schedules"] = int(1 + (tuned < row["loss"]).sum())
            for other in ("constant", "linear"):
                row[f"- {other}"], row[f"± {other}"] = against(search["loss"][i, j], found["loss"][-1], result, other)
            rates = np.exp(np.log(search["rates"][i, j]).mean(0))
            rows.append(row | {"rates (geometric means)": ", ".join(f"{rate:.2g}" for rate in rates if np.isfinite(rate))})
    return rows


def against(losses: np.ndarray, others: np.ndarray, result: Outcome, name: str) -> tuple[float, float]:
    """Less a schedule's at its best peak, seed by seed."""
    place = NAMES.index(name)
    return interval(losses - others[place, result.peaks[-1, place]])


# Figures


SHOWN = ("constant", "linear", "cosine", "step 30-60-90", "one-cycle", "inverse √", "REX", "WSD sqrt", "WSD-S", "refined")


def draw_ranks(config: Config, rows: list[dict]):
    """Mean ranks by budget, and by task."""
    figure, panels = axes(1, 2, 5.6, 0.9 + 0.3 * len(rows))
    shares = [f"{share:.0%}" for share in config.budgets]
    for axis, columns, title in zip(panels, (shares, list(config.tasks)), ("over tasks, by budget", "over budgets, by task")):
        values = np.array([[row[column] for column in columns] for row in rows])
        heat(axis, values, [row["schedule"] for row in rows], columns, f"mean rank {title}", (1, len(NAMES)))
    return figure


def draw_losses(config: Config, outcomes: dict[str, Outcome]):
    """Held-out loss at the best peak, and its ratio to that of linear decay."""
    figure, panels = axes(2, len(outcomes), 4.2, 3.4)
    budgets, linear = np.array(config.budgets) * 100, NAMES.index("linear")
    for column, (name, result) in enumerate(outcomes.items()):
        upper, lower = panels[column], panels[len(outcomes) + column]
        for i, shown in enumerate(SHOWN):
            losses = result.losses[:, NAMES.index(shown)]
            for axis, values in ((upper, losses), (lower, losses / result.losses[:, linear])):
                axis.plot(budgets, values[:, 0], marker="o", ms=3, lw=1.2, color=f"C{i}", label=shown)
                axis.fill_between(budgets, *band(values[:, 1:]), color=f"C{i}", alpha=0.12, lw=0)
        upper.set(title=name, yscale="log")
        lower.set(xlabel="budget, % of the full run")
        for axis in (upper, lower):
            axis.set_xscale("log")
            axis.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
            axis.minorticks_off()
    panels[0].set_ylabel("held-out loss")
    panels[len(outcomes)].set_ylabel("held-out loss / linear decay's")
    panels[0].legend(frameon=False, fontsize=7)
    return figure


def draw_bound(config: Config, outcomes: dict[str, Outcome], trained: dict[str, Outcome]):
    """Rank correlation of the convex bound with what came out."""
    figure, panels = axes(1, 2, 4.6)
    for axis, results, label in zip(panels, (outcomes, trained), ("held-out loss", "training loss")):
        agreement(axis, config, results, f"Spearman: tuned bound, {label}")
    return figure


def agreement(axis, config: Config, outcomes: dict[str, Outcome], label: str) -> None:
    """A line for each task."""
    budgets = np.array(config.budgets) * 100
    for name, result in outcomes.items():
        axis.plot(budgets, result.agreement[:, 0], marker="o", ms=4, label=name)
        axis.fill_between(budgets, *band(result.agreement[:, 1:]), alpha=0.15, lw=0)
    axis.axhline(0, color="gray", lw=0.8)
    axis.set(xscale="log", ylim=(-1, 1), xlabel="budget, % of the full run", ylabel=label)
    axis.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8)


def draw_merges(rows: list[dict]):
    """Merged less decayed, each at its best peak."""
    names = list(dict.fromkeys(row["task"] for row in rows))
    figure, panels = axes(1, len(names), 3.2, 3.0)
    for axis, name in zip(panels, names):
        mine = [row for row in rows if row["task"] == name]
        places = np.arange(len(mine))
        for shift, loss, error in ((-0.08, "merged - decayed", "±"), (0.08, "at the decay's peak", "± there")):
            values, errors = ([row[key] for row in mine] for key in (loss, error))
            label = "at its own best peak" if error == "±" else "at the decay's best peak"
            axis.errorbar(places + shift, values, np.nan_to_num(errors), fmt="o", ms=4, capsize=2, label=label)
        axis.axhline(0, color="gray", lw=0.8)
        axis.set_xticks(places, [row["decay"] for row in mine])
        axis.set(title=name, xlim=(-0.5, len(mine) - 0.5))
    panels[0].set_ylabel("held-out loss: merged - decayed")
    panels[0].legend(frameon=False, fontsize=7)
    return figure


def draw_timescale(config: Config, losses: np.ndarray):
    """Held-out loss against τ, a panel for each peak."""
    part = config.adamw
    figure, panels = axes(1, len(part.peaks), 4.2, 3.4)
    for j, (axis, peak) in enumerate(zip(panels, part.peaks)):
        for i, size in enumerate(part.batch_sizes):
            means, errors = np.array([interval(row) for row in losses[i, :, j]]).T
            axis.errorbar(part.taus, means, np.nan_to_num(errors), marker="o", ms=3, lw=1.2, capsize=2, label=f"batch {size}")
        axis.set(xscale="log", xlabel="τ = B/(η λ D)", title=f"peak {peak:g}")
    panels[0].set_ylabel("held-out loss")
    panels[0].legend(frameon=False)
    return figure


# The run


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    config, folder = parse(Config, ROOT / "configs" / "schedules" / "bake_off", argv, out=ROOT / "runs" / "schedules_bake_off")
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    with Run(folder, config) as run:
        found = {name: run.stage(name, lambda name=name: compare(config, run, name)) for name in config.tasks}
        merges = {name: run.stage(f"{name} merged", lambda name=name: merged(config, run, name)) for name in config.tasks}
        searches = {name: run.stage(f"{name} AutoLRS", lambda name=name: searched(config, run, name)) for name in config.autolrs}
        decays = run.stage("timescale", lambda: timescale(config, run)) if config.adamw.batch_sizes else None
        report(config, run, found, merges, searches, decays)


def report(config: Config, run: Run, found: dict, merges: dict, searches: dict, decays: dict | None) -> None:
    """Tables, figures and the page."""
    outcomes, trained = ({name: outcome(measures, measure) for name, measures in found.items()} for measure in ("loss", "training loss"))
    ranks, edges, bound = rank_rows(config, outcomes, trained), edge_rows(config, outcomes), bound_rows(config, outcomes, trained)
    finals = {name: final_rows(config, name, found[name], result) for name, result in outcomes.items()}
    merging = [row for name in config.tasks for row in merge_rows(config, name, found[name], merges[name])]
    searching = [row for name, search in searches.items() for row in search_rows(config, name, found[name], outcomes[name], search)]
    metrics: dict[str, Any] = {"ranks": ranks, "ranks by budget": budget_rows(config, outcomes), "edges": edges, "bound": bound}
    metrics |= {"final": finals, "merging": merging, "AutoLRS": searching}
    if decays is not None:
        metrics["timescale"], metrics["timescale slopes"] = timescale_rows(config, decays["loss"])
    run.results(metrics)

    sizes = ", ".join(f"{name} {getattr(config, name).steps}" for name in config.tasks)
    lead = f"{len(NAMES)} schedules, {config.seeds} seeds; updates of a full run: {sizes}. Bands: 5 % to 95 % of the bootstrap over seeds."
    page = Report("Bake-off of schedules", lead)
    page.heading("Mean ranks (1 is best)")
    page.figure(run.figure("ranks", draw_ranks(config, ranks), {"rows": ranks}), "By held-out loss, each schedule at its best peak.")
    page.table(ranks)
    page.table(metrics["ranks by budget"], sortable=True)
    page.heading("Loss against budget")
    losses = {name: {"loss": result.losses[..., 0], "band": band(result.losses[..., 1:])} for name, result in outcomes.items()}
    page.figure(run.figure("losses", draw_losses(config, outcomes), losses), "Below: divided by that of linear decay, seed by seed.")
    for name, rows in finals.items():
        page.heading(f"{name}: the full budget")
        page.table(rows)
    page.heading("Were the peaks wide enough?")
    page.text("A best peak at the grid's edge says that a better one may lie beyond it.")
    page.table(edges)
    page.heading("What the convex bound knew")
    page.figure(run.figure("bound", draw_bound(config, outcomes, trained), {"rows": bound}), "1: it ranks the schedules as they came out.")
    page.table(bound)
    page.heading("Merging in place of a decay (WSM)")
    caption = f"{NUM_CHECKPOINTS} checkpoints of the last {config.cooldown:.0%} of a constant run; below 0 merging is better."
    page.figure(run.figure("merging", draw_merges(merging), {"rows": merging}), caption)
    page.table(merging)
    if searching:
        page.heading("AutoLRS")
        page.text("Each schedule's peak was chosen from full runs at every peak of the grid, which is not counted; AutoLRS chooses its own.")
        page.table(searching)
    if decays is not None:
        page.heading("The timescale of AdamW")
        shown = run.figure("timescale", draw_timescale(config, decays["loss"]), {"loss": decays["loss"]})
        page.figure(shown, f"Transformer, {config.adamw.windows * CONTEXT} characters in every run, linear decay.")
        page.text("slope of x: of log x in log B, at one peak or at the best peak of each batch. Power lines say 0 for τ*, and 1 for λ* at one peak.")
        page.table(metrics["timescale slopes"])
        page.table(metrics["timescale"])
    page.write(run.folder / "report.html")
    for row in ranks:
        line = f"{row['schedule']}: mean rank {row['mean rank']:.2f} [{row['5 %']:.2f}, {row['95 %']:.2f}]"
        run.console.print(line, highlight=False, soft_wrap=True)
    for row in metrics.get("timescale slopes", []):
        line = f"timescale at peak {row['peak']}: slope of τ* in B {row['slope of τ*']:.2f} [{row['τ*, 5 %']:.2f}, {row['τ*, 95 %']:.2f}]"
        run.console.print(line, highlight=False, soft_wrap=True)
    run.console.print(f"report: {run.folder / 'report.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
