"""Geometric view: mean shift, Euler's identity, ascent, straightness, the law of the denoising trajectory, and what a jump is worth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import DenoiserTerm, EDMPath, VPPath, integrate
from ergodax.data import GaussianMixture
from ergodax.diffusion import DDIM, Ancestral, Heun, karras_grid, log_snr_grid
from ergodax.diffusion.geometric_view_ode_jump import (
    EmpiricalDenoiser,
    chord_deviation,
    denoiser_deviation,
    mean_shift,
    ode_jump,
    trajectories,
)


DIM, STEPS, COUNT = 64, 60, 200
PATH = EDMPath(80.0)


@functools.cache
def data():
    """200 points about five centres."""
    key_centre, key_noise = jax.random.split(jax.random.key(0))
    centres = jax.random.normal(key_centre, (5, DIM))
    return jnp.repeat(centres, 40, axis=0) + 0.3 * jax.random.normal(key_noise, (COUNT, DIM))


@functools.cache
def run():
    """States and denoised states of 200 chains, (60, 200, 64) each, from σ = 80 down to 0.002; and the chains' last Euler step to 0."""
    denoised = EmpiricalDenoiser(data(), PATH)
    grid = karras_grid(PATH, STEPS, 0.002, 80.0)[:-1]
    start = 80.0 * jax.random.normal(jax.random.key(1), (COUNT, DIM))
    states, denoised_states = jax.jit(lambda x: jax.vmap(lambda x: trajectories(DenoiserTerm(denoised, PATH, grid), DDIM(), x), out_axes=1)(x))(start)
    return grid, states, denoised_states


def test_mean_shift_is_the_posterior_mean():
    """Against the definition in NumPy, and against the mixture of point masses, on another path too."""
    points = np.asarray(data())[::7, :5]
    x = np.linspace(-1, 1, 5)
    for bandwidth in (0.3, 2.0, 50.0):
        weight = np.exp(-((points - x) ** 2).sum(1) / (2 * bandwidth**2))
        expected = weight @ points / weight.sum()
        np.testing.assert_allclose(mean_shift(jnp.asarray(x), jnp.asarray(points), bandwidth), expected, atol=1e-12)
    cloud = GaussianMixture.isotropic(jnp.ones(len(points)), jnp.asarray(points), 0.0)
    for path in (VPPath(), EDMPath(20.0)):
        for t in (0.2, 0.7, 0.95):
            actual = EmpiricalDenoiser(jnp.asarray(points), path)(t, jnp.asarray(x), None)
            np.testing.assert_allclose(actual, cloud.denoised(path, t, jnp.asarray(x)), atol=1e-12)
    nearest = points[((points - x) ** 2).sum(1).argmin()]
    np.testing.assert_allclose(mean_shift(jnp.asarray(x), jnp.asarray(points), 0.0), nearest, atol=1e-15)
    image = jnp.asarray(points[:, :4]).reshape(-1, 2, 2)
    np.testing.assert_allclose(mean_shift(jnp.zeros((2, 2)), image, 1.0).ravel(), mean_shift(jnp.zeros(4), image.reshape(-1, 4), 1.0), atol=1e-15)


def test_euler_is_a_convex_combination():
    grid, states, denoised = run()
    levels = PATH.sigma(grid)[:, None, None]
    share = levels[1:] / levels[:-1]
    expected = share * states[:-1] + (1 - share) * denoised[:-1]
    np.testing.assert_allclose(states[1:], expected, atol=1e-11)


def test_mean_shift_ascends_the_density():
    """No violation in 60 steps of 200 chains; log densities are right to rounding of the exponent, |x|²/(2σ²)."""
    grid, states, denoised = run()
    cloud = GaussianMixture.isotropic(jnp.ones(COUNT), data(), 0.0)
    before, after = jax.jit(lambda *node: jax.lax.map(lambda n: [cloud.log_prob_at(PATH, n[0], x) for x in n[1:]], node))(grid, states, denoised)
    gain = np.asarray(after - before)
    assert gain.min() > -1e-9 * np.abs(np.asarray(before)).max()
    assert gain[:30].min() > 1


def test_straight_and_on_the_shell():
    grid, states, _ = run()
    deviation = jax.vmap(chord_deviation, 1)(states)
    assert deviation.shape == (COUNT, STEPS)
    assert float(deviation.max()) < 0.03
    assert float(deviation.max()) > 0.003
    # E|x|² = d σ² + m² for states of the exact flow; the 200 norms scatter by √(2/d) of their square.
    shell = DIM * PATH.sigma(grid) ** 2 + jnp.mean(jnp.sum(data() ** 2, 1))
    ratio = jnp.mean(jnp.sum(states**2, -1), 1) / shell
    np.testing.assert_allclose(ratio[:40], 1, atol=4.5 * np.sqrt(2 / DIM / COUNT) + 0.03)
    angle = jnp.linspace(0, jnp.pi, 9)
    np.testing.assert_allclose(jnp.max(chord_deviation(jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1))), 0.5, atol=1e-12)


def mmd2(x, y, bandwidth):
    def mean_kernel(a, b):
        square = jnp.sum(a**2, 1)[:, None] + jnp.sum(b**2, 1) - 2 * a @ b.T
        return jnp.mean(jnp.exp(-square / (2 * bandwidth**2)))

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def test_jump():
    """At step 30 the denoised state is far nearer to the sample than the state; near σ = 10 its law is farther, for all r are near the mean."""
    grid, states, denoised = run()
    bandwidth, end = 0.6 * DIM**0.5, denoised[-1]
    assert mmd2(denoised[30], end, bandwidth) < mmd2(states[30], end, bandwidth) / 5
    distance = [float(jnp.mean(jnp.linalg.norm(z[30] - end, axis=-1))) for z in (denoised, states)]
    assert distance[0] < distance[1] / 5
    early = int(jnp.argmin(jnp.abs(PATH.sigma(grid) - 10)))
    assert mmd2(denoised[early], end, bandwidth) > mmd2(states[early], end, bandwidth)


def test_attraction_to_a_data_point_needs_the_last_step():
    _, states, denoised = run()
    nearest = jax.vmap(lambda x: jnp.min(jnp.linalg.norm(data() - x, axis=1)))
    assert float(nearest(denoised[-1]).max()) < 1e-6
    # 200 chains share the 64 coordinates' worth of noise σ_min √d = 0.016 at the last state.
    np.testing.assert_allclose(jnp.mean(nearest(states[-1])), 0.016, rtol=0.35)


def test_denoising_trajectory_follows_the_curvature():
    """dr/dσ = -σ x'', by central differences along a finely solved flow."""
    few = data()[::10, :3]
    sigma = jnp.linspace(0.8, 0.4, 401)
    term = DenoiserTerm(EmpiricalDenoiser(few, PATH), PATH, 1 - sigma / 80.0)
    x0 = jnp.array([0.9, -0.6, 1.2])
    states, denoised = jax.jit(lambda x: trajectories(term, Heun(), x))(x0)
    # Heun's error is the same smooth curve to h²; differences of it are as small.
    h = sigma[1] - sigma[0]
    slope = (denoised[2:] - denoised[:-2]) / (2 * h)
    velocity = (states - denoised) / sigma[:, None]
    curvature = (velocity[2:] - velocity[:-2]) / (2 * h)
    assert float(jnp.abs(slope).max()) > 0.1
    np.testing.assert_allclose(slope, -sigma[1:-1, None] * curvature, atol=1e-5)


@pytest.mark.parametrize("solver", [DDIM(), Ancestral()], ids=repr)
def test_jump_is_a_row_of_the_denoising_trajectory(solver):
    """On VP, with a batch; and with DDIM it is the last step of a grid that goes to clean data."""
    mixture, path = GaussianMixture.isotropic(jnp.ones(2), jnp.array([[1.0, 0.0], [-1.0, 0.5]]), 0.3), VPPath()
    grid = log_snr_grid(path, 8, 0.05, 0.95)
    term = DenoiserTerm(mixture.denoiser(path), path, grid)
    x, key = jax.random.normal(jax.random.key(3), (16, 2)), jax.random.key(4)
    states, denoised = trajectories(term, solver, x, key=key)
    assert states.shape == denoised.shape == (9, 16, 2)
    np.testing.assert_allclose(ode_jump(term, solver, x, num_steps=5, key=key), denoised[5], atol=1e-12)
    np.testing.assert_allclose(states[-1], integrate(term, solver, x, key=key), atol=1e-12)
    if isinstance(solver, DDIM):
        clean = DenoiserTerm(term.denoised, path, jnp.append(grid[:6], 1.0))
        np.testing.assert_allclose(ode_jump(term, solver, x, num_steps=5), integrate(clean, solver, x), atol=1e-12)


def test_denoiser_deviation():
    grid, states, _ = run()
    optimal = EmpiricalDenoiser(data(), PATH)

    def wrong(t, x, args):
        return optimal(t, x, args) + PATH.sigma(t) / (8.0 * (1 + PATH.sigma(t) ** 2))

    deviation = denoiser_deviation(wrong, optimal, grid, states[:, 0])
    levels = PATH.sigma(grid)
    np.testing.assert_allclose(deviation, levels / (1 + levels**2), rtol=1e-9)


def test_parameters_are_checked():
    path = EDMPath(80.0)
    term = DenoiserTerm(EmpiricalDenoiser(jnp.zeros((4, 2)), path), path, jnp.linspace(0.0, 0.9, 5))
    with pytest.raises(ValueError, match="`num_steps` must be at most 4"):
        ode_jump(term, DDIM(), jnp.zeros(2), num_steps=5)
    with pytest.raises(ValueError, match="`num_steps` must be an integer of at least 1"):
        ode_jump(term, DDIM(), jnp.zeros(2), num_steps=0)
    with pytest.raises(ValueError, match=r"`data` must have shape \(n, \*\(3,\)\)"):
        mean_shift(jnp.zeros(3), jnp.zeros((4, 2)), 1.0)
