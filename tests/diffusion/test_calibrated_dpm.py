"""Calibration: the loss falls by the squared shift, a planted bias goes, an exact model stays; the martingale behind it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import (
    CosinePath,
    DataPrediction,
    DenoiserTerm,
    EDMPrediction,
    FlowMatchingPath,
    NoisePrediction,
    ScorePrediction,
    VelocityPrediction,
    VPPath,
)
from ergodax.data import GaussianMixture
from ergodax.diffusion import DenoisingLoss
from ergodax.diffusion.calibrated_dpm import Calibrated, ClassShiftTable, ShiftTable, calibrate
from ergodax.testing import assert_mean


MIXTURE = GaussianMixture.isotropic([0.3, 0.7], [[1.0, 0.0], [-1.0, 0.5]], [0.3, 0.5])
TIMES = jnp.array([0.1, 0.4, 0.8])


def exact(path, prediction, bias=0.0):
    """The ideal network, plus a bias that varies with time."""
    return lambda t, x, args: prediction.from_denoised(path, t, x, MIXTURE.denoised(path, t, x)) + bias * (1 + t) * jnp.array([1.0, -2.0])


CASES = [
    (VPPath(), ScorePrediction()),
    (CosinePath(), NoisePrediction()),
    (FlowMatchingPath(), DataPrediction()),
    (FlowMatchingPath(), VelocityPrediction()),
    (CosinePath(), EDMPrediction()),
]


@pytest.mark.parametrize(("path", "prediction"), CASES, ids=repr)
def test_a_bias_is_found_and_an_exact_model_left(path, prediction):
    """Over 60 tables of 100 data each the shift is the planted bias, and 0 without one, within the tables' own spread."""
    data = MIXTURE.sample(jax.random.key(0), 6000).reshape(60, 100, 2)

    @jax.jit
    @jax.vmap
    def tables(data, key):
        return calibrate(exact(path, prediction, 0.3), path, prediction, data, TIMES, key).shift.values

    found = tables(data, jax.random.split(jax.random.key(1), 60))
    assert_mean(found, 0.3 * (1 + TIMES)[:, None] * jnp.array([1.0, -2.0]))


def test_the_loss_falls_by_the_squared_shift():
    """To rounding on the draws that made the table, both signs of each noise; in the mean on fresh ones."""
    path, prediction, t, key = VPPath(), ScorePrediction(), 0.4, jax.random.key(3)
    network = exact(path, prediction, 0.2)
    bias = jnp.array([1.0, -2.0]) * 0.2 * (1 + t)

    @jax.jit
    def losses(shift, data, noise):
        """Squared errors of the network and of the calibrated one, for every example."""
        models = network, Calibrated(network, lambda t, args: shift)
        target = prediction.target(path, t, data, noise)
        return [jnp.sum((model(t, path.interpolate(t, data, noise), None) - target) ** 2, axis=1) for model in models]

    data = MIXTURE.sample(jax.random.key(0), 50)
    shift = calibrate(network, path, prediction, data, jnp.array([t, 0.9]), key).shift(t)
    drawn = jax.random.normal(jax.random.split(key, 2)[0], (100,)).reshape(50, 2)
    before, after = losses(shift, jnp.concatenate([data, data]), jnp.concatenate([drawn, -drawn]))
    np.testing.assert_allclose(before.mean() - after.mean(), np.sum(shift**2), rtol=1e-10)
    before, after = losses(bias, MIXTURE.sample(jax.random.key(1), 20000), jax.random.normal(jax.random.key(2), (20000, 2)))
    assert_mean(before - after, np.sum(bias**2))


def test_scores_are_a_martingale():
    """E[(α_s ∇ log p_s(x_s) - α_t ∇ log p_t(x_t)) φ(x_t)] = 0, s nearer the data, for several φ; and the plain mean is 0 at every time."""
    path, s, t, n = VPPath(), 0.8, 0.5, 20000
    near = path.interpolate(s, MIXTURE.sample(jax.random.key(0), n), jax.random.normal(jax.random.key(1), (n, 2)))
    kept = path.alpha(t) / path.alpha(s)
    far = kept * near + jnp.sqrt(path.sigma(t) ** 2 - (kept * path.sigma(s)) ** 2) * jax.random.normal(jax.random.key(2), (n, 2))
    step = path.alpha(s) * MIXTURE.score_at(path, s, near) - path.alpha(t) * MIXTURE.score_at(path, t, far)
    tests = jnp.stack([jnp.ones(n), far[:, 0], far[:, 1] ** 2, jnp.tanh(far[:, 0] * far[:, 1])])
    assert_mean((step[:, None] * tests.T[..., None]), 0.0)
    assert_mean(MIXTURE.score_at(path, t, far), 0.0)


def test_classes_and_conditions():
    """Each class has its own shift; a class without data has none. As plain `args`, one shift for all."""
    path, prediction, key = VPPath(), NoisePrediction(), jax.random.key(0)
    labels = jnp.arange(400) % 2
    data = jnp.zeros((400, 3))

    def network(t, x, label):
        return x / path.sigma(t) + (label + 1).astype(x.dtype) * t

    calibrated = calibrate(network, path, prediction, data, TIMES, key, labels=labels, num_classes=3)
    assert isinstance(calibrated.shift, ClassShiftTable)
    np.testing.assert_allclose(calibrated.shift.table.values, TIMES[:, None, None] * jnp.array([1.0, 2.0, 0.0])[:, None] * jnp.ones(3), atol=1e-12)
    x = jnp.ones(3)
    np.testing.assert_allclose(calibrated(0.25, x, jnp.asarray(1)), x / path.sigma(0.25), rtol=1e-10)
    together = calibrate(network, path, prediction, data, TIMES, key, args=labels)
    np.testing.assert_allclose(together.shift.values, 1.5 * TIMES[:, None] * jnp.ones(3), rtol=1e-10)


def test_reading_a_table():
    table = ShiftTable(jnp.array([0.2, 0.4, 0.8]), jnp.array([[1.0], [3.0], [-1.0]]))
    read = [float(table(t)[0]) for t in (0.0, 0.2, 0.3, 0.4, 0.5, 0.8, 0.9)]
    np.testing.assert_allclose(read, [1, 1, 2, 3, 2, -1, -1], rtol=1e-12)
    assert Calibrated(lambda t, x, args: x, table)(0.3, jnp.ones(1, jnp.float32)).dtype == jnp.float32


def test_in_losses_and_samplers():
    """A learned shift: at the exact network's planted bias the loss is stationary in the shift. A calibrated denoiser is one like any other."""
    path, prediction = FlowMatchingPath(), DataPrediction()
    network = exact(path, prediction, 0.3)
    loss = DenoisingLoss(path, prediction, times=lambda key, n: jnp.full(n, 0.5))
    data = MIXTURE.sample(jax.random.key(0), 4000)

    def value(shift, x1, key):
        return loss(Calibrated(network, lambda t, args: shift), x1[None], key)[0]

    slopes = jax.jit(jax.vmap(jax.grad(value), in_axes=(None, 0, 0)))(jnp.array([0.45, -0.9]), data, jax.random.split(jax.random.key(1), len(data)))
    assert_mean(slopes, 0.0)
    calibrated = calibrate(network, path, prediction, data[:20], TIMES, jax.random.key(2))
    posterior = DenoiserTerm(calibrated, path, TIMES).vf(0, data[0], None)
    np.testing.assert_allclose(posterior.denoised, network(0.1, data[0], None) - calibrated.shift.values[0], rtol=1e-12)


def test_refusals():
    network = lambda t, x, args: x  # noqa: E731
    args = network, VPPath(), NoisePrediction()
    with pytest.raises(ValueError, match="both `labels` and `num_classes`"):
        calibrate(*args, jnp.zeros((4, 2)), TIMES, jax.random.key(0), labels=jnp.zeros(4, int))
    with pytest.raises(ValueError, match=r"`data` must have shape \(n, \*example\), got \(4,\)"):
        calibrate(*args, jnp.zeros(4), TIMES, jax.random.key(0))
    with pytest.raises(ValueError, match="`times` must increase strictly"):
        ShiftTable(jnp.array([0.5, 0.2]), jnp.zeros((2, 1)))
    with pytest.raises(ValueError, match="`values` must have 3 rows"):
        ShiftTable(TIMES, jnp.zeros((2, 1)))
