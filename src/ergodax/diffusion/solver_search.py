"""S³: the search for a solver schedule of `USF`. Liu, Ning, Yang, Wang 2023 (arXiv:2312.07243).

A schedule is where the nodes lie and what the solver decides at each. Evolution proposes mutants and children of the best so far, a cheap predictor
ranks them, and only those it likes are evaluated; stage by stage it is refined on what was found. It learns an order and no values: with costs s and
predictions P, the mean over pairs s_i < s_j of max(0, m - (P_j - P_i)).

    space = SolverSpace(path, num_steps=5)
    search = Evolution(space.random, space.mutate, space.crossover, num_parents=20, num_mutants=60, num_crossovers=20)
    def cost(schedule):                                   # any: here the distance to a fine solve from the same noise
        term = DenoiserTerm(denoised, path, space.grid(schedule))
        return jnp.mean((integrate(term, schedule.solver, noise) - reference) ** 2)
    memory = s3_search(key, search, cost, space.encode, search.first(key, 50), num_stages=10)
    best, _ = search.best(memory)

The whole population is evaluated in one program. Deviations: the cost is any function (theirs is FID); the predictor is an MLP on the encoded
schedule, and keeps its weights from stage to stage; the number of steps is fixed."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from ..core.check import check_count, check_range
from ..core.path import AffinePath
from ..core.types import PRNGKey, PyTree, Scalar
from .evolution import Evolution, Memory
from .usf_s3 import USF, Relaxation


_KINDS = 7  # tables of decisions


class SolverSchedule(NamedTuple):
    """A candidate: nodes between the two ends, as shares of the way in λ = log(α/σ), increasing; and the decisions of the steps."""

    nodes: Float[Array, " inner"]
    solver: USF


class SolverSpace(eqx.Module):
    """Solver schedules of N steps on `path`, for `Evolution`.

    - `num_steps` (static): N, at least 2. `start`, `end`: times of the ends, where λ must be finite (defaults 1e-3 and 1 - 1e-3).
    - `max_order` (static, default 3): the highest Taylor order of a step; its corrector has one more. `max_start` (static, default 0): most nodes
      that a step starts back; 0 leaves multistep methods.
    - `mutation_rate` (default 0.2): probability that a decision is drawn anew; `node_std` (default 0.2): standard deviation of a node's move, in 1/N.
    """

    path: AffinePath
    num_steps: int = eqx.field(static=True)
    start: Scalar = 1e-3
    end: Scalar = 1 - 1e-3
    max_order: int = eqx.field(static=True, default=3)
    max_start: int = eqx.field(static=True, default=0)
    mutation_rate: Scalar = 0.2
    node_std: Scalar = 0.2

    def __check_init__(self):
        check_count("num_steps", self.num_steps, low=2)
        check_count("max_order", self.max_order)
        check_count("max_start", self.max_start, low=0)
        for name in ("start", "end", "mutation_rate"):
            check_range(name, getattr(self, name), low=0.0, high=1.0)
        check_range("node_std", self.node_std, low=0.0)

    def embed(self, solver: USF, nodes: Float[Array, " inner"] | None = None) -> SolverSchedule:
        """A named point, such as `USF.unipc(N)`, as a candidate; equal steps of λ without `nodes`."""
        nodes = jnp.linspace(0.0, 1.0, self.num_steps + 1)[1:-1] if nodes is None else nodes
        tables = [solver.orders, solver.starts, solver.noise, solver.estimates, solver.relaxations, solver.correctors, solver.corrector_relaxations]
        return SolverSchedule(nodes, self._solver(*(jnp.zeros_like(solver.orders) if table is None else table for table in tables)))

    def grid(self, schedule: SolverSchedule) -> Float[Array, " steps"]:
        """Its times."""
        first, last = self.path.log_snr(jnp.asarray(self.start)), self.path.log_snr(jnp.asarray(self.end))
        ends = jnp.asarray(self.start, schedule.nodes.dtype), jnp.asarray(self.end, schedule.nodes.dtype)
        inner = self.path.time(first + schedule.nodes * (last - first)).astype(schedule.nodes.dtype)
        return jnp.concatenate([ends[0][None], inner, ends[1][None]])

    def random(self, key: PRNGKey) -> SolverSchedule:
        """All decisions drawn, and equal steps of λ with their nodes moved by up to half a step."""
        uniform = jax.random.uniform(key, (_KINDS + 1, self.num_steps))
        nodes = (jnp.arange(1, self.num_steps).astype(uniform.dtype) + uniform[-1, 1:] - 0.5) / self.num_steps
        return SolverSchedule(nodes, self._draw(uniform[:-1]))

    def mutate(self, key: PRNGKey, schedule: SolverSchedule) -> SolverSchedule:
        """Some decisions drawn anew, and some nodes moved."""
        key_move, key_solver = jax.random.split(key)
        draws, which = jax.random.uniform(key_solver, (2, _KINDS + 1, self.num_steps))
        which = which < self.mutation_rate
        move = self.node_std / self.num_steps * jax.random.normal(key_move, schedule.nodes.shape, schedule.nodes.dtype)
        nodes = schedule.nodes + jnp.where(which[-1, 1:], move, 0)
        # Not on the ends, nor on each other: a step of λ has a length.
        gap = 1e-3 * jnp.arange(1, self.num_steps).astype(nodes.dtype)
        nodes = jax.lax.cummax(jnp.clip(jnp.sort(nodes) - gap, 0, 1 - 1e-3 * self.num_steps)) + gap
        return SolverSchedule(nodes, _choose(which[:-1], self._draw(draws[:-1]), schedule.solver))

    def crossover(self, key: PRNGKey, first: SolverSchedule, second: SolverSchedule) -> SolverSchedule:
        """The nodes of one parent; of the decisions, either whole tables or whole steps of each."""
        coins = jax.random.bernoulli(key, shape=(2 + _KINDS + self.num_steps,))
        tables, steps = coins[2 : 2 + _KINDS, None], coins[None, 2 + _KINDS :]
        solver = _choose(jnp.where(coins[0], tables, steps), first.solver, second.solver)
        return SolverSchedule(jnp.where(coins[1], first.nodes, second.nodes), solver)

    def encode(self, schedule: SolverSchedule) -> Float[Array, " features"]:
        """What the predictor sees: the lengths of the steps, and indicators of all decisions."""
        lengths = jnp.diff(schedule.nodes, prepend=0, append=1) * self.num_steps - 1
        tables = jnp.stack([table.astype(int) for table in jax.tree.leaves(schedule.solver)])
        return jnp.concatenate([lengths, jax.nn.one_hot(tables, self.max_order + 2, dtype=lengths.dtype).ravel()])

    def _draw(self, uniform):
        """Decisions from uniform numbers; half of the steps have no corrector."""

        def integers(row, low, high):
            return low + jnp.floor(uniform[row] * (high - low + 1)).astype(int)

        orders, starts, estimates = integers(0, 1, self.max_order), integers(1, 0, self.max_start), integers(2, 2, max(self.max_order, 2))
        relaxations, relaxed = integers(3, 0, Relaxation.LINEAR), integers(4, 0, Relaxation.LINEAR)
        return self._solver(orders, starts, uniform[5] < 0.5, estimates, relaxations, jnp.where(uniform[6] < 0.5, orders + 1, 0), relaxed)

    def _solver(self, *tables):
        return USF(*tables, depth=max(self.max_order + 1, self.max_start + 2))


def _choose(which, first, second):
    """Table by table and step by step, `first` where `which`."""
    leaves, treedef = jax.tree.flatten(first)
    return jax.tree.unflatten(treedef, [jnp.where(*choice) for choice in zip(which, leaves, jax.tree.leaves(second))])


def ranking_loss(predicted: Float[Array, " n"], costs: Float[Array, " n"], known: Bool[Array, " n"], margin: Scalar = 1.0) -> Float[Array, ""]:
    """The mean hinge over the pairs of known costs; 0 where a worse candidate is predicted worse by `margin`."""
    pairs = (costs[:, None] < costs) & known[:, None] & known
    hinge = jax.nn.relu(margin - (predicted - predicted[:, None]))
    return jnp.sum(jnp.where(pairs, hinge, 0)) / jnp.maximum(jnp.sum(pairs), 1)


def s3_search(
    key: PRNGKey,
    search: Evolution,
    cost: Callable[[PyTree], Float[Array, ""]],
    encode: Callable[[PyTree], Float[Array, " features"]],
    candidates: PyTree,
    num_stages: int,
    *,
    num_evaluations: int = 20,
    fit_steps: int = 100,
    learning_rate: Scalar = 3e-3,
    width: int = 64,
) -> Memory:
    """From an evaluated first generation, `num_stages` times: fit the predictor, propose a generation, evaluate the part that it ranks best.

    - `cost`: candidate -> scalar, smaller is better. Draw whatever it needs before, so that candidates are compared on the same noise.
    - `encode`: candidate -> features, for a predictor of two hidden layers of `width`, with `fit_steps` of Adam in each stage on all costs so far.
    - `candidates`: the first generation, leading axis candidates. `num_evaluations`: how many of the proposals are evaluated in a stage.

    Returns all that was evaluated, in its order. Raises `ValueError` for counts that do not fit.
    """
    check_count("num_stages", num_stages)
    check_count("num_evaluations", num_evaluations)
    n, proposals = len(jax.tree.leaves(candidates)[0]), search.num_mutants + search.num_crossovers
    if n < search.num_parents:
        raise ValueError(f"the first generation must hold `num_parents` = {search.num_parents} candidates, got {n}.")
    if num_evaluations > proposals:
        raise ValueError(f"`num_evaluations` must be at most the {proposals} proposals of a generation, got {num_evaluations}.")

    memory = search.init(candidates, jax.vmap(cost)(candidates), n + num_stages * num_evaluations)
    key_network, key_stages = jax.random.split(key)
    features = jax.eval_shape(jax.vmap(encode), candidates)
    network = eqx.nn.MLP(features.shape[1], "scalar", width, 2, dtype=features.dtype, key=key_network)
    weights, static = eqx.partition(network, eqx.is_inexact_array)
    optimiser = optax.adam(learning_rate)  # pyrefly: ignore[bad-argument-type]

    def stage(carry, key):
        memory, weights, optimiser_state = carry
        encoded, known = jax.vmap(encode)(memory.candidates), jnp.arange(len(memory.costs)) < memory.count

        def loss(weights):
            return ranking_loss(jax.vmap(eqx.combine(weights, static))(encoded), memory.costs, known)

        def fit(carry, _):
            weights, state = carry
            updates, state = optimiser.update(jax.grad(loss)(weights), state, weights)
            return (optax.apply_updates(weights, updates), state), None

        (weights, optimiser_state), _ = jax.lax.scan(fit, (weights, optimiser_state), None, length=fit_steps)
        proposed = search.ask(key, memory)
        ranks = jax.vmap(eqx.combine(weights, static))(jax.vmap(encode)(proposed))
        chosen = jax.lax.top_k(-ranks, num_evaluations)[1]
        proposed = jax.tree.map(lambda leaf: leaf[chosen], proposed)
        return (search.tell(memory, proposed, jax.vmap(cost)(proposed)), weights, optimiser_state), None

    return jax.lax.scan(stage, (memory, weights, optimiser.init(weights)), jax.random.split(key_stages, num_stages))[0][0]


__all__ = ["SolverSchedule", "SolverSpace", "ranking_loss", "s3_search"]
