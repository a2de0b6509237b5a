"""Energy-guided OT: the chain's moments in closed form, the gradient of the dual, its gap as a KL, and the Gaussian plan by training both ways."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ergodax.core import fit, iterate
from ergodax.transport.eg_entropic_not import EnergyGuidedLoss, EnergyGuidedPlan, ReplayTraining
from ergodax.transport.gaussian_bridge import GaussianBridge
from ergodax.transport.reference import Brownian


class Quadratic(eqx.Module):
    """f(y) = b·y - ½ yᵀ A y, A symmetric."""

    matrix: jax.Array
    slope: jax.Array

    def __call__(self, y):
        return self.slope @ y - y @ (self.matrix + self.matrix.T) @ y / 4


EPSILON = 0.5
POTENTIAL = Quadratic(jnp.array([[0.8, 0.3], [0.3, 0.1]]), jnp.array([0.4, -0.2]))


def moments(x, y0, eta, num_steps):
    """Mean and covariance of the chain after its steps: y ← y - η/2 P (y - m) + √η ξ, with P = (I + A)/ε and m = (I + A)⁻¹ (x + b)."""
    curvature = np.eye(2) + np.asarray(POTENTIAL.matrix)
    centre = np.linalg.solve(curvature, x + np.asarray(POTENTIAL.slope))
    shrink = np.eye(2) - eta / 2 * curvature / EPSILON
    mean, covariance = y0, np.zeros((2, 2))
    for _ in range(num_steps):
        mean, covariance = centre + shrink @ (mean - centre), shrink @ covariance @ shrink + eta * np.eye(2)
    return mean, covariance


def test_chain_has_the_moments_of_langevin():
    x, y0 = jnp.array([0.7, -0.4]), jnp.array([2.0, 1.0])
    plan = EnergyGuidedPlan(POTENTIAL, EPSILON, 0.2, 8, start=lambda key, x: y0)
    draws = np.asarray(jax.jit(jax.vmap(plan.sample, (0, None)))(jax.random.split(jax.random.key(0), 40000), x))
    mean, covariance = moments(np.asarray(x), np.asarray(y0), 0.2, 8)
    assert np.all(np.abs(draws.mean(0) - mean) < 4 * np.sqrt(np.diag(covariance) / 40000))
    error = np.sqrt((covariance**2 + np.outer(np.diag(covariance), np.diag(covariance))) / 40000)
    assert np.all(np.abs(np.cov(draws.T) - covariance) < 4 * error)


def test_steps_are_exact_up_to_their_noise():
    """With one key the noise cancels, so two chains differ by powers of the shrinkage; one step from the centre is noise alone, of variance η."""
    x, y, u, v = jnp.array([0.7, -0.4]), jnp.array([2.0, 1.0]), jnp.array([0.3, -1.0]), jnp.array([1.2, 0.5])
    curvature = np.eye(2) + np.asarray(POTENTIAL.matrix)
    power = np.linalg.matrix_power(np.eye(2) - 0.1 * curvature / EPSILON, 8)
    plan, once = (EnergyGuidedPlan(POTENTIAL, EPSILON, 0.2, num_steps) for num_steps in (8, 1))
    advance = jax.jit(lambda key, x, y: plan.advance(key, x, y))
    start = advance(jax.random.key(0), x, y)
    np.testing.assert_allclose(advance(jax.random.key(0), x, y + u) - start, power @ u, atol=1e-12)
    np.testing.assert_allclose(advance(jax.random.key(0), x + v, y) - start, (np.eye(2) - power) @ np.linalg.solve(curvature, v), atol=1e-12)
    centre = jnp.asarray(np.linalg.solve(curvature, x + np.asarray(POTENTIAL.slope)))
    step = jax.jit(jax.vmap(lambda key: once.advance(key, x, centre)))
    noise = step(jax.random.split(jax.random.key(1), 400_000)) - centre
    assert abs(np.mean(noise**2) / 0.2 - 1) < 4 * np.sqrt(2 / noise.size)


def test_gradient_of_the_loss_is_that_of_the_dual():
    """∂F for quadratic f, from the exact moments of the chains after their steps; z-scores over 400 batches."""
    loss = EnergyGuidedLoss(EPSILON, 0.2, 8, start=lambda key, x: jnp.zeros_like(x))
    x0, x1 = jax.random.normal(jax.random.key(1), (2, 16, 2))
    gradients = jax.jit(jax.vmap(lambda key: jax.grad(lambda m: loss(m, (x0, x1), key)[0])(POTENTIAL)))(jax.random.split(jax.random.key(2), 400))
    drawn = [moments(np.asarray(x), np.zeros(2), 0.2, 8) for x in x0]
    slope = np.mean([mean for mean, _ in drawn], 0) - np.mean(np.asarray(x1), 0)
    second = np.mean([covariance + np.outer(mean, mean) for mean, covariance in drawn], 0) - np.asarray(x1).T @ np.asarray(x1) / 16
    for found, expected in ((gradients.slope, slope), (gradients.matrix, -second / 2)):
        assert np.all(np.abs(found.mean(0) - expected) < 4 * found.std(0) / np.sqrt(400))


def test_dual_gap_is_the_kl_of_the_plans():
    """ε KL(π* ‖ π_f) = F(f*) - F(f) on a grid, for a cost that is not quadratic: p₁ is the second marginal of f*'s plan."""
    grid = jnp.linspace(-8.0, 8.0, 401)[:, None]
    cell, source = 0.04, np.exp(-0.5 * np.asarray(grid[:, 0]) ** 2)
    source = source / source.sum()

    def plan_of(potential):
        plan = EnergyGuidedPlan(potential, EPSILON, cost=lambda x, y: jnp.sum(jnp.sqrt(1 + (x - y) ** 2)))
        log = np.asarray(jax.vmap(lambda x: jax.vmap(lambda y: plan.log_density(x, y))(grid))(grid))
        log_z = np.log(cell * np.exp(log).sum(1))
        return log - log_z[:, None], log_z, np.asarray(jax.vmap(potential)(grid))

    best, log_z_best, f_best = plan_of(lambda y: jnp.sum(jnp.sin(2 * y) - 0.3 * y**2))
    other, log_z, f = plan_of(lambda y: jnp.sum(0.5 * y - 0.2 * y**2))
    target = cell * source @ np.exp(best)
    gap = EPSILON * source @ (log_z - log_z_best) + target @ (f_best - f)
    kl = cell * source @ np.sum(np.exp(best) * (best - other), 1)
    np.testing.assert_allclose(gap, EPSILON * kl, rtol=1e-10)
    assert gap > 0.05


TRUTH = GaussianBridge(jnp.zeros(2), jnp.eye(2), jnp.array([0.5, -0.3]), jnp.array([[1.2, 0.4], [0.4, 0.7]]), Brownian(EPSILON))
LOSS = EnergyGuidedLoss(EPSILON, 0.02, 100, start=lambda key, x: x)
# The chain keeps e^-2 of its start's distance and widens by η P/4: both stay below 3 % of the plan's variance.


def data(key, step):
    x, z = jax.random.normal(key, (2, 256, 2))
    return x, TRUTH.mean1 + z @ jnp.linalg.cholesky(TRUTH.cov1).T


def check_plan(model):
    """Within 5 %, the card's bound: precision (I + A)/ε and mean of the plan."""
    curvature = np.eye(2) + np.asarray(model.matrix + model.matrix.T) / 2
    x = jnp.array([1.0, -1.0])
    mean, covariance = TRUTH.conditional(x)
    np.testing.assert_allclose(EPSILON * np.linalg.inv(curvature), covariance, atol=0.05 * np.trace(covariance) / 2)
    np.testing.assert_allclose(np.linalg.solve(curvature, np.asarray(x + model.slope)), mean, atol=0.05 * np.sqrt(np.trace(covariance)))


def test_training_finds_the_gaussian_plan():
    with jax.numpy_dtype_promotion("standard"):
        optimiser = optax.adam(optax.cosine_decay_schedule(0.05, 300))
        start = Quadratic(jnp.zeros((2, 2)), jnp.zeros(2))
        fitted = jax.jit(lambda key: fit(LOSS, start, optimiser, data, key, num_steps=300, every=300).model)(jax.random.key(3))
    check_plan(fitted)


def test_replay_needs_short_runs_only():
    """Chains of 20 steps, which keep half of their start's distance, go on from the buffer for twenty visits in the mean."""

    def start(key, x):
        return x + 0.5 * jax.random.normal(key, x.shape)

    with jax.numpy_dtype_promotion("standard"):
        short = EnergyGuidedLoss(EPSILON, 0.02, 20, start=start)
        kernel = ReplayTraining(short, optax.adam(optax.cosine_decay_schedule(0.06, 600)), data, buffer_size=4096)
        state = kernel.init(Quadratic(jnp.zeros((2, 2)), jnp.zeros(2)), jax.random.key(4))
        run = eqx.filter_jit(lambda state: iterate(jax.random.key(5), kernel.step, state, 600, save=lambda state, aux: aux))
        state, aux = run(state)
    assert int(state.step) == 600
    assert aux["drawn"].shape == (600,)
    check_plan(state.model)


def test_bad_input():
    with pytest.raises(ValueError, match="epsilon"):
        EnergyGuidedPlan(POTENTIAL, 0.0)
    with pytest.raises(ValueError, match="num_steps"):
        EnergyGuidedPlan(POTENTIAL, 1.0, num_steps=0)
    with pytest.raises(ValueError, match="replay"):
        ReplayTraining(LOSS, optax.sgd(0.1), data, replay=1.5)
    with pytest.raises(ValueError, match="smaller than the batch, 256"):
        ReplayTraining(LOSS, optax.sgd(0.1), data, buffer_size=100).init(POTENTIAL, jax.random.key(0))
