"""Nearest-of-k noise: its law against order statistics, standard training at k = 1; and the path for enlarged data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate as quadrature, stats

from ergodax.core import DenoiserTerm, FlowMatchingPath, VelocityPrediction, VPPath, integrate
from ergodax.data import GaussianMixture
from ergodax.diffusion import DDIM, DenoisingLoss
from ergodax.diffusion.knn_immiscible import NearestNoise, ScaledDataPath
from ergodax.testing import assert_mean


N, D = 20000, 8


def coupled(k, data, seed=0):
    first, second = jax.random.split(jax.random.key(seed))
    return NearestNoise(k)(second, data, jax.random.normal(first, data.shape), None)


def mean_of_smallest(law, k, high):
    """E of the smallest of k independent draws of a nonnegative law, from its survival function."""
    return quadrature.quad(lambda r: law(r) ** k, 0, high)[0]


def test_pair_distance():
    """x ~ N(0, I₈). Given ‖x‖ a squared distance is noncentral χ²₈, and so the smallest of k has a known mean: 3.88, 3.40, 3.01, 2.69."""
    data = jax.random.normal(jax.random.key(1), (N, D))
    nodes, weights = np.polynomial.legendre.leggauss(24)
    norms, weights = 4 * (nodes + 1), 4 * weights
    means = []
    for k in (1, 2, 4, 8):
        given = [mean_of_smallest(lambda s, r=r: stats.ncx2.sf(s**2, D, r**2), k, r + 12) for r in norms]
        means.append(np.sum(weights * stats.chi.pdf(norms, D) * given))
        assert_mean(np.linalg.norm(data - coupled(k, data), axis=1), means[-1])
    np.testing.assert_allclose(means, [3.87724, 3.39510, 3.00915, 2.69203], atol=1e-4)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_far_data_tilt_one_direction_only(k):
    """‖x‖ = 10⁴: the largest of k normals along x, plain normals across; x = 0: the shortest of k, without a mean."""
    direction = jnp.ones(D) / D**0.5
    noise = np.asarray(coupled(k, jnp.broadcast_to(1e4 * direction, (N, D))))
    along = noise @ direction
    assert_mean(along, {2: 0.56418958, 4: 1.02937537, 8: 1.42360031}[k])
    across = noise - along[:, None] * direction
    assert_mean(np.sum(across**2, axis=1), D - 1)
    assert_mean(across, 0.0)
    noise = np.asarray(coupled(k, jnp.zeros((N, D)), seed=1))
    assert_mean(noise, 0.0)
    assert_mean(np.sum(noise**2, axis=1), mean_of_smallest(lambda r: stats.chi2.sf(r, D), k, 80.0))


def test_one_candidate_is_standard_training():
    data = jax.random.normal(jax.random.key(0), (16, 3, 2))
    plain = DenoisingLoss(FlowMatchingPath(), VelocityPrediction())
    nearest = DenoisingLoss(FlowMatchingPath(), VelocityPrediction(), coupling=NearestNoise(1))
    network, key = lambda t, x, args: jnp.tanh(x), jax.random.key(1)
    assert plain(network, data, key)[0] == nearest(network, data, key)[0]


def test_precision_of_far_data():
    """float32 and ‖x‖ = 10⁴: the same choice as in float64."""
    data = jnp.full((2000, 4), 5e3, jnp.float32)
    first, second = jax.random.split(jax.random.key(0))
    noise = jax.random.normal(first, data.shape, jnp.float32)
    chosen = np.asarray(NearestNoise(3)(second, data, noise, None), float)
    fresh = [np.asarray(jax.random.normal(key, (data.size,), jnp.float32), float).reshape(data.shape) for key in jax.random.split(second, 2)]
    candidates = np.stack([np.asarray(noise, float), *fresh])
    best = np.argmin(np.linalg.norm(np.asarray(data, float) - candidates, axis=-1), axis=0)
    # Two programs draw the same normals to a rounding, so the choice is compared.
    np.testing.assert_array_equal(np.argmin(np.linalg.norm(chosen - candidates, axis=-1), axis=0), best)
    np.testing.assert_allclose(chosen, candidates[best, np.arange(2000)], rtol=0, atol=1e-6)


def test_the_data_are_less_mixed_and_no_gradient_flows():
    """The variance of the velocity that the best linear field leaves unexplained, at the middle of the path, falls with k."""
    data = jax.random.normal(jax.random.key(0), (N, 2)) + jnp.array([2.0, 0.0])
    left = []
    for k in (1, 4, 16):
        noise = coupled(k, data)
        inputs = np.concatenate([np.ones((N, 1)), (data + noise) / 2], axis=1)
        left.append(np.mean(np.square((data - noise) - inputs @ np.linalg.lstsq(inputs, data - noise, rcond=None)[0])))
    assert abs(left[0] - 2.0) < 4.5 * 2 * (2 / (2 * N)) ** 0.5
    assert left[1] < 0.7 * left[0]
    assert left[2] < 0.7 * left[1]
    gradient = jax.grad(lambda x: jnp.sum(coupled(4, x) ** 2))(data[:8])
    np.testing.assert_array_equal(gradient, 0.0)


def test_scaled_data():
    """`ScaledDataPath` on data x is the path on data scale · x, in clocks, losses and samples."""
    path = ScaledDataPath(VPPath(), 2.5)
    t = jnp.linspace(0.1, 0.9, 5)
    np.testing.assert_allclose(path.alpha(t), 2.5 * VPPath().alpha(t))
    np.testing.assert_allclose(jnp.exp(path.log_alpha(t)), path.alpha(t))
    np.testing.assert_allclose(path.sigma(t), VPPath().sigma(t))
    np.testing.assert_allclose(path.time(path.log_snr(t)), t, rtol=1e-10)
    data, key = jax.random.normal(jax.random.key(0), (8, 2)), jax.random.key(1)
    network = lambda t, x, args: jnp.tanh(x)  # noqa: E731
    scaled, outright = (DenoisingLoss(p, VelocityPrediction())(network, x, key)[0] for p, x in ((path, data), (VPPath(), 2.5 * data)))
    np.testing.assert_allclose(scaled, outright, rtol=1e-10)

    grid, noise = jnp.linspace(0.01, 0.99, 9), jax.random.normal(key, (4, 2))
    mixture = GaussianMixture.isotropic([0.4, 0.6], [[1.0, 0.0], [-1.0, 0.5]], 0.3)
    larger = GaussianMixture.isotropic([0.4, 0.6], [[2.5, 0.0], [-2.5, 1.25]], 0.75)
    ends = [integrate(DenoiserTerm(law.denoiser(p), p, grid), DDIM(), noise) for law, p in ((mixture, path), (larger, VPPath()))]
    np.testing.assert_allclose(*ends, rtol=1e-9)


def test_refusals():
    with pytest.raises(ValueError, match="`num_candidates` must be an integer of at least 1, got 0"):
        NearestNoise(0)
    with pytest.raises(ValueError, match="`scale`"):
        ScaledDataPath(VPPath(), -1.0)
