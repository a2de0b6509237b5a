"""Trajectories and their law from snapshots: multi-marginal Schrödinger bridges whose reference is refined in turn.

Given samples of a population at times t₀ < … < t_K and a family of references dX = b_θ(t, X) dt + √ε dW, both the process P with these marginals
and the parameters θ are sought that minimise KL(P | Q_θ), Q_θ started from the first snapshot. In turn, a round each:

    P ← the bridges relative to Q_θ between neighbouring snapshots, one after the other (Q_θ is Markov, so that this is the multi-marginal bridge),
    θ ← argmin E_P ∫ |b_P(t, X) - b_θ(t, X)|² dt / (2ε),                                     b_P the drift of P: the projection of P on the family.

Neither step makes KL(P | Q_θ) larger. Shen, Berlinghieri, Broderick 2024 (arXiv:2408.06277), who start from θ with b_θ = 0: the first round is then
the piecewise bridge of a Brownian reference. Deviations: drifts are regressed at each step of time by itself, on the deviation from the reference;
the projection compares drifts at the simulated states, instead of increments, which have the same means but noise on them; and it takes the
paths of each bridge from its own first snapshot, not continued over the others.
"""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from ..core.check import check_count
from ..core.types import PRNGKey, PyTree, Scalar, Time
from .bridge_solvers import Bridge, BridgeSolver, RegressionBridgeSolver, backward_paths, forward_paths
from .reference import ParametricReference
from .snapshots import Snapshots


def _normal_equations(reference, flat, unravel, t, x, drifts, weights):
    """(JᵀJ, Jᵀr, |r|²) of the weighted residuals r = drifts - b_θ, J the slopes of b_θ, at θ = `flat`."""

    def field(flat, t, x):
        return reference.family(unravel(flat), t, x)

    def at_time(total, parts):
        t, x, drifts, weight = parts
        slopes = jax.vmap(lambda x: jax.jacfwd(field)(flat, t, x))(x)
        rest = drifts - jax.vmap(lambda x: field(flat, t, x))(x)
        sums = jnp.einsum("nip,niq->pq", slopes, slopes), jnp.einsum("nip,ni->p", slopes, rest), jnp.sum(rest**2)
        return jax.tree.map(lambda total, part: total + weight * part, total, sums), None

    zero = jnp.zeros_like(flat)
    return jax.lax.scan(at_time, (jnp.outer(zero, zero), zero, jnp.sum(zero)), (t, x, drifts, weights))[0]


class LinearRefit(eqx.Module):
    """`refit(reference, t, x, drifts, weights) -> parameters`, the least of Σ weights |drifts - b_θ(t, x)|², for families affine in θ.

    - `t`, `weights`: (m,); `x`, `drifts`: (m, n, d).

    One Gauss-Newton step from the present θ, which is exact then. `ridge` (default 1e-12), times the trace of the normal equations, keeps what the
    data do not determine where it is.
    """

    ridge: Scalar = 1e-12

    def __call__(self, reference, t, x, drifts, weights):
        flat, unravel = ravel_pytree(reference.parameters)
        normal, right, _ = _normal_equations(reference, flat, unravel, t, x, drifts, weights)
        damping = jnp.asarray(self.ridge, flat.dtype) * jnp.trace(normal)
        return unravel(flat + jnp.linalg.solve(normal + damping * jnp.eye(len(flat), dtype=flat.dtype), right))


class LeastSquaresRefit(eqx.Module):
    """As `LinearRefit`, for any family: `num_steps` (static, default 10) steps of Levenberg and Marquardt from the present θ.

    The damping, relative to the trace of the normal equations, starts at 1, and is divided by 4 after a step that helps and multiplied by 4 after one
    that does not, which is not taken. (optimistix has more of such methods, but cannot run inside `shard_map`.)
    """

    num_steps: int = eqx.field(static=True, default=10)

    def __check_init__(self):
        check_count("num_steps", self.num_steps)

    def __call__(self, reference, t, x, drifts, weights):
        flat, unravel = ravel_pytree(reference.parameters)

        def equations(flat):
            return _normal_equations(reference, flat, unravel, t, x, drifts, weights)

        def step(state, _):
            flat, damping, (normal, right, cost) = state
            floor = damping * jnp.trace(normal) + jnp.finfo(flat.dtype).tiny
            new = flat + jnp.linalg.solve(normal + floor * jnp.eye(len(flat), dtype=flat.dtype), right)
            there = equations(new)
            better = there[2] < cost
            kept = jax.tree.map(lambda new, old: jnp.where(better, new, old), (new, there), (flat, (normal, right, cost)))
            return (kept[0], jnp.where(better, damping / 4, damping * 4), kept[1]), None

        state = flat, jnp.ones_like(flat[0]), equations(flat)
        return unravel(jax.lax.scan(step, state, None, length=self.num_steps)[0][0])


class SBIRR(eqx.Module):
    """What `fit_sbirr` gives back. As a vector field `(t, x, args)` it is the drift b_P of one state, constant within each step.

    - `reference`: the last one, with the refined parameters; `bridges` are relative to it.
    - `grid`: (K, S + 1), the times of the steps between snapshots.
    - `bridges`: a `Bridge` with leading axis K; `bridges.paths` (K, S + 1, n, d) are states at these times.
    - `parameters`: as in the reference, with a leading axis of R + 1: before the first round, and after each of R.
    - `kl`: (R + 1,), KL(P | Q_θ) in nats, of the bridges relative to each of these, by the drifts (Girsanov's formula).
    """

    reference: ParametricReference
    grid: Float[Array, "intervals boundaries"]
    bridges: Bridge
    parameters: PyTree
    kl: Float[Array, " rounds"]

    @property
    def times(self) -> Float[Array, " all"]:
        """The K S + 1 times of the whole grid."""
        return jnp.append(self.grid[:, :-1].ravel(), self.grid[-1, -1])

    def __call__(self, t: Time, x: Float[Array, " d"], args: PyTree = None) -> Float[Array, " d"]:
        """b_P at one t of [t₀, t_K]."""
        step = jnp.clip(jnp.searchsorted(self.times, t, side="right") - 1, 0, len(self.times) - 2)
        return self.reference(t, x) + jax.tree.map(lambda leaf: leaf[step], _in_one_row(self.bridges.forward))(x)

    def trajectories(self, key: PRNGKey, k: int, x: Float[Array, "n d"]) -> Float[Array, "all n d"]:
        """Whole trajectories, at all `times`, of states `x` at the time of snapshot number `k`: forwards from there, and backwards."""
        intervals, steps = self.grid.shape[0], self.grid.shape[1] - 1
        if not 0 <= k <= intervals:
            raise ValueError(f"`k` must be a snapshot's number, from 0 to {intervals}, got {k}.")
        here, (key_back, key_on) = k * steps, jax.random.split(key)
        parts = [x[None]]
        if k > 0:
            drifts = jax.tree.map(lambda leaf: leaf[:here], _in_one_row(self.bridges.backward))
            parts.insert(0, backward_paths(key_back, self.reference, drifts, self.times[: here + 1], x)[:-1])
        if k < intervals:
            drifts = jax.tree.map(lambda leaf: leaf[here:], _in_one_row(self.bridges.forward))
            parts.append(forward_paths(key_on, self.reference, drifts, self.times[here:], x)[0][1:])
        return jnp.concatenate(parts)


def _in_one_row(drifts):
    """(K, S, …) to (K S, …), also where arrays are empty."""
    return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]), drifts)


_SOLVER = RegressionBridgeSolver()
_REFIT = LeastSquaresRefit()


def fit_sbirr(
    key: PRNGKey,
    snapshots: Snapshots,
    reference: ParametricReference,
    *,
    rounds: int = 10,
    steps: int = 20,
    particles: int | None = None,
    solver: BridgeSolver = _SOLVER,
    refit: Callable = _REFIT,
) -> SBIRR:
    """Bridges through all snapshots, and the reference of the family that is nearest to them.

    - `snapshots`: times in the unit of the reference's.
    - `reference`: the family, ε and the parameters to start from.
    - `rounds` (R, static, default 10): refits. 0 leaves the reference as it is: the piecewise bridge.
    - `steps` (S, static, default 20): Euler steps between neighbouring snapshots.
    - `particles` (static): rows drawn of each snapshot in each round; None: as many as the largest has.
    - `solver`: a `BridgeSolver`; `GaussianBridgeSolver` needs no particles and has no noise, for what is near to Gaussian.
    - `refit`: `LeastSquaresRefit()` (default) or `LinearRefit()`.

    One program: `equinox.filter_jit`, `vmap` over keys, snapshots of one size, ε and start parameters. R + 1 times the solver on all intervals.
    """
    check_count("rounds", rounds, low=0)
    check_count("steps", steps)
    n = snapshots.points.shape[1] if particles is None else particles
    share = jnp.linspace(0, 1, steps + 1, dtype=snapshots.times.dtype)
    grid = snapshots.times[:-1, None] + share * jnp.diff(snapshots.times)[:, None]
    lengths = jnp.diff(grid).ravel()

    def with_parameters(parameters):
        return dataclasses.replace(reference, parameters=parameters)

    def solve(parameters, key):
        key_rows, key_solve = jax.random.split(key)
        x = snapshots.resample(key_rows, n)
        keys = jax.random.split(key_solve, len(grid))
        return jax.vmap(lambda *args: solver(args[0], with_parameters(parameters), *args[1:]))(keys, grid, x[:-1], x[1:])

    def compared(bridges):
        x = bridges.paths[:, :-1]
        return grid[:, :-1].ravel(), x.reshape(-1, *x.shape[2:]), bridges.drifts.reshape(-1, *x.shape[2:])

    def misfit(parameters, bridges):
        t, x, drifts = compared(bridges)
        values = jax.vmap(lambda t, rows: jax.vmap(lambda x: reference.family(parameters, t, x))(rows))(t, x)
        return jnp.sum(lengths * jnp.mean(jnp.sum((drifts - values) ** 2, axis=2), axis=1)) / (2 * jnp.asarray(reference.epsilon, x.dtype))

    def one(state, parts):
        (parameters, bridges), (number, key) = state, parts
        parameters = jax.lax.cond(number > 0, lambda: refit(with_parameters(parameters), *compared(bridges), lengths), lambda: parameters)
        bridges = solve(parameters, key)
        return (parameters, bridges), (parameters, misfit(parameters, bridges))

    parameters = jax.tree.map(jnp.asarray, reference.parameters)
    # Of the shape of what the first round gives, which is never looked at.
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(solve, parameters, key))
    (parameters, bridges), (history, kl) = jax.lax.scan(one, (parameters, empty), (jnp.arange(rounds + 1), jax.random.split(key, rounds + 1)))
    return SBIRR(with_parameters(parameters), grid, bridges, history, kl)


__all__ = ["SBIRR", "LeastSquaresRefit", "LinearRefit", "fit_sbirr"]
