"""CVDM: the schedule's identities, the path per pixel under stock solvers, the released sampler's products, and joint learning in miniature."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ergodax.core import Denoiser, DenoiserTerm, NoisePrediction, VPPath, fit, integrate
from ergodax.data import GaussianMixture
from ergodax.diffusion import DDIM, Ancestral, log_snr_grid, uniform_grid
from ergodax.diffusion.cvdm import CVDM, CVDMLoss, CVDMSchedule, LevelInput, MonotoneNetwork, VanishingAtData
from ergodax.testing import assert_mean


RATES = jnp.array([0.5, 1.0, 1.7])
MEAN, STD = jnp.array([0.5, -1.0, 0.2]), jnp.array([0.1, 0.6, 1.3])


def vp_integral(u):
    return 0.1 * u + 9.95 * u**2


def linear_tau(u):
    return 0.1 + 19.9 * u


def raw(rates):
    """The inverse of softplus."""
    return lambda condition: jnp.log(jnp.expm1(rates))


def exact_noise(t, z, args):
    """E[ε | z] for independent pixels N(MEAN, STD²)."""
    gamma = args[1]
    return jnp.sqrt(1 - gamma) * (z - jnp.sqrt(gamma) * MEAN) / (gamma * STD**2 + 1 - gamma)


def test_discrete_product():
    """γ_200 = Π_{j<=200} (1 - β(j/1000)/1000) of the linear schedule, and its continuous counterpart at u = 0.201."""
    schedule = CVDMSchedule(raw(jnp.ones(1)), vp_integral, linear_tau)
    product, path = schedule.product_path(None, 1000), schedule.path(None)
    assert abs(product.gamma(0.8)[0] - 0.656611) < 1e-6
    assert abs(path.gamma(1 - 0.201)[0] - 0.655675) < 1e-6
    np.testing.assert_allclose(product.gamma(0.8), np.prod(1 - (0.1 + 19.9 * np.arange(201) / 1000) / 1000), rtol=1e-12)
    # between two nodes log γ is linear
    np.testing.assert_allclose(product.log_alpha(0.7985), (product.log_alpha(0.798) + product.log_alpha(0.799)) / 2, rtol=1e-12)


def test_every_pixel_is_a_vp_path():
    """γ = exp(-λ R) with VP's R is VP with λ β: clocks, inverse, DDIM under stock grids."""
    path = CVDMSchedule(raw(RATES), vp_integral, gamma_min=1e-30, gamma_max=1.0).path(None)
    grid = uniform_grid(8, 0.01, 0.98)

    @jax.jit
    def elementwise(z):
        model = Denoiser(LevelInput(exact_noise, path), path, NoisePrediction())
        t = jnp.asarray(0.3)
        clocks = path.alpha(t), path.sigma(t), path.log_snr(t), path.diffusion(t), path.time(path.log_snr(t))
        return integrate(DenoiserTerm(model, path, grid), DDIM(), z), clocks

    @jax.jit
    def alone(rate, mean, std, z):
        vp = VPPath(0.1 * rate, 20.0 * rate)
        model = GaussianMixture.isotropic(jnp.ones(1), mean[None, None], std).denoiser(vp)
        t = jnp.asarray(0.3)
        clocks = vp.alpha(t), vp.sigma(t), vp.log_snr(t), vp.diffusion(t), t
        return integrate(DenoiserTerm(model, vp, grid), DDIM(), z[None])[0], clocks

    z = jnp.array([1.3, -0.4, 0.8])
    expected = jax.vmap(alone)(RATES, MEAN, STD, z)
    for a, b in zip(jax.tree.leaves(elementwise(z)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)
    # the inverse, with its derivative, under a stock grid of one pixel
    single = CVDMSchedule(raw(jnp.asarray(1.7)), vp_integral, gamma_min=1e-30, gamma_max=1.0).path(None)
    vp = VPPath(0.17, 34.0)
    np.testing.assert_allclose(log_snr_grid(single, 6, 0.1, 0.9), log_snr_grid(vp, 6, 0.1, 0.9), rtol=1e-12)
    np.testing.assert_allclose(jax.grad(single.time)(0.5), jax.grad(vp.time)(0.5), rtol=1e-9)


def ancestral_law(path, grid):
    """Mean and variance of each pixel after Gaussian posterior steps with the exact model, from N(0, σ²)."""
    alpha, sigma = (np.asarray(clock) for clock in jax.jit(jax.vmap(lambda t: (path.alpha(t), path.sigma(t))))(grid))
    mean, variance = np.zeros(3), sigma[0] ** 2
    for a0, a1, s0, s1 in zip(alpha, alpha[1:], sigma, sigma[1:]):
        total, fresh = a0**2 * STD**2 + s0**2, 1 - (a0 * s1 / (a1 * s0)) ** 2
        gain = (np.sqrt(1 - fresh) * s1 * s0 + a1 * a0 * STD**2) / total
        mean, variance = gain * mean + (a1 - gain * a0) * MEAN, gain**2 * variance + s1**2 * fresh
    return mean, variance


def test_product_path_samples_the_data():
    """The released ancestral sampler with the exact model, T = 60, against its law in closed form, which nears the data's."""
    n, steps = 2000, 60
    schedule = CVDMSchedule(raw(RATES), vp_integral, linear_tau)
    path, grid = schedule.product_path(None, steps), uniform_grid(steps - 1, 1 / steps)

    @jax.jit
    def sample(key):
        first, second = jax.random.split(key)
        model = Denoiser(lambda t, z, args: jax.vmap(lambda z: LevelInput(exact_noise, path)(t, z))(z), path, NoisePrediction())
        return integrate(DenoiserTerm(model, path, grid), Ancestral(), path.prior(first, (n, 3)), key=second)

    samples = sample(jax.random.key(0))
    mean, variance = ancestral_law(path, grid)
    assert_mean(samples, mean, z=4)
    assert_mean((samples - mean) ** 2, variance, z=4)
    finer = ancestral_law(schedule.product_path(None, 16 * steps), uniform_grid(16 * steps - 1, 1 / (16 * steps)))[1]
    np.testing.assert_allclose(finer, STD**2, rtol=0.02, atol=1e-3)


def schedule_residual(schedule, t=0.4):
    """The schedule's term of the loss less its boundary terms."""
    model = CVDM(exact_noise, schedule)
    loss = CVDMLoss(times=lambda key, n: jnp.full(n, t))
    terms = loss(model, (jnp.zeros((1, 3)), jnp.zeros((1, 1))), jax.random.key(0))[1]
    path = schedule.path(None)
    return terms["schedule"] - jnp.mean((path.gamma(1 - 1e-3) - 1) ** 2 + path.gamma(1e-3) ** 2), terms


def test_terms_of_the_loss():
    """With τ = R' the equation dγ/du = -β γ holds; all terms against their formulas."""
    integral = VanishingAtData(MonotoneNetwork(key=jax.random.key(1)))
    assert abs(jax.jit(lambda: schedule_residual(CVDMSchedule(raw(RATES), integral)))()[0]) < 1e-20
    rest, terms = jax.jit(lambda: schedule_residual(CVDMSchedule(raw(RATES), vp_integral, lambda u: 2 * linear_tau(u))))()
    u = 0.6
    gamma, beta = np.exp(-RATES * vp_integral(u)), RATES * linear_tau(u)
    np.testing.assert_allclose(rest, np.mean((beta * gamma) ** 2), rtol=1e-9)
    np.testing.assert_allclose(terms["curvature"], 1e-3 * np.mean(((beta**2 - RATES * 19.9) * gamma) ** 2), rtol=1e-9)
    end = np.clip(np.exp(-RATES * vp_integral(1 - 1e-3)), 1e-6, 1)
    np.testing.assert_allclose(terms["prior"], np.mean(-end - np.log(1 - end)) / 2, rtol=1e-9)


def test_monotone_network():
    u, evaluate = jnp.linspace(0, 1, 50), jax.jit(lambda network, u: network(u))
    for seed in range(3):
        network = MonotoneNetwork(0.2, 3.0, key=jax.random.key(seed))
        perturbed = jax.tree.map(lambda leaf: leaf + jax.random.normal(jax.random.key(9), leaf.shape), network)
        for candidate in (network, perturbed):
            values = evaluate(candidate, u)
            assert values[0] > 0
            assert jnp.all(jnp.diff(values) > 0)
            assert VanishingAtData(candidate)(jnp.zeros(())) == 0
        np.testing.assert_allclose(network(jnp.zeros(())), 0.2, rtol=1e-12)


class PixelRate(eqx.Module):
    weight: jax.Array

    def __call__(self, condition):
        return self.weight


def test_the_schedule_is_learned():
    """Pixels of small and large posterior variance, exact noise model: the ends come right, and the two get different schedules."""
    first, second = jax.random.split(jax.random.key(0))
    integral, tau = VanishingAtData(MonotoneNetwork(width=8, key=first)), MonotoneNetwork(0.1, 8.0, 8, key=second)
    model = CVDM(exact_noise, CVDMSchedule(PixelRate(jnp.zeros(3)), integral, tau))

    def batch(key, step):
        return MEAN + STD * jax.random.normal(key, (32, 3)), jnp.zeros((32, 1))

    with jax.numpy_dtype_promotion("standard"):
        run = eqx.filter_jit(lambda model: fit(CVDMLoss(), model, optax.adam(3e-2), batch, jax.random.key(1), num_steps=300, every=50))
        fitted = run(model)
    metrics = fitted.metrics
    assert metrics["prior"][-1] < 1e-3
    assert metrics["schedule"][-1] < metrics["schedule"][0] / 20
    schedule = fitted.model.schedule
    gamma = jax.vmap(schedule.path(None).gamma)(jnp.linspace(0, 1, 30))
    assert jnp.all(jnp.diff(gamma, axis=0) >= 0)
    assert gamma[0].max() < 1e-2
    assert gamma[-1].min() > 1 - 1e-4
    scale = schedule.scale(None)
    # the vaguer a pixel, the faster it may be noised
    assert scale[0] < scale[1] < scale[2]


def test_float32_and_bad_arguments():
    schedule = CVDMSchedule(lambda condition: jnp.zeros(2, jnp.float32), vp_integral)
    path = schedule.path(None)
    t = jnp.asarray(0.3, jnp.float32)
    assert {path.alpha(t).dtype, path.sigma(t).dtype, path.time(path.log_snr(t)).dtype, schedule.beta(None, t).dtype} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(path.time(path.log_snr(t)), 0.3, rtol=1e-5)
    with pytest.raises(ValueError, match="pair"):
        CVDMLoss()(CVDM(exact_noise, schedule), jnp.zeros((2, 3)), jax.random.key(0))
    with pytest.raises(ValueError, match="margin"):
        CVDMLoss(margin=0.6)
    with pytest.raises(ValueError, match="curvature"):
        CVDMLoss(curvature=-1.0)
    with pytest.raises(ValueError, match="num_steps"):
        schedule.product_path(None, 1)
    with pytest.raises(ValueError, match="gamma_min"):
        CVDMSchedule(raw(RATES), vp_integral, gamma_min=0.0)
    with pytest.raises(ValueError, match="slope"):
        MonotoneNetwork(0.1, 0.0, key=jax.random.key(0))
