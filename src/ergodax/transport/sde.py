"""Diffusions with additive noise, dX = f(t, X) dt + √v(t) dW, as diffrax terms: interpolants, bridges and reference processes run on them."""

from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float

from ..core.check import check_range
from ..core.types import PRNGKey, Scalar, VectorField


def standard_deviation(variance: Float[Array, "..."]) -> Float[Array, "..."]:
    """√variance, and 0 with gradient 0 where the variance is not positive."""
    positive = variance > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)


def draw(key: PRNGKey, mean: Float[Array, "*x"], variance: Float[Array, ""]) -> Float[Array, "*x"]:
    """`mean` plus noise of one variance >= 0."""
    return mean + standard_deviation(variance).astype(mean.dtype) * jax.random.normal(key, mean.shape, mean.dtype)


class AdditiveNoise(eqx.Module):
    """√v(t) times the identity, with gradient 0 where v = 0."""

    variance: Scalar | Callable

    def __call__(self, t, x, args=None):
        """A diagonal operator of the size and dtype of `x`."""
        variance = jnp.asarray(self.variance(t) if callable(self.variance) else self.variance, x.dtype)
        return lx.DiagonalLinearOperator(jnp.full_like(x, standard_deviation(variance)))


def sde_terms(drift: VectorField, variance: Scalar | Callable, key: PRNGKey, y0: Float[Array, "*x"]) -> dfx.MultiTerm:
    """dX = drift dt + √variance dW: `integrate(sde_terms(drift, v, key, x0), diffrax.Euler(), x0, times=times)`.

    - `drift`: a field `(t, x, args) -> array like x`.
    - `variance`: v >= 0, the variance of the noise per unit of time, a number or `t -> v(t)`; may be traced. 0 is the flow of the drift.
    - `key`: fresh noise for each step; one key a trajectory (`vmap` over keys and y0 for a batch).
    - `y0`: the state at the start, for its shape and dtype.

    The noise does not depend on the state, so Itô and Stratonovich solvers agree: `diffrax.Euler` has weak order 1, `diffrax.Heun` 2. Raises
    `ValueError` for a negative number `variance`.
    """
    if not callable(variance):
        check_range("variance", variance, low=0.0)
    brownian = dfx.UnsafeBrownianPath(jax.ShapeDtypeStruct(y0.shape, y0.dtype), key)
    return dfx.MultiTerm(dfx.ODETerm(drift), dfx.ControlTerm(AdditiveNoise(variance), brownian))


__all__ = ["AdditiveNoise", "draw", "sde_terms", "standard_deviation"]
