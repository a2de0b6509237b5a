"""Toy samplers: the curve without noise, the law along it, the noise on top; the checkerboard against its density."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ergodax.data import checkerboard, checkerboard_log_prob, pinwheel, swiss_roll, two_moons


N = 10_000
KEY = jax.random.key(0)


def draw(sampler, key=KEY, **arguments):
    points = jax.jit(sampler, static_argnames=("n", "num_arms") if sampler is pinwheel else "n")(key, n=N, **arguments)
    assert points.shape == (N, 2)
    assert points.dtype == jnp.result_type(float)
    return np.asarray(points)


def is_uniform(values, low, high):
    return stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3


def test_two_moons():
    x, y = draw(two_moons, noise=0.0).T
    lower = np.abs(np.hypot(x, y) - 1) > 1e-9
    np.testing.assert_allclose(np.hypot(x[lower] - 1, y[lower] - 0.5), 1, rtol=1e-12)
    assert abs(lower.mean() - 0.5) < 4 * 0.5 / N**0.5
    assert is_uniform(np.arctan2(y[~lower], x[~lower]), 0, np.pi)
    assert is_uniform(np.arctan2(0.5 - y[lower], 1 - x[lower]), 0, np.pi)


def test_swiss_roll():
    x, y = draw(swiss_roll, noise=0.0).T
    angle = 5 * np.hypot(x, y)
    np.testing.assert_allclose(np.stack([angle * np.cos(angle), angle * np.sin(angle)]), 5 * np.stack([x, y]), atol=1e-12)
    assert is_uniform(angle, 1.5 * np.pi, 4.5 * np.pi)


def test_pinwheel():
    x, y = draw(pinwheel, radial_std=0.15, tangential_std=0.0, rate=0.5).T
    radius = np.hypot(x, y) / 2
    turn = 5 * (-np.arctan2(y, x) - 0.5 * np.exp(radius)) / (2 * np.pi)
    arm = np.round(turn).astype(int)
    np.testing.assert_allclose(turn, arm, atol=1e-9)
    assert stats.chisquare(np.bincount(arm % 5, minlength=5)).pvalue > 1e-3
    assert stats.kstest(radius, stats.norm(1, 0.15).cdf).pvalue > 1e-3
    squares = (draw(pinwheel) ** 2).sum(1)  # 4 (1 + 0.3² + 0.1²)
    assert abs(squares.mean() - 4.4) < 4 * squares.std() / N**0.5
    x, y = draw(pinwheel, num_arms=3, radial_std=0.0, tangential_std=0.0, rate=0.0).T
    np.testing.assert_allclose(np.exp(3j * np.arctan2(y, x)), 1, atol=1e-9)


@pytest.mark.parametrize(("sampler", "default"), [(two_moons, 0.1), (swiss_roll, 0.2)])
def test_noise_is_gaussian(sampler, default):
    clean = draw(sampler, noise=0.0)
    for noise, points in ((default, draw(sampler)), (0.4, draw(sampler, noise=0.4))):
        for column in (points - clean).T:
            assert stats.kstest(column, stats.norm(0, noise).cdf).pvalue > 1e-3


def test_checkerboard():
    points = draw(checkerboard)
    log_prob = jax.jit(checkerboard_log_prob)
    np.testing.assert_allclose(log_prob(points), -np.log(32), rtol=1e-12)
    cells = np.floor(points / 2).astype(int)
    _, counts = np.unique(cells, axis=0, return_counts=True)
    assert len(counts) == 8
    assert stats.chisquare(counts).pvalue > 1e-3
    for column in (points / 2 - cells).T:
        assert is_uniform(column, 0, 1)
    axis = np.arange(-5, 5, 0.1, np.float32) + np.float32(0.05)
    plane = log_prob(np.stack(np.meshgrid(axis, axis), axis=-1))
    assert plane.dtype == jnp.float32
    np.testing.assert_allclose(np.exp(np.asarray(plane, np.float64)).sum() * 0.01, 1, rtol=1e-6)


@pytest.mark.parametrize("sampler", [two_moons, swiss_roll, pinwheel, checkerboard])
def test_keys_and_counts(sampler):
    first = draw(sampler)
    np.testing.assert_array_equal(first, draw(sampler))
    assert np.all(first != draw(sampler, jax.random.key(1)), axis=1).mean() > 0.9
    with pytest.raises(ValueError, match="`n` must be an integer of at least 1, got 0"):
        sampler(KEY, 0)


@pytest.mark.parametrize("sampler", [two_moons, swiss_roll])
def test_noise_is_checked_and_can_be_swept(sampler):
    with pytest.raises(ValueError, match="`noise` must lie in"):
        sampler(KEY, 5, noise=-0.1)
    swept = jax.jit(jax.vmap(lambda noise: sampler(KEY, N, noise)))(jnp.array([0.1, 0.25], jnp.float32))
    np.testing.assert_allclose(swept[1], draw(sampler, noise=0.25), rtol=1e-9)
