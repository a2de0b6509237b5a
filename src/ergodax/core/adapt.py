"""Adapters: a plain function, a Flax linen module or a Flax nnx module where a network `(t, x, args, *, key=None) -> array like x` is expected.

All three become one Module, `FromFunction`, whose weights are its leaves: `eqx.filter`, optax, `jax.vmap` over stacked weights and `fit` treat it as
any Equinox network. What runs is static and compared by value, so wrapping the same module a second time compiles nothing.

One example or a batch: inputs are handed on as they come. Dense layers, norms over the last axis and convolutions take one example without change,
and a module that takes batches may be called with one. A module that needs a batch axis (one that writes `t[:, None]`, say) becomes a network on ONE
example with `batched=True`: it then sees a batch of one, which `jax.vmap` merges again with the batch outside.

Dropout: `key=None` is evaluation, a `key` is training. Collections other than parameters (batch statistics) are read, never updated, and get a
gradient of zero; an optimiser that moves weights without a gradient, such as one with weight decay, must leave them out by a mask.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .check import require
from .types import PRNGKey, PyTree, Time


class FromFunction(eqx.Module):
    """`fn(params, t, x, args) -> array like x` as a network.

    - `fn`: static, so compared by identity: define it once, not as a new lambda at each construction, or every construction compiles anew.
    - `params`: any pytree; its inexact arrays are what trains.
    - `batched`: `fn` needs a leading batch axis on t, x and each leaf of `args`; it is added before, with length one, and removed after. Default
      False.
    - `uses_key`: `fn` also takes `key=`, which is None in evaluation. Default False: the key is dropped.

    Raises `ValueError` if `fn` cannot be static, and, when called, if the result has another shape than `x`.
    """

    fn: Callable = eqx.field(static=True)
    params: PyTree
    batched: bool = eqx.field(static=True, default=False)
    uses_key: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        try:
            hash(self.fn)
        except TypeError as error:
            raise ValueError(f"`fn` is static, so it must be hashable with all it holds (tuples for lists, no arrays): {error}") from error

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None, *, key: PRNGKey | None = None) -> Float[Array, "*x"]:
        """What `fn` returns, of the shape and dtype of `x`."""
        inputs = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (t, x, args)) if self.batched else (t, x, args)
        y = self.fn(self.params, *inputs, key=key) if self.uses_key else self.fn(self.params, *inputs)
        if y.shape != inputs[1].shape:
            raise ValueError(f"the wrapped network took `x` of shape {inputs[1].shape} and returned {y.shape}; does it need `batched=True`?")
        return (y[0] if self.batched else y).astype(x.dtype)


def in_order(apply: Callable, t: Time, x: Float[Array, "*x"], args: PyTree, key: PRNGKey | None) -> Float[Array, "*x"]:
    """`apply(t, x, args)`: the default `call` of `from_linen` and `from_nnx`."""
    return apply(t, x, args)


def from_linen(module: Any, variables: PyTree, *, call: Callable = in_order, batched: bool = False) -> FromFunction:
    """A `flax.linen.Module` and its variables as a network.

    - `variables`: what `module.init` returned, `{"params": …, …}`. The network's `params` are these; only the collection "params" trains.
    - `call`: `call(apply, t, x, args, key) -> array like x`, for a module that wants its arguments otherwise: say
      `lambda apply, t, x, args, key: apply(x, t, train=key is not None)`. `apply` is `module.apply` with the variables, and with `key` as the random
      stream "dropout". Static like `FromFunction.fn`: define it once.
    - `batched`: the module needs a batch axis; see `FromFunction`.

    Raises `ValueError` for another kind of module, for variables without "params", and for a module whose fields cannot be hashed; `ImportError`
    without Flax. Mutable collections are not updated: a module that insists on it raises Flax's own error.
    """
    linen = require("flax.linen", extra="flax")
    if not isinstance(module, linen.Module):
        raise ValueError(f"`module` must be a flax.linen.Module, got {type(module).__name__}.")
    if "params" not in variables:
        raise ValueError(f"`variables` must hold the collection 'params', as `module.init` returns it; got {sorted(variables)}.")
    return FromFunction(_Linen(module, call), dict(variables), batched=batched, uses_key=True)


def from_nnx(module: Any, *, call: Callable = in_order, batched: bool = False) -> FromFunction:
    """A `flax.nnx.Module` as a network. The module is split once and not changed afterwards.

    The network's `params` are a pair: the state of all `nnx.Param`, which trains, and the rest. After training,
    `nnx.update(module, network.params[0])` puts the weights back.

    - `call`: `call(apply, t, x, args, key) -> array like x`, `apply` being the module itself; as in `from_linen`.
    - `batched`: the module needs a batch axis; see `FromFunction`.

    Without a key all submodules run in evaluation. With one, dropout is on and the random streams "dropout" and "default" start from it; batch norm
    still reads its stored averages. Raises `ValueError` for another kind of module; `ImportError` without Flax.
    """
    nnx = require("flax.nnx", extra="flax")
    if not isinstance(module, nnx.Module):
        raise ValueError(f"`module` must be a flax.nnx.Module, got {type(module).__name__}.")
    graph, trained, rest = nnx.split(module, nnx.Param, ...)
    return FromFunction(_NNX(graph, call), (trained, rest), batched=batched, uses_key=True)


@dataclasses.dataclass(frozen=True)
class _Linen:
    module: Any
    call: Callable

    def __call__(self, variables, t, x, args, *, key):
        variables = {name: value if name == "params" else jax.lax.stop_gradient(value) for name, value in variables.items()}
        rngs = None if key is None else {"dropout": key}

        def apply(*inputs, **options):
            return self.module.apply(variables, *inputs, rngs=rngs, **options)

        return self.call(apply, t, x, args, key)


@dataclasses.dataclass(frozen=True)
class _NNX:
    graph: Any
    call: Callable

    def __call__(self, states, t, x, args, *, key):
        nnx = require("flax.nnx", extra="flax")
        trained, rest = states
        module = nnx.merge(self.graph, trained, jax.lax.stop_gradient(rest))
        module.eval()
        if key is not None:
            key_dropout, key_default = jax.random.split(key)
            module.set_attributes(deterministic=False, raise_if_not_found=False)
            nnx.reseed(module, dropout=key_dropout, default=key_default)
        return self.call(module, t, x, args, key)


__all__ = ["FromFunction", "from_linen", "from_nnx", "in_order"]
