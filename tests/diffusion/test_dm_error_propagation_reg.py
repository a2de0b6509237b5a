"""The regulariser of accumulated error on a chain of Gaussians, where every law, divergence and discrepancy has a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import DataPrediction, FlowMatchingPath, ScorePrediction, VPPath
from ergodax.diffusion import Ancestral, DenoisingLoss, NoisyDenoiserSolver
from ergodax.diffusion.dm_error_propagation_reg import ErrorPropagationLoss, GaussianKernel, squared_mmd
from ergodax.diffusion.solver import clocks, finish, unit_noise
from ergodax.testing import assert_mean, z_scores


# Data N(1, 1/2), 50 steps, β from 0.001 to 0.2: a grid on the VP path, whose levels cover those of the chain. Index 0 is the noise.
STEPS, MEAN, VARIANCE, WINDOW = 50, 1.0, 0.5, 5
SHARE = np.concatenate([np.cumprod(1 - np.linspace(1e-3, 0.2, STEPS))[::-1], [1.0]])  # α²
PATH = VPPath()
GRID = jnp.append(PATH.time(jnp.log(SHARE[:-1] / (1 - SHARE[:-1]))), 1.0)
BASE = DenoisingLoss(PATH, ScorePrediction())


def marginal(j):
    return np.sqrt(SHARE[j]) * MEAN, SHARE[j] * VARIANCE + 1 - SHARE[j]


class ExactReverse(NoisyDenoiserSolver):
    """The reverse step with the exact variance of x_j given x_{j-1}, that of the data included, so that the exact score makes no error at all."""

    def order(self, terms):
        return 1

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        model, noise = terms.terms
        step = clocks(model, t0, t1, y0)
        a0, a1, s0, s1 = (jnp.exp(2 * c) for c in (step.log_alpha0, step.log_alpha1, step.log_sigma0, step.log_sigma1))
        forward = a0 / a1
        added = s0 - forward * s1
        mean = jnp.sqrt(a1) * added / s0 * model.vf(t0, y0, args).denoised + jnp.sqrt(forward) * s1 / s0 * y0
        variance = 1 / (1 / (a1 * VARIANCE + s1) + forward / added)
        return finish(y0, mean + jnp.sqrt(variance) * unit_noise(noise, t0, t1))


def reverse(j, scale):
    """x_j = slope x_{j-1} + offset + N(0, variance), with `scale` times the exact score at x_{j-1}."""
    mean, spread = marginal(j - 1)
    a0, a1, s0, s1 = SHARE[j - 1], SHARE[j], 1 - SHARE[j - 1], 1 - SHARE[j]
    added = s0 - a0 / a1 * s1
    gain = np.sqrt(a1 / a0) * added / s0
    slope = gain * (1 - s0 * scale / spread) + np.sqrt(a0 / a1) * s1 / s0
    return slope, gain * s0 * scale * mean / spread, 1 / (1 / marginal(j)[1] + a0 / a1 / added)


def closed_form(j, scale, before=None, window=WINDOW):
    """MMD² after step j with kernel width 1; `before` is the scale of the steps before the last one, where it is another."""
    mean, spread = marginal(max(j - 1 - window, 0))
    for i in range(max(j - 1 - window, 0) + 1, j + 1):
        slope, offset, variance = reverse(i, scale if i == j or before is None else before)
        mean, spread = slope * mean + offset, slope**2 * spread + variance

    def overlap(shift, total):
        return np.exp(-(shift**2) / (2 * (1 + total))) / np.sqrt(1 + total)

    other, width = marginal(j)
    return overlap(0.0, 2 * spread) + overlap(0.0, 2 * width) - 2 * overlap(mean - other, spread + width)


def scaled_score(scale):
    def score(t, x, args):
        alpha, sigma = PATH.alpha(t), PATH.sigma(t)
        return -scale * (x - alpha * MEAN) / (alpha**2 * VARIANCE + sigma**2)

    return score


def sample(key, n):
    return MEAN + VARIANCE**0.5 * jax.random.normal(key, (n, 1))


def test_the_grid_is_the_chain():
    np.testing.assert_allclose(PATH.alpha(GRID) ** 2, SHARE, rtol=1e-10)


def test_estimator():
    """Against a loop over pairs; unbiased also when the rows of x and y belong together."""
    x, y = jax.random.normal(jax.random.key(0), (2, 5, 3, 2))
    kernel = GaussianKernel(1.7)
    k = lambda a, b: np.exp(-np.sum((a - b) ** 2) / (2 * 1.7**2))  # noqa: E731
    pairs = [k(x[i], x[j]) + k(y[i], y[j]) - 2 * k(x[i], y[j]) for i in range(5) for j in range(5) if i != j]
    np.testing.assert_allclose(squared_mmd(x, y, kernel), np.mean(pairs), rtol=1e-12)

    def one(key):
        first, second = jax.random.split(key)
        x = jax.random.normal(first, (4, 1))
        return squared_mmd(x, x + 0.5 * jax.random.normal(second, x.shape), GaussianKernel())

    overlap = lambda total: (1 + total) ** -0.5  # noqa: E731
    assert_mean(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 20000)), overlap(2.0) + overlap(2.5) - 2 * overlap(2.25))


def test_discrepancy_of_a_step():
    """Against the closed form, from far off to the exact score, whose mean is 0, and from a window that begins before the chain does."""
    loss = ErrorPropagationLoss(BASE, GRID, 1.0, window=WINDOW, solver=ExactReverse())
    # On the paper's clock t, which runs from the data.
    np.testing.assert_allclose([closed_form(STEPS + 1 - t, 0.9) for t in (30, 10, 1)], [6.713e-4, 2.097e-4, 2.00e-5], rtol=2e-3)

    def one(scale, step, key):
        key_data, key_chain = jax.random.split(key)
        return loss.discrepancy(scaled_score(scale), sample(key_data, 32), key_chain, step)

    run = jax.jit(jax.vmap(one, in_axes=(None, None, 0)))
    keys = jax.random.split(jax.random.key(0), 400)
    for scale, t in ((0.3, 48), (0.0, 30), (3.0, 1), (0.9, 30), (1.0, 10)):
        step = STEPS + 1 - t
        found = run(scale, step, keys)
        assert_mean(found, closed_form(step, scale))
        if scale == 0:  # a window of another length would be seen
            assert abs(z_scores(found, closed_form(step, scale, window=WINDOW - 1))) > 5


def test_the_whole_loss_and_its_gradient():
    """A random step, its weight and the gradient through the last step only; the sum over steps is least at the exact score.

    The closed form sums to 0.0256532 at 0.9, with slope -0.526 through the whole chain; through the last step it is less, of the same sign.
    """
    steps = range(1, STEPS + 1)
    np.testing.assert_allclose(sum(closed_form(j, 0.9) for j in steps), 0.0256532, rtol=1e-5)
    np.testing.assert_allclose(sum(closed_form(j, 0.9 + 1e-6) - closed_form(j, 0.9 - 1e-6) for j in steps) / 2e-6, -0.52603, rtol=1e-4)
    assert abs(sum(closed_form(j, 1.0) for j in steps)) < 1e-12

    def one(scale, rho, key):
        key_data, key_loss = jax.random.split(key)
        loss = ErrorPropagationLoss(BASE, GRID, 2.0, rho=rho, window=WINDOW, solver=ExactReverse())
        total, parts = loss(scaled_score(scale), sample(key_data, 16), key_loss)
        return parts["propagation"], (total, parts["denoising"])

    run = jax.jit(jax.vmap(jax.value_and_grad(one, has_aux=True), in_axes=(None, None, 0)))
    keys, scale, rho = jax.random.split(jax.random.key(1), 600), 0.3, 0.03
    (values, (total, denoising)), gradients = run(scale, rho, keys)
    np.testing.assert_allclose(total, denoising + 2 * values, rtol=1e-12)
    weights = np.exp(rho * np.arange(STEPS))
    slopes = [(closed_form(j, scale + 1e-6, scale) - closed_form(j, scale - 1e-6, scale)) / 2e-6 for j in steps]
    assert weights @ slopes < 0
    assert_mean(values, weights @ [closed_form(j, scale) for j in steps] / STEPS)
    assert_mean(gradients, weights @ slopes / STEPS)
    # The weights themselves, to rounding: every step is drawn, and its weight is exp(ρ (j - 1)).
    drawn = np.log(values / run(scale, 0.0, keys)[0][0]) / rho
    np.testing.assert_allclose(drawn, np.round(drawn), atol=1e-9)
    np.testing.assert_array_equal(np.unique(np.round(drawn)), np.arange(STEPS))


def test_cumulative_and_modular_errors():
    """E_j = E_{j-1} + E_mod,j - E KL(p(x_{j-1} | x_j) ‖ q(x_{j-1} | x_j)): errors grow towards the data, but never by propagation (μ < 1)."""

    def divergence(mean, variance, other_mean, other_variance):
        return (variance / other_variance + (mean - other_mean) ** 2 / other_variance - 1 - np.log(variance / other_variance)) / 2

    mean, spread, cumulative, ratios = *marginal(0), [0.0], []
    for j in range(1, STEPS + 1):
        slope, offset, noise = reverse(j, 0.9)
        exact_slope, exact_offset, _ = reverse(j, 1.0)
        shift_mean, shift_slope = (slope - exact_slope) * mean + offset - exact_offset, slope - exact_slope
        modular = (shift_mean**2 + shift_slope**2 * spread) / (2 * noise)
        after = slope * mean + offset, slope**2 * spread + noise
        # Backwards: p(x_{j-1} | x_j) by conditioning, q(x_{j-1} | x_j) the forward process.
        gain, variance = slope * spread / after[1], spread * noise / after[1]
        forward = np.sqrt(SHARE[j - 1] / SHARE[j])
        added = 1 - SHARE[j - 1] - forward**2 * (1 - SHARE[j])
        gap_mean = mean - gain * after[0] + (gain - forward) * after[0]
        back = (variance / added - 1 - np.log(variance / added) + (gap_mean**2 + (gain - forward) ** 2 * after[1]) / added) / 2
        mean, spread = after
        cumulative.append(divergence(mean, spread, *marginal(j)))
        np.testing.assert_allclose(cumulative[-1], cumulative[-2] + modular - back, atol=1e-10)
        if j > 1:
            ratios.append((cumulative[-1] - modular) / cumulative[-2])
    assert (np.diff(cumulative) > 0).all()
    np.testing.assert_allclose(cumulative[-1], 0.0133777, rtol=1e-5)
    assert 0.08 < min(ratios) <= max(ratios) < 1


@pytest.mark.parametrize("window", [1, 9])
def test_where_the_chain_starts(window):
    """The means alone, for every step: data at 10, steps of DDIM, a network that returns its condition, and half the squared distance as kernel."""
    path, grid, data, condition = FlowMatchingPath(), jnp.array([0.1, 0.3, 0.5, 0.7, 0.9]), 10.0, 2.0
    loss = ErrorPropagationLoss(DenoisingLoss(path, DataPrediction()), grid, 1.0, window=window, solver=Ancestral(0.0), kernel=lambda d: -d / 2)
    batch = jnp.full((8, 1), data), jnp.full(8, condition)
    run = jax.jit(jax.vmap(lambda j, key: loss.discrepancy(lambda t, x, c: c * jnp.ones_like(x), batch, key, j), in_axes=(None, 0)))
    for j in range(1, 5):
        start = max(j - 1 - window, 0)
        kept = path.sigma(grid[j]) / path.sigma(grid[start])
        mean = kept * grid[start] * data + (grid[j] - kept * grid[start]) * condition
        assert_mean(run(j, jax.random.split(jax.random.key(j), 200)), (mean - grid[j] * data) ** 2)


def test_refusals():
    with pytest.raises(ValueError, match=r"share a shape \(n, \*x\) with n >= 2, got \(1, 2\)"):
        squared_mmd(jnp.zeros((1, 2)), jnp.zeros((1, 2)), GaussianKernel())
    with pytest.raises(ValueError, match="`window` must be an integer of at least 0"):
        ErrorPropagationLoss(BASE, GRID, 1.0, window=-1)
    with pytest.raises(ValueError, match="`bandwidth`"):
        GaussianKernel(0.0)
