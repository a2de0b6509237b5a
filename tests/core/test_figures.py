"""Figures show the numbers they should: means with their bands, runs in their places, cells, and every run that failed."""

import itertools

import numpy as np
import pytest
from matplotlib import colors

from ergodax.core import SweepResult
from ergodax.core.figures import heat_map, learning_curves, parallel_coordinates, png, varying


def result(leaves, **metrics):
    leaves = {name: list(values) for name, values in leaves.items()}
    return SweepResult(range(len(next(iter(leaves.values())))), leaves, {name: np.asarray(values) for name, values in metrics.items()}, [], [])


def product(**axes):
    return {name: list(column) for name, column in zip(axes, zip(*itertools.product(*axes.values())))}


def lines(axis, style="-"):
    return [line for line in axis.lines if line.get_linestyle() == style and len(line.get_xdata()) > 1]


def band(collection):
    """Lower and upper edge at each point of a filled band."""
    points = collection.get_paths()[0].vertices
    return np.array([(points[points[:, 0] == x, 1].min(), points[points[:, 0] == x, 1].max()) for x in np.unique(points[:, 0])])


def legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_mean_and_confidence_band():
    """Four seeds: Student's t with three degrees of freedom is 3.18245 at 97.5 %."""
    noise = np.array([[1.0, 2, 3, 6], [0, 0, 1, 1]])  # sample deviations √(14/3) and √(1/3)
    curves = np.concatenate([noise.T, noise.T + 10])
    figure = learning_curves(result(product(**{"train.rate": [0.1, 0.2], "seed": range(4)}), loss=curves), "loss")
    (axis,) = figure.axes
    low, high = lines(axis)
    np.testing.assert_allclose(low.get_ydata(), [3, 0.5])
    np.testing.assert_allclose(high.get_ydata(), [13, 10.5])
    mean, half = np.array([3, 0.5]), 3.182446 * np.sqrt([14 / 3, 1 / 3]) / 2
    np.testing.assert_allclose(band(axis.collections[0]), np.stack([mean - half, mean + half], 1), rtol=1e-6)
    assert axis.get_title() == "mean and 95 % confidence of 4 runs"
    assert legend(axis) == ["rate=0.1", "rate=0.2"]
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_yscale()) == ("index", "loss", "linear")


def test_two_seeds_show_their_range_over_steps():
    steps = np.tile([100, 200], (2, 1))
    (axis,) = learning_curves(result({"seed": [0, 1]}, loss=[[8.0, 1], [16, 0.5]], step=steps), "loss").axes
    np.testing.assert_allclose(lines(axis)[0].get_xdata(), [100, 200])
    np.testing.assert_allclose(band(axis.collections[0]), [[8, 16], [0.5, 1]])
    assert (axis.get_title(), axis.get_xlabel(), axis.get_yscale()) == ("mean and range of 2 runs", "step", "log")
    assert axis.get_legend() is None


def test_failed_runs_are_seen():
    """The mean of those left is dotted, an end is crossed, runs are counted, and what diverged does not set the scale."""
    curves = [[1.0, 2, 3, 4], [3, 4, np.nan, np.nan], [5, np.inf, np.nan, 1], [5, 1e9, np.nan, np.nan]]
    (axis,) = learning_curves(result(product(rate=[1, 2], seed=[0, 1]), loss=curves), "loss").axes
    whole, dotted = lines(axis), lines(axis, ":")
    np.testing.assert_array_equal(whole[0].get_ydata(), [2, 3, np.nan, np.nan])
    np.testing.assert_array_equal(dotted[0].get_ydata(), [2, 3, 3, 4])
    np.testing.assert_array_equal(dotted[1].get_ydata(), [5, 1e9, np.nan, 1])
    np.testing.assert_array_equal(band(axis.collections[0]), [[1, 3], [2, 4]])
    assert axis.get_title().endswith("3 of 4 runs not finite")
    assert axis.get_ylim()[1] < 10

    (axis,) = learning_curves(result({"rate": [1, 2]}, loss=[[1.0, 2], [3.0, np.nan]]), "loss").axes
    (cross,) = [line for line in axis.lines if line.get_marker() == "x"]
    assert (cross.get_xdata(), cross.get_ydata()) == ([0], [3])


def test_curves_of_different_lengths_and_missing_ones():
    curves = np.fromiter([np.arange(3.0), np.arange(5.0), None], dtype=object, count=3)
    (axis,) = learning_curves(result({"steps": [3, 5, 7]}, loss=curves), "loss").axes
    assert [np.isfinite(line.get_ydata()).sum() for line in lines(axis)] == [3, 5]
    assert axis.get_title() == "one run a line\n1 of 3 runs not finite"


def test_colours_by_a_leaf():
    rates = np.geomspace(1e-3, 1, 12).tolist()
    many = result({"rate": rates, "solver": ["Heun", "Euler"] * 6}, loss=np.ones((12, 3)))
    axis, bar = learning_curves(many, "loss").axes
    assert (bar.get_ylabel(), bar.get_yscale(), axis.get_legend()) == ("rate", "log", None)
    shades = [line.get_color() for line in lines(axis)]
    assert colors.to_rgba(shades[0]) != colors.to_rgba(shades[-1])
    (axis,) = learning_curves(many, "loss", by="solver").axes
    assert legend(axis) == ["Heun", "Euler"]
    assert [line.get_color() for line in lines(axis)][:2] * 6 == [line.get_color() for line in lines(axis)]
    (axis,) = learning_curves(many, "loss", by="solver", over=["rate"]).axes
    assert axis.get_title() == "mean and 95 % confidence of 6 runs"


def test_learning_curves_refuse_unknown_names():
    made = result({"rate": [1, 2]}, loss=np.ones((2, 3)), end=[1, 2])
    with pytest.raises(ValueError, match="no curve `end`; there are loss"):
        learning_curves(made, "end")
    for option in ({"by": "width"}, {"over": "width"}):
        with pytest.raises(ValueError, match="does not set `width`; it sets rate"):
            learning_curves(made, "loss", **option)


def test_parallel_coordinates():
    leaves = {"rate": [1e-3, 1e-2, 1e-1, 1.0], "width": [0, 5, 10, 10], "solver": ["Heun", "Euler", "Heun", "DDIM"], "same": [1] * 4}
    made = result(leaves, loss=[0.5, 0.25, 1.0, np.nan])
    assert varying(made) == ["rate", "width", "solver"]
    (axis,) = parallel_coordinates(made, "loss").axes
    heights = {tuple(np.round(line.get_ydata(), 6)) for line in axis.lines if len(line.get_xdata()) == 4}
    assert heights == {(0, 0, 0, 0.333333), (0.333333, 0.5, 0.5, 0), (0.666667, 1, 0, 1), (1, 1, 1, -0.09)}
    (failed,) = [line for line in axis.lines if line.get_linestyle() == "--"]
    assert failed.get_ydata()[-1] < 0
    assert legend(axis) == ["best: run 1"]
    texts = [text.get_text() for text in axis.texts]
    assert {"0.001", "0.01", "0.1", "1", "Heun", "DDIM", "loss", "not finite"} <= set(texts)
    assert axis.get_title() == "loss of 4 runs\n1 of 4 runs not finite"

    (axis,) = parallel_coordinates(made, "loss", largest=True, leaves=["solver", "rate"]).axes
    assert legend(axis) == ["best: run 2"]
    with pytest.raises(ValueError, match="leaf that varies"):
        parallel_coordinates(result({"rate": [1, 1]}, loss=[1, 2]), "loss")
    with pytest.raises(ValueError, match="does not set `with`"):
        parallel_coordinates(made, "loss", leaves=["with"])


def frame(axis):
    """The cell that is framed: row and column."""
    (box,) = [patch for patch in axis.patches if patch.get_linewidth() > 2]
    return round(box.get_y()), round(box.get_x())


def test_heat_map():
    """Rows are sorted; means over the seed; a cell with a run that failed says so and is not the best."""
    leaves = product(rate=[0.3, 0.1], width=[4, 8], seed=[0, 1])
    made = result(leaves, loss=[4, 6, 0.5, np.nan, 3, 1, np.nan, np.inf])
    axis, _ = heat_map(made, "loss", "rate", "width").axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0.1", "0.3"]
    assert {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axis.texts} == {
        (0, 0): "2", (0, 1): "failed", (1, 0): "5", (1, 1): "0.5\n1 of 2 failed",
    }  # fmt: skip
    assert frame(axis) == (0, 0)
    assert sum(patch.get_hatch() is not None for patch in axis.patches) == 2
    assert axis.get_title() == "loss\n3 of 8 runs not finite"
    assert frame(heat_map(made, "loss", "rate", "width", largest=True).axes[0]) == (1, 0)


def test_all_runs_failed():
    made = result(product(rate=[1, 2], width=[1, 2]), loss=[np.nan] * 4, curve=np.full((4, 3), np.nan))
    for figure in (learning_curves(made, "curve"), parallel_coordinates(made, "loss"), heat_map(made, "loss", "rate", "width")):
        assert "4 of 4 runs not finite" in figure.axes[0].get_title()
        assert png(figure).startswith(b"\x89PNG")
        assert figure.canvas.manager is None  # none of pyplot's, which would keep it
