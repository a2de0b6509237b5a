"""WSD: the paper's formula at and between its knots, sweeps, optax, and the excess loss of SGD against the cosine in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ergodax.data import NoisyQuadratic
from ergodax.schedules import cosine_cooldown, exponential_cooldown, linear_cooldown, sqrt_cooldown, wsd_schedule

from .tuned import best_peak


COOLDOWNS = {
    "exponential": exponential_cooldown(0.25),
    "linear": linear_cooldown,
    "cosine": cosine_cooldown,
    "sqrt": sqrt_cooldown,
}


@pytest.mark.parametrize(
    ("cooldown", "half", "last"),
    [("exponential", 0.25, 0.0625), ("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("sqrt", 1 - np.sqrt(0.5), 0.0)],
)
def test_knots(cooldown, half, last):
    schedule = wsd_schedule(0.5, 1000, warmup_steps=100, decay_steps=200, cooldown=COOLDOWNS[cooldown], end_value=0.1)
    left = np.array([half, last])
    expected = [0.0, 0.005, 0.25, 0.5, 0.5, 0.5, *(0.1 + 0.4 * left), 0.1 + 0.4 * last]
    steps = [0, 1, 50, 100, 101, 800, 900, 1000, 5000]
    np.testing.assert_allclose([schedule(s) for s in steps], expected, rtol=1e-14, atol=1e-16)
    np.testing.assert_array_equal(schedule(jnp.asarray(steps)), schedule(jnp.asarray(steps, float)))
    assert schedule(-7) == 0.0
    assert float(schedule(899.5)) > float(schedule(900))


def test_paper_defaults():
    """The rate halves every T_half steps from T on, and a tenth of the run is the cooldown."""
    decay, half_life = 20_000, 5_000
    schedule = wsd_schedule(0.01, 200_000, warmup_steps=500, cooldown=exponential_cooldown(half_life / decay))
    steps = np.array([1, 499, 500, 180_000, 180_001, 185_000, 199_999])
    expected = 0.01 * np.array([1 / 500, 499 / 500, 1, 1, 0.5 ** (1 / 5000), 0.5, 0.5 ** (19_999 / 5000)])
    np.testing.assert_allclose(schedule(steps), expected, rtol=1e-12)
    np.testing.assert_allclose(wsd_schedule(1.0, 10)(10), 0.5 ** (1 / 0.3), rtol=1e-12)


@pytest.mark.parametrize("cooldown", COOLDOWNS.values(), ids=COOLDOWNS)
def test_shape(cooldown):
    """Continuous, never up in the cooldown, level before it, held after it, without a stretch that has no length."""
    schedule = jax.jit(wsd_schedule(1.0, 50.0, warmup_steps=7, decay_steps=12.5, cooldown=cooldown, end_value=0.05))
    steps = np.linspace(-5, 60, 65_001)
    values = np.asarray(schedule(steps))
    # In steps of 0.001, 1 - √u falls by √(0.001/12.5) at once; the others by their slope, at most log(2)/0.25/12.5.
    assert np.abs(np.diff(values)).max() < (0.009 if cooldown is sqrt_cooldown else 2.3e-4)
    assert (np.diff(values[steps >= 37.5]) <= 0).all()
    assert (values[(steps >= 7) & (steps <= 37.5)] == 1).all()
    assert (values[steps >= 50] == schedule(50.0)).all()
    assert (wsd_schedule(1.0, 50.0, decay_steps=0, cooldown=cooldown)(np.arange(100)) == 1).all()


def test_prefix():
    """Two horizons agree, to the bit, until the shorter one cools down."""
    steps = jnp.arange(900)
    short, long = (wsd_schedule(3e-4, total, warmup_steps=100, decay_steps=0.1 * total) for total in (1000, 7777))
    np.testing.assert_array_equal(short(steps), long(steps))
    assert short(901) < long(901)


def test_sweep_in_one_trace():
    traces = []

    @jax.jit
    @jax.vmap
    def value(peak, total, warmup, decay, half_life, end, step):
        traces.append(None)
        cooldown = exponential_cooldown(half_life)
        return wsd_schedule(peak, total, warmup_steps=warmup, decay_steps=decay, cooldown=cooldown, end_value=end)(step)

    rows = jnp.array([[1.0, 100, 10, 20, 0.3, 0.0, 5], [0.5, 300, 0, 30, 0.5, 0.1, 295], [0.2, 50, 5, 0, 1.0, 0.0, 49]])
    peak, total, warmup, decay, half_life, end, step = rows.T
    expected = [0.5, 0.1 + 0.4 * 0.5 ** (25 / 30 / 0.5), 0.2]
    np.testing.assert_allclose(value(*rows.T), expected, rtol=1e-14)
    whole = (x.astype(jnp.int32) for x in (total, warmup, decay))
    np.testing.assert_allclose(value(peak, *whole, half_life, end, step.astype(jnp.int32)), expected, rtol=1e-14)
    value(*(1.0 * rows).T)
    assert len(traces) == 2  # once with float lengths, once with integers


@pytest.mark.parametrize("cooldown", COOLDOWNS.values(), ids=COOLDOWNS)
def test_gradients_are_finite(cooldown):
    """In every argument and in the step, at the knots too and where a stretch has no length."""

    @jax.jit
    @jax.vmap
    def gradient(lengths, step):
        def value(x):
            return wsd_schedule(x[0], x[1], warmup_steps=x[2], decay_steps=x[3], cooldown=cooldown, end_value=x[4])(x[5])

        return jax.grad(value)(jnp.array([0.1, 100.0, lengths[0], lengths[1], 0.01, step]))

    steps = jnp.tile(jnp.array([0.0, 3.0, 5.0, 40.0, 80.0, 90.0, 100.0, 200.0]), 2)
    lengths = jnp.repeat(jnp.array([[5.0, 20.0], [0.0, 0.0]]), 8, axis=0)
    assert jnp.isfinite(gradient(lengths, steps)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_dtype_follows_peak(dtype):
    schedule = wsd_schedule(jnp.asarray(0.5, dtype), 1_000_000, warmup_steps=10, decay_steps=100_000, cooldown=linear_cooldown)
    for step in (jnp.int32(975_000), jnp.float32(975_000), 975_000):
        assert schedule(step).dtype == dtype
        assert schedule(step) == 0.125  # the step itself is never rounded to bfloat16


def test_adamw_and_resume():
    """Inside optax under jit: the rate of update k is schedule(k), also after a restart from saved state."""
    schedule = wsd_schedule(0.1, 20, warmup_steps=4, decay_steps=5, cooldown=linear_cooldown)
    optimiser = optax.adamw(schedule, weight_decay=0.0, eps=0.0)

    @jax.jit
    def steps(params, state, n):
        def one(carry, _):
            params, state = carry
            updates, state = optimiser.update(jnp.ones_like(params), state, params)
            return (optax.apply_updates(params, updates), state), -updates[0]

        return jax.lax.scan(one, (params, state), n)

    params = jnp.zeros(2)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of its integer count
        carry, first = steps(params, optimiser.init(params), jnp.arange(13))
        _, second = steps(*carry, jnp.arange(9))
    # Adam's step on a constant gradient is the rate itself.
    np.testing.assert_allclose(jnp.concatenate([first, second]), schedule(jnp.arange(22)), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(peak=-1.0), "`peak` must lie in .* got -1"),
        (dict(total_steps=0), "`total_steps` must lie in .* got 0"),
        (dict(warmup_steps=-1), "`warmup_steps` must lie in .* got -1"),
        (dict(decay_steps=-0.5), "`decay_steps` must lie in .* got -0.5"),
        (dict(end_value=2.0), r"`end_value` must lie in \[0, 1\], got 2"),
        (dict(warmup_steps=91), r"at most `total_steps`, got 91 \+ 10.0 > 100"),
        (dict(warmup_steps=60, decay_steps=41), r"got 60 \+ 41 > 100"),
    ],
)
def test_bad_values(kwargs, message):
    with pytest.raises(ValueError, match=message):
        wsd_schedule(**dict(peak=1.0, total_steps=100) | kwargs)


def test_bad_half_life():
    with pytest.raises(ValueError, match=r"`half_life` must lie in .* got 0"):
        exponential_cooldown(0.0)


def test_excess_loss_against_cosine():
    """SGD on Σ λ_i x_i²/2, λ_i = 1/i, i ≤ 100, x = 1, gradient noise variance λ_i/50, by its exact second moments and the best peak of each schedule.

    Excess of WSD (linear, last 10 %) and of the constant rate over the cosine's, warm-up 25 steps, at 500, 1000 and 2000 steps.
    """
    eigenvalues = 1 / jnp.arange(1.0, 101.0)
    problem = NoisyQuadratic(eigenvalues, eigenvalues / 50, jnp.ones(100))
    longest, warmup = 2000, 25

    @jax.jit
    @jax.vmap
    def ratios(total, low, high):
        steps = jnp.arange(float(longest))
        warm = wsd_schedule(1.0, total, warmup_steps=warmup, decay_steps=0.0)(steps)
        wsd = wsd_schedule(1.0, total, warmup_steps=warmup, decay_steps=0.1 * total, cooldown=linear_cooldown)(steps)
        cosine = warm * (1 + jnp.cos(jnp.pi * steps / total)) / 2
        profiles = jnp.stack([cosine, wsd, warm]) * (steps < total).astype(float)  # a rate of 0 leaves the moments alone
        losses = jax.vmap(lambda profile: best_peak(lambda peak: problem.excess(peak * profile), low, high, points=8)[1])(profiles)
        return losses[1:] / losses[0]

    measured = ratios(jnp.array([500.0, 1000.0, 2000.0]), jnp.array([0.3, 0.18, 0.1]), jnp.array([1.4, 0.8, 0.45]))
    # The same ratios from a loop in NumPy, peaks by Brent's method.
    np.testing.assert_allclose(measured[:, 0], [1.81074, 1.87453, 1.93455], rtol=1e-4)
    np.testing.assert_allclose(measured[:, 1], [3.17794, 3.35254, 3.55269], rtol=1e-4)
