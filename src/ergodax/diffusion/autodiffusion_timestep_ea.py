"""AutoDiffusion: the time steps of a sampler, and the blocks its network runs at each, by evolutionary search without training.

Li, Li, Zheng, Wu, Xiao, Wang, Zheng, Pan, Chao, Ji 2023 (arXiv:2309.10438). Of T times in a fine grid a candidate keeps K, and for each of them a
mask over the B blocks of the network (a skipped residual block is the identity) with at most `budget` blocks in all:

    candidate = (steps: K increasing numbers of 0 … T-1, counted from the noise;  keep: (K, B)).

Its cost is any distance of samples to data, with the sampler, the network and the noise fixed (the paper's is the FID). The search is
`ergodax.diffusion.Evolution` with the operators below; the paper's numbers are its defaults, 50 candidates in the first generation and 10 more:

    space = TimestepSpace(num_times=1000, num_steps=4)
    search = Evolution(space.random, space.mutate, space.crossover, space.valid)
    memory = evolve(key, search, cost, search.first(key_first, 50, around=space.uniform()), num_generations=10)
    best, _ = search.best(memory)
    grid = timestep_grid(times, best.steps)                            # for DenoiserTerm

The paper searches the steps first and then both together: `search.first(key, 50, around=best._replace(keep=...))` of the larger space begins there.

- The entry-wise crossover can repeat a step; the released code evaluates such a child with fewer steps, here it is refused.
- The released code fixes no order of a list; here lists are sorted, so that entry-wise exchange means something and equal lists are one candidate.
- Its masks are drawn with a share of blocks that grows during the search; here the share is `budget` throughout, kept by every mutation.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..core.check import check_count, check_range
from ..core.types import PRNGKey, PyTree, Scalar, Time
from .skipped_blocks import keep_blocks


class TimestepCandidate(NamedTuple):
    """What the search finds."""

    steps: Int[Array, "*n steps"]  # increasing, each in 0 … T-1
    keep: Bool[Array, "*n steps blocks"]


class TimestepSpace(eqx.Module):
    """All candidates, and how they are drawn and bred.

    - `num_times`, `num_steps` (static): T and K ≤ T.
    - `num_blocks` (static): B, default 0: only the steps are searched.
    - `budget` (static): blocks run in all K steps together; default None, all K · B of them.
    - `mutation_rate`: probability that a mutation touches an entry, default 0.1.

    Raises `ValueError` for counts that do not fit.
    """

    num_times: int = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    num_blocks: int = eqx.field(static=True, default=0)
    budget: int | None = eqx.field(static=True, default=None)
    mutation_rate: Scalar = 0.1

    def __check_init__(self):
        check_count("num_steps", self.num_steps)
        check_count("num_times", self.num_times, low=self.num_steps)
        check_count("num_blocks", self.num_blocks, low=0)
        check_range("mutation_rate", self.mutation_rate, low=0.0, high=1.0)
        if self.budget is not None:
            check_count("budget", self.budget, low=0)
            check_range("budget", self.budget, high=self.num_steps * self.num_blocks)

    def random(self, key: PRNGKey) -> TimestepCandidate:
        """Uniform steps; a uniform mask of exactly `budget` blocks."""
        key_steps, key_keep = jax.random.split(key)
        steps = jnp.sort(jnp.argsort(jax.random.uniform(key_steps, (self.num_times,)))[: self.num_steps])
        rank = jnp.argsort(jax.random.uniform(key_keep, (self.num_steps * self.num_blocks,)))
        return TimestepCandidate(steps, (rank < self._budget).reshape(self.num_steps, self.num_blocks))

    def uniform(self) -> TimestepCandidate:
        """Evenly spaced steps from the noisiest, as samplers use, and a mask whose skipped blocks are spread evenly."""
        steps = jnp.arange(self.num_steps) * self.num_times // self.num_steps
        places = jnp.arange(self.num_steps * self.num_blocks)
        spread = (places + 1) * self._budget // max(len(places), 1) > places * self._budget // max(len(places), 1)
        return TimestepCandidate(steps, spread.reshape(self.num_steps, self.num_blocks))

    def mutate(self, key: PRNGKey, candidate: TimestepCandidate) -> TimestepCandidate:
        """Some steps are replaced by steps not in the list, all different; some entries of the mask change places."""
        key_which, key_new, key_touch, key_order = jax.random.split(key, 4)
        rate = jnp.asarray(self.mutation_rate)
        touched = jax.random.bernoulli(key_which, rate, (self.num_steps,))
        listed = jnp.zeros(self.num_times, bool).at[candidate.steps].set(True)
        # Those not listed first, in random order.
        fresh = jnp.argsort(jax.random.uniform(key_new, (self.num_times,)) + listed.astype(float))[: self.num_steps]
        steps = jnp.sort(jnp.where(touched, fresh.astype(candidate.steps.dtype), candidate.steps))

        keep = candidate.keep.ravel()
        touched = jax.random.bernoulli(key_touch, rate, keep.shape)
        # The count of the kept stays: of the touched entries, as many as before are kept, at random.
        rank = jnp.where(touched, jax.random.uniform(key_order, keep.shape), jnp.where(keep, -1.0, 2.0))
        keep = jnp.argsort(jnp.argsort(rank)) < jnp.sum(keep)
        return TimestepCandidate(steps, keep.reshape(candidate.keep.shape))

    def crossover(self, key: PRNGKey, first: TimestepCandidate, second: TimestepCandidate) -> TimestepCandidate:
        """Each entry, a step with its mask, from either parent. May be invalid."""
        pick = jax.random.bernoulli(key, 0.5, (self.num_steps,))
        steps = jnp.where(pick, first.steps, second.steps)
        order = jnp.argsort(steps)
        return TimestepCandidate(steps[order], jnp.where(pick[:, None], first.keep, second.keep)[order])

    def valid(self, candidate: TimestepCandidate) -> Bool[Array, ""]:
        """No step twice, and within the budget."""
        return jnp.all(jnp.diff(candidate.steps) > 0) & (jnp.sum(candidate.keep) <= self._budget)

    @property
    def _budget(self):
        return self.num_steps * self.num_blocks if self.budget is None else self.budget


def timestep_grid(times: Float[Array, " fine"], steps: Int[Array, " steps"]) -> Float[Array, " grid"]:
    """The grid of K steps through `times[steps]`, ending where `times` ends: `times` holds T + 1 times from noise to data."""
    return jnp.append(times[steps], times[-1])


class SkippingNetwork(eqx.Module):
    """`network` with the blocks of a candidate: at a time t, those kept for the step of `grid` that begins nearest to t.

    - `network`: one with stacked blocks (`ergodax.diffusion.keep_blocks`), called as `(t, x, args)`.
    - `grid`: (K + 1,), the sampler's; `keep`: (K, B).
    """

    network: Any
    grid: Float[Array, " grid"]
    keep: Bool[Array, "steps blocks"]

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None, *, key: PRNGKey | None = None) -> Float[Array, "*x"]:
        """The network's output at one scalar `t`."""
        i = jnp.argmin(jnp.abs(self.grid[:-1] - jnp.asarray(t, self.grid.dtype)))
        return keep_blocks(self.network, self.keep[i])(t, x, args, key=key)


__all__ = ["SkippingNetwork", "TimestepCandidate", "TimestepSpace", "timestep_grid"]
