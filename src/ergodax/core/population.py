"""Runs as lanes of one compiled program: after every piece of training a rule says which lanes go on, stop, copy another, or start the next run.

A `Trial` is a run that can be taken in pieces. The lanes of a population share one program: each trains for one piece, then the rule sees all their
costs and decides, still inside the program. So a decision costs at most a gather, and no compile. When few enough lanes are left at work, they move
together: batches of idle lanes are skipped, and where the batch itself can be smaller, the population shrinks, which is one further compile.

The hook is `AbstractRule`; successive halving, asynchronous halving and population-based training are three of it. `ergodax.core.search` drives them.
"""

import abc
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from .fit import Fit
from .program import traced_fingerprint
from .space import replace
from .types import PRNGKey, PyTree


class Trial(NamedTuple):
    """A run that can be taken in pieces; `fit_trial` makes one of a `Fit`."""

    init: Callable[[], PyTree]  # the state before the first step: arrays only
    advance: Callable[[PyTree, int], tuple[PyTree, Mapping[str, Array]]]  # that many further steps, and their metrics; the last of each one counts


def fit_trial(fitting: Fit, key: PRNGKey) -> Trial:
    """A training run as a trial. Once a loss or gradient was not finite (`failed_at`), its metrics are NaN, so that no rule prefers it."""

    def advance(state, num_steps):
        state, metrics = fitting.advance(state, num_steps)
        return state, {name: jnp.where(state.failed_at < 0, metric, jnp.nan) for name, metric in metrics.items()}

    return Trial(lambda: fitting.init(key), advance)


class Lanes(NamedTuple):
    """What a rule sees of n lanes after a piece."""

    cost: Float[Array, " n"]  # the metric, smaller is better; inf where it is NaN, and in idle lanes
    values: dict[str, Shaped[Array, "n ..."]]  # the hyper-parameters at work
    run: Int[Array, " n"]  # the run that the lane holds, -1 if it is idle
    age: Int[Array, " n"]  # pieces that this run has behind it
    runs: dict[str, Shaped[Array, "num_runs ..."]]  # the hyper-parameters that each run starts with


class Decision(NamedTuple):
    """What becomes of each lane."""

    parent: Int[Array, " n"]  # whose state it takes over; itself to go on
    fresh: Bool[Array, " n"]  # start anew from `values` instead
    run: Int[Array, " n"]  # the run it holds from now on, -1 for none
    values: dict[str, Shaped[Array, "n ..."]]
    memory: PyTree  # the rule's own


class AbstractRule(eqx.Module):
    """A rule of early stopping: a pure function of what the lanes show. It is traced into the program, so it obeys the rules of `jax.jit`."""

    num_pieces: eqx.AbstractVar[int]  # a whole run has this many

    @abc.abstractmethod
    def sizes(self, num_runs: int) -> tuple[int, ...]:
        """The numbers of lanes that are worth a program, decreasing. The first runs fill the first."""

    @abc.abstractmethod
    def init(self, num_runs: int) -> PyTree:
        """The memory before the first piece."""

    @abc.abstractmethod
    def __call__(self, key: PRNGKey | None, lanes: Lanes, memory: PyTree) -> Decision:
        """Decide after a piece. `key` is another one each time, None if the search was given none."""


class Population(NamedTuple):
    """The lanes: a leading axis everywhere, in the order of the devices. Neighbouring lanes of a rule are on different devices, so that the work is
    spread evenly. Places that a rule does not ask for only make the number divide, and stay idle.
    """

    state: PyTree
    values: dict[str, Shaped[Array, "n ..."]]
    run: Int[Array, " n"]
    age: Int[Array, " n"]
    fresh: Bool[Array, " n"]  # `state` is yet to be initialised
    parent: Int[Array, " n"]  # the lane that its state was in during the piece before, -1 if fresh


class Champion(NamedTuple):
    """The best lane so far, by age and then by cost: its own lane may long hold another run."""

    age: Int[Array, ""]
    cost: Float[Array, ""]
    state: PyTree


class Programs:
    """The compiled programs of the runs that share their static leaves, one for each number of lanes.

    - `make`: `make(config) -> Trial`, where `config` is given with its static leaves in place and `table` holds the traced ones, a row per run.
    - `batch_size`, `mesh`: as in `search`.

    Raises `ValueError` if a trial does not report `metric`, or does not keep the shapes of its state.
    """

    def __init__(self, make, config, table, num_runs, rule, *, metric, piece_steps, largest, batch_size, mesh: Mesh):
        def trial(values):
            return make(replace(config, values))

        def advance(trial, state):
            state, metrics = trial.advance(state, piece_steps)
            if metric not in metrics:
                raise ValueError(f"no metric `{metric}`; there are {', '.join(metrics)}.")
            return state, jnp.ravel(jnp.asarray(metrics[metric]))[-1].astype(float)

        self._trial, self._advance = trial, advance
        self._rule, self._num_runs, self._largest, self._batch_size, self._mesh = rule, num_runs, largest, batch_size, mesh
        self._lanes, self._replicated = (NamedSharding(mesh, spec) for spec in (PartitionSpec("sweep"), PartitionSpec()))
        self._columns = {name: jnp.asarray(column) for name, column in table.items()}
        self._table = jax.device_put(self._columns, self._replicated)
        self.sizes = rule.sizes(num_runs)
        self._steps: dict[int, Callable] = {}
        self.compile_seconds = 0.0
        self.fingerprint, self._state = self._trace()

    def _trace(self):
        """A digest of the program as traced for one run on one device, with the arrays it closes over; and the shapes of its state."""

        def whole(values):
            trial = self._trial(values)
            state = trial.init()
            return state, *self._advance(trial, state)

        first = {name: column[0] for name, column in self._columns.items()}
        fingerprint, (before, after, _) = traced_fingerprint(whole, first, self._mesh)
        shapes = [[(place, leaf.shape, leaf.dtype) for place, leaf in jax.tree.leaves_with_path(state)] for state in (before, after)]
        if shapes[0] != shapes[1]:
            differing = [f"{jax.tree_util.keystr(a[0])} {a[1:]} -> {b[1:]}" for a, b in zip(*shapes) if a != b]
            raise ValueError(f"`advance` must keep the structure, shapes and dtypes of the state, got {', '.join(differing) or 'other leaves'}.")
        return fingerprint, before

    @property
    def compiled(self) -> tuple[int, ...]:
        """The numbers of lanes that there is a program for."""
        return tuple(self._steps)

    def size(self, active: int) -> int:
        """The rule's smallest size that holds as many lanes."""
        return min(size for size in self.sizes if size >= active)

    def lanes_for(self, active: int, num_lanes: int) -> int:
        """How many to go on with when that many of `num_lanes` are at work: another number is another program, so only for smaller batches."""
        size = self.size(active)
        return size if self._batches(size)[0] < self._batches(num_lanes)[0] else num_lanes

    def start(self, num_lanes: int) -> tuple[Population, Champion, PyTree]:
        """The population before the first piece, its lanes holding the first runs; a champion that anything beats; the rule's memory."""
        places = self._places(num_lanes)

        def zeros(*shape):
            return jax.tree.map(lambda leaf: jnp.zeros((*shape, *leaf.shape), leaf.dtype), self._state)

        def population():
            run = jnp.full(places.size, -1, jnp.int32).at[places[:num_lanes]].set(jnp.arange(num_lanes, dtype=jnp.int32))
            values = {name: column[jnp.maximum(run, 0)] for name, column in self._columns.items()}
            return Population(zeros(places.size), values, run, jnp.zeros_like(run), run >= 0, jnp.full_like(run, -1))

        def rest():
            return Champion(jnp.zeros((), jnp.int32), jnp.full((), jnp.inf, float), zeros()), self._rule.init(self._num_runs)

        champion, memory = jax.jit(rest, out_shardings=self._replicated)()
        return jax.jit(population, out_shardings=self._lanes)(), champion, memory

    def step(self, num_lanes: int, population: Population, champion: Champion, memory: PyTree, piece: int, key: PRNGKey | None):
        """One piece of all lanes and the rule's decision: the next (population, champion, memory), and a record of arrays (num_lanes,)."""
        args = (population, champion, memory, self._table, jnp.asarray(piece), key)
        if num_lanes not in self._steps:
            started = time.perf_counter()
            # Arrays that `make` closes over become arguments: XLA would copy them into the program.
            arrays, rest = eqx.partition(eqx.filter_closure_convert(self._step(num_lanes), *args), eqx.is_array)
            shardings = (self._lanes, self._replicated, self._replicated, self._replicated)
            program = jax.jit(
                lambda arrays, *args: eqx.combine(arrays, rest)(*args),
                in_shardings=(self._replicated, *shardings, None, None),
                out_shardings=shardings,
                donate_argnums=(1, 2, 3),
            )
            arrays = jax.device_put(arrays, self._replicated)
            compiled = program.lower(arrays, *args).compile()
            self._steps[num_lanes] = lambda *args: compiled(arrays, *args)
            self.compile_seconds += time.perf_counter() - started
        return self._steps[num_lanes](*args)

    def shrink(self, population: Population, num_lanes: int, following: int) -> Population:
        """The first lanes of a population alone, where those at work are."""
        old, new = self._places(num_lanes), self._places(following)
        origin = old[: new.size][np.argsort(new)]
        return jax.jit(lambda population: jax.tree.map(lambda leaf: leaf[origin], population), out_shardings=self._lanes)(population)

    def _batches(self, num_lanes):
        """Lanes vmapped together, and how many times on each device."""
        lanes = -(-num_lanes // self._mesh.shape["sweep"])
        batch = min(self._batch_size or lanes, lanes)
        return batch, -(-lanes // batch)

    def _places(self, num_lanes):
        """Where each lane is in the arrays of a `Population`; those behind `num_lanes` are the places left over."""
        batch, rounds = self._batches(num_lanes)
        devices = self._mesh.shape["sweep"]
        return np.arange(devices * rounds * batch).reshape(devices, rounds * batch).T.reshape(-1)

    def _step(self, num_lanes):
        places = self._places(num_lanes)[:num_lanes]

        def put(old, new):
            return old.at[places].set(new.astype(old.dtype))

        def step(population, champion, memory, table, piece, key):
            active = population.run >= 0
            state, score = self._advance_all(num_lanes)(population.values, population.fresh, active, population.state)
            # The rule is asked on every device alike.
            seen = (score, population.values, population.run, population.age + active.astype(jnp.int32), population.parent)
            score, values, run, age, parent = jax.lax.with_sharding_constraint(jax.tree.map(lambda leaf: leaf[places], seen), self._replicated)
            cost = -score if self._largest else score
            cost = jnp.where(jnp.isnan(cost) | (run < 0), jnp.inf, cost)
            champion = _challenge(champion, age, cost, state, places)
            decision = self._rule(None if key is None else jax.random.fold_in(key, piece), Lanes(cost, values, run, age, table), memory)

            order = self._order(run, decision.run)
            parent_next, fresh, run_next, values_next = jax.tree.map(lambda leaf: leaf[order], decision[:4])
            here = jnp.arange(population.run.size)
            origin = put(here, jnp.asarray(places)[parent_next])
            state = jax.lax.cond(jnp.any(origin != here), lambda: jax.tree.map(lambda leaf: leaf[origin], state), lambda: state)
            following = Population(
                state,
                {name: put(column, values_next[name]) for name, column in population.values.items()},
                put(population.run, run_next),
                put(population.age, jnp.where(fresh, 0, age[parent_next])),
                put(population.fresh, fresh),
                put(population.parent, jnp.where(fresh, -1, parent_next)),
            )
            record = {"run": run, "age": age, "score": score, "parent": parent, "next_run": decision.run, "values": values}
            return following, champion, decision.memory, record

        return step

    def _order(self, run, following):
        """The lanes at work before the idle ones, once they fit into a smaller size; else as they are."""
        before, after = jnp.sum(run >= 0), jnp.sum(following >= 0)
        fits = jnp.any(jnp.array([(after <= size) & (size < before) for size in self.sizes]))
        return jnp.where(fits, jnp.argsort(following < 0, stable=True), jnp.arange(run.size))

    def _advance_all(self, num_lanes):
        """One piece of all lanes, dealt out over the devices: `(values, fresh, active, state) -> (state, score)`."""
        batch, rounds = self._batches(num_lanes)

        def together(values, fresh, active, state):
            # Of all lanes vmapped together, so that these stay branches: nobody fresh, nothing drawn; all idle, nothing done.
            any_fresh, any_active = jnp.any(fresh), jnp.any(active)

            def train(values, fresh, state):
                trial = self._trial(values)

                def initialised():
                    return jax.tree.map(lambda new, old: jnp.where(fresh, new, old), trial.init(), state)

                return self._advance(trial, jax.lax.cond(any_fresh, initialised, lambda: state))

            def lane(values, fresh, state):
                return jax.lax.cond(any_active, train, lambda values, fresh, state: (state, jnp.full((), jnp.nan, float)), values, fresh, state)

            if batch == 1:
                return jax.tree.map(lambda leaf: leaf[None], lane(*jax.tree.map(lambda leaf: leaf[0], (values, fresh, state))))
            return jax.vmap(lane)(values, fresh, state)

        def on_one_device(*args):
            if rounds == 1:
                return together(*args)
            parts = jax.tree.map(lambda leaf: leaf.reshape(rounds, batch, *leaf.shape[1:]), args)
            out = jax.lax.map(lambda part: together(*part), parts)
            return jax.tree.map(lambda leaf: leaf.reshape(rounds * batch, *leaf.shape[2:]), out)

        spec = PartitionSpec("sweep")
        return jax.shard_map(on_one_device, mesh=self._mesh, in_specs=spec, out_specs=spec, axis_names={"sweep"}, check_vma=False)


def _challenge(champion, age, cost, state, places):
    """Whoever got furthest (the best of several) against the champion."""
    finite = jnp.isfinite(cost)
    furthest = jnp.max(jnp.where(finite, age, -1))
    best = jnp.argmin(jnp.where(finite & (age == furthest), cost, jnp.inf))
    better = finite[best] & ((age[best] > champion.age) | ((age[best] == champion.age) & (cost[best] < champion.cost)))
    place = jnp.asarray(places)[best]
    return Champion(
        jnp.where(better, age[best], champion.age),
        jnp.where(better, cost[best], champion.cost),
        jax.lax.cond(better, lambda: jax.tree.map(lambda leaf: leaf[place], state), lambda: champion.state),
    )


__all__ = ["AbstractRule", "Champion", "Decision", "Lanes", "Population", "Programs", "Trial", "fit_trial"]
