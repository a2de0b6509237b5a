"""Bounds for the probability flow on Gaussian data, where every law is Gaussian and W₂ is a closed form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from ergodax.core import DenoiserTerm, EDMPath, VPPath, integrate
from ergodax.data import GaussianMixture
from ergodax.diffusion import uniform_grid
from ergodax.diffusion.pf_ode_w2_bounds import ProbabilityFlowBound, ScoreExponential, exponential_coefficients, log_concavity
from ergodax.testing import convergence_order


MEAN, VARIANCE = jnp.array([0.5, -1.0, 0.0]), jnp.array([0.25, 1.0, 2.0])
DATA = GaussianMixture(jnp.ones(1), MEAN[None], VARIANCE[None])
SECOND_MOMENT, STRONG_CONVEXITY, SMOOTHNESS = 4.5, 1 / 2.0, 1 / 0.25


def vp(horizon):
    """f = 1/2, g² = 1 over [0, T]."""
    return VPPath(horizon, horizon)


def ve(horizon):
    """g² = 2t over [0, T]."""
    return EDMPath(horizon)


PATHS = {"VP": vp(8.0), "VE": ve(20.0)}
each_path = pytest.mark.parametrize("name", PATHS)


def w2(mean, variance, other_mean, other_variance):
    return float(jnp.sqrt(jnp.sum((mean - other_mean) ** 2) + jnp.sum((jnp.sqrt(variance) - jnp.sqrt(other_variance)) ** 2)))


def law(path, t):
    return path.alpha(t) * MEAN, path.alpha(t) ** 2 * VARIANCE + path.sigma(t) ** 2


@eqx.filter_jit
def affine_map(path, grid, score_error):
    """The end of the solve is a y + b in every coordinate: two solves say a and b."""

    def denoised(t, x, args):
        # D = (x + σ² s)/α with a constant error in the score.
        return DATA.denoised(path, t, x) + path.sigma(t) ** 2 / path.alpha(t) * score_error

    term = DenoiserTerm(denoised, path, grid)
    ends = integrate(term, ScoreExponential(path), jnp.stack([jnp.zeros(3), jnp.ones(3)]))
    return ends[1] - ends[0], ends[0]


def error(path, grid, start, score_error=0.0):
    """W₂ of the numerical law to the law at the grid's end, from the Gaussian `start`."""
    a, b = affine_map(path, grid, jnp.asarray(score_error))
    mean, variance = start
    return w2(a * mean + b, a**2 * variance, *law(path, grid[-1]))


def bound(path, **constants):
    return ProbabilityFlowBound(path, 3, SECOND_MOMENT, STRONG_CONVEXITY, SMOOTHNESS, **constants)


@each_path
def test_curvature_is_exact(name):
    """a(t) is 1/(the largest variance of p_t), L(t) 1/(the smallest)."""
    path = PATHS[name]
    for t in (0.1, 0.6, 0.99):
        _, variance = law(path, t)
        np.testing.assert_allclose(log_concavity(path, t, 0.5), 1 / variance.max(), rtol=1e-14)
        np.testing.assert_allclose(log_concavity(path, t, 4.0), 1 / variance.min(), rtol=1e-14)


@each_path
def test_coefficients(name):
    """A and I by an independent quadrature, and in closed form: VP has I = A - 1, VE half the loss of variance."""
    path, start, end = PATHS[name], 0.3, 0.42
    a, i = exponential_coefficients(path, jnp.asarray(start), jnp.asarray(end))
    expected = quad(lambda t: float(path.alpha(end) / path.alpha(t) * path.diffusion(t)) / 2, start, end)[0]
    np.testing.assert_allclose(i, expected, rtol=1e-10)
    closed = a - 1 if name == "VP" else (path.sigma(start) ** 2 - path.sigma(end) ** 2) / 2
    np.testing.assert_allclose(i, closed, rtol=1e-10)


def test_initialisation():
    """The flow's error from N(0, σ²) against the card's numbers, its rates, and below E₀; E₀ by the integral of c = g² a/2."""

    def flow_error(path):
        mean, variance = law(path, 0.0)
        ratio = jnp.sqrt(VARIANCE / variance)
        return w2(MEAN - ratio * mean, VARIANCE / variance * path.sigma(0.0) ** 2, MEAN, VARIANCE)

    horizons = (4.0, 6.0, 8.0)
    errors = [flow_error(vp(horizon)) for horizon in horizons]
    limits = [float(bound(vp(horizon)).initialisation()) for horizon in horizons]
    np.testing.assert_allclose(errors, [0.142, 0.0515, 0.0189], rtol=5e-3)
    np.testing.assert_allclose(limits, [0.402, 0.149, 0.0549], rtol=5e-3)
    np.testing.assert_allclose(np.log(errors[1] / errors[2]), 1.0, atol=0.02)  # e^{-F} with F = T/2
    far, farther = (flow_error(ve(horizon)) for horizon in (100.0, 200.0))
    np.testing.assert_allclose(far / farther, 2.0, rtol=0.01)
    assert far < bound(ve(100.0)).initialisation()
    path = PATHS["VP"]
    rate = quad(lambda t: float(path.diffusion(t) * log_concavity(path, t, 0.5)) / 2, 0, 1, epsabs=1e-12)[0]
    np.testing.assert_allclose(bound(path).initialisation(), np.exp(-rate) * np.sqrt(SECOND_MOMENT), rtol=1e-8)


@each_path
def test_order(name):
    """From the exact p_0 the law is of order 1 in the step; so is every path of the sampler, towards the flow, which is affine on Gaussian data."""
    path, counts = PATHS[name], (128, 256, 512)
    errors = [error(path, uniform_grid(n), law(path, 0.0)) for n in counts]
    assert abs(convergence_order(counts, errors) - 1) < 0.1, errors
    (mean0, variance0), (mean1, variance1) = law(path, 0.0), law(path, 1.0)
    slope = jnp.sqrt(variance1 / variance0)

    def miss(n):
        a, b = affine_map(path, uniform_grid(n), jnp.asarray(0.0))
        return np.abs(jnp.append(a - slope, b - (mean1 - slope * mean0))).max()

    errors = [miss(n) for n in counts]
    assert abs(convergence_order(counts, errors) - 1) < 0.1, errors


@each_path
def test_bias_is_linear(name):
    path, grid = PATHS[name], uniform_grid(128)
    (_, b0), (_, b1), (_, b2) = (affine_map(path, grid, jnp.asarray(bias)) for bias in (0.0, 0.1, 0.2))
    np.testing.assert_allclose(b2 - b0, 2 * (b1 - b0), rtol=1e-10)


@each_path
def test_local_error_is_its_integral(name):
    """By nested adaptive quadrature of the definition, with the clocks f, g², α and σ of both processes written out."""
    dim, m1, m, start, end = 3, 0.7, 0.2, 0.3, 0.42
    horizon = 8.0 if name == "VP" else 20.0
    if name == "VP":
        drift, g2, alpha = lambda t: horizon / 2, lambda t: horizon, lambda t: np.exp(-horizon * (1 - t) / 2)
        sigma2 = lambda t: 1 - np.exp(-horizon * (1 - t))  # noqa: E731
    else:
        drift, g2, alpha, sigma2 = lambda t: 0.0, lambda t: 2 * horizon**2 * (1 - t), lambda t: 1.0, lambda t: (horizon * (1 - t)) ** 2

    def norm(t):
        return np.sqrt(alpha(t) ** 2 * SECOND_MOMENT + sigma2(t) * dim)

    def smoothness(t):
        return 1 / (alpha(t) ** 2 / SMOOTHNESS + sigma2(t))

    def moved(t):
        return quad(lambda s: drift(s) * norm(s) + g2(s) / 2 * np.sqrt(dim * smoothness(s)), start, t)[0]

    def integrand(t):
        return alpha(end) / alpha(t) * g2(t) / 2 * (m1 * (t - start) * (1 + norm(start)) + smoothness(t) * moved(t) + m)

    limit = bound(PATHS[name], time_lipschitz=m1, score_error=m)
    found = jax.jit(lambda start, end: limit.local_error(start, end))(jnp.asarray(start), jnp.asarray(end))
    np.testing.assert_allclose(found, quad(integrand, start, end)[0], rtol=1e-9)


@eqx.filter_jit
def walk(path, grid, score_error):
    """(actual W₂, bound with exact local errors, bound from constants) at every point of the grid but the first, from N(0, σ²)."""

    # ∂_t of the score (α μ - x)/v, read off on the path: M₁ is the larger of its slope in x and of its constant.
    def pieces(t):
        mean, variance = law(path, t)
        return mean / variance, 1 / variance

    constant, slope = jax.vmap(jax.jacfwd(pieces))(jnp.linspace(0.0, 1 - 1e-6, 20001))
    lipschitz = jnp.maximum(jnp.linalg.norm(constant, axis=1).max(), jnp.abs(slope).max())

    def one(carry, step):
        """The affine maps of the steps, one after the other: a law is a mean and a variance."""
        mean, variance, exact = carry
        start, end = step
        a, i = exponential_coefficients(path, start, end)
        true_mean, true_variance = law(path, start)
        scale, shift = a - i / true_variance, i * (path.alpha(start) * MEAN / true_variance + score_error / jnp.sqrt(3.0))
        end_mean, end_variance = law(path, end)
        flow = jnp.sqrt(end_variance / true_variance)
        # True flow and step from the same point x of p_start differ by an affine function of it.
        local = jnp.sqrt(jnp.sum((scale * true_mean + shift - end_mean) ** 2) + jnp.sum((scale - flow) ** 2 * true_variance))
        exact = bound(path).contraction(start, end) * exact + local
        mean, variance = scale * mean + shift, scale**2 * variance
        actual = jnp.sqrt(jnp.sum((mean - end_mean) ** 2) + jnp.sum((jnp.sqrt(variance) - jnp.sqrt(end_variance)) ** 2))
        return (mean, variance, exact), (actual, exact)

    start = jnp.zeros(3), jnp.full(3, path.sigma(grid[0]) ** 2), path.alpha(grid[0]) * jnp.sqrt(SECOND_MOMENT)
    _, (actual, exact) = jax.lax.scan(one, start, (grid[:-1], grid[1:]))
    return actual, exact, bound(path, time_lipschitz=lipschitz, score_error=score_error)(grid)[1:]


@each_path
def test_error_is_below_the_bound(name):
    """At every point of the grid: actual <= recursion with exact local errors <= the bound from the constants alone, which is linear in M."""
    path, grid, limits = PATHS[name], uniform_grid(128), []
    for score_error in (0.0, 0.1, 0.2):
        actual, exact, limit = walk(path, grid, jnp.asarray(score_error))
        assert np.all(actual <= exact * (1 + 1e-9))
        assert np.all(exact <= limit * (1 + 1e-9))
        limits.append(limit)
    np.testing.assert_allclose(limits[2] - limits[0], 2 * (limits[1] - limits[0]), rtol=1e-9)
    start = jnp.zeros(3), jnp.full(3, path.sigma(0.0) ** 2)
    np.testing.assert_allclose(walk(path, grid, jnp.asarray(0.0))[0][-1], error(path, grid, start), rtol=1e-6)


def test_bound_falls_like_the_step():
    """On fine grids the bound goes to E₀, its excess with the step."""
    path = PATHS["VP"]
    initial = bound(path).initialisation()
    ends = [float(jax.jit(bound(path))(uniform_grid(n))[-1] - initial) for n in (512, 1024, 2048)]
    assert abs(convergence_order((512, 1024, 2048), ends) - 1) < 0.1, ends


def test_contraction_is_the_norm_over_all_variances():
    """ρ_k = max_i |A - I/(α² v_i + σ²)|, over the data's own variances."""
    for path in PATHS.values():
        for start, end in ((0.0, 0.05), (0.5, 0.7), (0.9, 1.0)):
            a, i = exponential_coefficients(path, jnp.asarray(start), jnp.asarray(end))
            np.testing.assert_allclose(bound(path).contraction(start, end), jnp.abs(a - i / law(path, start)[1]).max(), rtol=1e-12)


def test_parameters_are_checked():
    for make, message in (
        (lambda: ProbabilityFlowBound(VPPath(), 0, 1.0, 1.0), "`dim` must be an integer of at least 1"),
        (lambda: ProbabilityFlowBound(VPPath(), 2, -1.0, 1.0), "`second_moment`"),
        (lambda: ProbabilityFlowBound(VPPath(), 2, 1.0, 0.0), r"`strong_convexity` must lie in \(0, inf\), got 0"),
        (lambda: bound(VPPath())(jnp.array([0.5, 0.4])), "`grid` must increase strictly"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
