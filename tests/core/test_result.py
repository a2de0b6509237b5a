"""What came of a sweep: typed columns, the same from memory, from disk and from parquet; the best run and pivots with runs that failed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas
import pytest

from ergodax.core import SweepResult, grid, sweep
from ergodax.core.result import is_curve, stacked


nan, inf = np.nan, np.inf


def result(leaves, metrics=None):
    leaves = {name: list(values) for name, values in leaves.items()}
    return SweepResult(range(len(next(iter(leaves.values())))), leaves, metrics or {}, [], [])


class Solver:
    def __repr__(self):
        return "Solver()"


SOLVER = Solver()
LEAVES = {
    "width": [64, 128, 64],
    "rate": [1, 0.5, 0.25],
    "flag": [True, False, True],
    "name": ["adam", "sgd", "adam"],
    "scalar": [np.float32(0.5), jnp.asarray(0.25), 1.0],
    "perhaps": [None, 2, 3.5],
    "solver": [SOLVER, None, SOLVER],
    "function": [np.tanh, np.sin, np.tanh],
    "either": ["cosine", None, "linear"],
}


@pytest.mark.parametrize(
    ("name", "kind", "values"),
    [
        ("width", "int64", [64, 128, 64]),
        ("rate", "float64", [1.0, 0.5, 0.25]),
        ("flag", "bool", [True, False, True]),
        ("name", "<U4", ["adam", "sgd", "adam"]),
        ("scalar", "float64", [0.5, 0.25, 1.0]),
        ("perhaps", "float64", [nan, 2.0, 3.5]),
        ("solver", "object", [SOLVER, None, SOLVER]),
        ("function", "object", [np.tanh, np.sin, np.tanh]),
        ("either", "object", ["cosine", None, "linear"]),
    ],
)
def test_leaves_are_typed(name, kind, values):
    column = result(LEAVES).table()[name]
    assert column.dtype == kind
    np.testing.assert_array_equal(column, np.array(values, dtype=kind))


def test_metrics_keep_their_types():
    metrics = {"loss": np.float32([1, 2]), "count": np.int32([3, 4]), "ok": np.array([True, False]), "half": np.asarray(jnp.bfloat16([1.5, 2]))}
    table = result({"seed": [0, 1]}, metrics).table()
    assert {name: str(column.dtype) for name, column in table.items()} == {
        "seed": "int64", "loss": "float32", "count": "int32", "ok": "bool", "half": "float32",
    }  # fmt: skip
    frame = result({"seed": [0, 1]}, metrics).to_pandas()
    assert frame["count"].dtype == "int32"
    assert frame.index.name == "run"


def test_curves_are_summed_up_without_nan():
    curves = np.array([[3.0, 1.0, 2.0], [nan, 5.0, nan], [nan, nan, nan], [inf, 1.0, 4.0]])
    table = result({"seed": range(4)}, {"loss": curves}).table()
    assert list(table) == ["seed", "loss", "loss.final", "loss.min", "loss.max"]
    np.testing.assert_array_equal(table["loss.final"], [2, nan, nan, 4])
    np.testing.assert_array_equal(table["loss.min"], [1, 5, nan, 1])
    np.testing.assert_array_equal(table["loss.max"], [3, 5, nan, inf])
    np.testing.assert_array_equal(table["loss"][1], curves[1])


def test_runs_may_differ_in_what_they_return():
    """A curve's length, and whether a metric is there at all, may depend on the group."""
    curves = stacked([np.arange(3), np.arange(5), None, np.zeros(0, int)])
    scalars = stacked([np.asarray(1), None, np.asarray(3), np.asarray(4)])
    singles = stacked([np.float32(1), None])
    assert is_curve(curves)
    assert (scalars.dtype, singles.dtype) == (np.float64, np.float32)
    table = result({"seed": range(4)}, {"curve": curves, "loss": scalars}).table()
    np.testing.assert_array_equal(table["curve.final"], [2, 4, nan, nan])
    np.testing.assert_array_equal(table["curve.min"], [0, 0, nan, nan])
    np.testing.assert_array_equal(table["loss"], [1, nan, 3, 4])
    assert [None if row is None else len(row) for row in table["curve"]] == [3, 5, None, 0]


def test_parquet_gives_the_same_frame(tmp_path):
    metrics = {"loss": np.array([1.0, nan, 3.0]), "steps": np.int32([1, 2, 3]), "curve": stacked([np.float32([1, 2]), np.float32([3, 4, 5]), None])}
    made = result(LEAVES, metrics)
    made.to_parquet(tmp_path / "table.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["table.parquet"]
    read, kept = pandas.read_parquet(tmp_path / "table.parquet").set_index("run"), made.to_pandas()
    for name in ("solver", "function"):  # no file holds an object, so it is told in text
        kept[name] = [None if value is None else read[name][run] for run, value in kept[name].items()]
        assert ("Solver" if name == "solver" else "tanh") in read[name][0]
    for frame in (read, kept):
        frame["curve"] = [None if row is None else tuple(row.tolist()) for row in frame["curve"]]
    pandas.testing.assert_frame_equal(read, kept, check_column_type=False)


def test_best():
    made = result({"seed": range(5)}, {"loss": np.array([nan, 2.0, -inf, 1.0, inf]), "lost": np.full(5, nan)})
    assert made.best("loss") == 3
    assert made.best("loss", largest=True) == 1
    assert made.best("seed") == 0
    with pytest.raises(ValueError, match="no run has a finite `lost`"):
        made.best("lost")
    with pytest.raises(ValueError, match="no column `loos`; there are seed, loss, lost"):
        made.best("loos")
    with pytest.raises(ValueError, match="no column `name`; there are width"):  # a text has no best
        result(LEAVES).best("name")


def test_pivot():
    leaves = {"rate": [0.1, 0.2, 0.1, 0.2, 0.1], "solver": [SOLVER, SOLVER, None, None, SOLVER]}
    made = result(leaves, {"loss": np.array([1.0, 2.0, 3.0, nan, 5.0])})
    solvers, rates, cells = made.pivot("loss", "solver", "rate")
    assert (solvers, rates) == (["Solver()", None], [0.1, 0.2])
    np.testing.assert_array_equal(cells, [[3, 2], [3, nan]])
    _, _, sparse = result({"a": [1, 2], "b": [1, 2]}, {"loss": np.array([1.0, 2.0])}).pivot("loss", "a", "b")
    np.testing.assert_array_equal(sparse, [[1, nan], [nan, 2]])
    with pytest.raises(ValueError, match="does not set `width`; it sets rate, solver"):
        made.pivot("loss", "width", "rate")


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.5
    shift: float | None = None
    steps: int = 2
    activation: Callable = jnp.tanh
    name: str = "plain"
    options: Any = (1, 2)


def train(config):
    curve = config.rate ** jnp.arange(config.steps, dtype=float)
    out = {"curve": curve, "matrix": jnp.ones((2, 2)) * config.rate, "loss": config.activation(curve[-1])}
    return out if config.shift is None else out | {"shifted": curve[0] + config.shift}


OVERRIDES = [
    *grid(rate=[0.5, 0.25, 0.125], steps=[2]),
    {"steps": 3, "activation": jnp.sin, "name": "longer"},
    {"shift": 1.0, "options": (3, 4)},
]


def test_from_disk_as_from_memory(tmp_path):
    """Groups with other curves, metrics, objects: the table of the folder is that of the sweep, but for objects, which are text there."""
    made, kept = sweep(train, Config(), OVERRIDES, batch_size=1), sweep(train, Config(), OVERRIDES, batch_size=1, folder=tmp_path / "sweep")
    read = SweepResult.load(tmp_path / "sweep")
    for other in (kept, read):
        assert list(other.runs) == list(range(5))
        assert set(other.table()) == set(made.table())
        for name, column in made.table().items():
            same = other.table()[name]
            if name in ("activation", "options") and other is read:
                assert same.tolist() == made.leaf(name)
            elif is_curve(column):
                assert all(np.array_equal(a, b) for a, b in zip(column, same, strict=True))
            else:
                assert same.dtype == column.dtype
                np.testing.assert_array_equal(column, same)
    assert read.leaves["shift"] == [None, None, None, None, 1.0]
    assert [made.pivot("loss", "name", "steps")[i] for i in (0, 1)] == [["plain", "longer"], [2, 3]]
    assert read.pivot("loss", "activation", "steps")[0] == ["tanh", "sin"]
    np.testing.assert_array_equal(read.outputs[2]["matrix"], np.full((2, 2), 0.125))
    np.testing.assert_array_equal(read.to_pandas()["shifted"], [nan, nan, nan, nan, 2.0])


def test_a_sweep_that_was_interrupted(tmp_path):
    """What is on disk after the first chunk, one run for each of two devices."""

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(train, Config(), grid(rate=[0.5, 0.25, 0.125, 0.0625]), batch_size=1, folder=tmp_path / "sweep", progress=stop)
    part = SweepResult.load(tmp_path / "sweep")
    assert (list(part.runs), part.leaves, part.best("loss")) == ([0, 1], {"rate": [0.5, 0.25]}, 1)
    np.testing.assert_array_equal(part.outputs[1]["matrix"], np.full((2, 2), 0.25))


def test_a_sweep_without_finished_runs(tmp_path):
    class Stop(Exception):
        pass

    def stop(text):
        raise Stop

    with pytest.raises(Stop):
        sweep(train, Config(), OVERRIDES[:3], folder=tmp_path / "sweep", announce=stop)
    none = SweepResult.load(tmp_path / "sweep")
    assert (len(none), none.table()["rate"].tolist(), list(none.outputs)) == (0, [], [])
    none.to_parquet(tmp_path / "table.parquet")
    assert len(pandas.read_parquet(tmp_path / "table.parquet")) == len(none.to_pandas()) == 0
