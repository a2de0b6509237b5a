"""Distances between two samples, and the assignment of least cost, within conditions too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from ergodax.core.assignment import optimal_assignment, same_condition, squared_distances


KEY = jax.random.key(0)


def test_squared_distances_of_short_and_long_rows():
    for shape in ((3,), (5, 20)):
        rows, columns = 100 + jax.random.normal(KEY, (7, *shape)), 100 + jax.random.normal(jax.random.key(2), (4, *shape))
        expected = np.sum(((np.asarray(rows)[:, None] - np.asarray(columns)) ** 2).reshape(7, 4, -1), -1)
        np.testing.assert_allclose(squared_distances(rows, columns), expected, rtol=1e-10)
    with pytest.raises((ValueError, TypeError)):
        squared_distances(jnp.zeros((3, 2)), jnp.zeros((3, 4)))


def test_optimal_assignment_within_conditions():
    """Against scipy with the other pairs forbidden; all leaves of a condition must agree."""
    cost = jax.random.uniform(KEY, (12, 12))
    condition = {"a": jnp.arange(12) % 2, "b": jnp.stack([jnp.arange(12) // 6, jnp.zeros(12, int)], 1)}
    same = np.asarray(same_condition(condition, 12))
    np.testing.assert_array_equal(same.sum(1), 3)
    both = jax.jit(lambda cost: (optimal_assignment(cost), optimal_assignment(cost, condition)))(cost)
    np.testing.assert_array_equal(both, [linear_sum_assignment(c)[1] for c in (np.asarray(cost), np.where(same, cost, 1e3))])
