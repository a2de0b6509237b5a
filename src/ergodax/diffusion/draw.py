"""What a denoising objective draws for a batch, once for all of them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.batch import given_pairs, stratified_times
from ..core.types import PRNGKey, PyTree, Scalar


class Draw(NamedTuple):
    """Everything random in the loss of a batch, along one leading axis."""

    times: Float[Array, " n"]
    data: Float[Array, "n *x"]
    noise: Float[Array, "n *x"]
    args: PyTree  # with dropped labels replaced; `None` without args


def draw(
    batch: PyTree,
    key: PRNGKey,
    times: Callable = stratified_times,
    coupling: Callable = given_pairs,
    label_dropout: Scalar = 0.0,
    null: PyTree = -1,
) -> Draw:
    """The draws of a batch, by plugs as in `DenoisingLoss`: with its plugs, the very draws that it makes of this batch and key.

    `batch`: data of shape (B, *x), or a pair (data, args). Raises `ValueError` for data without a batch axis.
    """
    data, args = batch if isinstance(batch, tuple) else (batch, None)
    if data.ndim < 2:
        raise ValueError(f"the data of a batch must have shape (batch, *example), got {data.shape}.")
    n = data.shape[0]
    key_noise, key_coupling, key_time, key_drop = jax.random.split(key, 4)
    # Drawn flat: XLA compiles draws of several axes many times slower.
    noise = jax.random.normal(key_noise, (data.size,), data.dtype).reshape(data.shape)
    noise = coupling(key_coupling, data, noise, args)
    dropped = jax.random.uniform(key_drop, (n,)) < label_dropout

    def keep(value, null):
        return jnp.where(dropped.reshape(-1, *[1] * (value.ndim - 1)), jnp.asarray(null, value.dtype), value)

    return Draw(times(key_time, n).astype(data.dtype), data, noise, None if args is None else jax.tree.map(keep, args, null))


__all__ = ["Draw", "draw"]
