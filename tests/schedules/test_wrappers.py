"""Wrappers: late starts as optax joins them, held samples, repeats."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ergodax.schedules import cosine_schedule, cycled, linear_schedule, sampled, warmed_up


STEPS = jnp.arange(120.0)


def test_warmed_up_is_optax_join():
    """Ours and optax's schedules, warmed up: `optax.join_schedules`, and `optax.warmup_cosine_decay_schedule`."""
    ours = warmed_up(cosine_schedule(0.4, 80, end_value=0.1), 20, init_value=0.05)
    np.testing.assert_allclose(ours(STEPS), optax.warmup_cosine_decay_schedule(0.05, 0.4, 20, 100, 0.1)(STEPS), rtol=1e-14)
    decay = optax.exponential_decay(0.4, 10, 0.7)
    joined = optax.join_schedules([optax.linear_schedule(0.05, 0.4, 20), decay], [20])
    np.testing.assert_allclose(warmed_up(decay, 20, init_value=0.05)(STEPS), joined(STEPS), rtol=1e-14)
    np.testing.assert_array_equal(warmed_up(decay, 0)(STEPS), decay(STEPS))


def test_cycled_is_sgdr():
    ours = cycled(cosine_schedule(0.4, 30, warmup_steps=5, end_value=0.1), 30, 3)
    sgdr = optax.sgdr_schedule([dict(init_value=0.0, peak_value=0.4, warmup_steps=5, decay_steps=30, end_value=0.1)] * 3)
    np.testing.assert_allclose(ours(STEPS), sgdr(STEPS), rtol=1e-14)
    endless = cycled(linear_schedule(1.0, 30), 30)
    np.testing.assert_allclose(endless(jnp.array([-3, 0, 15, 30, 45, 300])), [1, 1, 0.5, 1, 0.5, 1], rtol=1e-14)


def test_sampled():
    np.testing.assert_allclose(sampled(linear_schedule(1.0, 100), 30)(jnp.array([0, 29, 30, 59, 60, 100])), [1, 1, 0.7, 0.7, 0.4, 0.1], rtol=1e-14)


def test_sweep_gradients_and_dtype():
    """Lengths are traced once, gradients are finite at every knot, steps count in their own float and the rate's dtype stays."""
    traces = []

    def rate(numbers, step):
        traces.append(None)
        peak, period, warmup, every = numbers
        return warmed_up(cycled(sampled(cosine_schedule(peak, period), every), period, 3), warmup)(step)

    rows = jnp.array([[1.0, 20.0, 5.0, 2.0], [0.5, 30.0, 0.0, 1.0]])
    knots = jnp.array([0.0, 5.0, 25.0, 65.0, 90.0, 200.0])
    both = jax.jit(jax.vmap(jax.vmap(jax.value_and_grad(rate, argnums=(0, 1)), (None, 0)), (0, None)))
    values, gradients = both(rows, knots)
    assert len(traces) == 1
    np.testing.assert_allclose(values[1, :3], [0.5, 0.25 * (1 + np.cos(np.pi / 6)), 0.25 * (1 + np.cos(25 * np.pi / 30))], rtol=1e-13)
    assert all(jnp.isfinite(g).all() for g in gradients)
    narrow = warmed_up(cosine_schedule(jnp.asarray(0.5, jnp.bfloat16), 2_000_000), 10)
    assert narrow(jnp.int32(1_000_010)) == 0.25
    assert narrow(5).dtype == cycled(sampled(narrow, 2), 7)(5).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: warmed_up(s, -1), "`warmup_steps` must lie in .* got -1"),
        (lambda s: sampled(s, 0), "`every` must lie in .* got 0"),
        (lambda s: cycled(s, 0), "`period` must lie in .* got 0"),
        (lambda s: cycled(s, 10, 0), "`cycles` must lie in .* got 0"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call(linear_schedule(1.0, 10))
