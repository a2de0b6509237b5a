"""Kinetic optimal paths: closed forms, the two-point data of the paper, optimality against perturbations, and their place in the path socket."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import DenoiserTerm, FlowMatchingPath, VPrediction, integrate
from ergodax.data import GaussianMixture, eight_gaussians
from ergodax.diffusion import DDIM, DenoisingLoss, log_snr_grid, uniform_grid
from ergodax.diffusion.kinetic_optimal_path import (
    TRIGONOMETRIC,
    KineticOptimalPath,
    SeparationMetric,
    VelocityMetric,
    fit_kinetic_optimal_path,
    kinetic_energy_density,
)
from ergodax.testing import assert_mean


Z = jnp.linspace(-10, 10, 601)
TIMES = jnp.linspace(0, 1, 11)


def posterior_variance(s):
    """1 - λ = E sech²(s (s + Z)) of the data -1 and +1. The trapezoidal rule is exact here to rounding."""
    density = jnp.exp(-(Z**2) / 2) / math.sqrt(2 * math.pi)
    return jnp.sum(density / jnp.cosh(jnp.clip(s * (s + Z), -300, 300)) ** 2) * (Z[1] - Z[0])


TWO_POINTS = SeparationMetric(lambda s: 1 - posterior_variance(s))


@pytest.fixture(scope="module")
def path():
    return jax.jit(lambda: fit_kinetic_optimal_path(TWO_POINTS, 1025))()


def energy(path, metric, n=400):
    """The midpoint rule in w, t = w³: even steps of θ at the data's far end, where θ ~ t^⅓."""
    w = (jnp.arange(n, dtype=float) + 0.5) / n
    return jnp.mean(jax.lax.map(lambda w: 3 * w**2 * kinetic_energy_density(path, metric, w**3), w))


def test_separated_data_give_the_straight_line():
    path = fit_kinetic_optimal_path(SeparationMetric(lambda s: 1 + 0 * s), 9)
    np.testing.assert_allclose(path.cone_angle, math.pi / 2, rtol=1e-14)
    np.testing.assert_allclose(path.kinetic_energy, 1, rtol=1e-14)
    for clock in ("alpha", "sigma", "d_alpha", "d_sigma"):
        np.testing.assert_allclose(getattr(path, clock)(TIMES), getattr(FlowMatchingPath(), clock)(TIMES), atol=1e-14)


@pytest.mark.parametrize("root", [0.9, 0.4])
def test_cone(root):
    """λ = 1 - (1 - m)/(1 + s²) with m constant: θ = φ/√m, and the energy flows at the constant rate 2 sin²(Φ/2)."""
    metric = SeparationMetric(lambda s: 1 - (1 - root**2) / (1 + s**2))
    path = fit_kinetic_optimal_path(metric, 5)
    cone, t = root * math.pi / 2, 0.3
    point = (1 - t) + t * np.exp(1j * cone)
    # 1 - λ is of the order of √eps at the last node, so m rounds to √eps there
    np.testing.assert_allclose(path.alpha(t), abs(point) * math.sin(np.angle(point) / root), rtol=1e-8)
    np.testing.assert_allclose(path.sigma(t), abs(point) * math.cos(np.angle(point) / root), rtol=1e-8)
    np.testing.assert_allclose(path.kinetic_energy, 2 * math.sin(cone / 2) ** 2, rtol=1e-8)
    density = jax.vmap(lambda t: kinetic_energy_density(path, metric, t))(TIMES[1:-1])
    np.testing.assert_allclose(density, path.kinetic_energy, rtol=1e-7)


def test_gaussian_data_cost_nothing():
    path = fit_kinetic_optimal_path(SeparationMetric(lambda s: s**2 / (1 + s**2)))
    assert path.kinetic_energy < (math.pi * 1e-3) ** 2 / 8 * 1.001
    np.testing.assert_allclose(path.alpha(TIMES) ** 2 + path.sigma(TIMES) ** 2, 1, atol=1e-5)


def test_two_points(path):
    """The numbers, computed apart from this code: Φ, KE by its formula and by quadrature along the clocks, and that of the straight line."""
    assert abs(path.cone_angle - 0.69126) < 1e-4
    assert abs(path.kinetic_energy - 0.22956) < 1e-4
    run = jax.jit(lambda path: energy(path, TWO_POINTS))
    assert abs(run(path) - 0.22956) < 1e-4
    assert abs(run(FlowMatchingPath()) - 0.49120) < 1e-4
    # no path moves N(0, 1) to the two points for less than their optimal transport
    assert path.kinetic_energy > 1 - math.sqrt(2 / math.pi)


def test_optimal_among_perturbed_paths(path):
    """The energy of (α + ε η, σ + ε ζ) has slope 0 at ε = 0 and is larger on both sides; about the straight line the slope is not 0."""
    n = 200
    w = (np.arange(n) + 0.5) / n
    t, weight = jnp.asarray(w**3), jnp.asarray(3 * w**2 / n)
    modes = math.pi * jnp.array([1.0, 2.0])
    bump, slope = jnp.sin(modes[:, None] * t), modes[:, None] * jnp.cos(modes[:, None] * t)

    @jax.jit
    def derivatives(path):
        clocks = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)

        def value(eps):
            alpha, sigma = clocks[0] + t * (eps[0] @ bump), clocks[1] + eps[1] @ bump
            d_alpha, d_sigma = clocks[2] + eps[0] @ (bump + t * slope), clocks[3] + eps[1] @ slope
            lost = jax.vmap(posterior_variance)(alpha / sigma) * (d_alpha - alpha * d_sigma / sigma) ** 2
            return jnp.sum(weight * (d_alpha**2 + d_sigma**2 - lost)) / 2

        zero, units = jnp.zeros((2, 2)), 0.02 * jnp.eye(4).reshape(4, 2, 2)
        return jax.value_and_grad(value)(zero), jax.lax.map(value, jnp.concatenate([units, -units]))

    (least, slopes), others = derivatives(path)
    assert jnp.abs(slopes).max() < 1e-3
    assert others.min() > least + 1e-4
    assert jnp.abs(derivatives(FlowMatchingPath())[0][1]).max() > 0.05


def test_clocks_are_consistent(path):
    """`time` inverts the log-SNR; derivatives are those of the clocks; the ends are exact, also in float32."""
    t, h = jnp.array([1e-6, 0.01, 0.2, 0.5, 0.9, 1 - 1e-9]), 1e-6
    clocks = jax.jit(lambda path, t: (path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t), path.time(path.log_snr(t))))
    alpha, sigma, d_alpha, d_sigma, back = clocks(path, t)
    np.testing.assert_allclose(back, t, rtol=1e-12)
    np.testing.assert_allclose(1 - back[-1], 1e-9, rtol=1e-6)
    after, before = (clocks(path, t + sign * h) for sign in (1, -1))
    for derivative, i in ((d_alpha, 0), (d_sigma, 1)):
        np.testing.assert_allclose(derivative[1:5], (after[i] - before[i])[1:5] / (2 * h), rtol=1e-5)
    for dtype in (jnp.float32, jnp.float64):
        alpha, sigma, *_, back = clocks(path, jnp.array([0.0, 1.0, 0.0, 1.0, 0.0, 1.0], dtype))
        np.testing.assert_array_equal(alpha[0], 0)
        np.testing.assert_array_equal(sigma[1], 0)
        np.testing.assert_array_equal(back[:2], [0, 1])
        assert alpha.dtype == sigma.dtype == back.dtype == dtype


def test_metric_of_a_data_set():
    """The mean over pairs against the quadrature, by z-scores; Gaussian data give 0; the energy within what 2000 pairs allow."""
    n = 2000
    data = jnp.where(jnp.arange(n)[:, None] % 2, 1.0, -1.0)
    noise = jax.random.normal(jax.random.key(0), (n, 1))
    denoised = GaussianMixture.isotropic(jnp.ones(2), jnp.array([[-1.0], [1.0]]), 0.0).denoiser(TRIGONOMETRIC)
    angles = jnp.array([0.2, 0.7, 1.2])
    single = jax.jit(jax.vmap(jax.vmap(lambda angle, x, z: VelocityMetric(denoised, x[None], z[None])(angle), (None, 0, 0)), (0, None, None)))
    assert_mean(single(angles, data, noise).T, jax.vmap(TWO_POINTS)(angles), z=4)
    path = jax.jit(lambda: fit_kinetic_optimal_path(VelocityMetric(denoised, data, noise), 65))()
    # m of relative error √(2/n) at each node, and dKE = sin Φ dΦ = sin Φ Φ dm/(2m)
    assert abs(path.kinetic_energy - 0.22956) < 4 * math.sin(0.691) * 0.691 / 2 * math.sqrt(2 / n)
    gaussian = GaussianMixture.isotropic(jnp.ones(1), jnp.zeros((1, 1)), 1.0)
    np.testing.assert_allclose(VelocityMetric(gaussian.denoiser(TRIGONOMETRIC), data, noise)(0.7), 0, atol=1e-28)


def test_ddim_and_the_objective_run_on_it(path):
    """The flow map depends on the SNR alone: DDIM at the same SNRs gives what it gives on the straight line. One line each."""
    mixture, straight = eight_gaussians(), FlowMatchingPath()
    x0 = jax.random.normal(jax.random.key(0), (16, 2))
    grid = uniform_grid(10)

    @jax.jit
    def run(path):
        same = path.time(straight.log_snr(grid))
        samples = integrate(DenoiserTerm(mixture.denoiser(path), path, same), DDIM(), x0)
        loss, _ = DenoisingLoss(path, VPrediction())(lambda t, x, args: jnp.zeros_like(x), x0, jax.random.key(2))
        return samples, loss, log_snr_grid(path, 8)

    (samples, loss, even), (expected, *_) = run(path), run(straight)
    np.testing.assert_allclose(samples, expected, atol=1e-9)
    assert jnp.isfinite(loss)
    assert jnp.all(jnp.diff(even) > 0)


def test_bad_arguments():
    with pytest.raises(ValueError, match="slopes"):
        KineticOptimalPath(jnp.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="slopes"):
        KineticOptimalPath(jnp.ones(1))
    with pytest.raises(ValueError, match="num_nodes"):
        fit_kinetic_optimal_path(TWO_POINTS, 1)
    with pytest.raises(ValueError, match="floor"):
        fit_kinetic_optimal_path(TWO_POINTS, floor=0.0)
