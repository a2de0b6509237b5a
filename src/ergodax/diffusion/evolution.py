"""Elitist evolutionary search over candidates of any kind, on arrays: a search is one compiled program, and a `vmap` over keys is many searches.

A candidate is a pytree of arrays of fixed shapes; what it means is said by four functions,

    random(key) -> candidate,   mutate(key, candidate) -> candidate,   crossover(key, candidate, candidate) -> candidate,   valid(candidate) -> bool.

Everything evaluated so far is remembered. Parents are the best of it all; each generation holds mutants of parents, then children of two parents,
none of them equal to a candidate of before. Two ways in: `evolve`, and `ask`/`tell` for costs that are computed elsewhere:

    memory = search.init(candidates, costs, capacity)             # from a first generation
    candidates = search.ask(key, memory)
    memory = search.tell(memory, candidates, costs)               # and so on
    best, cost = search.best(memory)

Regularised forms of this search serve architecture search, e.g. Real, Aggarwal, Huang, Le 2019 (arXiv:1802.01548); keeping the best of all that was
seen, as here, is the classic (μ + λ) selection.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..core.check import check_count, is_concrete
from ..core.types import PRNGKey, PyTree


class Memory(NamedTuple):
    """All candidates told so far, in their order; places not yet used have infinite cost."""

    candidates: PyTree  # leaves of shape (capacity, ...)
    costs: Float[Array, " capacity"]
    count: Int[Array, ""]  # how many places are used


def always_valid(candidate: PyTree) -> Bool[Array, ""]:
    """Every candidate may be evaluated."""
    return jnp.asarray(True)


class Evolution(eqx.Module):
    """The search; all counts are static. Candidates from `random` should be valid, and more than there will be evaluations.

    - `num_parents` (10), `num_mutants` (25), `num_crossovers` (25).
    - `num_tries` (10): proposals per place of a generation, of which the first that are new and valid are taken. Places left over are filled with
      new random candidates, and only if those run out too with candidates known already.

    Raises `ValueError` for counts that do not fit.
    """

    random: Callable
    mutate: Callable
    crossover: Callable
    valid: Callable = always_valid
    num_parents: int = eqx.field(static=True, default=10)
    num_mutants: int = eqx.field(static=True, default=25)
    num_crossovers: int = eqx.field(static=True, default=25)
    num_tries: int = eqx.field(static=True, default=10)

    def __check_init__(self):
        for name, low in (("num_parents", 1), ("num_mutants", 0), ("num_crossovers", 0), ("num_tries", 1)):
            check_count(name, getattr(self, name), low=low)
        check_count("the number of mutants and crossovers", self.num_mutants + self.num_crossovers)

    def first(self, key: PRNGKey, n: int, around: PyTree = None) -> PyTree:
        """A first generation of `n` different candidates: random ones; given a candidate `around`, that one, mutants of it, and ⌊n/2⌋ random ones."""
        check_count("n", n)
        key_random, key_mutant = jax.random.split(key)
        randoms = self._randoms(key_random, 2 * n)
        if around is None:
            return self._pick(randoms, n)
        mutants = jax.vmap(self.mutate, in_axes=(0, None))(jax.random.split(key_mutant, self.num_tries * n), around)
        around = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], around)
        near = self._pick(_join(around, mutants, randoms), n - n // 2)
        return _join(near, self._pick(randoms, n // 2, [(near, jnp.ones(n - n // 2, bool))]))

    def init(self, candidates: PyTree, costs: Float[Array, " n"], capacity: int) -> Memory:
        """A memory for `capacity` candidates that begins with a first generation (leading axis: candidates) and its costs."""
        check_count("capacity", capacity, low=len(costs))
        # Made of both: under `shard_map` either may differ between devices.
        zero = jnp.zeros_like(costs[0]) + jnp.zeros_like(jax.tree.leaves(candidates)[0].ravel()[0], costs.dtype)
        empty = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape[1:]), leaf.dtype) + zero.astype(leaf.dtype), candidates)
        return self.tell(Memory(empty, jnp.full(capacity, jnp.inf, costs.dtype) + zero, zero.astype(int)), candidates, costs)

    def tell(self, memory: Memory, candidates: PyTree, costs: Float[Array, " n"]) -> Memory:
        """Remember a generation and its costs; NaN counts as infinite. Raises `ValueError` if the memory is seen to be full."""
        (n,) = costs.shape
        if is_concrete(memory.count) and int(memory.count) + n > len(memory.costs):
            raise ValueError(f"the memory holds {len(memory.costs)} candidates; {int(memory.count)} are told, and {n} more came.")

        def write(old, new):
            return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), memory.count, 0)

        costs = jnp.where(jnp.isnan(costs), jnp.inf, costs)
        return Memory(jax.tree.map(write, memory.candidates, candidates), write(memory.costs, costs), memory.count + n)

    def ask(self, key: PRNGKey, memory: Memory) -> PyTree:
        """The next generation: `num_mutants` mutants, then `num_crossovers` children. The memory must hold `num_parents` candidates."""
        key_mutant, key_cross, key_random = jax.random.split(key, 3)
        parents = self.parents(memory)
        known = [(memory.candidates, jnp.arange(len(memory.costs)) < memory.count)]
        randoms = self._randoms(key_random, 2 * (self.num_mutants + self.num_crossovers))
        generation = []
        for key, n, breed, arity in ((key_mutant, self.num_mutants, self.mutate, 1), (key_cross, self.num_crossovers, self.crossover, 2)):
            key_parents, key_breed = jax.random.split(key)
            tries = self.num_tries * n
            drawn = jax.random.randint(key_parents, (arity, tries), 0, self.num_parents)
            proposed = jax.vmap(breed)(jax.random.split(key_breed, tries), *(jax.tree.map(lambda leaf, i=i: leaf[i], parents) for i in drawn))
            generation.append(self._pick(_join(proposed, randoms), n, known))
            known.append((generation[-1], jnp.ones(n, bool)))
        return _join(*generation)

    def parents(self, memory: Memory) -> PyTree:
        """The best `num_parents` candidates so far, best first."""
        _, best = jax.lax.top_k(-memory.costs, self.num_parents)
        return jax.tree.map(lambda leaf: leaf[best], memory.candidates)

    def best(self, memory: Memory) -> tuple[PyTree, Float[Array, ""]]:
        """The best candidate so far and its cost."""
        i = jnp.argmin(memory.costs)
        return jax.tree.map(lambda leaf: leaf[i], memory.candidates), memory.costs[i]

    def _randoms(self, key, n):
        return jax.vmap(self.random)(jax.random.split(key, n))

    def _pick(self, pool, n, known=()):
        """The first `n` of the pool that are valid, differ from those before them and from the known (candidates, which of them count)."""
        valid = jax.vmap(self.valid)(pool)
        new = valid & ~jnp.any(jnp.tril(_equal(pool, pool), -1) & valid, axis=1)
        for candidates, counts in known:
            new = new & ~jnp.any(_equal(pool, candidates) & counts, axis=1)
        order = jnp.argsort(jnp.where(new, 0, jnp.where(valid, 1, 2)), stable=True)
        return jax.tree.map(lambda leaf: leaf[order[:n]], pool)


def evolve(
    key: PRNGKey,
    search: Evolution,
    cost: Callable[[PyTree], Float[Array, ""]],
    candidates: PyTree,
    num_generations: int,
    *,
    batch_size: int | None = None,
) -> Memory:
    """Run `search` from a first generation for `num_generations` more, and return all that was evaluated, in its order.

    - `cost`: candidate -> scalar, smaller is better; compiled once. Draw whatever it needs before, so that candidates are compared on the same noise.
    - `candidates`: the first generation, at least `num_parents` of them (`search.first`).
    - `batch_size`: candidates evaluated together; 1 to save work by `jax.lax.cond` inside `cost`, None (default) for all of a generation.

    Raises `ValueError` for counts that do not fit.
    """
    check_count("num_generations", num_generations)
    n = len(jax.tree.leaves(candidates)[0])
    if n < search.num_parents:
        raise ValueError(f"the first generation must hold `num_parents` = {search.num_parents} candidates, got {n}.")

    def evaluate(candidates):
        if batch_size is None:
            return jax.vmap(cost)(candidates)
        return jax.lax.map(cost, candidates, batch_size=None if batch_size == 1 else batch_size)

    def generation(memory, key):
        candidates = search.ask(key, memory)
        return search.tell(memory, candidates, evaluate(candidates)), None

    memory = search.init(candidates, evaluate(candidates), n + num_generations * (search.num_mutants + search.num_crossovers))
    return jax.lax.scan(generation, memory, jax.random.split(key, num_generations))[0]


def _join(*generations):
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *generations)


def _equal(first, second):
    """Which candidates are equal in every number: (n, m)."""

    def leaf(a, b):
        return jnp.all((a[:, None] == b[None]).reshape(len(a), len(b), -1), axis=-1)

    return jnp.all(jnp.stack(jax.tree.leaves(jax.tree.map(leaf, first, second))), axis=0)


__all__ = ["Evolution", "Memory", "always_valid", "evolve"]
