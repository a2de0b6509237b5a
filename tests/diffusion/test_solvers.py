"""Solvers on exact mixtures: order, both drivers, limits, and the papers' one-step formulas."""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import CosinePath, DenoiserTerm, EDMPath, FlowMatchingPath, VEPath, VPPath, integrate, with_noise
from ergodax.data import GaussianMixture
from ergodax.diffusion import DDIM, Ancestral, DPMSolverPP2M, EulerMaruyama, Heun, ReverseDiffusion, karras_grid, log_snr_grid, uniform_grid
from ergodax.testing import assert_covariance, assert_mean, check_drivers, convergence_order


_ANGLE = 0.4
_TURN = jnp.array([[jnp.cos(_ANGLE), -jnp.sin(_ANGLE)], [jnp.sin(_ANGLE), jnp.cos(_ANGLE)]])
MIXTURE = GaussianMixture(
    jnp.array([0.3, 0.5, 0.2]),
    jnp.array([[1.0, 0.5], [-1.0, 0.2], [0.3, -1.2]]),
    jnp.stack([_TURN @ jnp.diag(jnp.array(v)) @ _TURN.T for v in ([0.3, 0.05], [0.1, 0.2], [0.15, 0.15])]),
)
DETERMINISTIC = [dfx.Euler(), Heun(), DDIM(), DPMSolverPP2M()]
STOCHASTIC = [Ancestral(), Ancestral(0.5), EulerMaruyama(), EulerMaruyama(0.3), ReverseDiffusion()]


def term(path, grid):
    return DenoiserTerm(MIXTURE.denoiser(path), path, grid)


@eqx.filter_jit
def solve(path, solver, grid, y0, key=None):
    return integrate(term(path, grid), solver, y0, key=key)


# Grids whose ends have finite clocks, so that the whole solve has the solver's order; DPM-Solver++ is of order 2 in steps of λ.
CASES = [
    (VPPath(), lambda path, n: log_snr_grid(path, n, 0.05, 0.97)),
    (FlowMatchingPath(), lambda path, n: log_snr_grid(path, n, 0.05, 0.9)),
    (EDMPath(20.0), lambda path, n: karras_grid(path, n, 0.05, 20.0)[:-1]),
]


@functools.cache
def fine_solution(path, grid):
    """Starts, and where the flow takes them: an error 256 times smaller than the finest that is measured."""
    y0 = path.sigma(grid(path, 2)[0]) * jax.random.normal(jax.random.key(0), (64, 2))
    return y0, solve(path, Heun(), grid(path, 8192), y0)


@pytest.mark.parametrize(("solver", "order"), list(zip(DETERMINISTIC, (1, 2, 1, 2))), ids=("Euler", "Heun", "DDIM", "DPM++2M"))
@pytest.mark.parametrize(("path", "grid"), CASES, ids=("VP", "flow", "EDM"))
def test_order(path, grid, solver, order):
    """The regression over four doublings; its distance from the order is the next term of the error, which halves with each doubling."""
    counts = (64, 128, 256, 512)
    y0, fine = fine_solution(path, grid)
    errors = [float(jnp.sqrt(jnp.mean((solve(path, solver, grid(path, n), y0) - fine) ** 2))) for n in counts]
    assert abs(convergence_order(counts, errors) - order) < 0.15, errors
    assert type(solver)().order(None) == order


@pytest.mark.parametrize("solver", DETERMINISTIC + STOCHASTIC, ids=repr)
def test_both_drivers_agree(solver):
    path, n = VPPath(), 20
    model, y0 = term(path, uniform_grid(n, 0.0, 0.99)), jax.random.normal(jax.random.key(1), (32, 2))
    terms = with_noise(model, jax.random.key(2), y0) if solver in STOCHASTIC else model
    check_drivers(terms, solver, y0)


@pytest.mark.parametrize("path", [FlowMatchingPath(), EDMPath(20.0), CosinePath()], ids=repr)
@pytest.mark.parametrize("solver", [dfx.Euler(), Heun(), DDIM(), DPMSolverPP2M(), Ancestral()], ids=repr)
def test_whole_range_ends_on_the_data(path, solver):
    """From t = 0 to t = 1, where clocks are infinite: finite, also the gradients; on a single point exactly that point."""
    point = GaussianMixture(jnp.ones(1), jnp.array([[0.7, -0.3]]), jnp.zeros((1, 2, 2)))
    y0 = path.sigma(0.0) * jnp.array([0.4, 1.0])

    def end(y0):
        y1 = integrate(DenoiserTerm(point.denoiser(path), path, uniform_grid(5)), solver, y0, key=jax.random.key(0))
        return jnp.sum(y1**2), y1

    gradient, y1 = jax.jit(jax.grad(end, has_aux=True))(y0)
    assert bool(jnp.isfinite(gradient).all())
    assert bool(jnp.isfinite(y1).all())
    linear_in_time = not isinstance(path, CosinePath)
    if linear_in_time or not isinstance(solver, dfx.Euler | Heun):
        np.testing.assert_allclose(y1, [0.7, -0.3], atol=1e-13)


def test_limits():
    path, grid = VPPath(), uniform_grid(30, 0.0, 0.99)
    y0, key = jax.random.normal(jax.random.key(1), (16, 2)), jax.random.key(2)
    np.testing.assert_allclose(solve(path, Ancestral(0.0), grid, y0, key), solve(path, DDIM(), grid, y0), atol=1e-12)
    np.testing.assert_allclose(solve(path, EulerMaruyama(0.0), grid, y0, key), solve(path, dfx.Euler(), grid, y0), atol=1e-12)
    # On a path where both clocks are linear in t, DDIM is Euler's method.
    flow = FlowMatchingPath()
    np.testing.assert_allclose(solve(flow, DDIM(), uniform_grid(30), y0), solve(flow, dfx.Euler(), uniform_grid(30), y0), atol=1e-12)
    # DPM-Solver++(2M) has no history at the first step: one step is DDIM.
    np.testing.assert_allclose(solve(path, DPMSolverPP2M(), grid[:2], y0), solve(path, DDIM(), grid[:2], y0), atol=1e-13)


def one_step(path, solver, t0, t1, x, key):
    model = term(path, jnp.array([t0, t1]))
    terms = with_noise(model, key, x)
    z = terms.terms[1].contr(0.0, 1.0)
    return integrate(terms, solver, x), z


def test_papers_one_step_formulas():
    """Each stochastic solver against its paper's line, with the same noise."""
    x, key, t0, t1 = jnp.array([0.3, -0.8]), jax.random.key(5), 0.6, 0.63
    vp, ve = VPPath(), VEPath(0.01, 5.0)
    for path in (vp, ve):
        score = MIXTURE.score_at(path, t0, x)
        u, dt = 1 - t0, t1 - t0
        # Song et al. 2021, Euler–Maruyama on dx = [f - g² s] du + g dw, with du = -dt.
        beta = 0.1 + u * 19.9
        f, g2 = (-beta * x / 2, beta) if path is vp else (0 * x, path.sigma(t0) ** 2 * 2 * np.log(500.0))
        actual, z = one_step(path, EulerMaruyama(), t0, t1, x, key)
        np.testing.assert_allclose(actual, x - (f - g2 * score) * dt + jnp.sqrt(g2 * dt) * z, atol=1e-8)
        np.testing.assert_allclose(one_step(path, EulerMaruyama(0.0), t0, t1, x, key)[0], x - (f - g2 * score / 2) * dt, atol=1e-8)
    # Reverse diffusion, their eq. 46 and 48: VP with 1 - β = (α₀/α₁)², VE with G² = σ₀² - σ₁².
    beta = 1 - (vp.alpha(t0) / vp.alpha(t1)) ** 2
    actual, z = one_step(vp, ReverseDiffusion(), t0, t1, x, key)
    score = MIXTURE.score_at(vp, t0, x)
    np.testing.assert_allclose(actual, (2 - jnp.sqrt(1 - beta)) * x + beta * score + jnp.sqrt(beta) * z, atol=1e-10)
    g2 = ve.sigma(t0) ** 2 - ve.sigma(t1) ** 2
    actual, z = one_step(ve, ReverseDiffusion(), t0, t1, x, key)
    np.testing.assert_allclose(actual, x + g2 * MIXTURE.score_at(ve, t0, x) + jnp.sqrt(g2) * z, atol=1e-10)
    # Ancestral: VE as their eq. 47; VP as DDPM's posterior q(x₁ | x₀, D) (Ho et al. 2020, eq. 7).
    actual, z = one_step(ve, Ancestral(), t0, t1, x, key)
    spread = jnp.sqrt(ve.sigma(t1) ** 2 * g2 / ve.sigma(t0) ** 2)
    np.testing.assert_allclose(actual, x + g2 * MIXTURE.score_at(ve, t0, x) + spread * z, atol=1e-10)
    bar0, bar1, denoised = vp.alpha(t0) ** 2, vp.alpha(t1) ** 2, MIXTURE.denoised(vp, t0, x)
    mean = jnp.sqrt(bar1) * beta / (1 - bar0) * denoised + jnp.sqrt(1 - beta) * (1 - bar1) / (1 - bar0) * x
    actual, z = one_step(vp, Ancestral(), t0, t1, x, key)
    np.testing.assert_allclose(actual, mean + jnp.sqrt((1 - bar1) / (1 - bar0) * beta) * z, atol=1e-10)
    # DDIM with η = 0.5 (Song, Meng, Ermon 2021, eq. 12 and 16).
    actual, z = one_step(vp, Ancestral(0.5), t0, t1, x, key)
    s = 0.5 * jnp.sqrt((1 - bar1) / (1 - bar0) * (1 - bar0 / bar1))
    noise = (x - jnp.sqrt(bar0) * denoised) / jnp.sqrt(1 - bar0)
    np.testing.assert_allclose(actual, jnp.sqrt(bar1) * denoised + jnp.sqrt(1 - bar1 - s**2) * noise + s * z, atol=1e-10)


GAUSSIAN = GaussianMixture(jnp.ones(1), jnp.array([[0.5, -1.0]]), jnp.array([[[0.5, 0.2], [0.2, 0.3]]]))


@pytest.mark.parametrize("solver", STOCHASTIC, ids=repr)
@pytest.mark.parametrize("path", [VPPath(), VEPath(0.01, 20.0)], ids=("VP", "VE"))
def test_stochastic_solvers_keep_the_marginals(path, solver):
    """On Gaussian data every step is linear, so means and covariances follow an exact recursion; at a fine grid they end within z of the truth.

    The bias of 400 steps of a first-order method is a few 1e-3 of the variance, a fifth of the standard error of 8000 samples.
    """
    n, count = 400, 8000
    grid = log_snr_grid(path, n, 1e-3, 1 - 1e-3)
    start = path.sigma(grid[0]) * jax.random.normal(jax.random.key(0), (count, 2))
    start = start + path.alpha(grid[0]) * GAUSSIAN.sample(jax.random.key(7), count)

    @jax.jit
    def run(key):
        return integrate(DenoiserTerm(GAUSSIAN.denoiser(path), path, grid), solver, start, key=key)

    end = run(jax.random.key(1))
    marginal = path.alpha(grid[-1]) ** 2 * GAUSSIAN.covariance() + path.sigma(grid[-1]) ** 2 * jnp.eye(2)
    assert_mean(end, path.alpha(grid[-1]) * GAUSSIAN.mean())
    assert_covariance(end, marginal)


def test_parameters_are_checked():
    with pytest.raises(ValueError, match=r"`eta` must lie in \[0, inf\), got -1.0"):
        Ancestral(-1.0)
    with pytest.raises(ValueError, match="noise_scale"):
        EulerMaruyama(-0.1)
