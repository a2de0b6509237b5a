"""How a model computes: in a narrower dtype, and with less memory. Wrappers that are called as the model is, for `Fit` or anything else."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .types import PyTree


def in_dtype(model: PyTree, dtype: Any) -> PyTree:
    """`model` with its floating arrays cast to `dtype`, and each callable module that has some (the outermost ones) in `InDtype`."""

    def one(module):
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(module) if _is_floating(leaf)}
        widest = max(dtypes, key=lambda dtype: jnp.finfo(dtype).bits, default=None)
        return module if widest is None else InDtype(_cast(module, dtype), dtype, widest)

    return _map_modules(one, model, lambda leaf: _cast(leaf, dtype))


class InDtype(eqx.Module):
    """A model that computes in `dtype` and is called as before.

    Floating arrays among its arguments are cast to `dtype`, scalars (times) keep their precision, and floating results come back in `out_dtype`. So
    call it on one example, under `jax.vmap`: of a batch, the times would be an array and lose theirs. Everything but the call is the model's own.
    """

    model: PyTree
    dtype: Any = eqx.field(static=True)
    out_dtype: Any = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        args, kwargs = jax.tree.map(lambda leaf: _cast(leaf, self.dtype) if _is_floating(leaf) and leaf.ndim else leaf, (args, kwargs))
        return jax.tree.map(lambda leaf: _cast(leaf, self.out_dtype), self.model(*args, **kwargs))

    def __getattr__(self, name):
        return _delegated(self, name)


def rematerialised(model: PyTree, policy: Callable) -> PyTree:
    """`model` with each of its parts under `jax.checkpoint` with `policy`: what the policy does not save is computed again in the backward pass.

    The parts are the callable modules directly below a callable module, such as those of an `eqx.nn.Sequential`, or the stacked blocks of an
    `ergodax.nn` network, of which then each one counts; a model without any is one part. It pays where parts are many and each has much inside.
    On CPU, XLA runs the second computations of layers in turn too early to save memory; those of scanned blocks it leaves in place.
    """

    def parts(module):
        whole = _map_modules(lambda part: Rematerialised(part, policy), module, lambda leaf: leaf, below=True)
        return whole if jax.tree.structure(whole) != jax.tree.structure(module) else Rematerialised(module, policy)

    return _map_modules(parts, model, lambda leaf: leaf)


class Rematerialised(eqx.Module):
    """A callable module under `jax.checkpoint`. Everything but the call is the module's own."""

    model: PyTree
    policy: Callable = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        return eqx.filter_checkpoint(self.model, policy=self.policy)(*args, **kwargs)

    def __getattr__(self, name):
        return _delegated(self, name)


def _delegated(wrapper, name):
    # Only for names that the wrapper lacks; while it is being built, it lacks its model.
    if name == "model" or name.startswith("__"):
        raise AttributeError(name)
    return getattr(wrapper.model, name)


def _map_modules(change, tree, otherwise, below=False):
    """`tree` with its outermost callable modules changed, those below itself if `below`; `otherwise` for all other leaves."""

    def is_module(node):
        return isinstance(node, eqx.Module) and callable(node) and not (below and node is tree)

    return jax.tree.map(lambda node: change(node) if is_module(node) else otherwise(node), tree, is_leaf=is_module)


def _is_floating(leaf):
    return isinstance(leaf, jax.Array | np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _cast(tree, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype) if _is_floating(leaf) else leaf, tree)


__all__ = ["InDtype", "Rematerialised", "in_dtype", "rematerialised"]
