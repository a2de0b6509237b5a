"""Diffusion time: the bound and its slope in closed form on a Gaussian, the best time of the card, and short diffusions from a fitted mixture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from ergodax.core import DenoiserTerm, ProbabilityFlow, VPPath, integrate, log_likelihood, standard_normal_log_prob
from ergodax.data import GaussianMixture, sliced_wasserstein
from ergodax.diffusion import DDIM, uniform_grid
from ergodax.diffusion.diffusion_time import TimesFrom, diffusion_elbo, elbo_slope, fit_gaussian_mixture, optimal_start


PATH, MEAN, VARIANCE, BIAS = VPPath(), 1.5, 0.3, 0.25
GAUSSIAN = GaussianMixture([1.0], [[MEAN]], [[VARIANCE]])
# Gauss-Hermite points for the data and the noise: exact means of polynomials.
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(4)
WEIGHTS = (np.outer(_WEIGHTS, _WEIGHTS) / _WEIGHTS.sum() ** 2).ravel()
DATA, NOISE = (jnp.asarray(a.reshape(-1, 1)) for a in np.meshgrid(MEAN + VARIANCE**0.5 * _NODES, _NODES, indexing="ij"))


def biased_score(t, x, args=None):
    return GAUSSIAN.score_at(PATH, t, x) + BIAS


def closed_form(u):
    """ELBO'(T) and KL(p_T ‖ N(0, 1)) at T = u."""
    alpha2 = np.exp(-(0.1 * u + 19.9 * u**2 / 2))
    mean2, variance = alpha2 * MEAN**2, 1 + alpha2 * (VARIANCE - 1)
    slope = (0.1 + 19.9 * u) / 2 * (mean2 + variance * (1 - 1 / variance) ** 2 - BIAS**2)
    return slope, (variance + mean2 - 1 - np.log(variance)) / 2


def test_the_bound_in_closed_form():
    """-H - G - KL, from the data at u = 0.02 on; and its slope is the derivative."""
    low, high = 0.02, 0.6
    alpha2 = np.exp(-(0.1 * low + 19.9 * low**2 / 2))
    entropy = np.log(2 * np.pi * np.e * (1 + alpha2 * (VARIANCE - 1))) / 2
    gap = quad(lambda u: (0.1 + 19.9 * u) / 2 * BIAS**2, low, high)[0]
    times = 1 - jnp.linspace(high, low, 30)
    each = jax.jit(lambda: diffusion_elbo(biased_score, PATH, DATA, NOISE, standard_normal_log_prob, times))()
    np.testing.assert_allclose(WEIGHTS @ each, -entropy - gap - closed_form(high)[1], rtol=1e-8)
    derivative = (closed_form(high - 1e-5)[1] - closed_form(high + 1e-5)[1]) / 2e-5 - (0.1 + 19.9 * high) / 2 * BIAS**2
    np.testing.assert_allclose(closed_form(high)[0], derivative, rtol=1e-5)
    for u in (0.1, 0.6, 0.95):
        np.testing.assert_allclose(WEIGHTS @ elbo_slope(biased_score, PATH, 1 - u, DATA, NOISE), closed_form(u)[0], rtol=1e-9)


def test_the_best_time():
    """T* = 0.595635 from slopes on a grid of 50 times; an exact score wants the longest time, a useless one the shortest."""
    times = jnp.linspace(0.01, 0.99, 50)

    @jax.jit
    def best(bias):
        def score(t, x, args=None):
            return GAUSSIAN.score_at(PATH, t, x) + bias

        slopes = jax.lax.map(lambda t: jnp.asarray(WEIGHTS) @ elbo_slope(score, PATH, t, DATA, NOISE), times)
        return 1 - optimal_start(times, slopes)

    np.testing.assert_allclose(best(BIAS), 0.595635, rtol=1e-3)
    np.testing.assert_allclose([best(0.0), best(10.0)], [0.99, 0.01])


MIXTURE = GaussianMixture.isotropic([0.3, 0.4, 0.3], [[2.0, 0.0], [-1.0, 1.5], [-1.0, -1.5]], 0.3)
N = 3000


def test_short_diffusion():
    """At T = 0.15 samples from N(0, I) are far off; from a mixture fitted to diffused data, with 30 % of the steps, they are like fresh data."""
    start, n = 0.85, 10000
    keys = jax.random.split(jax.random.key(0), 10)

    @jax.jit
    def distances(data, noise):
        nu = fit_gaussian_mixture(keys[2], PATH.alpha(start) * data + PATH.sigma(start) * noise, 3, 20)

        def end(y0, start, num_steps):
            return integrate(DenoiserTerm(MIXTURE.denoiser(PATH), PATH, uniform_grid(num_steps, start)), DDIM(), y0)

        ends = [end(jax.random.normal(keys[3], (n, 2)), start, 18), end(nu.sample(keys[4], n), start, 18)]
        ends += [end(jax.random.normal(keys[5], (n, 2)), 0.0, 60), *(MIXTURE.sample(key, n) for key in keys[7:])]  # the floor
        fresh = MIXTURE.sample(keys[6], n)
        return jax.lax.map(lambda x: sliced_wasserstein(jax.random.key(1), x, fresh, 16), jnp.stack(ends))

    wrong, bridged, full, *floor = np.asarray(distances(MIXTURE.sample(keys[0], n), jax.random.normal(keys[1], (n, 2))))
    assert wrong > 3 * bridged, (wrong, bridged)
    assert max(bridged, full) < 1.5 * max(floor), (bridged, full, floor)


def test_likelihood_with_the_fitted_start():
    """log p by the probability flow and ν: of the exact mixture where ν is the exact marginal, and better than with N(0, I) where it is fitted."""
    start, key = 0.8, jax.random.key(3)
    x = MIXTURE.sample(jax.random.key(4), 8)
    times = uniform_grid(40, start, 1 - 1e-4)
    nu = jax.jit(lambda x, z: fit_gaussian_mixture(key, PATH.alpha(start) * x + PATH.sigma(start) * z, 3, 60))(
        MIXTURE.sample(key, N), jax.random.normal(jax.random.key(5), (N, 2))
    )

    @jax.jit
    def log_probs(x):
        exact = MIXTURE.marginal(PATH, start)
        flow = ProbabilityFlow(MIXTURE.denoiser(PATH), PATH)
        return [jax.vmap(lambda y, prior=prior: log_likelihood(flow, y, prior, times)[0])(x) for prior in (exact.log_prob, nu.log_prob)]

    by_exact, by_fit = log_probs(x)
    np.testing.assert_allclose(by_exact, MIXTURE.log_prob_at(PATH, times[-1], x), atol=1e-4)
    assert float(jnp.abs(by_fit - by_exact).max()) < 0.3


def test_mixture_fit():
    """Maximum likelihood: better than the truth on its own data, near the truth, and no worse after more steps."""
    x = MIXTURE.sample(jax.random.key(0), N)
    fits = jax.jit(lambda x: [fit_gaussian_mixture(jax.random.key(1), x, 3, steps) for steps in (0, 10, 60)])(x)
    values = [float(jnp.mean(m.log_prob(x))) for m in (*fits, MIXTURE)]
    assert values[0] < values[1] <= values[2] + 1e-9
    # Twice the gain over the truth is χ² with 17 parameters: 17 ± 6 of 2 N.
    assert 0 < 2 * N * (values[2] - values[3]) < 17 + 4.5 * 34**0.5
    order = np.argsort(np.arctan2(fits[2].means[:, 1], fits[2].means[:, 0]))
    np.testing.assert_allclose(np.asarray(fits[2].means)[order], [[-1, -1.5], [2, 0], [-1, 1.5]], atol=4.5 * 0.3 / (0.3 * N) ** 0.5)


def test_times_and_refusals():
    times = TimesFrom(0.7)(jax.random.key(0), 1000)
    assert 0.7 < float(times.min()) < 0.701
    assert 0.999 < float(times.max()) < 1.0
    for make, message in (
        (lambda: TimesFrom(1.0), "`start`"),
        (lambda: optimal_start(jnp.array([0.5, 0.1]), jnp.zeros(2)), "`times` must increase strictly"),
        (lambda: diffusion_elbo(biased_score, PATH, DATA, NOISE, standard_normal_log_prob, jnp.array([0.5, 0.1])), "`times`"),
        (lambda: fit_gaussian_mixture(jax.random.key(0), jnp.zeros((2, 1)), 3), "rows of `x`"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
