"""Invertible maps with log-Jacobians, and the densities that they carry: the engine of the room's normalising flows.

A `Bijection` T works on ONE example; `forward` gives T(x) and log |det ∂T/∂x|, `inverse` gives T⁻¹(y) and log |det ∂T⁻¹/∂y| (the negative of the
former at x = T⁻¹(y)). Of x = T(z) with z ~ p₀ the log-density is

    log p(x) = log p₀(T⁻¹(x)) + log |det ∂T⁻¹/∂x|.

Coupling layers: Dinh, Sohl-Dickstein, Bengio 2017 (RealNVP, arXiv:1605.08803), with any one-dimensional bijection in the place of their affine one.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core.check import check_count, check_range
from ..core.likelihood import standard_normal_log_prob
from ..core.types import PRNGKey, PyTree, Scalar


class Bijection(eqx.Module):
    """The socket: an invertible map of one example, an array or a pytree of arrays, with the logarithm of its Jacobian determinant, a scalar."""

    @abc.abstractmethod
    def forward(self, x: PyTree) -> tuple[PyTree, Float[Array, ""]]:
        """(T(x), log |det ∂T/∂x|)."""

    @abc.abstractmethod
    def inverse(self, y: PyTree) -> tuple[PyTree, Float[Array, ""]]:
        """(T⁻¹(y), log |det ∂T⁻¹/∂y|)."""


class Chain(Bijection):
    """T = T_n ∘ … ∘ T_1: `forward` applies `layers` (one or more) in the order in which they are given."""

    layers: tuple[Bijection, ...]

    def __check_init__(self):
        check_count("the number of layers", len(self.layers))

    def forward(self, x):
        x, total = self.layers[0].forward(x)
        for layer in self.layers[1:]:
            x, log_det = layer.forward(x)
            total = total + log_det
        return x, total

    def inverse(self, y):
        y, total = self.layers[-1].inverse(y)
        for layer in self.layers[-2::-1]:
            y, log_det = layer.inverse(y)
            total = total + log_det
        return y, total


class Inverted(Bijection):
    """T⁻¹ as a bijection."""

    bijection: Bijection

    def forward(self, x):
        return self.bijection.inverse(x)

    def inverse(self, y):
        return self.bijection.forward(y)


class Affine(Bijection):
    """y = e^`log_scale` x + `shift`, elementwise; both are scalars or of the shape of x."""

    log_scale: Float[Array, "..."]
    shift: Float[Array, "..."]

    def forward(self, x):
        log_scale = jnp.broadcast_to(jnp.asarray(self.log_scale, x.dtype), x.shape)
        return jnp.exp(log_scale) * x + jnp.asarray(self.shift, x.dtype), jnp.sum(log_scale)

    def inverse(self, y):
        log_scale = jnp.broadcast_to(jnp.asarray(self.log_scale, y.dtype), y.shape)
        return jnp.exp(-log_scale) * (y - jnp.asarray(self.shift, y.dtype)), -jnp.sum(log_scale)


class AffineTransformer(eqx.Module):
    """Two raw numbers -> `Affine`, with log scale = bound · tanh(raw/bound), so that no layer stretches by more than e^`bound` (default 2)."""

    bound: Scalar = 2.0

    def __check_init__(self):
        check_range("bound", self.bound, low=0.0, open_low=True)

    def __call__(self, parameters: Float[Array, " 2"]) -> Affine:
        """The map of one coordinate."""
        bound = jnp.asarray(self.bound, parameters.dtype)
        return Affine(bound * jnp.tanh(parameters[0] / bound), parameters[1])


_AFFINE = AffineTransformer()


class Coupling(Bijection):
    """The coordinates `kept` stay; each of the others goes through a one-dimensional bijection whose parameters depend on those kept. x is (d,).

    - `conditioner`: kept (k,) -> ((d - k) p,), the parameters of the coordinates that move, one after the other; such as
      `eqx.nn.MLP(k, (d - k) * p, width, depth, key=key)`. All zero is the identity of affine ones.
    - `kept`: the indices that stay (static), for instance `range(0, d, 2)` in one layer and `range(1, d, 2)` in the next.
    - `transformer`: (p,) -> `Bijection` on a scalar. Default `AffineTransformer()`, p = 2: RealNVP.
    """

    conditioner: Callable
    kept: tuple[int, ...] = eqx.field(static=True, converter=tuple)
    transformer: Callable = _AFFINE

    def _apply(self, method: str, x: Float[Array, " d"]):
        kept = np.asarray(self.kept, int)
        if x.ndim != 1 or kept.size in (0, x.size) or len(set(self.kept)) != kept.size or kept.min() < 0 or kept.max() >= x.size:
            raise ValueError(f"`kept` must hold some, not all, of the indices of a vector, once each; got {self.kept} for shape {x.shape}.")
        moved = np.setdiff1d(np.arange(x.size), kept)
        parameters = self.conditioner(x[kept]).astype(x.dtype).reshape(moved.size, -1)
        values, log_dets = jax.vmap(lambda p, value: getattr(self.transformer(p), method)(value))(parameters, x[moved])
        return x.at[moved].set(values), jnp.sum(log_dets)

    def forward(self, x):
        return self._apply("forward", x)

    def inverse(self, y):
        return self._apply("inverse", y)


class StandardNormal(eqx.Module):
    """N(0, I) on arrays of `shape`, as a base density. Draws have `dtype` (static; default that of JAX)."""

    shape: tuple[int, ...] = eqx.field(static=True)
    dtype: Any = eqx.field(static=True, default=None)

    def sample(self, key: PRNGKey) -> Float[Array, "*x"]:
        """One draw."""
        return jax.random.normal(key, self.shape, jnp.result_type(float) if self.dtype is None else self.dtype)

    def log_prob(self, x: Float[Array, "*x"]) -> Float[Array, ""]:
        """log N(x; 0, I)."""
        return standard_normal_log_prob(x)


class StandardUniform(eqx.Module):
    """The uniform density on [0, 1]^`shape`, a cube or a torus, as a base density. `log_prob` does not look whether x lies there."""

    shape: tuple[int, ...] = eqx.field(static=True)
    dtype: Any = eqx.field(static=True, default=None)

    def sample(self, key: PRNGKey) -> Float[Array, "*x"]:
        """One draw."""
        return jax.random.uniform(key, self.shape, jnp.result_type(float) if self.dtype is None else self.dtype)

    def log_prob(self, x: Float[Array, "*x"]) -> Float[Array, ""]:
        """0."""
        return jnp.sum(jnp.zeros_like(x))


class Flow(eqx.Module):
    """The law of T(z), z ~ `base`, for one example; `vmap` over keys or points for many.

    `base` is any object with `sample(key) -> z` and `log_prob(z) -> scalar`: `StandardNormal`, `StandardUniform`, or a density of `ergodax.data`.
    """

    bijection: Bijection
    base: Any

    def sample(self, key: PRNGKey) -> PyTree:
        """One draw."""
        return self.bijection.forward(self.base.sample(key))[0]

    def sample_and_log_prob(self, key: PRNGKey) -> tuple[PyTree, Float[Array, ""]]:
        """One draw and its log-density, without an inversion."""
        z = self.base.sample(key)
        x, log_det = self.bijection.forward(z)
        return x, self.base.log_prob(z) - log_det

    def log_prob(self, x: PyTree) -> Float[Array, ""]:
        """log p(x)."""
        z, log_det = self.bijection.inverse(x)
        return self.base.log_prob(z) + log_det


__all__ = ["Affine", "AffineTransformer", "Bijection", "Chain", "Coupling", "Flow", "Inverted", "StandardNormal", "StandardUniform"]
