"""Time-shift sampler: the base solver at its limits, the statistics of the rule, and a NumPy copy of the loop on a table of levels."""

import functools
from statistics import NormalDist

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import AffinePath, DenoiserTerm, EDMPath, VPPath, integrate, with_noise
from ergodax.data import GaussianMixture
from ergodax.diffusion import DDIM, Ancestral, DPMSolverPP2M, PredictorCorrector, ReverseDiffusion, uniform_grid
from ergodax.diffusion.pndm import PNDM, WarmUp
from ergodax.diffusion.time_shift_sampler import TimeShift
from ergodax.testing import assert_mean, check_drivers


BETAS = np.linspace(1e-4, 0.02, 1000)
ALPHA_BAR = np.cumprod(1 - BETAS)


class Table(AffinePath):
    """The discrete schedule: level k (0 … 999) at t = 1 - (k + 1)/1000, clean data at 1, log ᾱ linear between them."""

    def log_alpha(self, t):
        table = jnp.asarray(np.log(np.append(1.0, ALPHA_BAR)))
        return jnp.interp(1000 * (1 - jnp.asarray(t)), jnp.arange(1001.0), table) / 2

    def log_sigma(self, t):
        return jnp.log(-jnp.expm1(2 * self.log_alpha(t))) / 2

    def alpha(self, t):
        return jnp.exp(self.log_alpha(t))

    def sigma(self, t):
        return jnp.exp(self.log_sigma(t))

    def time(self, log_snr):
        raise NotImplementedError


def denoiser(path):
    """ε = √(1 - ᾱ) x/(0.5 ᾱ + 1 - ᾱ) (1 + 0.2 tanh x): the exact one for variance 0.5, with an error."""

    def denoised(t, x, args):
        alpha, sigma = path.alpha(t), path.sigma(t)
        noise = sigma * x / (0.5 * alpha**2 + sigma**2) * (1 + 0.2 * jnp.tanh(x))
        return (x - sigma * noise) / alpha

    return denoised


def index_to_level(s):
    """Of a grid with 10 steps of 100 levels, which ends on clean data."""
    return 999 - 100 * np.asarray(s)


BASES = [DDIM(), DPMSolverPP2M(), PNDM(4, WarmUp.improved_euler()), Ancestral(), PredictorCorrector(ReverseDiffusion())]


@pytest.mark.parametrize("solver", BASES, ids=lambda s: type(s).__name__)
def test_no_window_or_no_cutoff_is_the_base_solver(solver):
    path = VPPath()
    mixture = GaussianMixture.isotropic(jnp.ones(2), jnp.array([[1.0, 0.0], [-1.0, 0.5]]), 0.3)
    term, key = DenoiserTerm(mixture.denoiser(path), path, uniform_grid(8, 0.02, 0.97)), jax.random.key(1)
    x = jax.random.normal(jax.random.key(0), (2,))

    @eqx.filter_jit
    def ends():
        solvers = solver, TimeShift(solver, window=0.0), TimeShift(solver, cutoff=0.0), TimeShift(solver, window=0.1)
        return [integrate(term, one, x, key=key) for one in solvers]

    expected, no_window, no_cutoff, shifted = ends()
    np.testing.assert_allclose(no_window, expected, rtol=0, atol=1e-14)  # to a rounding: two programs
    np.testing.assert_allclose(no_cutoff, expected, rtol=0, atol=1e-14)
    assert bool(jnp.isfinite(shifted).all())
    assert np.abs(shifted - expected).max() > 1e-6


def chosen_levels(x, level, window):
    """t_s of each row of `x` at `level`, by the rule on the table."""
    path = Table()
    term = DenoiserTerm(denoiser(path), path, jnp.linspace(0.0, 1.0, 11))
    solver = TimeShift(DDIM(), window / 1000, 1.0, window + 1)
    index = jnp.asarray((999 - level) / 100)
    return index_to_level(jax.jit(jax.vmap(lambda x: solver.matching_index(term, index, x)))(x))


@functools.cache
def constant_data(level, variance=0.0, dim=4096, count=400):
    """x at `level` for data with component mean 0.3 and variance `variance`."""
    key_data, key_noise = jax.random.split(jax.random.key(level))
    data = 0.3 + variance**0.5 * jax.random.normal(key_data, (count, dim))
    return np.sqrt(ALPHA_BAR[level]) * data + np.sqrt(1 - ALPHA_BAR[level]) * jax.random.normal(key_noise, (count, dim))


def test_rule_is_centred_on_the_true_level():
    level, dim = 200, 4096
    error = chosen_levels(constant_data(level), level, 60) - level
    np.testing.assert_allclose(error, np.round(error), atol=1e-9)
    assert_mean(error[:, None], 0.0, 4)
    spread = np.sqrt(2 / dim) * (1 - ALPHA_BAR[level]) / (BETAS[level] * ALPHA_BAR[level])
    # Rounding to whole levels adds 1/12 to the variance; a standard deviation of n draws has a relative error of √(1/2n).
    np.testing.assert_allclose(error.std(), np.sqrt(spread**2 + 1 / 12), rtol=4.5 / np.sqrt(2 * len(error)))
    assert 0.05 < np.mean(error == 0) < 0.25


def test_variance_shifts_the_level():
    """Noise of variance 0.01 on top moves t_s by 0.01/(dσ²/dk); data of variance 1 pin it to the noisy end of the window."""
    level = 200
    noisier = constant_data(level) + 0.1 * jax.random.normal(jax.random.key(9), (400, 4096))
    shift = chosen_levels(noisier, level, 60).mean() - level
    variance = 1 - ALPHA_BAR
    expected = np.argmin(np.abs(variance - variance[level] - 0.01)) - level
    assert abs(shift - expected) < 0.6, (shift, expected)
    for level in (200, 500):
        # The state's variance is 1; it misses the last level where it scatters below the middle of the last two.
        share = 1 - NormalDist(1.0, np.sqrt(2 / 4095)).cdf(variance[level + 29 : level + 31].mean())
        hits = np.mean(chosen_levels(constant_data(level, 1.0), level, 60) == level + 30)
        assert share > 0.98
        assert abs(hits - share) < 4.5 * np.sqrt(share * (1 - share) / 400) + 1e-9


def numpy_loop(x, window, cutoff):
    """TS-DDIM over levels 999, 899, … 99 and clean data, as the paper's algorithm says; one example."""
    levels, shifted = [999, 899, 799, 699, 599, 499, 399, 299, 199, 99, -1], []
    start = 999
    for target in levels[1:]:
        a0, a1 = ALPHA_BAR[start], ALPHA_BAR[target] if target >= 0 else 1.0
        noise = np.sqrt(1 - a0) * x / (0.5 * a0 + 1 - a0) * (1 + 0.2 * np.tanh(x))
        x = np.sqrt(a1) * (x - np.sqrt(1 - a0) * noise) / np.sqrt(a0) + np.sqrt(1 - a1) * noise
        start = target
        if target > cutoff:
            choice = np.arange(max(target - window // 2, 0), min(target + window // 2, 999) + 1)
            start = choice[np.abs(x.var(ddof=1) - (1 - ALPHA_BAR[choice])).argmin()]
        shifted.append(start)
    return x, shifted


@pytest.mark.parametrize(("window", "cutoff"), [(30, 300), (200, 150), (5, 550)])
def test_numpy_loop(window, cutoff):
    path = Table()
    term = DenoiserTerm(denoiser(path), path, jnp.linspace(0.0, 1.0, 11))
    solver = TimeShift(DDIM(), window // 2 * 2 / 1000, 1 - (cutoff + 1) / 1000, window // 2 * 2 + 1)

    @jax.jit
    def run(x):
        def body(carry, s):
            y, state = carry
            y, _, _, state, _ = solver.step(term, s, s + 1, y, None, state, False)
            return (y, state), state[0]

        state = solver.init(term, jnp.asarray(0.0), jnp.asarray(1.0), x, None)
        (end, _), indices = jax.lax.scan(body, (x, state), jnp.arange(10.0))
        return end, indices

    rng = np.random.default_rng(3)
    for _ in range(3):
        x = rng.normal(size=48)
        expected, levels = numpy_loop(x, window, cutoff)
        end, indices = run(jnp.asarray(x))
        np.testing.assert_allclose(index_to_level(indices), levels, atol=1e-9)
        assert any(level != nominal for level, nominal in zip(levels, range(899, -2, -100)))
        np.testing.assert_allclose(end, expected, atol=1e-9)
        np.testing.assert_allclose(integrate(term, solver, jnp.asarray(x)), expected, atol=1e-9)


def test_window_on_an_uneven_grid():
    """Candidates stay in the window on both sides of a grid point between steps of different lengths."""
    path = EDMPath(1.0)
    grid = jnp.array([0.0, 0.2, 0.5, 0.6, 1.0])
    term = DenoiserTerm(lambda t, x, args: x, path, grid)
    solver = TimeShift(DDIM(), 0.1, 1.0, 101)
    for index, time in ((1.0, 0.2), (2.0, 0.5), (3.0, 0.6)):
        for target in (time - 0.05, time - 0.02, time + 0.03, time + 0.05):
            x = (1 - target) * jnp.array([1.0, -1.0]) / jnp.sqrt(2.0)
            found = term.time(solver.matching_index(term, jnp.asarray(index), x))
            np.testing.assert_allclose(found, target, atol=1e-9)
    # The first step's window reaches before the grid, the last one's beyond the end of the path.
    assert float(TimeShift(DDIM(), 1.0, 1.0, 101).matching_index(term, jnp.asarray(1.0), 9 * jnp.array([1.0, -1.0]))) == 0.0
    assert np.isfinite(TimeShift(DDIM(), 1.0, 1.0, 101).matching_index(term, jnp.asarray(3.0), jnp.array([1.0, 1.0])))


@pytest.mark.parametrize("solver", [TimeShift(DPMSolverPP2M(), 0.1), TimeShift(Ancestral(), 0.1)], ids=("DPM++2M", "Ancestral"))
def test_both_drivers_agree(solver):
    path, n = VPPath(), 10
    mixture = GaussianMixture.isotropic(jnp.ones(2), jnp.array([[1.0, 0.0], [-1.0, 0.5]]), 0.3)
    x = jax.random.normal(jax.random.key(1), (2,))
    model = DenoiserTerm(mixture.denoiser(path), path, uniform_grid(n, 0.0, 0.99))
    terms = with_noise(model, jax.random.key(2), x) if isinstance(solver.solver, Ancestral) else model
    check_drivers(terms, solver, x)


def test_parameters_are_checked():
    for make, message in (
        (lambda: TimeShift(DDIM(), -0.1), r"`window` must lie in \[0, 1\], got -0.1"),
        (lambda: TimeShift(DDIM(), cutoff=2.0), "`cutoff`"),
        (lambda: TimeShift(DDIM(), num_candidates=4), "`num_candidates` must be odd, got 4"),
        (lambda: integrate(DenoiserTerm(lambda t, x, args: x, VPPath(), uniform_grid(2)), TimeShift(DDIM()), jnp.ones(1)), "at least two numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
