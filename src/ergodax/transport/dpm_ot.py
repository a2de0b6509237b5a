"""DPM-OT: one optimal-transport map in the place of the early part of a reverse diffusion. Li, Li, Wang, Lei, Luo, Gu 2023 (arXiv:2307.11308).

Take n latents y_i with weights ν_i at an intermediate time t_M: what a slow sampler gives there, or simply noised data. The semi-discrete optimal
transport of a source μ, here N(0, I), to Σ ν_i δ(y_i) is the gradient of Brenier's potential, one cell to each latent:

    u(x) = max_i ⟨x, y_i⟩ + h_i,    T(x) = y_i for the i of the maximum,    W_i = {x: T(x) = y_i}.

The heights h minimise the convex energy E(h) = ∫ u dμ - Σ ν_i h_i, whose gradient is μ(W_i) - ν_i: counts of a Monte-Carlo sample, for Adam. When the
gradient's norm has not improved for `patience` steps, twice as many points are drawn and the rate shrinks, three times at most.

A new sample is T of fresh noise, then the rest of the reverse diffusion, 5 to 10 calls. T is discontinuous, so it jumps between the modes of the data
where a few long steps of a smooth flow leave points between them.

    latents = path.interpolate(t, data, noise)
    transport = fit_semi_discrete(key, latents, num_samples=...).transport
    x = transported_sample(key, transport, DenoiserTerm(denoised, path, grid), solver)      # grid[0] = t

The map can also be blended over neighbouring cells (`BlendedMap`), but not across a ridge of u, where the angle between the faces is wide.
Deviations: Adam has its usual bias correction; the cells are counted with draws of μ itself, where the published code has uniform ones on [0, 1]^d;
blends are plain means, and their angle is in radians, not relative to the batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ..core.check import check_count, check_range
from ..core.loop import integrate
from ..core.term import DenoiserTerm
from ..core.types import PRNGKey, PyTree, Scalar
from .samples import Samples


class SemiDiscreteMap(eqx.Module):
    """T: x -> y_i, i = argmax ⟨x, y_i⟩ + h_i, on one example (`vmap` for batches).

    - `points`: y, (n, *x); `heights`: h, (n,), of which only differences matter.

    Raises `ValueError` for numbers of them that differ.
    """

    points: Float[Array, "n *x"]
    heights: Float[Array, "..."]

    def __check_init__(self):
        if self.heights.shape != self.points.shape[:1]:
            raise ValueError(f"`heights` must have shape {self.points.shape[:1]}, one for each point, got {self.heights.shape}.")

    def planes(self, x: Float[Array, "*x"]) -> Float[Array, " n"]:
        """⟨x, y_i⟩ + h_i; their maximum is Brenier's potential."""
        return _planes(self.points, self.heights, x[None])[0]

    def cell(self, x: Float[Array, "*x"]) -> Int[Array, ""]:
        """i, the number of the cell that x lies in."""
        return jnp.argmax(self.planes(x))

    def __call__(self, x: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """T(x)."""
        return self.points[self.cell(x)]


class BlendedMap(eqx.Module):
    """The mean of x's best latents, without those across a ridge: their normals (y_i, -1) make less than `max_angle` with that of the best.

    - `transport`: a `SemiDiscreteMap`.
    - `num_neighbours` (static): how many of the highest planes are looked at; 1 is the map itself.
    - `max_angle`: in radians.
    """

    transport: SemiDiscreteMap
    num_neighbours: int = eqx.field(static=True)
    max_angle: Scalar

    def __check_init__(self):
        check_count("num_neighbours", self.num_neighbours)
        check_range("max_angle", self.max_angle, low=0.0)

    @property
    def points(self) -> Float[Array, "n *x"]:
        """The latents of `transport`."""
        return self.transport.points

    def __call__(self, x: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """The blended T(x)."""
        _, best = jax.lax.top_k(self.transport.planes(x), self.num_neighbours)
        near = self.transport.points[best]
        rows = near.reshape(len(near), -1)
        square = jnp.sum(rows**2, 1) + 1
        cosine = (rows @ rows[0] + 1) / jnp.sqrt(square * square[0])
        # the best itself always counts, whatever the rounding of its cosine
        same_face = (cosine > jnp.cos(jnp.asarray(self.max_angle, x.dtype))).at[0].set(True).astype(x.dtype)
        return jnp.tensordot(same_face / jnp.sum(same_face), near, 1)


class SemiDiscreteFit(NamedTuple):
    """What `fit_semi_discrete` found."""

    transport: SemiDiscreteMap
    masses: Float[Array, " n"]  # Monte-Carlo masses of the cells, to be compared with the weights
    num_steps: Int[Array, ""]
    num_doublings: Int[Array, ""]


class _State(NamedTuple):
    heights: Array
    adam: Any
    masses: Array
    rate: Array
    best: Array
    stalled: Array
    doublings: Array
    step: Array
    done: Array


def fit_semi_discrete(
    key: PRNGKey,
    points: Float[Array, "..."] | Samples,
    source: Callable = jax.random.normal,
    *,
    num_samples: int | None = None,
    batch_size: int = 1000,
    max_steps: int = 10_000,
    learning_rate: Scalar = 0.1,
    tolerance: Scalar = 8e-4,
    patience: int = 50,
    shrink: Scalar = 0.8,
    max_doublings: int = 3,
) -> SemiDiscreteFit:
    """The semi-discrete optimal transport of `source` to `points`, for the cost ½|x - y|². Defaults are the published code's.

    - `points`: y (n, *x), or `Samples` with weights ν.
    - `source`: `(key, shape, dtype) -> draws` of μ; default standard normal.
    - `num_samples`: draws of μ a step at first (default 10 n), rounded up to whole batches of `batch_size`; n times that many numbers are in memory.
    - `learning_rate`: of Adam, in units of h, that is of |x| |y|: the heights stay uncertain by about the last rate. Shrinks by `shrink`.
    - `tolerance`: stop where |μ(W) - ν| is below it and no cell is empty; else after `max_steps`.

    A pure function with a `while_loop` inside: jits, vmaps, but is not differentiable. Raises `ValueError` as `Samples` does, and for counts below 1.
    """
    points = points if isinstance(points, Samples) else Samples(points)
    y, n = points.points, points.points.shape[0]
    num_samples = 10 * n if num_samples is None else num_samples
    for name, count in (("num_samples", num_samples), ("batch_size", batch_size), ("max_steps", max_steps), ("patience", patience)):
        check_count(name, count)
    check_count("max_doublings", max_doublings, low=0)
    check_range("learning_rate", learning_rate, low=0.0, open_low=True)
    check_range("tolerance", tolerance, low=0.0)
    check_range("shrink", shrink, low=0.0, high=1.0, open_low=True)
    weights = jnp.full((n,), 1 / n, y.dtype) if points.weights is None else (points.weights / jnp.sum(points.weights)).astype(y.dtype)
    batch_size = min(batch_size, num_samples)
    adam = optax.scale_by_adam()

    def measure(key, heights, num_batches):
        """The share of fresh draws in each cell."""

        def add(i, counts):
            draws = source(jax.random.fold_in(key, i), (batch_size, *y.shape[1:]), y.dtype)
            return counts.at[jnp.argmax(_planes(y, heights, draws), axis=1)].add(1)

        return jax.lax.fori_loop(0, num_batches, add, jnp.zeros_like(heights)) / (num_batches * batch_size).astype(y.dtype)

    def step(state):
        num_batches = -(-num_samples // batch_size) * 2**state.doublings
        masses = measure(jax.random.fold_in(key, state.step), state.heights, num_batches)
        gradient = masses - weights
        norm = jnp.sqrt(jnp.sum(gradient**2))
        done = (norm < tolerance) & jnp.all((masses > 0) | (weights == 0))
        with jax.numpy_dtype_promotion("standard"):  # optax takes a float to the power of an integer count
            direction, moments = adam.update(gradient, state.adam)
        heights = state.heights - state.rate * direction
        stalled = jnp.where(norm < state.best, 0, state.stalled + 1)
        double = (stalled > patience) & (state.doublings < max_doublings)
        return _State(
            heights=jnp.where(done, state.heights, heights - jnp.mean(heights)),
            adam=moments,
            masses=masses,
            rate=jnp.where(double, state.rate * shrink, state.rate).astype(y.dtype),
            best=jnp.where(double, jnp.inf, jnp.minimum(norm, state.best)).astype(y.dtype),
            stalled=jnp.where(double, 0, stalled),
            doublings=state.doublings + double.astype(jnp.int32),
            step=state.step + 1,
            done=done,
        )

    # All parts are derived from the points, so that inside `shard_map` they vary over devices as these do.
    nothing = jnp.sum(jnp.zeros_like(y).reshape(n, -1), 1)
    zero, count = jnp.sum(nothing), jnp.sum(nothing).astype(jnp.int32)
    moments = jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), adam.init(nothing))
    rate = zero + jnp.asarray(learning_rate, y.dtype)
    start = _State(nothing, moments, nothing, rate, zero + jnp.inf, count, count, count, count > 0)
    end = jax.lax.while_loop(lambda state: ~state.done & (state.step < max_steps), step, start)
    return SemiDiscreteFit(SemiDiscreteMap(y, end.heights), end.masses, end.step, end.doublings)


def transported_sample(
    key: PRNGKey, transport: SemiDiscreteMap | BlendedMap, term: DenoiserTerm, solver: dfx.AbstractSolver, args: PyTree = None
) -> Float[Array, "*x"]:
    """One sample: T of a standard normal, then the steps of `term`, whose grid starts where the latents of `transport` belong.

    `solver`: any that runs on a `DenoiserTerm`, stochastic ones too. `vmap` over keys for more.
    """
    key_source, key_steps = jax.random.split(key)
    start = transport(jax.random.normal(key_source, transport.points.shape[1:], transport.points.dtype))
    return integrate(term, solver, start, args, key=key_steps)


def _planes(points, heights, x):
    """⟨x_b, y_i⟩ + h_i, (B, n)."""
    # Cells are told apart by small differences: not in TF32 or bfloat16.
    return jnp.dot(x.reshape(len(x), -1), points.reshape(len(points), -1).T, precision=jax.lax.Precision.HIGHEST) + heights


__all__ = ["BlendedMap", "SemiDiscreteFit", "SemiDiscreteMap", "fit_semi_discrete", "transported_sample"]
