"""Early stopping inside the compiled program: lanes train as they would alone, whatever the rule does to them; traces and compiles as promised."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from ergodax.core import Fit
from ergodax.core.population import AbstractRule, Decision, Trial, fit_trial
from ergodax.core.search import search
from ergodax.core.space import grid, traced
from ergodax.testing import count_traces
from ergodax.tuning.asynchronous_halving import AsynchronousHalving
from ergodax.tuning.successive_halving import SuccessiveHalving


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.1
    seed: int = traced(0)
    square: bool = False


def make(config):
    """Noisy descent of a quadratic (or a quartic); the state has a key, a vector and a counter."""

    def step(state):
        key, x, n = state
        slope = 4 * x**3 if config.square else 2 * x
        x = x - config.rate * (slope + 0.1 * jax.random.normal(jax.random.fold_in(key, n), x.shape))
        return key, x, n + 1

    def init():
        key = jax.random.key(config.seed)
        return key, 1.0 + jax.random.uniform(key, (3,)), jnp.zeros((), jnp.int32)

    def advance(state, num_steps):
        def body(state, _):
            state = step(state)
            return state, jnp.sum(state[1] ** 2)

        state, losses = jax.lax.scan(body, state, None, length=num_steps)
        return state, {"loss": losses}

    return Trial(init, advance)


RUNS = grid(rate=[0.02, 0.3, 0.1, 1.5, 0.05], seed=[0, 1])  # 1.5 diverges
ONE_DEVICE = Mesh(np.array(jax.devices()[:1]), ("sweep",))


def curve(override, num_pieces, piece_steps=2):
    trial = make(Config(**override))
    _, metrics = trial.advance(trial.init(), num_pieces * piece_steps)
    return np.asarray(metrics["loss"])[piece_steps - 1 :: piece_steps]


RULES = {
    "halving": SuccessiveHalving(6, eta=2),
    "asynchronous": AsynchronousHalving(3, 6, eta=2),
    "asynchronous, all lanes": AsynchronousHalving(16, 6, eta=3),
}


@pytest.mark.parametrize(
    ("rule", "batch_size", "mesh", "compiled"),
    [
        ("halving", None, None, (10, 5, 2)),  # the last run has a device, and a batch, for itself already
        ("halving", 1, None, (10,)),
        ("halving", 2, None, (10, 2)),
        ("halving", 3, ONE_DEVICE, (10, 2, 1)),
        ("asynchronous", None, None, (3,)),
        ("asynchronous", 1, ONE_DEVICE, (3,)),
        ("asynchronous, all lanes", 2, None, (10,)),
    ],
)
def test_every_run_is_what_it_would_be_alone(rule, batch_size, mesh, compiled):
    """Also behind gathers, refills and shrinking, and next to idle lanes."""
    counted, traces = count_traces(make)
    found = search(counted, Config(), RUNS, RULES[rule], metric="loss", piece_steps=2, batch_size=batch_size, mesh=mesh)
    assert found.brackets[0].compiled == compiled
    assert traces() == 1 + found.num_compiles == 1 + len(compiled)  # one without compiling, for the shapes
    table = found.table()
    for place, override in enumerate(RUNS):
        rows = found.history["run"] == place
        np.testing.assert_array_equal(found.history["age"][rows], np.arange(table["pieces"][place]) + 1)
        np.testing.assert_allclose(found.history["score"][rows], curve(override, table["pieces"][place]), rtol=1e-12)
        assert (found.history["rate"][rows] == override["rate"]).all()
    assert found.steps_used == table["steps"].sum() == 2 * len(found.history["run"])
    assert table["finished"].any()
    assert not table["finished"].all()
    best = RUNS[found.best()]
    assert found.best_values() == best
    trial = make(Config(**best))
    (_, x, n), _ = trial.advance(trial.init(), 12)
    np.testing.assert_allclose(found.state[1], x, rtol=1e-12)
    assert int(found.state[2]) == n == 12
    last = {place: table["score"][place] for place in range(10) if table["finished"][place]}
    assert found.best() == min(last, key=last.get)


class Cyclic(AbstractRule):
    """Every lane continues what its right-hand neighbour had: all states move, over device borders, and the hyper-parameters stay."""

    num_pieces: int = 4

    def sizes(self, num_runs):
        return (num_runs,)

    def init(self, num_runs):
        return jnp.zeros((), jnp.int32)

    def __call__(self, key, lanes, memory):
        lane = jnp.arange(lanes.run.size, dtype=lanes.run.dtype)
        run = jnp.where(lanes.age == self.num_pieces, -1, lanes.run)
        return Decision((lane + 1) % lanes.run.size, jnp.zeros(lanes.run.size, bool), run, lanes.values, memory + 1)


@pytest.mark.parametrize("batch_size", [None, 1])
def test_a_copied_lane_goes_on_from_its_parent(batch_size):
    """By hand: the state walks left while each lane keeps its own rate."""
    runs = grid(rate=[0.02, 0.3, 0.1, 0.05, 0.2], seed=[0])
    found = search(make, Config(), runs, Cyclic(), metric="loss", piece_steps=1, batch_size=batch_size)
    scores = found.history["score"].reshape(4, 5)
    for first in range(5):
        state = make(Config()).init()
        for piece in range(4):
            lane = (first - piece) % 5
            state, metrics = make(Config(**runs[lane])).advance(state, 1)
            np.testing.assert_allclose(scores[piece, lane], metrics["loss"][-1], rtol=1e-12)
    parents = found.history["parent"].reshape(4, 5)
    np.testing.assert_array_equal(parents, [[-1] * 5] + 3 * [[1, 2, 3, 4, 0]])


def test_static_leaves_form_brackets_of_their_own():
    """Two programs; each bracket keeps half of its own runs, and the best is found over both."""
    runs = grid(rate=[0.02, 0.05, 0.1], square=[False, True])
    counted, traces = count_traces(make)
    seen = []
    options = {"metric": "loss", "piece_steps": 1, "batch_size": 1, "progress": lambda done, total: seen.append((done, total))}
    found = search(counted, Config(), runs, SuccessiveHalving(2, 2), **options)
    assert [bracket.static for bracket in found.brackets] == [{"square": False}, {"square": True}]
    assert found.num_compiles == 2
    assert traces() == 4
    table = found.table()
    assert [table["finished"][table["square"] == square].sum() for square in (False, True)] == [1, 1]
    finished = {place: table["score"][place] for place in range(6) if table["finished"][place]}
    assert found.best() == min(finished, key=finished.get)
    trial = make(Config(**runs[found.best()]))
    np.testing.assert_allclose(found.state[1], trial.advance(trial.init(), 2)[0][1], rtol=1e-12)
    assert seen[-1] == (6, 6)
    assert seen[0] == (2, 6)


def test_a_run_without_its_turn_has_no_score():
    class Impatient(AbstractRule):
        num_pieces: int = 2

        def sizes(self, num_runs):
            return (2,)

        def init(self, num_runs):
            return None

        def __call__(self, key, lanes, memory):
            run = jnp.where(lanes.age == 2, -1, lanes.run)
            lane = jnp.arange(2, dtype=run.dtype)
            return Decision(lane, jnp.zeros(2, bool), run, lanes.values, memory)

    table = search(make, Config(), grid(seed=range(3)), Impatient(), metric="loss", piece_steps=1, batch_size=1).table()
    assert table["pieces"].tolist() == [2, 2, 0]
    assert np.isnan(table["score"][2])


X = jax.random.normal(jax.random.key(0), (16, 3))
Y = X @ jnp.array([1.0, -2.0, 0.5])


def fit_of(config):
    def loss(model, batch, key):
        x, y = batch
        return jnp.mean((jax.vmap(model)(x)[:, 0] - y) ** 2), {}

    model = eqx.nn.Linear(3, 1, key=jax.random.key(config.seed))
    return Fit(loss, model, optax.sgd(config.rate), (X, Y), batch_size=4, every=2)


def test_training_runs_and_one_that_fails():
    """`fit_trial`: the numbers of `fit`, and NaN once a run has failed, though `Fit` goes on with its last good state."""
    with jax.numpy_dtype_promotion("standard"):
        runs = grid(rate=[0.01, 1e200, 0.1])
        rule = AsynchronousHalving(3, 3, eta=3, min_pieces=3)
        found = search(lambda config: fit_trial(fit_of(config), jax.random.key(config.seed)), Config(), runs, rule, metric="loss", piece_steps=4)
        table = found.table()
        assert np.isnan(table["score"][1])
        assert found.best() == 2
        fitting = fit_of(Config(**runs[2]))
        alone = fitting.run(jax.random.key(0), 12)
    np.testing.assert_allclose(found.history["score"][found.history["run"] == 2], alone.metrics["loss"][1::2], rtol=1e-12)
    np.testing.assert_allclose(fitting.result(found.state, {}).model.weight, alone.model.weight, rtol=1e-12)


def test_no_run_is_finite():
    found = search(make, Config(), [{"rate": np.nan}], SuccessiveHalving(2), metric="loss", piece_steps=1)
    assert found.state is None
    with pytest.raises(ValueError, match="no run has a finite score"):
        found.best()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"overrides": []}, "at least one run"),
        ({"overrides": [{"rat": 1.0}]}, "`rat` is not a field of Config"),
        ({"metric": "los"}, "no metric `los`; there are loss"),
        ({"piece_steps": 0}, "`piece_steps` must be an integer of at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1, got 0"),
        ({"mesh": Mesh(np.array(jax.devices()), ("data",))}, "needs an axis `sweep`, got axes \\('data',\\)"),
        ({"make": lambda config: Trial(lambda: jnp.zeros(2), lambda x, n: (x[:1], {"loss": x}))}, "must keep the structure, shapes and dtypes"),
    ],
)
def test_refusals_before_compiling(change, message):
    options = {"make": make, "base": Config(), "overrides": RUNS, "rule": SuccessiveHalving(2), "metric": "loss", "piece_steps": 1} | change
    with pytest.raises(ValueError, match=message):
        search(options.pop("make"), options.pop("base"), options.pop("overrides"), options.pop("rule"), **options)
