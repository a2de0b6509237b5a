"""Min-SNR: the paper's three weights, one loss whatever the parametrisation, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import (
    CosinePath,
    DataPrediction,
    EDMPath,
    EDMPrediction,
    FlowMatchingPath,
    NoisePrediction,
    VelocityPrediction,
    VPPath,
    VPrediction,
)
from ergodax.diffusion import DenoisingLoss, MinSNR, uniform_weight


T = jnp.linspace(0.02, 0.98, 25)


def test_papers_three_weights():
    path, gamma = VPPath(), 5.0
    snr = path.alpha(T) ** 2 / path.sigma(T) ** 2
    clamped = np.minimum(snr, gamma)
    assert 0 < (snr < gamma).sum() < len(T)
    np.testing.assert_allclose(MinSNR()(path, DataPrediction(), T), clamped, rtol=1e-12)
    np.testing.assert_allclose(MinSNR()(path, NoisePrediction(), T), clamped / snr, rtol=1e-10)
    np.testing.assert_allclose(MinSNR()(path, VPrediction(), T), clamped / (snr + 1), rtol=1e-10)


@pytest.mark.parametrize("path", [VPPath(), CosinePath(), FlowMatchingPath(), EDMPath(20.0)], ids=repr)
def test_one_loss_for_every_parametrisation(path):
    """The same underlying prediction, written as data, noise, velocity, v or EDM's F, has the same loss."""

    def denoised(t, x):
        return jnp.tanh(x) + 0.1 * t

    data, key = jax.random.normal(jax.random.key(0), (64, 3)), jax.random.key(1)
    losses = []
    for prediction in (DataPrediction(), NoisePrediction(), VelocityPrediction(), VPrediction(), EDMPrediction()):

        def network(t, x, args, prediction=prediction):
            return prediction.from_denoised(path, t, x, denoised(t, x))

        losses.append(DenoisingLoss(path, prediction, weight=MinSNR(3.0))(network, data, key)[0])
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)
    assert losses[0] > 0.01


def test_limits():
    path = VPPath()
    # γ → ∞: plain noise regression (and SNR weighting of the data); γ → 0: a constant weight of the data error.
    np.testing.assert_allclose(MinSNR(1e30)(path, NoisePrediction(), T), uniform_weight(path, NoisePrediction(), T), rtol=1e-9)
    np.testing.assert_allclose(MinSNR(1e30)(path, DataPrediction(), T), path.snr(T), rtol=1e-12)
    np.testing.assert_allclose(MinSNR(1e-9)(path, DataPrediction(), T), 1e-9, rtol=1e-12)


def test_finite_at_the_ends():
    ends = jnp.array([1e-5, 1 - 1e-5], jnp.float32)
    for path in (FlowMatchingPath(), CosinePath(), VPPath()):
        for prediction in (DataPrediction(), NoisePrediction(), VelocityPrediction(), VPrediction()):
            weight = MinSNR()(path, prediction, ends)
            assert bool(jnp.isfinite(weight).all())
            assert weight.dtype == jnp.float32


def test_gamma_is_checked():
    with pytest.raises(ValueError, match=r"`gamma` must lie in \(0, inf\), got 0"):
        MinSNR(0.0)
