"""The annealing law: areas against sums, recovery, real curves."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.laws import AnnealingLaw, annealing_area, bands, bootstrap, curve_features, fit_annealing_law, histories_of, loss_curve, rate_history

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
