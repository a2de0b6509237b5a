"""Paths against the papers' own definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import AffinePath, CosinePath, EDMPath, FlowMatchingPath, SubVPPath, VEPath, VPPath
from ergodax.testing import assert_mean, count_traces


PATHS = [FlowMatchingPath(), FlowMatchingPath(0.05), VPPath(), SubVPPath(), VEPath(), EDMPath(), CosinePath(), CosinePath(0.0)]
TIMES = jnp.linspace(0.01, 0.99, 13)


def betas_integral(t, beta_min=0.1, beta_max=20.0, n=20001):
    """∫₀ᵘ β by the trapezoidal rule, exact for a linear β."""
    u = np.linspace(0, 1 - t, n)
    return np.trapezoid(beta_min + u * (beta_max - beta_min), u)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_clocks_agree_with_each_other(path):
    np.testing.assert_allclose(path.log_alpha(TIMES), jnp.log(path.alpha(TIMES)), atol=1e-13)
    np.testing.assert_allclose(path.log_sigma(TIMES), jnp.log(path.sigma(TIMES)), atol=1e-13)
    np.testing.assert_allclose(path.time(path.log_snr(TIMES)), TIMES, atol=1e-13)
    h = 1e-6
    for clock, derivative in (
        (path.alpha, path.d_alpha),
        (path.sigma, path.d_sigma),
        (path.log_alpha, path.d_log_alpha),
        (path.log_sigma, path.d_log_sigma),
    ):
        difference = (clock(TIMES + h) - clock(TIMES - h)) / (2 * h)
        np.testing.assert_allclose(derivative(TIMES), difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_diffusion_is_that_of_the_forward_sde(path):
    """g² = dσ²/du - 2 f σ² with u = 1 - t and f = d log α/du (Itô, for x_u = α x + σ noise)."""
    h = 1e-6
    d_sigma2 = -(path.sigma(TIMES + h) ** 2 - path.sigma(TIMES - h) ** 2) / (2 * h)
    drift = -(path.log_alpha(TIMES + h) - path.log_alpha(TIMES - h)) / (2 * h)
    np.testing.assert_allclose(path.diffusion(TIMES), d_sigma2 - 2 * drift * path.sigma(TIMES) ** 2, rtol=1e-6)


def test_papers_definitions():
    t = 0.3
    b, beta = betas_integral(t), 0.1 + 0.7 * 19.9
    np.testing.assert_allclose(VPPath().alpha(t), np.exp(-b / 2), rtol=1e-9)
    np.testing.assert_allclose(VPPath().sigma(t) ** 2, 1 - np.exp(-b), rtol=1e-9)
    np.testing.assert_allclose(VPPath().diffusion(t), beta, rtol=1e-9)
    np.testing.assert_allclose(SubVPPath().sigma(t), 1 - np.exp(-b), rtol=1e-9)
    np.testing.assert_allclose(SubVPPath().diffusion(t), beta * (1 - np.exp(-2 * b)), rtol=1e-9)
    np.testing.assert_allclose(VEPath().sigma(t), 0.01 * (50 / 0.01) ** 0.7, rtol=1e-12)
    np.testing.assert_allclose(VEPath().diffusion(t), VEPath().sigma(t) ** 2 * 2 * np.log(50 / 0.01), rtol=1e-12)
    np.testing.assert_allclose(EDMPath(80.0).sigma(t), 80 * 0.7)
    np.testing.assert_allclose(CosinePath().alpha(t) ** 2, (np.cos(0.708 / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)) ** 2, rtol=1e-12)
    np.testing.assert_allclose(CosinePath().alpha(t) ** 2 + CosinePath().sigma(t) ** 2, 1, rtol=1e-12)
    np.testing.assert_allclose(FlowMatchingPath(0.1).sigma(t), 1 - 0.9 * t)


@pytest.mark.parametrize("path", [FlowMatchingPath(), CosinePath(), EDMPath()], ids=repr)
def test_ends_are_exact(path):
    zero, one = jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32)
    assert path.sigma(one) == 0
    assert path.log_sigma(one) == -jnp.inf
    if not isinstance(path, EDMPath):
        assert path.alpha(zero) == 0
        assert path.log_alpha(zero) == -jnp.inf


@pytest.mark.parametrize("path", [VPPath(), CosinePath(), SubVPPath()], ids=repr)
def test_float32_keeps_small_noise(path):
    """log σ near the data, where 1 - α² would have lost every digit."""
    t = 1 - 2.0**-17
    np.testing.assert_allclose(path.log_sigma(jnp.float32(t)), path.log_sigma(jnp.float64(t)), atol=2e-3 if isinstance(path, CosinePath) else 1e-5)
    assert path.log_sigma(jnp.float32(t)).dtype == jnp.float32


def test_parameters_sweep_in_one_trace():
    counted, traces = count_traces(lambda beta, t: VPPath(0.1, beta).log_snr(t))
    run = jax.jit(jax.vmap(counted, in_axes=(0, None)))
    together = run(jnp.array([5.0, 20.0]), TIMES)
    run(jnp.array([6.0, 21.0]), TIMES)
    assert traces() == 1
    np.testing.assert_allclose(together, [VPPath(0.1, 5.0).log_snr(TIMES), VPPath(0.1, 20.0).log_snr(TIMES)], rtol=1e-12)


def test_interpolate_and_prior():
    path: AffinePath = VEPath()
    assert path.interpolate(0.5, jnp.ones(3), jnp.full(3, 2.0)).shape == (3,)
    np.testing.assert_allclose(path.interpolate(0.5, jnp.ones(3), jnp.full(3, 2.0)), 1 + 2 * path.sigma(0.5))
    draws = path.prior(jax.random.key(0), (20000,))
    assert_mean(draws**2, 50.0**2)
    assert path.prior(jax.random.key(0), (3,), jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VPPath(-1.0), r"`beta_min` must lie in \[0, inf\), got -1.0"),
        (lambda: VEPath(sigma_min=0.0), r"`sigma_min` must lie in \(0, inf\), got 0.0"),
        (lambda: EDMPath(-3.0), "sigma_max"),
        (lambda: FlowMatchingPath(1.0), r"`sigma_min` must lie in \[0, 1\), got 1.0"),
        (lambda: CosinePath(-0.1), "offset"),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()
