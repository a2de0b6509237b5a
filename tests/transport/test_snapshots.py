"""Snapshots of unequal sizes: what is drawn follows the weights, what cannot be used is refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.transport.snapshots import Snapshots


ROWS = [jnp.arange(8.0).reshape(4, 2), 10 + jnp.arange(12.0).reshape(6, 2)]


def test_equal_weights_give_every_row_once():
    drawn = Snapshots([0.0, 1.0], ROWS).resample(jax.random.key(0), 6)
    np.testing.assert_array_equal(jnp.sort(drawn[1], axis=0), ROWS[1])
    assert not np.array_equal(drawn[1], ROWS[1])
    counts = [int(jnp.sum(jnp.all(drawn[0] == row, axis=1))) for row in ROWS[0]]
    assert sorted(counts) == [1, 1, 2, 2]


def test_counts_are_the_weights_rounded():
    weights = [jnp.array([0.0, 3.0, 1.0, 0.0]), jnp.ones(6)]
    snapshots = Snapshots([0.0, 1.0], ROWS, weights)
    np.testing.assert_allclose(snapshots.weights, [[0.0, 0.75, 0.25, 0.0, 0.0, 0.0], [1 / 6] * 6])
    for seed in range(5):
        first = snapshots.resample(jax.random.key(seed), 8)[0]
        assert [int(jnp.sum(first[:, 0] == row[0])) for row in ROWS[0]] == [0, 6, 2, 0]


def test_dtype_is_that_of_the_samples():
    rows = [row.astype(jnp.float32) for row in ROWS]
    assert {leaf.dtype for leaf in jax.tree.leaves(Snapshots([0.0, 1.0], rows))} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("times", "samples", "weights", "message"),
    [
        ([0.0, 1.0], [ROWS[0], ROWS[1].at[4, 1].set(jnp.nan)], None, r"`samples\[1\]`: `points` must be finite, but 1 of 6 rows .* is row 4"),
        ([0.0, 1.0], ROWS, [jnp.ones(4), -jnp.ones(6)], r"`samples\[1\]`: `weights` must lie in"),
        ([0.0, 1.0], ROWS, [jnp.ones(4)], "as many `weights` as `samples`, got 1 and 2"),
        ([0.0, 1.0], [ROWS[0], ROWS[1][:, :1]], None, r"one d, got \[\(4, 2\), \(6, 1\)\]"),
        ([0.0, 1.0, 2.0], ROWS, None, r"as many `times` as `samples`, got \(3,\) and 2"),
        ([1.0, 0.0], ROWS, None, "`times` must increase strictly"),
    ],
)
def test_mistakes(times, samples, weights, message):
    with pytest.raises(ValueError, match=message):
        Snapshots(times, samples, weights)
