"""REX: its profile, its sampling rate, and where it wins and loses on a noisy quadratic."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ergodax.data import NoisyQuadratic
from ergodax.schedules import cosine_schedule, linear_schedule, rex_cooldown, rex_schedule, sampled, step_schedule

from .tuned import best_peak


def test_profile():
    u = np.linspace(0, 1, 10_001)
    p = np.asarray(rex_cooldown(jnp.asarray(u)))
    assert (p[0], p[5000], p[-1]) == (1, 2 / 3, 0)
    assert (np.diff(p) < 0).all()
    assert (np.diff(p, 2) < 0).all()
    assert (p[1:-1] > 1 - u[1:-1]).all()
    # The trapezoid's error is (p'(1) - p'(0))/12 h², with p' from -1/2 to -2.
    np.testing.assert_allclose(np.trapezoid(p, u), 2 * (1 - np.log(2)) - 1.5e-8 / 12, atol=1e-12)
    np.testing.assert_allclose(rex_schedule(0.3, 200, warmup_steps=40, end_value=0.1)(120), 0.1 + 0.2 * 2 / 3, rtol=1e-14)


def test_sampling_rate():
    """Held at p(⌊zn⌋/n); the more samples, the closer to the profile, by no more than its slope 2 over 1/n."""
    steps = jnp.arange(1200.0)
    exact = rex_schedule(1.0, 1200)(steps)
    for n in (4, 30, 600):
        held = sampled(rex_schedule(1.0, 1200), every=1200 / n)(steps)
        np.testing.assert_allclose(held, rex_cooldown(jnp.floor(steps * n / 1200) / n), rtol=1e-14)
        assert 0 < float(jnp.max(held - exact)) < 2 / n
    np.testing.assert_array_equal(sampled(rex_schedule(1.0, 1200), every=1)(steps), exact)


def test_budgets():
    """SGD, λ_i = 1/i, i ≤ 100, x = 1, noise variance λ_i/50: excess at the best peak of REX, linear, cosine, steps (1/2, 3/4) and a constant rate.

    With peaks up to 1.9 REX leads at 100 updates. Peaks beyond 2, the stability limit of a constant rate, are better still there, and then it is
    behind; the order of longer runs, where the best peak is smaller, has turned round either way.
    """
    eigenvalues = 1 / jnp.arange(1.0, 101.0)
    problem = NoisyQuadratic(eigenvalues, eigenvalues / 50, jnp.ones(100))

    @partial(jax.jit, static_argnums=0)
    @partial(jax.vmap, in_axes=(None, 0, 0, 0))
    def excess(longest, total, lowest, highest):
        steps = jnp.arange(float(longest))
        schedules = [
            rex_schedule(1.0, total),
            linear_schedule(1.0, total),
            cosine_schedule(1.0, total),
            step_schedule(1.0, [0.5 * total, 0.75 * total]),
            step_schedule(1.0, [total]),
        ]
        profiles = jnp.stack([schedule(steps) for schedule in schedules]) * (steps < total).astype(float)  # a rate of 0 changes nothing
        return jax.vmap(lambda profile: best_peak(lambda peak: problem.excess(peak * profile), lowest, highest, points=8)[1])(profiles)

    short, free = np.asarray(excess(100, jnp.full(2, 100.0), jnp.array([1.0, 2.0]), jnp.array([1.9, 5.0])))
    medium, long = np.asarray(excess(2000, jnp.array([500.0, 2000.0]), jnp.array([0.3, 0.1]), jnp.array([1.5, 0.5])))
    np.testing.assert_allclose(short, [0.028290, 0.037941, 0.038467, 0.043366, 0.055834], rtol=2e-4)
    np.testing.assert_allclose(medium, [0.0046932, 0.0041968, 0.0040962, 0.0065409, 0.0129758], rtol=2e-4)
    np.testing.assert_allclose(long, [0.00130000, 0.00114928, 0.00109781, 0.00172589, 0.00389679], rtol=2e-4)
    np.testing.assert_allclose(free[:4], [0.020335, 0.018470, 0.018585, 0.040030], rtol=0.02)
    assert short.argmin() == 0
    assert free.argmin() == 1
    assert medium.argmin() == long.argmin() == 2
