"""Affine probability paths x_t = α_t x₁ + σ_t x₀ between a source x₀ ~ N(0, I) at t = 0 and the data x₁ at t = 1.

A path is the one place where a noise schedule lives. Everything else reads its clocks: `alpha`, `sigma`, their logarithms and derivatives, the
signal-to-noise ratio α²/σ². Papers that put the data at time 0 are translated: their time u is our 1 - t.

Each path gives four clocks in closed form (a logarithm of a rounded value would lose what the solvers need at the ends) and the inverse of its
log-SNR. A new path is one small class; see `FlowMatchingPath`.
"""

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .check import check_range
from .types import PRNGKey, Scalar, Time


def _derivative(clock, t: Time) -> Float[Array, "..."]:
    t = jnp.asarray(t)
    return jax.jvp(clock, (t,), (jnp.ones_like(t),))[1]


class AffinePath(eqx.Module):
    """The socket for a noise schedule: x_t = α_t x₁ + σ_t x₀. All clocks broadcast over `t`, keep its dtype and are differentiable."""

    @abc.abstractmethod
    def alpha(self, t: Time) -> Float[Array, "..."]:
        """α_t, the share of the data."""

    @abc.abstractmethod
    def sigma(self, t: Time) -> Float[Array, "..."]:
        """σ_t, the share of the noise."""

    @abc.abstractmethod
    def log_alpha(self, t: Time) -> Float[Array, "..."]:
        """log α_t; -inf where α_t = 0."""

    @abc.abstractmethod
    def log_sigma(self, t: Time) -> Float[Array, "..."]:
        """log σ_t; -inf where σ_t = 0."""

    @abc.abstractmethod
    def time(self, log_snr: Time) -> Float[Array, "..."]:
        """The t at which log(α_t²/σ_t²) equals `log_snr`: the inverse of `log_snr`."""

    def d_alpha(self, t: Time) -> Float[Array, "..."]:
        """dα/dt."""
        return _derivative(self.alpha, t)

    def d_sigma(self, t: Time) -> Float[Array, "..."]:
        """dσ/dt."""
        return _derivative(self.sigma, t)

    def d_log_alpha(self, t: Time) -> Float[Array, "..."]:
        """d log α/dt."""
        return _derivative(self.log_alpha, t)

    def d_log_sigma(self, t: Time) -> Float[Array, "..."]:
        """d log σ/dt."""
        return _derivative(self.log_sigma, t)

    def log_snr(self, t: Time) -> Float[Array, "..."]:
        """log(α²/σ²), which increases with t. (DPM-Solver's λ is half of it.)"""
        return 2 * (self.log_alpha(t) - self.log_sigma(t))

    def snr(self, t: Time) -> Float[Array, "..."]:
        """α²/σ²."""
        return jnp.exp(self.log_snr(t))

    def diffusion(self, t: Time) -> Float[Array, "..."]:
        """g² of the forward (noising) SDE dx = f x du + g dw in noise time u = 1 - t: g² = σ² d log(α²/σ²)/dt."""
        return 2 * self.sigma(t) ** 2 * (self.d_log_alpha(t) - self.d_log_sigma(t))

    def interpolate(self, t: Time, data: Float[Array, "*x"], noise: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """x_t = α_t data + σ_t noise, for one scalar `t` (`vmap` for a batch of times)."""
        return self.alpha(t) * data + self.sigma(t) * noise

    def prior(self, key: PRNGKey, shape: tuple[int, ...], dtype=None) -> Float[Array, "..."]:
        """Draws from N(0, σ(0)² I), where sampling starts. Exact where α(0) = 0, as accurate as the path's end elsewhere."""
        dtype = jnp.result_type(float) if dtype is None else dtype
        return self.sigma(jnp.zeros((), dtype)) * jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)


class FlowMatchingPath(AffinePath):
    """The straight line α = t, σ = 1 - (1 - σ_min) t. Lipman, Chen, Ben-Hamu, Nickel, Le 2023 (arXiv:2210.02747), their eq. 20 with x₀ the noise.

    `sigma_min` (default 0: rectified flow) is the noise left at t = 1.
    """

    sigma_min: Scalar = 0.0

    def __check_init__(self):
        check_range("sigma_min", self.sigma_min, low=0.0, high=1.0, open_high=True)

    def alpha(self, t):
        return jnp.asarray(t)

    def sigma(self, t):
        return (1 - jnp.asarray(t)) + self.sigma_min * jnp.asarray(t)

    def log_alpha(self, t):
        return jnp.log(self.alpha(t))

    def log_sigma(self, t):
        return jnp.log(self.sigma(t))

    def time(self, log_snr):
        return 1 / (jnp.exp(-jnp.asarray(log_snr) / 2) + 1 - self.sigma_min)


class _LinearBetaPath(AffinePath):
    """What the two paths with a linear β share: α = exp(-B/2), B(u) = ∫₀ᵘ β = u β_min + u² (β_max - β_min)/2, u = 1 - t."""

    beta_min: Scalar = 0.1
    beta_max: Scalar = 20.0

    def __check_init__(self):
        check_range("beta_min", self.beta_min, low=0.0)
        check_range("beta_max", self.beta_max, low=0.0, open_low=True)

    def alpha(self, t):
        return jnp.exp(self.log_alpha(t))

    def log_alpha(self, t):
        u = 1 - jnp.asarray(t)
        return -(u * self.beta_min + u**2 * (self.beta_max - self.beta_min) / 2) / 2

    def _time(self, integral):
        """The t with B(1 - t) = `integral`: the root of the quadratic in its form without cancellation."""
        root = jnp.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * integral)
        return 1 - 2 * integral / (self.beta_min + root)


class VPPath(_LinearBetaPath):
    """Variance preserving: α² = exp(-B), σ² = 1 - exp(-B), B(u) = ∫₀ᵘ β, β linear in u = 1 - t from `beta_min` to `beta_max`.

    Song et al. 2021 (arXiv:2011.13456) eq. 11 and appendix C, the limit of DDPM; defaults 0.1 and 20 are theirs.
    """

    def sigma(self, t):
        return jnp.sqrt(-jnp.expm1(2 * self.log_alpha(t)))

    def log_sigma(self, t):
        return jnp.log(-jnp.expm1(2 * self.log_alpha(t))) / 2

    def time(self, log_snr):
        # SNR = 1 / (e^B - 1)
        return self._time(jax.nn.softplus(-jnp.asarray(log_snr)))


class SubVPPath(_LinearBetaPath):
    """Sub-variance-preserving: α = exp(-B/2), σ = 1 - exp(-B), with the B of `VPPath`. Song et al. 2021 (arXiv:2011.13456) eq. 12, 29."""

    def sigma(self, t):
        return -jnp.expm1(2 * self.log_alpha(t))

    def log_sigma(self, t):
        return jnp.log(self.sigma(t))

    def time(self, log_snr):
        # α / (1 - α²) = 1/r, so 1/α = (√(r² + 4) + r)/2
        r = jnp.exp(-jnp.asarray(log_snr) / 2)
        return self._time(2 * jnp.log((r + jnp.sqrt(r**2 + 4)) / 2))


class VEPath(AffinePath):
    """Variance exploding: α = 1, σ geometric from `sigma_max` (t = 0) to `sigma_min` (t = 1). Song et al. 2021 (arXiv:2011.13456), appendix C.

    Defaults 0.01 and 50 are the paper's for CIFAR-10 scaled to [0, 1]; `sigma_max` should reach the largest distance between two data points.
    """

    sigma_min: Scalar = 0.01
    sigma_max: Scalar = 50.0

    def __check_init__(self):
        check_range("sigma_min", self.sigma_min, low=0.0, open_low=True)
        check_range("sigma_max", self.sigma_max, low=0.0, open_low=True)

    def alpha(self, t):
        return jnp.ones_like(jnp.asarray(t))

    def sigma(self, t):
        return jnp.exp(self.log_sigma(t))

    def log_alpha(self, t):
        return jnp.zeros_like(jnp.asarray(t))

    def log_sigma(self, t):
        t = jnp.asarray(t)
        return (1 - t) * jnp.log(self.sigma_max) + t * jnp.log(self.sigma_min)

    def time(self, log_snr):
        log_max, log_min = jnp.log(self.sigma_max), jnp.log(self.sigma_min)
        return (log_max + jnp.asarray(log_snr) / 2) / (log_max - log_min)


class EDMPath(AffinePath):
    """α = 1 and σ linear in time, from `sigma_max` at t = 0 to 0 at t = 1: σ(u) = u of Karras, Aittala, Aila, Laine 2022 (arXiv:2206.00364).

    Their ρ = 7 spacing is a grid on this path, `ergodax.diffusion.karras_grid`; Euler and Heun in our t are Euler and Heun in their σ.
    """

    sigma_max: Scalar = 80.0

    def __check_init__(self):
        check_range("sigma_max", self.sigma_max, low=0.0, open_low=True)

    def alpha(self, t):
        return jnp.ones_like(jnp.asarray(t))

    def sigma(self, t):
        return jnp.asarray((1 - jnp.asarray(t)) * self.sigma_max)

    def log_alpha(self, t):
        return jnp.zeros_like(jnp.asarray(t))

    def log_sigma(self, t):
        return jnp.log(self.sigma(t))

    def time(self, log_snr):
        return 1 - jnp.exp(-jnp.asarray(log_snr) / 2) / self.sigma_max


class CosinePath(AffinePath):
    """α = cos(φ(u)) / cos(φ(0)), σ = √(1 - α²), φ(u) = π/2 · (u + s)/(1 + s), u = 1 - t. Nichol and Dhariwal 2021 (arXiv:2102.09672) eq. 17.

    `offset` is their s = 0.008; 0 gives the trigonometric path α = sin(πt/2), σ = cos(πt/2).
    """

    offset: Scalar = 0.008

    def __check_init__(self):
        check_range("offset", self.offset, low=0.0)

    def _angle(self, t):
        # π/2 - φ(u): small where α is small, so that α(0) = 0 exactly.
        return jnp.pi / 2 * jnp.asarray(t) / (1 + self.offset)

    @property
    def _cos_start(self):
        return jnp.cos(jnp.pi / 2 * self.offset / (1 + self.offset))

    def alpha(self, t):
        return jnp.sin(self._angle(t)) / self._cos_start

    def sigma(self, t):
        return jnp.exp(self.log_sigma(t))

    def log_alpha(self, t):
        return jnp.log(self.alpha(t))

    def log_sigma(self, t):
        # cos²φ(0) - cos²φ(u) = sin(φ(u) - φ(0)) sin(φ(u) + φ(0)), without the cancellation of 1 - α²
        u = 1 - jnp.asarray(t)
        scale = jnp.pi / 2 / (1 + self.offset)
        return (jnp.log(jnp.sin(scale * u)) + jnp.log(jnp.sin(scale * (u + 2 * self.offset)))) / 2 - jnp.log(self._cos_start)

    def time(self, log_snr):
        alpha2, sigma2 = jax.nn.sigmoid(jnp.asarray(log_snr)), jax.nn.sigmoid(-jnp.asarray(log_snr))
        cos_phi = jnp.sqrt(alpha2) * self._cos_start
        sin_phi = jnp.sqrt(sigma2 + alpha2 * (1 - self._cos_start**2))
        return jnp.arctan2(cos_phi, sin_phi) * (2 / jnp.pi) * (1 + self.offset)


__all__ = ["AffinePath", "CosinePath", "EDMPath", "FlowMatchingPath", "SubVPPath", "VEPath", "VPPath"]
