"""Accelerated DDIM and DDPM: the paper's recursions and schedule, rates, orders, the law of the stochastic one, both drivers."""

import functools
import math

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import DenoiserTerm, EDMPath, FlowMatchingPath, VPPath, integrate, with_noise
from ergodax.data import GaussianMixture
from ergodax.diffusion import Ancestral, Heun, karras_grid, log_snr_grid, uniform_grid
from ergodax.diffusion.accelerated_ddim_ddpm import AcceleratedDDIM, AcceleratedDDPM, accelerated_grid
from ergodax.testing import assert_covariance, assert_mean, check_drivers, convergence_order


MIXTURE = GaussianMixture.isotropic(jnp.array([0.3, 0.5, 0.2]), jnp.array([[1.0, 0.5], [-1.0, 0.2], [0.3, -1.2]]), jnp.array([0.4, 0.5, 0.3]))
VARIANCE = 0.25
GAUSSIAN = GaussianMixture([1.0], [[0.0]], [[VARIANCE]])
FLOW = FlowMatchingPath()


@eqx.filter_jit
def solve(path, solver, grid, y0, mixture=MIXTURE):
    return integrate(DenoiserTerm(mixture.denoiser(path), path, grid), solver, y0)


def schedule(num_steps, c0=2.0, c1=4.0):
    """β_1 … β_{T+1} of the paper, term by term."""
    rate = c1 * math.log(num_steps) / num_steps
    first = num_steps**-c0
    return np.array([first] + [rate * min(first * (1 + rate) ** t, 1.0) for t in range(2, num_steps + 2)])


def test_grid_is_the_papers_schedule():
    bar = np.cumprod(1 - schedule(60))[:60][::-1]
    grid = accelerated_grid(FLOW, 60)
    np.testing.assert_allclose(FLOW.alpha(grid[:-1]) ** 2 / (FLOW.alpha(grid[:-1]) ** 2 + FLOW.sigma(grid[:-1]) ** 2), bar, rtol=1e-9)
    assert grid.shape == (61,)
    assert grid[-1] == 1.0


def published_end(num_steps, correction):
    """Y_0 for Y_T = 1 on N(0, 0.25), whose score is linear, so that Y_0² is the variance at the end. The score at T + 1 included."""
    beta = schedule(num_steps)
    bar, y = np.cumprod(1 - beta), 1.0

    def score(t, y):
        return -y / (bar[t - 1] * VARIANCE + 1 - bar[t - 1])

    for t in range(num_steps, 0, -1):
        b, b_after, s = beta[t - 1], beta[t], score(t, y)
        y_minus = math.sqrt(1 - b_after) * (y - b_after / 2 * s)
        extra = b**2 / (4 * b_after) * (s - math.sqrt(1 - b_after) * score(t + 1, y_minus))
        y = (y + b / 2 * s + correction * extra) / math.sqrt(1 - b)
    return y


@pytest.mark.parametrize("correction", [0.0, 1.0])
def test_published_recursion(correction):
    """To rounding. Ours may start with the paper's T + 1 as its history: a grid of one step more, entered after its first."""
    num_steps = 40
    log_bar = np.append(0.0, np.cumsum(np.log1p(-schedule(num_steps))))[::-1]
    grid = FLOW.time(jnp.asarray(log_bar) - jnp.log(-jnp.expm1(jnp.asarray(log_bar))))
    term, solver = DenoiserTerm(GAUSSIAN.denoiser(FLOW), FLOW, grid), AcceleratedDDIM(correction)
    y0 = jnp.sqrt(FLOW.alpha(grid[1]) ** 2 + FLOW.sigma(grid[1]) ** 2) * jnp.ones(1)

    @jax.jit
    def run(y0):
        def body(carry, i):
            y, state = carry
            y, _, _, state, _ = solver.step(term, i, i + 1, y, None, state, made_jump=False)
            return (y, state), None

        return jax.lax.scan(body, (y0, jnp.asarray(0.0)), jnp.arange(1.0, num_steps + 1))[0][0]

    np.testing.assert_allclose(run(y0), published_end(num_steps, correction), rtol=1e-11)


@functools.cache
def variance_error(num_steps, correction):
    grid = accelerated_grid(FLOW, num_steps)
    y0 = jnp.sqrt(FLOW.alpha(grid[0]) ** 2 + FLOW.sigma(grid[0]) ** 2) * jnp.ones(1)
    return float(solve(FLOW, AcceleratedDDIM(jnp.asarray(correction)), grid, y0, GAUSSIAN)[0]) ** 2 - VARIANCE


def test_rates():
    """The card's numbers: 1/T without, 1/T² with the correction, both up to log² T; the published first step included, and ours left plain."""
    plain = [variance_error(n, 0.0) for n in (200, 800)]
    np.testing.assert_allclose(plain, [0.108, 0.0355], rtol=5e-3)
    published = [published_end(n, 1.0) ** 2 - VARIANCE for n in (200, 800)]
    np.testing.assert_allclose(published, [-0.0030, -0.00040], rtol=0.03)
    ours = [variance_error(n, 1.0) for n in (200, 800)]
    assert 2.7 < plain[0] / plain[1] < 3.3
    assert 6 < ours[0] / ours[1] < 9
    assert all(0 > o > p for o, p in zip(ours, published)), (ours, published)


@pytest.mark.parametrize(("path", "correction"), [(VPPath(), 1.0), (VPPath(), 0.0), (EDMPath(20.0), 1.0)], ids=("VP", "VP-plain", "EDM"))
def test_order(path, correction):
    """2, and 1 for the plain sampler; also off variance preserving paths."""

    def grid(n):
        return log_snr_grid(path, n, 0.05, 0.97) if isinstance(path, VPPath) else karras_grid(path, n + 1, 0.05, 20.0)[:-1]

    solver, counts = AcceleratedDDIM(jnp.asarray(correction)), (64, 128, 256, 512)
    y0 = path.sigma(grid(2)[0]) * jax.random.normal(jax.random.key(0), (64, 2))
    fine = solve(path, Heun(), grid(4096), y0)
    errors = [float(jnp.sqrt(jnp.mean((solve(path, solver, grid(n), y0) - fine) ** 2))) for n in counts]
    assert abs(convergence_order(counts, errors) - 1 - correction) < 0.25, errors


def one_stochastic_step(path, grid, y, z, z_plus, mixture):
    """The stochastic line of the paper with given noises."""
    (a0, a1), (s0, s1) = path.alpha(grid), path.sigma(grid)
    scale0, scale1 = jnp.sqrt(a0**2 + s0**2), jnp.sqrt(a1**2 + s1**2)
    a = (a0 / scale0) ** 2 / (a1 / scale1) ** 2
    plus = y / scale0 + jnp.sqrt((1 - a) / 2) * z
    score = scale0 * mixture.score_at(path, grid[0], scale0 * plus)
    return scale1 * (plus + (1 - a) * score + jnp.sqrt((1 - a) / 2) * z_plus) / jnp.sqrt(a)


@pytest.mark.parametrize("path", [VPPath(), EDMPath(20.0)], ids=repr)
def test_stochastic_step_of_the_paper(path):
    grid, y = jnp.array([0.6, 0.7]), path.sigma(0.6) * jnp.array([0.3, -0.8])
    terms = with_noise(DenoiserTerm(MIXTURE.denoiser(path), path, grid), jax.random.key(5), y)
    brownian = terms.terms[1]
    z, z_plus = brownian.contr(0.0, 0.5) / jnp.sqrt(0.5), brownian.contr(0.5, 1.0) / jnp.sqrt(0.5)
    assert jnp.abs(z - z_plus).min() > 1e-3
    np.testing.assert_allclose(integrate(terms, AcceleratedDDPM(), y), one_stochastic_step(path, grid, y, z, z_plus, MIXTURE), atol=1e-11)


class UnitNoise(dfx.AbstractPath):
    """Increments that make the step's first and second N(0, I) these two numbers (the first alone, if only one is asked for)."""

    first: jax.Array
    second: jax.Array
    t0: float = 0.0
    t1: float = jnp.inf

    def evaluate(self, t0, t1=None, left=True):
        return jnp.where(t0 == jnp.floor(t0), self.first, self.second) * jnp.sqrt(t1 - t0)


def end_variance(solver, num_steps):
    """Of a stochastic solver on N(0, 0.25): each step is x₁ = a x₀ + s z + s⁺ z⁺, its coefficients read off three calls."""
    grid = accelerated_grid(FLOW, num_steps)
    model = DenoiserTerm(GAUSSIAN.denoiser(FLOW), FLOW, grid)

    def one(i, x, z, z_plus):
        terms = dfx.MultiTerm(model, dfx.ControlTerm(lambda t, y, args: jnp.ones((), y.dtype), UnitNoise(jnp.full(1, z), jnp.full(1, z_plus))))
        return solver.step(terms, i, i + 1, jnp.full(1, x), None, None, False)[0][0]

    @jax.jit
    def run():
        squares = [jax.vmap(lambda i, unit=unit: one(i, *unit))(jnp.arange(float(num_steps))) ** 2 for unit in np.eye(3)]
        start = FLOW.alpha(grid[0]) ** 2 + FLOW.sigma(grid[0]) ** 2
        return jax.lax.scan(lambda v, c: (c[0] * v + c[1] + c[2], None), start, tuple(squares))[0]

    return float(run())


def test_stochastic_rate():
    """The variance's error falls as 1/T² up to logarithms, where DDPM's falls as 1/T; at 200 steps it is 15 times smaller."""
    accelerated, ddpm = ([abs(end_variance(solver, n) - VARIANCE) for n in (200, 800)] for solver in (AcceleratedDDPM(), Ancestral()))
    assert 9 < accelerated[0] / accelerated[1] < 11, accelerated
    assert 2.7 < ddpm[0] / ddpm[1] < 3.3, ddpm
    assert accelerated[0] < ddpm[0] / 15
    beta = schedule(200)[:200]
    bar, v = np.cumprod(1 - beta), 1.0
    for b, share in zip(beta[::-1], bar[::-1]):
        v = ((1 - b / (share * VARIANCE + 1 - share)) ** 2 * (v + b / 2) + b / 2) / (1 - b)
    np.testing.assert_allclose(accelerated[0], abs(v - VARIANCE), rtol=1e-9)


def test_stochastic_sampler_keeps_the_marginals():
    path, n, count = VPPath(), 200, 8000
    gaussian = GaussianMixture(jnp.ones(1), jnp.array([[0.5, -1.0]]), jnp.array([[[0.5, 0.2], [0.2, 0.3]]]))
    grid = log_snr_grid(path, n, 1e-3, 1 - 1e-3)
    start = path.sigma(grid[0]) * jax.random.normal(jax.random.key(0), (count, 2)) + path.alpha(grid[0]) * gaussian.sample(jax.random.key(7), count)
    term = DenoiserTerm(gaussian.denoiser(path), path, grid)
    end = jax.jit(lambda key: integrate(term, AcceleratedDDPM(), start, key=key))(jax.random.key(1))
    assert_mean(end, path.alpha(grid[-1]) * gaussian.mean())
    assert_covariance(end, path.alpha(grid[-1]) ** 2 * gaussian.covariance() + path.sigma(grid[-1]) ** 2 * jnp.eye(2))


@pytest.mark.parametrize("solver", [AcceleratedDDIM(), AcceleratedDDPM()], ids=repr)
def test_both_drivers_agree(solver):
    path, n = VPPath(), 9
    model, y0 = DenoiserTerm(MIXTURE.denoiser(path), path, uniform_grid(n, 0.0, 0.99)), jax.random.normal(jax.random.key(1), (32, 2))
    terms = with_noise(model, jax.random.key(2), y0) if isinstance(solver, AcceleratedDDPM) else model
    check_drivers(terms, solver, y0)


def test_parameters_are_checked():
    with pytest.raises(ValueError, match=r"`correction` must lie in \[0, inf\), got -1.0"):
        AcceleratedDDIM(-1.0)
    with pytest.raises(ValueError, match=r"`num_steps` must be larger for c1 = 4\.0"):
        accelerated_grid(FLOW, 8)
