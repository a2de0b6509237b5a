"""The classical schedules: optax's at every step and beyond the end, swept in one trace, finite gradients, dtypes, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ergodax.schedules import (
    budget_aware_schedule,
    cosine_schedule,
    decay_schedule,
    hybrid_schedule,
    inverse_sqrt_schedule,
    linear_cooldown,
    linear_schedule,
    one_cycle_schedule,
    piecewise_schedule,
    polynomial_cooldown,
    rex_schedule,
    step_schedule,
    wsd_s_schedule,
)


STEPS = jnp.arange(230.0)  # the runs have 200 updates
P, T, W, E = 0.4, 200, 20, 0.1

#: ours, optax's
PAIRS = {
    "linear": (linear_schedule(P, T, end_value=E), optax.linear_schedule(P, E, T)),
    "linear after warm-up": (
        linear_schedule(P, T, warmup_steps=W),
        optax.join_schedules([optax.linear_schedule(0.0, P, W), optax.linear_schedule(P, 0.0, T - W)], [W]),
    ),
    "polynomial": (decay_schedule(P, T, polynomial_cooldown(2.5), end_value=E), optax.polynomial_schedule(P, E, 2.5, T)),
    "root": (decay_schedule(P, T, polynomial_cooldown(0.5)), optax.polynomial_schedule(P, 0.0, 0.5, T)),
    "cosine": (cosine_schedule(P, T, end_value=E), optax.cosine_decay_schedule(P, T, alpha=E / P)),
    "cosine after warm-up": (cosine_schedule(P, T, warmup_steps=W, end_value=E), optax.warmup_cosine_decay_schedule(0.0, P, W, T, E)),
    "steps": (step_schedule(P, [60, 120, 180]), optax.piecewise_constant_schedule(P, {60: 0.1, 120: 0.1, 180: 0.1})),
    "steps of their own": (step_schedule(P, [60, 120], scale=[0.5, 0.2]), optax.piecewise_constant_schedule(P, {60: 0.5, 120: 0.2})),
    "one cycle": (one_cycle_schedule(P, T), optax.cosine_onecycle_schedule(T, P)),
    "one cycle, three lines": (
        piecewise_schedule([0, 60, 170, 200], [P / 25, P, P / 25, P / 25e4]),
        optax.linear_onecycle_schedule(T, P),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_equals_optax(name):
    ours, theirs = PAIRS[name]
    with jax.numpy_dtype_promotion("standard"):
        expected = jax.vmap(theirs)(STEPS)  # jitted, its polynomial may raise a rounding error below 0 to a power
    np.testing.assert_allclose(jax.jit(ours)(STEPS), expected, rtol=1e-12, atol=1e-14)
    assert ours(0).shape == ()


def test_inverse_sqrt():
    """Vaswani's d^{-1/2} min(s^{-1/2}, s W^{-3/2}), and 1/√(s + 1) from the first update on."""
    steps = np.arange(1, 230.0)
    vaswani = np.minimum(steps**-0.5, steps * 20**-1.5) / 20**-0.5
    np.testing.assert_allclose(inverse_sqrt_schedule(P, W, warmup_steps=W)(STEPS)[1:], P * vaswani, rtol=1e-13)
    np.testing.assert_allclose(inverse_sqrt_schedule(P, 1)(STEPS), P / np.sqrt(np.arange(1, 231)), rtol=1e-13)


def test_piecewise():
    """Level outside, exact at the knots, a jump where two coincide, any shape of the stretches."""
    jump = piecewise_schedule([10, 20, 20, 30], [0.1, 0.5, 0.2, 0.7])
    np.testing.assert_allclose(jump(jnp.array([0, 10, 15, 19.5, 20, 25, 30, 99])), [0.1, 0.1, 0.3, 0.48, 0.2, 0.45, 0.7, 0.7], rtol=1e-13)
    down = piecewise_schedule([0.0, 100.0], [1.0, 0.0], shape=polynomial_cooldown(2.0))
    np.testing.assert_allclose(down(50), 0.25, rtol=1e-14)
    assert piecewise_schedule([5, 5], [1.0, 2.0])(jnp.array([4, 5, 6])).tolist() == [1, 2, 2]


#: numbers -> schedule, for all the room's schedules on numbers alone; values to sweep, the first is a run of 100 updates
FAMILY = {
    "polynomial": (lambda a: decay_schedule(a[0], a[1], polynomial_cooldown(a[2]), warmup_steps=a[3], end_value=a[4]), [0.5, 100, 0.5, 10, 0.1]),
    "step": (lambda a: step_schedule(a[0], [0.5 * a[1], a[2]], scale=a[3]), [0.5, 100, 75, 0.1]),
    "inverse_sqrt": (lambda a: inverse_sqrt_schedule(a[0], a[1], warmup_steps=a[2]), [0.5, 10, 10]),
    "piecewise": (lambda a: piecewise_schedule([0.0, a[0], 100.0], a[1:]), [30, 0.5, 0.7, 0.0]),
    "one_cycle": (lambda a: one_cycle_schedule(a[0], a[1], rise_steps=a[2], start_factor=a[3], end_factor=a[4]), [0.5, 100, 30, 25, 100]),
    "rex": (lambda a: rex_schedule(a[0], a[1], warmup_steps=a[2], end_value=a[3]), [0.5, 100, 10, 0.1]),
    "uba": (lambda a: budget_aware_schedule(a[0], a[1], a[2], warmup_steps=a[3], end_value=a[4]), [0.5, 100, 0.25, 10, 0.1]),
    "hybrid": (
        lambda a: hybrid_schedule(a[0], a[1], period=a[2], low_value=a[3], warmup_steps=a[4], decay_steps=a[5]),
        [0.5, 100, 120, 0.1, 10, 20],
    ),
    "wsd_s": (lambda a: wsd_s_schedule(a[0], a[1:3], warmup_steps=a[3], decay_steps=a[4:6]), [0.5, 50, 100, 10, 5, 10]),
}


@pytest.mark.parametrize("name", FAMILY)
def test_family(name):
    """One trace for a sweep over all numbers and steps, equal to one at a time; gradients are finite, at every knot and without a stretch too."""
    make, numbers = FAMILY[name]
    first = jnp.asarray(numbers, float)
    rows = jnp.stack([first, first * jnp.linspace(0.9, 1.1, len(numbers)), first.at[0].multiply(0.5)])
    steps = jnp.array([-3.0, 0.0, 5.0, 10.0, 30.0, 45.0, 50.0, 75.0, 80.0, 99.0, 100.0, 300.0])
    traces = []

    @jax.jit
    def both(rows, steps):
        traces.append(None)
        return jax.vmap(lambda row: jax.vmap(jax.value_and_grad(lambda row, step: make(row)(step), argnums=(0, 1)), (None, 0))(row, steps))(rows)

    values, gradients = both(rows, steps)
    both(rows * 1.01, steps)
    assert len(traces) == 1
    assert all(jnp.isfinite(g).all() for g in gradients)
    assert (values >= 0).all()
    assert (values[0] <= 0.7).all()
    np.testing.assert_allclose(values[1], jax.jit(make(np.asarray(rows[1])))(steps), rtol=1e-13, atol=1e-15)
    assert values[0, 0] == values[0, 1]  # before the start
    if name not in ("inverse_sqrt", "wsd_s"):
        assert values[0, -2] == values[0, -1]  # after the end
    single = jax.jit(make(np.asarray(first, np.float32)))(steps.astype(int))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, values[0], rtol=1e-5, atol=1e-6)


def test_narrow_peak():
    """A bfloat16 peak gives a bfloat16 rate and does not round the step."""
    peak = jnp.asarray(0.5, jnp.bfloat16)
    for schedule in (
        linear_schedule(peak, 2_000_000),
        one_cycle_schedule(peak, 2_000_000, rise_steps=500_000, end_factor=1e9, shape=linear_cooldown),
    ):
        assert schedule(jnp.int32(1_500_000)).dtype == jnp.bfloat16
    assert linear_schedule(peak, 2_000_000)(jnp.int32(1_500_000)) == 0.125
    assert step_schedule(peak, [1_000_001])(jnp.array([1_000_000, 1_000_001])).tolist() == [0.5, float(jnp.asarray(0.05, jnp.bfloat16))]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cosine_schedule(1.0, 100, warmup_steps=120), r"`warmup_steps` must lie in \[0, 100\], got 120"),
        (lambda: linear_schedule(1.0, 0), "`total_steps` must lie in .* got 0"),
        (lambda: rex_schedule(1.0, 100, end_value=2.0), r"`end_value` must lie in \[0, 1\], got 2"),
        (lambda: polynomial_cooldown(0.0), "`power` must lie in .* got 0"),
        (lambda: inverse_sqrt_schedule(1.0, 0.0), "`timescale` must lie in .* got 0"),
        (lambda: step_schedule(1.0, [1.0, 2.0], scale=[0.1, 0.1, 0.1]), r"one for each of them, got shapes \(2,\) and \(3,\)"),
        (lambda: piecewise_schedule([0, 1], [1.0]), r"at least 2, got shapes \(2,\) and \(1,\)"),
        (lambda: piecewise_schedule([1, 0], [1.0, 2.0]), "`boundaries` must not decrease"),
        (lambda: one_cycle_schedule(1.0, 10, rise_steps=11), r"`rise_steps` must lie in \[0, 10\], got 11"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
