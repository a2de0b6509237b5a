"""The annealing law: areas against sums, recovery, real curves."""

import os
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.data import NoisyQuadratic
from ergodax.laws import (
    AnnealingLaw,
    SizedAnnealingLaw,
    annealing_area,
    bands,
    bootstrap,
    curve_features,
    fit_annealing_law,
    fit_sized_annealing_law,
    histories_of,
    loss_curve,
    rate_history,
)

from .real import TEST, TRAIN, load, mean_scores


T, W = 300, 30
RAMP = np.arange(1, W + 1) / W
COSINE = np.concatenate([RAMP, 0.5 * (1 + np.cos(np.pi * np.arange(T - W) / (T - W)))])
CONSTANT = np.concatenate([RAMP, np.ones(T - W)])
WSD = np.concatenate([RAMP, np.clip((T - np.arange(W, T)) / 60, 0, 1)])
STEPS = np.arange(W + 5, T, 10)


def test_area():
    expected = [sum((COSINE[k - 1] - COSINE[k]) * 0.97 ** (i - k) for i in range(W, t + 1) for k in range(W, i + 1)) for t in (W, 150, T - 1)]
    np.testing.assert_allclose(annealing_area(jnp.asarray(COSINE), 0.97, warmup=W)[np.array([W, 150, T - 1])], expected, rtol=1e-10)
    assert not np.any(annealing_area(jnp.asarray(CONSTANT), 0.97, warmup=W))


@pytest.mark.parametrize("unit", [1.0, 1e-4])
def test_recovery(unit):
    """Whatever the unit of the rates."""
    true = AnnealingLaw.of(2.0, 1.0 * unit**0.5, 0.5, 0.01 / unit, 0.97)
    curves = [loss_curve(STEPS, true([rate_history(rates, STEPS, warmup=W)]), rates, warmup=W) for rates in (unit * CONSTANT, unit * COSINE)]
    fit = fit_annealing_law(curves, momentum=0.97)
    assert np.all(fit.converged)
    for name in ("floor", "coefficient", "exponent", "annealing", "momentum"):
        np.testing.assert_allclose(getattr(fit.law, name), getattr(true, name), rtol=1e-6)
    other = [rate_history(unit * WSD, STEPS, warmup=W)]
    np.testing.assert_allclose(fit(other), true(other), rtol=1e-8)
    if unit == 1:
        with pytest.warns(UserWarning, match="asked at"):
            fit([rate_history(np.ones(100000), np.array([99999]))])


def test_sizes():
    """Four sizes under two schedules give the law back, and the curve of a size and a schedule that none of them had."""
    true = SizedAnnealingLaw.of(AnnealingLaw.of(1.5, 1.0, 0.5, 0.01, 0.97), 0.8, 0.3, 0.1, unit=1e8)
    sizes = [2e7, 2e7, 5e7, 1e8, 2e8]
    rates = [CONSTANT, COSINE, COSINE, CONSTANT, COSINE]
    losses = [true(([rate_history(rate, STEPS, warmup=W)], [size])) for rate, size in zip(rates, sizes)]
    assert losses[4][-1] < losses[2][-1]
    one = 1.5 + np.cumsum(COSINE)[STEPS] ** -0.5 + 0.8 * 2**-0.3 - 0.01 * 2**0.1 * annealing_area(jnp.asarray(COSINE), 0.97, warmup=W)[STEPS]
    np.testing.assert_allclose(losses[4], one, rtol=1e-12)
    curves = [loss_curve(STEPS, loss, rate, warmup=W) for loss, rate in zip(losses, rates)]
    fit = fit_sized_annealing_law(curves, sizes, momentum=0.97)
    assert fit.objective[fit.best] < 1e-18
    asked = ([rate_history(WSD, STEPS, warmup=W)], [3e8])
    np.testing.assert_allclose(fit.law(asked), true(asked), rtol=1e-5)
    np.testing.assert_allclose((fit.law.size_exponent, fit.law.annealing_exponent, fit.law.curve.floor), (0.3, 0.1, 1.5), rtol=1e-4)
    with pytest.warns(UserWarning, match="asked at"):
        fit((asked[0], [1e11]))
    with pytest.raises(ValueError, match="at least three different ones"):
        fit_sized_annealing_law(curves[:3], sizes[:3])
    with pytest.raises(ValueError, match="one number for each of the 5 curves, got 2"):
        fit_sized_annealing_law(curves, sizes[:2])


def test_noisy_quadratic():
    """SGD's exact loss on a spectrum λ_i = i^-1.5, mostly noise: fitted on three schedules, the law foresees two cooldowns (at small rates only)."""
    eigenvalues = jnp.arange(1.0, 101.0) ** -1.5
    problem = NoisyQuadratic(eigenvalues, noise=eigenvalues, start=jnp.ones(100))
    excess = jax.jit(lambda rates: problem.excess_curve(rates))
    total, steps = 2000, np.arange(100, 2000, 20)
    k = np.arange(total)
    cooling = np.clip((k - 1600) / 400, 0, 1)
    shapes = [np.ones(total), 0.1 + 0.45 * (1 + np.cos(np.pi * k / total)), np.where(k < 1000, 1, 0.3), 0.1**cooling, 1 - 0.9 * cooling]
    curves = [loss_curve(steps, 1 + excess(0.1 * shape)[steps], 0.1 * shape) for shape in shapes]
    law = fit_annealing_law(curves[:3], momentum=0.98).law
    r2, _ = mean_scores(law, curves[3:])
    assert r2 > 0.999
    forward, _ = mean_scores(eqx.tree_at(lambda law: law.log_annealing, law, -jnp.inf), curves[3:])
    assert forward < 0.95  # it is the second area that does it


def test_momentum():
    """May be swept and traced: the right one fits best."""
    true = AnnealingLaw.of(2.0, 1.0, 0.5, 0.01, 0.97)
    curves = [loss_curve(STEPS, true([rate_history(rates, STEPS, warmup=W)]), rates, warmup=W) for rates in (CONSTANT, COSINE)]
    best = jax.jit(jax.vmap(lambda momentum: jnp.min(fit_annealing_law(curves, momentum=momentum).objective)))
    values = best(jnp.array([0.95, 0.97, 0.99]))
    assert values[1] < 1e-20 < min(values[0], values[2])


@pytest.mark.skipif("ERGODAX_DATA" not in os.environ, reason="set ERGODAX_DATA to the folder that holds llm_loss_curves")
@pytest.mark.parametrize(("size", "expected"), [(25, (0.99793, 0.00477)), (100, (0.99779, 0.00467))])
def test_real(size, expected):
    """The figures of the card, to all their digits."""
    folder = Path(os.environ["ERGODAX_DATA"]) / "llm_loss_curves"
    curves = [load(folder, size, name, warmup=2160, block=128) for name in TRAIN]
    fit = fit_annealing_law(curves)
    assert np.all(fit.converged)
    scores = mean_scores(fit.law, [load(folder, size, name, warmup=2160, block=128) for name in TEST])
    np.testing.assert_allclose(scores, expected, atol=6e-6)
    if size == 25:
        laws = bootstrap(jax.random.key(0), fit, histories_of(curves), jnp.concatenate([curve.losses for curve in curves]), samples=8)
        low, high = bands(laws, lambda law: law.floor)
        assert low < fit.law.floor < high
        assert len(curve_features(histories_of(curves))) == 3
