"""Feature inheritance: deep features are computed at key steps and reused between them. Zhu, Wang, Pan, Wan, Zhang, Huang 2024 (arXiv:2406.00210).

A block, layer or unit of a network is a residual branch, h ← h + r(h). At a *key* step branches are computed and what they add is kept; at an
*inheriting* step a chosen branch is not computed, and what it added at the last key step is added instead,

    h ← h + r(h_key),

while everything else, the path round it included, is evaluated on the present state. With N steps and a key step every m of them the chosen
branches are computed ⌈N/m⌉ times, and the error against the plain sampler is of order 1 in the step, proportional to m - 1. Which steps are key
steps is a mask over the steps (the paper's sampling modes):

    network = BlockStack(embed, blocks, head, inherited)
    term = DenoiserTerm(Denoiser(network, path, prediction), path, grid)
    x1 = integrate(term, FeatureInheritance(DPMSolverPP2M(), network, key_steps(num_steps, 2)), x0)

The paper's other strategies need training; two of them are here as what they add to a network, `ConditionalConv` (multi-expert convolution, after
CondConv: Yang, Bender, Le, Ngiam 2019, arXiv:1904.04971) and `SwitchedNetwork` (networks of two sizes, one for the early steps and one for the late).
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ..core.check import check_count
from ..core.term import DenoiserTerm
from ..core.types import PRNGKey, PyTree, Scalar, Time, VectorField
from .wrapped_solver import WrappedSolver


class Inherited(NamedTuple):
    """`args` of an inheriting step: those of the caller, and the features of the last key step."""

    args: PyTree
    features: PyTree


class InheritingNetwork(eqx.Module):
    """The socket for a network in two parts: what its chosen branches add, and its output when that is given.

    Called as `(t, x, args)` it is the whole network; with `Inherited(args, features)` for `args`, the second part alone.
    """

    @abc.abstractmethod
    def features(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> PyTree:
        """What the chosen branches add, computed."""

    @abc.abstractmethod
    def inherit(self, t: Time, x: Float[Array, "*x"], args: PyTree, features: PyTree) -> Float[Array, "*x"]:
        """The output with `features` in the place of the chosen branches."""

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """The output, of the shape of `x`."""
        inherited = args if isinstance(args, Inherited) else Inherited(args, self.features(t, x, args))
        return self.inherit(t, x, *inherited)


class BlockStack(InheritingNetwork):
    """A stack of residual blocks, some of which are inherited.

    - `embed`: `(t, x, args) -> (h, c)`; `head`: `(t, x, h, c) -> output`.
    - `blocks`: leaves of shape (depth, ...), each called as `block(h, c) -> array like h`.
    - `inherited`: (depth,), the blocks that inheriting steps leave out. All of them is the paper's coarsest choice.
    """

    embed: Callable
    blocks: PyTree
    head: Callable
    inherited: Bool[Array, " depth"] | Bool[np.ndarray, " depth"]

    def features(self, t, x, args=None):
        """What each block adds, (depth, *h)."""
        h, c = self.embed(t, x, args)

        def layer(h, block):
            following = block(h, c)
            return following, following - h

        return jax.lax.scan(layer, h, self.blocks)[1]

    def inherit(self, t, x, args, features):
        h, c = self.embed(t, x, args)

        def layer(h, xs):
            block, inherited, added = xs
            return jax.lax.cond(inherited, lambda: h + added, lambda: block(h, c)), None

        h = jax.lax.scan(layer, h, (self.blocks, jnp.asarray(self.inherited), features))[0]
        return self.head(t, x, h, c)


def key_steps(num_steps: int, interval: int, dense_start: int = 0, dense_end: int = 0) -> Bool[np.ndarray, " steps"]:
    """A mask of key steps: every `interval`-th from the first, all of the first `dense_start`, and all of the last `dense_end`."""
    for name, count, low in (("num_steps", num_steps, 1), ("interval", interval, 1), ("dense_start", dense_start, 0), ("dense_end", dense_end, 0)):
        check_count(name, count, low=low)
    index = np.arange(num_steps)
    return (index % interval == 0) | (index < dense_start) | (index >= num_steps - dense_end)


class FeatureInheritance(WrappedSolver):
    """`solver` with the features of the last key step, on a `DenoiserTerm` that calls `network`, in whatever parametrisation.

    - `solver`: any; all its network calls within a step use the same features.
    - `network`: the `InheritingNetwork` that the term's `denoised` calls with its `args`, as `ergodax.core.Denoiser` does.
    - `key_steps`: (N,) for N steps, may be traced; the first step is a key step whatever it says.

    State: the features, and that of `solver`. At a key step the network's other parts are evaluated twice, once on the way to the features and once
    by `solver`. Raises `ValueError` for a mask of another length.
    """

    solver: dfx.AbstractSolver  # pyrefly: ignore[bad-override]
    network: InheritingNetwork
    key_steps: Bool[Array, " steps"] | Bool[np.ndarray, " steps"]

    def init(self, terms, t0, t1, y0, args):
        """The features of the start."""
        model, *_ = self.parts(terms)
        if isinstance(model, DenoiserTerm) and len(self.key_steps) != model.num_steps:
            raise ValueError(f"`key_steps` must have one entry for each of {model.num_steps} steps, got {len(self.key_steps)}.")
        features = self._features(model, t0, y0, args)
        return features, self.solver.init(terms, t0, t1, y0, Inherited(args, features))

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step of `solver` from index `t0` to `t1`."""
        kept, state = solver_state
        model, *_ = self.parts(terms)
        index = jnp.asarray(t0).astype(int)
        # Those of the first step came with the state.
        fresh = jnp.asarray(self.key_steps)[index] & (index > 0)
        features = jax.lax.cond(fresh, lambda: self._features(model, t0, y0, args), lambda: kept)
        y1, error, dense, state, result = self.solver.step(terms, t0, t1, y0, Inherited(args, features), state, made_jump)
        return y1, error, dense, (features, state), result

    def _features(self, model, s, y, args):
        return self.network.features(model.contr(s, s).t0.astype(y.dtype), y, args)


class ConditionalConv(eqx.Module):
    """A convolution whose kernel is mixed for each image from E experts: W = Σ_e a_e W_e, a = routing(V mean(x) + v). One convolution is run.

    - `(height, width, in) -> (height, width, out)`, padding `SAME`; the bias is mixed likewise.
    - `routing`: of the E logits; default `jax.nn.softmax`, with which equal experts are an ordinary convolution. CondConv's own is the sigmoid.

    Routing starts at 0 (all experts alike), kernels are Xavier-uniform. Raises `ValueError` for counts below 1.
    """

    kernels: Float[Array, "experts rows columns in_channels out_channels"]
    biases: Float[Array, "experts out_channels"]
    route: Float[Array, "in_channels experts"]
    route_bias: Float[Array, " experts"]
    routing: Callable = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_experts: int = 4,
        kernel_size: int = 3,
        *,
        routing: Callable = jax.nn.softmax,
        key: PRNGKey,
        dtype=None,
    ):
        counts = (("in_channels", in_channels), ("out_channels", out_channels), ("num_experts", num_experts), ("kernel_size", kernel_size))
        for name, count in counts:
            check_count(name, count)
        dtype = jnp.result_type(float) if dtype is None else dtype
        limit = (6 / (kernel_size**2 * (in_channels + out_channels))) ** 0.5
        flat = jax.random.uniform(key, (num_experts * kernel_size**2 * in_channels * out_channels,), dtype, -limit, limit)
        self.kernels = flat.reshape(num_experts, kernel_size, kernel_size, in_channels, out_channels)
        self.biases = jnp.zeros((num_experts, out_channels), dtype)
        self.route = jnp.zeros((in_channels, num_experts), dtype)
        self.route_bias = jnp.zeros((num_experts,), dtype)
        self.routing = routing

    def __call__(self, x: Float[Array, "height width in_channels"], *, key: PRNGKey | None = None) -> Float[Array, "height width out_channels"]:
        """The convolution of one image."""
        share = self.routing(jnp.mean(x, axis=(0, 1)) @ self.route + self.route_bias)
        kernel = jnp.tensordot(share, self.kernels, 1)
        out = jax.lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))[0]
        return out + share @ self.biases


class SwitchedNetwork(eqx.Module):
    """`early(t, x, args)` before `switch_time`, `late(t, x, args)` from it on. Only one of them runs, unless `t` is batched by `vmap`."""

    early: VectorField
    late: VectorField
    switch_time: Scalar

    def __call__(self, t: Time, x: Float[Array, "*x"], args: Any = None) -> Float[Array, "*x"]:
        """The output at one scalar `t`, of the shape of `x`."""
        t = jnp.asarray(t, x.dtype)
        return jax.lax.cond(t < jnp.asarray(self.switch_time, x.dtype), lambda: self.early(t, x, args), lambda: self.late(t, x, args))


__all__ = ["BlockStack", "ConditionalConv", "FeatureInheritance", "Inherited", "InheritingNetwork", "SwitchedNetwork", "key_steps"]
