"""The mesh of a job, the sharding rules, and one training run on two devices: the numbers, where things are stored, and inside a sweep."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from ergodax.core import Fit, grid, sweep
from ergodax.core.config import UsageError
from ergodax.core.mesh import (
    DataParallel,
    FullySharded,
    any_process,
    barrier,
    ending_together,
    from_primary,
    initialise,
    is_primary,
    replicated,
    to_host,
)


X = np.random.default_rng(0).normal(size=(64, 6))
Y = np.sin(X[:, :4])
WEIGHTS = {"first": np.random.default_rng(1).normal(size=(6, 16)), "bias": np.zeros(4), "second": 0.3 * np.random.default_rng(2).normal(size=(16, 4))}
RULES = {"replicated": replicated, "sharded": FullySharded(min_size=1)}
each_rule = pytest.mark.parametrize("rule", RULES)


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax itself does not run under strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def mesh():
    return initialise(data=2)


class Network(eqx.Module):
    first: jax.Array
    bias: jax.Array
    second: jax.Array

    def __call__(self, x):
        return jnp.tanh(x @ self.first) @ self.second + self.bias


def loss(model, batch, key):
    x, y = batch
    error = jax.vmap(model)(x) - y - 0.1 * jax.random.normal(key, y.shape)
    return jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error))}


def make(rate=1e-2, **options):
    model = Network(**jax.tree.map(jnp.asarray, WEIGHTS))
    defaults = {"batch_size": 16, "every": 2, "ema_decay": 0.9, "evaluate": lambda model, key: {"test": jnp.mean(model(X) ** 2)}}
    return Fit(loss, model, optax.adam(rate), (X, Y), **(defaults | options))


def train(fitting):
    state = fitting.place(fitting.init(jax.random.key(0)))
    return fitting.compiled(state, 8)(state)


def assert_same(one, other):
    """To the rounding of sums in another order."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


# The mesh


def test_initialise_lays_out_all_devices():
    for data, shape in ((1, (2, 1)), (2, (1, 2)), (None, (1, 2))):
        mesh = initialise(data=data)
        assert mesh.axis_names == ("sweep", "data")
        assert mesh.devices.shape == shape
        assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    with pytest.raises(ValueError, match=r"`data` must divide the 2 devices of the job \(1 processes\), got 3"):
        initialise(data=3)
    with pytest.raises(ValueError, match="`data` must be an integer of at least 1, got 0"):
        initialise(data=0)


@pytest.mark.parametrize(
    "told", [{"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}, {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, {"OMPI_COMM_WORLD_SIZE": "4"}]
)
def test_initialise_refuses_to_be_late_in_a_job_of_several(told, monkeypatch):
    """JAX has been used here: a job's process must not go on as if alone."""
    jax.device_count()
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="`initialise` must come before everything else that uses JAX"):
        initialise()


def test_initialise_reads_numbers(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES must be a whole number, got 'two'"):
        initialise()


def test_one_process_agrees_with_itself():
    assert is_primary()
    assert from_primary(lambda: {"step": 3}) == {"step": 3}
    assert any_process(True, False) == (True, False)
    barrier("here")
    np.testing.assert_array_equal(to_host({"a": jnp.arange(3)})["a"], np.arange(3))
    with pytest.raises(ZeroDivisionError), ending_together():
        1 / 0  # noqa: B018


@pytest.fixture
def two_processes(monkeypatch):
    """As if this were the first of two, whose exit can be seen."""

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def test_a_failure_ends_the_process_at_once_and_says_whose_it_was(two_processes, capsys):
    lost = "UNKNOWN: Gloo all-reduce failed: [pair.cc:538] Read error [10.0.0.2]:49: Connection reset by peer\nmore"
    for error, traceback, line in (
        (ZeroDivisionError("by zero"), True, "error: process 0 of 2 failed, which ends the job (ZeroDivisionError: by zero)."),
        (ValueError(lost), False, f"error: another process of this job is gone ({lost.splitlines()[0]}); start the same command again to go on from"),
        (RuntimeError("UNAVAILABLE: Task 1 heartbeat timeout"), False, "error: another process of this job is gone (UNAVAILABLE: Task 1 heartbeat"),
    ):
        with pytest.raises(SystemExit, match="1"), ending_together():
            raise error
        said = capsys.readouterr().err
        assert line in said
        assert ("Traceback" in said) == traceback
    with pytest.raises(UsageError, match="all say so"), ending_together():
        raise UsageError("all say so")


def test_processes_with_different_numbers_are_refused(two_processes, monkeypatch, mesh):
    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", lambda digest: np.array([digest, digest + np.uint32(1)]))
    with pytest.raises(ValueError, match="the processes hold different numbers"):
        DataParallel(mesh).put({"a": jnp.ones(3), "key": jax.random.key(0)})


# Rules


def test_rules():
    leaf = jax.ShapeDtypeStruct
    rule = FullySharded(min_size=24)
    for shape, axis_size, spec in (
        ((8, 6), 2, PartitionSpec("data")),
        ((6, 8), 2, PartitionSpec(None, "data")),
        ((8, 8), 2, PartitionSpec(None, "data")),
        ((9, 6), 3, PartitionSpec("data")),
        ((9, 6), 2, PartitionSpec(None, "data")),
        ((5, 7), 2, PartitionSpec()),
        ((22,), 2, PartitionSpec()),
        ((), 2, PartitionSpec()),
    ):
        assert rule("a", leaf(shape, jnp.float32), axis_size) == spec
        assert replicated("a", leaf(shape, jnp.float32), axis_size) == PartitionSpec()
    with pytest.raises(ValueError, match="`min_size`"):
        FullySharded(min_size=0)


def test_a_rule_may_go_by_name(mesh):
    def by_name(path, leaf, axis_size):
        return PartitionSpec("data") if path.endswith("second") else PartitionSpec()

    state, _ = train(make(parallel=DataParallel(mesh, by_name)))
    for part in (state.model, state.average, state.optimiser[0].mu):
        assert part.second.sharding.spec == PartitionSpec("data")
        assert part.first.sharding.is_fully_replicated


# Training on two devices


@pytest.fixture(scope="module")
def alone():
    with jax.numpy_dtype_promotion("standard"):
        return train(make())


@each_rule
@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 2}, {"remat": jax.checkpoint_policies.nothing_saveable, "donate": False}], ids=["plain", "accumulated", "remat"]
)
def test_two_devices_equal_one(mesh, alone, rule, options):
    expected = train(make(**options)) if "accumulate" in options else alone  # parts have keys of their own
    state, metrics = train(make(parallel=DataParallel(mesh, RULES[rule]), **options))
    assert_same((state, metrics), expected)
    whole = state.model.first.sharding.is_fully_replicated
    assert whole == (rule == "replicated")
    shards = {leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves((state.model, state.average, state.optimiser[0].mu))}
    assert shards == ({1.0} if whole else {0.5})
    assert metrics["loss"].sharding.is_fully_replicated


@each_rule
def test_each_device_works_on_half_the_batch(mesh, rule):
    fitting = make(parallel=DataParallel(mesh, RULES[rule]), evaluate=None)
    state = fitting.place(fitting.init(jax.random.key(0)))
    text = jax.jit(lambda state: fitting.advance(state, 2)).lower(state).compile().as_text()
    products = [line for line in text.splitlines() if " dot(" in line]
    assert products
    assert not any("[16,4]" in line.split(" dot(")[0] for line in products)  # the whole batch's output
    assert any("[8,4]" in line.split(" dot(")[0] for line in products)
    assert "all-reduce" in text
    assert ("all-gather" in text) == (rule == "sharded")


def test_without_jit_and_whole(mesh, alone):
    fitted = make(parallel=DataParallel(mesh, FullySharded(min_size=1))).run(jax.random.key(0), 8)
    assert_same((fitted.model, fitted.average, fitted.metrics), (alone[0].model, alone[0].average, alone[1]))


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 1e-2


@each_rule
def test_inside_a_sweep(mesh, rule):
    """Runs along "sweep" by shard_map, each run's batch along "data" by the constraints within."""

    def trained(parallel):
        def fn(config):
            fitted = make(config.rate, parallel=parallel).run(jax.random.key(0), 4)
            return {"weights": fitted.model.first, "loss": fitted.metrics["loss"]}

        return fn

    overrides = grid(rate=[1e-2, 3e-2])
    here = sweep(trained(DataParallel(mesh, RULES[rule])), Config(), overrides, mesh=mesh)
    there = sweep(trained(None), Config(), overrides)
    assert_same(list(here.outputs), list(there.outputs))


def test_bfloat16_in_parallel(mesh):
    """The policies meet: narrow products, whole-precision storage in shards."""
    model = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), Network(**WEIGHTS))
    options = {"data": (X.astype(np.float32), Y.astype(np.float32)), "batch_size": 16, "compute_dtype": jnp.bfloat16}
    one, two = (Fit(loss, model, optax.sgd(1e-2), parallel=parallel, **options) for parallel in (None, DataParallel(mesh, FullySharded(min_size=1))))
    (alone, _), (state, _) = train(one), train(two)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.model)} == {jnp.dtype(jnp.float32)}
    for a, b in zip(jax.tree.leaves(alone.model), jax.tree.leaves(state.model), strict=True):
        # 8 steps of 1e-2 times gradients of size O(1) that sum 16 terms in bfloat16 in another order
        np.testing.assert_allclose(a, b, atol=8 * 1e-2 * 16 * 2.0**-8)


# Refusals


def test_refusals(mesh):
    with pytest.raises(ValueError, match=r"the mesh must have an axis \"data\", got \('x',\)"):
        DataParallel(jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,)))
    with pytest.raises(ValueError, match='`accumulate` times the devices along "data", 2, must divide `batch_size`, got 15'):
        make(parallel=DataParallel(mesh), batch_size=15)
    fitting = Fit(loss, make().model, optax.sgd(0.1), lambda key, step: (jnp.asarray(X[:15]), jnp.asarray(Y[:15])), parallel=DataParallel(mesh))
    with pytest.raises(ValueError, match='the 2 devices along "data" must divide a batch, got 15 examples'):
        fitting.run(jax.random.key(0), 1)
