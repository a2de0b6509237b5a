"""Stochastic interpolants with data-dependent couplings. Albergo, Goldstein, Boffi, Ranganath, Vanden-Eijnden 2024 (arXiv:2310.03725).

The source is made from the target, x₀ ~ ρ(x₀ | x₁, ξ), with ξ what sampling may know: the mask of an image and its visible part, a low resolution.
With x_t = a(t) x₀ + b(t) x₁ + γ(t) z of any `Interpolant`,

    b(t, x, ξ) = E[dx_t/dt | x_t = x, ξ]   minimises   ∫ E[½|b(t, x_t, ξ)|² - dx_t/dt · b(t, x_t, ξ)] dt,

and dX = b(t, X, ξ) dt carries ρ(x₀ | ξ) to ρ(x₁ | ξ): the flow samples the conditional law from the corrupted data itself. x₀ must be one that can be
drawn at sampling time from what is known. Straight paths have ∫ E|b|² dt <= E|x₁ - x₀|², which is small if x₀ looks like x₁.

    in-painting       ξ = m, a mask,   x₀ = m x₁ + (1 - m) ζ      `Inpainting`
    super-resolution  ξ = U(D(x₁)),    x₀ = ξ + σ ζ               `Degradation(Pooled(k), σ)`

ζ ~ N(0, I), D average pooling, U nearest-neighbour upsampling; σ > 0 gives ρ(x₀ | ξ) a density where D(x₁) alone leaves one point. What is visible
stays where it is on straight paths without noise, so b is set to 0 there (`MaskedVelocity`).

A corruption is a plug on ONE example, `(key, x₁, args) -> (x₀, (ξ, args))`; `CoupledLoss` draws from it and trains any loss of
`stochastic_interpolants`. The paper's images and networks are left to the user.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_count, check_range
from ..core.types import PRNGKey, PyTree, Scalar, Time, VectorField
from .stochastic_interpolants import InterpolantLoss


class TileMask(eqx.Module):
    """A random mask for images (..., H, W): 1 visible, 0 hidden, the same for all channels; the paper's kind.

    - `tiles` (static): the image is cut in `tiles` × `tiles` tiles of equal size (default 8).
    - `hidden`: the probability of a tile to be hidden, each for itself (default 0.3); may be swept.
    """

    tiles: int = eqx.field(static=True, default=8)
    hidden: Scalar = 0.3

    def __check_init__(self):
        check_count("tiles", self.tiles)
        check_range("hidden", self.hidden, low=0.0, high=1.0)

    def __call__(self, key: PRNGKey, x1: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """A mask of the shape and dtype of `x1`. Raises `ValueError` unless `tiles` divides both sides."""
        if x1.ndim < 2 or x1.shape[-1] % self.tiles or x1.shape[-2] % self.tiles:
            raise ValueError(f"an image (..., H, W) is to be cut in {self.tiles} x {self.tiles} equal tiles, got shape {x1.shape}.")
        visible = jax.random.uniform(key, (self.tiles, self.tiles), x1.dtype) >= jnp.asarray(self.hidden, x1.dtype)
        visible = jnp.repeat(jnp.repeat(visible, x1.shape[-2] // self.tiles, 0), x1.shape[-1] // self.tiles, 1)
        return jnp.broadcast_to(visible, x1.shape).astype(x1.dtype)


class Inpainting(eqx.Module):
    """x₀ = m x₁ + (1 - m) ζ and ξ = m, whose visible part x₀ shows.

    `mask`: `(key, x₁) -> m`, like x₁, 1 where visible and 0 elsewhere; default `TileMask()`.
    """

    mask: Callable = TileMask()

    def __call__(self, key: PRNGKey, x1: Float[Array, "*x"], args: PyTree = None) -> tuple[Float[Array, "*x"], tuple]:
        """(x₀, (m, args)) with a fresh mask."""
        key_mask, key_fill = jax.random.split(key)
        mask = self.mask(key_mask, x1)
        return self.fill(key_fill, x1, mask), (mask, args)

    def fill(self, key: PRNGKey, x1: Float[Array, "*x"], mask: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """x₀ for sampling, from a mask and what it shows; the rest of `x1` is not looked at and may be NaN."""
        return jnp.where(mask > 0, x1, jax.random.normal(key, x1.shape, x1.dtype))


class Pooled(eqx.Module):
    """U(D(x)) of an image (..., H, W): the mean of each block of `factor` × `factor` pixels in all of its pixels."""

    factor: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("factor", self.factor)

    def __call__(self, x: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """Of the shape of `x`. Raises `ValueError` unless `factor` divides both sides."""
        if x.ndim < 2 or x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise ValueError(f"`factor` {self.factor} must divide the sides of an image (..., H, W), got shape {x.shape}.")
        blocks = x.reshape(*x.shape[:-2], x.shape[-2] // self.factor, self.factor, x.shape[-1] // self.factor, self.factor)
        return jnp.broadcast_to(jnp.mean(blocks, axis=(-3, -1), keepdims=True), blocks.shape).reshape(x.shape)


class Degradation(eqx.Module):
    """x₀ = ξ + σ ζ with ξ = m(x₁): `Degradation(Pooled(4), sigma)` is super-resolution.

    - `degrade`: m, `x₁ -> array like x₁`.
    - `sigma`: σ >= 0, in units of x; may be swept.
    """

    degrade: Callable
    sigma: Scalar

    def __check_init__(self):
        check_range("sigma", self.sigma, low=0.0)

    def __call__(self, key: PRNGKey, x1: Float[Array, "*x"], args: PyTree = None) -> tuple[Float[Array, "*x"], tuple]:
        """(x₀, (ξ, args))."""
        known = self.degrade(x1)
        return self.diffuse(key, known), (known, args)

    def diffuse(self, key: PRNGKey, known: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """x₀ for sampling, from ξ."""
        return known + jnp.asarray(self.sigma, known.dtype) * jax.random.normal(key, known.shape, known.dtype)


class CoupledLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, aux)`: a loss of `stochastic_interpolants` on sources made from the targets.

    - `loss`: such as `VelocityLoss(LinearInterpolant(ZeroGamma()), antithetic=False)`, with its default coupling.
    - `corruption`: `(key, x₁, args) -> (x₀, (ξ, args))` on one example: `Inpainting`, `Degradation` or your own.
    - `batch`: x₁ of shape (B, *x), or (x₁, args) with `args` a pytree of leading axis B.
    - `model`: a network on one example, `(t, x, (ξ, args)) -> array like x`.
    """

    loss: InterpolantLoss
    corruption: Callable

    def __call__(self, model: VectorField, batch: Array | tuple, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        x1, args = batch if isinstance(batch, tuple) else (batch, None)
        key_corruption, key_loss = jax.random.split(key)
        x0, args = jax.vmap(self.corruption)(jax.random.split(key_corruption, x1.shape[0]), x1, args)
        return self.loss(model, (x0, x1, args), key_loss)


class MaskedVelocity(eqx.Module):
    """A velocity that is 0 where the mask of `Inpainting` shows: visible coordinates stay as they are to the bit. Train and sample with it."""

    velocity: VectorField

    def __call__(self, t: Time, x: Float[Array, "*x"], args: tuple) -> Float[Array, "*x"]:
        """(1 - m) b(t, x, (m, args))."""
        return jnp.where(args[0] > 0, 0, self.velocity(t, x, args))


__all__ = ["CoupledLoss", "Degradation", "Inpainting", "MaskedVelocity", "Pooled", "TileMask"]
