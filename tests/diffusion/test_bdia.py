"""BDIA: its formula, exact inversion and how rounding grows in it, orders, limits, both drivers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import Denoiser, DenoiserTerm, EDMPath, NoisePrediction, VPPath, integrate
from ergodax.data import GaussianMixture
from ergodax.diffusion import DDIM, Heun, karras_grid, log_snr_grid, uniform_grid
from ergodax.diffusion.bdia import BDIA, bdia_integrate, bdia_invert, heun_move
from ergodax.testing import check_drivers, convergence_order


PATH = VPPath()
MIXTURE = GaussianMixture.isotropic(jnp.array([0.3, 0.5, 0.2]), jnp.array([[1.0, 0.5], [-1.0, 0.2], [0.3, -1.2]]), jnp.array([0.4, 0.5, 0.3]))


@eqx.filter_jit
def solve(solver, grid, y0, mixture=MIXTURE, path=PATH):
    return integrate(DenoiserTerm(mixture.denoiser(path), path, grid), solver, y0)


def random_network(seed=0, width=32):
    first, second = jax.random.split(jax.random.key(seed))
    w, v = 1.5 * jax.random.normal(first, (width, 2)), jax.random.normal(second, (2, width)) / jnp.sqrt(width)
    return lambda t, x, args: v @ jnp.tanh(w @ x + t + args)


def test_update_of_the_paper():
    """Three steps on a grid of unequal steps, written with α and σ: D, then D + γ (x₋ - D back)."""
    gamma, grid, x = 0.7, np.array([0.1, 0.3, 0.45, 0.7]), [jnp.array([0.4, -1.1])]
    alpha, sigma = PATH.alpha(grid), PATH.sigma(grid)
    for i in range(3):
        data = MIXTURE.denoised(PATH, grid[i], x[i])
        noise = (x[i] - alpha[i] * data) / sigma[i]
        forward = alpha[i + 1] * (x[i] - sigma[i] * noise) / alpha[i] + sigma[i + 1] * noise
        correction = 0.0 if i == 0 else x[i - 1] - (alpha[i - 1] * (x[i] - sigma[i] * noise) / alpha[i] + sigma[i - 1] * noise)
        x.append(forward + gamma * correction)
    np.testing.assert_allclose(solve(BDIA(gamma), jnp.asarray(grid), x[0]), x[-1], atol=1e-13)


def round_trip_error(gamma, n):
    term = DenoiserTerm(Denoiser(random_network(), PATH, NoisePrediction()), PATH, uniform_grid(n, 0.0, 0.95))
    y0 = jnp.array([0.4, -1.1])

    @jax.jit
    def run(y0, gamma):
        end, states = integrate(term, BDIA(gamma), y0, 0.2, save=lambda t, y: y)
        first, second = bdia_invert(term, BDIA(gamma), (states[-2], end), 0.2)
        return jnp.maximum(jnp.abs(first - y0).max(), jnp.abs(second - states[0]).max())

    return float(run(y0, jnp.asarray(gamma)))


def test_exact_inversion():
    """To rounding at γ = 1; at γ = 0.5 rounding grows with n, about as 2ⁿ times what the network adds, and 40 steps are lost."""
    assert max(round_trip_error(1.0, n) for n in (10, 40, 80)) < 1e-10
    half = [round_trip_error(0.5, n) for n in (10, 20, 40)]
    assert half[0] < 1e-7
    assert 2.0**5 < half[1] / half[0] < 2.0**18, half
    assert half[2] > 1e-4, half


def test_ddim_inversion_is_not_exact():
    n = 10
    network = Denoiser(random_network(), PATH, NoisePrediction())
    grid, y0 = uniform_grid(n, 0.0, 0.95), jnp.array([0.4, -1.1])
    end = integrate(DenoiserTerm(network, PATH, grid), DDIM(), y0, 0.2)
    back = integrate(DenoiserTerm(network, PATH, grid[::-1], restarts=True), DDIM(), end, 0.2)
    assert jnp.abs(back - y0).max() > 0.1


def test_round_trip_editing():
    """Data to noise and back, from an approximate second state: the source prompt returns the data, another prompt does not."""
    term = DenoiserTerm(Denoiser(random_network(), PATH, NoisePrediction()), PATH, uniform_grid(12, 0.0, 0.95))
    data, solver = jnp.array([0.8, 0.3]), BDIA(0.9)

    @jax.jit
    def edit(source, target):
        before = integrate(DenoiserTerm(term.denoised, PATH, term.grid[-1:-3:-1], restarts=True), DDIM(), data, source)
        return bdia_integrate(term, solver, bdia_invert(term, solver, (before, data), source), target)[1]

    np.testing.assert_allclose(edit(0.2, 0.2), data, atol=1e-10)
    assert jnp.abs(edit(0.2, 0.6) - data).max() > 1e-2


@pytest.mark.parametrize(("gamma", "low", "high"), [(1.0, 3.9, 4.1), (0.5, 1.75, 2.25), (0.0, 1.75, 2.25)])
def test_error_ratios_on_a_gaussian(gamma, low, high):
    """The card's: VP from t = 0 to 0.95 in equal steps; and γ = 0.5 has (1 - γ)/(1 + γ) = 1/3 of DDIM's error."""
    gaussian, y0 = GaussianMixture([1.0], [[0.7]], [[0.25]]), jnp.array([1.3])
    a0, a1, s0, s1 = (clock(t) for clock in (PATH.alpha, PATH.sigma) for t in (0.0, 0.95))
    exact = 0.7 * a1 + (y0 - 0.7 * a0) * jnp.sqrt((0.25 * a1**2 + s1**2) / (0.25 * a0**2 + s0**2))
    errors, plain = (
        [float(jnp.abs(solve(BDIA(jnp.asarray(g)), uniform_grid(n, 0.0, 0.95), y0, gaussian) - exact)[0]) for n in (160, 320, 640)]
        for g in (gamma, 0.0)
    )
    assert low < errors[0] / errors[1] < high, errors
    assert low < errors[1] / errors[2] < high, errors
    if gamma == 0.5:
        assert abs(errors[2] / plain[2] - 1 / 3) < 0.02, (errors, plain)


@pytest.mark.parametrize(
    ("solver", "path", "order"),
    [(BDIA(jnp.asarray(1.0)), PATH, 2), (BDIA(jnp.asarray(0.5)), PATH, 1), (BDIA(jnp.asarray(0.5), heun_move), EDMPath(20.0), 2)],
    ids=["leapfrog", "half", "Heun"],
)
def test_order(solver, path, order):
    def grid(n):
        return log_snr_grid(path, n, 0.05, 0.97) if path is PATH else karras_grid(path, n + 1, 0.05, 20.0)[:-1]

    y0, counts = path.sigma(grid(2)[0]) * jax.random.normal(jax.random.key(0), (64, 2)), (64, 128, 256, 512)
    fine = solve(Heun(), grid(4096), y0, path=path)
    errors = [float(jnp.sqrt(jnp.mean((solve(solver, grid(n), y0, path=path) - fine) ** 2))) for n in counts]
    assert abs(convergence_order(counts, errors) - order) < 0.2, errors


def test_limits():
    """γ = 0 is DDIM, or Heun, to the rounding of ten steps, as two programs do not round alike; the whole range is finite."""
    y0 = jax.random.normal(jax.random.key(1), (16, 2))
    grid = uniform_grid(10)
    assert BDIA().order(None) == 1
    np.testing.assert_allclose(solve(BDIA(jnp.asarray(0.0)), grid, y0), solve(DDIM(), grid, y0), rtol=0, atol=1e-14)
    edm = EDMPath(20.0)
    ends = [solve(solver, grid, 20 * y0, path=edm) for solver in (BDIA(jnp.asarray(0.0), heun_move), Heun())]
    np.testing.assert_allclose(*ends, rtol=0, atol=2e-13)  # which starts at 20
    assert bool(jnp.isfinite(solve(BDIA(jnp.asarray(0.5), heun_move), grid, 20 * y0, path=edm)).all())


def test_both_drivers_agree():
    n = 9
    term, y0 = DenoiserTerm(MIXTURE.denoiser(PATH), PATH, uniform_grid(n, 0.0, 0.99)), jax.random.normal(jax.random.key(1), (32, 2))
    check_drivers(term, BDIA(0.8), y0)


def test_parameters_are_checked():
    with pytest.raises(ValueError, match="gamma"):
        BDIA(jnp.inf)
    term, pair = DenoiserTerm(MIXTURE.denoiser(PATH), PATH, uniform_grid(3, 0.0, 0.9)), (jnp.ones(2), jnp.ones(2))
    with pytest.raises(ValueError, match="`gamma` must not be 0"):
        bdia_invert(term, BDIA(0.0), pair)
    with pytest.raises(ValueError, match="at least two steps, got 1"):
        bdia_integrate(DenoiserTerm(MIXTURE.denoiser(PATH), PATH, jnp.array([0.1, 0.2])), BDIA(), pair)
