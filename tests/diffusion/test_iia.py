"""IIA: the fit against a loop of its own, the card's gains over DDIM, limits, variants, both drivers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import DenoiserTerm, EDMPath, VPPath, integrate
from ergodax.data import GaussianMixture
from ergodax.diffusion import DDIM, DPMSolverPP2M, Heun, karras_grid, log_snr_grid, uniform_grid
from ergodax.diffusion.iia import IIA, fit_iia, heun_update, noise_update
from ergodax.testing import check_drivers


PATH = VPPath()
MIXTURE = GaussianMixture.isotropic(jnp.array([0.3, 0.5, 0.2]), jnp.array([[1.0, 0.5], [-1.0, 0.2], [0.3, -1.2]]), jnp.array([0.4, 0.5, 0.3]))
CENTRED = GaussianMixture.isotropic([1.0], [[0.0, 0.0]], 0.5)


def model(n, mixture=MIXTURE):
    return DenoiserTerm(mixture.denoiser(PATH), PATH, uniform_grid(n, 0.0, 1 - 1e-3))


def normal(seed, count):
    return jax.random.normal(jax.random.key(seed), (count, 2))


fit = eqx.filter_jit(fit_iia)


@eqx.filter_jit
def solve(term, solver, y0):
    return integrate(term, solver, y0)


def test_fit_solves_the_papers_least_squares():
    """Step by step in NumPy: residuals orthogonal to both terms, and never larger than DDIM's; the first step uncorrected."""
    n, z = 8, np.asarray(normal(0, 20))
    term = model(n)
    coefficients = np.asarray(fit(term, jnp.asarray(z)).coefficients)
    assert coefficients.shape == (n, 2)
    np.testing.assert_array_equal(coefficients[0], 0)
    assert np.abs(coefficients).max() < 100  # the second step's two terms are collinear
    before = None
    for i in range(n):
        t, s = term.grid[i], term.grid[i + 1]
        data = np.asarray(MIXTURE.denoised(PATH, t, jnp.asarray(z)))
        noise = (z - np.asarray(PATH.alpha(t)) * data) / np.asarray(PATH.sigma(t))
        plain = np.asarray(PATH.alpha(s)) * data + np.asarray(PATH.sigma(s)) * noise
        target = np.asarray(integrate(DenoiserTerm(term.denoised, PATH, jnp.linspace(t, s, 11)), DDIM(), jnp.asarray(z)))
        if before is None:
            z = plain
        else:
            terms = np.stack([data - before[0], noise - before[1]])
            z = plain + np.tensordot(coefficients[i], terms, 1)
            residual = target - z
            cosines = np.abs((terms * residual).sum((1, 2))) / (np.linalg.norm(terms, axis=(1, 2)) * np.linalg.norm(residual))
            # The terms are differences, 1e-3 of what they are made of, and nearly collinear: rounding comes back 1e6 times larger (2e-9 seen).
            assert cosines.max() < 2e-8
            solved = np.linalg.lstsq(terms.reshape(2, -1).T, (target - plain).ravel(), rcond=1e-8)[0]
            np.testing.assert_allclose(z - plain, np.tensordot(solved, terms, 1), rtol=0, atol=1e-10)
            assert np.mean(residual**2) < np.mean((target - plain) ** 2)
        before = data, noise


@pytest.mark.parametrize(("n", "bound"), [(8, 0.70), (16, 0.35)])
def test_gain_over_ddim(n, bound):
    """Fitted on 20 starts, the end-point error of 2000 fresh ones is 0.56 (8 steps) and 0.24 (16) of DDIM's on the card's mixture."""
    term, fresh = model(n), normal(5, 2000)
    exact = solve(DenoiserTerm(term.denoised, PATH, log_snr_grid(PATH, 1000, 0.0, 1 - 1e-3)), Heun(), fresh)
    error, ddim = (float(jnp.sqrt(jnp.mean((solve(term, solver, fresh) - exact) ** 2))) for solver in (fit(term, normal(0, 20)), DDIM()))
    assert error < bound * ddim, error / ddim


@pytest.mark.parametrize(("substeps", "bound"), [(10, 0.13), (100, 0.02)])
def test_what_the_reference_leaves(substeps, bound):
    """On centred Gaussian data both terms are multiples of z, so each step is as good as its reference: 1/M of DDIM's error remains."""
    term, y0 = model(8, CENTRED), normal(1, 20)
    (a0, s0), (a1, s1) = ((PATH.alpha(t), PATH.sigma(t)) for t in (term.grid[0], term.grid[-1]))
    exact = y0 * jnp.sqrt((0.25 * a1**2 + s1**2) / (0.25 * a0**2 + s0**2))
    solver = fit(term, normal(0, 20), num_substeps=substeps)
    error, ddim = (float(jnp.sqrt(jnp.mean((solve(term, s, y0) - exact) ** 2))) for s in (solver, DDIM()))
    assert 0.3 / substeps < error / ddim < bound, error / ddim


def test_limits():
    """Zeros are DDIM, or Heun, to the rounding of six steps (two programs do not round alike); DPM-Solver++(2M) is a point of the family."""
    term, y0 = model(6), normal(3, 16)
    assert IIA(jnp.zeros((6, 2))).order(None) == 1
    np.testing.assert_allclose(solve(term, IIA(jnp.zeros((6, 2))), y0), solve(term, DDIM(), y0), rtol=0, atol=1e-14)
    edm = EDMPath(20.0)
    on_edm = DenoiserTerm(MIXTURE.denoiser(edm), edm, karras_grid(edm, 6, 0.05, 20.0))
    ends = [solve(on_edm, solver, 20 * y0) for solver in (IIA(jnp.zeros((6, 2)), heun_update), Heun())]
    np.testing.assert_allclose(*ends, rtol=0, atol=2e-13)  # which starts at 20
    h = PATH.log_snr(term.grid[1:]) / 2 - PATH.log_snr(term.grid[:-1]) / 2
    weights = jnp.append(0.0, PATH.alpha(term.grid[2:]) * -jnp.expm1(-h[1:]) * h[1:] / (2 * h[:-1]))
    point = IIA(jnp.stack([weights, jnp.zeros(6)], axis=1))
    np.testing.assert_allclose(solve(term, point, y0), solve(term, DPMSolverPP2M(), y0), atol=1e-12)


def test_variants():
    """IIA-EDM beats Heun, IIA-DPM-Solver++ DPM-Solver++, the single noise term DDIM; each at equal network calls on fresh starts."""
    edm, fresh = EDMPath(20.0), normal(7, 500)
    on_edm = DenoiserTerm(MIXTURE.denoiser(edm), edm, karras_grid(edm, 6, 0.05, 20.0))
    on_vp = model(8)
    fine = (
        solve(DenoiserTerm(on_edm.denoised, edm, karras_grid(edm, 500, 0.05, 20.0)), Heun(), 20 * fresh),
        solve(DenoiserTerm(on_vp.denoised, PATH, log_snr_grid(PATH, 1000, 0.0, 1 - 1e-3)), Heun(), fresh),
    )

    def error(term, solver):
        start, exact = (20 * fresh, fine[0]) if term is on_edm else (fresh, fine[1])
        return float(jnp.sqrt(jnp.mean((solve(term, solver, start) - exact) ** 2)))

    starts = normal(0, 50)
    assert error(on_edm, fit(on_edm, 20 * starts, update=heun_update, reference=Heun())) < 0.9 * error(on_edm, Heun())
    assert error(on_vp, fit(on_vp, starts, reference=DPMSolverPP2M())) < 0.9 * error(on_vp, DPMSolverPP2M())
    single = fit(on_vp, starts, update=noise_update, differences=False)
    assert single.coefficients.shape == (8, 1)
    assert error(on_vp, single) < error(on_vp, DDIM())


def test_one_argument_per_start():
    """Along `args_axis`; arguments that are all the same give the same fit."""
    term, starts = model(4), normal(0, 20)
    shifted = DenoiserTerm(lambda t, x, args: term.denoised(t, x - args, None) + args, PATH, term.grid)
    apart = fit(shifted, starts, jnp.full((20, 2), 0.3), args_axis=0)
    np.testing.assert_allclose(apart.coefficients, fit(shifted, starts, jnp.full(2, 0.3)).coefficients, rtol=1e-9)
    other = fit(shifted, starts, jnp.linspace(-1, 1, 40).reshape(20, 2), args_axis=0)
    assert jnp.abs(other.coefficients - apart.coefficients).max() > 1e-3


def test_both_drivers_agree():
    n = 5
    term, y0 = model(n), normal(1, 32)
    solver = IIA(jnp.linspace(-0.1, 0.1, 2 * n).reshape(n, 2))
    check_drivers(term, solver, y0)


def test_parameters_are_checked():
    with pytest.raises(ValueError, match="`num_substeps` must be an integer of at least 1, got 0"):
        fit_iia(model(3), normal(0, 4), num_substeps=0)
