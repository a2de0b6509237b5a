"""Restoration-degradation: its algebra, a cubic drift with a Fokker-Planck solve, an SDE with an exact score, the linear form, both drivers."""

import functools
import itertools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import solve_banded

from ergodax.core import DenoiserTerm, EDMPath, FlowMatchingPath, VPPath, integrate
from ergodax.data import GaussianMixture
from ergodax.diffusion import DDIM, Heun, log_snr_grid, uniform_grid
from ergodax.diffusion.restoration_degradation import ForwardProcess, LinearRestorationDegradation, RestorationDegradation, square_root_look_back
from ergodax.testing import check_drivers, convergence_order


MIXTURE = GaussianMixture.isotropic(jnp.array([0.3, 0.5, 0.2]), jnp.array([[1.0, 0.5], [-1.0, 0.2], [0.3, -1.2]]), jnp.array([0.4, 0.5, 0.3]))
NARROW = GaussianMixture.isotropic([0.4, 0.6], [[-1.0], [0.8]], 0.3)


def benes_score(u, x, args):
    """dx = tanh(x) du + dw has the transition density cosh(x)/cosh(x₀) e^{-u/2} N(x; x₀, u), so that p₀ ∝ cosh · mixture stays of this form."""
    return jnp.tanh(x) + eqx.tree_at(lambda m: m.variances, NARROW, NARROW.variances + u).score(x)


BENES = ForwardProcess(lambda u, x, args: jnp.tanh(x), lambda u: 1.0, benes_score)
STARTS = jnp.linspace(-2.5, 2.5, 41)[:, None]


@eqx.filter_jit
def solve(process, solver, y0, times):
    return integrate(process, solver, y0, times=times)


@pytest.mark.parametrize("share", [0.1, 0.01])
def test_algebra(share):
    """The step is x - h (f' + v)/2 - h²/(8 l) (v - f') with v = f - g² s, but for h³/(16 l²) (v - f')."""
    length, x, u = 0.2, jnp.array([0.7]), 0.6
    process = ForwardProcess(lambda u, x, args: jnp.tanh(x) + 0.3 * u, lambda u: 1 + 0.5 * u, benes_score)
    h = share * length
    actual = solve(process, RestorationDegradation(lambda u, h: length), x, jnp.array([1 - u, 1 - u + h]))
    v = process.drift(u, x, None) - process.diffusion(u) ** 2 * benes_score(u, x, None)
    f = process.drift(u - length, x - length * v, None)
    remainder = h**3 / (16 * length**2) * (f - v)
    difference = actual - (x - h * (f + v) / 2 - h**2 / (8 * length) * (v - f))
    assert 1 <= float((difference / remainder)[0]) < 1 + share


@functools.cache
def cubic_process():
    """f = -x³, g = 1 from N(0.5, 0.5²): p_u by Crank-Nicolson on a fine grid, its score between the nodes by interpolation."""
    nodes, du, steps = np.linspace(-3, 3, 601), 1 / 500, 500
    dx = nodes[1] - nodes[0]
    flux = -(nodes**3)
    lower, upper = flux[:-1] / (2 * dx) + 0.5 / dx**2, -flux[1:] / (2 * dx) + 0.5 / dx**2
    diagonal = np.full(nodes.size, -1 / dx**2)
    bands = np.stack([np.append(0, -upper), 2 / du - diagonal, np.append(-lower, 0)])
    p, table = np.exp(-((nodes - 0.5) ** 2) / 0.5), []
    for _ in range(steps + 1):
        table.append(np.gradient(np.log(np.maximum(p, 1e-300)), dx))
        right = (2 / du + diagonal) * p
        right[1:] += lower * p[:-1]
        right[:-1] += upper * p[1:]
        p = solve_banded((1, 1), bands, right)
    table = jnp.asarray(np.array(table))

    def score(u, x, args):
        i, j = jnp.clip(u * steps, 0, steps - 1e-9), jnp.clip((x + 3) / dx, 0, nodes.size - 1.001)
        return jax.scipy.ndimage.map_coordinates(table, [jnp.broadcast_to(i, x.shape), j], order=1)

    return ForwardProcess(lambda u, x, args: -(x**3), lambda u: 1.0, score)


@pytest.mark.parametrize(("process", "starts"), [("benes", STARTS), ("cubic", jnp.linspace(-1.2, 1.2, 21)[:, None])])
def test_order_along_the_square_root(process, starts):
    """l = √h: the error to the probability flow has order 1/2; at a fixed l a bias remains that grows with l."""
    process = BENES if process == "benes" else cubic_process()
    exact = solve(process, dfx.Heun(), starts, jnp.linspace(0, 0.9, 4001))

    def error(solver, n):
        return float(jnp.sqrt(jnp.mean((solve(process, solver, starts, jnp.linspace(0, 0.9, n + 1)) - exact) ** 2)))

    errors = [error(RestorationDegradation(), n) for n in (100, 400, 1600, 6400)]
    slopes = [convergence_order((1, 4), pair) for pair in itertools.pairwise(errors)]
    assert 0.38 < slopes[-1] < 0.55, slopes
    assert abs(slopes[-1] - 0.5) < abs(slopes[0] - 0.5), slopes
    fixed = [RestorationDegradation(lambda u, h, length=length: length) for length in (0.02, 0.05, 0.1)]
    biases = [error(solver, 6400) for solver in fixed]
    assert biases[0] < biases[1] < biases[2] < 6 * biases[0], biases
    np.testing.assert_allclose(error(fixed[2], 1600), biases[2], rtol=0.1)


def test_variance_on_a_gaussian():
    """The card's: dx = -x/2 du + dw on N(0.7, 0.3), from N(0, 1) at T = 6, l = √h."""

    def score(u, x, args):
        return -(x - 0.7 * jnp.exp(-u / 2)) / (0.3 * jnp.exp(-u) + 1 - jnp.exp(-u))

    process = ForwardProcess(lambda u, x, args: -x / 2, lambda u: 1.0, score, 6.0)
    ends = [solve(process, RestorationDegradation(), jnp.array([[0.0], [1.0]]), jnp.linspace(0, 6, n + 1))[:, 0] for n in (240, 960, 3840)]
    variances = np.array([float((end[1] - end[0]) ** 2) - 0.3 for end in ends])
    np.testing.assert_allclose(variances, [-0.147, -0.083, -0.044], rtol=0.02)
    assert np.all((variances[1:] / variances[:-1] > 0.5) & (variances[1:] / variances[:-1] < 0.57))
    # The start ignores the mean 0.7 e^{-3} of p_T, of which the flow keeps the share of the standard deviations, on the way to -0.019.
    means = [float(end[0]) - 0.7 for end in ends]
    assert means[0] > means[1] > means[2] > -0.7 * np.exp(-3) * np.sqrt(0.3), means


@eqx.filter_jit
def solve_linear(path, solver, grid, y0):
    return integrate(DenoiserTerm(MIXTURE.denoiser(path), path, grid), solver, y0)


@pytest.mark.parametrize("path", [VPPath(), FlowMatchingPath(), EDMPath(20.0)], ids=repr)
def test_linear_form(path):
    """DDIM at l = u, over the whole range; else restoration and degradation with the Gaussian bridge, written out."""
    y0 = path.sigma(0.0) * jax.random.normal(jax.random.key(1), (16, 2))
    grid = uniform_grid(8)
    np.testing.assert_allclose(solve_linear(path, LinearRestorationDegradation(path), grid, y0), solve_linear(path, DDIM(), grid, y0), atol=1e-12)
    x, (t, s, r) = jnp.array([0.4, -1.1]), jnp.array([0.3, 0.4, 0.55])
    (a_t, a_s, a_r), (s_t, s_s, s_r) = ([clock(v) for v in (t, s, r)] for clock in (path.alpha, path.sigma))
    ratio = a_t / a_r
    spread = jnp.sqrt(s_t**2 - ratio**2 * s_r**2)
    restored = (x + spread**2 * MIXTURE.score_at(path, t, x)) / ratio
    noise = (x - ratio * restored) / spread
    expected = a_s / a_r * restored + jnp.sqrt(s_s**2 - (a_s / a_r) ** 2 * s_r**2) * noise
    actual = solve_linear(path, LinearRestorationDegradation(path, lambda u, h: r - t), jnp.array([t, s]), x)
    np.testing.assert_allclose(actual, expected, atol=1e-12)


@pytest.mark.parametrize(("look_back", "order"), [(lambda u, h: 0.3 * u, 1), (square_root_look_back, 0.5)], ids=["share", "root"])
def test_order_of_the_linear_form(look_back, order):
    path, counts = VPPath(), (256, 512, 1024, 2048)
    y0 = path.sigma(0.05) * jax.random.normal(jax.random.key(0), (64, 2))
    fine = solve_linear(path, Heun(), log_snr_grid(path, 4096, 0.05, 0.9), y0)
    solver = LinearRestorationDegradation(path, look_back)
    errors = [float(jnp.sqrt(jnp.mean((solve_linear(path, solver, uniform_grid(n, 0.05, 0.9), y0) - fine) ** 2))) for n in counts]
    assert abs(convergence_order(counts, errors) - order) < 0.15, errors
    assert solver.order(None) == 1


def test_both_drivers_agree():
    path, n = VPPath(), 9
    check_drivers(BENES, RestorationDegradation(), STARTS, times=jnp.linspace(0, 0.9, n + 1))
    term = DenoiserTerm(MIXTURE.denoiser(path), path, uniform_grid(n, 0.0, 0.99))
    check_drivers(term, LinearRestorationDegradation(path, lambda u, h: 0.5 * u), jax.random.normal(jax.random.key(1), (8, 2)))
