"""Bridges on a grid: exact between Gaussians, and what regression makes of particles beside it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ergodax.transport import Brownian, GaussianBridge, ParametricReference
from ergodax.transport.bridge_solvers import GaussianBridgeSolver, KernelRegressor, RegressionBridgeSolver


MEAN0, MEAN1 = jnp.array([-1.0, 0.5]), jnp.array([1.0, 1.5])
COV0, COV1 = jnp.array([[0.4, 0.1], [0.1, 0.3]]), jnp.array([[0.2, -0.1], [-0.1, 0.5]])
TIMES = jnp.array([0.0, 0.1, 0.25, 0.5, 0.75, 1.0])


def points_of(mean, cov):
    """Four points of this mean and covariance."""
    root = np.sqrt(2) * jnp.linalg.cholesky(cov).T
    return mean + jnp.concatenate([root, -root])


def moments(paths):
    return jnp.mean(paths, axis=1), jnp.einsum("sni,snj->sij", *2 * [paths - jnp.mean(paths, axis=1, keepdims=True)]) / paths.shape[1]


@eqx.filter_jit
def solve(solver, key, reference, times, x0, x1):
    return solver(key, reference, times, x0, x1)


def test_brownian_bridge_between_gaussians():
    """The Euler chain without drift is exact at its times, so the closed form of continuous time holds there."""
    bridge = solve(GaussianBridgeSolver(), jax.random.key(0), Brownian(0.7), TIMES, points_of(MEAN0, COV0), points_of(MEAN1, COV1))
    exact = GaussianBridge(MEAN0, COV0, MEAN1, COV1, Brownian(0.7))
    means, covs = jax.jit(jax.vmap(exact.marginal))(TIMES)
    np.testing.assert_allclose(moments(bridge.paths)[0], means, atol=1e-6)
    np.testing.assert_allclose(moments(bridge.paths)[1], covs, atol=1e-6)
    # Over a step, E[x_{i+1} | x_i] is on the way to E[x₁ | x_i].
    x = jnp.array([0.3, 0.2])
    toward = (exact.target(TIMES[2], x) - x) / (1 - TIMES[2])
    np.testing.assert_allclose(jax.tree.map(lambda leaf: leaf[2], bridge.forward)(x), toward, atol=1e-6)


SPIN = ParametricReference(lambda p, t, x: p @ x + jnp.array([0.2, t]), jnp.array([[-0.5, 2.0], [-1.5, -0.3]]), 0.3)


def chain(reference, times, mean, cov):
    """Moments of the Euler chain of an affine drift, and gains of E[x_i | x_{i+1}]."""
    means, covs, gains = [mean], [cov], []
    for t, dt in zip(times[:-1], np.diff(times)):
        a = jnp.eye(2) + dt * reference.parameters
        means.append(means[-1] + dt * reference(t, means[-1]))
        covs.append(a @ covs[-1] @ a.T + reference.epsilon * dt * jnp.eye(2))
        gains.append(covs[-2] @ a.T @ jnp.linalg.inv(covs[-1]))
    return jnp.stack(means), jnp.stack(covs), jnp.stack(gains)


def test_reference_that_fits_is_its_own_bridge():
    means, covs, gains = chain(SPIN, TIMES, MEAN0, COV0)
    bridge = solve(GaussianBridgeSolver(), jax.random.key(0), SPIN, TIMES, points_of(means[0], covs[0]), points_of(means[-1], covs[-1]))
    np.testing.assert_allclose(moments(bridge.paths)[0], means, atol=1e-6)
    np.testing.assert_allclose(moments(bridge.paths)[1], covs, atol=1e-6)
    np.testing.assert_allclose(bridge.forward.coefficients, 0, atol=1e-5)
    x = jnp.array([0.4, -1.0])
    for i in range(len(TIMES) - 1):
        back = jax.tree.map(lambda leaf, i=i: leaf[i], bridge.backward)(x) - SPIN(TIMES[i], x)
        expected = (means[i] + gains[i] @ (x - means[i + 1]) - x) / (TIMES[i + 1] - TIMES[i])
        np.testing.assert_allclose(back, expected, atol=1e-5)
    # whatever the reference, the bridge arrives
    bridge = solve(GaussianBridgeSolver(), jax.random.key(0), SPIN, TIMES, points_of(MEAN0, COV0), points_of(MEAN1, COV1))
    np.testing.assert_allclose(moments(bridge.paths)[0][-1], MEAN1, atol=1e-6)
    np.testing.assert_allclose(moments(bridge.paths)[1][-1], COV1, atol=1e-6)


def test_regression_finds_the_gaussian_bridge():
    """From the reference itself, on 2000 particles with affine drifts, with steps short enough that their noise is the reference's."""
    n, times = 2000, jnp.linspace(0.0, 1.0, 25)
    _, covs, _ = chain(SPIN, times, MEAN0, COV0)
    noise = jax.random.normal(jax.random.key(1), (2, n, 2))
    x0, x1 = MEAN0 + noise[0] @ jnp.linalg.cholesky(covs[0]).T, MEAN1 + noise[1] @ jnp.linalg.cholesky(covs[-1]).T
    exact = solve(GaussianBridgeSolver(), jax.random.key(0), SPIN, times, x0, x1)
    found = solve(RegressionBridgeSolver(KernelRegressor(0), 5, start=None), jax.random.key(0), SPIN, times, x0, x1)
    (means, covs), (exact_means, exact_covs) = moments(found.paths), moments(exact.paths)
    error = jnp.sqrt(jnp.diagonal(exact_covs, axis1=1, axis2=2) / n)
    assert jnp.max(jnp.abs(means - exact_means) / error) < 5
    # sd of a variance is √(2/n) of it
    assert jnp.max(jnp.abs(jnp.diagonal(covs / exact_covs, axis1=1, axis2=2) - 1)) < 5 * np.sqrt(2 / n)


def test_kernel_regression_is_a_gaussian_process():
    """With all points inducing, the mean given y of an affine function (flat prior) plus a process of covariance K/ridge plus unit noise."""
    x = jax.random.normal(jax.random.key(0), (40, 1))
    y, ridge = jnp.sin(3 * x) + 0.1 * jax.random.normal(jax.random.key(1), x.shape), 0.05
    fit = KernelRegressor(40, 0.5, ridge)(x, y)
    z = (x - jnp.mean(x)) / jnp.std(x)
    gram = jnp.exp(-((z - z.T) ** 2) / (2 * 0.5**2)) / ridge
    cov, line = gram + jnp.eye(40), jnp.concatenate([jnp.ones_like(z), z], axis=1)
    weighted = jnp.linalg.solve(cov, line)
    beta = jnp.linalg.solve(line.T @ weighted, weighted.T @ y)
    expected = line @ beta + gram @ jnp.linalg.solve(cov, y - line @ beta)
    np.testing.assert_allclose(jax.vmap(fit)(x), expected, atol=1e-4)
    assert jnp.std(y - expected) < 0.15
    affine = KernelRegressor(0)(x, y)
    np.testing.assert_allclose(jax.vmap(affine)(x), line @ jnp.linalg.lstsq(line, y)[0], atol=1e-10)
