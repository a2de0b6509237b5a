"""Training as a pure function: against a plain loop, in pieces, under vmap, and when it goes wrong."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ergodax.core import Fit, fit
from ergodax.testing import count_traces


X = jax.random.normal(jax.random.key(0), (60, 3))
Y = X @ jnp.array([1.0, -2.0, 0.5]) + 0.3
OPTIMISER = optax.adam(0.05)


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax itself does not run under strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Line(eqx.Module):
    """Trainable arrays, a static field, and an integer array that must stay as it is."""

    weight: jax.Array
    bias: jax.Array
    count: jax.Array
    name: str = eqx.field(static=True, default="line")

    def __call__(self, x):
        return x @ self.weight + self.bias


LINE = Line(jnp.zeros(3), jnp.zeros(()), jnp.array(7))


def loss(model, batch, key):
    x, y = batch
    error = model(x) - y
    return jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error))}


def noisy(model, batch, key):
    x, y = batch
    return jnp.mean((model(x) - y + 0.1 * jax.random.normal(key, y.shape)) ** 2), {}


def make(**options):
    return Fit(loss, LINE, OPTIMISER, (X, Y), **({"batch_size": 20} | options))


def test_equals_a_plain_loop():
    """Batches recorded by a loss that returns what it saw; then the same batches through optax by hand, with the average by its recursion."""

    def recording(model, batch, key):
        value, _ = loss(model, batch, key)
        return value, {"x": batch[0], "y": batch[1]}

    fitted = fit(recording, LINE, OPTIMISER, (X, Y), jax.random.key(1), num_steps=9, batch_size=20, ema_decay=0.5)
    model, average, state = LINE, LINE, OPTIMISER.init(eqx.filter(LINE, eqx.is_inexact_array))
    for n in range(9):
        batch = fitted.metrics["x"][n], fitted.metrics["y"][n]
        (value, _), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(model, batch, None)
        np.testing.assert_allclose(value, fitted.metrics["loss"][n], rtol=1e-10)
        np.testing.assert_allclose(optax.tree.norm(gradient), fitted.metrics["grad_norm"][n], rtol=1e-10)
        updates, state = OPTIMISER.update(gradient, state, model)
        model = eqx.apply_updates(model, updates)
        decay = min(0.5, (1 + n) / (10 + n))
        average = eqx.tree_at(lambda m: m.weight, average, decay * average.weight + (1 - decay) * model.weight)
    np.testing.assert_allclose(fitted.model.weight, model.weight, rtol=1e-10)
    np.testing.assert_allclose(fitted.average.weight, average.weight, rtol=1e-10)
    assert fitted.model.name == "line"
    assert fitted.model.count == 7


def test_an_epoch_sees_every_example_once():
    rows = jnp.arange(60)
    fitting = Fit(lambda m, b, k: (jnp.sum(m.bias), {"rows": b}), LINE, OPTIMISER, rows, batch_size=16)
    seen = fitting.run(jax.random.key(0), 9).metrics["rows"]
    for epoch in range(3):  # 3 whole batches an epoch, 12 examples dropped
        assert len(np.unique(seen[3 * epoch : 3 * epoch + 3])) == 48
    assert not np.array_equal(seen[0], seen[3])


def test_metrics_are_means_and_blocks_do_not_matter():
    fine = make(every=1).run(jax.random.key(2), 12)
    coarse = make(every=4).run(jax.random.key(2), 12)
    np.testing.assert_allclose(coarse.metrics["loss"], fine.metrics["loss"].reshape(3, 4).mean(1), rtol=1e-10)
    np.testing.assert_allclose(coarse.metrics["mae"], fine.metrics["mae"].reshape(3, 4).mean(1), rtol=1e-10)
    np.testing.assert_allclose(coarse.model.weight, fine.model.weight, rtol=1e-10)


def test_pieces_are_the_whole_to_the_bit():
    fitting = make(every=2, ema_decay=0.9)
    advance = jax.jit(lambda state: fitting.advance(state, 2))
    state = fitting.init(jax.random.key(3))
    for _ in range(4):
        state, _ = advance(state)
    resumed = jax.tree.map(lambda a: a, state)  # what a checkpoint holds
    for _ in range(2):
        state, _ = advance(state)
        resumed, _ = advance(resumed)
    whole = fitting.run(jax.random.key(3), 12)
    np.testing.assert_array_equal(state.model.weight, resumed.model.weight)
    np.testing.assert_allclose(state.average.weight, whole.average.weight, rtol=1e-10)
    assert int(state.step) == 12


def test_accumulation_is_the_large_batch():
    whole, parts = (make(accumulate=n).run(jax.random.key(4), 6) for n in (1, 5))
    np.testing.assert_allclose(parts.model.weight, whole.model.weight, rtol=1e-9)
    np.testing.assert_allclose(parts.metrics["loss"], whole.metrics["loss"], rtol=1e-9)


def test_batch_function_and_evaluate():
    """The function gets a fresh key and the step; `evaluate` sees the averaged model, always with the same key."""
    fitting = Fit(
        lambda m, b, k: (jnp.sum(m.weight**2) + jnp.sum(m.bias), {"step": b[0], "draw": b[1]}),
        LINE,
        OPTIMISER,
        lambda key, step: (step.astype(float), jax.random.normal(key)),
        ema_decay=0.9,
        evaluate=lambda model, key: {"bias": model.bias, "key": jax.random.normal(key)},
    )
    fitted = fitting.run(jax.random.key(5), 5)
    np.testing.assert_array_equal(fitted.metrics["step"], np.arange(5))
    assert len(np.unique(fitted.metrics["draw"])) == 5
    assert len(np.unique(fitted.metrics["key"])) == 1
    np.testing.assert_array_equal(fitted.metrics["bias"][-1], fitted.average.bias)
    assert fitted.average.bias != fitted.model.bias


def test_vmap_over_rate_and_seed_is_the_loop_in_one_trace():
    def train(rate, seed):
        return fit(noisy, LINE, optax.adam(rate), (X, Y), jax.random.key(seed), num_steps=8, batch_size=20, every=4).model.weight

    counted, traces = count_traces(train)
    rates, seeds = jnp.array([0.01, 0.1]), jnp.array([0, 5])
    run = jax.jit(jax.vmap(counted))
    together = run(rates, seeds)
    run(rates * 2, seeds + 1)
    assert traces() == 1
    alone = jnp.stack([jax.jit(train)(rate, seed) for rate, seed in zip(rates, seeds)])
    np.testing.assert_allclose(together, alone, rtol=1e-9)


def test_a_bad_step_stops_the_run_at_the_last_good_state():
    """The loss becomes NaN at step 5 only; nothing after it changes the model, and the step is named. A sweep's other lanes go on."""

    def train(bad_at):
        def breaking(model, batch, key):
            value, aux = loss(model, batch[:2], key)
            return jnp.where(batch[2] == bad_at, jnp.nan, value), aux

        def data(key, step):
            return X[:20], Y[:20], step

        fitted = Fit(breaking, LINE, OPTIMISER, data).run(jax.random.key(0), 8)
        return fitted.model.weight, fitted.failed_at, fitted.metrics["loss"]

    weights, failed, losses = jax.jit(jax.vmap(train))(jnp.array([5, 100], jnp.int32))
    np.testing.assert_array_equal(failed, [5, -1])
    five = Fit(loss, LINE, OPTIMISER, lambda key, step: (X[:20], Y[:20])).run(jax.random.key(0), 5)
    np.testing.assert_allclose(weights[0], five.model.weight, rtol=1e-10)
    assert bool(jnp.isfinite(losses[1]).all())
    assert not bool(jnp.isfinite(losses[0][5]))


def test_float32_stays_float32():
    narrow = jax.tree.map(lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, (LINE, X, Y))
    shapes = eqx.filter_eval_shape(
        lambda line, x, y: fit(loss, line, OPTIMISER, (x, y), jax.random.key(0), num_steps=2, batch_size=20, ema_decay=0.9), *narrow
    )
    assert shapes.model.weight.dtype == shapes.average.weight.dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 61}, "`batch_size` 61 exceeds the 60 examples"),
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1, got 0"),
        ({"accumulate": 3}, "`accumulate` must divide `batch_size`, got 3 and 20"),
        ({"ema_decay": 1.0}, r"`ema_decay` must lie in \[0, 1\), got 1.0"),
        ({"every": 0}, "`every`"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_refusals_of_data_and_steps():
    with pytest.raises(ValueError, match="must share one leading axis"):
        Fit(loss, LINE, OPTIMISER, (X, Y[:5]), batch_size=2)
    with pytest.raises(ValueError, match="`batch_size` goes with arrays"):
        Fit(loss, LINE, OPTIMISER, lambda key, step: (X, Y), batch_size=2)
    with pytest.raises(ValueError, match="`num_steps` must be a multiple of `every`, got 5 and 2"):
        make(every=2).advance(make(every=2).init(jax.random.key(0)), 5)
