"""Denoising Langevin Gibbs: its invariant law by χ², ULA at one level, and denoising MCMC against a sampler from noise."""

import functools

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from ergodax.core import DenoiserTerm, EDMPath, VPPath, integrate, iterate
from ergodax.data import GaussianMixture, energy_distance
from ergodax.diffusion import Heun, karras_grid, log_snr_grid
from ergodax.diffusion.denoising_mcmc_dlg import DenoisingLangevinGibbs, DenoisingMCMC, KarrasDenoise, LevelState, most_likely
from ergodax.testing import assert_covariance, assert_mean


MIXTURE = GaussianMixture(
    jnp.array([0.3, 0.4, 0.3]), jnp.array([[2.0, 0.0], [-1.5, 1.5], [-1.0, -2.0]]), jnp.array([[0.1, 0.2], [0.25, 0.1], [0.15, 0.15]])
)


def make_chain(path, times, step_size, draw=jax.random.categorical):
    def bayes(x):
        return jax.vmap(lambda t: MIXTURE.log_prob_at(path, t, x))(times)

    return DenoisingLangevinGibbs(MIXTURE.denoiser(path), path, times, bayes, step_size, draw)


@functools.cache
def levels_after(draw, step_size, count=4000):
    """The levels (0 … 59) of independent chains that start in p(x, k), after 60 steps."""
    return _levels_after(draw, count)(jnp.asarray(step_size))


@functools.cache
def _levels_after(draw, count):
    path = EDMPath(2.5)
    times = log_snr_grid(path, 59, float(path.time(-2 * np.log(2.0))), float(path.time(-2 * np.log(0.05))))

    @jax.jit
    def run(step_size):
        chain = make_chain(path, times, step_size, draw)
        key_level, key_data, key_noise, key_chain = jax.random.split(jax.random.key(0), 4)
        level = jax.random.randint(key_level, (count,), 0, 60)
        noise = jax.random.normal(key_noise, (count, 2))
        state = LevelState(MIXTURE.sample(key_data, count) + path.sigma(times[level])[:, None] * noise, level)
        return jax.vmap(lambda key, state: iterate(key, chain.step, state, 60))(jax.random.split(key_chain, count), state).level

    return run


def p_value(levels):
    return float(chisquare(np.bincount(np.asarray(levels) // 6, minlength=10)).pvalue)


@pytest.mark.parametrize("step_size", [0.001, 0.01])
def test_levels_stay_uniform(step_size):
    assert p_value(levels_after(jax.random.categorical, step_size)) > 0.001


@pytest.mark.parametrize(("draw", "step_size"), [(jax.random.categorical, 0.1), (most_likely, 0.01)])
def test_large_steps_and_argmax_are_biased(draw, step_size):
    """What the paper's approximations cost: the bias of unadjusted Langevin towards large noise, and of the argmax towards small."""
    levels = levels_after(draw, step_size)
    assert p_value(levels) < 1e-4
    mean = float(jnp.mean(levels)) - 29.5
    assert (mean > 2) if draw is most_likely else (mean < 0)


@pytest.mark.parametrize("path", [EDMPath(20.0), VPPath()], ids=("EDM", "VP"))
def test_one_level_is_langevin(path):
    """x + (η/2) ∇ log p_t(x) + √η ξ, by the moments of 4000 steps from one point."""
    t, x, eta = 0.9, jnp.array([0.4, -0.3]), 0.05
    chain = make_chain(path, jnp.array([t]), eta)
    state = chain.init(x)
    moved, info = jax.jit(jax.vmap(lambda key: chain.step(key, state)))(jax.random.split(jax.random.key(1), 4000))
    assert_mean(moved.position, x + eta / 2 * MIXTURE.score_at(path, t, x))
    assert_covariance(moved.position, eta * jnp.eye(2))
    assert not moved.level.any()
    np.testing.assert_array_equal(info.position, moved.position)


@functools.cache
def denoising():
    """Denoising MCMC with 5 + 5 network calls per sample, and its path."""
    path = EDMPath(20.0)
    times = log_snr_grid(path, 99, 0.0, float(path.time(-2 * np.log(0.01))))
    chain = make_chain(path, times, 0.05)
    return path, DenoisingMCMC(chain, KarrasDenoise(MIXTURE.denoiser(path), path, Heun(), 3), 5)


def test_ten_calls_beat_nine_from_noise():
    """Energy distance of 800 chains' samples, 5 chain calls and 5 of Heun each, to that of Karras's Heun with 9 calls from noise: a quarter."""
    path, kernel = denoising()
    count, data = 800, MIXTURE.sample(jax.random.key(5), 800)

    @jax.jit
    def samples(key):
        key_start, key_chain = jax.random.split(key)
        start = jax.vmap(kernel.init)(MIXTURE.sample(key_start, count) + 0.5 * jax.random.normal(key_chain, (count, 2)))
        step = jax.vmap(kernel.step)
        state, _ = step(jax.random.split(key_start, count), start)
        return step(jax.random.split(key_chain, count), state)[1].sample

    @jax.jit
    def from_noise(key):
        term = DenoiserTerm(MIXTURE.denoiser(path), path, karras_grid(path, 5, 0.01, 20.0))
        return integrate(term, Heun(), path.prior(key, (count, 2)))

    ours, theirs = (float(energy_distance(sample, data)) for sample in (samples(jax.random.key(6)), from_noise(jax.random.key(7))))
    assert ours < theirs / 4, (ours, theirs)


def test_least_noisy_state_is_denoised():
    """The best of the n + 1 states by hand, with the chain's own keys."""
    _, kernel = denoising()
    state, key = kernel.init(jnp.array([2.0, 0.5])), jax.random.key(3)
    after, info = jax.jit(lambda key: kernel.step(key, state))(key)
    advance, states = jax.jit(lambda key, state: kernel.chain.step(key, state)[0]), [state]
    for k in jax.random.split(jax.random.split(key)[0], 5):
        states.append(advance(k, states[-1]))
    # Levels are sorted from σ_max down: the first of the highest index.
    best = max(states, key=lambda state: int(state.level))
    assert best is not states[-1]
    np.testing.assert_allclose(info.start.position, best.position, atol=1e-12)
    np.testing.assert_allclose(after.position, states[-1].position, atol=1e-12)
    t = kernel.chain.times[best.level]
    np.testing.assert_allclose(info.sample, jax.jit(lambda x: kernel.denoise(key, x, t))(best.position), atol=1e-10)


def test_denoising_from_the_last_level():
    """At σ_min and below it all levels lie together, and the last step goes to the posterior mean."""
    path, kernel = denoising()
    x = jnp.array([1.9, 0.1])
    for sigma in (0.01, 0.004):
        t = jnp.asarray(1 - sigma / 20.0)
        np.testing.assert_allclose(kernel.denoise(jax.random.key(0), x, t), MIXTURE.denoised(path, t, x), atol=1e-6 * sigma)


def test_runs_in_blackjax():
    _, kernel = denoising()
    with jax.numpy_dtype_promotion("standard"):
        final, samples = blackjax.util.run_inference_algorithm(
            jax.random.key(0), kernel, 6, initial_position=jnp.zeros(2), transform=lambda state, info: info.sample
        )
    assert samples.shape == (6, 2)
    assert bool(jnp.isfinite(samples).all())
    assert final.position.shape == (2,)


def test_parameters_are_checked():
    path = EDMPath(2.0)
    with pytest.raises(ValueError, match=r"`step_size` must lie in \[0, inf\), got -0.1"):
        make_chain(path, jnp.array([0.5]), -0.1)
    with pytest.raises(ValueError, match="`times`"):
        make_chain(path, jnp.array([0.5, jnp.nan]), 0.1)
    with pytest.raises(ValueError, match="`num_steps`"):
        DenoisingMCMC(make_chain(path, jnp.array([0.5]), 0.1), KarrasDenoise(MIXTURE.denoiser(path), path, Heun(), 3), 0)
