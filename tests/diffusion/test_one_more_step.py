"""One more step: the start has training's law, the mean that truncation lost comes back, and the network is trained as any other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import Denoiser, DenoiserTerm, FlowMatchingPath, VPPath, VPrediction, integrate
from ergodax.data import GaussianMixture
from ergodax.diffusion import ClassifierFreeGuidance, DenoisingLoss, DPMSolverPP2M, log_snr_grid
from ergodax.diffusion.one_more_step import OneMoreStep, noise_times
from ergodax.testing import assert_covariance, assert_mean


START, PATH = FlowMatchingPath(), VPPath()
FIRST = PATH.time(jnp.log(0.05 / 0.95))  # where α² = 0.05
N = 20000
NOISE = jax.random.normal(jax.random.key(0), (N, 2))


@pytest.mark.parametrize("noise_scale", [0.0, 0.6, 1.0])
def test_the_start_has_the_law_of_training(noise_scale):
    """Classes that are points: mean α x₁ and variance σ² about it, for every share of fresh noise; and how much of the noise is kept."""
    centres = jnp.array([[2.0, -1.0], [0.5, 3.0], [-2.0, 0.0]])
    psi = lambda t, x, label: -centres[label]  # noqa: E731
    step = OneMoreStep(Denoiser(psi, START, VPrediction()), PATH, noise_scale)
    labels = jnp.arange(N) % 3
    start = jax.vmap(step, in_axes=(0, None, 0, 0))(jax.random.split(jax.random.key(1), N), FIRST, NOISE, labels)
    centred = start - 0.05**0.5 * centres[labels]
    assert_mean(centred, 0.0)
    assert_covariance(centred, 0.95 * jnp.eye(2))
    assert_mean(centred * NOISE, (0.95 * (1 - noise_scale**2)) ** 0.5)
    if noise_scale == 0:
        np.testing.assert_allclose(centred, 0.95**0.5 * NOISE, atol=1e-12)


def test_identity_without_signal():
    """Where α = 0 nothing is missing: the start is the noise."""
    step = OneMoreStep(lambda t, x, args: 5 * jnp.ones_like(x), FlowMatchingPath())
    np.testing.assert_array_equal(step(jax.random.key(0), 0.0, NOISE), NOISE)


def test_the_mean_that_was_lost():
    """N(3, 1/2) from α² = 0.05: -0.480384 without, 0 with the step; the flow is exact, and a solver on the same grid follows it."""
    mean, variance, alpha, sigma = 3.0, 0.5, 0.05**0.5, 0.95**0.5
    spread = alpha**2 * variance + sigma**2

    def flow(x):
        return mean + (x - alpha * mean) * (variance / spread) ** 0.5

    assert_mean(flow(sigma * NOISE), mean - alpha * mean * (variance / spread) ** 0.5)
    np.testing.assert_allclose(-((variance * 0.05) ** 0.5) * mean / spread**0.5, -0.480384, rtol=1e-5)
    step = OneMoreStep(lambda t, x, args: jnp.full_like(x, mean), PATH)
    start = step(jax.random.key(1), FIRST, NOISE)
    assert_mean(flow(start), mean)
    assert_covariance(flow(start), variance * 0.95 / spread * jnp.eye(2))

    denoiser, end = GaussianMixture.isotropic([1.0], [[mean, mean]], variance**0.5).denoiser(PATH), 1 - 1e-4
    solve = jax.jit(lambda grid, x: integrate(DenoiserTerm(denoiser, PATH, grid), DPMSolverPP2M(), x))
    # The flow to where the grid ends, which the solver approaches with its order.
    last = PATH.alpha(end) * mean + (start[:50] - alpha * mean) * jnp.sqrt((PATH.alpha(end) ** 2 * variance + PATH.sigma(end) ** 2) / spread)
    errors = [np.abs(solve(log_snr_grid(PATH, n, FIRST, end), start[:50]) - last).max() for n in (60, 120)]
    assert abs(np.log2(errors[0] / errors[1]) - 2) < 0.1


def test_training():
    """At signal-to-noise ratio 0 the network sees the noise alone and is regressed on -x₁, so on minus the mean of the data of its condition."""
    data, labels = jax.random.normal(jax.random.key(2), (60, 2)) + 1, jnp.arange(60) % 2
    loss = DenoisingLoss(START, VPrediction(), times=noise_times)
    means = jnp.stack([data[labels == c].mean(0) for c in (0, 1)])

    @jax.jit
    @jax.value_and_grad
    def value(table):
        return loss(lambda t, x, label: table[label], (data, labels), jax.random.key(0))[0]

    least, slope = value(-means)
    np.testing.assert_allclose(slope, 0.0, atol=1e-12)
    np.testing.assert_allclose(least, np.mean((data - means[labels]) ** 2), rtol=1e-12)
    # What the network is shown is the noise as drawn: times 0 and unit variance.
    shown = jax.jit(lambda key: loss(lambda t, x, args: jnp.where(t == 0, x, jnp.inf), jnp.zeros((N, 1)), key)[0])(jax.random.key(0))
    assert abs(shown - 1) < 4.5 * (2 / N) ** 0.5


def test_guidance_of_the_step():
    """Classifier-free guidance with its own weight and prompt: D = D(∅) + w (D(c) - D(∅))."""
    psi = lambda t, x, label: -jnp.where(label == -1, 1.0, 3.0) * jnp.ones_like(x)  # noqa: E731
    guided = ClassifierFreeGuidance(Denoiser(psi, START, VPrediction()), 2.5)
    start = OneMoreStep(guided, PATH)(jax.random.key(0), FIRST, jnp.zeros(2), jnp.asarray(4))
    np.testing.assert_allclose(start, 0.05**0.5 * 6.0, rtol=1e-8)


def test_refusals():
    with pytest.raises(ValueError, match=r"`noise_scale` must lie in \[0, 1\], got 1.5"):
        OneMoreStep(lambda t, x, args: x, PATH, 1.5)
