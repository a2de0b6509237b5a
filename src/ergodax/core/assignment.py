"""Exact linear assignment between two samples of one size: what couplings of a batch are made of."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from .types import PyTree


def squared_distances(rows: Float[Array, "n *x"], columns: Float[Array, "m *x"]) -> Float[Array, "n m"]:
    """‖rows_i - columns_j‖² over all axes but the first, of shape (n, m). Raises `ValueError` for rows of different shapes."""
    if rows.shape[1:] != columns.shape[1:]:
        raise ValueError(f"Two samples need rows of the same shape, got shapes {rows.shape} and {columns.shape}.")
    rows, columns = (a.reshape(a.shape[0], -1) for a in (rows, columns))
    # Differences are exact for rows that are close; one matrix product is many times as fast where rows are long.
    if rows.shape[1] <= 64:
        return jnp.sum((rows[:, None] - columns) ** 2, axis=-1)
    centre = jnp.mean(columns, axis=0)
    rows, columns = rows - centre, columns - centre
    cross = jnp.dot(rows, columns.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(rows**2, 1)[:, None] + jnp.sum(columns**2, 1) - 2 * cross, 0)


def same_condition(condition: PyTree, n: int) -> Bool[Array, "n n"]:
    """Which pairs of n examples have equal conditions: `condition` is a pytree of arrays of leading axis n, and all of it must agree."""
    same = jnp.ones((n, n), bool)
    for leaf in jax.tree.leaves(condition):
        same &= jnp.all((leaf[:, None] == leaf[None]).reshape(n, n, -1), axis=-1)
    return same


def optimal_assignment(cost: Float[Array, "n n"], condition: PyTree = None) -> Int[Array, " n"]:
    """The permutation π that minimises Σ_b cost[b, π(b)], cost >= 0, by the Hungarian algorithm: exact, O(n³). No gradient flows through it.

    `condition`: a pytree of leading axis n, such as labels: π(b) = i only where the conditions of examples b and i are equal.
    """
    cost = jax.lax.stop_gradient(cost)
    if jax.tree.leaves(condition):
        # A pair across conditions costs more than twice any pair within, so none is ever worth it: its two ends could go back at less.
        cost = jnp.where(same_condition(condition, len(cost)), cost, 2 * jnp.max(cost) + cost)
    # optax's loop carries numbers of the default dtype.
    rows, columns = optax.assignment.hungarian_algorithm(cost.astype(float))
    return jnp.zeros_like(columns).at[rows].set(columns)


__all__ = ["optimal_assignment", "same_condition", "squared_distances"]
