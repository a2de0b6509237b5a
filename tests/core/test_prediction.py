"""Every parametrisation, both ways, on every path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import (
    CosinePath,
    DataPrediction,
    Denoiser,
    EDMInput,
    EDMPath,
    EDMPrediction,
    FlowMatchingPath,
    NoisePrediction,
    ProbabilityFlow,
    ScorePrediction,
    SubVPPath,
    VelocityPrediction,
    VEPath,
    VPPath,
    VPrediction,
)
from ergodax.data import eight_gaussians


PATHS = [FlowMatchingPath(), VPPath(), SubVPPath(), VEPath(), EDMPath(), CosinePath()]
PREDICTIONS = [DataPrediction(), NoisePrediction(), ScorePrediction(), VelocityPrediction(), VPrediction(), EDMPrediction(0.7)]
DATA, NOISE = jax.random.normal(jax.random.key(0), (2, 5))


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=repr)
def test_both_ways(path, prediction):
    for t in (0.05, 0.5, 0.9):
        x = path.interpolate(t, DATA, NOISE)
        value = prediction.target(path, t, DATA, NOISE)
        scale = float(jnp.abs(x).max()) / float(path.alpha(t))
        np.testing.assert_allclose(prediction.to_denoised(path, t, x, value), DATA, atol=1e-13 * scale)
        np.testing.assert_allclose(prediction.from_denoised(path, t, x, DATA), value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("prediction", [DataPrediction(), VelocityPrediction(), VPrediction(), EDMPrediction(0.7)], ids=repr)
def test_exact_where_alpha_is_zero(prediction):
    path, t = FlowMatchingPath(), 0.0
    value = prediction.target(path, t, DATA, NOISE)
    np.testing.assert_allclose(prediction.to_denoised(path, t, NOISE, value), DATA, atol=1e-14)
    np.testing.assert_allclose(prediction.from_denoised(path, t, NOISE, DATA), value, atol=1e-14)


def test_exact_where_sigma_is_zero():
    path, t = FlowMatchingPath(), 1.0
    for prediction in (DataPrediction(), NoisePrediction(), VelocityPrediction(), VPrediction(), EDMPrediction(0.7)):
        np.testing.assert_allclose(prediction.to_denoised(path, t, DATA, prediction.target(path, t, DATA, NOISE)), DATA, atol=1e-14)


def test_noise_from_data_where_alpha_is_zero():
    """The noise is known at α = 0 even though it says nothing of the data: no 0/0."""
    np.testing.assert_array_equal(NoisePrediction().from_denoised(FlowMatchingPath(), 0.0, NOISE, DATA), NOISE)
    np.testing.assert_array_equal(ScorePrediction().from_denoised(FlowMatchingPath(), 0.0, NOISE, DATA), -NOISE)


def test_papers_formulas():
    path, t = VPPath(), 0.4
    alpha, sigma = path.alpha(t), path.sigma(t)
    np.testing.assert_allclose(VPrediction().target(path, t, DATA, NOISE), alpha * NOISE - sigma * DATA)
    np.testing.assert_allclose(ScorePrediction().target(path, t, DATA, NOISE), -NOISE / sigma)
    np.testing.assert_allclose(VelocityPrediction().target(FlowMatchingPath(), t, DATA, NOISE), DATA - NOISE)
    edm, s, sd = EDMPath(10.0), 6.0, 0.7
    x = edm.interpolate(0.4, DATA, NOISE)
    denoised = sd**2 / (s**2 + sd**2) * x + s * sd / np.sqrt(s**2 + sd**2) * NOISE
    np.testing.assert_allclose(EDMPrediction(sd).to_denoised(edm, 0.4, x, NOISE), denoised, rtol=1e-12)


def test_edm_input_scales_to_unit_variance():
    path, sd, x = VPPath(), 0.7, jnp.ones(2)
    s = path.sigma(0.3) / path.alpha(0.3)
    np.testing.assert_allclose(EDMInput(lambda c, x, args: c * jnp.ones(2), path, sd)(0.3, x), jnp.log(s) / 4, rtol=1e-12)
    np.testing.assert_allclose(EDMInput(lambda c, x, args: x, path, sd)(0.3, x), 1 / path.alpha(0.3) / jnp.sqrt(s**2 + sd**2), rtol=1e-12)
    assert bool(jnp.isfinite(EDMInput(lambda c, x, args: c + x, EDMPath(), sd)(1.0, x)).all())


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_denoiser_and_flow_on_an_exact_target(path):
    """A network that predicts the exact score becomes the exact denoiser and the exact velocity."""
    mixture, t = eight_gaussians(), 0.6
    x = path.sigma(t) * jnp.array([0.3, -1.1])
    denoised = Denoiser(lambda t, x, args: mixture.score_at(path, t, x), path, ScorePrediction())
    np.testing.assert_allclose(denoised(t, x, None), mixture.denoised(path, t, x), rtol=1e-9)
    np.testing.assert_allclose(ProbabilityFlow(denoised, path)(t, x, None), mixture.velocity_at(path, t, x), rtol=1e-9)


def test_edm_data_std_is_checked():
    with pytest.raises(ValueError, match="data_std"):
        EDMPrediction(0.0)
