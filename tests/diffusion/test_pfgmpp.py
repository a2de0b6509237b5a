"""PFGM++: the law of its noise, its exact field, its limits D = 1 (Poisson) and D → ∞ (EDM), training and sampling through the stock pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ergodax.core import DataPrediction, DenoiserTerm, EDMPath, FlowMatchingPath, integrate
from ergodax.data import GaussianMixture, eight_gaussians, sliced_wasserstein
from ergodax.diffusion import DenoisingLoss, EmpiricalPFGMPPDenoiser, Heun, PFGMPPNoise, karras_grid, pfgmpp_prior
from ergodax.testing import assert_mean


SIGMA, N, DRAWS = 1.3, 4, 20000
PATH = EDMPath(40.0)
POINTS = eight_gaussians().sample(jax.random.key(3), 400)


@jax.jit
def draw(extra_dims, clip=0.0):
    """`DRAWS` rows of σ n, and the Gaussian rows they were made of."""
    noise = jax.random.normal(jax.random.key(0), (DRAWS, N))
    return SIGMA * PFGMPPNoise(extra_dims, clip)(jax.random.key(1), noise, noise, None), noise


@pytest.mark.parametrize(("extra_dims", "expected"), [(16.0, 1.93143), (4096.0, 1.69083)])
def test_second_moment(extra_dims, expected):
    """E R²/N = σ² D/(D - 2)."""
    assert abs(SIGMA**2 * extra_dims / (extra_dims - 2) - expected) < 5e-6
    assert_mean(jnp.sum(draw(extra_dims)[0] ** 2, axis=1)[:, None] / N, SIGMA**2 * extra_dims / (extra_dims - 2), z=4)


@pytest.mark.parametrize("extra_dims", [1.0, 3.0, 128.0])
def test_law_of_the_radius_and_direction(extra_dims):
    """R/r is the root of a BetaPrime(N/2, D/2) draw, and independent of the direction, which is uniform."""
    x, noise = draw(extra_dims)
    radius = np.linalg.norm(x, axis=1)
    law = scipy.stats.betaprime(N / 2, extra_dims / 2)
    assert scipy.stats.kstest(radius**2 / (SIGMA**2 * extra_dims), law.cdf).pvalue > 1e-3
    unit = np.asarray(x) / radius[:, None]
    np.testing.assert_allclose(unit, noise / np.linalg.norm(noise, axis=1)[:, None], atol=1e-12)
    # a rank correlation of independent things is normal with variance 1/n
    assert abs(scipy.stats.spearmanr(radius, unit[:, 0]).statistic) < 4 / np.sqrt(DRAWS)


def test_many_dimensions_are_gaussian():
    x, noise = draw(1e6)
    for column in np.asarray(x).T:
        assert scipy.stats.kstest(column, scipy.stats.norm(0, SIGMA).cdf).pvalue > 1e-3
    # √(D/χ²) is 1 with standard deviation 1/√(2D): the same noise, not only the same law
    np.testing.assert_allclose(x, SIGMA * noise, rtol=6 / np.sqrt(2e6))


def test_clip_keeps_the_share():
    """B in [c, 1 - c], so R² within r² [c/(1 - c), (1 - c)/c]; the values inside are as before."""
    clip, dims = 0.1, 4.0
    x, plain = (np.sum(np.asarray(draw(dims, c)[0]) ** 2, axis=1) / (SIGMA**2 * dims) for c in (clip, 0.0))
    bounds = clip / (1 - clip), (1 - clip) / clip
    np.testing.assert_allclose(x, np.clip(plain, *bounds), rtol=1e-12)
    assert (plain > bounds[1]).any()
    assert (plain < bounds[0]).any()


def test_one_dimension_is_the_poisson_field():
    """(x - D)/r is the x-part of Σ (x̃ - ỹ)/|x̃ - ỹ|^{N+1} over its r-part."""
    sigma, x = 0.7, jnp.array([0.4, -0.9])
    t = 1 - sigma / 40.0
    denoised = EmpiricalPFGMPPDenoiser(POINTS, PATH, 1.0)(t, x)
    offset = jnp.concatenate([x - POINTS, jnp.full((400, 1), sigma)], axis=1)
    field = jnp.sum(offset / jnp.linalg.norm(offset, axis=1, keepdims=True) ** 3, axis=0)
    np.testing.assert_allclose((x - denoised) / sigma, field[:2] / field[2], rtol=1e-9)


@pytest.mark.parametrize("path", [PATH, FlowMatchingPath()], ids=("EDM", "flow"))
def test_exact_field_is_the_posterior_mean(path):
    """Weights by Student's density of scipy; for D → ∞ the Gaussian posterior of point masses, with an error of order 1/D."""
    t, x, dims = 0.97, jnp.array([0.4, -0.9]), 5.0
    alpha, sigma = path.alpha(t), path.sigma(t)
    weights = scipy.stats.multivariate_t(shape=float(sigma**2) * np.eye(2), df=dims).pdf(np.asarray(x - alpha * POINTS))
    expected = weights @ np.asarray(POINTS) / weights.sum()
    np.testing.assert_allclose(EmpiricalPFGMPPDenoiser(POINTS, path, dims)(t, x), expected, rtol=1e-10)
    gaussian = GaussianMixture.isotropic(jnp.ones(400), POINTS, 0.0).denoised(path, t, x)
    gaps = [jnp.abs(EmpiricalPFGMPPDenoiser(POINTS, path, d)(t, x) - gaussian).max() for d in (1e5, 1e6)]
    assert 9 < gaps[0] / gaps[1] < 11


def test_loss_is_minimised_by_the_exact_field():
    """The stock objective with this noise has slope 0 at the exact D, scaled by 1, and not at 0.97 of it or at the Gaussian posterior."""
    path, dims, points = EDMPath(4.0), 3.0, POINTS[:20]
    exact = EmpiricalPFGMPPDenoiser(points, path, dims)
    gaussian = GaussianMixture.isotropic(jnp.ones(20), points, 0.0).denoiser(path)

    def slope(scale, mix, key):
        first, second = jax.random.split(key)
        batch = points[jax.random.randint(first, (16,), 0, 20)]
        loss = DenoisingLoss(path, DataPrediction(), times=lambda key, n: jnp.full(n, 0.8), coupling=PFGMPPNoise(dims))

        def value(choice):
            def model(t, x, args):
                return choice[0] * exact(t, x) + choice[1] * (gaussian(t, x) - exact(t, x))

            return loss(model, batch, second)[0]

        return jax.grad(value)(jnp.array([scale, mix]))

    slopes = jax.jit(jax.vmap(slope, in_axes=(None, None, 0)))
    keys = jax.random.split(jax.random.key(0), 1000)
    assert_mean(slopes(1.0, 0.0, keys), 0.0, z=4)
    for scale, mix, column in ((0.97, 0.0, 0), (1.0, 1.0, 1)):
        with pytest.raises(AssertionError):
            assert_mean(slopes(scale, mix, keys)[:, column : column + 1], 0.0, z=4)


@pytest.mark.parametrize("extra_dims", [16.0, 128.0, 2048.0])
def test_flow_from_the_prior_returns_the_data(extra_dims):
    """Sliced W2 to the data set, judged by what redrawing the data set at the same n gives."""
    n = 800

    @jax.jit
    def run(extra_dims):
        grid = karras_grid(PATH, 30, 0.01, 40.0)
        start = pfgmpp_prior(jax.random.key(1), PATH, (n, 2), extra_dims)
        model = EmpiricalPFGMPPDenoiser(POINTS, PATH, extra_dims)
        samples = integrate(DenoiserTerm(lambda t, x, args: jax.vmap(lambda x: model(t, x))(x), PATH, grid), Heun(), start)
        redrawn = jax.vmap(lambda key: POINTS[jax.random.randint(key, (n,), 0, 400)])(jax.random.split(jax.random.key(2), 10))
        distances = jax.vmap(lambda x: sliced_wasserstein(jax.random.key(4), x, POINTS, 64))(jnp.concatenate([samples[None], redrawn]))
        return distances[0], jnp.max(distances[1:])

    distance, floor = run(extra_dims)
    assert distance < 1.5 * floor, (distance, floor)


def test_prior_has_the_law_of_the_noise():
    x = jax.jit(lambda key: pfgmpp_prior(key, PATH, (DRAWS, N), 6.0))(jax.random.key(5))
    assert scipy.stats.kstest(np.sum(np.asarray(x) ** 2, axis=1) / (40.0**2 * 6), scipy.stats.betaprime(N / 2, 3).cdf).pvalue > 1e-3


def test_dtype_and_bad_arguments():
    noise = jnp.ones((8, 2, 2), jnp.float32)
    assert PFGMPPNoise(16.0, 1e-3)(jax.random.key(0), noise, noise).dtype == jnp.float32
    assert pfgmpp_prior(jax.random.key(0), PATH, (3, 2), dtype=jnp.float32).dtype == jnp.float32
    for bad in (dict(extra_dims=0.0), dict(clip=0.6)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            PFGMPPNoise(**bad)
    with pytest.raises(ValueError, match="shape"):
        pfgmpp_prior(jax.random.key(0), PATH, (3,))
