"""Clocks of interpolants: table values, ends, derivatives, and the affine path as a special case."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import CosinePath, FlowMatchingPath, ProbabilityFlow, SubVPPath, VPPath
from ergodax.transport import (
    AffineInterpolant,
    BrownianBridgeGamma,
    EncoderDecoderInterpolant,
    LinearInterpolant,
    MixtureInterpolantFields,
    SineSquaredGamma,
    TrigonometricInterpolant,
    VariancePreservingInterpolant,
    ZeroGamma,
)


INTERPOLANTS = [
    LinearInterpolant(),
    LinearInterpolant(SineSquaredGamma(0.7)),
    TrigonometricInterpolant(BrownianBridgeGamma(2.0)),
    VariancePreservingInterpolant(),
    EncoderDecoderInterpolant(),
]
GAMMAS = [BrownianBridgeGamma(2.0), SineSquaredGamma(0.7), ZeroGamma()]
name = lambda module: type(module).__name__  # noqa: E731


def test_shares_at_one_time():
    # t = 0.3 and 0.8: the table of the paper by hand
    t = np.array([0.3, 0.8])
    cos, sin = np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)
    rest = np.sqrt(1 - t * (1 - t))
    expected = [
        (1 - t, t, np.sqrt(t * (1 - t))),
        (1 - t, t, 0.7 * np.sin(np.pi * t) ** 2),
        (cos, sin, np.sqrt(2 * t * (1 - t))),
        (rest * cos, rest * sin, np.sqrt(t * (1 - t))),
        (np.cos(np.pi * t) ** 2 * [1, 0], np.cos(np.pi * t) ** 2 * [0, 1], np.sin(np.pi * t) ** 2),
    ]
    for interpolant, (source, target, gamma) in zip(INTERPOLANTS, expected, strict=True):
        np.testing.assert_allclose(interpolant.source_share(t), source, rtol=1e-13)
        np.testing.assert_allclose(interpolant.target_share(t), target, rtol=1e-13)
        np.testing.assert_allclose(interpolant.gamma(t), gamma, rtol=1e-13)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("interpolant", INTERPOLANTS, ids=name)
def test_ends_are_exact_and_dtype_is_kept(interpolant, dtype):
    ends = jnp.array([0, 1], dtype)
    for clock, expected in [(interpolant.source_share, [1, 0]), (interpolant.target_share, [0, 1]), (interpolant.gamma, [0, 0])]:
        assert clock(ends).dtype == dtype
        np.testing.assert_array_equal(clock(ends), expected)


@pytest.mark.parametrize("interpolant", INTERPOLANTS, ids=name)
def test_time_derivative(interpolant):
    x0, x1, z = jax.random.normal(jax.random.key(0), (3, 4))
    for t in (0.2, 0.7):
        step = 1e-6
        difference = (interpolant.interpolate(t + step, x0, x1, z) - interpolant.interpolate(t - step, x0, x1, z)) / (2 * step)
        np.testing.assert_allclose(interpolant.d_interpolate(t, x0, x1, z), difference, rtol=1e-8)


@pytest.mark.parametrize("gamma", GAMMAS, ids=name)
def test_gamma_square_and_product(gamma):
    t = jnp.linspace(0.05, 0.95, 7)
    np.testing.assert_allclose(gamma.square(t), gamma(t) ** 2, rtol=1e-13)
    np.testing.assert_allclose(gamma.product(t), gamma(t) * gamma.derivative(t), rtol=1e-12, atol=1e-15)


def test_bridge_product_at_the_ends():
    # ½ d/dt a t(1 - t) = ±a/2, though γ' is infinite
    np.testing.assert_allclose(BrownianBridgeGamma(3.0).product(jnp.array([0.0, 1.0])), [1.5, -1.5])


@pytest.mark.parametrize("path", [FlowMatchingPath(0.1), VPPath(), SubVPPath(), CosinePath()], ids=name)
def test_affine_path_with_gaussian_source(path, mixtures):
    """The same x_t, and its exact velocity is the path's probability flow."""
    interpolant, target = AffineInterpolant(path), mixtures[1]
    t, x = jnp.array(0.6), jnp.array([0.3, -0.5])
    noise, data = jax.random.normal(jax.random.key(0), (2, 2))
    np.testing.assert_allclose(interpolant.interpolate(t, noise, data, data), path.interpolate(t, data, noise), rtol=1e-14)

    fields = MixtureInterpolantFields(interpolant, jnp.ones(1), jnp.zeros((1, 2)), jnp.ones(1), *target)
    tweedie = lambda t, x, args: (x + path.sigma(t) ** 2 * jax.grad(fields.log_prob, 1)(t, x)) / path.alpha(t)  # noqa: E731
    velocity, flow = jax.jit(lambda t, x: (fields.velocity(t, x), ProbabilityFlow(tweedie, path)(t, x)))(t, x)
    np.testing.assert_allclose(velocity, flow, rtol=1e-10)


def test_bad_scale_is_refused():
    with pytest.raises(ValueError, match="scale"):
        BrownianBridgeGamma(-1.0)
