"""What a network predicts, and the posterior mean of the data it implies.

Every parametrisation of a diffusion or flow model is a linear relation between the noisy x, the network's output p and the denoised D = E[x₁ | x_t
= x],

    d_t D = a_t x + b_t p,

so one triple of clocks (a, b, d) gives both directions exactly, with no division by a clock that the relation does not need. A network is converted
once, by `Denoiser`; solvers, guidance and likelihoods see D alone."""

import abc

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .check import check_range
from .path import AffinePath
from .types import PyTree, Scalar, Time, VectorField


class Prediction(eqx.Module):
    """The socket for a parametrisation: its coefficients (a, b, d) on any affine path."""

    @abc.abstractmethod
    def coefficients(self, path: AffinePath, t: Time) -> tuple[Array, Array, Array]:
        """Clocks (a, b, d) with d D = a x + b p."""

    @abc.abstractmethod
    def target(self, path: AffinePath, t: Time, data: Float[Array, "*x"], noise: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """The value that a perfect network would be regressed on, from the data and the noise that made x_t: no cancellation at either end."""

    def to_denoised(self, path: AffinePath, t: Time, x: Float[Array, "*x"], value: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """D from this prediction's `value` at one scalar time `t`. Not finite only where the value says nothing of D (noise where α = 0)."""
        a, b, d = self.coefficients(path, t)
        return (a * x + b * value) / d

    def from_denoised(self, path: AffinePath, t: Time, x: Float[Array, "*x"], denoised: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """This prediction's value from D at one scalar time `t`. Not finite only where the value does not exist (score where σ = 0)."""
        a, b, d = self.coefficients(path, t)
        return (d * denoised - a * x) / b


class DataPrediction(Prediction):
    """p = E[x₁ | x_t], the denoised data itself."""

    def coefficients(self, path, t):
        one = jnp.ones_like(path.alpha(t))
        return jnp.zeros_like(one), one, one

    def target(self, path, t, data, noise):
        return data


class NoisePrediction(Prediction):
    """p = E[x₀ | x_t], DDPM's ε: α D = x - σ ε. Ho, Jain, Abbeel 2020 (arXiv:2006.11239) eq. 9."""

    def coefficients(self, path, t):
        alpha = path.alpha(t)
        return jnp.ones_like(alpha), -path.sigma(t), alpha

    def target(self, path, t, data, noise):
        return noise


class ScorePrediction(Prediction):
    """p = ∇ log p_t(x): α D = x + σ² p (Tweedie). Song et al. 2021 (arXiv:2011.13456)."""

    def coefficients(self, path, t):
        alpha = path.alpha(t)
        return jnp.ones_like(alpha), path.sigma(t) ** 2, alpha

    def target(self, path, t, data, noise):
        return -noise / path.sigma(t)


class VelocityPrediction(Prediction):
    """p = E[α' x₁ + σ' x₀ | x_t], the probability-flow velocity dx/dt that flow matching learns: (σα' - ασ') D = σ p - σ' x.

    Lipman et al. 2023 (arXiv:2210.02747). On `FlowMatchingPath` this is E[x₁ - x₀ | x_t].
    """

    def coefficients(self, path, t):
        alpha, sigma, d_alpha, d_sigma = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)
        return -d_sigma, sigma, sigma * d_alpha - alpha * d_sigma

    def target(self, path, t, data, noise):
        return path.d_alpha(t) * data + path.d_sigma(t) * noise


class VPrediction(Prediction):
    """p = α ε - σ x₁: (α² + σ²) D = α x - σ p. Salimans and Ho 2022 (arXiv:2202.00512), there with α² + σ² = 1."""

    def coefficients(self, path, t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        return alpha, -sigma, alpha**2 + sigma**2

    def target(self, path, t, data, noise):
        return path.alpha(t) * noise - path.sigma(t) * data


class EDMPrediction(Prediction):
    """The output F of EDM's preconditioned network, D = c_skip x/α + c_out F(c_in x/α; c_noise), with s = σ/α in the place of their σ.

    c_skip = s_d²/(s² + s_d²), c_out = s s_d/√(s² + s_d²), s_d = `data_std` (their default 0.5); c_in and c_noise are `EDMInput`.
    Karras, Aittala, Aila, Laine 2022 (arXiv:2206.00364) table 1. Written without dividing by α, so it holds where α = 0 too.
    """

    data_std: Scalar = 0.5

    def __check_init__(self):
        check_range("data_std", self.data_std, low=0.0, open_low=True)

    def coefficients(self, path, t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        total = sigma**2 + alpha**2 * self.data_std**2
        return alpha * self.data_std**2, sigma * self.data_std * jnp.sqrt(total), total

    def target(self, path, t, data, noise):
        alpha, sigma = path.alpha(t), path.sigma(t)
        total = sigma**2 + alpha**2 * self.data_std**2
        return (sigma * data - alpha * self.data_std**2 * noise) / (self.data_std * jnp.sqrt(total))


class EDMInput(eqx.Module):
    """EDM's input side: calls `network(c_noise, c_in x/α, args)`, c_in = 1/√(s² + s_d²), c_noise = log(s)/4, s = σ/α. Same reference.

    s is kept within `[1e-6, 1e6]` inside the logarithm, so the conditioning stays finite at the ends of a path.
    """

    network: VectorField
    path: AffinePath
    data_std: Scalar = 0.5

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """Shapes as the network's."""
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        log_s = jnp.clip(self.path.log_sigma(t) - self.path.log_alpha(t), jnp.log(1e-6), jnp.log(1e6))
        return self.network(log_s / 4, x / jnp.sqrt(sigma**2 + alpha**2 * self.data_std**2), args)


class Denoiser(eqx.Module):
    """A network of any parametrisation as the posterior mean `denoised(t, x, args)`: what every solver takes.

    `network` is called as `(t, x, args)` and returns `prediction` of `x`. One example or a batch: whatever the network takes.
    """

    network: VectorField
    path: AffinePath
    prediction: Prediction

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """E[data | x_t = x], of the shape and dtype of `x`."""
        return self.prediction.to_denoised(self.path, t, x, self.network(t, x, args))


class ProbabilityFlow(eqx.Module):
    """The probability-flow velocity dx/dt of a denoiser as a vector field `(t, x, args)`, for `diffrax.ODETerm` and likelihoods."""

    denoised: VectorField
    path: AffinePath

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """dx/dt at one scalar `t`, of the shape of `x`."""
        return VelocityPrediction().from_denoised(self.path, t, x, self.denoised(t, x, args))


__all__ = [
    "DataPrediction",
    "Denoiser",
    "EDMInput",
    "EDMPrediction",
    "NoisePrediction",
    "Prediction",
    "ProbabilityFlow",
    "ScorePrediction",
    "VPrediction",
    "VelocityPrediction",
]
