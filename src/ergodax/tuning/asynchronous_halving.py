"""Asynchronous successive halving, ASHA (Li et al., 2020, arXiv:1810.05934), in its stopping form, in lock-step.

A fixed number of lanes takes the runs from a queue. A run that reaches the rung at r_i = r η^i puts its cost there, and goes on if it is among the
best 1/η of all that were ever put there; else it is stopped and its lane starts the next run of the queue. Nobody waits for a rung to fill, and all
lanes are at work until the queue is empty.

Deviations: the paper's own form (Algorithm 2) pauses at a rung and promotes later, which needs the states of all runs that wait; the stopping form is
what Ray Tune's `ASHAScheduler` and Syne Tune's `type="stopping"` run. The threshold is Syne Tune's, the 1/η quantile of the rung with the newcomer
included (Ray leaves it out), which keeps ⌈count/η⌉; so whoever comes first goes on. Runs that reach a rung in the same piece are put there
together before any is judged.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..core.check import check_count
from ..core.population import AbstractRule, Decision, Lanes
from ..core.types import PRNGKey
from .successive_halving import rungs


class _Memory(NamedTuple):
    costs: Float[Array, "rungs num_runs"]  # at each rung, NaN for a run that has not been there
    next_run: Int[Array, ""]  # the head of the queue


class AsynchronousHalving(AbstractRule):
    """Stop a run at a rung unless it is among the best 1/η that were there; one program in all.

    - `num_lanes`: lanes at work at the same time.
    - `num_pieces`: R, the pieces of a whole run.
    - `eta`: η, an integer of at least 2. Default 3; the paper uses 4.
    - `min_pieces`: r, the pieces before the first rung.

    The queue is in the order of the overrides. The first comers of a rung have little to be compared with, so shuffle a grid. Raises `ValueError` for
    counts out of range.
    """

    num_lanes: int
    num_pieces: int
    eta: int = 3
    min_pieces: int = 1

    def __check_init__(self):
        check_count("num_lanes", self.num_lanes)
        rungs(self.num_pieces, self.eta, self.min_pieces)

    def sizes(self, num_runs: int) -> tuple[int, ...]:
        """One program: lanes that the empty queue leaves idle stay."""
        return (min(self.num_lanes, num_runs),)

    def init(self, num_runs: int) -> _Memory:
        """Empty rungs, and the queue behind the runs that start in the lanes."""
        ages = rungs(self.num_pieces, self.eta, self.min_pieces)
        return _Memory(jnp.full((len(ages), num_runs), jnp.nan), jnp.array(self.sizes(num_runs)[0], jnp.int32))

    def __call__(self, key: PRNGKey | None, lanes: Lanes, memory: _Memory) -> Decision:
        """Judge whoever is at a rung, then refill."""
        ages = jnp.array(rungs(self.num_pieces, self.eta, self.min_pieces), lanes.age.dtype)
        num_runs = memory.costs.shape[1]
        active = lanes.run >= 0
        here = active & (lanes.age == ages[:, None])  # (rungs, n)
        column = jnp.where(here, lanes.run, num_runs)  # out of bounds, so dropped, unless here
        cost = jnp.broadcast_to(lanes.cost, here.shape).astype(memory.costs.dtype)
        costs = memory.costs.at[jnp.arange(len(ages))[:, None], column].set(cost, mode="drop")
        better = jnp.sum(costs[:, None, :] < lanes.cost.astype(costs.dtype)[:, None], axis=-1)  # (rungs, n); False for NaN
        count = jnp.sum(~jnp.isnan(costs), axis=-1)
        stopped = here & ((better >= -(-count // self.eta)[:, None]) | ~jnp.isfinite(lanes.cost))
        goes_on = active & (lanes.age < self.num_pieces) & ~jnp.any(stopped, axis=0)

        queued = memory.next_run + jnp.cumsum(~goes_on, dtype=jnp.int32) - 1
        fresh = ~goes_on & (queued < num_runs)
        run = jnp.where(goes_on, lanes.run, jnp.where(fresh, queued.astype(lanes.run.dtype), -1))
        values = {name: _where(fresh, lanes.runs[name][jnp.where(fresh, run, 0)], column) for name, column in lanes.values.items()}
        lane = jnp.arange(lanes.run.size, dtype=lanes.run.dtype)
        return Decision(lane, fresh, run, values, _Memory(costs, memory.next_run + jnp.sum(fresh, dtype=jnp.int32)))


def _where(lane, new, old):
    return jnp.where(lane.reshape(-1, *(1,) * (old.ndim - 1)), new, old)


__all__ = ["AsynchronousHalving"]
