"""USF: its points against named solvers and formulas, orders of its decisions, ends of a path, both drivers. (More points: tests/golden.)"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import CosinePath, DenoiserTerm, EDMPath, FlowMatchingPath, VPPath, integrate
from ergodax.data import GaussianMixture
from ergodax.diffusion import DDIM, DPMSolverPP2M, log_snr_grid, uniform_grid
from ergodax.diffusion.dpm_solver_2 import DPMSolver2
from ergodax.diffusion.usf_s3 import USF, Relaxation
from ergodax.testing import check_drivers


MIXTURE = GaussianMixture.isotropic(jnp.array([0.3, 0.5, 0.2]), jnp.array([[1.0, 0.5], [-1.0, 0.2], [0.3, -1.2]]), jnp.array([0.4, 0.5, 0.3]))


@eqx.filter_jit
def solve(path, solver, grid, y0, mixture=MIXTURE):
    return integrate(DenoiserTerm(mixture.denoiser(path), path, grid), solver, y0)


def decisions(num_steps, order, *, noise=False, corrector=0, depth=5):
    """One Taylor order at every step, unrelaxed; `corrector` is 1 for one of an order more."""
    orders, none = jnp.minimum(jnp.arange(1, num_steps + 1), order), jnp.zeros(num_steps, int)
    return USF(orders, none, jnp.full(num_steps, noise), orders, none, corrector * (orders + 1), none, depth=depth)


@pytest.mark.parametrize("path", [FlowMatchingPath(), EDMPath(20.0)], ids=repr)
def test_named_points(path):
    """Over the whole range, α = 0 and σ = 0 at its ends."""
    grid = uniform_grid(7)
    y0 = path.sigma(0.0) * jax.random.normal(jax.random.key(1), (16, 2))

    @jax.jit
    def ends(y0):
        term = DenoiserTerm(MIXTURE.denoiser(path), path, grid)
        return [integrate(term, s, y0) for s in (USF.ddim(7), DDIM(), USF.dpm_solver(7, lower_order_final=False), DPMSolverPP2M())]

    first, ddim, second, dpm = ends(y0)
    np.testing.assert_allclose(first, ddim, atol=1e-12)
    np.testing.assert_allclose(second, dpm, atol=1e-12)


def test_singlestep_solvers_of_the_paper():
    """DPM-Solver-2 is a solver of its own here; DPM-Solver-3, Lu et al. 2022 algorithm 2 with r₁ = 1/3, r₂ = 2/3, is written out."""
    path = VPPath()
    outer = log_snr_grid(path, 3, 0.05, 0.97)
    y0 = jax.random.normal(jax.random.key(1), (8, 2))
    half, third = log_snr_grid(path, 6, 0.05, 0.97), log_snr_grid(path, 9, 0.05, 0.97)
    single = USF.dpm_solver(6, noise=True, single_step=True, lower_order_final=False)
    np.testing.assert_allclose(solve(path, single, half, y0), solve(path, DPMSolver2(path), outer, y0), atol=1e-12)

    def block(x, nodes):
        s, s1, s2, t = nodes

        def noise(u, x):
            return (x - path.alpha(u) * MIXTURE.denoised(path, u, x)) / path.sigma(u)

        def move(u):
            return path.alpha(u) / path.alpha(s) * x

        h = (path.log_snr(t) - path.log_snr(s)) / 2
        e = noise(s, x)
        u1 = move(s1) - path.sigma(s1) * jnp.expm1(h / 3) * e
        d1 = noise(s1, u1) - e
        u2 = move(s2) - path.sigma(s2) * (jnp.expm1(2 * h / 3) * e + 2 * (jnp.expm1(2 * h / 3) / (2 * h / 3) - 1) * d1)
        d2 = noise(s2, u2) - e
        return move(t) - path.sigma(t) * (jnp.expm1(h) * e + 1.5 * (jnp.expm1(h) / h - 1) * d2), None

    x = jax.jit(lambda y0: jax.lax.scan(block, y0, (third[:-1:3], third[1::3], third[2::3], third[3::3]))[0])(y0)
    orders, starts, none = jnp.array([1, 2, 2] * 3), jnp.array([0, 1, 2] * 3), jnp.zeros(9, int)
    solver = USF(orders, starts, jnp.ones(9, bool), orders, none, None, None, depth=3)
    np.testing.assert_allclose(solve(path, solver, third, y0), x, atol=1e-12)
    # The same blocks with the exact Taylor coefficients of order 3 are another method.
    exact = USF.dpm_solver(9, 3, noise=True, single_step=True, midpoint=False, lower_order_final=False)
    assert np.abs(solve(path, exact, third, y0) - x).max() > 1e-6


def test_orders_of_decisions():
    """The slopes from 160 to 320 equal steps of λ, noise and data: p, and p + 1 with a corrector.

    One program for all of them."""
    path, y0 = VPPath(), jax.random.normal(jax.random.key(0), (32, 2))
    kinds = [(p, c, noise) for p in (1, 2, 3, 4) for c in (0, 1) if p + c <= 4 for noise in (False, True)]
    fine = solve(path, USF.unipc(2000, 3, lower_order_final=False), log_snr_grid(path, 2000, 0.0, 0.98), y0)
    errors = []
    for n in (160, 320):
        population = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[decisions(n, p, corrector=c, noise=noise) for p, c, noise in kinds])
        ends = eqx.filter_vmap(lambda solver, n=n: solve(path, solver, log_snr_grid(path, n, 0.0, 0.98), y0))(population)
        errors.append(jnp.sqrt(jnp.mean((ends - fine) ** 2, axis=(1, 2))))
    slopes = dict(zip(kinds, np.log2(np.asarray(errors[0] / errors[1]))))
    assert max(abs(slope - p - c) for (p, c, _), slope in slopes.items()) < 0.2, slopes


def test_decisions_that_matter():
    """Each changes the result; the first derivative of fewer evaluations is the difference of order 2 with the curvature left in."""
    path, n = VPPath(), 8
    grid, y0 = log_snr_grid(path, n, 0.05, 0.97), jax.random.normal(jax.random.key(1), (16, 2))
    base = decisions(n, 3)
    changes = [
        dataclasses.replace(base, estimates=jnp.full(n, 2)),
        dataclasses.replace(base, noise=jnp.ones(n, bool)),
        dataclasses.replace(base, starts=jnp.arange(n) % 2),
        dataclasses.replace(base, relaxations=jnp.full(n, Relaxation.HALF)),
        dataclasses.replace(base, relaxations=jnp.full(n, Relaxation.LINEAR)),
        dataclasses.replace(base, relaxations=jnp.full(n, Relaxation.HALF_SECOND)),
        dataclasses.replace(base, correctors=jnp.full(n, 2)),
        dataclasses.replace(base, correctors=jnp.full(n, 2), corrector_relaxations=jnp.full(n, Relaxation.LINEAR)),
    ]
    population = jax.tree.map(lambda *leaves: jnp.stack(leaves), base, *changes)
    ends = np.asarray(eqx.filter_vmap(lambda solver: solve(path, solver, grid, y0))(population))
    apart = np.abs(ends[:, None] - ends).max(axis=(2, 3)) + np.eye(len(ends))
    assert apart.min() > 1e-7, apart


def test_estimate_of_the_first_derivative():
    """Third step by hand, in data prediction: D' = (D₂ - D₁)/h₁ and the full second derivative."""
    path, grid = VPPath(), jnp.array([0.3, 0.45, 0.6, 0.7])
    y0 = jnp.array([0.4, -0.9])
    solver = dataclasses.replace(decisions(3, 3), estimates=jnp.full(3, 2))
    term = DenoiserTerm(MIXTURE.denoiser(path), path, grid)
    end, states = integrate(term, solver, y0, save=lambda t, y: y)
    d = [MIXTURE.denoised(path, t, x) for t, x in zip(grid[:3], (y0, *states[:2]))]
    lam = path.log_snr(grid) / 2
    h, h1, h2 = lam[3] - lam[2], lam[2] - lam[1], lam[1] - lam[0]
    first, second = (d[2] - d[1]) / h1, 2 * ((d[2] - d[1]) / h1 - (d[1] - d[0]) / h2) / (h1 + h2)
    phi1 = -jnp.expm1(-h)
    phi2, phi3 = h - phi1, h**2 / 2 - h + phi1
    expected = path.sigma(grid[3]) / path.sigma(grid[2]) * states[1] + path.alpha(grid[3]) * (phi1 * d[2] + phi2 * first + phi3 * second)
    np.testing.assert_allclose(end, expected, atol=1e-12)


@pytest.mark.parametrize("path", [FlowMatchingPath(), EDMPath(20.0), CosinePath()], ids=repr)
def test_whole_range_ends_on_the_data(path):
    """Whatever is decided: finite, also the gradients, and on a single point exactly that point."""
    point, n = GaussianMixture(jnp.ones(1), jnp.array([[0.7, -0.3]]), jnp.zeros((1, 2, 2))), 6
    solver = dataclasses.replace(decisions(n, 3, corrector=1), noise=jnp.arange(n) % 2 == 0, starts=jnp.array([0, 1, 2, 0, 1, 2]))

    def end(y0):
        y1 = integrate(DenoiserTerm(point.denoiser(path), path, uniform_grid(n)), solver, y0)
        return jnp.sum(y1**2), y1

    gradient, y1 = jax.jit(jax.grad(end, has_aux=True))(path.sigma(0.0) * jnp.array([0.4, 1.0]))
    assert bool(jnp.isfinite(gradient).all())
    np.testing.assert_allclose(y1, [0.7, -0.3], atol=1e-12)


def test_analytic_first_step():
    """One call less, and where α = 0 the same numbers on centred data."""
    path, n, count = FlowMatchingPath(), 5, [0]
    means = jnp.array([[1.0, 0.5], [-1.0, -0.5]])
    centred = GaussianMixture.isotropic(jnp.array([0.5, 0.5]), means, 0.3).denoiser(path)

    def denoised(t, x, args):
        jax.debug.callback(lambda: count.__setitem__(0, count[0] + 1))
        return centred(t, x, args)

    y0 = jnp.array([0.3, -1.2])
    first = dataclasses.replace(USF.unipc(n), analytic_first=True)
    ends = jax.jit(lambda y0: [integrate(DenoiserTerm(denoised, path, uniform_grid(n)), s, y0) for s in (first, USF.unipc(n))])(y0)
    jax.effects_barrier()
    assert count[0] == 2 * n - 1
    np.testing.assert_allclose(*ends, atol=1e-12)


def test_both_drivers_agree():
    path, n = VPPath(), 9
    term, y0 = DenoiserTerm(MIXTURE.denoiser(path), path, uniform_grid(n, 0.0, 0.99)), jax.random.normal(jax.random.key(1), (32, 2))
    check_drivers(term, USF.unipc(n, 3), y0)


def test_orders_that_the_points_state():
    assert [USF.ddim(4).order(None), USF.deis(4).order(None), USF.unipc(4, 2).order(None), USF.unipc(4, 2, corrector=False).order(None)] == [
        1,
        3,
        3,
        2,
    ]
    assert [USF.dpm_solver(4, 3).order(None), USF.dpm_solver(4, 3, single_step=True).order(None)] == [2, 3]


def test_parameters_are_checked():
    one = jnp.ones(3, int)
    # A ValueError for users, and for whoever checks types an error before it.
    with pytest.raises(Exception, match=r"one shape \(N,\), got \[\(2,\), \(3,\)\]|Type-check error"):
        USF(one, jnp.zeros(2, int), one > 0, one, one, None, None)
    for make, message in (
        (lambda: USF.unipc(5, 5), "`order` must be at most 4, got 5"),
        (lambda: USF.dpm_solver(5, 4), "`order` must be at most 3, got 4"),
        (lambda: USF(5 * one, 0 * one, one > 0, one, 0 * one, None, None), r"`orders` must lie in \[1, 4\]"),
        (lambda: USF(one, 3 * one, one > 0, one, 0 * one, one, one), r"`starts` must lie in \[0, 2\]"),
        (lambda: USF(one, 0 * one, one > 0, one, 7 * one, None, None), "`relaxations`"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
