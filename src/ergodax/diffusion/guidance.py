"""Classifier-free guidance. Ho and Salimans 2022 (arXiv:2207.12598).

    D = D(x, ∅) + w (D(x, c) - D(x, ∅)).

All parametrisations are affine in D with the same coefficients for both terms, so guiding D is guiding the noise, the score or the velocity. w = 1
is the conditional model and w = 0 the unconditional one (their weight is w - 1)."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.types import PyTree, Scalar, Time, VectorField


class ClassifierFreeGuidance(eqx.Module):
    """A guided vector field `(t, x, args)` from a conditional one, `args` being the condition of ONE example (or of a batch, if the field takes one).

    - `field`: denoiser, score or velocity, called as `(t, x, args)`.
    - `guidance_scale`: w, a scalar that may be swept.
    - `null`: the condition that means "none", of the structure, shape and dtype of `args` up to broadcasting (default -1, as in `ergodax.nn`).
    """

    field: VectorField
    guidance_scale: Scalar
    null: PyTree = -1

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree) -> Float[Array, "*x"]:
        """The guided value, of the shape of `x`. Both evaluations are one batched call."""
        both = jax.tree.map(
            lambda c, n: jnp.stack([c, jnp.broadcast_to(jnp.asarray(n, c.dtype), c.shape)]), jax.tree.map(jnp.asarray, args), self.null
        )
        conditional, unconditional = jax.vmap(self.field, in_axes=(None, None, 0))(t, x, both)
        return unconditional + jnp.asarray(self.guidance_scale, x.dtype) * (conditional - unconditional)


__all__ = ["ClassifierFreeGuidance"]
