"""UBA: its limits and orderings, and quadratics on which it leads and does not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ergodax.data import NoisyQuadratic
from ergodax.schedules import budget_aware_cooldown, budget_aware_schedule, cosine_schedule, cycled, linear_schedule, step_schedule

from .tuned import best_peak


STEPS = jnp.arange(1001.0)


@jax.jit
def over_phi(phis):
    return jax.vmap(lambda phi: budget_aware_schedule(0.4, 1000, phi, end_value=0.1)(STEPS))(phis)


def test_closed_form():
    """φ = 2 is the cosine, φ = 1 REX's profile of it; ends, order in t and in φ, and the paper's formula."""
    phis = np.array([0.25, 1.0, 2.0, 5.0, 10.0])
    values = np.asarray(over_phi(phis))
    np.testing.assert_allclose(values[2], optax.cosine_decay_schedule(0.4, 1000, alpha=0.25)(STEPS), rtol=1e-14)
    cosine = np.asarray(optax.cosine_decay_schedule(1.0, 1000)(STEPS))
    np.testing.assert_allclose(values[1], 0.1 + 0.3 * 2 * cosine / (1 + cosine), rtol=1e-14)
    np.testing.assert_allclose(values[1, 500], 0.1 + 0.3 * 2 / 3, rtol=1e-14)
    np.testing.assert_allclose(values[:, [0, -1]], np.tile([0.4, 0.1], (5, 1)), rtol=1e-14)
    assert (np.diff(values, axis=1) < 0).all()
    assert (np.diff(values[:, 1:-1], axis=0) < 0).all()
    one_plus = 1 + np.cos(np.pi * np.asarray(STEPS) / 1000)
    np.testing.assert_allclose(values, 0.1 + 0.3 * 2 * one_plus / (2 * phis[:, None] + (2 - phis[:, None]) * one_plus), rtol=1e-13)


def test_small_phi_is_constant():
    """φ → 0 leaves all but the last moment at the peak: 1 - f = (φ/2)(1 - v)/(v + …) < φ/(2v)."""
    assert float(budget_aware_cooldown(1e-6)(jnp.asarray(0.99))) > 1 - 1e-6 / 2 / 2.4e-4


def test_phases_and_warmup():
    phases = np.asarray(jax.jit(cycled(budget_aware_schedule(0.4, 250, 0.5, end_value=0.1), 250, 4))(STEPS))
    np.testing.assert_allclose(phases[[0, 250, 500, 750, 1000]], [0.4, 0.4, 0.4, 0.4, 0.1], rtol=1e-14)
    np.testing.assert_allclose(phases[750:1000], phases[:250], rtol=1e-14)
    warm = np.asarray(jax.jit(budget_aware_schedule(0.4, 300, 0.5, warmup_steps=50, end_value=0.1))(STEPS))
    np.testing.assert_allclose(warm[25], 0.2, rtol=1e-14)
    np.testing.assert_allclose(warm[50:300], phases[:250], rtol=1e-14)
    np.testing.assert_allclose(warm[300:], 0.1, rtol=1e-14)


def test_quadratics():
    """50 curvatures from 1 to 1/κ, x = 1, noise variance σλ, T updates: excess at the best peak of φ = 1/4, 1, 5, cosine, linear, steps (1/2, 3/4).

    Peaks up to 1.95, just below the stability limit of a constant rate, and free ones. With the former some φ leads in the first three cases and
    steps in the fourth; with the latter linear leads in the first and φ = 5 in the others.
    """

    @jax.jit
    @jax.vmap
    def excess(kappa, sigma, total, lowest, highest):
        steps, eigenvalues = jnp.arange(1000.0), kappa ** -jnp.linspace(0, 1, 50)
        problem = NoisyQuadratic(eigenvalues, sigma * eigenvalues, jnp.ones(50))
        schedules = [budget_aware_schedule(1.0, total, phi) for phi in (0.25, 1.0, 5.0)]
        schedules += [cosine_schedule(1.0, total), linear_schedule(1.0, total), step_schedule(1.0, [0.5 * total, 0.75 * total])]
        profiles = jnp.stack([schedule(steps) for schedule in schedules]) * (steps < total).astype(float)
        return jax.vmap(lambda profile: best_peak(lambda peak: problem.excess(peak * profile), lowest, highest, points=8, zooms=2)[1])(profiles)

    cases = jnp.array(
        [
            [1e4, 0.0, 1000.0, 1.2, 1.95],
            [1e4, 0.02, 100.0, 1.2, 1.95],
            [100.0, 0.02, 1000.0, 0.2, 0.8],  # free as well
            [1e4, 0.02, 1000.0, 1.2, 1.95],
            [1e4, 0.0, 1000.0, 2.0, 5.0],
            [1e4, 0.02, 100.0, 2.0, 5.5],
            [1e4, 0.02, 1000.0, 1.5, 5.0],
        ]
    )
    measured = np.asarray(excess(*cases.T))
    capped, free = measured[:4], measured[4:]
    expected = [
        [0.00070927, 0.0009442, 0.00153072, 0.00114014, 0.00114025, 0.00107127],
        [0.01902249, 0.01828657, 0.02181623, 0.01910375, 0.01975428, 0.02099735],
        [0.00242063, 0.00187167, 0.00144014, 0.00166109, 0.00201714, 0.001885],
        [0.00339293, 0.00273235, 0.00266239, 0.00260133, 0.00328773, 0.00253987],
    ]
    np.testing.assert_allclose(capped, expected, rtol=2e-4)
    np.testing.assert_array_equal(capped.argmin(1), [0, 1, 2, 5])
    expected = [[0.000465, 0.000465, 0.000528, 0.000492, 0.000438], [0.018298, 0.015532, 0.013580, 0.014500, 0.016037]]
    np.testing.assert_allclose(free[:2, :5], expected, rtol=0.02)  # here the loss has several minima in the peak
    np.testing.assert_array_equal(free.argmin(1), [4, 2, 2])


def test_bad_phi():
    with pytest.raises(ValueError, match=r"`phi` must lie in \(0, inf\), got 0"):
        budget_aware_schedule(1.0, 100, 0.0)
