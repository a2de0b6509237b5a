"""Warmup-Stable and Merge (WSM): keep the learning rate level and merge the last checkpoints, in place of a decay.

Tian, Wang, Zhao, Chen, Liu, Liu, Mao, Zhao, Zhang, Zhou 2025, "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM
Pre-training" (arXiv:2507.17634). Let θ_n, …, θ_{n+k} be checkpoints of a run at a constant rate and g_i = θ_{i-1} - θ_i what separates them. Then

    Σ_j c_j θ_{n+j} = θ_n - Σ_{i=1}^k w_i g_{n+i},    w_i = Σ_{j≥i} c_j,    Σ_j c_j = 1:

a merge replays the stored updates under a decay w that falls from at most 1 to c_k. The other way round, a wanted decay 1 ≥ w_1 ≥ … ≥ w_k ≥ 0 comes
from

    c_0 = 1 - w_1,    c_j = w_j - w_{j+1},    c_k = w_k.

The uniform mean is a linear decay, w_i = (k + 1 - i) / (k + 1). How long the window is (in tokens) matters more than how many checkpoints it holds.

What is replayed are gradients taken where the constant rate stood, so merging and decaying agree only while (steps in the window) · rate · curvature
is small. Beyond that they differ; on a noisy quadratic merging is then the better of the two.

A decay is a function of the fraction u = i / (k + 1) of the window that is done, with f(0) = 1: the cooldowns of `ergodax.schedules` fit. The inverse
square root of the classical schedule needs a time scale, which the paper leaves open: it is an argument here.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..core.check import check_count, check_range
from ..core.schedule import Cooldown, linear_cooldown
from ..core.types import PyTree, Scalar


def inverse_sqrt_decay(ratio: Scalar = 99.0) -> Cooldown:
    """f(u) = 1 / √(1 + ratio · u), the inverse square root of the time since the schedule began.

    - `ratio`: length of the window / time before it. The default 99 is ours; it ends at a tenth of the rate, which the last checkpoint then weighs
      in addition.

    Raises `ValueError` for a negative ratio.
    """
    check_range("ratio", ratio, low=0.0)

    def decay(fraction):
        return jax.lax.rsqrt(1 + jnp.asarray(ratio, fraction.dtype) * fraction)

    return decay


def merge_to_decay(coefficients: Float[Array, " n"]) -> Float[Array, " n-1"]:
    """w_1, …, w_k: the decay that a merge with these coefficients replays. Raises `ValueError` unless there are at least two."""
    _check_vector("coefficients", coefficients, 2)
    return jnp.cumsum(coefficients[:0:-1])[::-1]


def decay_to_merge(weights: Float[Array, " k"]) -> Float[Array, " k+1"]:
    """c_0, …, c_k: the merge that replays the decay w_1, …, w_k. They sum to 1, and are not negative if the decay falls within [0, 1]."""
    _check_vector("weights", weights, 1)
    return jnp.concatenate([1 - weights[:1], weights[:-1] - weights[1:], weights[-1:]])


def merge_coefficients(decay: Cooldown, num_checkpoints: int, count: Int[Array, ""] | int | None = None) -> Float[Array, " num_checkpoints"]:
    """c of `decay` for a window of checkpoints, oldest first.

    - `num_checkpoints`: k + 1.
    - `count`: how many there are so far, default all; may be traced. The others, which come after them, get 0.

    The dtype is the default float. Raises `ValueError` if `num_checkpoints` is not a positive integer or `count` is not in [1, `num_checkpoints`].
    """
    check_count("num_checkpoints", num_checkpoints)
    if count is None:
        count = num_checkpoints
    check_range("count", count, low=1, high=num_checkpoints)
    dtype = jnp.result_type(float)
    ends, count = jnp.arange(num_checkpoints + 1, dtype=dtype), jnp.asarray(count, dtype)
    inside = (ends > 0) & (ends < count)  # where f is asked, so that its derivative at 0 and 1 never matters
    weights = jnp.where(inside, decay(jnp.where(inside, ends / count, 0.5)), (ends < count).astype(dtype))
    return weights[:-1] - weights[1:]


def merge(checkpoints: Sequence[PyTree], coefficients: Float[Array, " n"]) -> PyTree:
    """Σ_j c_j θ_j, leaf by leaf.

    - `checkpoints`: pytrees of one structure, oldest first: Equinox Modules as they are, Flax parameters, anything.
    - `coefficients`: one for each; they should sum to 1.

    Floating-point and complex leaves keep their dtype and are summed in at least float32. All other leaves (None, functions, integers, keys) come
    from the last checkpoint. Raises `ValueError` if the numbers, structures or shapes do not fit together.
    """
    if not checkpoints or jnp.shape(coefficients) != (len(checkpoints),):
        raise ValueError(f"`coefficients` needs one entry for each of {len(checkpoints)} checkpoints (at least 1), got {jnp.shape(coefficients)}.")
    inexact = [eqx.filter(tree, eqx.is_inexact_array) for tree in checkpoints]
    described = [(jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]) for tree in inexact]
    for i, other in enumerate(described):
        if other != described[-1]:
            raise ValueError(f"checkpoint {i} does not fit to the last one: its arrays are {other}, expected {described[-1]}.")
    merged = jax.tree.map(lambda *leaves: _weighted_sum(jnp.stack(leaves), coefficients), *inexact)
    return eqx.combine(merged, checkpoints[-1])


def merge_stacked(checkpoints: PyTree, coefficients: Float[Array, " n"]) -> PyTree:
    """`merge` for checkpoints that are stacked along a new first axis of each array, oldest first, as `lax.scan` returns them."""
    arrays, other = eqx.partition(checkpoints, eqx.is_array)
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(arrays)}
    if sizes != {jnp.shape(coefficients)}:
        raise ValueError(f"`coefficients` needs one entry for each checkpoint, got shape {jnp.shape(coefficients)} for first axes {sorted(sizes)}.")
    return eqx.combine(jax.tree.map(lambda leaf: _weighted_sum(leaf, coefficients) if eqx.is_inexact_array(leaf) else leaf[-1], arrays), other)


class RingState(eqx.Module):
    """The last checkpoints, in a ring; all leaves are arrays.

    - `checkpoints`: the inexact arrays of the weights, each (num_checkpoints, *leaf); number i of all is at i mod num_checkpoints.
    - `count`: how many were stored in all.
    """

    checkpoints: PyTree
    count: Int[Array, ""]


class WSM(eqx.Module):
    """The last checkpoints of a run, kept on the device, and their merge.

    - `num_checkpoints`: k + 1, the size of the ring; its memory is that many copies of the weights.
    - `decay`: what the merge stands for, default linear (the uniform mean).

    Pure functions of a state that is a pytree of arrays: they go through `jit`, `scan`, `vmap` and a checkpoint. Raises `ValueError` if
    `num_checkpoints` is not a positive integer.
    """

    num_checkpoints: int = eqx.field(static=True)
    decay: Cooldown = linear_cooldown

    def __check_init__(self):
        check_count("num_checkpoints", self.num_checkpoints)

    def init(self, weights: PyTree) -> RingState:
        """An empty ring for weights like these; `update` stores them."""
        arrays = eqx.filter(weights, eqx.is_inexact_array)
        ring = jax.tree.map(lambda leaf: jnp.broadcast_to(jnp.zeros_like(leaf), (self.num_checkpoints, *leaf.shape)), arrays)
        return RingState(ring, jnp.zeros((), jnp.int32))

    def update(self, state: RingState, weights: PyTree, *, store: Bool[Array, ""] | bool = True) -> RingState:
        """The ring with one more checkpoint in place of the oldest; unchanged where `store` (may be traced: every how many steps) is False."""
        place = jnp.where(store, state.count % self.num_checkpoints, self.num_checkpoints)  # past the end nothing is written
        arrays = eqx.filter(weights, eqx.is_inexact_array)
        ring = jax.tree.map(lambda kept, leaf: kept.at[place].set(leaf.astype(kept.dtype), mode="drop"), state.checkpoints, arrays)
        return RingState(ring, state.count + jnp.asarray(store, jnp.int32))

    def merge(self, state: RingState, weights: PyTree) -> PyTree:
        """The merge of what is stored, in the structure of `weights`, which also gives the leaves that are not inexact arrays.

        Before the ring is full the decay is laid over the checkpoints that are there; before the first one the result is `weights`.
        """
        size = self.num_checkpoints
        held = jnp.minimum(state.count, size)
        coefficients = merge_coefficients(self.decay, size, jnp.maximum(held, 1))
        age = (jnp.arange(size, dtype=jnp.int32) - state.count + held) % size  # 0 for the oldest; from `held` on there is nothing
        arrays, other = eqx.partition(weights, eqx.is_inexact_array)

        def one(kept, leaf):
            return jnp.where(held > 0, _weighted_sum(kept, coefficients[age]), leaf)

        return eqx.combine(jax.tree.map(one, state.checkpoints, arrays), other)


def _weighted_sum(stacked: Array, coefficients: Array) -> Array:
    """Over the first axis, in at least float32."""
    wide = stacked.dtype if jnp.finfo(stacked.dtype).bits >= 32 else jnp.dtype(jnp.float32)
    shares = jnp.asarray(coefficients).astype(jnp.finfo(wide).dtype).astype(wide)
    return jnp.tensordot(shares, stacked.astype(wide), axes=1, precision=jax.lax.Precision.HIGHEST).astype(stacked.dtype)


def _check_vector(name: str, values: Any, low: int) -> None:
    if jnp.ndim(values) != 1 or jnp.size(values) < low:
        raise ValueError(f"`{name}` must be a vector of at least {low} entries, got shape {jnp.shape(values)}.")


__all__ = [
    "WSM",
    "RingState",
    "decay_to_merge",
    "inverse_sqrt_decay",
    "merge",
    "merge_coefficients",
    "merge_stacked",
    "merge_to_decay",
]
