"""Leaves of a pytree by name: what a checkpoint holds, independent of the containers' types."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def name_of(path: Any) -> str:
    """The place of a leaf, with dots."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def named(tree: Any) -> dict[str, Any]:
    """Every leaf by the name of its place, random keys as their data."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {name_of(path): jax.random.key_data(leaf) if is_key(leaf) else leaf for path, leaf in leaves}


def restored(like: Any, leaves: Mapping[str, Any]) -> Any:
    """The tree with the structure of `like` whose leaves have these names."""
    places, structure = jax.tree.flatten_with_path(like)
    return jax.tree.unflatten(structure, [_as_key(leaf, leaves[name_of(path)]) for path, leaf in places])


def is_key(leaf: Any) -> bool:
    """Whether it is a typed random key."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _as_key(like, leaf):
    if not is_key(like):
        return leaf
    like = like if isinstance(like, jax.Array) else jnp.empty((), like.dtype)  # a shape does not know its generator's name
    return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(like))


__all__ = ["is_key", "name_of", "named", "restored"]
