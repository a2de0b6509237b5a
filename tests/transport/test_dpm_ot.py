"""Semi-discrete optimal transport against closed forms and a linear programme, and its use in the place of a diffusion's early steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse

from ergodax.core import DenoiserTerm, EDMPath
from ergodax.data import eight_gaussians
from ergodax.diffusion import DDIM
from ergodax.transport.dpm_ot import BlendedMap, SemiDiscreteMap, fit_semi_discrete, transported_sample
from ergodax.transport.samples import Samples


def test_intervals_of_a_uniform_source():
    """On [0, 1] cells are intervals of length ν in the order of y, so h_{i+1} - h_i = -(ν_1 + … + ν_i) (y_{i+1} - y_i)."""
    y, weights = jnp.array([2.0, -1.0, 2.2, 0.3, 0.5])[:, None], jnp.array([2.0, 1.0, 3.0, 2.5, 1.5])
    found = jax.jit(
        lambda key: fit_semi_discrete(
            key, Samples(y, weights), jax.random.uniform, num_samples=4000, batch_size=4000, learning_rate=0.05, max_steps=300, tolerance=0.0
        )
    )(jax.random.key(0))
    order = np.argsort(y[:, 0])
    expected = -np.cumsum(weights[order] / 10)[:-1] * np.diff(y[order, 0])
    np.testing.assert_allclose(np.diff(found.transport.heights[order]), expected, atol=1e-2)
    np.testing.assert_allclose(found.transport.heights.mean(), 0, atol=1e-12)
    assert found.num_steps == 300
    np.testing.assert_allclose(found.masses, weights / 10, atol=0.03)
    # the map itself is increasing, and sends the middle of each interval to its point
    middles = np.cumsum(weights[order] / 10) - weights[order] / 20
    np.testing.assert_array_equal(jax.vmap(found.transport)(jnp.asarray(middles)[:, None]), y[order])


def linear_programme(cost):
    """The cheapest plan between equal masses on both sides of a cost matrix."""
    rows, columns = cost.shape
    sums = scipy.sparse.vstack(
        [scipy.sparse.kron(scipy.sparse.eye(rows), np.ones(columns)), scipy.sparse.kron(np.ones(rows), scipy.sparse.eye(columns))]
    )
    masses = np.concatenate([np.full(rows, 1 / rows), np.full(columns, 1 / columns)])
    return scipy.optimize.linprog(cost.ravel(), A_eq=sums, b_eq=masses, method="highs").fun


def test_dual_value_and_masses_of_a_normal_source():
    """With ψ = 2h + |y|², E min(|x - y|² - ψ) + Σ ν ψ of 1000 points is a feasible dual of their linear programme, and all but its value."""
    y = 1.3 * jax.random.normal(jax.random.key(3), (20, 2))
    fit = jax.jit(lambda key: fit_semi_discrete(key, y, num_samples=5000, batch_size=5000, learning_rate=0.03, max_steps=300, tolerance=1e-4))
    heights = fit(jax.random.key(0)).transport.heights
    x = np.asarray(jax.random.normal(jax.random.key(9), (40_000, 2)))
    cost, psi = np.sum((x[:1000, None] - y) ** 2, -1), 2 * heights + np.sum(y**2, 1)
    dual, primal = np.mean(np.min(cost - psi, 1)) + np.mean(psi), linear_programme(cost)
    assert 0.99 * primal < dual <= primal * (1 + 1e-9)
    masses = np.bincount(np.argmax(x @ y.T + heights, 1), minlength=20) / 40_000
    # 4 binomial standard deviations of the count, and as many of those that the last steps saw
    assert np.abs(masses - 0.05).max() < 4 * np.sqrt(0.05 * 0.95 * (1 / 40_000 + 1 / 20_000))


def test_stopping_and_doubling():
    """Stops at the tolerance with no cell empty; gives up to three doublings where it cannot be met; leaves a point of weight 0 alone."""
    y = jnp.array([[-1.0], [0.5], [3.0]])
    fit = jax.jit(
        lambda weights, tolerance: fit_semi_discrete(
            jax.random.key(0), Samples(y, weights), num_samples=400, max_steps=400, tolerance=tolerance, patience=20
        )
    )
    met = fit(jnp.array([0.5, 0.5, 0.0]), 0.03)
    assert met.num_steps < 400
    assert np.sqrt(np.sum((met.masses - jnp.array([0.5, 0.5, 0.0])) ** 2)) < 0.03
    unmet = fit(jnp.array([0.5, 0.3, 0.2]), 0.0)
    assert unmet.num_steps == 400
    assert unmet.num_doublings == 3


def test_maps():
    """The argmax by hand; a blend takes the neighbours whose normals make less than the angle with that of the best."""
    y = jnp.array([[1.0, 0.0], [1.2, 0.1], [0.0, 2.0], [-2.0, 0.0]])
    transport = SemiDiscreteMap(y, jnp.array([0.1, 0.0, 0.0, 0.3]))
    x = jnp.array([1.0, 0.2])
    np.testing.assert_allclose(transport.planes(x), [1.1, 1.22, 0.4, -1.7], rtol=1e-12)
    assert transport.cell(x) == 1
    np.testing.assert_array_equal(transport(x), y[1])
    normals = np.concatenate([y, -np.ones((4, 1))], 1)
    first, second = (np.arccos(normals[i] @ normals[1] / np.linalg.norm(normals[i]) / np.linalg.norm(normals[1])) for i in (0, 2))
    blended = jax.jit(lambda angle: BlendedMap(transport, 3, angle)(x))
    for angle, rows in ((first - 1e-6, [1]), (first + 1e-6, [0, 1]), (second - 1e-6, [0, 1]), (second + 1e-6, [0, 1, 2])):
        np.testing.assert_allclose(blended(angle), np.asarray(y)[rows].mean(0), rtol=1e-12)
    np.testing.assert_array_equal(BlendedMap(transport, 1, 3.0)(x), y[1])
    np.testing.assert_array_equal(BlendedMap(transport, 4, 0.0)(x), y[1])
    images = SemiDiscreteMap(y.reshape(2, 2, 2), jnp.zeros(2))
    assert images(jnp.ones((2, 2))).shape == (2, 2)


def test_fewer_samples_between_modes_than_ddim():
    """Eight Gaussians of radius 4 and std 0.1, exact denoiser, 5 calls from σ = 1 after the map against 5 from σ = 20 (measured: 0.007, 0.13)."""
    mixture, path, n = eight_gaussians(4.0, 0.1), EDMPath(20.0), 2000
    latents = mixture.sample(jax.random.key(2), 128) + jax.random.normal(jax.random.key(3), (128, 2))
    transport = jax.jit(lambda key: fit_semi_discrete(key, latents, num_samples=4000, batch_size=4000, max_steps=150).transport)(jax.random.key(0))

    def term(sigma):
        levels = np.linspace(sigma ** (1 / 7), 0.05 ** (1 / 7), 5) ** 7
        return DenoiserTerm(mixture.denoiser(path), path, jnp.asarray(1 - np.append(levels, 0) / 20))

    def between(start, sigma):
        one = lambda key: transported_sample(key, start, term(sigma), DDIM())  # noqa: E731
        samples = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), n))
        return float(jnp.mean(jnp.min(jnp.linalg.norm(samples[:, None] - mixture.means, axis=-1), 1) > 0.4))

    class Identity(SemiDiscreteMap):
        """The noise itself at σ = 20: plain DDIM."""

        def __call__(self, x):
            return 20 * x

    assert between(transport, 1.0) < 0.03
    assert between(Identity(transport.points, transport.heights), 20.0) > 0.1


def test_float32_and_bad_arguments():
    y = jnp.ones((4, 2), jnp.float32)
    found = jax.eval_shape(lambda key: fit_semi_discrete(key, y, max_steps=2), jax.random.key(0))
    assert {leaf.dtype for leaf in (*jax.tree.leaves(found.transport), found.masses)} == {jnp.dtype(jnp.float32)}
    with pytest.raises(ValueError, match="row 1"):
        fit_semi_discrete(jax.random.key(0), y.at[1, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="batch_size"):
        fit_semi_discrete(jax.random.key(0), y, batch_size=0)
    with pytest.raises(ValueError, match="shrink"):
        fit_semi_discrete(jax.random.key(0), y, shrink=0.0)
    with pytest.raises(ValueError, match="heights"):
        SemiDiscreteMap(y, jnp.zeros(3, jnp.float32))
    with pytest.raises(ValueError, match="num_neighbours"):
        BlendedMap(SemiDiscreteMap(y, jnp.zeros(4, jnp.float32)), 0, 0.3)
