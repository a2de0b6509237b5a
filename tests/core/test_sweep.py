"""Sweeps: the same numbers as single runs, one compile per static shape, any number of runs on any number of devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import grid, sweep, traced
from ergodax.testing import count_traces


@dataclasses.dataclass(frozen=True)
class Optim:
    rate: float = 0.1
    steps: int = 3


@dataclasses.dataclass(frozen=True)
class Config:
    optim: Optim = Optim()
    seed: int = traced(0)
    square: bool = False
    shift: float | None = None


def run(config):
    x = jax.random.normal(jax.random.key(config.seed), (2,))
    for _ in range(config.optim.steps):
        x = x - config.optim.rate * (x**2 if config.square else x)
    if config.shift is not None:
        x = x + config.shift
    return {"end": x, "norm": jnp.sum(x**2), "nested": {"first": x[0]}}


def single(**overrides):
    optim = Optim(**{name.split(".")[1]: value for name, value in overrides.items() if "." in name})
    return run(Config(optim, **{name: value for name, value in overrides.items() if "." not in name}))


def test_every_run_is_what_it_would_be_alone():
    """Seven runs in three groups, mixed up, on two devices, two lanes each: nothing divides."""
    overrides = [
        {"optim.rate": 0.1, "seed": 0},
        {"optim.rate": 0.2, "seed": 1},
        {"optim.rate": 0.2, "seed": 0, "square": True},
        {"optim.rate": 0.3, "seed": 2},
        {"optim.steps": 5},
        {"optim.rate": 0.4, "seed": 3, "square": True},
        {"optim.rate": 0.5, "seed": 4},
    ]
    counted, traces = count_traces(run)
    seen = []
    result = sweep(counted, Config(), overrides, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    for override, output in zip(overrides, result.outputs):
        expected = single(**override)
        np.testing.assert_allclose(output["end"], expected["end"], rtol=1e-12)
        np.testing.assert_allclose(output["norm"], expected["norm"], rtol=1e-12)
    assert traces() == result.num_compiles == 3
    assert sorted(sum((group.runs for group in result.groups), ())) == list(range(7))
    assert seen[-1] == (7, 7)
    assert {group.static.get("square") for group in result.groups} == {None, True}


@pytest.mark.parametrize("batch_size", [None, 1, 2, 5])
@pytest.mark.parametrize("devices", [1, 2])
def test_chunks_and_devices_change_nothing(batch_size, devices):
    overrides = grid(**{"optim.rate": [0.1, 0.2, 0.3], "seed": range(3)})
    counted, traces = count_traces(run)
    result = sweep(counted, Config(), overrides, batch_size=batch_size, devices=jax.local_devices()[:devices])
    assert traces() == 1
    for override, output in zip(overrides, result.outputs):
        np.testing.assert_allclose(output["end"], single(**override)["end"], rtol=1e-12)


def test_values_that_are_static_or_traced():
    """A None is static, a number in its place is traced; an int for a float field is a number; arrays of different shapes are different programs."""
    result = sweep(run, Config(), [{"shift": None}, {"shift": 1.0}, {"shift": 2.0}, {"optim.rate": 1, "shift": 0.5}])
    assert result.num_compiles == 3
    np.testing.assert_allclose(result.outputs[3]["end"], jnp.full(2, 0.5), atol=1e-12)

    @dataclasses.dataclass(frozen=True)
    class Holder:
        weights: object = None

    arrays = sweep(lambda c: jnp.sum(c.weights), Holder(), [{"weights": np.ones(2)}, {"weights": np.ones(3)}, {"weights": np.zeros(3)}])
    assert arrays.num_compiles == 2
    np.testing.assert_allclose([float(output) for output in arrays.outputs], [2, 3, 0])


def test_table_best_and_pivot():
    result = sweep(run, Config(), grid(**{"optim.rate": [0.1, 0.5], "seed": [0, 1, 2]}))
    table = result.table()
    assert list(table) == ["optim.rate", "seed", "nested.first", "norm"]
    norms = table["norm"].astype(float)
    assert result.best("norm") == int(np.argmin(norms))
    assert result.best("norm", largest=True) == int(np.argmax(norms))
    rates, seeds, cells = result.pivot("norm", "optim.rate", "seed")
    assert (rates, seeds) == ([0.1, 0.5], [0, 1, 2])
    np.testing.assert_allclose(cells, norms.reshape(2, 3))
    with pytest.raises(ValueError, match="no column `nrom`; there are optim"):
        result.best("nrom")


def test_best_ignores_runs_that_failed():
    result = sweep(lambda c: {"value": c.optim.rate / (c.optim.rate - 0.2)}, Config(), grid(**{"optim.rate": [0.1, 0.2, 0.3]}))
    assert result.best("value") == 0


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ([], {}, "at least one run"),
        ([{"optim.rat": 1.0}], {}, "`optim.rat` is not a field of Optim; it has rate, steps"),
        ([{"seed.x": 1}], {}, "is not a field of int"),
        ([{"square": [1]}], {}, "static values must be hashable"),
        ([{"seed": 1}], {"batch_size": 0}, "`batch_size` must be an integer of at least 1, got 0"),
    ],
)
def test_refusals_before_compiling(overrides, options, message):
    counted, traces = count_traces(run)
    with pytest.raises(ValueError, match=message):
        sweep(counted, Config(), overrides, **options)
    assert traces() == 0


def test_overrides_need_not_name_the_same_fields():
    result = sweep(run, Config(), [{"seed": 1}, {"optim.rate": 0.3}, {}])
    np.testing.assert_allclose(result.outputs[2]["end"], single()["end"], rtol=1e-12)
    assert result.num_compiles == 3
