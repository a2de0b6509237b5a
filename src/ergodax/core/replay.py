"""What a rule of early stopping would have done to runs whose learning curves are known: no training, so thousands of cases in one call.

Choose `eta` and the first rung on the curves of a sweep that is done, before the next one; see how much a rule depends on the order of its queue.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .population import AbstractRule, Lanes
from .types import PRNGKey


class Replayed(NamedTuple):
    """How a search of known curves ends."""

    pieces: Int[Array, " num_runs"]  # that each run was given
    best: Int[Array, ""]  # the run of least cost among those that got furthest
    num_pieces: Int[Array, ""]  # of lanes one after the other: the time it takes


def replay(rule: AbstractRule, costs: Float[Array, "num_runs num_pieces"], key: PRNGKey | None = None) -> Replayed:
    """Let `rule` stop runs that would cost `costs[run, age - 1]` (smaller is better, NaN is worst) after their `age`-th piece.

    Pure: `jax.vmap` it over curves or over orders of the queue. For rules that neither copy lanes nor change hyper-parameters. Raises `ValueError` if
    there are fewer pieces than `rule.num_pieces`.
    """
    num_runs, length = costs.shape
    if length < rule.num_pieces:
        raise ValueError(f"`costs` must cover the {rule.num_pieces} pieces of the rule, got {length}.")
    costs = jnp.where(jnp.isnan(costs), jnp.inf, costs)
    first = jnp.arange(rule.sizes(num_runs)[0], dtype=jnp.int32)

    def body(carry):
        run, age, memory, pieces, time = carry
        age = age + (run >= 0).astype(age.dtype)
        cost = jnp.where(run >= 0, costs[run, age - 1], jnp.inf)
        pieces = pieces.at[jnp.where(run >= 0, run, num_runs)].set(age, mode="drop")
        key_piece = None if key is None else jax.random.fold_in(key, time)
        decision = rule(key_piece, Lanes(cost, {}, run, age, {}), memory)
        return decision.run, jnp.where(decision.fresh, 0, age), decision.memory, pieces, time + 1

    carry = first, jnp.zeros_like(first), rule.init(num_runs), jnp.zeros(num_runs, jnp.int32), jnp.zeros((), jnp.int32)
    zero = jnp.zeros_like(costs[0, 0])  # makes the carry vary over the devices of a shard_map, as the costs do
    carry = jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), carry)
    *_, pieces, time = jax.lax.while_loop(lambda carry: jnp.any(carry[0] >= 0), body, carry)
    last = jnp.take_along_axis(costs, jnp.maximum(pieces - 1, 0)[:, None], axis=1)[:, 0]
    furthest = jnp.max(jnp.where(jnp.isfinite(last), pieces, 0))
    best = jnp.argmin(jnp.where(pieces == furthest, last, jnp.inf))
    return Replayed(pieces, best.astype(jnp.int32), time)


__all__ = ["Replayed", "replay"]
