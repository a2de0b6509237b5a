"""Asymptotes: recovery and its standard error, ensembles of random-feature ridge on digits, nested limits, data efficiency, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.data import digits
from ergodax.laws import OffsetPowerLaw, data_efficiency, ensemble_losses, fit_law, fit_nested_asymptotes, squared


MEMBERS = jnp.array([1.0, 2.0, 3.0, 4.0, 6.0, 8.0])


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0))
def asymptotes(members, losses):
    fit = fit_law(OffsetPowerLaw.starts(members, losses), members, losses, objective=squared())
    return fit.law.floor, fit.law.coefficient, fit.law.exponent, fit.standard_error(lambda law: law.floor)


def test_recovery_and_standard_error():
    """Least squares has cov = σ² (JᵀJ)⁻¹: at σ = 0.001 the asymptote is known to 0.0022."""
    k = np.asarray(MEMBERS)
    noise = 0.001 * jax.random.normal(jax.random.key(0), (400, 6)).at[0].set(0)
    found = np.stack(asymptotes(MEMBERS, 3.1 + 0.4 / k + noise))
    np.testing.assert_allclose(found[:3, 0], [3.1, 0.4, 1.0], rtol=1e-9)
    jacobian = np.stack([np.ones(6), 1 / k, -0.4 * np.log(k) / k], 1)
    error = 0.001 * np.sqrt(np.linalg.inv(jacobian.T @ jacobian)[0, 0])
    assert 0.0022 < error < 0.0023
    floors = found[0, 1:]
    assert abs(np.median(floors) - 3.1) < 4 * 1.2533 * error / np.sqrt(399)
    # a robust spread: the estimate's own tail to low asymptotes is not normal
    spread = (np.quantile(floors, 0.8413) - np.quantile(floors, 0.1587)) / 2
    assert abs(spread / error - 1) < 4 * 1.2 / np.sqrt(2 * 399)


RIDGES = np.geomspace(1e-4, 1.0, 7)


def ridge_members(width):
    """7 regressions with random ReLU features on 200 digits with 15 % false labels, at each ridge and (last) none: (ridges + 1, 7, test, 10)."""
    data, rng = digits(), np.random.default_rng(width)
    images = np.concatenate([data.train_x[:200], data.test_x[:120]]).reshape(-1, 64).astype(float)
    labels = np.array(data.train_y[:200])
    labels[:30] = (labels[:30] + rng.integers(1, 10, 30)) % 10
    features = np.maximum(images @ rng.normal(size=(7, 64, width)), 0) / np.sqrt(32 * width)
    values, vectors = np.linalg.eigh(features[:, :200] @ features[:, :200].swapaxes(1, 2))
    targets = vectors.swapaxes(1, 2) @ (np.eye(10)[labels] - 0.1)
    to_test = features[:, 200:] @ features[:, :200].swapaxes(1, 2) @ vectors
    return jnp.asarray(np.stack([0.1 + to_test @ (targets / (values + ridge)[..., None]) for ridge in (*RIDGES, 1e-9)]))


ORDERS = jnp.outer(jnp.arange(1, 4), jnp.arange(7)) % 7  # 7 is prime: over these, cyclic runs hold every pair equally often


@jax.jit
def losses_and_variance(predictions, truth):
    """Squared error of K = 1 … 7, (ridges, 7), and the unbiased variance of a member, (ridges,)."""

    def losses(members):
        return jax.vmap(lambda order: ensemble_losses(members[order], lambda mean: jnp.mean(jnp.sum((mean - truth) ** 2, -1))))(ORDERS).mean(0)

    return jax.vmap(losses)(predictions), jnp.mean(jnp.sum(jnp.var(predictions, 1, ddof=1), -1), -1)


@pytest.fixture(scope="module")
def study():
    """For widths 50, 200 = n and 800."""
    truth = jax.nn.one_hot(digits().test_y[:120], 10, dtype=jnp.float64)
    return [[np.asarray(part) for part in losses_and_variance(ridge_members(width), truth)] for width in (50, 200, 800)]


def test_ensembles_of_random_features(study):
    """Squared errors: loss of K = limit + variance / K, so limits are exact. Tuned for itself a member is over-regularised for an ensemble."""
    best = []
    for curves, variance in study:
        limits = curves[:, -1] - variance / 7
        np.testing.assert_allclose(curves, limits[:, None] + variance[:, None] / np.arange(1, 8), rtol=1e-9)
        single, own = np.argmin(curves[:-1, 0]), np.argmin(limits[:-1])
        assert own < single
        assert limits[own] < limits[single] < curves[single, 0] < curves[-1, 0]
        best.append((curves[single, 0], curves[-1, 0]))
    tuned, ridgeless = np.array(best).T
    assert (np.diff(tuned) < 0).all()
    assert ridgeless[1] > 10 * max(ridgeless[0], ridgeless[2])  # the peak where features are as many as examples


def test_exponent_of_ensembles_is_one(study):
    curves, variance = study[2]
    single = np.argmin(curves[:-1, 0])
    floor, coefficient, exponent, _ = asymptotes(jnp.arange(1.0, 8.0), jnp.asarray(curves[single])[None])
    expected = [curves[single, -1] - variance[single] / 7, variance[single], 1]
    np.testing.assert_allclose(np.ravel([floor, coefficient, exponent]), expected, rtol=1e-6)


def test_averages_of_cyclic_runs():
    predictions = jnp.array([1.0, 2.0, 4.0, 8.0])[:, None]
    losses = ensemble_losses(predictions, lambda mean: mean[0] ** 2, sizes=(1, 2, 4))
    expected = [np.mean([1, 4, 16, 64]), np.mean([1.5**2, 3**2, 6**2, 4.5**2]), 3.75**2]
    np.testing.assert_allclose(losses, expected, rtol=1e-14)
    assert ensemble_losses(predictions.astype(jnp.float32), jnp.sum).dtype == jnp.float32


def test_nested_limits_and_data_efficiency():
    """Losses E + A/N^α + (c/N^γ)/K: limits in K are E + A/N^α."""
    sizes = jnp.array([1.5e8, 3e8, 6e8, 1.4e9])
    members = MEMBERS[:4]
    limit = OffsetPowerLaw.of(3.17, 2e4, 0.6)
    losses = limit(sizes)[:, None] + (2e3 / sizes[:, None] ** 0.5) / members
    nested = fit_nested_asymptotes(sizes, members, losses)
    np.testing.assert_allclose(nested.ensembles.floor, limit(sizes), rtol=1e-9)
    np.testing.assert_allclose(nested.ensembles.exponent, 1, rtol=1e-6)
    np.testing.assert_allclose(nested.limits.law.floor, 3.17, rtol=1e-7)
    np.testing.assert_allclose(nested.limits.law.exponent, 0.6, rtol=1e-5)
    baseline = OffsetPowerLaw.of(1.9, 80.0, 0.2)
    np.testing.assert_allclose(data_efficiency(baseline, baseline(5e9), 1e9), 5, rtol=1e-10)
    assert data_efficiency(baseline, 1.8, 1e9) == jnp.inf
    with pytest.warns(UserWarning, match="widths beyond"):
        nested.limits(jnp.array([1e12]))


def test_refusals():
    sizes, losses = jnp.array([1.0, 2.0, 4.0]), jnp.full((3, 4), 2.0)
    with pytest.raises(ValueError, match=r"shape \(sizes, members\), \(3, 3\), got \(3, 4\)"):
        fit_nested_asymptotes(sizes, sizes, losses)
    with pytest.raises(ValueError, match="2 points cannot determine 3 parameters"):
        fit_nested_asymptotes(sizes, sizes[:2], losses[:, :2])
    with pytest.raises(ValueError, match=r"`losses` must lie in \(0, inf\)"):
        fit_nested_asymptotes(sizes, MEMBERS[:4], losses.at[1, 1].set(jnp.nan))
    with pytest.raises(ValueError, match="at most the number of members, got 5 of 4"):
        ensemble_losses(losses.T, jnp.sum, sizes=(1, 5))
    with pytest.raises(ValueError, match="`sizes` must be an integer of at least 1"):
        ensemble_losses(losses.T, jnp.sum, sizes=(0,))
