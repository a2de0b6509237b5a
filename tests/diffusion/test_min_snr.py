"""Min-SNR: the paper's three weights, one loss whatever the parametrisation, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

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
from ergodax.diffusion.min_snr import SNRWeight, pareto_weights


T = jnp.linspace(0.02, 0.98, 25)
solved = jax.jit(lambda gradients, penalty: pareto_weights(gradients, penalty, 2000))


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


def test_other_functions_of_the_snr():
    """The baselines of the paper, as weights of a noise network: max(SNR, 1)/SNR, and P2's 1/(k + SNR)^γ."""
    path = VPPath()
    snr = np.asarray(path.snr(T))
    truncated, p2 = SNRWeight(lambda snr: jnp.maximum(snr, 1)), SNRWeight(lambda snr: snr / (1 + snr))
    np.testing.assert_allclose(truncated(path, NoisePrediction(), T), np.maximum(snr, 1) / snr, rtol=1e-10)
    np.testing.assert_allclose(p2(path, NoisePrediction(), T), 1 / (1 + snr), rtol=1e-10)
    np.testing.assert_allclose(SNRWeight(lambda snr: snr)(path, DataPrediction(), T), snr, rtol=1e-12)


def test_pareto_weights():
    """Two gradients in closed form; several against SciPy; the direction serves all; a large penalty gives equal weights."""
    first, second = np.array([2.0, 0.5]), np.array([-0.5, 1.0])
    share = np.clip((second - first) @ second / ((second - first) @ (second - first)), 0, 1)
    np.testing.assert_allclose(solved(jnp.stack([first, second]), 0.0), [share, 1 - share], atol=1e-8)
    np.testing.assert_allclose(solved(jnp.stack([first, 3 * first]), 0.0), [1, 0], atol=1e-8)

    gradients = np.random.default_rng(0).normal(size=(6, 40)) * np.array([1, 1, 2, 3, 5, 0.5])[:, None] + 0.3
    for penalty in (0.0, 4.0):
        weights = np.asarray(solved(jnp.asarray(gradients), penalty))
        value = lambda w, penalty=penalty: np.sum((w @ gradients) ** 2) + penalty * np.sum(w**2)  # noqa: E731
        simplex = {"type": "eq", "fun": lambda w: w.sum() - 1}
        best = minimize(value, np.full(6, 1 / 6), bounds=[(0, 1)] * 6, constraints=[simplex], method="SLSQP", tol=1e-12)
        np.testing.assert_allclose(value(weights), best.fun, rtol=1e-8)
        assert abs(weights.sum() - 1) < 1e-12
        if penalty == 0:
            direction = weights @ gradients
            assert np.all(gradients @ direction > (1 - 1e-6) * direction @ direction)
    np.testing.assert_allclose(solved(jnp.asarray(gradients), 1e8), 1 / 6, atol=1e-5)


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
