"""WSD-S: its values, the paper's river valley in closed form, and what it costs against decaying independently."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.data import NoisyQuadratic
from ergodax.schedules import cosine_schedule, cycled, linear_cooldown, reciprocal_cooldown, wsd_s_schedule, wsd_schedule


BUDGETS = jnp.array([2000, 4000, 8000])
STEPS = jnp.arange(8000)
CURVATURE, NOISE, PEAK = 2.0, 0.5, 0.3


def test_values():
    rates = np.asarray(jax.jit(wsd_s_schedule(0.3, BUDGETS, warmup_steps=100))(jnp.arange(8001)))
    budgets = np.asarray(BUDGETS)
    np.testing.assert_allclose(rates[[0, 1, 50, 100, 1799]], [0, 0.003, 0.15, 0.3, 0.3], rtol=1e-14)
    np.testing.assert_allclose(rates[budgets], 0.3, rtol=1e-14)  # the last too: the run may go on
    np.testing.assert_allclose(rates[budgets - 1], 0.03, rtol=1e-14)
    np.testing.assert_allclose(rates[budgets - budgets // 10 - 1], 0.3, rtol=1e-14)
    for budget, length in ((2000, 200), (4000, 400), (8000, 800)):
        s = np.arange(1, length + 1) / length  # j + 1 over n
        np.testing.assert_allclose(1 / rates[budget - length : budget], (1 - s) / 0.3 + s / 0.03, rtol=1e-12)


def test_options():
    """A longer list keeps what comes before its own decays; lengths per budget; any cooldown; no decay at all."""
    budgets = np.asarray(BUDGETS)
    first = jax.jit(wsd_s_schedule(0.3, budgets[:2]))(STEPS)
    np.testing.assert_array_equal(first[:7200], jax.jit(wsd_s_schedule(0.3, budgets))(STEPS)[:7200])
    segments = jax.jit(wsd_s_schedule(0.3, budgets, decay_steps=0.1 * np.diff(budgets, prepend=0)))(STEPS)
    assert [int((segments[a:b] < 0.3).sum()) for a, b in ((0, 2000), (2000, 4000), (4000, 8000))] == [200, 200, 400]
    linear = jax.jit(wsd_s_schedule(1.0, [10, 30], decay_steps=[4, 5], cooldown=linear_cooldown, end_value=0.2))
    np.testing.assert_allclose(linear(jnp.array([5, 6, 7, 8, 9, 10, 25, 29])), [1, 0.8, 0.6, 0.4, 0.2, 1, 0.84, 0.2], rtol=1e-14)
    assert (jax.jit(wsd_s_schedule(1.0, [10, 30], decay_steps=0.0))(STEPS) == 1).all()


def test_mean_rate_of_a_decay():
    """∫ f = ln(10)/9 of the peak when it ends at a tenth."""
    u = (jnp.arange(100_000.0) + 0.5) / 100_000
    np.testing.assert_allclose(reciprocal_cooldown()(u).mean(), np.log(10) / 9, rtol=1e-9)


def test_stationary_hill():
    """At a constant rate E[h y²/2] tends to η σ²/(2 (2 - ηh)): exactly, and in a simulation (|z| < 3.5)."""
    hill = NoisyQuadratic(jnp.array([CURVATURE]), jnp.array([NOISE]), jnp.array([0.7]))
    stationary = PEAK * NOISE / (2 * (2 - PEAK * CURVATURE))
    np.testing.assert_allclose(hill.excess(jnp.full(100, PEAK)), stationary, rtol=1e-12)

    @jax.jit
    def simulate(key):
        def body(y, key):
            return y - PEAK * hill.gradient(key, y), None

        return hill.loss(jax.lax.scan(body, jnp.full((20_000, 1), 0.7), jax.random.split(key, 30))[0])

    losses = np.asarray(simulate(jax.random.key(0)))
    assert abs(losses.mean() - stationary) < 3.5 * losses.std() / np.sqrt(losses.size)
    assert losses.std() / np.sqrt(losses.size) < 0.02 * stationary


def test_river_valley():
    """h = 2, σ² = 0.5, peak 0.3, warm-up 100: the hill term at each budget and the river progress Σ η, against an independent WSD run for each.

    The river is short of that by 0, 4.1 and 6.1 % (a tenth of T_k), by 0.01 % (a tenth of the segment), and by 41 % for a cyclic cosine to a tenth.
    """
    hill = NoisyQuadratic(jnp.array([CURVATURE]), jnp.array([NOISE]), jnp.array([0.0]))
    by_budget = wsd_s_schedule(PEAK, BUDGETS, warmup_steps=100)
    by_segment = wsd_s_schedule(PEAK, BUDGETS, warmup_steps=100, decay_steps=0.1 * jnp.diff(BUDGETS, prepend=0).astype(float))
    independent = [wsd_s_schedule(PEAK, BUDGETS[k : k + 1], warmup_steps=100) for k in range(3)]
    curve = jax.jit(jax.vmap(hill.excess_curve))
    cyclic = jnp.minimum(STEPS / 100, 1) * cycled(cosine_schedule(PEAK, 2000, end_value=PEAK / 10), 2000)(STEPS)
    rates = jnp.stack([by_budget(STEPS), by_segment(STEPS), cyclic, *(schedule(STEPS) for schedule in independent)])
    hills, rivers = (np.asarray(x)[:, BUDGETS - 1] for x in (curve(rates), jnp.cumsum(rates, axis=1)))
    lost = 1 - rivers[:3] / np.diagonal(rivers[3:])
    np.testing.assert_allclose(lost[:2], [[0, 0.0408825, 0.0608384], [0, 1.21716e-4, 1.21251e-4]], rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(lost[2], [0.416741, 0.411061, 0.408280], rtol=1e-5)
    relative = hills[:2] / np.diagonal(hills[3:])
    np.testing.assert_allclose(relative[0], 1, rtol=1e-6)  # nothing is left of the earlier decays
    np.testing.assert_allclose(relative[1], [1, 1.018318, 1.008978], rtol=1e-5)
    wsd = wsd_schedule(PEAK, 2000, warmup_steps=100, decay_steps=200, cooldown=reciprocal_cooldown())
    np.testing.assert_allclose(rates[0, :1999], jnp.append(rates[0, :100], wsd(jnp.arange(100, 1999) + 1)), rtol=1e-13)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(budgets=[[7.0]]), r"`budgets` must be a vector of at least one number of steps, got shape \(1, 1\)"),
        (dict(budgets=[20, 10]), r"must be positive and increase, got \[20 10\]"),
        (dict(decay_steps=[1, 2, 3]), r"one number or one for each budget, shape \(2,\), got shape \(3,\)"),
        (dict(decay_steps=11), "each decay must fit"),
        (dict(warmup_steps=9.5), "each decay must fit"),
        (dict(end_value=2.0), r"`end_value` must lie in \[0, 1\], got 2"),
    ],
)
def test_bad_values(kwargs, message):
    with pytest.raises(ValueError, match=message):
        wsd_s_schedule(**dict(peak=1.0, budgets=[10, 20]) | kwargs)
    with pytest.raises(ValueError, match=r"`end_share` must lie in \(0, 1\], got 0"):
        reciprocal_cooldown(0.0)
