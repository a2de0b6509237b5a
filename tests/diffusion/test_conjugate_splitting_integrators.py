"""Conjugate and splitting integrators: DDIM at B = 0, orders by regression, error ratios, and the stochastic ones by their own recursions."""

import functools
import itertools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import DenoiserTerm, FlowMatchingPath, VPPath, integrate, with_noise
from ergodax.data import GaussianMixture
from ergodax.diffusion import (
    DDIM,
    PSLD,
    CompleteRecipe,
    ConjugateDDIM,
    ConjugateIntegrator,
    Heun,
    LinearBeta,
    LinearMixtureScore,
    LinearSDETerm,
    bao,
    conjugate_symplectic_euler,
    conjugate_velocity_verlet,
    linear_transition,
    log_snr_grid,
    oba,
    obab,
    symplectic_euler,
    uniform_grid,
    velocity_verlet,
)
from ergodax.testing import assert_covariance, check_drivers, convergence_order


PLANE = GaussianMixture.isotropic(jnp.array([0.3, 0.5, 0.2]), jnp.array([[1.0, 0.5], [-1.0, 0.2], [0.3, -1.2]]), jnp.array([0.4, 0.3, 0.35]))
LINE = GaussianMixture.isotropic(jnp.array([0.4, 0.6]), jnp.array([[1.0], [-1.0]]), jnp.array([0.3, 0.4]))
COUNTS = (40, 80, 160, 320)
PATH = VPPath()
X0 = jax.random.normal(jax.random.key(0), (64, 2))


def grids(counts, end):
    """One grid a row, the shorter ones padded with steps of length 0, so that all counts share one program."""
    index = jnp.arange(max(counts) + 1.0)
    return jnp.stack([end * jnp.minimum(index / n, 1) for n in counts])


@eqx.filter_jit
def solve(solver, grid, path=PATH):
    return integrate(DenoiserTerm(PLANE.denoiser(path), path, grid), solver, X0)


@eqx.filter_jit
def solve_all(solver):
    return jax.vmap(lambda grid: solve(solver, grid))(grids(COUNTS, 0.98))


@functools.cache
def fine():
    return solve(Heun(), log_snr_grid(PATH, 4096, jnp.asarray(0.0), jnp.asarray(0.98)))


def rms(x):
    return float(jnp.sqrt(jnp.mean(x**2)))


def test_ddim_is_the_exponential_integrator():
    """λ = 0: both of them, on VP; on a path whose last step reaches σ = 0 too. λ ≠ 0: the two agree with each other."""
    grid = uniform_grid(40, 0.0, 0.98)
    ddim = solve(DDIM(), grid)
    np.testing.assert_allclose(solve(ConjugateDDIM(jnp.asarray(0.0)), grid), ddim, atol=1e-12)
    flow, whole = FlowMatchingPath(), uniform_grid(10, 0.1, 1.0)
    np.testing.assert_allclose(solve(ConjugateDDIM(jnp.asarray(0.0)), whole, flow), solve(DDIM(), whole, flow), atol=1e-12)
    process = CompleteRecipe(jnp.full((1, 1), jnp.sqrt(0.5)), jnp.zeros((1, 1)), jnp.ones(1), jnp.zeros(0))
    term = LinearSDETerm(LinearMixtureScore(PLANE, process), process)
    run = eqx.filter_jit(lambda solver: jax.vmap(lambda z: integrate(term, solver, z, times=grid))(X0[:, None])[:, 0])
    np.testing.assert_allclose(run(ConjugateIntegrator(shift=jnp.asarray(0.0))), ddim, atol=1e-11)
    np.testing.assert_allclose(run(ConjugateIntegrator(shift=jnp.asarray(0.5))), solve(ConjugateDDIM(jnp.asarray(0.5)), grid), atol=1e-11)


@pytest.mark.parametrize("stability", [0.5, 2.0])
def test_lambda_ddim_is_of_order_one(stability):
    """And falls back on DDIM as the step shrinks: their distance halves."""
    ends = solve_all(ConjugateDDIM(jnp.asarray(stability)))
    errors = [rms(end - fine()) for end in ends]
    assert abs(convergence_order(COUNTS, errors) - 1) < 0.1, errors
    distances = [rms(distance) for distance in ends - solve_all(ConjugateDDIM(jnp.asarray(0.0)))]
    assert abs(convergence_order(COUNTS, distances) - 1) < 0.15, distances


class PlusSign(ConjugateDDIM):
    """The misprint: + h A B A⁻¹ ẑ. Growth e^{λh} (1 + λh) compounds to e^{2λ}."""

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        h, clocks = terms.contr(t0, t1).dt, terms.contr(t0, t1)
        y1 = ConjugateDDIM.step(self, terms, t0, t1, y0, args, solver_state, made_jump)[0]
        y1 = y1 + 2 * jnp.exp(self.stability * h) * self.stability * h * jnp.exp(clocks.log_alpha1 - clocks.log_alpha0) * y0
        return y1, None, dict(y0=y0, y1=y1), None, dfx.RESULTS.successful


def test_the_other_sign_does_not_converge():
    errors = [rms(end - fine()) for end in solve_all(PlusSign(jnp.asarray(0.5)))]
    assert min(errors) > 0.5, errors
    assert convergence_order(COUNTS, errors) < 0.2


@eqx.filter_jit
def flow(process, solver, times):
    """From 16 starts over each row of `times`: all states together, as one example of shape (2, 16, 1)."""
    exact = LinearMixtureScore(LINE, process)
    term = LinearSDETerm(lambda t, z, args: jnp.moveaxis(exact(t, jnp.moveaxis(z, 1, 0)), 0, 1), process)
    z0 = process.prior(jax.random.key(1), (16, 1))
    return jax.vmap(lambda times: integrate(term, solver, z0, times=times))(times)


PROCESSES = {"constant": PSLD(), "linear": PSLD(beta=LinearBeta(2.0, 12.0))}


@functools.cache
def fine_flow(beta):
    return flow(PROCESSES[beta], dfx.Heun(), grids((8192,), 0.9))[0]


def errors_of(solver, beta="constant"):
    """Root mean square errors at t = 0.9 with 80 to 640 steps."""
    ends = flow(PROCESSES[beta], solver, grids([2 * n for n in COUNTS], 0.9))
    return [rms(end - fine_flow(beta)) for end in ends]


phase_space_errors = functools.cache(errors_of)


@pytest.mark.parametrize(
    ("solver", "low", "high"),
    [
        (dfx.Euler(), 0.85, 1.15),
        (symplectic_euler(), 0.85, 1.15),
        (symplectic_euler(reduced=True), 0.85, 1.15),
        (velocity_verlet(), 1.0, 1.3),
        (velocity_verlet(reduced=True), 1.0, 1.3),
        (velocity_verlet(midpoint=True), 1.9, 2.1),
        (ConjugateIntegrator(), 0.85, 1.15),
        (conjugate_symplectic_euler(), 0.85, 1.15),
        (conjugate_velocity_verlet(reduced=True), 0.85, 1.15),
    ],
    ids=("Euler", "SE", "reduced SE", "VV", "reduced VV", "midpoint VV", "conjugate", "conjugate SE", "conjugate VV"),
)
def test_orders_in_phase_space(solver, low, high):
    errors = phase_space_errors(solver)
    assert low < convergence_order(COUNTS, errors) < high, errors


def test_splitting_gains_over_euler():
    """At equal steps: symplectic Euler by 5, velocity Verlet by 20."""
    euler = np.array(phase_space_errors(dfx.Euler()))
    assert (euler / phase_space_errors(symplectic_euler()) > 5).all()
    assert (euler / phase_space_errors(velocity_verlet()) > 20).all()


def test_matrix_stability_converges_for_a_changing_rate():
    """B = β Λ: consistent for any β, since B - F then commutes with itself; and it is not the plain step."""
    stability = jnp.array([[0.0, 0.2], [0.2, 0.1]])
    errors = errors_of(ConjugateIntegrator(jnp.asarray(0.3), stability), "linear")
    assert abs(convergence_order(COUNTS, errors) - 1) < 0.15, errors
    plain = errors_of(ConjugateIntegrator(jnp.asarray(0.0), 0 * stability), "linear")
    assert abs(plain[0] / errors[0] - 1) > 0.1


def test_skip_of_the_stationary_score_is_exact_on_stationary_data():
    """s = -S⁻¹ z with C_skip = -S⁻¹ leaves ε = 0: any step is exact."""
    process = PSLD(0.2, 3.0, initial_scale=1.0)
    stationary = process.prior_covariance
    inverse = jnp.linalg.inv(stationary)
    term = LinearSDETerm(lambda t, z, args: -inverse @ z, process)
    z = jnp.array([[0.3], [-0.8]])
    end = integrate(term, ConjugateIntegrator(skip=-inverse), z, times=jnp.array([0.0, 0.7, 1.0]))
    a = -process.drift_matrix - process.diffusion_matrix @ inverse / 2
    np.testing.assert_allclose(end, linear_transition(a, jnp.zeros((2, 2)), 8.0)[0] @ z, atol=1e-12)


def stochastic_chain(process, std, times, scheme):
    """The covariance of a splitting itself on data N(0, std²), with the score asked anew in every part, by hand."""
    a, q = np.asarray(process.drift_matrix), np.asarray(process.diffusion_matrix)
    friction, covariance = np.diag(np.diag(a)), np.asarray(process.prior_covariance)
    times = np.asarray(times)
    laws = dict(zip(times, zip(*jax.jit(jax.vmap(process.moments))(times))))
    for t0, t1 in itertools.pairwise(times):
        for part in scheme:
            if part == "O":
                elapsed = float(process.elapsed(t0) - process.elapsed(t1))
                decay = np.exp(np.diag(friction) * elapsed)
                noise = np.diag(q) * (1 - decay**2) / (-2 * np.diag(friction))
                covariance = np.diag(decay) @ covariance @ np.diag(decay) + np.diag(noise)
                continue
            row, share, t = {"A": (0, 1, t0), "B": (1, 1, t0), "b": (1, 0.5, t0), "c": (1, 0.5, t1)}[part]
            phi, sigma = laws[t]
            precision = np.linalg.inv(sigma + std**2 * np.outer(phi, phi))
            rate = -float(process.rate(t)) * share * (t1 - t0) * (a + friction + q @ precision)
            step = np.eye(2)
            step[row] += rate[row]
            covariance = step @ covariance @ step.T
    return covariance


@pytest.mark.parametrize(("solver", "scheme"), [(oba(), "OBA"), (bao(), "BAO"), (obab(), "ObAc")], ids=("OBA", "BAO", "OBAB"))
def test_stochastic_splittings(solver, scheme):
    process, times, n = PSLD(0.2, 2.0, beta=LinearBeta(2.0, 6.0)), uniform_grid(6, 0.0, 0.9), 4000
    exact = LinearMixtureScore(GaussianMixture.isotropic(jnp.ones(1), jnp.zeros((1, 1)), 0.5), process)

    @jax.jit
    @jax.vmap
    def sample(key):
        first, second = jax.random.split(key)
        z0 = process.prior(first, (1,))
        return integrate(with_noise(LinearSDETerm(exact, process), second, z0), solver, z0, times=times)

    z = sample(jax.random.split(jax.random.key(0), n))[..., 0]
    assert_covariance(z, stochastic_chain(process, 0.5, times, scheme))


@pytest.mark.parametrize("make", [oba, bao, obab], ids=("OBA", "BAO", "OBAB"))
def test_stochastic_splittings_converge_in_law(make):
    """The chain's covariance tends to the true one with order 1; `reduced` differs from it by a first-order term, at fewer calls."""
    process, scheme = PSLD(0.2, 2.0), {"oba": "OBA", "bao": "BAO", "obab": "ObAc"}[make.__name__]
    phi, sigma = process.moments(0.9)
    truth = sigma + 0.25 * jnp.outer(phi, phi)
    counts = (40, 80, 160)
    errors = [np.abs(stochastic_chain(process, 0.5, np.linspace(0, 0.9, n + 1), scheme) - truth).max() for n in counts]
    assert abs(convergence_order(counts, errors) - 1) < 0.2, errors

    calls = []

    def counted(t, z, args):
        calls.append(t)
        return -z

    z0 = jnp.ones((2, 1))
    for reduced, expected in ((False, 2 + (make is obab)), (True, 1 + (make is obab))):
        calls.clear()
        jax.eval_shape(
            lambda z, r=reduced: make(r).step(with_noise(LinearSDETerm(counted, process), jax.random.key(0), z), 0.0, 0.1, z, None, None, False), z0
        )
        assert len(calls) == expected


def test_both_drivers_and_bad_arguments():
    process, times = PSLD(), uniform_grid(10, 0.0, 0.9)
    z0 = process.prior(jax.random.key(0), (1,))
    term = LinearSDETerm(LinearMixtureScore(LINE, process), process)
    for solver, terms in ((ConjugateIntegrator(), term), (oba(), with_noise(term, jax.random.key(1), z0))):
        check_drivers(terms, solver, z0, times=times)
    with pytest.raises(ValueError, match="choose one"):
        velocity_verlet(reduced=True, midpoint=True)
    with pytest.raises(ValueError, match="num_nodes"):
        ConjugateDDIM(0.5, 0)
