"""Loss to loss: the exact relation of two power laws, the group of maps, what a known floor gains, intervals that cover, refusals."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ergodax.laws import CompoundSurface, LossToLoss, OffsetPowerLaw, fit_law, fit_loss_to_loss, fit_surface, squared


FIRST, SECOND = CompoundSurface.of(1.7, 3e8, 0.35, 6e9, 0.42), CompoundSurface.of(1.1, 5e8, 0.3, 2e9, 0.5)
CURVES = FIRST.frontier(), SECOND.frontier()
KAPPA = float(CURVES[1].exponent / CURVES[0].exponent)
SCALE = float(CURVES[1].coefficient * CURVES[0].coefficient ** -KAPPA)
RUNS, FEW, FAR = jnp.geomspace(1e17, 1e20, 20), jnp.geomspace(3e17, 1e19, 4), 2e20


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(0, None))
def study(key, noise):
    """20 runs on the first data set, 4 on the second, with relative errors: maps with a known and a fitted floor, and both curves fitted alone."""
    losses = [curve(runs) * (1 + noise * jax.random.normal(k, runs.shape)) for curve, runs, k in zip(CURVES, (RUNS, FEW), jax.random.split(key))]
    both = jnp.stack([RUNS, jnp.repeat(FEW, 5)]), jnp.stack([losses[0], jnp.repeat(losses[1], 5)])  # one program for both
    curves = jax.vmap(lambda x, y: fit_law(OffsetPowerLaw.starts(x, y), x, y, objective=squared()).law)(*both)
    source, direct = (jax.tree.map(lambda leaf, i=i: leaf[i], curves) for i in (0, 1))
    maps = [fit_loss_to_loss(source(FEW), losses[1], source.floor, floor) for floor in (SECOND.floor, None)]
    return source, direct, *maps, losses[1]


def test_two_power_laws_have_an_exact_relation():
    """κ = g₁/g₀ and K = a₁ a₀^-κ from noiseless runs at optimal sizes."""
    for surface, curve in zip((FIRST, SECOND), CURVES):
        np.testing.assert_allclose(surface(surface.optimal_sizes(FEW)), curve(FEW), rtol=1e-13)
    source, _, known, fitted, _ = jax.tree.map(lambda leaf: leaf[0], study(jax.random.split(jax.random.key(0), 200), jnp.array(0.0)))
    np.testing.assert_allclose(source.floor, FIRST.floor, rtol=1e-7)
    np.testing.assert_allclose([known.law.exponent, known.law.scale], [KAPPA, SCALE], rtol=1e-6)
    np.testing.assert_allclose([fitted.law.exponent, fitted.law.scale, fitted.law.target_floor], [KAPPA, SCALE, SECOND.floor], rtol=1e-5)
    exact = LossToLoss.of(SCALE, KAPPA, FIRST.floor, SECOND.floor).translate(CURVES[0])
    jax.tree.map(lambda mine, theirs: np.testing.assert_allclose(mine, theirs, rtol=1e-13), exact, CURVES[1])


def test_a_known_floor_gains_and_a_fitted_one_does_not():
    source, direct, known, fitted, losses = study(jax.random.split(jax.random.key(0), 200), jnp.array(0.005))
    truth, there = CURVES[1](FAR), eqx.filter_vmap(lambda law: law(FAR))(source)
    predicted = [jax.vmap(lambda fit, loss: fit.law(loss))(fit, there) for fit in (known, fitted)] + [jax.vmap(lambda law: law(FAR))(direct)]
    errors = np.abs(np.stack(predicted) / truth - 1)
    medians, wins = np.median(errors, 1), (errors[:2] < errors[2]).mean(1)
    assert medians[0] < 0.35 * medians[2]  # 0.0048 and 0.0268
    assert wins[0] > 0.5 + 6 * np.sqrt(0.25 / 200)  # 0.915
    assert abs(wins[1] - 0.5) < 4 * np.sqrt(0.25 / 200)  # 0.515
    # what the fits say of themselves, by least squares written out
    one = jax.tree.map(lambda leaf: leaf[3], (source, known, fitted))
    x = np.log(np.asarray(one[0](FEW)) - float(one[0].floor))
    line = stats.linregress(x, np.log(np.asarray(losses[3]) - float(SECOND.floor)))
    np.testing.assert_allclose([one[1].law.exponent, one[1].law.log_scale], [line.slope, line.intercept], rtol=1e-9)
    np.testing.assert_allclose(one[1].covariance[0, 0], line.intercept_stderr**2, rtol=1e-9)
    np.testing.assert_allclose(one[1].covariance[1, 1], (line.stderr / line.slope) ** 2, rtol=1e-9)
    law, rise = one[2].law, np.exp(float(one[2].law.log_scale) + float(one[2].law.exponent) * x)
    columns = np.stack([rise, rise * float(law.exponent) * x, np.full(4, float(law.target_floor))], 1)
    error = np.asarray(losses[3]) - float(law.target_floor) - rise
    np.testing.assert_allclose(columns.T @ error, 0, atol=1e-7)
    np.testing.assert_allclose(one[2].covariance, error @ error * np.linalg.inv(columns.T @ columns), rtol=1e-6)


def test_maps_compose():
    loss = jnp.array([2.0, 2.6, 4.0])
    first, second = LossToLoss.of(1.3, 0.8, 1.7, 0.9), LossToLoss.of(0.6, 1.4, 0.9, 0.0)
    np.testing.assert_allclose(first(loss), 1.3 * (np.asarray(loss) - 1.7) ** 0.8 + 0.9, rtol=1e-14)
    np.testing.assert_allclose(first.then(second)(loss), second(first(loss)), rtol=1e-13)
    np.testing.assert_allclose(first.inverse()(first(loss)), loss, rtol=1e-13)
    np.testing.assert_allclose(first(np.array([1.7, 1.0])), 0.9, rtol=1e-14)  # at the floor and below
    curve = OffsetPowerLaw.of(1.7, 30.0, 0.1)
    np.testing.assert_allclose(first.translate(curve)(1e20), first(curve(1e20)), rtol=1e-13)
    # test to test: back from the test set to the first training set, over to the second, and on to the test set
    to_test = LossToLoss.of(0.9, 1.1, 1.7, 1.5), LossToLoss.of(1.2, 0.7, 0.9, 1.4)
    between = to_test[0].inverse().then(first).then(to_test[1])
    np.testing.assert_allclose(between(to_test[0](loss)), to_test[1](first(loss)), rtol=1e-13)
    np.testing.assert_allclose([between.source_floor, between.target_floor, between.exponent], [1.5, 1.4, 0.8 * 0.7 / 1.1], rtol=1e-13)


@jax.jit
@jax.vmap
def covered(key):
    """Whether the 90 % interval from four runs holds a fifth, whose own loss is known with an error or without."""
    law, at = LossToLoss.of(1.3, 0.8, 1.7, 0.9), jnp.array([3.6, 3.1, 2.8, 2.5, 2.1])
    keys = jax.random.split(key)
    losses = law.target_floor + jnp.exp(law.log_excess(at) + 0.02 * jax.random.normal(keys[0], (5,)))
    fit = fit_loss_to_loss(at[:4], losses[:4], 1.7, 0.9)
    guess = at[4] + 0.02 * jax.random.normal(keys[1])
    intervals = fit.interval(at[4]), fit.interval(guess, source_error=0.02), fit.interval(guess)
    return jnp.stack([(low < losses[4]) & (losses[4] < high) for low, high in intervals])


def test_intervals_cover():
    """Two degrees of freedom: an interval from normal quantiles would hold 76 % here. The second is a little wide."""
    exact, with_error, without = np.asarray(covered(jax.random.split(jax.random.key(1), 4000))).mean(0)
    deviation = np.sqrt(0.09 / 4000)
    assert abs(exact - 0.9) < 4 * deviation
    assert 0.9 - 4 * deviation < with_error < 0.95
    assert without < 0.9 - 6 * deviation


def test_surface_from_the_recipe():
    n, d = (axis.ravel() for axis in jnp.meshgrid(jnp.geomspace(3e7, 3e9, 4), jnp.geomspace(1e9, 1e11, 4)))
    fit = fit_surface((n, d), FIRST((n, d)))
    jax.tree.map(lambda found, true: np.testing.assert_allclose(found, true, rtol=1e-5), fit.law, FIRST)
    with pytest.warns(UserWarning, match="widths beyond"):
        fit((jnp.array([1e14]), jnp.array([1e11])))


def test_refusals():
    losses = jnp.array([3.0, 2.5, 2.2])
    with pytest.raises(ValueError, match="1 runs cannot determine 2 parameters"):
        fit_loss_to_loss(losses[:1], losses[:1], 1.0, 1.0)
    with pytest.raises(ValueError, match="2 runs cannot determine 3 parameters"):
        fit_loss_to_loss(losses[:2], losses[:2], 1.0)
    with pytest.raises(ValueError, match=r"must lie in \(0, inf\)"):
        fit_loss_to_loss(losses, losses, 2.2, 1.0)
    with pytest.raises(ValueError, match="target - target_floor"):
        fit_loss_to_loss(losses, losses.at[1].set(jnp.nan), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"`level` must lie in \(0, 1\)"):
        fit_loss_to_loss(losses, losses, 1.0, 1.0).interval(2.0, level=1.0)
    with pytest.raises(ValueError, match="more points than parameters"):
        fit_loss_to_loss(losses[:2], losses[:2], 1.0, 1.0).interval(2.0)
