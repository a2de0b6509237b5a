"""Serial reproduction: invariance and reversibility to rounding for any noise, gaps, schedules, and the chain against its matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from ergodax.core import iterate
from ergodax.data import GaussianMixture
from ergodax.diffusion.serial_reproduction import DiscreteReproduction, SerialReproduction, law_after, spectral_gap
from ergodax.testing import assert_covariance, assert_mean


POINTS = jnp.linspace(-4.0, 4.0, 161)
LOG_PRIOR = GaussianMixture.isotropic(jnp.array([0.6, 0.4]), jnp.array([[-1.5], [1.2]]), jnp.array([0.35, 0.5])).log_prob(POINTS[:, None])
PRIOR = jax.nn.softmax(LOG_PRIOR)

#: Of mean 0 and standard deviation 1.
NOISES = {
    "Gaussian": jax.scipy.stats.norm.logpdf,
    "Laplace": lambda z: -jnp.sqrt(2.0) * jnp.abs(z),
    "uniform": lambda z: jnp.where(jnp.abs(z) <= jnp.sqrt(3.0), 0.0, -jnp.inf),
    "exponential": lambda z: jnp.where(z >= -1, -(z + 1), -jnp.inf),
}
each_noise = pytest.mark.parametrize("name", NOISES)


def pair(name, log_prior=LOG_PRIOR):
    return DiscreteReproduction(log_prior, POINTS, NOISES[name])


@each_noise
def test_prior_is_kept_and_reversible(name):
    for level in (0.3, 1.2):
        matrix = np.asarray(pair(name).transition(level))
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)
        assert np.abs(PRIOR @ matrix - PRIOR).sum() < 1e-12
        flow = np.asarray(PRIOR)[:, None] * matrix
        np.testing.assert_allclose(flow, flow.T, atol=1e-14)


def test_transition_by_its_definition():
    """K[x, x'] = Σ_y N(y | x) p₀(x') N(y | x')/Z(y), with loops over all but y."""
    pair_, level = pair("Laplace"), 0.7
    noise = np.exp(-np.sqrt(2) * np.abs(np.asarray(POINTS)[None] - np.asarray(POINTS)[:, None]) / level)
    noise /= noise.sum(1, keepdims=True)
    evidence, prior, matrix = np.asarray(PRIOR) @ noise, np.asarray(PRIOR), np.asarray(pair_.transition(level))
    for x in (0, 40, 97, 160):
        for other in (3, 41, 100):
            np.testing.assert_allclose(matrix[x, other], (noise[x] * prior[other] * noise[other] / evidence).sum(), rtol=1e-10)


def test_noise_must_be_normalised():
    """With a kernel that is not normalised over y in the posterior the prior is lost near the edges."""
    raw = np.exp(-np.sqrt(2) * np.abs(np.asarray(POINTS)[None] - np.asarray(POINTS)[:, None]) / 2.4)
    noise = raw / raw.sum(1, keepdims=True)
    wrong = np.asarray(PRIOR)[:, None] * raw
    matrix = noise @ (wrong / wrong.sum(0)).T
    assert np.abs(PRIOR @ matrix - PRIOR).sum() > 1e-3


@each_noise
def test_gap_grows_with_the_noise(name):
    gaps = jax.jit(jax.vmap(lambda level: spectral_gap(PRIOR, pair(name).transition(level))))(jnp.array([0.3, 0.6, 1.2, 2.4]))
    assert gaps[0] > 0
    assert np.all(np.diff(gaps) > 0), gaps
    if name == "Gaussian":
        np.testing.assert_allclose(gaps, [0.0090, 0.0797, 0.382, 0.821], rtol=5e-3)


def test_gap_is_the_rate_of_convergence():
    matrix = pair("Gaussian").transition(0.6)
    gap = float(spectral_gap(PRIOR, matrix))
    start = jnp.zeros(161).at[120].set(1.0)
    laws = [law_after(start, jnp.broadcast_to(matrix, (n, 161, 161))) for n in (100, 101)]
    errors = [float(jnp.abs(law - PRIOR).sum()) for law in laws]
    np.testing.assert_allclose(errors[1] / errors[0], 1 - gap, rtol=1e-5)


@each_noise
def test_schedule_of_levels(name):
    """From a point: 20 levels from 4 down to 0.1, or up again, reach p₀, at least as fast as their gaps say; 20 steps at 0.2 do not."""
    start, discrete = 5, DiscreteReproduction(LOG_PRIOR[::4], POINTS[::4], NOISES[name])
    prior = jax.nn.softmax(discrete.log_prior)

    @jax.jit
    def distances(levels):
        matrices = jax.vmap(discrete.transition)(levels)
        gaps = jax.vmap(lambda matrix: spectral_gap(prior, matrix))(matrices)
        laws = [law_after(jnp.zeros(41).at[start].set(1.0), steps) for steps in (matrices, matrices[::-1])]
        # Total variation is at most half the χ distance, which each step shrinks by 1 - gap.
        return [jnp.abs(law - prior).sum() / 2 for law in laws], jnp.prod(1 - gaps) * jnp.sqrt(1 / prior[start] - 1) / 2

    reached, limit = distances(jnp.geomspace(4.0, 0.1, 20))
    assert max(reached) <= limit
    assert max(reached) < (1e-4 if name in ("Gaussian", "uniform") else 1e-3)
    reached, limit = distances(jnp.full(20, 0.2))
    assert 0.35 < min(reached) <= max(reached) <= limit


def test_learned_prior_is_the_law_of_the_chain():
    learned = LOG_PRIOR + 0.5 * jnp.sin(POINTS)
    start = jnp.zeros(161).at[20].set(1.0)
    law = law_after(start, jnp.broadcast_to(pair("Gaussian", learned).transition(2.4), (40, 161, 161)))
    np.testing.assert_allclose(law, jax.nn.softmax(learned), atol=1e-12)


def test_chain_follows_its_matrix():
    """χ² of 4000 chains of 4 steps with three levels (the last is kept) against the product of matrices."""
    points, levels = jnp.linspace(-4.0, 4.0, 41), jnp.array([2.0, 1.0, 0.5])
    discrete = DiscreteReproduction(LOG_PRIOR[::4], points, NOISES["exponential"])
    kernel = SerialReproduction(discrete.corrupt, discrete.reproduce, levels)
    start = kernel.init(jnp.asarray(33))
    run = jax.jit(jax.vmap(lambda key: iterate(key, kernel.step, start, 4)))
    end = run(jax.random.split(jax.random.key(0), 4000))
    assert (end.count == 4).all()
    law = law_after(jnp.zeros(41).at[33].set(1.0), jax.vmap(discrete.transition)(levels[jnp.array([0, 1, 2, 2])]))
    cells = np.append(0, np.searchsorted(np.cumsum(law), np.linspace(0, 1, 9)[1:-1]))
    expected = np.add.reduceat(np.asarray(law), cells)
    counts = np.add.reduceat(np.bincount(np.asarray(end.position), minlength=41), cells)
    assert (np.diff(cells) > 0).all()
    assert chisquare(counts, 4000 * expected / expected.sum()).pvalue > 1e-4


def test_continuous_pair():
    """Gaussian data in the plane with their exact posterior: the chain keeps mean and covariance, from draws of the data."""
    gaussian = GaussianMixture(jnp.ones(1), jnp.array([[0.5, -1.0]]), jnp.array([[0.4, 0.9]]))
    mean, variance = gaussian.means[0], gaussian.variances[0]

    def corrupt(key, x, level):
        return x + level * jax.random.normal(key, x.shape)

    def reproduce(key, y, level):
        gain = variance / (variance + level**2)
        return mean + gain * (y - mean) + jnp.sqrt(gain) * level * jax.random.normal(key, y.shape)

    kernel = SerialReproduction(corrupt, reproduce, jnp.geomspace(3.0, 0.3, 5))
    keys, start = jax.random.split(jax.random.key(1), 4000), gaussian.sample(jax.random.key(2), 4000)
    end = jax.jit(jax.vmap(lambda key, x: iterate(key, kernel.step, kernel.init(x), 5)))(keys, start).position
    assert_mean(end, mean)
    assert_covariance(end, jnp.diag(variance))


def test_parameters_are_checked():
    with pytest.raises(ValueError, match="`levels`"):
        SerialReproduction(lambda *a: 0, lambda *a: 0, jnp.ones(0))
    with pytest.raises(ValueError, match="`points`"):
        DiscreteReproduction(jnp.ones(3), jnp.ones(4), NOISES["Gaussian"])
