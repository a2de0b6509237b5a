"""One-sided interpolants: x_t = a(t) x₀ + J(t, x₁) with Gaussian x₀, which takes the part of the latent noise. Albergo, Boffi, Vanden-Eijnden 2023
(arXiv:2303.08797); the paper writes z for x₀ and α for a.

J(0) = 0 and J(1) = x₁, a(0) = 1 and a(1) = 0. Two conditional means, of the source and of the data, give every field:

    η₀(t, x) = E[x₀ | x_t = x],   s = ∇ log ρ = -η₀/a,
    spatially linear, J = b(t) x₁:   η₁(t, x) = E[x₁ | x_t = x] = (x - a η₀)/b,   velocity = a' η₀ + b' η₁ = b'/b x + (a² b'/b - a a') s.

At t = 0 these are known before any training: η₀ = x, s = -x, velocity = a' x + b' E[x₁]. With an `AffinePath`, the interpolant is
`AffineInterpolant(path)` and η₀ is DDPM's noise prediction, which `ergodax.core.Denoiser` turns into everything else; the classes here take any one.
They are trained by the losses of `stochastic_interpolants.py` and `SourceLoss`, on pairs (x₀, x₁) with x₀ ~ N(0, I), and sampled by its terms.
"""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.batch import given_pairs, uniform_times
from ..core.types import PyTree, Scalar, Time, VectorField
from .interpolants import AffineInterpolant, Gamma, Interpolant, SpatiallyLinearInterpolant, ZeroGamma
from .stochastic_interpolants import InterpolantLoss


class OneSidedInterpolant(Interpolant):
    """I = a(t) x₀ + J(t, x₁), γ = 0.

    - `share`: a, `t -> a(t)`, from 1 to 0.
    - `data`: J, `(t, x₁) -> array like x₁`, from 0 to x₁.
    """

    share: Callable  # pyrefly: ignore[bad-class-definition]  # an AbstractVar is no field
    data: Callable  # pyrefly: ignore[bad-class-definition]
    gamma: Gamma = ZeroGamma()

    def source_share(self, t: Time) -> Float[Array, "..."]:
        """a(t)."""
        return self.share(t)

    def mean(self, t, x0, x1):
        return self.source_share(t) * x0 + self.data(t, x1)


class SourceLoss(InterpolantLoss):
    """Learns η₀: target x₀, of unit variance at all times."""

    interpolant: Interpolant
    times: Callable = uniform_times
    coupling: Callable = given_pairs
    antithetic: bool = eqx.field(static=True, default=False)

    def target(self, t, x0, x1, z):
        return x0


class ScoreFromSource(eqx.Module):
    """s = -η₀/a as a vector field, and 0 where a = 0: there x_t says nothing of x₀, so η₀ = 0 says nothing of s."""

    source: VectorField
    interpolant: OneSidedInterpolant | AffineInterpolant

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """s at one scalar `t`, of the shape of `x`."""
        share = self.interpolant.source_share(t)
        return -self.source(t, x, args) / jnp.where(share > 0, share, jnp.inf)


class VelocityFromSource(eqx.Module):
    """The velocity a' η₀ + b' (x - a η₀)/b of a spatially linear interpolant as a vector field.

    - `source`: η₀.
    - `interpolant`: with b > 0 for t > 0.
    - `target_mean`: E[x₁], a number or an array that broadcasts with x (default 0). It is all that counts at t = 0, where b = 0 and η₀ says nothing.
    """

    source: VectorField
    interpolant: SpatiallyLinearInterpolant
    target_mean: Scalar | Float[Array, "..."] = 0.0

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """The velocity at one scalar `t`, of the shape of `x`."""
        interpolant, source = self.interpolant, self.source(t, x, args)
        share = interpolant.target_share(t)
        inner = (x - interpolant.source_share(t) * source) / jnp.where(share > 0, share, 1)
        target = jnp.where(share > 0, inner, jnp.asarray(self.target_mean, x.dtype))
        return interpolant.d_source_share(t) * source + interpolant.d_target_share(t) * target


__all__ = ["OneSidedInterpolant", "ScoreFromSource", "SourceLoss", "VelocityFromSource"]
