"""Ambient diffusion: the clean model from noisy data, in closed form and on draws; its two ends; what few clean data among noisy ones are worth."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ergodax.core import (
    CosinePath,
    DataPrediction,
    EDMPath,
    FlowMatchingPath,
    NoisePrediction,
    ScorePrediction,
    VelocityPrediction,
    VPPath,
)
from ergodax.data import GaussianMixture
from ergodax.diffusion import DenoisingLoss, Immiscible, MinSNR
from ergodax.diffusion.ambient_diffusion_scaling import AmbientLoss, noise_level_time
from ergodax.testing import assert_mean


LEVEL = 0.3
CLEAN = GaussianMixture.isotropic([0.4, 0.6], [[-1.0], [0.7]], [0.3, 0.5])
NOISY = GaussianMixture([0.4, 0.6], [[-1.0], [0.7]], [[0.09 + LEVEL**2], [0.25 + LEVEL**2]])


def minimiser(path, prediction, t, x):
    """argmin over c of E[ambient loss of a network that returns c | x_t = x] with noisy data alone, through the loss's own code.

    Given x_t, y is a mixture; the loss is quadratic in it, so three Gauss-Hermite nodes per component are exact.
    """
    place, total = x / path.alpha(t), (path.sigma(t) / path.alpha(t)) ** 2
    added = total - LEVEL**2
    spread = NOISY.variances[:, 0]
    weight = NOISY.weights * jnp.exp(-((place - NOISY.means[:, 0]) ** 2) / (2 * (spread + added))) / jnp.sqrt(spread + added)
    mean = NOISY.means[:, 0] + spread / (spread + added) * (place - NOISY.means[:, 0])
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(3)
    data = (mean[:, None] + jnp.sqrt(spread * added / (spread + added))[:, None] * nodes).reshape(-1, 1, 1)
    weight = (weight[:, None] * node_weights).reshape(-1)

    def value(c, y):
        base = DenoisingLoss(
            path, prediction, times=lambda key, n: jnp.full(n, t), coupling=lambda key, y, noise, args: (place - y) / jnp.sqrt(added)
        )
        return AmbientLoss(base)(lambda t, x, args: jnp.full_like(x, c), (y, jnp.full(1, LEVEL)), jax.random.key(0))[0]

    total = lambda c: weight @ jax.vmap(lambda y: value(c, y))(data)  # noqa: E731
    return -jax.grad(total)(0.0) / jax.hessian(total)(0.0)


CASES = [
    (EDMPath(2.0), DataPrediction(), 0.5),
    (VPPath(), NoisePrediction(), 0.6),
    (CosinePath(), ScorePrediction(), 0.5),
    (FlowMatchingPath(), VelocityPrediction(), 0.4),
]


@pytest.mark.parametrize(("path", "prediction", "t"), CASES, ids=repr)
def test_noisy_data_give_the_clean_model(path, prediction, t):
    xs = jnp.linspace(-2.0, 2.0, 9) * path.alpha(t)
    found = jax.jit(jax.vmap(lambda x: minimiser(path, prediction, t, x)))(xs)
    exact = prediction.from_denoised(path, t, xs[:, None], CLEAN.denoised(path, t, xs[:, None]))[:, 0]
    np.testing.assert_allclose(found, exact, rtol=1e-9, atol=1e-10)


def test_slope_of_a_linear_denoiser():
    """Data of variance 1.3 seen at noise 0.5, σ_t = 1: slope v/(v + σ_t²) = 0.5652; regression on the noisy data themselves would give 0.6739."""
    n, path = 100000, EDMPath(2.0)
    clean, noise = jax.random.normal(jax.random.key(0), (2, n, 1, 1))
    noisy = jnp.sqrt(1.3) * clean + 0.5 * noise
    loss = AmbientLoss(DenoisingLoss(path, DataPrediction(), times=lambda key, n: jnp.full(n, 0.5)))

    def value(slope, y, key):
        return loss(lambda t, x, args: slope * x, (y, jnp.full(1, 0.5)), key)[0]

    both = jax.jit(jax.vmap(lambda y, key: (jax.grad(value)(1.3 / 2.3, y, key), jax.grad(jax.grad(value))(0.0, y, key))))
    gradient, curvature = both(noisy, jax.random.split(jax.random.key(1), n))
    assert_mean(gradient, 0.0)
    assert abs(1.3 / 2.3 - np.mean(gradient) / np.mean(curvature) - 0.5652) < 0.015


def test_clean_data_give_the_loss_itself():
    data, labels, key = CLEAN.sample(jax.random.key(0), 16), jnp.arange(16.0) % 3, jax.random.key(1)
    network = lambda t, x, label: jnp.sin(x + t) * label  # noqa: E731
    base = DenoisingLoss(CosinePath(), NoisePrediction(), weight=MinSNR(), coupling=Immiscible(), label_dropout=0.4)
    ambient = AmbientLoss(base)(network, (data, jnp.zeros(16), labels), key)[0]
    np.testing.assert_allclose(ambient, base(network, (data, labels), key)[0], rtol=1e-12)


def test_data_noisier_than_the_time_count_nothing():
    """At and below the datum's own noise the value and every gradient are 0; above it they are not."""
    path = EDMPath(2.0)
    data = jnp.array([[0.3, -1.0]])

    def value(scale, level, t):
        loss = AmbientLoss(DenoisingLoss(path, VelocityPrediction(), times=lambda key, n: jnp.full(n, t)))
        return loss(lambda t, x, args: scale * x, (data, jnp.full(1, level)), jax.random.key(0))[0]

    for t in (0.75, 0.9):
        assert value(0.7, 0.5, t) == 0
        np.testing.assert_array_equal(jax.grad(value, argnums=(0, 1, 2))(0.7, 0.5, t), 0.0)
    assert value(0.7, 0.5, 0.7) > 0
    assert all(np.isfinite(jax.grad(value, argnums=(0, 1, 2))(0.7, 0.5, 0.7)))


def test_time_of_a_noise_level():
    for path in (EDMPath(2.0), VPPath(), FlowMatchingPath()):
        t = noise_level_time(path, 0.3)
        np.testing.assert_allclose(path.sigma(t) / path.alpha(t), 0.3, rtol=1e-10)
    with pytest.raises(ValueError, match="`noise_level` must lie in"):
        noise_level_time(VPPath(), 0.0)


def test_what_noisy_data_are_worth():
    """A denoiser with free means, 300 data at noise 0.2: 10 % clean among noisy beats the same 10 % clean alone, and all clean beats every other.

    RMSE of the means over 40 seeds: 0.026, 0.033 and 0.011. (The card has 0.034, 0.053 and 0.017, in
    the same order, for another dimension and budget.)
    """
    seeds, n, level, steps, path = 40, 300, 0.2, 100, EDMPath(1.0)
    truth = jnp.array([[-1.0], [0.0], [1.0]])

    def log_uniform(key, n):
        return 1 - 0.02 ** jax.random.uniform(key, (n,))

    loss = AmbientLoss(DenoisingLoss(path, DataPrediction(), times=log_uniform, weight=lambda path, prediction, t: 1 / path.sigma(t) ** 2))
    optimiser = optax.adam(optax.linear_schedule(0.03, 0.0, steps))

    def one(clean, key):
        key_data, key_noise, key_start, key_fit = jax.random.split(key, 4)
        start = truth + 0.1 * jax.random.normal(key_start, truth.shape)
        data = GaussianMixture.isotropic(jnp.ones(3), truth, 0.1).sample(key_data, n)
        # "Alone": the first tenth ten times over, so that all runs have one shape.
        alone = clean < 0
        data = jnp.where(alone, jnp.tile(data[: n // 10], (10, 1)), data)
        levels = jnp.where(alone | (jnp.arange(n) < clean * n), 0.0, level)
        data = data + levels[:, None] * jax.random.normal(key_noise, data.shape)

        def value(means, key):
            return loss(GaussianMixture.isotropic(jnp.ones(3), means, 0.1).denoiser(path), (data, levels), key)[0]

        def step(carry, key):
            means, state = carry
            update, state = optimiser.update(jax.grad(value)(means, key), state)
            return (means + update, state), None

        (means, _), _ = jax.lax.scan(step, (start, optimiser.init(start)), jax.random.split(key_fit, steps))
        return jnp.sqrt(jnp.mean((means - truth) ** 2))

    kinds = jnp.repeat(jnp.array([0.1, -1.0, 1.0]), seeds)
    keys = jnp.tile(jax.random.split(jax.random.key(0), seeds), 3)
    with jax.numpy_dtype_promotion("standard"):
        mixed, alone, full = np.asarray(jax.jit(jax.vmap(one))(kinds, keys)).reshape(3, seeds)
    gap = alone - mixed
    assert gap.mean() > 4 * gap.std(ddof=1) / seeds**0.5
    assert (mixed - full).mean() > 4 * (mixed - full).std(ddof=1) / seeds**0.5


def test_refusals():
    loss = AmbientLoss(DenoisingLoss(VPPath(), NoisePrediction()))
    network = lambda t, x, args: x  # noqa: E731
    with pytest.raises(ValueError, match=r"must be \(data, noise_level\)"):
        loss(network, jnp.zeros((3, 2)), jax.random.key(0))
    with pytest.raises(ValueError, match=r"noise levels must have shape \(3,\).*got \(2,\)"):
        loss(network, (jnp.zeros((3, 2)), jnp.zeros(2)), jax.random.key(0))
    with pytest.raises(ValueError, match="`noise_level` must lie in"):
        loss(network, (jnp.zeros((3, 2)), jnp.array([0.1, -0.1, 0.0])), jax.random.key(0))
