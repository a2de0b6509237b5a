"""Forecasts: the cleaning against SciPy's spline, the fit on exact exponentials, and how far noisy series are off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import UnivariateSpline

from ergodax.schedules import fit_exponential, forecast_loss, forecast_validation_loss, kept_points, parabola


def noisy(key, a, b, c, n=100):
    """a exp(bt) + c with noise of 0.01, and three outliers of +0.5 to 1.5 in the first half."""
    one, two, three = jax.random.split(key, 3)
    losses = a * jnp.exp(b * jnp.arange(float(n))) + c + 0.01 * jax.random.normal(one, (n,))
    places = jax.random.choice(two, n // 2, (3,), replace=False)
    return losses.at[places].add(jax.random.uniform(three, (3,), minval=0.5, maxval=1.5))


SERIES = jax.jit(jax.vmap(noisy, (0, None, None, None)))
FORECAST, KEPT = jax.jit(forecast_loss), jax.jit(kept_points)
FORECASTS = {both: jax.jit(jax.vmap(lambda y, both=both: forecast_loss(y, 1000, to_parabola=both))) for both in (False, True)}


@pytest.mark.parametrize(
    ("a", "b", "c", "points", "values"),
    [(2.0, -0.05, 1.0, (0.002, 0.005), 0.10), (2.0, -0.02, 0.5, (0.019, 0.043), 0.25), (2.0, -0.002, 0.5, None, None)],
)
def test_error_after_a_thousand_steps(a, b, c, points, values):
    """From 100 steps, 100 repeats: median and 90 % quantile of the relative error, and the bias of the fit to the parabola."""
    series, true = SERIES(jax.random.split(jax.random.key(0), 100), a, b, c), a * np.exp(1000 * b) + c
    errors = {both: np.abs(FORECASTS[both](series) / true - 1) for both in (False, True)}
    if points is None:  # no curvature in the window: neither knows the level
        assert min(np.median(error) for error in errors.values()) > 0.3
        return
    # A quantile q of 100 repeats wanders: the bounds are the card's figures times 1.5, and the medians' two digits.
    np.testing.assert_allclose(np.median(errors[False]), points[0], rtol=0.2)
    assert points[1] / 1.5 < np.quantile(errors[False], 0.9) < points[1] * 1.5
    np.testing.assert_allclose(np.median(errors[True]), values, rtol=0.05)


def test_cleaning_against_scipy():
    """The same points are kept as by the authors' loop over smoothing splines of degree 2."""
    for seed in range(3):
        losses = np.asarray(SERIES(jax.random.split(jax.random.key(seed), 1), 2.0, -0.05, 1.0))[0]
        xs, ys, bound = np.arange(100), losses, 49
        for _ in range(10):
            residuals = np.abs(ys - UnivariateSpline(xs, ys, k=2)(xs))
            worst = [i for i in np.argsort(residuals)[-round(len(xs) * 0.03) :] if i < bound]
            xs, ys = np.delete(xs, worst), np.delete(ys, worst)
        np.testing.assert_array_equal(np.flatnonzero(KEPT(jnp.asarray(losses))), xs)
    kept = jnp.isin(jnp.arange(100), jnp.asarray(xs))
    np.testing.assert_allclose(parabola(jnp.asarray(losses), kept), UnivariateSpline(xs, ys, k=2)(np.arange(100)), rtol=1e-9)
    # Validation losses: one point, once.
    sixteen = jnp.exp(-0.2 * jnp.arange(16.0)).at[3].add(1.0)
    assert np.flatnonzero(~kept_points(sixteen, share=1 / 16, num_passes=1)).tolist() == [3]
    np.testing.assert_allclose(forecast_validation_loss(sixteen, 160.0), 0, atol=1e-6)
    assert kept_points(sixteen.at[12].add(9.0), share=1 / 16, num_passes=1).all()  # the largest lies in the second half


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_exact_exponential(dtype):
    t = np.arange(40)
    fit = jax.jit(fit_exponential)
    for a, b, c in [(2.0, -0.05, 1.0), (-1.0, -0.3, 3.0), (0.5, -0.01, 2.0)]:
        losses = jnp.asarray(a * np.exp(b * t) + c, dtype)
        fitted = fit(losses, jnp.asarray(t != 5).at[0].set(False))
        np.testing.assert_allclose(fitted, [a, b, c], rtol=1e-5 if dtype == jnp.float64 else 5e-2)
        assert {x.dtype for x in fitted} == {jnp.dtype(dtype)}
        forecast = FORECAST(losses, 80.0)
        assert forecast.dtype == dtype
        np.testing.assert_allclose(forecast, a * np.exp(b * 80) + c, rtol=1e-6 if dtype == jnp.float64 else 1e-2)


def test_not_finite():
    losses = 1 + jnp.exp(-0.1 * jnp.arange(40.0))
    for value in (jnp.nan, jnp.inf):
        assert jnp.isnan(FORECAST(losses.at[7].set(value), 100.0))
    assert jnp.isfinite(FORECAST(jnp.ones(40), 100.0))  # a level loss stays
    np.testing.assert_allclose(FORECAST(jnp.ones(40), 100.0), 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: forecast_loss(jnp.ones(3), 10.0), r"`losses` must be a vector of at least 4 values, got shape \(3,\)"),
        (lambda: kept_points(jnp.ones(9), share=2.0), r"`share` must lie in \[0, 1\], got 2"),
        (lambda: kept_points(jnp.ones(9), num_passes=-1), "`num_passes` must be an integer of at least 0, got -1"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
