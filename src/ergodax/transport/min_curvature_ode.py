"""Straight flows by a learned coupling: minimising trajectory curvature. Lee, Kim, Ye 2023 (arXiv:2301.12003).

On x_t = (1 - t) x₀ + t x₁ the noise x₀ is not drawn apart from its data but by an encoder q(x₀ | x₁) = N(μ(x₁), diag σ²(x₁)), trained with the
velocity:

    E ‖x₁ - x₀ - v(t, x_t)‖²/d + β E KL(q(x₀ | x₁) ‖ N(0, p² I))/d,   x₁ ~ data, x₀ ~ q, t uniform.

The first term is what v cannot know of x₁ - x₀: it falls where lines of different pairs no longer cross, and then the flow's trajectories are
straight (the identity of `straightness`). The second keeps the law of x₀ close to the prior N(0, p² I) that sampling starts from. β trades the two:
β → ∞ is μ = 0, σ = p, independent flow matching; a small β gives samplers of few steps, from a prior that is not quite what was trained on. The
authors' default is 10. Their time runs from data to noise.

Left out: the optional distillation. Other paths, such as variance preserving ones, are an `interpolant` without noise.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.batch import uniform_times
from ..core.check import check_range
from ..core.types import PRNGKey, PyTree, Scalar, Time, VectorField
from .interpolants import Interpolant, LinearInterpolant, ZeroGamma


class EncodedFlow(eqx.Module):
    """A velocity and the encoder trained with it: the `model` of `MinCurvatureLoss`, and itself the velocity as a vector field.

    - `velocity`: a network on one example, `(t, x, args) -> array like x`.
    - `encoder`: a network on one example, `(x₁, args) -> (μ, log σ)`, two arrays like x₁.
    """

    velocity: VectorField
    encoder: Callable

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """v."""
        return self.velocity(t, x, args)


class EncoderCoupling(eqx.Module):
    """The coupling plug `(key, x₁, x₀, args) -> x₀` of an encoder: fresh draws of q(x₀ | x₁). The x₀ given is not read."""

    encoder: Callable

    def __call__(self, key: PRNGKey, x1: Float[Array, "n *x"], x0: Float[Array, "n *x"], args: PyTree) -> Float[Array, "n *x"]:
        """x₀ = μ + σ ζ for every row."""
        mean, log_std = jax.vmap(self.encoder)(x1, args)
        return mean + jnp.exp(log_std) * jax.random.normal(key, x0.shape, x1.dtype)


def gaussian_kl(mean: Float[Array, "*x"], log_std: Float[Array, "*x"], prior_std: Scalar | Float[Array, "..."] = 1.0) -> Float[Array, "*x"]:
    """KL(N(μ, σ²) ‖ N(0, p²)) of every entry."""
    prior_std = jnp.asarray(prior_std, mean.dtype)
    log_ratio = log_std - jnp.log(prior_std)
    return jnp.expm1(2 * log_ratio) / 2 + (mean / prior_std) ** 2 / 2 - log_ratio


class MinCurvatureLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {"flow": ..., "kl": ...})` with `model` an `EncodedFlow`; both terms are means over entries.

    - `beta`: β >= 0 (default 10, the authors'); may be swept.
    - `prior_std`: p > 0 (default 1), a scalar or anything that broadcasts with x: the standard deviation of the noise that sampling starts from.
    - `interpolant`: any with γ = 0 (default linear); its noise, if it has any, is not added.
    - `times`: `(key, n) -> (n,)` (default `uniform_times`).
    - `batch`: x₁ of shape (B, *x), or (x₁, args) with `args` a pytree of leading axis B.
    """

    beta: Scalar = 10.0
    prior_std: Scalar | Float[Array, "..."] = 1.0
    interpolant: Interpolant = LinearInterpolant(ZeroGamma())
    times: Callable = uniform_times

    def __check_init__(self):
        check_range("beta", self.beta, low=0.0)
        check_range("prior_std", self.prior_std, low=0.0, open_low=True)

    def __call__(self, model: EncodedFlow, batch: Array | tuple, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        x1, args = batch if isinstance(batch, tuple) else (batch, None)
        key_time, key_noise = jax.random.split(key)
        t = self.times(key_time, x1.shape[0]).astype(x1.dtype)
        noise = jax.random.normal(key_noise, x1.shape, x1.dtype)

        def terms(t, x1, noise, args):
            mean, log_std = model.encoder(x1, args)
            x0 = mean + jnp.exp(log_std) * noise
            residual = self.interpolant.d_mean(t, x0, x1) - model.velocity(t, self.interpolant.mean(t, x0, x1), args)
            return jnp.mean(residual**2), jnp.mean(gaussian_kl(mean, log_std, self.prior_std))

        flow, kl = (jnp.mean(term) for term in jax.vmap(terms)(t, x1, noise, args))
        return flow + jnp.asarray(self.beta, x1.dtype) * kl, {"flow": flow, "kl": kl}


__all__ = ["EncodedFlow", "EncoderCoupling", "MinCurvatureLoss", "gaussian_kl"]
