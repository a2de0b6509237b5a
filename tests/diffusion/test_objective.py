"""The denoising loss and its plugs, and guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import (
    CosinePath,
    DataPrediction,
    FlowMatchingPath,
    NoisePrediction,
    ScorePrediction,
    VelocityPrediction,
    VPPath,
    VPrediction,
    stratified_times,
    uniform_times,
)
from ergodax.data import GaussianMixture
from ergodax.diffusion import ClassifierFreeGuidance, DenoisingLoss
from ergodax.testing import assert_mean


MIXTURE = GaussianMixture.isotropic(jnp.array([0.4, 0.6]), jnp.array([[1.0, 0.0], [-1.0, 0.5]]), jnp.array([0.3, 0.5]))


@pytest.mark.parametrize("path", [VPPath(), FlowMatchingPath(), CosinePath()], ids=repr)
@pytest.mark.parametrize("prediction", [DataPrediction(), NoisePrediction(), VelocityPrediction(), VPrediction(), ScorePrediction()], ids=repr)
def test_the_exact_model_is_stationary(path, prediction):
    """The loss is a least-squares regression on E[p* | x_t]: at the exact model its derivative in any direction is zero in the mean."""
    data = MIXTURE.sample(jax.random.key(0), 4000)

    def middle(key, n):
        return jax.random.uniform(key, (n,), minval=0.1, maxval=0.9)

    def slope(x1, key):
        def loss(shift):
            def model(t, x, args):
                return prediction.from_denoised(path, t, x, MIXTURE.denoised(path, t, x)) + shift * jnp.tanh(x + t)

            return DenoisingLoss(path, prediction, times=middle)(model, x1[None], key)[0]

        return jax.grad(loss)(0.0)

    slopes = jax.jit(jax.vmap(slope))(data, jax.random.split(jax.random.key(1), len(data)))
    assert np.std(slopes) > 1e-3
    assert_mean(slopes, 0.0)


def test_the_value_of_the_loss():
    """A network that returns 0 has loss E[w(t) |target|²/d], here with velocity x₁ - x₀ of a point mass at 2: 4 + 1."""
    loss = DenoisingLoss(FlowMatchingPath(), VelocityPrediction(), weight=lambda path, prediction, t: 3 * jnp.ones_like(t))
    values = jax.vmap(lambda key: loss(lambda t, x, args: jnp.zeros_like(x), jnp.full((8, 2), 2.0), key)[0])(
        jax.random.split(jax.random.key(0), 2000)
    )
    assert_mean(values, 15.0)


def test_label_dropout():
    """A dropped label becomes the null label, in the share asked for, and the others stay."""
    labels = jnp.arange(2000) % 10

    def network(t, x, label):
        return jnp.where(label == -1, 1.0, 0.0) * jnp.ones_like(x)

    def dropped(rate):
        # With data 0 and the data itself predicted, the loss is the share of null labels.
        loss = DenoisingLoss(VPPath(), DataPrediction(), label_dropout=rate)
        return float(loss(network, (jnp.zeros((2000, 1)), labels), jax.random.key(0))[0])

    assert dropped(0.0) == 0
    assert dropped(1.0) == 1
    assert abs(dropped(0.3) - 0.3) < 4.5 * (0.21 / 2000) ** 0.5


@pytest.mark.parametrize("times", [uniform_times, stratified_times])
def test_times_are_uniform(times):
    draws = jax.vmap(lambda key: times(key, 8))(jax.random.split(jax.random.key(0), 4000))
    assert_mean(draws, 0.5)
    assert_mean((draws - 0.5) ** 2, 1 / 12)
    assert draws.min() >= 1e-5
    assert draws.max() <= 1 - 1e-5
    if times is stratified_times:
        np.testing.assert_allclose(np.diff(np.sort(draws, axis=1), axis=1), (1 - 2e-5) / 8, rtol=1e-9)


def test_guidance():
    def field(t, x, label):
        return x * (2.0 + label) + t

    x, label = jnp.array([1.0, -2.0]), jnp.asarray(3.0)
    guided = ClassifierFreeGuidance(field, 3.0)
    # D(c) = 5x, D(∅) = x at t = 0: D = x + 3 · 4x.
    np.testing.assert_allclose(guided(0.0, x, label), 13 * x)
    np.testing.assert_allclose(ClassifierFreeGuidance(field, 1.0)(0.2, x, label), field(0.2, x, label))
    np.testing.assert_allclose(ClassifierFreeGuidance(field, 0.0)(0.2, x, label), field(0.2, x, -1))
    swept = jax.vmap(lambda scale: ClassifierFreeGuidance(field, scale)(0.0, x, label))(jnp.array([0.0, 1.0, 3.0]))
    np.testing.assert_allclose(swept, [x, 5 * x, 13 * x])


def test_guiding_the_denoiser_is_guiding_the_score():
    """Every parametrisation is affine in D with coefficients that do not depend on the condition."""
    path, t, x = VPPath(), 0.4, jnp.array([0.3, 0.7])

    def denoised(t, x, label):
        return jnp.tanh(x + label)

    def score(t, x, label):
        return ScorePrediction().from_denoised(path, t, x, denoised(t, x, label))

    by_score = ScorePrediction().to_denoised(path, t, x, ClassifierFreeGuidance(score, 2.5)(t, x, jnp.asarray(2.0)))
    np.testing.assert_allclose(ClassifierFreeGuidance(denoised, 2.5)(t, x, jnp.asarray(2.0)), by_score, rtol=1e-10)


def test_refusals():
    with pytest.raises(ValueError, match="label_dropout"):
        DenoisingLoss(VPPath(), VPrediction(), label_dropout=1.5)
    with pytest.raises(ValueError, match=r"must have shape \(batch, \*example\), got \(3,\)"):
        DenoisingLoss(VPPath(), VPrediction())(lambda t, x, args: x, jnp.zeros(3), jax.random.key(0))
