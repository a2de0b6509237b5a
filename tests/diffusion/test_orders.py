"""The order of the deterministic solver on a `DenoiserTerm`, by regression on two exact mixtures: 2-D, and 64-D with 10 modes.

Grids are equal steps of λ between ends with finite clocks. All numbers of steps share one program: a padded grid, and a loop of traced length.
LMS(4) is not here: the error of its first steps, of order 2, shows at these counts (its slope is 3.8); its numbers are in tests/golden."""

import dataclasses
import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from ergodax.core import DenoiserTerm, VPPath
from ergodax.data import GaussianMixture
from ergodax.diffusion import BDIA, DDIM, ERSDE, PNDM, AcceleratedDDIM, ConjugateDDIM, DPMSolverPP2M, Heun, PowerNoiseScale, WarmUp, log_snr_grid
from ergodax.diffusion.dpm_solver_2 import DPMSolver2
from ergodax.diffusion.lms import LMS
from ergodax.diffusion.usf_s3 import USF
from ergodax.testing import convergence_order


PATH, ENDS, COUNTS, MOST = VPPath(), (0.1, 0.95), (120, 240, 480), 480
_MODES = jax.random.normal(jax.random.key(64), (10, 64))
TARGETS = {
    "2-D": GaussianMixture.isotropic(jnp.array([0.3, 0.5, 0.2]), jnp.array([[1.0, 0.5], [-1.0, 0.2], [0.3, -1.2]]), jnp.array([0.4, 0.5, 0.3])),
    # Modes three standard deviations apart, so that which one a point belongs to is open for long.
    "64-D": GaussianMixture.isotropic(
        jnp.arange(1.0, 11.0), 1.5 * _MODES / jnp.linalg.norm(_MODES, axis=1, keepdims=True), jnp.linspace(0.4, 0.6, 10)
    ),
}
EXACT = {"lower_order_final": False}
SOLVERS = {
    "Euler": (dfx.Euler(), 1),
    "Heun": (Heun(), 2),
    "DDIM": (DDIM(), 1),
    "DPM-Solver++(2M)": (DPMSolverPP2M(), 2),
    "DPM-Solver-2": (DPMSolver2(PATH), 2),
    "LMS(3)": (LMS(3), 3),
    "F-PNDM": (PNDM(), 2),
    "S-PNDM": (PNDM(2, WarmUp.improved_euler()), 2),
    "BDIA(0.5)": (BDIA(0.5), 1),
    "λ-DDIM": (ConjugateDDIM(0.3), 1),
    "accelerated DDIM": (AcceleratedDDIM(), 2),
    "ER-SDE(1), φ = λ": (ERSDE(PowerNoiseScale(1.0), 1), 1),
    "ER-SDE(3), φ = λ": (ERSDE(PowerNoiseScale(1.0), 3), 2),
}
POINTS = {
    "DPM-Solver++(3M)": (USF.dpm_solver(MOST, 3, **EXACT), 2),
    "DPM-Solver++(2S)": (USF.dpm_solver(MOST, 2, single_step=True, **EXACT), 2),
    "DPM-Solver(3S)": (USF.dpm_solver(MOST, 3, noise=True, single_step=True, midpoint=False, **EXACT), 3),
    "DEIS(2)": (USF.deis(MOST, 2, **EXACT), 2),
    "DEIS(3)": (USF.deis(MOST, 3, **EXACT), 3),
    "UniP(2)": (USF.unipc(MOST, 2, corrector=False, **EXACT), 2),
    "UniPC(1)": (USF.unipc(MOST, 1, **EXACT), 2),
    "UniPC(2), B₁": (USF.unipc(MOST, 2, linear=True, **EXACT), 3),
    "UniPC(2), B₂": (USF.unipc(MOST, 2, **EXACT), 3),
    "UniPC(3)": (USF.unipc(MOST, 3, noise=True, **EXACT), 4),
}


def of_one_shape(solver):
    """The same decisions with the static fields that all points have in common."""
    none = jnp.zeros_like(solver.orders)
    after = (none, none) if solver.correctors is None else (solver.correctors, solver.corrector_relaxations)
    return dataclasses.replace(solver, correctors=after[0], corrector_relaxations=after[1], depth=4, rate=1)


@functools.cache
def padded_grid(n):
    """n steps, and behind them as many as are missing to the longest, which are not taken."""
    grid = log_snr_grid(PATH, n, *ENDS)
    return jnp.concatenate([grid, ENDS[1] + 1e-4 * jnp.arange(1.0, MOST - n + 1)])


@eqx.filter_jit
def solve(target, solver, grid, num_steps, y0):
    term = DenoiserTerm(target.denoiser(PATH), PATH, grid)
    terms = term
    if isinstance(solver, ERSDE):
        terms = dfx.MultiTerm(term, dfx.ControlTerm(lambda t, y, args: jnp.zeros((), y.dtype), lambda t0, t1: jnp.zeros_like(y0)))

    def body(i, carry):
        y, state = carry
        y, _, _, state, _ = solver.step(terms, i.astype(grid.dtype), (i + 1).astype(grid.dtype), y, None, state, made_jump=False)
        return y, state

    state = solver.init(terms, jnp.zeros(()), jnp.ones(()), y0, None)
    return jax.lax.fori_loop(0, num_steps, body, (y0, state))[0]


@functools.cache
def starts_and_ends(name):
    """An error 2⁷ times smaller than the finest that is measured, at the least."""
    y0 = PATH.sigma(ENDS[0]) * jax.random.normal(jax.random.key(0), (16, TARGETS[name].dim))
    return y0, solve(TARGETS[name], LMS(4), log_snr_grid(PATH, 4096, *ENDS), jnp.asarray(4096), y0)


def check(solve_n, name, order):
    _, fine = starts_and_ends(name)
    errors = jnp.stack([jnp.sqrt(jnp.mean((solve_n(padded_grid(n), jnp.asarray(n)) - fine) ** 2, axis=(-1, -2))) for n in COUNTS])
    slopes = {solver: convergence_order(COUNTS, column.tolist()) for solver, column in zip(order, errors.reshape(len(COUNTS), -1).T)}
    assert max(abs(slope - order[solver]) for solver, slope in slopes.items()) < 0.2, (slopes, errors)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SOLVERS)
def test_order(name, target):
    solver, order = SOLVERS[name]
    y0, _ = starts_and_ends(target)
    check(lambda grid, n: solve(TARGETS[target], solver, grid, n, y0), target, {name: order})
    assert solver.order(None) == order


@pytest.mark.parametrize("target", TARGETS)
def test_orders_of_points_of_usf(target):
    """All of them in one program."""
    y0, _ = starts_and_ends(target)
    population = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[of_one_shape(solver) for solver, _ in POINTS.values()])
    solve_all = eqx.filter_jit(eqx.filter_vmap(lambda solver, grid, n: solve(TARGETS[target], solver, grid, n, y0), in_axes=(0, None, None)))
    check(lambda grid, n: solve_all(population, grid, n), target, {name: order for name, (_, order) in POINTS.items()})
    assert all(solver.order(None) == order for solver, order in POINTS.values())
