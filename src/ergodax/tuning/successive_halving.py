"""Successive halving (Jamieson and Talwalkar, 2016, arXiv:1502.07943), in the notation of Hyperband (Li et al., 2018, arXiv:1603.06560).

n runs start together. When all have used r_i = r η^i, the best n_{i+1} = ⌊n_i / η⌋ go on and the others stop, until those that are left have used R.
Each rung costs about as much as the first, so the whole costs about (number of rungs) · n · r instead of n · R.

Deviations: at least one run always goes on, also where n_i < η; R need not be r η^s, the last stretch is then shorter. η = 2 is the rule of the first
paper, which sets the r_i by a total budget instead.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from ..core.check import check_count
from ..core.population import AbstractRule, Decision, Lanes
from ..core.types import PRNGKey


class SuccessiveHalving(AbstractRule):
    """Keep the best 1/η at each rung; one program for each number of lanes.

    - `num_pieces`: R, the pieces of a whole run.
    - `eta`: η, an integer of at least 2. Default 3, as in Hyperband.
    - `min_pieces`: r, the pieces before the first rung.

    Raises `ValueError` for counts out of range.
    """

    num_pieces: int
    eta: int = 3
    min_pieces: int = 1

    def __check_init__(self):
        rungs(self.num_pieces, self.eta, self.min_pieces)

    def sizes(self, num_runs: int) -> tuple[int, ...]:
        """n_0, n_1, …"""
        sizes = [num_runs]
        for _ in rungs(self.num_pieces, self.eta, self.min_pieces):
            sizes.append(max(1, sizes[-1] // self.eta))
        return tuple(dict.fromkeys(sizes))

    def init(self, num_runs: int) -> None:
        """Nothing is remembered."""

    def __call__(self, key: PRNGKey | None, lanes: Lanes, memory: None) -> Decision:
        """All lanes have the same age, so a rung is reached by all at once."""
        active = lanes.run >= 0
        kept = jnp.maximum(1, jnp.sum(active) // self.eta)
        at_rung = jnp.isin(lanes.age, jnp.array(rungs(self.num_pieces, self.eta, self.min_pieces), lanes.age.dtype))
        goes_on = active & (lanes.age < self.num_pieces) & (~at_rung | (rank(lanes) < kept))
        lane = jnp.arange(lanes.run.size, dtype=lanes.run.dtype)
        return Decision(lane, jnp.zeros_like(active), jnp.where(goes_on, lanes.run, -1), lanes.values, memory)


def rungs(num_pieces: int, eta: int, min_pieces: int) -> tuple[int, ...]:
    """The ages r, r η, r η², … below R at which runs are compared. Raises `ValueError` for counts out of range."""
    check_count("min_pieces", min_pieces)
    check_count("num_pieces", num_pieces, low=min_pieces)
    check_count("eta", eta, low=2)
    ages = [min_pieces]
    while ages[-1] < num_pieces:
        ages.append(ages[-1] * eta)
    return tuple(ages[:-1])


def rank(lanes: Lanes) -> Int[Array, " n"]:
    """0 for the lane of least cost, of equal ones the first; runs without a finite cost come next to last, idle lanes last."""
    order = jnp.lexsort((lanes.cost, lanes.run < 0))
    return jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))


__all__ = ["SuccessiveHalving", "rank", "rungs"]
