"""An Ornstein-Uhlenbeck chain whose parameters are known: from its exact marginals they are found exactly, from samples within their noise."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.data import energy_distance
from ergodax.transport import ParametricReference
from ergodax.transport.bridge_solvers import GaussianBridgeSolver, KernelRegressor, RegressionBridgeSolver
from ergodax.transport.sbirr import LeastSquaresRefit, LinearRefit, fit_sbirr
from ergodax.transport.snapshots import Snapshots


# dX = 2 (2 - X) dt + √¼ dW from N(-1, .09) at t = 0, five snapshots on [0, 1], 20 Euler steps in between
STEPS, INTERVALS, EPSILON, THETA = 20, 4, 0.25, jnp.array([4.0, 2.0])
DT = 1 / (STEPS * INTERVALS)


def affine(parameters, t, x):
    return parameters[0] - parameters[1] * x


START = ParametricReference(affine, jnp.zeros(2), EPSILON)


def exact_moments():
    mean, variance, rows = -1.0, 0.09, []
    for _ in range(STEPS * INTERVALS + 1):
        rows.append((mean, np.sqrt(variance)))
        mean, variance = mean + DT * 2 * (2 - mean), (1 - 2 * DT) ** 2 * variance + EPSILON * DT
    return np.array(rows)


MOMENTS = exact_moments()
TIMES = jnp.linspace(0.0, 1.0, INTERVALS + 1)
# Two points have a mean and a variance.
EXACT = Snapshots(TIMES, [jnp.array([[mean - std], [mean + std]]) for mean, std in MOMENTS[::STEPS]])


def middle_distance(fitted):
    """W2 to the true marginals half-way between snapshots, as of Gaussians."""
    half = fitted.bridges.paths[:, STEPS // 2, :, 0]
    return np.hypot(*(np.stack([half.mean(1), half.std(1)], axis=1) - MOMENTS[STEPS // 2 :: STEPS]).T)


@eqx.filter_jit
def fit_exact(refit):
    return fit_sbirr(jax.random.key(0), EXACT, START, rounds=10, steps=STEPS, solver=GaussianBridgeSolver(), refit=refit)


def test_exact_marginals_give_the_exact_parameters():
    """An infinite ridge moves no parameter, which leaves the piecewise Brownian bridge."""
    fitted, brownian = fit_exact(LinearRefit()), fit_exact(LinearRefit(jnp.array(1e30)))
    rates = fitted.parameters[:, 1]
    np.testing.assert_allclose(rates[1], 1.81, atol=0.005)
    np.testing.assert_allclose(rates[5], 2, atol=1e-3)
    np.testing.assert_allclose(fitted.parameters[-1], THETA, rtol=1e-6)
    np.testing.assert_allclose(brownian.parameters, 0, atol=1e-20)
    np.testing.assert_allclose(np.median(middle_distance(brownian)), 0.037, atol=0.01)
    assert np.max(middle_distance(fitted)) < 1e-5


def test_no_step_makes_the_divergence_larger():
    """KL(P | Q_θ) of the first interval, exact: between the Gaussians of x₁ given x₀ of both, with the plan's own x₀."""
    times, x0, x1 = jnp.linspace(0.0, 0.25, STEPS + 1), EXACT.points[0], EXACT.points[1]
    weights, solver = jnp.diff(times), GaussianBridgeSolver()

    @jax.jit
    def alternate(parameters):
        reference = ParametricReference(affine, parameters, EPSILON)
        bridge = solver(jax.random.key(0), reference, times, x0, x1)
        refined = LinearRefit()(reference, times[:-1], bridge.paths[:-1], bridge.drifts, weights)

        def misfit(parameters):
            values = affine(parameters, times, bridge.paths[:-1])
            return jnp.sum(weights * jnp.mean(jnp.sum((bridge.drifts - values) ** 2, 2), 1)) / (2 * EPSILON)

        # Markov chains compare step by step: drifts, then the variances left, which θ does not change.
        centred = bridge.paths[:, 0, 0] - jnp.mean(bridge.paths[:, :, 0], axis=1)
        slopes = 1 + weights * jax.vmap(lambda u, s, x: jax.grad(lambda x: u(x)[0])(x)[0] - s)(
            bridge.forward, jnp.full(STEPS, parameters[1]), bridge.paths[:-1, 0]
        )
        left = (centred[1:] ** 2 - slopes**2 * centred[:-1] ** 2) / (EPSILON * weights)
        variances = jnp.sum(left - 1 - jnp.log(left)) / 2
        return refined, misfit(parameters) + variances, misfit(refined) + variances

    parameters, before = jnp.zeros(2), np.inf
    for _ in range(4):
        parameters, bridged, refined = alternate(parameters)
        assert -1e-9 < refined < bridged + 1e-9 < before + 2e-9
        before = refined
    assert before < 0.01


def draws(key, n):
    """Fresh rows at each snapshot."""
    noise = jax.random.normal(key, (INTERVALS + 1, n, 1))
    return [mean + std * rows for (mean, std), rows in zip(MOMENTS[::STEPS], noise)]


def test_samples_give_the_parameters_within_their_noise():
    """sd of the rate from 500 rows a snapshot is 1.3 %, of the mean less."""
    snapshots = Snapshots(TIMES, draws(jax.random.key(0), 500))
    solver = RegressionBridgeSolver(KernelRegressor(0))
    fit = eqx.filter_jit(lambda key: fit_sbirr(key, snapshots, START, rounds=10, steps=STEPS, solver=solver, refit=LinearRefit()))
    fitted = fit(jax.random.key(1))
    shift, rate = jnp.mean(fitted.parameters[6:], axis=0)
    np.testing.assert_allclose(rate, 2, rtol=0.05)
    np.testing.assert_allclose(shift / rate, 2, rtol=0.05)
    # A whole trajectory passes through all snapshots, from any of them.
    assert np.max(middle_distance(fitted)) < 5 * 0.6 / np.sqrt(500)
    x = snapshots.points[2]
    paths = fitted.trajectories(jax.random.key(2), 2, x)
    assert paths.shape == (STEPS * INTERVALS + 1, 500, 1)
    np.testing.assert_array_equal(paths[2 * STEPS], x)
    means, stds = jnp.mean(paths, axis=(1, 2)), jnp.std(paths, axis=(1, 2))
    np.testing.assert_allclose(means, MOMENTS[:, 0], atol=0.15)
    np.testing.assert_allclose(stds, MOMENTS[:, 1], rtol=0.25)
    np.testing.assert_allclose(fitted.times, jnp.linspace(0, 1, STEPS * INTERVALS + 1), atol=1e-12)
    drift = jax.vmap(fitted, in_axes=(None, 0))(jnp.array(0.51), fitted.bridges.paths[2, 0])
    np.testing.assert_allclose(drift, fitted.bridges.drifts[2, 0], atol=1e-9)
    with pytest.raises(ValueError, match="`k` must be a snapshot's number, from 0 to 4, got 5"):
        fitted.trajectories(jax.random.key(2), 5, x)


def hill(parameters, t, x):
    top, power = jnp.exp(parameters)
    return top / (1 + x**power) - x


def test_refits_find_what_made_the_drifts():
    t, weights = jnp.arange(3.0), jnp.array([1.0, 2.0, 0.5])
    x = jax.random.uniform(jax.random.key(0), (3, 20, 1), minval=0.2, maxval=2.0)
    truth = jnp.log(jnp.array([3.0, 2.5]))
    found = jax.jit(lambda: LeastSquaresRefit(20)(ParametricReference(hill, jnp.zeros(2), 0.1), t, x, hill(truth, t, x), weights))()
    np.testing.assert_allclose(found, truth, atol=1e-4)
    noisy = affine(THETA, t, x) + jax.random.normal(jax.random.key(1), x.shape)
    least, linear = (jax.jit(lambda refit=refit: refit(START, t, x, noisy, weights))() for refit in (LeastSquaresRefit(20), LinearRefit()))
    np.testing.assert_allclose(least, linear, atol=1e-4)
    root = jnp.repeat(jnp.sqrt(weights), 20)
    design = root[:, None] * jnp.stack([jnp.ones(60), -x.ravel()], axis=1)
    np.testing.assert_allclose(linear, jnp.linalg.lstsq(design, root * noisy.ravel())[0], atol=1e-9)


def lotka_volterra(parameters, t, x):
    a, b, c, d = parameters
    return jnp.stack([a * x[0] - b * x[0] * x[1], d * x[0] * x[1] - c * x[1]])


def test_lotka_volterra_held_out():
    """Snapshots every second unit of time: what lies half-way is met better than by Brownian bridges, and the parameters are approached."""
    truth, epsilon, n, fine = jnp.array([1.0, 0.4, 0.4, 0.1]), 0.01, 50, 50

    @jax.jit
    def simulate(key):
        key_start, key_run = jax.random.split(key)
        x = jnp.array([5.0, 4.0]) + 0.1 * jax.random.uniform(key_start, (n, 2))

        def step(x, key):
            drift = jax.vmap(lambda x: lotka_volterra(truth, 0.0, x))(x)
            return x + drift / fine + np.sqrt(epsilon / fine) * jax.random.normal(key, x.shape), x

        return jax.lax.scan(step, x, jax.random.split(key_run, 4 * fine + 1))[1][::fine]

    rows = [simulate(jax.random.key(k))[k] for k in range(5)]
    snapshots = Snapshots([0.0, 2.0, 4.0], rows[::2])

    @eqx.filter_jit
    def fit(ridge):
        reference = ParametricReference(lotka_volterra, jnp.zeros(4), epsilon)
        solver = RegressionBridgeSolver(KernelRegressor(8), 2)
        return fit_sbirr(jax.random.key(0), snapshots, reference, rounds=8, steps=20, solver=solver, refit=LinearRefit(ridge))

    brownian, fitted = fit(jnp.array(1e30)), fit(jnp.array(1e-12))
    for k in range(2):
        far, near = (energy_distance(result.bridges.paths[k, 10], rows[2 * k + 1]) for result in (brownian, fitted))
        # The energy distance grows with the square of a small distance.
        assert near < 0.7**2 * far
    assert jnp.max(jnp.abs(fitted.parameters[-1] / truth - 1)) < 0.5
    assert fitted.kl[-1] < 0.2 * brownian.kl[-1]
