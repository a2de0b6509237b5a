"""Scan drivers: `integrate` for diffrax solvers, `iterate` for `(init, step)` kernels. `save=` picks what is stored; by default nothing is."""

from collections.abc import Callable
from typing import Any, get_origin

import diffrax as dfx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .check import check_count, check_increasing
from .term import DenoiserTerm, with_noise
from .types import PRNGKey, PyTree


def integrate(
    terms: dfx.AbstractTerm,
    solver: dfx.AbstractSolver,
    y0: PyTree[Float[Array, "..."]],
    args: PyTree = None,
    *,
    times: Float[Array, " steps"] | None = None,
    key: PRNGKey | None = None,
    save: Callable[[Array, Array], Any] | None = None,
) -> Any:
    """Run a fixed-grid solve as a bare `lax.scan` over `solver.step`.

    The same solver objects run under `diffrax.diffeqsolve`, which adds adaptive steps, dense output and events; this driver compiles about four times
    faster, shards with `shard_map`, and costs nothing beside the model. Differentiable in both modes.

    - `terms`: a `DenoiserTerm` (integrated over its own grid), or any diffrax term with `times` given.
    - `y0`: the state at the start; for a `DenoiserTerm`, usually `path.prior(key, shape)`. One example or a batch.
    - `args`: passed to the model at every step.
    - `times`: step boundaries of shape (N + 1,), strictly increasing. Not for a `DenoiserTerm`, whose grid says it.
    - `key`: for a stochastic solver on a bare `DenoiserTerm`: adds the noise term (`with_noise`). Deterministic solvers ignore it, so that solvers
      can be exchanged.
    - `save`: `save(t, y)` after each step; its results come stacked along a new leading axis of length N. `t` is the step's end (`grid` time for a
      `DenoiserTerm`).

    Returns the final state, or `(final state, saved)` with `save`. Raises `ValueError` if `times` and the term do not go together.
    """
    model = terms.terms[0] if isinstance(terms, dfx.MultiTerm) else terms
    if isinstance(model, DenoiserTerm):
        if times is not None:
            raise ValueError("`times` does not go with a DenoiserTerm: its `grid` holds the times.")
        time, boundaries = model.time, jnp.arange(model.num_steps + 1, dtype=model.grid.dtype)
        if get_origin(solver.term_structure) is dfx.MultiTerm and terms is model:
            if key is None:
                raise ValueError(f"{type(solver).__name__} is stochastic: it needs `key`.")
            terms = with_noise(model, key, y0)
    else:
        if times is None:
            raise ValueError(f"`times` is needed to integrate a {type(model).__name__}; only a DenoiserTerm has its own grid.")
        if key is not None:
            raise ValueError("`key` goes with a DenoiserTerm; give other terms their own Brownian path.")
        check_increasing("times", times)
        time, boundaries = (lambda t: t), times

    def body(carry, interval):
        y, state = carry
        t0, t1 = interval
        y, _, _, state, _ = solver.step(terms, t0, t1, y, args, state, made_jump=False)
        return (y, state), None if save is None else save(time(t1), y)

    state = solver.init(terms, boundaries[0], boundaries[1], y0, args)
    (y, _), saved = jax.lax.scan(body, (y0, state), (boundaries[:-1], boundaries[1:]))
    return y if save is None else (y, saved)


def iterate(
    key: PRNGKey,
    step: Callable[[PRNGKey, Any], tuple[Any, Any]],
    state: Any,
    num_steps: int,
    *,
    save: Callable[[Any, Any], Any] | None = None,
    every: int = 1,
) -> Any:
    """Run a Markov kernel `step(rng_key, state) -> (state, info)` (blackjax's socket) `num_steps` times with a fresh key each.

    - `save`: `save(state, info)`, stored after every `every`-th step; its results come stacked, `num_steps // every` of them.
    - `every` must divide `num_steps`.

    Returns the final state, or `(final state, saved)` with `save`. Raises `ValueError` for counts that do not fit.
    """
    check_count("num_steps", num_steps)
    check_count("every", every)
    if num_steps % every:
        raise ValueError(f"`every` must divide `num_steps`, got {every} and {num_steps}.")

    def advance(state, k):
        return step(jax.random.fold_in(key, k), state)[0], None

    ks = jnp.arange(num_steps)
    if save is None:
        return jax.lax.scan(advance, state, ks)[0]

    def block(state, ks):
        if every > 1:
            state, _ = jax.lax.scan(advance, state, ks[:-1])
        state, info = step(jax.random.fold_in(key, ks[-1]), state)
        return state, save(state, info)

    return jax.lax.scan(block, state, ks.reshape(-1, every))


__all__ = ["integrate", "iterate"]
