"""Exact fields of a linear diffusion whose data are a Gaussian mixture: the oracle that solvers and learned scores are measured against.

With x ~ Σ_c w_c N(μ_c, Q_c diag(λ_c) Q_cᵀ) and z_t | x ~ N(φ x, Σ_t) for each entry of x (`linear_sde`), z_t is a mixture again. In the basis Q_c its
component c splits into d independent directions with means φ (Q_cᵀ μ_c)_j and K × K covariances C_cj = λ_cj φφᵀ + Σ_t, so that

    ∇ log p_t(z) = -Σ_c r_c Q_c C_c⁻¹ Q_cᵀ (z - φ μ_c),   E[x | z] = Σ_c r_c (μ_c + Q_c λ_c φᵀ C_c⁻¹ Q_cᵀ (z - φ μ_c)).
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.types import PyTree, Time
from ..data.mixture import GaussianMixture
from .linear_sde import LinearSDE, working_time


class LinearMixtureScore(eqx.Module):
    """The exact ∇ log p_t(z) for Gaussian-mixture data, as a vector field `(t, z, args)` on states (..., K, d).

    NaN only where a C_cj is singular: at t = 1, if an eigenvalue λ_cj or the variance of an auxiliary variable is 0.
    """

    mixture: GaussianMixture
    process: LinearSDE

    def __call__(self, t: Time, z: Float[Array, "*batch k d"], args: PyTree = None) -> Float[Array, "*batch k d"]:
        """∇ log p_t at one scalar `t`; `args` is not used."""
        responsibility, pull, mixture, _, _ = self._posterior(t, z)
        return -self._combine(mixture, responsibility, jnp.moveaxis(pull, -1, 0)).astype(z.dtype)

    def denoised(self, t: Time, z: Float[Array, "*batch k d"]) -> Float[Array, "*batch d"]:
        """E[x | z_t = z]."""
        responsibility, pull, mixture, mean, _ = self._posterior(t, z)
        shift = mixture.variances * jnp.einsum("...cdk,k->...cd", pull, mean, precision=jax.lax.Precision.HIGHEST)
        centre = jnp.einsum("...c,cd->...d", responsibility, mixture.means, precision=jax.lax.Precision.HIGHEST)
        return (centre + self._combine(mixture, responsibility, shift[None])[..., 0, :]).astype(z.dtype)

    def log_prob(self, t: Time, z: Float[Array, "*batch k d"]) -> Float[Array, "*batch"]:
        """log p_t(z)."""
        logits = self._posterior(t, z)[-1]
        return (jax.nn.logsumexp(logits, axis=-1) - z.shape[-2] * z.shape[-1] / 2 * math.log(2 * math.pi)).astype(z.dtype)

    def _posterior(self, t, z):
        """Responsibilities (..., c), C⁻¹ residual (..., c, d, k), the mixture in the working dtype, φ, and log-densities but for (2π)^{-Kd/2}."""
        if z.ndim < 2 or z.shape[-1] != self.mixture.dim or z.shape[-2] != self.process.drift_matrix.shape[0]:
            k = self.process.drift_matrix.shape[0]
            raise ValueError(f"`z` must have shape (..., {k}, {self.mixture.dim}), got {z.shape}.")
        t = working_time(t, z)
        mixture = jax.tree.map(lambda leaf: leaf.astype(t.dtype), self.mixture)
        mean, covariance = self.process.moments(t)
        covariances = mixture.variances[..., None, None] * jnp.outer(mean, mean) + covariance
        factor = jnp.linalg.cholesky(covariances)
        precision = jax.scipy.linalg.cho_solve((factor, True), jnp.broadcast_to(jnp.eye(len(mean), dtype=t.dtype), factor.shape))
        residual = z.astype(t.dtype)[..., None, :, :] - mean[:, None] * mixture.means[:, None, :]
        if mixture.basis is not None:
            residual = jnp.einsum("...cke,ced->...ckd", residual, mixture.basis, precision=jax.lax.Precision.HIGHEST)
        pull = jnp.einsum("cdkl,...cld->...cdk", precision, residual, precision=jax.lax.Precision.HIGHEST)
        exponent = jnp.einsum("...cdk,...ckd->...c", pull, residual, precision=jax.lax.Precision.HIGHEST) / 2
        log_det = jnp.sum(jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1)), axis=(-2, -1))
        logits = mixture.log_weights - exponent - log_det
        return jax.nn.softmax(logits, axis=-1), pull, mixture, mean, logits

    def _combine(self, mixture, responsibility, vectors):
        """Σ_c r_c Q_c v_c for vectors (k, ..., c, d): (..., k, d)."""
        if mixture.basis is None:
            return jnp.einsum("...c,k...cd->...kd", responsibility, vectors, precision=jax.lax.Precision.HIGHEST)
        return jnp.einsum("k...cd,ced->...ke", responsibility[..., None] * vectors, mixture.basis, precision=jax.lax.Precision.HIGHEST)


__all__ = ["LinearMixtureScore"]
