"""DPM-Solver-2, LMS, SDE-DPM-Solver++: limits, ends of a path, marginals, both drivers. Numbers of k-diffusion: tests/golden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import CosinePath, DenoiserTerm, EDMPath, FlowMatchingPath, VPPath, integrate, with_noise
from ergodax.data import GaussianMixture
from ergodax.diffusion import DDIM, DPMSolverPP2M, log_snr_grid, uniform_grid
from ergodax.diffusion.dpm_solver_2 import DPMSolver2
from ergodax.diffusion.dpm_solver_pp_sde import DPMSolverPP2MSDE, DPMSolverPP3MSDE
from ergodax.diffusion.lms import LMS
from ergodax.testing import assert_covariance, assert_mean, check_drivers


MIXTURE = GaussianMixture.isotropic(jnp.array([0.3, 0.5, 0.2]), jnp.array([[1.0, 0.5], [-1.0, 0.2], [0.3, -1.2]]), jnp.array([0.4, 0.5, 0.3]))


def test_limits():
    path, grid = EDMPath(20.0), uniform_grid(8)  # to σ = 0
    y0, key = path.sigma(0.0) * jax.random.normal(jax.random.key(1), (16, 2)), jax.random.key(2)

    @jax.jit
    def ends(y0, key):
        term = DenoiserTerm(MIXTURE.denoiser(path), path, grid)
        return [integrate(term, solver, y0, key=key) for solver in (LMS(1), DDIM(), DPMSolverPP2MSDE(0.0), DPMSolverPP2M())]

    lms, ddim, sde, dpm = ends(y0, key)
    np.testing.assert_allclose(lms, ddim, atol=1e-12)
    np.testing.assert_allclose(sde, dpm, atol=1e-12)


def test_lms_on_a_linear_flow():
    """Where ε is a cubic in σ, four noises integrate it exactly: the whole error is that of the first three steps."""
    path = EDMPath(2.0)

    def denoised(t, x, args):  # x - σ ε with ε = 1 + σ - σ² + σ³/2
        sigma = path.sigma(t)
        return x - sigma * (1 + sigma - sigma**2 + sigma**3 / 2)

    grid = jnp.array([0.0, 0.1, 0.25, 0.4, 0.6, 0.7, 1.0])
    _, states = integrate(DenoiserTerm(denoised, path, grid), LMS(), jnp.array([0.3]), save=lambda t, y: y)
    sigma = path.sigma(grid)
    integral = sigma + sigma**2 / 2 - sigma**3 / 3 + sigma**4 / 8
    np.testing.assert_allclose(states[3:, 0] - states[2:-1, 0], integral[4:] - integral[3:-1], atol=1e-13)
    assert abs(states[1, 0] - states[0, 0] - integral[2] + integral[1]) > 1e-3


SOLVERS = [DPMSolver2, lambda path: LMS(), lambda path: DPMSolverPP2MSDE(), lambda path: DPMSolverPP3MSDE()]
each_solver = pytest.mark.parametrize("make", SOLVERS, ids=("DPM-Solver-2", "LMS", "2M-SDE", "3M-SDE"))


@each_solver
def test_whole_range_ends_on_the_data(make):
    """Finite, also the gradients; on a single point exactly that point. The noise-predicting two start after α = 0."""
    point = GaussianMixture(jnp.ones(1), jnp.array([[0.7, -0.3]]), jnp.zeros((1, 2, 2)))
    for path in (CosinePath() if make is SOLVERS[1] else FlowMatchingPath(),):
        solver = make(path)
        grid = uniform_grid(6, 0.01 if isinstance(solver, DPMSolver2 | LMS) else 0.0)

        def end(y0, path=path, solver=solver, grid=grid):
            y1 = integrate(DenoiserTerm(point.denoiser(path), path, grid), solver, y0, key=jax.random.key(0))
            return jnp.sum(y1**2), y1

        gradient, y1 = jax.jit(jax.grad(end, has_aux=True))(path.sigma(0.0) * jnp.array([0.4, 1.0]))
        assert bool(jnp.isfinite(gradient).all())
        np.testing.assert_allclose(y1, [0.7, -0.3], atol=1e-12)


@pytest.mark.parametrize("make", [DPMSolverPP2MSDE, DPMSolverPP3MSDE])
def test_variance_at_every_step(make):
    """On a Gaussian the steps are linear with noise, so 5000 draws have the marginal variance at each of 100 steps within z."""
    path, n, count = VPPath(), 100, 5000
    gaussian = GaussianMixture(jnp.ones(1), jnp.array([[0.5, -1.0]]), jnp.array([[[0.5, 0.2], [0.2, 0.3]]]))
    grid = log_snr_grid(path, n, 1e-3, 1 - 1e-3)
    start = path.sigma(grid[0]) * jax.random.normal(jax.random.key(0), (count, 2)) + path.alpha(grid[0]) * gaussian.sample(jax.random.key(7), count)
    term = DenoiserTerm(gaussian.denoiser(path), path, grid)

    def save(t, y):
        centred = y - jnp.mean(y, 0)
        return jnp.mean(y, 0), centred.T @ centred / count

    end, (means, covariances) = jax.jit(lambda key: integrate(term, make(), start, key=key, save=save))(jax.random.key(1))
    alpha, sigma = path.alpha(grid[1:]), path.sigma(grid[1:])
    truth = alpha[:, None, None] ** 2 * gaussian.covariance() + sigma[:, None, None] ** 2 * jnp.eye(2)
    spread = jnp.sqrt((truth**2 + jnp.einsum("nii,njj->nij", truth, truth)) / count)
    assert jnp.abs((covariances - truth) / spread).max() < 5.0  # of 300 numbers
    deviation = jnp.sqrt(jnp.einsum("nii->ni", truth) / count)
    assert jnp.abs((means - alpha[:, None] * gaussian.mean()) / deviation).max() < 5.0
    assert_mean(end, path.alpha(grid[-1]) * gaussian.mean())
    assert_covariance(end, truth[-1])


@each_solver
def test_both_drivers_agree(make):
    path, n = VPPath(), 12
    solver, y0 = make(path), jax.random.normal(jax.random.key(1), (32, 2))
    terms = DenoiserTerm(MIXTURE.denoiser(path), path, uniform_grid(n, 0.0, 0.99))
    terms = terms if isinstance(solver, DPMSolver2 | LMS) else with_noise(terms, jax.random.key(2), y0)
    check_drivers(terms, solver, y0)


def test_parameters_are_checked():
    for make, message in (
        (lambda: LMS(5), "`max_order` must be 1, 2, 3 or 4, got 5"),
        (lambda: DPMSolverPP2MSDE(-1.0), r"`eta` must lie in \[0, inf\), got -1.0"),
        (lambda: DPMSolverPP3MSDE(-1.0), "`eta`"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
