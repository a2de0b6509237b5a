"""Power lines: AdamW as a moving average, the best timescale of one, tokens against batch of SGD, planted laws from noisy sweeps, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ergodax.laws import (
    BatchTokens,
    PowerLaw,
    adamw_timescale,
    average_weights,
    fit_law,
    optimal_weight_decay,
    squared_log,
    sweep_optimum,
    weight_decay,
)


def test_adamw_is_a_moving_average_of_its_updates():
    """optax's AdamW, with a rate that changes: θ_T from θ_0 and the bare Adam updates u_t by `average_weights`."""
    rates, decay = jnp.linspace(0.02, 0.005, 60), 3.0
    gradients = jax.random.normal(jax.random.key(0), (60, 3))
    with jax.numpy_dtype_promotion("standard"):
        adamw, adam = optax.adamw(lambda t: rates[t], weight_decay=decay), optax.scale_by_adam()

        def step(carry, gradient):
            theta, state, bare = carry
            updates, state = adamw.update(gradient, state, theta)
            direction, bare = adam.update(gradient, bare)
            return (theta + updates, state, bare), direction

        start = jnp.array([1.0, -2.0, 0.5])
        (end, *_), directions = jax.lax.scan(step, (start, adamw.init(start), adam.init(start)), gradients)
    of_start, weights = average_weights(rates * decay)
    np.testing.assert_allclose(of_start * start - weights @ directions / decay, end, rtol=1e-12)
    np.testing.assert_allclose(of_start + weights.sum(), 1, rtol=1e-14)
    of_start, weights = average_weights(jnp.full(9, 0.1))
    np.testing.assert_allclose([of_start, *weights], [0.9**9, *(0.1 * 0.9 ** np.arange(8, -1, -1))], rtol=1e-13)


def test_timescale_and_weight_decay():
    batch, rate, tokens = 2.0**20, 0.016, 4e9
    tau = adamw_timescale(batch, rate, 0.1, tokens)
    np.testing.assert_allclose(tau, 1 / (0.016 * 0.1 * (4e9 / 2**20)), rtol=1e-14)  # 1 / (η λ steps)
    np.testing.assert_allclose(adamw_timescale(batch / 2, rate, 0.05, tokens), tau, rtol=1e-14)
    np.testing.assert_allclose(weight_decay(tau, batch, rate, tokens), 0.1, rtol=1e-14)
    expected = batch / (rate * tokens * 1.084 * (4e9 / 2e8) ** -0.527)
    np.testing.assert_allclose(optimal_weight_decay(2e8, tokens, batch, rate), expected, rtol=1e-12)
    np.testing.assert_allclose(optimal_weight_decay(2e8, tokens, np.array([1, 3]) * batch, rate), [expected, 3 * expected], rtol=1e-12)
    own = optimal_weight_decay(2e8, tokens, batch, rate, timescale=PowerLaw.of(0.5, -1.0))
    np.testing.assert_allclose(own, batch / (rate * tokens * 0.5 / 20), rtol=1e-12)


def test_sweep_optimum():
    """Exact for a parabola in the logarithm, whatever the spacing."""
    values = jnp.array([0.01, 0.03, 0.2, 0.5, 4.0])
    np.testing.assert_allclose(sweep_optimum(values, 3 + 0.7 * jnp.log(values / 0.37) ** 2), 0.37, rtol=1e-12)
    with pytest.raises(ValueError, match=r"end of the sweep, 0\.01: widen"):
        sweep_optimum(values, values)
    with pytest.raises(ValueError, match=r"one length of at least 3, got \(5,\) and \(2,\)"):
        sweep_optimum(values, values[:2])
    with pytest.raises(ValueError, match=r"`values` must lie in \(0, inf\)"):
        sweep_optimum(values - 0.01, values)


def average_error(share, steps, noise):
    """E(θ_T - mean)² of θ_t = (1-a) θ_{t-1} + a x_t, with variance `noise` of x_t and the squared start error 1."""
    kept = (1 - share) ** (2 * steps)
    return kept + share / (2 - share) * (1 - kept) * noise


@jax.jit
def best_timescales(batches):
    """Of the moving average at D = 1e8 tokens with variance 2e5 each."""
    tau = jnp.geomspace(0.02, 5.0, 400)
    losses = jax.vmap(lambda b: average_error(b / (tau * 1e8), 1e8 / b, 2e5 / b))(batches)
    return jax.vmap(sweep_optimum, (None, 0))(tau, losses)


def test_best_decay_of_a_moving_average_is_linear_in_the_batch():
    """With a = B/(τ D): exp(-2/τ) + s²/(2 τ D) is least where 2 exp(-2/τ) = s²/(2 D), τ = 2/log(4 D/s²) = 0.263, to first order in a."""
    batches = jnp.geomspace(1e2, 1e5, 7)  # a below 0.004
    tau = best_timescales(batches)
    np.testing.assert_allclose(tau[0], 2 / np.log(4e8 / 2e5), rtol=1e-3)
    line = PowerLaw.starts(batches, weight_decay(tau, batches, 1.0, 1e8))
    np.testing.assert_allclose(line.exponent, 1, atol=3e-4)


def sgd_tokens(batches):
    """Tokens until SGD with its best constant rate has loss 0.02, by exact second moments: 30 curvatures, gradient noise 3 λ/B, start x = 1."""
    curvature = np.geomspace(1, 0.01, 30)
    rates, tokens = np.geomspace(1e-3, 1.99, 400)[:, None], []
    for batch in batches:
        kept, settled = (1 - rates * curvature) ** 2, rates * 3 / batch / (2 - rates * curvature)

        def loss(steps, kept=kept, settled=settled):
            return np.sum(curvature / 2 * (settled + (1 - settled) * kept ** steps[:, None]), 1)

        low, high = np.zeros(len(rates)), np.full(len(rates), 1e6)
        reached = loss(high) < 0.02
        for _ in range(60):
            middle = (low + high) / 2
            low, high = np.where(loss(middle) > 0.02, middle, low), np.where(loss(middle) > 0.02, high, middle)
        tokens.append(batch * np.min(high[reached]))
    return np.array(tokens)


@jax.jit
def fit_tokens(batches, tokens):
    return fit_law(BatchTokens.starts(batches, tokens), batches, tokens, objective=squared_log())


def test_tokens_of_sgd_follow_the_law():
    batches = np.geomspace(10, 1e5, 9)
    tokens = sgd_tokens(batches)
    fit = fit_tokens(*(jnp.asarray(a) for a in (batches, tokens)))
    errors = np.log(np.asarray(fit.law(batches)) / tokens)
    assert 1 - np.sum(errors**2) / np.sum((np.log(tokens) - np.log(tokens).mean()) ** 2) > 0.9999
    np.testing.assert_allclose([fit.law.minimum, fit.law.critical], [2.55e4, 1.25e3], rtol=0.01)
    with pytest.warns(UserWarning, match="widths beyond"):
        fit(jnp.array([1e11]))


def test_trade_off():
    law = BatchTokens.of(3e9, 2e6)
    np.testing.assert_allclose(law(np.array([0.0, 2e6, 6e6])), [3e9, 6e9, 1.2e10], rtol=1e-13)
    np.testing.assert_allclose([law.minimum, law.critical], [3e9, 2e6], rtol=1e-13)
    batches = np.geomspace(1e4, 1e8, 5)
    steps, operations = law.trade_off(7e7, batches)
    np.testing.assert_allclose(steps * batches, law(batches), rtol=1e-13)
    np.testing.assert_allclose(operations, 6 * 7e7 * law(batches), rtol=1e-13)
    np.testing.assert_allclose((steps / (3e9 / 2e6) - 1) * (operations / (6 * 7e7 * 3e9) - 1), 1, rtol=1e-9)
    with pytest.raises(ValueError, match="`critical` must lie in"):
        BatchTokens.of(1.0, 0.0)


RATIOS = jnp.geomspace(2.0, 2000.0, 12)


@jax.jit
@jax.vmap
def timescale_sweeps(key):
    """The best of each of 12 sweeps of τ with 1 % errors, over three decades of tokens per parameter."""
    planted = PowerLaw.of(1.084, -0.527)
    observed = planted(RATIOS) * jnp.exp(0.01 * jax.random.normal(key, RATIOS.shape))
    fit = fit_law(PowerLaw.starts(RATIOS, observed), RATIOS, observed, objective=squared_log())
    return fit.law.exponent, fit.standard_errors().exponent


def test_planted_exponent_from_noisy_sweeps():
    """The standard error of a slope is 0.01 / √Σ (log x - mean)² = 0.0013."""
    exponents, reported = (np.asarray(a) for a in timescale_sweeps(jax.random.split(jax.random.key(2), 400)))
    error = 0.01 / np.sqrt(np.sum((np.log(RATIOS) - np.log(RATIOS).mean()) ** 2))
    assert 0.00130 < error < 0.00136
    assert abs(exponents.mean() + 0.527) < 4 * error / 20
    assert np.abs(exponents + 0.527).max() < 0.01
    assert abs(exponents.std() / error - 1) < 4 / np.sqrt(800)
    # the sandwich of 12 points: leverages make it some 10 % small on average
    assert 0.8 < np.sqrt(np.mean(reported**2)) / error < 1.05
