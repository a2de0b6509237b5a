"""Networks that leave out some of their residual blocks: the engine of early exit and of searches over architectures.

It serves any network that keeps its blocks stacked in an attribute `blocks` (leaves of shape (depth, ...)), scans over them, and calls each as
`block(h, c, key=...) -> array like h`, as `ergodax.nn.TimeMLP` and `ergodax.nn.DiT` do.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..core.types import PRNGKey, PyTree


class SkippableBlock(eqx.Module):
    """`block`, or the identity where `keep` is false: a branch, taken at run time unless `keep` is batched by `vmap`."""

    block: PyTree
    keep: Bool[Array, "*lanes"]

    def __call__(self, h: Float[Array, "*h"], c: PyTree, *, key: PRNGKey | None = None) -> Float[Array, "*h"]:
        """The block on `h` with the conditioning `c`."""
        return jax.lax.cond(self.keep, lambda: self.block(h, c, key=key), lambda: h)


def keep_blocks(network: Any, keep: Bool[Array, " depth"]) -> Any:
    """`network` with only those blocks that `keep` names. Raises `ValueError` for a mask of another length or a network without stacked blocks."""
    depth = num_blocks(network)
    if jnp.shape(keep) != (depth,):
        raise ValueError(f"`keep` must have shape ({depth},), one entry per block, got {jnp.shape(keep)}.")
    return eqx.tree_at(lambda network: network.blocks, network, SkippableBlock(network.blocks, jnp.asarray(keep)))


def num_blocks(network: Any) -> int:
    """The depth of a network with stacked blocks. Raises `ValueError` for one without."""
    leaves = jax.tree.leaves(eqx.filter(getattr(network, "blocks", None), eqx.is_array))
    if not leaves:
        raise ValueError(f"a network with stacked `blocks` is needed, got {type(network).__name__}.")
    return leaves[0].shape[0]


__all__ = ["SkippableBlock", "keep_blocks", "num_blocks"]
