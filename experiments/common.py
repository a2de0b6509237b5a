"""What experiments of all families share: many seeds in one program and their intervals, W2 between samples, plain axes, tables in colours."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from ergodax.core.run import Run
from ergodax.core.space import grid, traced
from ergodax.core.sweep import sweep


ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class _Seeded:
    seed: int = traced(0)


def over_seeds(run: Run, label: str, train: Callable, seeds: int, batch_size: int | None = None) -> dict[str, np.ndarray]:
    """`train(key) -> dict of arrays` for every seed, stacked: one compile, spread over the devices, `batch_size` vmapped on each (None: measured)."""
    with run.bar(label, seeds) as update:
        overrides = grid(seed=range(seeds))
        result = sweep(
            lambda config: train(jax.random.key(config.seed)),
            _Seeded(),
            overrides,
            batch_size=batch_size,
            progress=lambda done, total: update(done),
        )
    return {name: np.stack([output[name] for output in result.outputs]) for name in result.outputs[0]}


def interval(values) -> tuple[float, float]:
    """Mean and twice its standard error over seeds."""
    values = np.asarray(values, float)
    return float(values.mean()), float(2 * values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.nan


def wasserstein(x, y) -> float:
    """W2 between equally many rows, exact."""
    cost = cdist(x, y, "sqeuclidean")
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))


def axes(rows: int = 1, columns: int = 1, width: float = 5.2, height: float = 3.6):
    """A figure, and its axes in reading order, without boxes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False)
    for axis in grid.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(grid.flat)


def heat(axis, values: np.ndarray, rows: list[str], columns: list[str], title: str, colour_limits: tuple[float, float] | None = None) -> None:
    """A table in colours, on a log scale: dark is small; what was not run is blank, what is not finite a cross."""
    from matplotlib.colors import LogNorm

    shown = np.where(np.isfinite(values) & (values > 0), values, np.nan)
    low, high = colour_limits or (np.nanmin(shown), np.nanmax(shown))
    axis.imshow(shown, norm=LogNorm(low, high, clip=True), cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=10)
    middle = np.sqrt(low * high)
    for (i, j), value in np.ndenumerate(values):
        if np.isinf(value):
            axis.text(j, i, "×", ha="center", va="center", fontsize=7)
        elif not np.isnan(value):
            axis.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=6.5, color="white" if value < middle else "black")
