"""LightSB: closed forms between Gaussians, potential and drift against quadrature, plan against Sinkhorn, the loss as a KL, training, user data."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import integrate
from ergodax.transport.gaussian_bridge import GaussianBridge
from ergodax.transport.light_sb import LightSB, LightSBLoss, fit_light_sb
from ergodax.transport.reference import Brownian
from ergodax.transport.samples import Minibatches, Samples


EPSILON = 0.6


def bridge_of(full, k=3, d=2, epsilon=EPSILON):
    log_weights = jax.random.normal(jax.random.key(0), (k,))
    centres = jax.random.normal(jax.random.key(1), (k, d))
    log_scales = 0.4 * jax.random.normal(jax.random.key(2), (k, d, d) if full else (k, d)) - 0.3
    return LightSB(log_weights, centres, log_scales, epsilon)


def scales_of(bridge):
    """S_k, (K, d, d), in numpy."""
    raw = np.asarray(bridge.log_scales)
    if raw.ndim == 2:
        return np.stack([np.diag(np.exp(row)) for row in raw])
    lower = np.stack([np.tril(one, -1) + np.diag(np.exp(np.diag(one))) for one in raw])
    return lower @ lower.swapaxes(1, 2)


def log_normal(x, mean, covariance):
    offset = x - mean
    quadratic = np.einsum("...i,ij,...j->...", offset, np.linalg.inv(covariance), offset)
    return -0.5 * (quadratic + np.linalg.slogdet(covariance)[1] + len(covariance) * np.log(2 * np.pi))


def log_v(bridge, x):
    terms = [
        np.exp(a + log_normal(x, r, EPSILON * s)) for a, r, s in zip(np.asarray(bridge.log_weights), np.asarray(bridge.centres), scales_of(bridge))
    ]
    return np.log(sum(terms))


AXIS = np.linspace(-14, 14, 281)
GRID = np.stack(np.meshgrid(AXIS, AXIS, indexing="ij"), -1)
CELL = (AXIS[1] - AXIS[0]) ** 2


@pytest.mark.parametrize("full", [False, True])
def test_potential_and_drift_are_the_integral_and_its_gradient(full):
    bridge = bridge_of(full)
    field = np.exp(log_v(bridge, GRID) + np.sum(GRID**2, -1) / (2 * EPSILON))
    x, step = np.array([0.4, -0.9]), 1e-4
    for t in (0.0, 0.3, 0.9):

        def log_phi(x, t=t):
            return np.log(CELL * np.sum(field * np.exp(log_normal(GRID, x, EPSILON * (1 - t) * np.eye(2)))))

        np.testing.assert_allclose(bridge.log_potential(t, jnp.asarray(x)), log_phi(x), rtol=1e-9)
        slope = [(log_phi(x + step * e) - log_phi(x - step * e)) / (2 * step) for e in np.eye(2)]
        np.testing.assert_allclose(bridge(t, jnp.asarray(x)), EPSILON * np.array(slope), atol=1e-6)
    np.testing.assert_allclose(bridge.log_potential(1.0, jnp.asarray(x)), log_v(bridge, x) + np.sum(x**2) / (2 * EPSILON), rtol=1e-12)
    np.testing.assert_allclose(bridge(1.0, jnp.asarray(x)), EPSILON * jax.grad(lambda x: bridge.log_potential(1.0, x))(jnp.asarray(x)), rtol=1e-9)


@pytest.mark.parametrize("full", [False, True])
def test_plan_is_the_tilted_potential(full):
    """π(x₁ | x₀) ∝ exp(x₀ · x₁/ε) v(x₁): density, mean and covariance on the grid, and moments of draws."""
    bridge, x0 = bridge_of(full), np.array([0.8, -0.5])
    density = np.exp(log_v(bridge, GRID) + GRID @ x0 / EPSILON)
    density /= CELL * density.sum()
    mean = CELL * np.einsum("ij,ijd->d", density, GRID)
    covariance = CELL * np.einsum("ij,ijd,ije->de", density, GRID - mean, GRID - mean)
    points = GRID[140:150:3, 135:145:3]
    np.testing.assert_allclose(bridge.log_prob(jnp.asarray(points), jnp.asarray(x0)), np.log(density[140:150:3, 135:145:3]), rtol=1e-8)
    np.testing.assert_allclose(bridge.mean(jnp.asarray(x0)), mean, rtol=1e-8)
    np.testing.assert_allclose(bridge.covariance(jnp.asarray(x0)), covariance, rtol=1e-8)
    draws = np.asarray(bridge.sample(jax.random.key(3), jnp.broadcast_to(x0, (20000, 2))))
    assert np.all(np.abs(draws.mean(0) - mean) < 4 * np.sqrt(np.diag(covariance) / 20000))
    spread = (draws - mean)[:, :, None] * (draws - mean)[:, None]
    assert np.all(np.abs(spread.mean(0) - covariance) < 4 * spread.std(0) / np.sqrt(20000))


def test_gaussian_bridge_is_one_component_and_the_minimum_of_the_loss():
    """On points with exactly the bridge's moments the loss of one component is that of the Gaussians, so its gradient at the truth is 0."""
    d = 20
    a, b = jax.random.normal(jax.random.key(3), (2, d, d)) / np.sqrt(d)
    mean0, mean1 = jax.random.normal(jax.random.key(4), (2, d))
    truth = GaussianBridge(mean0, a @ a.T + 0.2 * jnp.eye(d), mean1, b @ b.T + 0.1 * jnp.eye(d), Brownian(EPSILON))
    lower = jnp.linalg.cholesky(truth.conditional(mean0)[1] / EPSILON)
    raw = jnp.tril(lower, -1) + jnp.diag(jnp.log(jnp.diag(lower)))
    bridge = LightSB(jnp.zeros(1), (mean1 - lower @ lower.T @ mean0)[None], raw[None], EPSILON)
    x = mean0 + 1
    both = jax.jit(lambda t: (bridge(t, x), truth(t, x)))
    for t in (0.0, 0.5, 0.9):
        np.testing.assert_allclose(*both(t), atol=1e-8)

    def points(key, mean, covariance):
        z = jax.random.normal(key, (4 * d, d))
        z = z - z.mean(0)
        z = jnp.linalg.solve(jnp.linalg.cholesky(z.T @ z / len(z)), z.T).T
        return mean + z @ jnp.linalg.cholesky(covariance).T

    batch = points(jax.random.key(5), mean0, truth.cov0), points(jax.random.key(6), mean1, truth.cov1)
    gradient = jax.jit(jax.grad(lambda m: LightSBLoss()(m, batch, jax.random.key(0))[0]))(bridge)
    assert max(float(jnp.abs(part).max()) for part in (gradient.log_weights, gradient.centres, gradient.log_scales)) < 1e-8


def test_plan_is_that_of_sinkhorn_between_its_marginals():
    bridge = bridge_of(False, d=1)
    x, y = np.linspace(-6, 6, 241), np.linspace(-8, 8, 321)
    source = np.exp(-0.5 * x**2) / np.exp(-0.5 * x**2).sum()
    plan = np.exp(np.asarray(bridge.log_prob(jnp.asarray(y)[None, :, None], jnp.asarray(x)[:, None, None])))
    plan = source[:, None] * plan / plan.sum(1, keepdims=True)
    target = plan.sum(0)
    kernel = np.exp(-0.5 * (x[:, None] - y) ** 2 / EPSILON)
    v = np.ones_like(y)
    for _ in range(2000):
        u = source / (kernel @ v)
        v = target / (u @ kernel)
    np.testing.assert_allclose(u[:, None] * kernel * v, plan, atol=1e-9)


def test_simulated_ends_follow_the_plan():
    """400 Euler steps from one x₀, 2000 paths: four standard errors and an O(h) bias of 0.01 standard deviations."""
    bridge, x0 = bridge_of(True), jnp.array([0.8, -0.5])
    times = jnp.linspace(0.0, 1.0, 401)
    run = jax.jit(jax.vmap(lambda key: integrate(bridge.terms(key, x0), dfx.Euler(), x0, times=times)))
    ends, covariance = run(jax.random.split(jax.random.key(1), 2000)), bridge.covariance(x0)
    scale = np.sqrt(np.diag(covariance))
    assert np.all(np.abs(ends.mean(0) - bridge.mean(x0)) < (4 / np.sqrt(2000) + 1e-2) * scale)
    spread = (ends - bridge.mean(x0))[:, :, None] * (ends - bridge.mean(x0))[:, None]
    assert np.all(np.abs(spread.mean(0) - covariance) < 4 * spread.std(0) / np.sqrt(2000) + 2e-2 * np.outer(scale, scale))


def test_excess_of_the_loss_is_the_kl():
    truth, other = bridge_of(False), bridge_of(True)
    keys = jax.random.split(jax.random.key(7), 4)
    x0, z0, w0 = jax.random.normal(keys[0], (3, 20000, 2))
    x1, z1 = truth.sample(keys[1], x0), truth.sample(keys[2], z0)

    def excess(t, x):
        return np.asarray(other.log_potential(t, x) - truth.log_potential(t, x))

    start, end = excess(0.0, w0), excess(1.0, z1)
    loss = start.mean() - end.mean()
    ratio = np.asarray(truth.log_prob(x1, x0) - other.log_prob(x1, x0))
    error = np.sqrt((start.var() + end.var() + ratio.var()) / 20000)
    assert abs(loss - ratio.mean()) < 4 * error < 0.25 * ratio.mean()
    batch = (w0, z1)
    values = [LightSBLoss()(model, batch, keys[3])[0] for model in (other, truth)]
    np.testing.assert_allclose(values[0] - values[1], loss, rtol=1e-10)


@pytest.mark.parametrize("full", [False, True])
def test_placing_is_a_change_of_variables(full):
    bridge = bridge_of(full)
    shift0, shift1, scale = jnp.array([0.3, -2.0]), jnp.array([1.0, 0.4]), 1.7
    x0, x1 = jax.random.normal(jax.random.key(8), (2, 5, 2))
    moved = bridge.placed(shift0, shift1, scale)
    expected = bridge.log_prob(x1, x0) - 2 * np.log(scale)
    np.testing.assert_allclose(moved.log_prob(shift1 + scale * x1, shift0 + scale * x0), expected, rtol=1e-10)
    # The drift of the moved bridge is that of the bridge in units of the scale, and the straight line between the shifts.
    t, x = 0.4, x0[0]
    np.testing.assert_allclose(moved(t, (1 - t) * shift0 + t * shift1 + scale * x), scale * bridge(t, x) + shift1 - shift0, rtol=1e-9)


def test_training_finds_the_plan():
    """Unequal sizes, weights that undo a thinning, float32, units far from 1."""
    truth = bridge_of(True)
    x0 = jax.random.normal(jax.random.key(9), (4000, 2))
    x1 = truth.sample(jax.random.key(10), jax.random.normal(jax.random.key(11), (6000, 2)))
    kept = jax.random.uniform(jax.random.key(12), (6000,)) < jnp.where(x1[:, 0] > 0, 0.5, 1.0)
    x1 = x1[np.asarray(kept)]
    target = Samples((20 + 10 * x1).astype(jnp.float32), jnp.where(x1[:, 0] > 0, 2.0, 1.0).astype(jnp.float32))
    train = eqx.filter_jit(fit_light_sb)
    with jax.numpy_dtype_promotion("standard"):
        found = train(jax.random.key(13), (10 * x0 - 5).astype(jnp.float32), target, 100 * EPSILON, 4, full=True, num_steps=1500)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    y0, true = x0[:2000], truth.placed(jnp.full(2, -5.0), jnp.full(2, 20.0), 10.0)
    y1 = true.sample(jax.random.key(14), 10 * y0 - 5)
    found = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), found)
    ratio = np.asarray(true.log_prob(y1, 10 * y0 - 5) - found.log_prob(y1, 10 * y0 - 5))
    # 4 (2 + 3 + 1) numbers from 4000 rows leave a KL of about p/2n = 0.003; of one component it is above 0.1.
    assert ratio.mean() < 0.02


def test_memory_in_many_dimensions():
    """The loss and its gradient in d = 1000 hold nothing of size batch x components x dimensions (25.6 MB)."""
    d, k, n = 1000, 50, 128
    model = LightSB(jnp.zeros(k), jnp.zeros((k, d)), jnp.zeros((k, d)), 1.0)
    model = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.float32), model)
    batch = (jax.ShapeDtypeStruct((n, d), jnp.float32),) * 2
    key = jax.random.key(0)
    program = jax.jit(jax.grad(lambda m, b: LightSBLoss()(m, b, key)[0])).lower(model, batch).compile()
    assert program.memory_analysis().temp_size_in_bytes < 12e6


def test_samples_follow_their_weights():
    samples = Samples(jnp.arange(4.0)[:, None], jnp.array([1.0, 0.0, 3.0, 4.0]))
    counts = np.bincount(np.asarray(samples.indices(jax.random.key(0), 8000)), minlength=4)
    expected = 8000 * np.array([1, 0, 3, 4]) / 8
    assert counts[1] == 0
    assert np.all(np.abs(counts - expected) <= 4 * np.sqrt(expected))
    mean, variance = samples.moments()
    np.testing.assert_allclose([mean[0], variance], [18 / 8, (12 + 36) / 8 - (18 / 8) ** 2])
    first, second = Minibatches((samples, Samples(jnp.ones((2, 3)))), 5)(jax.random.key(1), jnp.asarray(0))
    assert first.shape == (5, 1)
    assert second.shape == (5, 3)


def test_bad_input():
    points = jnp.zeros((5, 2))
    with pytest.raises(ValueError, match=r"2 of 5 rows are not, the first is row 1"):
        Samples(points.at[1, 0].set(jnp.nan).at[4].set(jnp.inf))
    with pytest.raises(ValueError, match="one for each row"):
        Samples(points, jnp.ones(3))
    with pytest.raises(ValueError, match="not all be 0"):
        Samples(points, jnp.zeros(5))
    with pytest.raises(ValueError, match="floating"):
        Samples(jnp.zeros((5, 2), int))
    with pytest.raises(ValueError, match="one d"):
        fit_light_sb(jax.random.key(0), points, jnp.zeros((4, 3)), 1.0)
    with pytest.raises(ValueError, match="epsilon"):
        LightSB(jnp.zeros(1), jnp.zeros((1, 2)), jnp.zeros((1, 2)), 0.0)
    with pytest.raises(ValueError, match="log_scales"):
        LightSB(jnp.zeros(1), jnp.zeros((1, 2)), jnp.zeros((2, 2)), 1.0)
