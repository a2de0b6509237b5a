"""Interpolants x_t = I(t, x₀, x₁) + γ(t) z between draws of two arbitrary densities, x₀ at t = 0 and x₁ at t = 1, with latent noise z ~ N(0, I).

Albergo, Boffi, Vanden-Eijnden 2023 (arXiv:2303.08797), definition 1: I(0) = x₀, I(1) = x₁, γ(0) = γ(1) = 0 < γ between, z independent of the pair.
What I does and how much noise γ adds are separate choices here: every `Interpolant` holds a `Gamma`.

Names. The spatially linear interpolants are a(t) x₀ + b(t) x₁ + γ(t) z; the paper writes α, β for a, b. `ergodax.core.AffinePath` says α for the
share of the DATA and σ for that of the noise, so here a is called `source_share` and b `target_share`. The paper's one-sided interpolants have a
Gaussian x₀ in the place of z: a path is the case a = σ, b = α, γ = 0, `AffineInterpolant`; the general one is `OneSidedInterpolant`.
"""

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_range
from ..core.path import AffinePath
from ..core.types import Scalar, Time


def _derivative(function, t):
    t = jnp.asarray(t)
    return jax.jvp(function, (t,), (jnp.ones_like(t),))[1]


def _unchanged(t, x1):
    return x1


class Gamma(eqx.Module):
    """The socket for γ(t), the share of the latent noise. Broadcasts over `t` and keeps its dtype."""

    @abc.abstractmethod
    def __call__(self, t: Time) -> Float[Array, "..."]:
        """γ."""

    @abc.abstractmethod
    def square(self, t: Time) -> Float[Array, "..."]:
        """γ², in a form that is smooth where γ = 0."""

    def derivative(self, t: Time) -> Float[Array, "..."]:
        """dγ/dt; infinite at the ends where γ starts like √t."""
        return _derivative(self, t)

    def product(self, t: Time) -> Float[Array, "..."]:
        """γ dγ/dt = ½ dγ²/dt, finite at the ends too."""
        return _derivative(self.square, t) / 2


class BrownianBridgeGamma(Gamma):
    """γ = √(a t (1 - t)), the standard deviation of a Brownian bridge. `scale` is a (default 1)."""

    scale: Scalar = 1.0

    def __check_init__(self):
        check_range("scale", self.scale, low=0.0)

    def __call__(self, t):
        t = jnp.asarray(t)
        return jnp.sqrt(self.scale) * jnp.sqrt(t * (1 - t))

    def square(self, t):
        t = jnp.asarray(t)
        return jnp.asarray(self.scale * t * (1 - t))


class SineSquaredGamma(Gamma):
    """γ = c sin²(πt), flat at both ends. `scale` is c (default 1, the paper's)."""

    scale: Scalar = 1.0

    def __check_init__(self):
        check_range("scale", self.scale, low=0.0)

    def __call__(self, t):
        # sin(πt) = sin(π(1 - t)): the smaller angle is exact at t = 1
        t = jnp.asarray(t)
        return self.scale * jnp.sin(jnp.pi * jnp.minimum(t, 1 - t)) ** 2

    def square(self, t):
        return jnp.asarray(self(t) ** 2)


class ZeroGamma(Gamma):
    """γ = 0: no latent noise, as in flow matching. The score and the noise then cannot be learned, the velocity can."""

    def __call__(self, t):
        return jnp.zeros_like(jnp.asarray(t))

    def square(self, t):
        return jnp.zeros_like(jnp.asarray(t))


class Interpolant(eqx.Module):
    """The socket: I(t, x₀, x₁) and γ. All methods take one scalar `t` and one example (`vmap` for batches) and return an array like x."""

    gamma: eqx.AbstractVar[Gamma]

    @abc.abstractmethod
    def mean(self, t: Time, x0: Float[Array, "*x"], x1: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """I(t, x₀, x₁)."""

    def d_mean(self, t: Time, x0: Float[Array, "*x"], x1: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """∂I/∂t."""
        return _derivative(lambda t: self.mean(t, x0, x1), t)

    def interpolate(self, t: Time, x0: Float[Array, "*x"], x1: Float[Array, "*x"], z: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """x_t = I + γ z."""
        return self.mean(t, x0, x1) + self.gamma(t) * z

    def d_interpolate(self, t: Time, x0: Float[Array, "*x"], x1: Float[Array, "*x"], z: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """dx_t/dt = ∂I/∂t + dγ/dt z."""
        return self.d_mean(t, x0, x1) + self.gamma.derivative(t) * z


class SpatiallyLinearInterpolant(Interpolant):
    """I = a(t) x₀ + b(t) x₁: two clocks say it all."""

    @abc.abstractmethod
    def source_share(self, t: Time) -> Float[Array, "..."]:
        """a(t), from 1 to 0."""

    @abc.abstractmethod
    def target_share(self, t: Time) -> Float[Array, "..."]:
        """b(t), from 0 to 1."""

    def d_source_share(self, t: Time) -> Float[Array, "..."]:
        """da/dt."""
        return _derivative(self.source_share, t)

    def d_target_share(self, t: Time) -> Float[Array, "..."]:
        """db/dt."""
        return _derivative(self.target_share, t)

    def mean(self, t, x0, x1):
        return self.source_share(t) * x0 + self.target_share(t) * x1


class LinearInterpolant(SpatiallyLinearInterpolant):
    """a = 1 - t, b = t, and any γ (default the Brownian bridge's √(t(1 - t)))."""

    gamma: Gamma = BrownianBridgeGamma()

    def source_share(self, t):
        return 1 - jnp.asarray(t)

    def target_share(self, t):
        return jnp.asarray(t)


class TrigonometricInterpolant(SpatiallyLinearInterpolant):
    """a = cos(πt/2), b = sin(πt/2), and any γ (default √(t(1 - t))). Without noise it keeps the variance of uncorrelated pairs."""

    gamma: Gamma = BrownianBridgeGamma()

    def source_share(self, t):
        return jnp.sin(jnp.pi / 2 * (1 - jnp.asarray(t)))

    def target_share(self, t):
        return jnp.sin(jnp.pi / 2 * jnp.asarray(t))


class VariancePreservingInterpolant(SpatiallyLinearInterpolant):
    """a = √(1 - γ²) cos(πt/2), b = √(1 - γ²) sin(πt/2): a² + b² + γ² = 1 with the noise counted. Needs γ < 1 (default √(t(1 - t)))."""

    gamma: Gamma = BrownianBridgeGamma()

    def source_share(self, t):
        return jnp.sqrt(1 - self.gamma.square(t)) * jnp.sin(jnp.pi / 2 * (1 - jnp.asarray(t)))

    def target_share(self, t):
        return jnp.sqrt(1 - self.gamma.square(t)) * jnp.sin(jnp.pi / 2 * jnp.asarray(t))


class EncoderDecoderInterpolant(SpatiallyLinearInterpolant):
    """a = cos²(πt) before t = ½ and 0 after, b = 0 before and cos²(πt) after, γ = sin²(πt): x₀ is noised to N(0, I) at t = ½, then turned into x₁.

    Any γ with γ(½) > 0 may be given; the paper's (default) makes t = ½ standard normal.
    """

    gamma: Gamma = SineSquaredGamma()

    def source_share(self, t):
        t = jnp.asarray(t)
        return jnp.where(t < 0.5, jnp.cos(jnp.pi * t) ** 2, 0)

    def target_share(self, t):
        t = jnp.asarray(t)
        return jnp.where(t > 0.5, jnp.cos(jnp.pi * t) ** 2, 0)


class AffineInterpolant(SpatiallyLinearInterpolant):
    """An `AffinePath` as an interpolant: a = σ, b = α, γ = 0. With x₀ ~ N(0, I) its velocity is the path's probability flow.

    I(0) = x₀ holds exactly where σ(0) = 1 and α(0) = 0; other paths start where their prior does.
    """

    path: AffinePath  # pyrefly: ignore[bad-class-definition]  # an AbstractVar is no field
    gamma: Gamma = ZeroGamma()

    def source_share(self, t):
        return self.path.sigma(t)

    def target_share(self, t):
        return self.path.alpha(t)


class MirrorInterpolant(Interpolant):
    """x_t = K(t, x₁) + γ z with K(0) = K(1) = x₁: from a density back to itself, past noisier versions (the paper's mirror interpolant).

    Pairs are (x₁, x₁): x₀ is ignored. With K = x₁ (default) v = 0, so b = -γ γ' s: the score, or η, is all there is to learn. A diffusion with ε > 0
    turns one draw of the density into others, the farther the larger ε is.

    `data`: K, `(t, x₁) -> array like x₁`.
    """

    gamma: Gamma = BrownianBridgeGamma()
    data: Callable = _unchanged

    def mean(self, t, x0, x1):
        return self.data(t, x1)


__all__ = [
    "AffineInterpolant",
    "BrownianBridgeGamma",
    "EncoderDecoderInterpolant",
    "Gamma",
    "Interpolant",
    "LinearInterpolant",
    "MirrorInterpolant",
    "SineSquaredGamma",
    "SpatiallyLinearInterpolant",
    "TrigonometricInterpolant",
    "VariancePreservingInterpolant",
    "ZeroGamma",
]
