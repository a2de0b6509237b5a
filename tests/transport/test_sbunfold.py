"""SBUnfold: the path and its posterior, a Gaussian smearing where the chained sampler's moments follow exactly, and training with reweighting."""

import itertools
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ergodax.core import iterate
from ergodax.testing import assert_covariance, assert_mean
from ergodax.transport.samples import Samples
from ergodax.transport.sbunfold import (
    ClassifierRatio,
    PriorRefinement,
    UnfoldingBridge,
    UnfoldingLoss,
    fit_sbunfold,
    mirrored_variances,
)


NOISE = 0.25  # of the detector: z ~ N(0, 1), x = z + N(0, NOISE)


def even(n, total):
    return UnfoldingBridge(jnp.full(n, total / n))


def best_weights(passed, remaining, conditioned):
    """E[z | X_k, x] = w·(X_k, x) of the smearing, or E[z | X_k] = w₀ X_k."""
    share, variance = remaining / (passed + remaining), passed * remaining / (passed + remaining)
    own = 1 + share**2 * NOISE + variance
    if not conditioned:
        return np.array([1 / own, 0.0])
    return np.linalg.solve([[own, 1 + share * NOISE], [1 + share * NOISE, 1 + NOISE]], [1.0, 1.0])


class Exact(eqx.Module):
    """The best ε of the smearing, times a factor."""

    bridge: UnfoldingBridge
    weights: jax.Array
    factor: float = 1.0

    def __call__(self, t, x, detector):
        k = jnp.round(t * (self.weights.shape[0] - 1)).astype(int)
        w = self.weights[k]
        return self.factor * (x - w[0] * x - w[1] * detector) / jnp.sqrt(self.bridge.remaining[k])


def exact(bridge, conditioned, factor=1.0):
    rows = [best_weights(s, r, conditioned) for s, r in zip(*map(np.asarray, (bridge.passed, bridge.remaining)))]
    return Exact(bridge, jnp.asarray(np.stack(rows)), factor)


def propagate(variances, num_steps, conditioned):
    """Slope and variance of what the sampler makes of one x."""
    passed, remaining = np.cumsum(variances), np.cumsum(variances[::-1])[::-1]
    indices = np.round(np.linspace(0, len(variances) - 1, num_steps + 1)).astype(int)
    slope, variance = 1.0, 0.0
    for k, j in itertools.pairwise(indices):
        w, kept = best_weights(passed[k], remaining[k], conditioned), remaining[j] / remaining[k]
        gain = kept + (1 - kept) * w[0]
        slope = gain * slope + (1 - kept) * w[1]
        variance = gain**2 * variance + (remaining[j] * (1 - kept) if j < indices[-1] else 0)
    return slope, variance


def test_table():
    """Theirs: 1000 values, the second half the first mirrored, with the sum 0.04905."""
    table = np.asarray(mirrored_variances())
    np.testing.assert_allclose(table.sum(), 0.04905, atol=5e-6)
    np.testing.assert_allclose(table[:2], np.linspace(1e-5**0.5, (0.3 / 1000) ** 0.5, 1000)[:2] ** 2, rtol=1e-12)
    np.testing.assert_array_equal(table, table[::-1])


def test_path_and_posterior():
    """Variances of 0 at both ends give x and z themselves. The posterior carries the marginal of k to that of l, exactly where β_k = β_l."""
    z, x = jnp.array([0.3, -1.0]), jnp.array([1.0, 2.0])
    closed = UnfoldingBridge(jnp.array([0.0, 0.2, 0.3, 0.0]))
    for k, expected in ((0, x), (3, z)):
        mean, variance = closed.marginal(jnp.asarray(k), z, x)
        np.testing.assert_allclose(mean, expected, rtol=1e-15)
        assert variance == 0
    mean, variance = closed.marginal(jnp.asarray(1), z, x)  # s = 0.2, r = 0.5
    np.testing.assert_allclose(mean, (0.5 * x + 0.2 * z) / 0.7, rtol=1e-12)
    np.testing.assert_allclose(variance, 0.1 / 0.7, rtol=1e-12)

    bridge = even(20, 0.3)
    for k, j in ((0, 7), (7, 18)):
        (mean, variance), (after, spread) = (bridge.marginal(jnp.asarray(i), z, x) for i in (k, j))
        onward, fresh = bridge.posterior(jnp.asarray(k), jnp.asarray(j), mean, z)
        slope = bridge.posterior(jnp.asarray(k), jnp.asarray(j), mean + 1, z)[0][0] - onward[0]
        np.testing.assert_allclose(onward, after, rtol=1e-10)
        np.testing.assert_allclose(slope**2 * variance + fresh, spread, rtol=1e-10)


@pytest.mark.parametrize("conditioned", [False, True])
def test_sampler_on_gaussian_smearing(conditioned):
    """Slope (a derivative at one key) and variance of ẑ given x, at 100 of the table's steps; all steps reach the limits known for it."""
    bridge = UnfoldingBridge(mirrored_variances())
    network = exact(bridge, conditioned)
    slope, variance = propagate(np.asarray(bridge.variances), 100, conditioned)
    run = jax.jit(lambda x: bridge.unfold(jax.random.key(0), network, x, 100))
    ends = run(jnp.full(4000, 0.7))
    np.testing.assert_allclose(run(jnp.full(4000, 1.7)) - ends, slope, rtol=1e-9)
    assert_mean(ends[:, None], 0.7 * slope)
    assert_covariance(ends[:, None], [[variance]])

    limits = (0.8000, 0.1990) if conditioned else (0.8744, 0.0438)
    np.testing.assert_allclose(propagate(np.asarray(even(1000, 0.04905).variances), 999, conditioned), limits, atol=1.2e-3)


@pytest.mark.parametrize("conditioned", [False, True])
def test_bridge_of_the_detectors_own_noise(conditioned):
    """Its pairs are a Schrödinger bridge's: slope 0.8 and variance 0.2 with or without a look at x, up to O(1/N)."""
    errors = [np.abs(np.subtract(propagate(np.full(n, NOISE / n), n - 1, conditioned), (0.8, 0.2))) for n in (100, 1000)]
    assert np.all(errors[1] < 2e-3)
    np.testing.assert_allclose(errors[0] / errors[1], 10, rtol=0.35)


def test_loss_is_minimised_by_the_best_noise():
    """Slope 0 in a factor of it (z-score), not at 0.9 of it."""
    bridge = even(10, 0.3)
    network = exact(bridge, True)

    @jax.jit
    @jax.vmap
    def slope(key, factor):
        z, noise = jax.random.normal(key, (2, 64, 1))
        network_at = lambda f: eqx.tree_at(lambda n: n.factor, network, f)  # noqa: E731
        return jax.grad(lambda f: UnfoldingLoss(bridge)(network_at(f), (z, z + NOISE**0.5 * noise), key)[0])(factor)

    keys = jax.random.split(jax.random.key(1), 300)
    assert_mean(slope(keys, jnp.full(300, 1.0))[:, None], 0.0, z=4.0)
    with pytest.raises(AssertionError):
        assert_mean(slope(keys, jnp.full(300, 0.9))[:, None], 0.0, z=4.0)


def test_loss_of_a_network_that_says_nothing():
    """z = x = 0: ε has variance s_k/(s_k + r_k), which the loss averages over all k."""
    bridge = UnfoldingBridge(jnp.array([0.1, 0.2, 0.4]))
    losses = jax.jit(jax.vmap(lambda key: UnfoldingLoss(bridge)(lambda t, x, y: 0 * x, (jnp.zeros((1, 1)),) * 2, key)[0]))
    expected = np.mean(np.array([0.1, 0.3, 0.7]) / np.array([0.8, 0.9, 1.1]))
    assert_mean(losses(jax.random.split(jax.random.key(0), 4000))[:, None], expected)


class Quadratic(eqx.Module):
    """ε̂ = u(t) X + v(t) x, both quadratic in t."""

    coefficients: jax.Array

    def __call__(self, t, x, detector):
        u, v = self.coefficients @ jnp.stack([jnp.ones_like(t), t, t**2])
        return u * x + v * detector


def test_fitted_estimator_unfolds():
    """Pairs in units of their own: z = 5 + 2u; unfolding fresh events gives the truth's mean and variance, and Cov(ẑ, x) = Cov(z, x)."""
    n = 20_000
    key_truth, key_noise, key_fit = jax.random.split(jax.random.key(0), 3)
    z = 5 + 2 * jax.random.normal(key_truth, (n, 1))
    x = 3 * (z + jax.random.normal(key_noise, (n, 1)))
    with jax.numpy_dtype_promotion("standard"):
        model = fit_sbunfold(
            key_fit, z, x, Quadratic(jnp.zeros((2, 3))), optax.adam(optax.cosine_decay_schedule(0.1, 400)), num_steps=400, bridge=even(100, 0.25)
        )
    assert model.failed_at == -1
    assert model.metrics["loss"].shape == (400,)
    fresh = 5 + 2 * jax.random.normal(jax.random.key(7), (4000, 1))
    seen = 3 * (fresh + jax.random.normal(jax.random.key(8), (4000, 1)))
    unfolded = jax.jit(partial(model.sample, num_steps=99))(jax.random.key(9), seen)
    # the fit's own error and the bias of 99 steps: 2 percent of the scale
    assert abs(float(unfolded.mean()) - 5) < 2 * (0.02 + 4 / np.sqrt(4000))
    assert abs(float(unfolded.var()) / 4 - 1) < 0.04 + 4 * np.sqrt(2 / 4000)
    slope = np.cov(unfolded[:, 0], seen[:, 0])[0, 1] / seen.var()
    assert abs(slope / (4 / 15) - 1) < 0.05


def test_classifier_ratio():
    """log N(½, 1)/N(0, 1) = x/2 - 1/8, to the standard errors of a logistic regression on 2 x 4000 points, 0.022 and 0.023, times 4.5."""
    above, below = jax.random.normal(jax.random.key(0), (2, 4000)) + jnp.array([[0.5], [0.0]])
    ratio = ClassifierRatio(Logit(jnp.zeros(2)), optax.adam(optax.cosine_decay_schedule(0.1, 200)), 200, 1000)
    with jax.numpy_dtype_promotion("standard"):
        log_ratio = jnp.log(ratio(jax.random.key(1), above, below))
    slope, intercept = np.polyfit(below, log_ratio, 1)
    assert abs(slope - 0.5) < 0.1
    assert abs(intercept + 0.125) < 0.1


class Logit(eqx.Module):
    coefficients: jax.Array

    def __call__(self, x):
        return self.coefficients[0] + self.coefficients[1] * x


class Posterior(NamedTuple):
    """The exact posterior of the smearing with the weighted truth's mean and variance as its prior."""

    mean: jax.Array
    variance: jax.Array

    def sample(self, key, data):
        gain = self.variance / (self.variance + NOISE)
        noise = jax.random.normal(key, data.shape)
        return self.mean + gain * (data - self.mean) + jnp.sqrt(gain * NOISE) * noise


def test_prior_refinement_finds_the_data_prior():
    """Simulated z ~ N(0, 1), data from N(0.6, 0.6): each round brings the mean nearer by the gain V/(V + NOISE) of the posterior before it."""
    n = 20_000
    z, e, u, f = jax.random.normal(jax.random.key(0), (4, n))
    data = 0.6 + np.sqrt(0.6) * u + np.sqrt(NOISE) * f

    def fit(key, truth, detector):
        mean = jnp.average(truth.points, weights=truth.weights)
        return Posterior(mean, jnp.average((truth.points - mean) ** 2, weights=truth.weights))

    def ratio(key, unfolded, truth):
        return jnp.exp(jax.scipy.stats.norm.logpdf(truth, unfolded.mean(), unfolded.std()) - jax.scipy.stats.norm.logpdf(truth))

    rounds = PriorRefinement(fit, ratio, z, z + np.sqrt(NOISE) * e, data)
    state, saved = jax.jit(lambda key: iterate(key, rounds.step, rounds.init(), 6, save=lambda s, info: (s.unfolded.mean(), s.unfolded.var())))(
        jax.random.key(1)
    )
    mean, variance, expected = 0.0, 1.0, []
    for _ in range(6):
        gain = variance / (variance + NOISE)
        mean, variance = mean + gain * (0.6 - mean), gain**2 * (0.6 + NOISE) + gain * NOISE
        expected.append((mean, variance))
    np.testing.assert_allclose(np.stack(saved, 1), expected, atol=0.05)
    np.testing.assert_allclose(state.weights.mean(), 1, rtol=1e-12)
    np.testing.assert_allclose(expected[-1], (0.6, 0.6), atol=0.02)


def test_bad_arguments_and_float32():
    z = jnp.ones((4, 2))
    fit = partial(fit_sbunfold, jax.random.key(0), network=lambda t, x, y: x, optimiser=optax.sgd(0.1), num_steps=1)
    with pytest.raises(ValueError, match="row 2"):
        fit(z, z.at[2, 1].set(jnp.nan))
    with pytest.raises(ValueError, match="one shape"):
        fit(Samples(z), z[:, :1])
    with pytest.raises(ValueError, match="even"):
        mirrored_variances(11)
    with pytest.raises(ValueError, match="at most 9"):
        even(10, 1.0).unfold(jax.random.key(0), lambda t, x, y: x, z[0], 10)
    with pytest.raises(ValueError, match="one shape"):
        UnfoldingLoss(even(10, 1.0))(lambda t, x, y: x, (z, z[:2]), jax.random.key(0))
    low = z.astype(jnp.float32)
    run = lambda z: even(10, 1.0).unfold(jax.random.key(0), lambda t, x, y: t * x, z, 3)  # noqa: E731
    assert jax.eval_shape(run, low).dtype == jnp.float32
