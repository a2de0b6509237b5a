"""The hybrid schedule: smooth at the seam, the report's numbers, and the same from optax's pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ergodax.schedules import hybrid_schedule


N, M, LOW = 540_000, 1e-3, 1e-4


def test_report():
    """540 000 updates, warm-up 9720, cool-down 80 000 from 1e-3, with a trough of 1e-4: at and between the knots, by the formulas of the report."""
    schedule = hybrid_schedule(M, N)
    reach = N * (M + LOW) / (4 * np.pi * (M - LOW))  # N/4 + β
    alpha, beta = (M + LOW) / 2 * np.sqrt(reach), reach - N / 4
    steps = jnp.array([0, 4860, 9720, 50_000, 135_000, 135_001, 300_000, 460_000, 500_000, 540_000, 600_000])
    i = np.minimum(np.asarray(steps, float), 460_000)
    cosine = LOW + (M - LOW) / 2 * (np.cos(2 * np.pi * i / N) + 1)
    expected = np.where(i <= N / 4, cosine, alpha / np.sqrt(np.maximum(i + beta, 1))) * np.minimum(i / 9720, 1)
    expected *= np.clip((540_000 - np.asarray(steps)) / 80_000, 0, 1)
    np.testing.assert_allclose(schedule(steps), expected, rtol=1e-12, atol=0)
    np.testing.assert_allclose(schedule(N / 4), (M + LOW) / 2, rtol=1e-14)
    assert schedule(N) == 0
    values = np.asarray(schedule(jnp.arange(9720, N + 1, 20)))
    assert (np.diff(values) < 0).all()


def test_smooth_seam():
    """Value and slope agree from both sides of N/4: the slope is -(M - m) π/N."""
    schedule = hybrid_schedule(1.0, 1000.0, low_value=0.1, warmup_steps=0.0, decay_steps=0.0)
    slope = jax.grad(schedule)
    np.testing.assert_allclose(schedule(250 - 1e-9), schedule(250 + 1e-9), rtol=1e-10)
    np.testing.assert_allclose([slope(250 - 1e-9), slope(250 + 1e-9)], -0.9 * np.pi / 1000, rtol=1e-10)


def test_tail():
    """√ decay, lr(2i)/lr(i) → 1/√2; for m = 0, β = N (1/4π - 1/4); constant at m = M; the tail does not know the end."""
    tail = hybrid_schedule(1.0, 1e12, period=1000.0, low_value=0.0, decay_steps=0.0)
    np.testing.assert_allclose(tail(2e9) / tail(1e9), 1 / np.sqrt(2), rtol=1e-6)
    beta = 1000 * (1 / (4 * np.pi) - 1 / 4)
    np.testing.assert_allclose(tail(900.0) / tail(600.0), np.sqrt((600 + beta) / (900 + beta)), rtol=1e-13)
    level = hybrid_schedule(1.0, 1000, low_value=1.0, warmup_steps=0, decay_steps=0)
    np.testing.assert_allclose(level(jnp.arange(1000)), 1, rtol=1e-14)
    early = hybrid_schedule(1.0, 700, period=1000, decay_steps=100)
    np.testing.assert_array_equal(early(jnp.arange(600)), hybrid_schedule(1.0, 1000, decay_steps=100)(jnp.arange(600)))
    assert early(700) == 0


def test_optax_pieces():
    """The same joined from optax: warm-up × cosine of period N, α/√(i + β), and a line to 0."""
    total, warm, decay = 2000, 100, 300
    reach = total * 1.1 / (4 * np.pi * 0.9)
    cosine = optax.cosine_decay_schedule(1.0, total // 2, alpha=0.1)

    def tail(i):
        return 0.55 * np.sqrt(reach) / jnp.sqrt(i + reach)

    joined = optax.join_schedules(
        [lambda i: i / warm * cosine(i), lambda i: cosine(i + warm), tail, optax.linear_schedule(float(tail(1200)), 0.0, decay)],
        [warm, total // 4, total - decay],
    )
    steps = jnp.arange(total + 100.0)
    np.testing.assert_allclose(hybrid_schedule(1.0, total, warmup_steps=warm, decay_steps=decay)(steps), joined(steps), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(low_value=1.5), r"`low_value` must lie in \[0, 1\], got 1.5"),
        (dict(period=0), "`period` must lie in .* got 0"),
        (dict(total_steps=-1), "`total_steps` must lie in .* got -1"),
        (dict(warmup_steps=60, decay_steps=50), r"got 60 \+ 50 > 100"),
    ],
)
def test_bad_values(kwargs, message):
    with pytest.raises(ValueError, match=message):
        hybrid_schedule(**dict(peak=1.0, total_steps=100, decay_steps=10, warmup_steps=0) | kwargs)
