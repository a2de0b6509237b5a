"""AR-Diffusion: its levels against enumeration, its schedule against counts, and sampling of a Gaussian autoregression in closed form."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ergodax.core import DataPrediction, DenoiserTerm, NoisePrediction, VPPath, integrate
from ergodax.diffusion import DDIM, Ancestral, DenoisingLoss, MinSNR, uniform_grid
from ergodax.diffusion.ar_diffusion import (
    FrameTimes,
    FramewiseDenoiser,
    FramewiseLoss,
    asynchronous_schedule,
    asynchronous_term,
)


F, T = 3, 5
TIMES = FrameTimes(uniform_grid(T), F)
SEQUENCES = [s for s in itertools.product(range(T), repeat=F) if list(s) == sorted(s)]


def counts_of(levels, sequences):
    index = {s: i for i, s in enumerate(sequences)}
    return np.bincount([index[tuple(row)] for row in np.asarray(levels).tolist()], minlength=len(sequences))


@pytest.mark.parametrize(("frame", "level"), [(1, 2), (0, 1), (2, 3)])
def test_completions_are_uniform(frame, level):
    """Their number is that of the binomials; all are as likely as one another."""
    through = [s for s in SEQUENCES if s[frame] == level]
    assert len(through) == math.comb(T - 1 - level + F - 1 - frame, F - 1 - frame) * math.comb(level + frame, frame)
    levels = jax.jit(jax.vmap(TIMES.complete, in_axes=(0, None, None)))(jax.random.split(jax.random.key(0), 4000), jnp.array(frame), jnp.array(level))
    assert scipy.stats.chisquare(counts_of(levels, through)).pvalue > 1e-3


def test_times_mix_all_frames_and_levels():
    times = jax.jit(lambda key: TIMES(key, 6000))(jax.random.key(1))
    levels = np.rint((1 - np.asarray(times)) * T).astype(int) - 1
    probability = np.array([sum(1 / (F * T * sum(o[f] == s[f] for o in SEQUENCES)) for f in range(F)) for s in SEQUENCES])
    np.testing.assert_allclose(probability.sum(), 1)
    assert scipy.stats.chisquare(counts_of(levels, SEQUENCES), 6000 * probability).pvalue > 1e-3


@pytest.mark.parametrize("gap", [0, 1, 3, 5, 9])
def test_schedule(gap):
    """T + (F - 1) gap sweeps up to gap = T, each of at most one step per frame, earlier frames ahead by `gap` while both run."""
    rows = asynchronous_schedule(F, T, gap)
    assert len(rows) - 1 == T + (F - 1) * min(gap, T)
    steps = np.diff(rows, axis=0)
    assert ((steps == 0) | (steps == 1)).all()
    assert (rows[0] == 0).all()
    assert (rows[-1] == T).all()
    running = (rows[:, 1:] > 0) & (rows[:, :-1] < T)
    assert (np.diff(rows, axis=1)[running] == -gap).all()
    if gap == 0:
        assert (rows == rows[:, :1]).all()


def test_schedule_of_the_paper_s_rule():
    """Three frames, two steps, a gap of one, by hand."""
    np.testing.assert_array_equal(asynchronous_schedule(3, 2, 1), [[0, 0, 0], [1, 0, 0], [2, 1, 0], [2, 2, 1], [2, 2, 2]])


FRAMES, RHO, PATH = 4, 0.8, VPPath()
COVARIANCE = RHO ** jnp.abs(jnp.arange(FRAMES)[:, None] - jnp.arange(FRAMES)).astype(float)


def exact(t, x, args):
    """E[x₁ | x] of the autoregression, every frame at its own noise level; x of shape (F,)."""
    alpha, sigma = PATH.alpha(t), PATH.sigma(t)
    marginal = alpha[:, None] * COVARIANCE * alpha + jnp.diag(sigma**2)
    return (COVARIANCE * alpha) @ jnp.linalg.solve(marginal, x)


def causal(t, x, args):
    """The same with every frame seeing those up to itself."""
    alpha, sigma = PATH.alpha(t), PATH.sigma(t)
    marginal = alpha[:, None] * COVARIANCE * alpha + jnp.diag(sigma**2)

    def frame(f):
        seen = (jnp.arange(FRAMES) <= f).astype(x.dtype)
        masked = marginal * seen[:, None] * seen + jnp.diag(1 - seen)
        return (COVARIANCE[f] * alpha * seen) @ jnp.linalg.solve(masked, seen * x)

    return jax.vmap(frame)(jnp.arange(FRAMES))


@functools.cache
def law(denoised, gap, num_steps=50):
    """(variance of the last frame, lag-1 correlation, the covariance) of DDIM's samples: a linear map of the noise, read off a basis."""
    frame_times = uniform_grid(num_steps)[asynchronous_schedule(FRAMES, num_steps, gap)]
    term = asynchronous_term(denoised, PATH, frame_times, 0)
    columns = jax.jit(jax.vmap(lambda x: integrate(term, DDIM(), x)))(jnp.eye(FRAMES))
    covariance = columns.T @ columns
    correlation = covariance / jnp.sqrt(jnp.outer(jnp.diag(covariance), jnp.diag(covariance)))
    return float(jnp.diag(covariance).min()), float(jnp.diag(correlation, 1).mean()), covariance


@pytest.mark.parametrize("gap", [0, 10, 50])
def test_exact_model_is_right_at_every_gap(gap):
    variance, correlation, _ = law(exact, gap)
    assert abs(correlation - RHO) < 0.03
    assert variance > 0.9


def test_error_falls_with_the_steps():
    """Order 1 of DDIM, with a gap too."""
    for gap in (0, 10):
        coarse, fine = (jnp.abs(law(exact, gap * n // 50, n)[2] - COVARIANCE).max() for n in (50, 100))
        assert 1.7 < coarse / fine < 2.3, (gap, coarse, fine)


def test_causal_model_needs_autoregression():
    """A frame that sees no later one learns of its predecessors too late, unless they are finished: the card's numbers."""
    assert abs(law(causal, 50)[1] - RHO) < 0.03
    assert abs(law(causal, 0)[1] - 0.52) < 0.03


def test_no_gap_is_plain_ddim_and_idle_frames_stay():
    """Frames of two axes; deterministic and stochastic."""
    grid, x0 = uniform_grid(6), jax.random.normal(jax.random.key(0), (FRAMES, 2, 1))

    def denoised(t, x, args):
        return jnp.tanh(x) + jnp.sum(x) * jnp.broadcast_to(t, (FRAMES,))[:, None, None] / 9

    synchronous = asynchronous_term(denoised, PATH, grid[asynchronous_schedule(FRAMES, 6, 0)], 2)
    plain = DenoiserTerm(denoised, PATH, grid)
    for solver in (DDIM(), Ancestral()):
        framewise, usual = (integrate(term, solver, x0, key=jax.random.key(2)) for term in (synchronous, plain))
        np.testing.assert_allclose(framewise, usual, atol=1e-12)

    rows = asynchronous_schedule(FRAMES, 6, 2)
    last, states = integrate(asynchronous_term(denoised, PATH, grid[rows], 2), DDIM(), x0, save=lambda t, x: x)
    states = np.concatenate([x0[None], states])
    moved = np.any(np.diff(states, axis=0) != 0, axis=(2, 3))
    np.testing.assert_array_equal(moved, np.diff(rows, axis=0) > 0)
    assert np.isfinite(last).all()


def test_loss():
    """Every frame with its own time and weight, on the draws that the loss makes; equal times and no weight give `DenoisingLoss`."""
    data, key = jax.random.normal(jax.random.key(1), (2, F, 2)), jax.random.key(4)
    t, gamma = jnp.array([0.9, 0.5, 0.2]), 2.0

    def network(t, x, args):
        return jnp.sin(x) + jnp.broadcast_to(t, (F,))[:, None]

    base = DenoisingLoss(PATH, NoisePrediction(), MinSNR(gamma), lambda key, n: jnp.broadcast_to(t, (n, F)))
    value = jax.jit(lambda: FramewiseLoss(base)(network, data, key)[0])()
    noise = np.asarray(jax.random.normal(jax.random.split(key, 4)[0], (12,))).reshape(data.shape)
    alpha, sigma, snr = (np.asarray(clock(t))[:, None] for clock in (PATH.alpha, PATH.sigma, PATH.snr))
    error = np.sin(alpha * data + sigma * noise) + np.asarray(t)[:, None] - noise
    np.testing.assert_allclose(value, np.mean(np.minimum(snr, gamma) / snr * error**2), rtol=1e-10)
    same = DenoisingLoss(PATH, DataPrediction(), times=lambda key, n: jnp.full(n, 0.4))
    framewise = DenoisingLoss(PATH, DataPrediction(), times=lambda key, n: jnp.full((n, F), 0.4))
    both = jax.jit(lambda: (FramewiseLoss(framewise)(network, data, key)[0], same(network, data, key)[0]))()
    np.testing.assert_allclose(*both, rtol=1e-12)
    with pytest.raises(ValueError, match="times"):
        FramewiseLoss(same)(network, data, key)


def test_denoiser_and_bad_arguments():
    x, t = jax.random.normal(jax.random.key(0), (F, 2)), jnp.array([0.9, 0.5, 0.2])
    denoised = FramewiseDenoiser(lambda t, x, args: jnp.sin(x), PATH, NoisePrediction())(t, x)
    expected = (x - PATH.sigma(t)[:, None] * jnp.sin(x)) / PATH.alpha(t)[:, None]
    np.testing.assert_allclose(denoised, expected, rtol=1e-12)
    term = asynchronous_term(lambda t, x, args: x, PATH, uniform_grid(T).astype(jnp.float32)[asynchronous_schedule(F, T, 1)], 1)
    assert integrate(term, DDIM(), x.astype(jnp.float32)).dtype == jnp.float32
    for make, match in (
        (lambda: asynchronous_schedule(F, T, -1), "gap"),
        (lambda: FrameTimes(uniform_grid(T)[::-1], F), "increase"),
        (lambda: asynchronous_term(exact, PATH, uniform_grid(T)[None], 0), "frame_times"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
