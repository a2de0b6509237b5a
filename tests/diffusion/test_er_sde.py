"""ER-SDE-Solver: its formulas with quadrature of another library, orders on an exact mixture, marginal variances, limits, both drivers."""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from ergodax.core import CosinePath, DenoiserTerm, EDMPath, FlowMatchingPath, VPPath, integrate, with_noise
from ergodax.data import GaussianMixture
from ergodax.diffusion import DDIM, Ancestral, Heun, karras_grid, log_snr_grid, uniform_grid
from ergodax.diffusion.er_sde import ERSDE, ExponentialNoiseScale, PowerNoiseScale
from ergodax.testing import assert_covariance, assert_mean, check_drivers, convergence_order


MIXTURE = GaussianMixture.isotropic(jnp.array([0.3, 0.5, 0.2]), jnp.array([[1.0, 0.5], [-1.0, 0.2], [0.3, -1.2]]), jnp.array([0.4, 0.5, 0.3]))
ODE = PowerNoiseScale(1.0)


def logarithmic(ratio):
    """The paper's SDE_4, φ = λ^0.9 log₁₀(1 + 100 λ^1.5), as a plug of one's own."""
    return jnp.log10(1 + 100 * ratio**1.5) * ratio**-0.1


# The paper's noise scales φ, and their growths φ/λ as we take them.
SCALES = {
    "ODE": (lambda x: x, ODE),
    "SDE": (lambda x: x**2, PowerNoiseScale(2.0)),
    "SDE_2": (lambda x: x**1.5, PowerNoiseScale(1.5)),
    "SDE_3": (lambda x: x**2.5, PowerNoiseScale(2.5)),
    "SDE_4": (lambda x: x**0.9 * np.log10(1 + 100 * x**1.5), logarithmic),
    "SDE_5": (lambda x: x * (np.exp(x**0.3) + 10), ExponentialNoiseScale()),
}
each_scale = pytest.mark.parametrize("name", SCALES)


class GivenNoise(dfx.AbstractPath):
    """`rows[i]` as the noise of step i."""

    rows: jax.Array
    t0: float = 0.0
    t1: float = jnp.inf

    def evaluate(self, t0, t1=None, left=True):
        return self.rows[t0.astype(int)]


def terms_with(mixture, path, grid, rows):
    model = DenoiserTerm(mixture.denoiser(path), path, grid)
    return dfx.MultiTerm(model, dfx.ControlTerm(lambda t, y, args: jnp.ones((), y.dtype), GivenNoise(rows)))


@eqx.filter_jit
def solve(path, solver, grid, y0, rows, mixture=MIXTURE):
    return integrate(terms_with(mixture, path, grid, rows), solver, y0)


def published(phi, max_order, path, grid, x, rows):
    """The authors' loop in NumPy, with `scipy.integrate.quad` for their sums."""
    alphas, sigmas = np.asarray(path.alpha(grid)), np.asarray(path.sigma(grid))
    ratios = sigmas / alphas
    old = old_slope = None
    for i, z in enumerate(rows):
        s, t = ratios[i], ratios[i + 1]
        data = np.asarray(MIXTURE.denoised(path, grid[i], jnp.asarray(x)))
        r = phi(t) / phi(s)
        y = r * x / alphas[i] + (1 - r) * data + np.sqrt(np.maximum(t**2 - r**2 * s**2, 0)) * z
        if max_order > 1 and i > 0:
            slope = (data - old) / (s - ratios[i - 1])
            y = y + (t - s + phi(t) * quad(lambda u: 1 / phi(u), t, s, epsabs=0, epsrel=1e-13)[0]) * slope
            if max_order > 2 and i > 1:
                second = (t - s) ** 2 / 2 + phi(t) * quad(lambda u, s=s: (u - s) / phi(u), t, s, epsabs=0, epsrel=1e-13)[0]
                y = y + second * 2 * (slope - old_slope) / (s - ratios[i - 2])
            old_slope = slope
        old, x = data, alphas[i + 1] * y
    return x


@pytest.mark.parametrize(("name", "max_order"), [*((name, 3) for name in SCALES), ("SDE_5", 1), ("SDE_5", 2)])
def test_published_formulas(name, max_order):
    phi, growth = SCALES[name]
    rng = np.random.default_rng(0)
    for path, grid in ((VPPath(), uniform_grid(6, 0.1, 0.97)), (EDMPath(20.0), karras_grid(EDMPath(20.0), 7, 0.05, 20.0)[:-1])):
        rows = jnp.asarray(rng.normal(size=(6, 8, 2)))
        start = path.sigma(grid[0]) * jnp.asarray(rng.normal(size=(8, 2)))
        expected = published(phi, max_order, path, grid, np.asarray(start), np.asarray(rows))
        # φ = λ leaves rounding in the published radicand, whose root is 1e-8 of λ; elsewhere 16 nodes over a step of 2 in log λ are exact to 1e-12.
        np.testing.assert_allclose(solve(path, ERSDE(growth, max_order), grid, start, rows), expected, atol=2e-7 if name == "ODE" else 1e-11)


ORDER_CASES = [
    (VPPath(), lambda path, n: log_snr_grid(path, n, 0.05, 0.97)),
    (EDMPath(20.0), lambda path, n: karras_grid(path, n + 1, 0.05, 20.0)[:-1]),
]
COUNTS = (64, 128, 256, 512)


@functools.cache
def errors(case, name, max_order):
    """Root mean square errors at COUNTS steps with the noise off: to the exact flow for φ = λ, to a fine run for another φ."""
    path, grid = ORDER_CASES[case]
    solver = ERSDE(SCALES[name][1], max_order)
    y0 = path.sigma(grid(path, 2)[0]) * jax.random.normal(jax.random.key(0), (64, 2))

    def end(solver, n):
        return solve(path, solver, grid(path, n), y0, jnp.zeros((n, 1, 1)))

    if name == "ODE":
        fine = jax.jit(lambda: integrate(DenoiserTerm(MIXTURE.denoiser(path), path, grid(path, 4096)), Heun(), y0))()
    else:
        fine = end(ERSDE(SCALES[name][1]), 4096)
    return [float(jnp.sqrt(jnp.mean((end(solver, n) - fine) ** 2))) for n in COUNTS]


@pytest.mark.parametrize("max_order", [1, 2, 3])
@pytest.mark.parametrize(("case", "name"), [(0, "ODE"), (1, "SDE_5")], ids=["VP-ODE", "EDM-SDE_5"])
def test_order(case, name, max_order):
    """1, 2, 2, and the third with a smaller constant than the second."""
    slope = convergence_order(COUNTS, errors(case, name, max_order))
    assert abs(slope - ERSDE(ODE, max_order).order(None)) < 0.2, (slope, errors(case, name, max_order))
    if max_order == 3:
        assert errors(case, name, 3)[-1] < 0.8 * errors(case, name, 2)[-1]


GAUSSIAN_MEAN, GAUSSIAN_STD = 1.3, 0.4


def test_orders_on_the_cards_gaussian():
    """N(1.3, 0.4²), Karras grid from 10 to 0.1, against the closed-form flow; the order 3 has 0.6 of the error of the order 2."""
    gaussian, path = GaussianMixture([1.0], [[GAUSSIAN_MEAN]], [[GAUSSIAN_STD**2]]), EDMPath(10.0)
    y0, counts, ends = 10.0 * jnp.linspace(-1.5, 1.5, 7)[:, None] + 1.3, (80, 160, 320), []
    exact = GAUSSIAN_MEAN + (y0 - GAUSSIAN_MEAN) * jnp.sqrt((GAUSSIAN_STD**2 + 0.01) / (GAUSSIAN_STD**2 + 100))
    for max_order in (1, 2, 3):
        grids = [karras_grid(path, n + 1, 0.1, 10.0)[:-1] for n in counts]
        solved = [solve(path, ERSDE(ODE, max_order), grid, y0, jnp.zeros((len(grid), 1, 1)), gaussian) for grid in grids]
        ends.append([float(jnp.abs(y - exact).max()) for y in solved])
    assert np.abs([convergence_order(counts, e) - p for e, p in zip(ends, (1, 2, 2))]).max() < 0.15, ends
    assert 0.5 < ends[2][-1] / ends[1][-1] < 0.7, ends


@each_scale
def test_variance_recursion(name):
    """On a Gaussian the order 1 is linear, x₁ = a x₀ + b + s z, so variances follow a recursion: with 2000 steps within 0.5 % of the truth at each.

    The coefficients a, b and s are read off three calls."""
    path, n, spread = VPPath(), 2000, 0.5
    gaussian = GaussianMixture([1.0], [[0.7]], [[spread**2]])
    grid = log_snr_grid(path, n, 0.05, 0.98)
    solver = ERSDE(SCALES[name][1], 1)

    @jax.jit
    def one(i, x, z):
        terms = terms_with(gaussian, path, grid, jnp.full((n, 1), z))
        state = solver.init(terms, i, i + 1, jnp.full(1, x), None)
        return solver.step(terms, i, i + 1, jnp.full(1, x), None, state, False)[0][0]

    steps = jnp.arange(float(n))
    b, ab, bs = (jax.vmap(lambda i, x=x, z=z: one(i, x, z))(steps) for x, z in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)))
    a, s = np.asarray(ab - b), np.asarray(bs - b)
    truth = np.asarray(path.alpha(grid) ** 2 * spread**2 + path.sigma(grid) ** 2)
    variance = [truth[0]]
    for k in range(n):
        variance.append(a[k] ** 2 * variance[-1] + s[k] ** 2)
    assert np.abs(np.array(variance) / truth - 1).max() < 5e-3


@pytest.mark.parametrize("max_order", [1, 2, 3])
def test_marginals_of_samples(max_order):
    path, n, count = VPPath(), 400, 8000
    gaussian = GaussianMixture(jnp.ones(1), jnp.array([[0.5, -1.0]]), jnp.array([[[0.5, 0.2], [0.2, 0.3]]]))
    grid = log_snr_grid(path, n, 1e-3, 1 - 1e-3)
    start = path.sigma(grid[0]) * jax.random.normal(jax.random.key(0), (count, 2)) + path.alpha(grid[0]) * gaussian.sample(jax.random.key(7), count)
    term = DenoiserTerm(gaussian.denoiser(path), path, grid)
    end = jax.jit(lambda key: integrate(term, ERSDE(max_order=max_order), start, key=key))(jax.random.key(1))
    assert_mean(end, path.alpha(grid[-1]) * gaussian.mean())
    assert_covariance(end, path.alpha(grid[-1]) ** 2 * gaussian.covariance() + path.sigma(grid[-1]) ** 2 * jnp.eye(2))


@pytest.mark.parametrize("path", [VPPath(), FlowMatchingPath(), EDMPath(20.0)], ids=repr)
def test_limits(path):
    """φ = λ is DDIM and needs no noise, φ = λ² is DDPM's ancestral step: also over the whole range, with α = 0 and σ = 0 at its ends."""
    grid = uniform_grid(8)
    y0, key = path.sigma(0.0) * jax.random.normal(jax.random.key(1), (16, 2)), jax.random.key(2)

    @jax.jit
    def ends(y0, key):
        term = DenoiserTerm(MIXTURE.denoiser(path), path, grid)
        return [integrate(term, solver, y0, key=key) for solver in (ERSDE(ODE, 1), DDIM(), ERSDE(PowerNoiseScale(2.0), 1), Ancestral())]

    ode, ddim, sde, ddpm = ends(y0, key)
    np.testing.assert_allclose(ode, ddim, atol=1e-12)
    np.testing.assert_allclose(sde, ddpm, atol=1e-12)


@pytest.mark.parametrize("path", [FlowMatchingPath(), EDMPath(20.0), CosinePath()], ids=repr)
@pytest.mark.parametrize("growth", [ODE, ExponentialNoiseScale()], ids=repr)
def test_whole_range_ends_on_the_data(path, growth):
    point = GaussianMixture(jnp.ones(1), jnp.array([[0.7, -0.3]]), jnp.zeros((1, 2, 2)))

    def end(y0):
        y1 = integrate(DenoiserTerm(point.denoiser(path), path, uniform_grid(6)), ERSDE(growth), y0, key=jax.random.key(0))
        return jnp.sum(y1**2), y1

    gradient, y1 = jax.jit(jax.grad(end, has_aux=True))(path.sigma(0.0) * jnp.array([0.4, 1.0]))
    assert bool(jnp.isfinite(gradient).all())
    np.testing.assert_allclose(y1, [0.7, -0.3], atol=1e-13)


def test_both_drivers_agree():
    path, n = VPPath(), 12
    y0 = jax.random.normal(jax.random.key(1), (32, 2))
    terms = with_noise(DenoiserTerm(MIXTURE.denoiser(path), path, uniform_grid(n, 0.0, 0.99)), jax.random.key(2), y0)
    check_drivers(terms, ERSDE(), y0)


def test_parameters_are_checked():
    for make, message in (
        (lambda: ERSDE(max_order=4), "`max_order` must be 1, 2 or 3, got 4"),
        (lambda: ERSDE(max_order=0), "`max_order` must be an integer of at least 1"),
        (lambda: PowerNoiseScale(0.9), r"`power` must lie in \[1, inf\), got 0.9"),
        (lambda: ExponentialNoiseScale(0.0), "`exponent`"),
        (lambda: ExponentialNoiseScale(offset=-1.0), "`offset`"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
