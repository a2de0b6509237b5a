"""Loss curves from columns: exact sums, blocks that are as good, refusals; schedules that are best under a law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.laws import MultiPowerLaw, interpolate_rates, loss_curve, optimise_rates, rate_history


T, W = 400, 20
STEPS = np.arange(24, T, 25)
RAMP = np.linspace(0.05, 1, W)
COSINE = np.concatenate([RAMP, 0.1 + 0.45 * (1 + np.cos(np.pi * np.arange(T - W) / (T - W)))])
TWO = np.concatenate([RAMP, np.ones(130), np.full(T - W - 130, 0.3)])
LAW = MultiPowerLaw.of(2.0, 1.5, 0.5, 0.3, 0.1, 0.6, 0.5)


def brute(rates, at, warmup, weight):
    area = lambda k, t: sum(rates[k : t + 1])  # noqa: E731
    return [sum((rates[k - 1] - rates[k]) * weight(rates[k], area(k, t)) for k in range(max(warmup, 1), t + 1)) for t in at]


@pytest.mark.parametrize("warmup", [0, W])
def test_drop_sum(warmup):
    weight = lambda rate, area: area / (1 + area) * rate**-0.3  # noqa: E731
    history = rate_history(COSINE, STEPS[::4], warmup=warmup)
    np.testing.assert_allclose(history.area, np.cumsum(COSINE)[STEPS[::4]], rtol=1e-14)
    np.testing.assert_allclose(history.drop_sum(weight), brute(COSINE, STEPS[::4], warmup, weight), rtol=1e-10)


def test_blocks():
    """First order: the error falls with the square of the block; lone drops are exact, constant stretches cost nothing."""
    exact = LAW([rate_history(COSINE, STEPS, warmup=W)])
    errors = [np.abs(LAW([rate_history(COSINE, STEPS, warmup=W, block=block)]) - exact).max() for block in (5, 25)]
    assert errors[1] < 2e-3
    assert 10 < errors[1] / errors[0] < 50
    assert rate_history(COSINE, STEPS, warmup=W, block=5).drop.size == 76  # of 379 drops, none after the last point
    lone = rate_history(TWO, STEPS, warmup=W, block=16)
    assert lone.drop.size == 1
    np.testing.assert_allclose(LAW([lone]), LAW([rate_history(TWO, STEPS, warmup=W)]), rtol=1e-14)


def test_traced():
    """Rates may be traced; a rate of 0 for good leaves values and derivatives finite."""
    rates = COSINE.copy()
    rates[-30:] = 0
    at = np.array([200, T - 1])
    value = lambda rates: jnp.sum(LAW([rate_history(rates, at, warmup=W)]))  # noqa: E731
    found, gradient = jax.jit(jax.value_and_grad(value))(jnp.asarray(rates))
    np.testing.assert_allclose(found, value(jnp.asarray(rates)), rtol=1e-12)
    assert np.all(np.isfinite(gradient))


def test_interpolate():
    every = interpolate_rates(np.array([4, 8]), np.array([1.0, 0.5]), warmup=4)
    np.testing.assert_allclose(every, [0.25, 0.5, 0.75, 1, 1, 0.875, 0.75, 0.625, 0.5])


def test_optimise():
    """Never rises, in range, after the ramp as given; better than decays of any length or shape, and stationary."""
    rates, loss = optimise_rates(LAW, T, 1.0, ramp=RAMP, end_value=0.02)
    np.testing.assert_allclose(rates[:W], RAMP)
    free = np.asarray(rates[W:])
    assert np.all(np.diff(free) <= 1e-15)
    assert free[0] <= 1
    assert free[-1] >= 0.02 - 1e-15

    def final(rates):
        return LAW([rate_history(rates, jnp.array([T - 1]), warmup=W)])[0]

    np.testing.assert_allclose(final(rates), loss, rtol=1e-12)
    u = np.arange(1, T - W + 1) / (T - W)
    for share in (0.1, 0.3, 1.0):
        for power in (1.0, 1.5, 2.0):
            left = np.clip((1 - u) / share, 0, 1) ** power
            assert final(jnp.asarray(np.concatenate([RAMP, 0.02 + 0.98 * left]))) > loss


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": STEPS[:1], "losses": np.ones(1)}, "of one length of at least 2"),
        ({"losses": np.ones(3)}, r"columns of one length of at least 2, got shapes \(16,\) and \(3,\)"),
        ({"steps": STEPS / 1.0}, "`steps` must be whole numbers, got float64: are the columns in order"),
        ({"steps": np.where(STEPS == 49, 24, STEPS)}, "`steps` must increase, but row 1 has 24 after 24"),
        ({"warmup": 30}, "must not lie in the warm-up, 0…29"),
        ({"losses": np.where(STEPS == 49, -1.0, 2.0)}, r"`losses` must be positive and finite, but row 1 \(step 49\) has -1.0"),
        ({"losses": np.where(STEPS == 49, np.nan, 2.0)}, r"row 1 \(step 49\) has nan"),
        ({"rates": COSINE[STEPS]}, "an entry for every step up to the last logged one, 399, got 16"),
        ({"rates": -COSINE}, "`rates` must lie in"),
        ({"block": 0}, "`block` must be an integer"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        loss_curve(**({"steps": STEPS, "losses": np.full(16, 2.0), "rates": COSINE} | change))
