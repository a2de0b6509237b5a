"""Time correction sampler: DDPM at its limit, the paper's step by hand, and what it is worth when states are kicked off their manifold."""

import functools

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import DenoiserTerm, VPPath, integrate, with_noise
from ergodax.data import GaussianMixture, energy_distance
from ergodax.diffusion import DDIM, Ancestral, uniform_grid
from ergodax.diffusion.time_correction_sampler import TimeCorrection
from ergodax.diffusion.wrapped_solver import WrappedSolver
from ergodax.testing import check_drivers, z_scores


# The linear betas 1e-3 … 0.12 of 100 steps, in continuous time.
PATH, STEPS = VPPath(0.1, 12.0), 100
GRID = uniform_grid(STEPS)
MIXTURE = GaussianMixture.isotropic(jnp.ones(3), jnp.array([[1.5, 0.0], [-1.0, 1.2], [-0.6, -1.4]]), 0.15**0.5)
TERM = DenoiserTerm(MIXTURE.denoiser(PATH), PATH, GRID)


def bayes(x):
    """log p(k | x) for uniform k, up to a number."""
    return jax.vmap(lambda t: MIXTURE.log_prob_at(PATH, t, x))(GRID[:-1])


def energy(denoised, args):
    return jnp.sum((denoised[0] - args) ** 2)


class Kicked(WrappedSolver):
    """A solver whose every step but the last is followed by noise of standard deviation `scale`."""

    solver: dfx.AbstractSolver
    scale: jax.Array
    key: jax.Array

    def init(self, terms, t0, t1, y0, args):
        return self.solver.init(terms, t0, t1, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        y1, *rest = self.solver.step(terms, t0, t1, y0, args, solver_state, made_jump)
        kick = self.scale * jax.random.normal(jax.random.fold_in(self.key, t1.astype(int)), y1.shape)
        return (y1 + jnp.where(t1 < STEPS, kick, 0), *rest)


COUNT = 600


@functools.cache
def samples(eta=1.0, window=0.0, scale=0.0):
    """Independent chains; all three numbers are traced, so that one program makes them all."""
    return _sample(*(jnp.asarray(number) for number in (eta, window, scale)), jax.random.split(jax.random.key(1), COUNT))


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, None, None, 0))
def _sample(eta, window, scale, key):
    kick, start, noise = jax.random.split(key, 3)
    solver = Kicked(TimeCorrection(Ancestral(eta), bayes, window), scale, kick)
    return integrate(TERM, solver, jax.random.normal(start, (2,)), key=noise)


def test_no_window_is_the_base_solver():
    """DDPM to the bit, within one program."""
    x, key = jax.random.normal(jax.random.key(0), (2,)), jax.random.key(1)

    @jax.jit
    def ends(x):
        return [integrate(TERM, solver, x, key=key) for solver in (Ancestral(), *(TimeCorrection(Ancestral(), bayes, w) for w in (0.0, 4.0)))]

    ddpm, same, other = ends(x)
    np.testing.assert_array_equal(same, ddpm)
    assert not np.array_equal(other, ddpm)


def test_predicted_index_is_the_best_in_the_window():
    solver = TimeCorrection(DDIM(), bayes, 7.0)
    x = 1.5 * jax.random.normal(jax.random.key(0), (200, 2))
    index = np.random.default_rng(0).integers(0, STEPS, 200)
    found = jax.jit(jax.vmap(solver.predicted_index))(jnp.asarray(index, float), x)
    logits = np.asarray(jax.jit(jax.vmap(bayes))(x))
    for s, k, row in zip(index, found, logits):
        window = np.arange(max(s - 7, 0), min(s + 7, STEPS - 1) + 1)
        assert int(k) == window[row[window].argmax()]


def one_step(solver, s, x, key, args):
    """A step from index `s` with its noise."""
    terms, start, end = with_noise(TERM, key, x), jnp.asarray(float(s)), jnp.asarray(s + 1.0)
    z = terms.terms[1].contr(start, end)
    y, *_ = solver.step(terms, start, end, x, args, None, False)
    return y, z


@pytest.mark.parametrize("share", [None, 0.3])
def test_one_step_by_hand(share):
    """Guidance, correction and DDPM's posterior (Ho et al. 2020, eq. 7) with the nominal coefficients; and the forward noise."""
    s, x, wanted, z = 60, jnp.array([0.9, -0.4]), jnp.asarray(1.4), 0.3
    t0, t1 = float(GRID[s]), float(GRID[s + 1])
    slope = 1e-6
    ends = [[energy(MIXTURE.denoised(PATH, t0, x + sign * slope * e), wanted) for sign in (1, -1)] for e in jnp.eye(2)]
    guided = x - z * jnp.array([(a - b) / (2 * slope) for a, b in ends])
    logits = np.asarray(bayes(guided))
    k = s - 5 + int(logits[s - 5 : s + 6].argmax())
    assert k != s
    denoised = MIXTURE.denoised(PATH, GRID[k], guided)
    if share is not None:
        denoised = share * denoised + (1 - share) * MIXTURE.denoised(PATH, t0, guided)
    bar0, bar1 = PATH.alpha(t0) ** 2, PATH.alpha(t1) ** 2
    beta = 1 - bar0 / bar1
    mean = jnp.sqrt(bar1) * beta / (1 - bar0) * denoised + jnp.sqrt(1 - beta) * (1 - bar1) / (1 - bar0) * guided
    key = jax.random.key(5)
    posterior = TimeCorrection(Ancestral(), bayes, 5.0, energy, z, share)
    actual, noise = one_step(posterior, s, x, key, wanted)
    np.testing.assert_allclose(actual, mean + jnp.sqrt((1 - bar1) / (1 - bar0) * beta) * noise, atol=1e-8)
    forward = TimeCorrection(Ancestral(jnp.inf), bayes, 5.0, energy, z, share)
    actual, noise = one_step(forward, s, x, key, wanted)
    np.testing.assert_allclose(actual, jnp.sqrt(bar1) * denoised + jnp.sqrt(1 - bar1) * noise, atol=1e-8)


def test_correction_repairs_kicks():
    """Kicks of 0.2 after every step: Δ = 4 at least halves the energy distance, which is far above what redrawn data have."""
    data, *redrawn = (MIXTURE.sample(jax.random.key(seed), COUNT) for seed in range(7, 16))
    distance = jax.jit(lambda sample: energy_distance(sample, data))
    plain, corrected = (distance(samples(window=window, scale=0.2)) for window in (0.0, 4.0))
    assert plain > 5 * max(map(distance, redrawn))
    assert corrected < plain / 2, (plain, corrected)


def test_forward_noise_loses_variance():
    """The spread about the nearest mode: the posterior form keeps it (z test); the forward form does not, for a mean spreads less than a draw."""

    def spread(x):
        return jnp.min(jnp.sum((x[:, None] - MIXTURE.means) ** 2, axis=-1), axis=1)

    expected = np.mean(spread(MIXTURE.sample(jax.random.key(9), 100_000)))
    assert abs(z_scores(spread(samples()), expected)) < 4.5
    assert z_scores(spread(samples(eta=float("inf"))), expected) < -9


def test_guidance_reaches_the_property():
    """Online guidance moves the first coordinate towards what is wanted; the correction works beside it, on a batch by vmap."""

    @jax.jit
    def run(scale, window):
        def one(key):
            start, noise = jax.random.split(key)
            solver = TimeCorrection(Ancestral(), bayes, window, energy, scale)
            return integrate(TERM, solver, jax.random.normal(start, (2,)), jnp.asarray(1.5), key=noise)

        return jax.vmap(one)(jax.random.split(jax.random.key(2), 64))

    miss = [float(jnp.mean(jnp.abs(run(scale, window)[:, 0] - 1.5))) for scale, window in ((0.0, 0.0), (0.1, 0.0), (0.1, 3.0))]
    assert miss[1] < 0.5 * miss[0], miss
    assert miss[2] < 0.5 * miss[0], miss


def test_both_drivers_agree():
    x = jnp.array([0.3, -1.0])
    terms = with_noise(TERM, jax.random.key(2), x)
    solver = TimeCorrection(Ancestral(), bayes, 3.0, energy, 0.05)
    check_drivers(terms, solver, x, jnp.asarray(1.0), tolerance=1e-10)


def test_parameters_are_checked():
    for make, message in (
        (lambda: TimeCorrection(DDIM(), bayes, -1.0), r"`window` must lie in \[0, inf\), got -1.0"),
        (lambda: TimeCorrection(DDIM(), bayes, guidance_scale=-1.0), "`guidance_scale`"),
        (lambda: TimeCorrection(DDIM(), bayes, corrected_share=1.5), "`corrected_share`"),
        (lambda: TimeCorrection(DDIM(), lambda x: jnp.zeros((2, 2))).predicted_index(jnp.asarray(0.0), jnp.zeros(2)), r"shape \(K,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
