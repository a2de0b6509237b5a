"""Refinement: the schedule of constant norms, the released filter, the bound where it is attained, and norms recorded in a run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.ndimage import median_filter

from ergodax.core import Fit
from ergodax.schedules import (
    ConvexScheduleBound,
    averaging_bound,
    l1_norm,
    last_iterate_rates,
    median_filtered,
    record_gradient_norms,
    refined_rates,
    tabulated_schedule,
)


def test_constant_weights_are_linear_decay():
    t = np.arange(1, 41)
    np.testing.assert_allclose(last_iterate_rates(jnp.full(40, 0.3)), 0.3 * (1 - t / 40), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(refined_rates(jnp.full(40, 7.0)), (40 - t) / 39, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_formula(power):
    """η_t ∝ w_t Σ_{p>t} w_p by loops, in any unit, even one whose square overflows float32."""
    norms = np.exp(np.random.default_rng(0).normal(size=30))
    w = norms**-power
    expected = np.array([w[t] * w[t + 1 :].sum() / w.sum() for t in range(30)])
    np.testing.assert_allclose(last_iterate_rates(jnp.asarray(w)), expected, rtol=1e-12, atol=1e-15)
    rates = refined_rates(jnp.asarray(norms), power)
    np.testing.assert_allclose(rates, expected / expected.max(), rtol=1e-10, atol=1e-15)
    assert rates[-1] == 0
    assert (rates >= 0).all()
    large = refined_rates(jnp.asarray(1e30 * norms, jnp.float32), power)
    assert large.dtype == jnp.float32
    np.testing.assert_allclose(large, rates, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("length", "share"), [(30, 0.2), (101, 0.1), (101, 0.5), (30, 0.01)])
def test_filter_as_released(length, share):
    """The released code: mirrored by two windows past the end, nearest at the start, cut back."""
    norms = np.exp(np.random.default_rng(1).normal(size=length) + np.linspace(2, -1, length))
    window = 2 * (int(share * length) // 2) + 1
    expected = median_filter(np.pad(norms, (0, 2 * window), mode="reflect"), size=window, mode="nearest")[: -2 * window]
    np.testing.assert_array_equal(median_filtered(jnp.asarray(norms), share, batch_size=16), expected)


def test_best_weights():
    """w ∝ norm^-2 at its best scale, D/√(Σ norm^-2): nothing near it promises more, and it promises D/√(Σ norm^-2)."""
    rng = np.random.default_rng(2)
    norms, distance = rng.uniform(0.5, 3, 20), 1.3
    inverse = norms**-2
    weights = distance * inverse / np.sqrt(inverse.sum())
    best = averaging_bound(jnp.asarray(weights), jnp.asarray(norms), distance)
    np.testing.assert_allclose(best, distance / np.sqrt(inverse.sum()), rtol=1e-12)
    others = weights * np.exp(0.1 * rng.normal(size=(50, 20)))
    assert (jax.vmap(lambda w: averaging_bound(w, jnp.asarray(norms), distance))(jnp.asarray(others)) > best).all()


def test_bound_is_attained():
    """|x| from 1, w = 1/T: f(x_T) = (1 + 1/T)/2 is the bound itself."""
    total = 25
    weights = jnp.full(total, 1 / total)
    last = 1 - last_iterate_rates(weights)[:-1].sum()
    np.testing.assert_allclose(last, (1 + 1 / total) / 2, rtol=1e-12)
    np.testing.assert_allclose(averaging_bound(weights, 1.0), last, rtol=1e-12)


def test_bound_on_logistic_regression():
    """Gradient descent with the norms it meets, for three kinds of weights."""
    rng = np.random.default_rng(3)
    inputs, labels = rng.normal(size=(40, 3)), rng.choice([-1.0, 1.0], 40)
    total, t = 60, np.arange(1, 61)

    def loss(x):
        return jnp.mean(jax.nn.softplus(-labels * (inputs @ x)))

    optimum = jax.lax.fori_loop(0, 400, lambda _, x: x - 2 * jax.grad(loss)(x), jnp.zeros(3))

    @jax.jit
    @jax.vmap
    def gap_and_bound(weights):
        def step(x, rate):
            gradient = jax.grad(loss)(x)
            return x - rate * gradient, (loss(x), jnp.linalg.norm(gradient))

        _, (losses, norms) = jax.lax.scan(step, jnp.ones(3), last_iterate_rates(weights))
        return losses[-1] - loss(optimum), averaging_bound(weights, norms, jnp.linalg.norm(1 - optimum))

    gaps, bounds = gap_and_bound(jnp.stack([jnp.full(total, 0.5), rng.uniform(0.1, 1, total), 1 / np.sqrt(t)]))
    assert (gaps > 0).all()
    assert (gaps <= bounds).all()


def test_no_logarithm():
    """max_i h_i·x, h_i = (a_1 … a_{i-1}, -1, 0 …), made for a constant rate: its √T f(x_{T+1}) grows with log T, that of linear decay does not."""

    def scaled(total, rates):
        slopes, x = 1 / (8 * (total - np.arange(1, total + 2) + 1.5)), np.zeros(total + 1)

        def pieces():  # sums in order, so that ties are exact and go to the first
            return np.append(0, np.cumsum(slopes * x)[:-1]) - x

        for rate in np.asarray(rates) / np.sqrt(total):
            i = np.argmax(pieces())
            x[:i] -= rate * slopes[:i]
            x[i] += rate
        return np.sqrt(total) * pieces().max()

    sizes = (64, 256, 1024)
    np.testing.assert_allclose([scaled(n, np.ones(n)) for n in sizes], [0.474, 0.625, 0.776], atol=5e-4)
    np.testing.assert_allclose([scaled(n, last_iterate_rates(jnp.ones(n))) for n in sizes], [0.107, 0.114, 0.116], atol=5e-4)


def test_refinement_pays_under_the_bound():
    """Norms that start large and grow at the end: a warm-up, a faster decay, and a lower tuned bound than linear decay."""
    t = jnp.linspace(0, 1, 200)
    norms = 1 + 9 * jnp.exp(-20 * t) + 2 * jnp.exp(-20 * (1 - t))
    rates = refined_rates(norms)
    assert rates[0] < 0.05
    assert 0.1 < rates.argmax() / 200 < 0.3
    bound = ConvexScheduleBound(norms)
    assert bound.tuned(rates, 199).value < 0.9 * bound.tuned(1 - t, 199).value


def test_recorded_in_a_run():
    """Norms of `Fit`'s own gradients, first in the chain, read back from its state; under vmap over rates too."""
    inputs = jnp.asarray(np.random.default_rng(4).normal(size=(32, 3)))

    def loss(model, batch, key):
        return jnp.mean((batch @ model["a"] - 1) ** 2) + jnp.sum(jnp.abs(model["b"])), {}

    def run(rate):
        optimiser = optax.chain(record_gradient_norms(8), optax.clip_by_global_norm(0.1), optax.sgd(rate))
        training = Fit(loss, {"a": jnp.ones(3), "b": jnp.ones(2)}, optimiser, inputs, batch_size=32)
        state, _ = training.advance(training.init(jax.random.key(0)), 6)
        return optax.tree.get(state.optimiser, "norms")

    def by_hand(rate):
        model, found = {"a": jnp.ones(3), "b": jnp.ones(2)}, []
        for _ in range(6):
            gradient = jax.grad(lambda model: loss(model, inputs, None)[0])(model)
            norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient)))
            found.append(norm)
            model = jax.tree.map(lambda x, g, norm=norm: x - rate * g * 0.1 / norm, model, gradient)
        return found

    with jax.numpy_dtype_promotion("standard"):
        norms = jax.jit(jax.vmap(run))(jnp.array([0.1, 0.3]))
    np.testing.assert_allclose(norms[:, :6], [by_hand(0.1), by_hand(0.3)], rtol=1e-10)
    assert np.isnan(norms[:, 6:]).all()
    with pytest.raises(ValueError, match=r"`norms` must lie in .* got"):
        refined_rates(norms[0])


def test_recorder():
    """l1 norms, the dtype of the parameters, and no more than was asked for; gradients pass."""
    recorder = record_gradient_norms(2, l1_norm)
    gradient = {"a": jnp.array([1.0, -2.0], jnp.float32), "b": None, "c": jnp.array(-4.0, jnp.float32)}
    state = recorder.init(gradient)
    for scale in (1, 2, 3):
        passed, state = recorder.update(jax.tree.map(lambda g, scale=scale: scale * g, gradient), state)
    assert passed["a"][1] == -6
    np.testing.assert_array_equal(state.norms, np.array([7, 14], np.float32))
    assert state.norms.dtype == jnp.float32
    assert state.count == 3
    narrow = recorder.init({"a": jnp.ones(2, jnp.bfloat16)})
    assert narrow.norms.dtype == jnp.float32
    assert np.isnan(narrow.norms).all()


def test_table_as_a_schedule():
    """As it is, between its entries, stretched: linear decay stays linear decay at every horizon."""
    rates = refined_rates(jnp.ones(11))
    np.testing.assert_allclose(tabulated_schedule(rates, 0.2)(jnp.arange(13)), 0.2 * np.append(rates, [0, 0]), rtol=1e-12, atol=1e-16)
    stretched = jax.jit(jax.vmap(lambda total: tabulated_schedule(rates, 0.2, total)(jnp.arange(-1, 40))))(jnp.array([11.0, 31.0, 5.0]))
    k = np.arange(-1, 40)
    expected = [0.2 * np.clip((total - 1 - k) / (total - 1), 0, 1) for total in (11, 31, 5)]
    np.testing.assert_allclose(stretched, expected, rtol=1e-12, atol=1e-16)
    np.testing.assert_allclose(tabulated_schedule(jnp.array([0.0, 1.0, 4.0]))(1.5), 2.5, rtol=1e-12)
    bfloat = tabulated_schedule(jnp.array([1.0, 0.0], jnp.bfloat16), 0.5, 1_000_001)(750_000)
    assert bfloat.dtype == jnp.bfloat16
    assert bfloat == 0.125
    gradient = jax.grad(lambda args: tabulated_schedule(rates, args[0], args[1])(args[2]))(jnp.array([0.2, 30.0, 0.0]))
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: refined_rates(jnp.array([1.0, 0.0, 2.0])), "`norms` must lie in .* got"),
        (lambda: last_iterate_rates(jnp.ones(1)), r"at least two weights, got shape \(1,\)"),
        (lambda: last_iterate_rates(-jnp.ones(3)), "`weights` must lie in .* got"),
        (lambda: median_filtered(jnp.ones(9), 0.6), r"`window_share` must lie in \(0, 0.5\], got 0.6"),
        (lambda: median_filtered(jnp.ones(1)), r"at least two norms, got shape \(1,\)"),
        (lambda: record_gradient_norms(1), "`num_steps` must be an integer of at least 2, got 1"),
        (lambda: tabulated_schedule(jnp.ones(1)), r"at least two values, got shape \(1,\)"),
        (lambda: tabulated_schedule(jnp.ones(4), 1.0, 1), r"`total_steps` must lie in \(1, inf\), got 1"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
