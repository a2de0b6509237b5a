"""Figures of a sweep. Each function takes a `SweepResult` and returns a matplotlib `Figure`; nothing is shown, nothing is written.

Runs whose metric is NaN or infinite are never left out silently: they are marked where they stand and counted in the title.
"""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from .check import require
from .result import SweepResult, is_curve


_GREY, _BEST = "0.6", "#d62728"
_FEW = 10  # settings that a legend can tell apart by colour


def learning_curves(result: SweepResult, metric: str, *, by: str | None = None, over: str | Sequence[str] | None = None) -> Any:
    """A line for every setting: the mean of the curve `metric` over its runs.

    The band is the 95 % confidence interval of that mean (Student's t), or the range of the runs where there are two. The line is dotted, without a
    band, where some run of the setting has no finite value and the mean is that of the others, and ends in a cross where none has. The vertical axis
    spans the runs that stay finite, and is logarithmic if they are positive and span more than a decade. The horizontal axis is the curve `step` if
    the runs return one, else the index.

    - `by`: the config leaf that gives the colours: with a colour bar if it is a number, else with a legend. By default each setting has its own
      entry in the legend, unless there are more than ten; then it is the first leaf that varies.
    - `over`: the leaves that the mean is over (default: those called `seed`).

    Raises `ValueError` if there is no such curve or leaf.
    """
    curves = {name: values for name, values in result.metrics.items() if is_curve(values)}
    if metric not in curves:
        raise ValueError(f"no curve `{metric}`; there are {', '.join(curves) or 'none'}.")
    over = [name for name in result.leaves if name.split(".")[-1] == "seed"] if over is None else [over] if isinstance(over, str) else list(over)
    names, settings = _settings(result, over)
    if by is None and len(settings) > _FEW:
        by = names[0]
    of = dict(zip(settings, settings if by is None else (result.leaf(by)[places[0]] for places in settings.values())))
    colours = _Colours(list(of.values()), labels=by is None)

    rows = [np.zeros(0) if row is None else np.asarray(row, float) for row in curves[metric]]
    lost = [not row.size or not np.isfinite(row).all() for row in rows]
    whole = [row for row, failed in zip(rows, lost) if not failed] or [row[np.isfinite(row)] for row in rows]
    shown = np.concatenate([np.zeros(0), *whole])  # what diverged does not set the scale
    figure, axis = _axes()
    for key, places in settings.items():
        label = ", ".join(f"{_short(name, names)}={_text(item)}" for name, item in zip(names, key)) if by is None else None
        axis.plot([], [], color=colours.of(of[key]), lw=1.5, label=label)
        _draw_mean(axis, _steps(result, places), _padded([rows[place] for place in places]), colours.of(of[key]))
    logarithmic = _is_log(shown)
    if shown.size:
        axis.set_ylim(*_limits(shown, logarithmic))
    numbers = sorted({len(places) for places in settings.values()})
    band = "95 % confidence" if numbers[-1:] > [2] else "range"
    runs = "–".join(str(number) for number in dict.fromkeys((numbers[0], numbers[-1]))) if numbers else "0"
    title = f"mean and {band} of {runs} runs" if numbers[-1:] > [1] else "one run a line"
    axis.set(xlabel="step" if "step" in curves else "index", ylabel=metric, yscale="log" if logarithmic else "linear")
    axis.set_title(_counted(title, sum(lost), len(result)), fontsize=10)
    colours.explain(figure, axis, by)
    return figure


def parallel_coordinates(result: SweepResult, metric: str, *, largest: bool = False, leaves: Sequence[str] | None = None) -> Any:
    """A vertical axis for each config leaf and one for `metric`; a line for every run, coloured by the metric, the best one thick.

    - `largest`: whether the best run has the largest value.
    - `leaves`: which leaves, in this order (default: all that vary).

    Axes of positive numbers that span a decade or more are logarithmic; texts, flags and objects stand evenly. Runs that failed are dashed and grey,
    and end below the metric's axis. Raises `ValueError` if there is no such leaf or metric, or none that varies.
    """
    values = result.numbers(metric)
    names = varying(result) if leaves is None else list(leaves)
    if not names:
        raise ValueError("parallel coordinates need a config leaf that varies, but all runs have the same.")
    columns = [result.leaf(name) for name in names]
    scales = [_Scale(column) for column in columns]
    good = np.isfinite(values)
    last = _Scale(values[good].tolist() if good.any() else [0.0])
    colour_map = _metric_colours(largest)
    best = result.best(metric, largest) if good.any() else None

    figure, axis = _axes(width=1.6 * len(names) + 3.2, height=4.0)
    axis.spines[:].set_visible(False)
    order = np.argsort(np.where(good, values if largest else -values, -np.inf))  # the best are drawn last
    for place in order.tolist():
        heights = [scale.height(column[place]) for column, scale in zip(columns, scales)]
        if not good[place]:
            axis.plot([*range(len(names)), len(names)], [*heights, -0.09], color=_GREY, ls="--", lw=1)
            continue
        height = last.height(values[place])
        style = {"color": colour_map(height), "lw": 1, "alpha": 0.75}
        if place == best:
            style = {"color": _BEST, "lw": 2.5, "zorder": 3, "label": f"best: run {result.runs[place]}"}
        axis.plot([*range(len(names)), len(names)], [*heights, height], **style)
    for position, (name, scale) in enumerate(zip([*names, metric], [*scales, last])):
        _draw_scale(axis, position, scale, name, right=position == len(names))
    if not good.all():
        axis.text(len(names) + 0.08, -0.09, "not finite", va="center", fontsize=8, color="0.35")
    shade = colour_map(np.linspace(0, 1, 256))[:, None]
    axis.imshow(shade, extent=(len(names) - 0.02, len(names) + 0.02, 0, 1), origin="lower", aspect="auto", zorder=4)
    axis.set(xlim=(-0.45, len(names) + 0.45), ylim=(-0.14, 1.02), xticks=[], yticks=[])
    if best is not None:
        axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0.0), fontsize=9)
    axis.set_title(_counted(f"{metric} of {len(result)} runs", int((~good).sum()), len(result)), fontsize=10, pad=22)
    return figure


def heat_map(result: SweepResult, metric: str, rows: str, columns: str, *, largest: bool = False) -> Any:
    """The mean of `metric` for each pair of values of two config leaves, over all else; the best cell is framed.

    Cells with a run that failed are hatched, say how many did, and show the mean of the others; they cannot be the best. Raises `ValueError` if there
    is no such leaf or metric.
    """
    values, groups = result.numbers(metric), result.grouped([rows, columns])
    down, across = (_sorted(dict.fromkeys(key[axis] for key in groups)) for axis in (0, 1))
    cells = {(down.index(row), across.index(column)): values[places] for (row, column), places in groups.items()}
    means = np.full((len(down), len(across)), np.nan)
    for cell, numbers in cells.items():
        means[cell] = np.mean(numbers[np.isfinite(numbers)]) if np.isfinite(numbers).any() else np.nan
    whole = {cell: float(means[cell]) for cell, numbers in cells.items() if np.isfinite(numbers).all()}

    figure, axis = _axes(width=2.6 + 0.8 * len(across), height=1.7 + 0.5 * len(down))
    patches, colours = require("matplotlib.patches", "experiments"), require("matplotlib.colors", "experiments")
    finite = means[np.isfinite(means)]
    norm = (colours.LogNorm if _is_log(finite) else colours.Normalize)(*((finite.min(), finite.max()) if finite.size else (0, 1)))
    image = axis.imshow(means, cmap=_metric_colours(largest), norm=norm, aspect="auto")
    for (i, j), numbers in cells.items():
        lost = int((~np.isfinite(numbers)).sum())
        if lost:
            box = {"facecolor": "0.85"} if lost == len(numbers) else {"fill": False}
            axis.add_patch(patches.Rectangle((j - 0.5, i - 0.5), 1, 1, hatch="///", edgecolor="0.5", lw=0, **box))
        text = "failed" if lost == len(numbers) else _text(float(means[i, j]))
        text += f"\n{lost} of {len(numbers)} failed" if 0 < lost < len(numbers) else ""
        shade = 0.0 if lost == len(numbers) else norm(means[i, j])
        dark = lost < len(numbers) and (shade > 0.5 if largest else shade < 0.5)
        axis.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    if whole:
        i, j = (max if largest else min)(whole, key=whole.__getitem__)
        axis.add_patch(patches.Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, fill=False, edgecolor=_BEST, lw=2.5))
    axis.set_xticks(range(len(across)), [_text(value) for value in across], rotation=30 if max(map(len, map(_text, across))) > 8 else 0)
    axis.set_yticks(range(len(down)), [_text(value) for value in down])
    axis.spines[:].set_visible(False)
    axis.set(xlabel=columns, ylabel=rows)
    axis.set_title(_counted(metric, int((~np.isfinite(values)).sum()), len(result)), fontsize=10)
    figure.colorbar(image)
    return figure


def varying(result: SweepResult) -> list[str]:
    """The config leaves that differ between runs."""
    return [name for name in result.leaves if len(result.grouped([name])) > 1]


def png(figure: Any) -> bytes:
    """The figure as the content of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, bbox_inches="tight")
    return file.getvalue()


# Settings


def _settings(result, over):
    """The leaves that vary besides `over`, and the runs of each of their settings."""
    result.grouped(over)
    names = [name for name in varying(result) if name not in over]
    return names, result.grouped(names)


def _steps(result, places):
    """Where the points of a setting's curves stand."""
    steps = result.metrics.get("step")
    return None if steps is None or not is_curve(steps) or steps[places[0]] is None else np.asarray(steps[places[0]], float)


def _padded(rows):
    """Curves as rows of one array, NaN where one has ended or is not finite."""
    length = max(map(len, rows))
    return np.stack([np.pad(np.where(np.isfinite(row), row, np.nan), (0, length - len(row)), constant_values=np.nan) for row in rows])


def _sorted(values):
    """Numbers in their order, all else as it comes and after them."""
    values = list(values)
    numbers = [value for value in values if _is_number(value)]
    return sorted(numbers) + [value for value in values if not _is_number(value)]


# Drawing


def _axes(width: float = 6.4, height: float = 3.8):
    figure = require("matplotlib.figure", "experiments").Figure(figsize=(width, height), layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _draw_mean(axis, steps, rows, colour):
    """The mean of some curves with its band; dotted, without the band, where one of them is missing."""
    at = np.arange(rows.shape[1]) if steps is None or len(steps) != rows.shape[1] else steps
    number = (~np.isnan(rows)).sum(0)
    mean = np.where(number > 0, np.nansum(rows, 0) / np.maximum(number, 1), np.nan)
    whole = number == len(rows)
    axis.plot(at, mean, ":", color=colour, lw=1.5)
    axis.plot(at, np.where(whole, mean, np.nan), color=colour, lw=1.5)
    if number.any() and number[-1] == 0:
        last = np.flatnonzero(number)[-1]
        axis.plot(at[last], mean[last], "x", color=colour)
    at, rows, mean = at[whole], rows[:, whole], mean[whole]
    if len(rows) == 2:
        axis.fill_between(at, rows.min(0), rows.max(0), color=colour, alpha=0.2, lw=0)
    elif len(rows) > 2:
        half = stats.t.ppf(0.975, len(rows) - 1) * rows.std(0, ddof=1) / math.sqrt(len(rows))
        axis.fill_between(at, mean - half, mean + half, color=colour, alpha=0.2, lw=0)


class _Colours:
    """A colour for every value: along a map for numbers, else one of ten (or along a map if there are more)."""

    def __init__(self, values: Sequence[Any], labels: bool):
        matplotlib = require("matplotlib", "experiments")
        colors = require("matplotlib.colors", "experiments")
        self.values, self._labels = _sorted(dict.fromkeys(values)), labels
        self.numeric = not labels and all(map(_is_number, self.values)) and len(self.values) > 1
        self.map = matplotlib.colormaps["viridis"]
        if self.numeric:
            numbers = np.array(self.values, float)
            self.norm = (colors.LogNorm if _is_log(numbers) else colors.Normalize)(numbers.min(), numbers.max())
        many = matplotlib.colormaps["tab10"].colors if len(self.values) <= _FEW else self.map(np.linspace(0, 1, len(self.values)))
        self._of = dict(zip(self.values, many))

    def of(self, value: Any) -> Any:
        """Its colour."""
        return self.map(self.norm(value)) if self.numeric else self._of[value]

    def explain(self, figure: Any, axis: Any, by: str | None) -> None:
        """The legend or the colour bar."""
        if self.numeric:
            bar = figure.colorbar(require("matplotlib.cm", "experiments").ScalarMappable(self.norm, self.map), ax=axis, label=by)
            if len(self.values) <= 6:
                bar.set_ticks(self.values, labels=[_text(value) for value in self.values])
                bar.minorticks_off()
            return
        if not self._labels:
            lines = require("matplotlib.lines", "experiments")
            handles = [lines.Line2D([], [], color=self.of(value), label=_text(value)) for value in self.values]
        else:
            handles = axis.get_legend_handles_labels()[0]
        if len(handles) > 1:
            style = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.0), "frameon": False, "fontsize": 8, "ncols": math.ceil(len(handles) / 20)}
            axis.legend(handles=handles, title=by, **style)


class _Scale:
    """An axis of parallel coordinates: where values stand between 0 and 1, and its ticks."""

    def __init__(self, values: Sequence[Any]):
        self.values = _sorted(dict.fromkeys(values))
        self._numeric = all(map(_is_number, self.values))
        self._log = self._numeric and _is_log(np.array(self.values, float))
        if self._numeric:
            low, high = self._place(self.values[0]), self._place(self.values[-1])
            self._low, self._span = (low, high - low) if high > low else (low - 0.5, 1.0)

    def height(self, value: Any) -> float:
        """Where `value` stands."""
        if self._numeric:
            return (self._place(value) - self._low) / self._span
        return self.values.index(value) / max(len(self.values) - 1, 1)

    def ticks(self) -> Mapping[float, str]:
        """Labels by height: the values themselves if they are few, else round numbers."""
        if not self._numeric and len(self.values) > 12:
            chosen = [self.values[i] for i in np.linspace(0, len(self.values) - 1, 12).astype(int)]
        elif not self._numeric or (len(self.values) <= 6 and min(self._gaps(), default=1.0) > 0.04):
            chosen = self.values
        else:
            ticker = require("matplotlib.ticker", "experiments")
            low, high = self.values[0], self.values[-1]
            locator = ticker.LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)) if self._log else ticker.MaxNLocator(6)
            chosen = [low, *(value for value in locator.tick_values(low, high).tolist() if low < value < high), high]
            inner = [value for value in chosen[1:-1] if min(self.height(value), 1 - self.height(value)) > 0.06]
            chosen = [low, *inner, high]
        return {self.height(value): _text(value) for value in chosen}

    def _gaps(self):
        heights = [self.height(value) for value in self.values]
        return [after - before for before, after in itertools.pairwise(heights)]

    def _place(self, value):
        return math.log(value) if self._log else float(value)


def _draw_scale(axis, position, scale, name, right):
    axis.plot([position, position], [0, 1], color="0.3", lw=1, zorder=2)
    axis.text(position, 1.06, name, ha="center", fontsize=9, fontweight="bold" if right else "normal")
    side = 1 if right else -1
    for height, label in scale.ticks().items():
        axis.plot([position, position + 0.03 * side], [height, height], color="0.3", lw=1, zorder=2)
        box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
        axis.text(position + 0.05 * side, height, label, ha="left" if right else "right", va="center", fontsize=8, bbox=box, zorder=5)


def _metric_colours(largest):
    """Dark is good."""
    return require("matplotlib", "experiments").colormaps["viridis_r" if largest else "viridis"]


def _counted(title, failed, total):
    return f"{title}\n{failed} of {total} runs not finite" if failed else title


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_log(numbers):
    """Whether positive numbers span a decade or more."""
    return numbers.size > 0 and numbers.min() > 0 and numbers.max() >= 10 * numbers.min()


def _limits(numbers, logarithmic):
    low, high = (np.log(numbers) if logarithmic else numbers).min(), (np.log(numbers) if logarithmic else numbers).max()
    margin = 0.05 * (high - low) or 0.5
    return (math.exp(low - margin), math.exp(high + margin)) if logarithmic else (low - margin, high + margin)


def _short(name, names):
    """The last part of a dotted name, if no other ends in it."""
    last = name.split(".")[-1]
    return name if sum(other.split(".")[-1] == last for other in names) > 1 else last


def _text(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


__all__ = ["heat_map", "learning_curves", "parallel_coordinates", "png", "varying"]
