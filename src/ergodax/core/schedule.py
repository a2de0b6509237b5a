"""What all schedules share: the shapes of cooldowns, the fraction of a stretch that is done, and the dtypes they count and answer in."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Real

from .check import is_concrete
from .types import Scalar


#: The shape of a cooldown: fraction done, in [0, 1] -> share of the rate that is left, with f(0) = 1.
Cooldown = Callable[[Float[Array, "..."]], Float[Array, "..."]]

#: A vector of steps or rates that a user may sweep: an array, or a sequence of numbers or traced scalars.
Vector = Real[Array, "..."] | Real[np.ndarray, "..."] | tuple | list


def progress(elapsed: Array, length: Array, without: Array | float) -> Array:
    """elapsed / length within [0, 1]; `without` where there is no such stretch."""
    fraction = jnp.clip(elapsed / jnp.where(length > 0, length, 1), 0, 1)
    # XLA may divide by a constant as a product with its reciprocal, which need not reach 1.
    return jnp.where(length > 0, jnp.where(elapsed >= length, 1, fraction), without)


def as_vector(values: Vector | Scalar) -> Array | np.ndarray:
    """`values` as an array whose shape can be read; in NumPy, where they are not traced, so that they can be checked."""
    return np.asarray(values) if is_concrete(values) else jnp.asarray(values)


def as_schedule(peak: Any, formula: Callable[..., Array], *numbers: Any) -> optax.Schedule:
    """The schedule step -> formula(step, *numbers), all of them converted to the dtype of `peak`, or float32 if that is narrower.

    The result has the dtype of `peak`; that of an integer or a Python number is the default float.
    """
    floating = jnp.issubdtype(jnp.result_type(peak), jnp.floating)
    dtype = jnp.result_type(peak) if floating else jnp.result_type(float)
    wide = dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)  # bfloat16 cannot count steps

    def schedule(step):
        return formula(*(jnp.asarray(x, wide) for x in (step, *numbers))).astype(dtype)

    return schedule


def linear_cooldown(fraction: Float[Array, "..."]) -> Float[Array, "..."]:
    """f(u) = 1 - u."""
    return 1 - fraction


def cosine_cooldown(fraction: Float[Array, "..."]) -> Float[Array, "..."]:
    """f(u) = (1 + cos πu) / 2, computed as sin²(π(1 - u)/2), which keeps its digits near the end."""
    return jnp.sin(jnp.pi / 2 * (1 - fraction)) ** 2


def sqrt_cooldown(fraction: Float[Array, "..."]) -> Float[Array, "..."]:
    """f(u) = 1 - √u. Hägele, Bakouch, Kosson, Ben Allal, von Werra, Jaggi 2024 (arXiv:2405.18392), who find it better than the linear one."""
    started = fraction > 0  # √ has no derivative at 0, where the whole stable stretch sits
    return 1 - jnp.where(started, jnp.sqrt(jnp.where(started, fraction, 1)), 0)


__all__ = ["Cooldown", "Vector", "as_schedule", "as_vector", "cosine_cooldown", "linear_cooldown", "progress", "sqrt_cooldown"]
