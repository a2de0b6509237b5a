"""Sample-to-sample distances against scipy, brute force and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cdist

from ergodax.data import energy_distance, memorised_share, nearest_distance, sliced_wasserstein
from ergodax.data.distances import _rows


KEY = jax.random.key(0)


def normal(shape, seed=0, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize("m", [12, 7])
def test_wasserstein_in_one_dimension(m):
    x, y = normal((12, 1)), 1.3 * normal((m, 1), 1) + 0.4
    expected = stats.wasserstein_distance(x[:, 0], y[:, 0])
    np.testing.assert_allclose(sliced_wasserstein(KEY, x, y, 3, 1.0), expected, rtol=1e-12)
    # Repeat both samples to a common size: the same laws, whose optimal coupling is the sorted one.
    a, b = np.sort(np.repeat(x, m)), np.sort(np.repeat(y, 12))
    for p in (2.0, 3.0):
        np.testing.assert_allclose(sliced_wasserstein(KEY, x, y, 3, p), (np.abs(a - b) ** p).mean() ** (1 / p), rtol=1e-12)


def test_sliced_wasserstein_agrees_with_pot():
    """POT 0.9.7, `ot.sliced_wasserstein_distance(x, y, projections=directions.T, p=p)` on the directions that KEY draws."""
    x, y = normal((60, 3)), normal((45, 3), 1) * np.array([1, 2, 0.5]) + 1
    for p, expected in ((1.0, 0.8903902920558674), (2.0, 1.0741954774984814)):
        np.testing.assert_allclose(sliced_wasserstein(KEY, x, y, 50, p), expected, rtol=1e-12)


def test_sliced_wasserstein_of_a_shift():
    shift, count = np.array([1.0, -2.0, 0.5]), 4000
    x = normal((5, 3))
    squared = sliced_wasserstein(KEY, x, x + shift, count) ** 2  # mean of (θ·a)², with mean |a|²/d and variance 2(d - 1)|a|⁴/(d²(d + 2))
    norm = shift @ shift
    assert abs(squared - norm / 3) < 4 * np.sqrt(2 * 2 * norm**2 / (9 * 5) / count)
    assert sliced_wasserstein(KEY, x, x[::-1], count) == 0
    swept = jax.jit(jax.vmap(lambda p: sliced_wasserstein(KEY, x, 2 * x, 4, p)))(jnp.array([1.0, 2.0], jnp.float32))
    np.testing.assert_allclose(swept, [sliced_wasserstein(KEY, x, 2 * x, 4, p) for p in (1.0, 2.0)], rtol=1e-6)


def test_energy_distance_matches_scipy():
    x, y = normal((15, 1)), 0.5 * normal((9, 1), 1) + 1
    biased = stats.energy_distance(x[:, 0], y[:, 0]) ** 2
    spread = [cdist(z, z).mean() for z in (x, y)]
    unbiased = biased - spread[0] / (15 - 1) - spread[1] / (9 - 1)  # E over pairs i ≠ j is n/(n - 1) of that over all
    np.testing.assert_allclose(energy_distance(x, y, chunk_size=4), unbiased, rtol=1e-12)


@pytest.mark.parametrize("shape", [(3,), (10, 9, 1)])  # differences, and the product form for long rows
def test_energy_distance_matches_brute_force_in_chunks(shape):
    x, y = normal((20, *shape)), 1.2 * normal((13, *shape), 1)
    a, b = x.reshape(20, -1), y.reshape(13, -1)
    expected = 2 * cdist(a, b).mean() - cdist(a, a).sum() / (20 * 19) - cdist(b, b).sum() / (13 * 12)
    np.testing.assert_allclose(energy_distance(x, y, chunk_size=7), expected, rtol=1e-11)
    single = energy_distance(x.astype(jnp.float32) + 100, y.astype(jnp.float32) + 100)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, expected, atol=5e-5)  # an offset of 100 costs its rounding, 4e-6 a coordinate, and no more


def test_gradients_are_finite_where_rows_coincide():
    x = normal((5, 3))
    for distance in (energy_distance, lambda x, y: nearest_distance(x, y).sum(), lambda x, y: sliced_wasserstein(KEY, x, y, 4)):
        assert jnp.isfinite(jax.jit(jax.grad(distance))(x, x[::-1])).all()


def test_energy_distance_is_unbiased():
    pairs = jax.random.normal(KEY, (2, 2000, 6, 2))
    values = jax.jit(jax.vmap(energy_distance))(*pairs)
    assert abs(values.mean()) < 4 * values.std() / 2000**0.5
    assert values.min() < 0


@pytest.mark.parametrize("dim", [2, 100])
def test_nearest_distance(dim):
    x, reference = normal((30, dim)), normal((40, dim), 1)
    expected = cdist(x, reference).min(1)
    np.testing.assert_allclose(nearest_distance(x, reference, chunk_size=8), expected, rtol=1e-12)
    # float32, far from the origin, with copies and near copies among the rows
    offset = 50.0
    near = np.asarray(x) + 1e-3 * np.eye(dim)[0]
    single = [jnp.asarray(np.concatenate(rows) + offset, jnp.float32) for rows in ((x, x), (near, x[:10], reference))]
    expected = cdist(*(np.asarray(rows, np.float64) for rows in single)).min(1)
    result = nearest_distance(*single)
    assert result.dtype == jnp.float32
    assert np.all(np.asarray(result)[:10] == 0)
    np.testing.assert_allclose(result, expected, atol=4e-6 * dim**0.5)  # centring rounds each coordinate at 50


def test_memorised_share_of_fresh_data_is_the_floor():
    """Averaged over splits, fresh rows score j/(m + 1) exactly; here m = 19 and j = 2 and 18."""
    train, test, fresh = jax.random.normal(KEY, (3, 3000, 19, 2))
    share = jax.vmap(memorised_share, in_axes=(0, 0, 0, None))
    shares = jax.jit(jax.vmap(share, in_axes=(None, None, None, 0)))(fresh, train, test, jnp.array([0.1, 0.9]))
    assert jnp.all(jnp.abs(shares.mean(1) - jnp.array([0.1, 0.9])) < 4 * shares.std(1) / 3000**0.5)


def test_memorised_share_counts_copies():
    train, test, fresh = (normal((n, 8, 8, 1), seed) for seed, n in enumerate((200, 99, 100)))
    copies = jnp.concatenate([train[:60], fresh[:38], jnp.full((2, 8, 8, 1), jnp.nan)])
    distances = [cdist(np.reshape(rows, (len(rows), -1)), np.reshape(train, (200, -1))).min(1) for rows in (fresh[:38], test)]
    floor = (distances[0] < np.sort(distances[1])[4]).sum()  # j = 0.05 * 100
    np.testing.assert_allclose(memorised_share(copies, train, test), (60 + floor) / 100, rtol=1e-12)
    assert memorised_share(train, train, test) == 1
    assert memorised_share(train, train, test, quantile=0.0) == 1
    np.testing.assert_allclose(memorised_share(test, train, test, quantile=1.0), 98 / 99, rtol=1e-12)


def test_arguments_are_checked():
    x = normal((4, 2))
    with pytest.raises(ValueError, match=r"rows of the same shape, and at least one row each, got shapes \(4, 2\) and \(4, 3\)"):
        _rows(x, normal((4, 3)))
    with pytest.raises(ValueError, match="at least two rows each, got 4 and 1"):
        energy_distance(x, x[:1])
    with pytest.raises(ValueError, match=r"`p` must lie in \[1, inf\)"):
        sliced_wasserstein(KEY, x, x, p=0.5)
    with pytest.raises(ValueError, match=r"`quantile` must lie in \[0, 1\]"):
        memorised_share(x, x, x, 5.0)
    with pytest.raises(ValueError, match="`chunk_size` must be an integer"):
        nearest_distance(x, x, chunk_size=0)
