"""Sweeps: the same numbers as single runs, one compile per static shape, any number of runs on any number of devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from ergodax.core import SweepResult, grid, sweep, traced
from ergodax.core.sweep import next_batch_size
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
    result = sweep(counted, Config(), overrides, batch_size=batch_size, mesh=Mesh(np.array(jax.local_devices()[:devices]), ("sweep",)))
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
    assert list(table) == ["optim.rate", "seed", "end", "end.final", "end.min", "end.max", "nested.first", "norm"]
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


def test_models_and_keys_come_back_whole():
    """Outputs that are no plain arrays: a model without its static parts, typed keys, and a bare array."""
    import equinox as eqx

    def make(config):
        model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(config.seed))
        return {"model": model, "key": jax.random.key(config.seed), "seed_again": config.seed}

    result = sweep(make, Config(), grid(seed=range(3)))
    expected = eqx.filter(make(Config(seed=2)), eqx.is_array)
    assert jax.tree.structure(result.outputs[2]["model"]) == jax.tree.structure(expected["model"])
    np.testing.assert_array_equal(result.outputs[2]["model"].layers[0].weight, expected["model"].layers[0].weight)
    assert result.outputs[2]["key"] == jax.random.key(2)
    assert list(result.table()) == ["seed", "seed_again"]
    assert sweep(lambda c: c.optim.rate * 2, Config(), grid(**{"optim.rate": [1.0, 2.0]})).table()["value"].tolist() == [2.0, 4.0]


@pytest.mark.parametrize(("batch_size", "chunk_size"), [(1, 3), (2, 4), (3, 3), (2, 2)])
def test_chunks_of_several_batches(batch_size, chunk_size):
    """`lax.map` inside a chunk; 11 runs fill no chunk of 2 devices evenly."""
    done = []
    runs = grid(seed=range(11))
    result = sweep(run, Config(), runs, batch_size=batch_size, chunk_size=chunk_size, progress=lambda at, of: done.append(at))
    for override, output in zip(runs, result.outputs, strict=True):
        np.testing.assert_allclose(output["end"], single(**override)["end"], rtol=1e-12)
    assert done[-1] == 11
    assert len(done) <= -(-11 // (2 * (chunk_size // batch_size) * batch_size)) + 1


def test_the_batch_size_that_measurement_chooses():
    """1, 8, 64, … as long as it helps by a tenth, enough runs are left, and compiling pays."""
    choose = next_batch_size
    assert choose({}, 1000, 0.0) == 1
    assert choose({1: 1.0}, 1000, 0.0) == 8
    assert choose({1: 1.0}, 15, 0.0) == 1  # too few runs to fill 8 twice
    assert choose({1: 1.0}, 100, 26.0) == 1  # 100 s of runs do not pay for 26 s of compiling
    assert choose({1: 1.0, 8: 0.95}, 1000, 0.0) == 1  # no gain
    assert choose({1: 1.0, 8: 0.5}, 1000, 0.0) == 64
    assert choose({1: 1.0, 8: 0.5, 64: 0.6}, 1000, 0.0) == 8
    assert choose({1: 1.0, 8: 0.5}, 100, 0.0) == 8
    assert choose({5: 1.0}, 10, 0.0) == 5  # what an earlier call was told to take


def test_measuring_changes_no_number():
    """Runs that are all overhead: larger batches are tried, and every run is still what it would be alone."""
    runs = grid(seed=range(400))
    result = sweep(run, Config(), runs)
    assert set(result.groups[0].tried) >= {1}
    assert result.num_compiles == len(result.groups[0].tried)
    for place in (0, 1, 3, 20, 250, 399):
        np.testing.assert_allclose(result.outputs[place]["end"], single(**runs[place])["end"], rtol=1e-12)


def test_memory_bounds_the_batch():
    """A run that needs half a megabyte, and room for four of them."""

    def large(config):
        x = jax.random.normal(jax.random.key(config.seed), (256, 256))
        return jnp.sum(jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x @ x), x))

    plans = []
    runs = grid(seed=range(16))
    mesh = Mesh(np.array(jax.devices()[:1]), ("sweep",))
    free = sweep(large, Config(), runs, batch_size=16, mesh=mesh, announce=plans.append)
    counted, traces = count_traces(large)
    bounded = sweep(counted, Config(), runs, batch_size=16, mesh=mesh, memory=free.groups[0].memory / 4, announce=plans.append)
    np.testing.assert_allclose(bounded.table()["value"], free.table()["value"], rtol=1e-9)
    assert free.groups[0].batch_size == 16
    assert traces() <= 4, "the bound is found once, not for every chunk"
    assert 2 <= bounded.groups[0].batch_size <= 4
    assert bounded.groups[0].memory <= free.groups[0].memory / 4
    assert "16 vmapped on each device" in plans[0]
    assert "MB a chunk there" in plans[0]


def test_the_plan_says_what_will_run():
    plans = []
    ran = []
    sweep(
        lambda c: {"value": c.optim.rate},
        Config(),
        grid(square=[False, True], seed=range(3)),
        batch_size=1,
        announce=lambda text: plans.append((text, list(ran))),
        progress=lambda *_: ran.append(1),
    )
    (text, before), *_ = plans
    lines = text.splitlines()
    assert lines[0].startswith("sweep: 6 runs in 2 groups; 2 compiles (")
    assert "2 devices (cpu)" in lines[0]
    assert lines[1].startswith("  square=False: 3 runs; one after the other on each device; ")
    assert len(plans) == 1
    assert not before, "the plan is said before anything runs"


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda c: {"seed": c.optim.rate}, r"the runs return \['seed'\], which are names of other columns"),
        (lambda c: {"run": c.optim.rate}, r"the runs return \['run'\], which are names of other columns"),
        (lambda c: {"loss": jnp.ones(2) if c.square else 1.0}, r"\['loss'\] are numbers in some groups and curves in others"),
    ],
)
def test_metrics_that_make_no_table(fn, message):
    ran = []
    with pytest.raises(ValueError, match=message):
        sweep(fn, Config(), grid(seed=[1, 2], square=[False, True]), progress=lambda *_: ran.append(1))
    assert not ran


def test_metrics_of_groups_agree_on_a_dtype(tmp_path):
    """An integer here and a float there; a half precision; curves of different lengths."""

    def fn(config):
        curve = jnp.arange(config.optim.steps, dtype=jnp.bfloat16)
        return {"count": jnp.int32(3) if config.square else jnp.float32(2.5), "curve": curve}

    runs = grid({"square": [False, True], "optim.steps": [2, 3]})
    for result in (sweep(fn, Config(), runs), sweep(fn, Config(), runs, folder=tmp_path, announce=lambda text: None), SweepResult.load(tmp_path)):
        table = result.table()
        assert table["count"].tolist() == [2.5, 2.5, 3.0, 3.0]
        assert [curve.tolist() for curve in table["curve"]] == [[0, 1], [0, 1, 2], [0, 1], [0, 1, 2]]
        assert {curve.dtype for curve in table["curve"]} == {np.dtype(np.float32)}


def test_static_objects_are_named_in_plan_and_table(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Solver:
        eta: float = 0.0

    @dataclasses.dataclass(frozen=True)
    class Sampling:
        solver: object = Solver()

    plans = []
    runs = grid(solver=[Solver(), Solver(0.5), jnp.tanh])
    sweep(lambda c: {"value": jnp.float32(callable(c.solver))}, Sampling(), runs, folder=tmp_path, announce=plans.append)
    names = ["Solver()", "Solver(eta=0.5)", "tanh"]
    assert [line.split(":")[0].strip() for line in plans[0].splitlines()[1:]] == [f"solver={name}" for name in names]
    assert SweepResult.load(tmp_path).leaves["solver"] == names


def test_a_mesh_without_a_sweep_axis_is_refused():
    with pytest.raises(ValueError, match=r"needs an axis `sweep`, got axes \('data',\)"):
        sweep(run, Config(), grid(seed=[1]), mesh=Mesh(np.array(jax.devices()), ("data",)))


def test_an_axis_of_data_is_left_to_the_function():
    """A mesh of one sweep and two data devices: the function's own constraint shards its batch, and the numbers stay."""

    def mean(config):
        x = jax.random.normal(jax.random.key(config.seed), (8, 3))
        x = jax.lax.with_sharding_constraint(x, PartitionSpec("data"))
        return {"mean": jnp.mean(jnp.sin(x)) * config.optim.rate}

    runs = grid(seed=range(3))
    result = sweep(mean, Config(), runs, batch_size=1, mesh=Mesh(np.array(jax.devices()).reshape(1, 2), ("sweep", "data")))
    expected = [float(jnp.mean(jnp.sin(jax.random.normal(jax.random.key(seed), (8, 3))))) * 0.1 for seed in range(3)]
    np.testing.assert_allclose(result.table()["mean"], expected, rtol=1e-12)


def test_users_may_still_pmap():
    """The run that `sweep` takes is a plain function: `jax.pmap` over seeds gives the same numbers."""
    out = jax.pmap(lambda seed: run(Config(seed=seed)))(jnp.arange(2))
    for seed in range(2):
        np.testing.assert_allclose(out["end"][seed], single(seed=seed)["end"], rtol=1e-12)
