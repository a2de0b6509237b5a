"""Exact interpolant fields between two Gaussian mixtures: the oracle that learned fields, solvers and diffusions ε are measured against.

With x₀ and x₁ independent, every pair of components gives a Gaussian x_t = a x₀ + b x₁ + γ z with

    m = a m₀ + b m₁,   C = a² C₀ + b² C₁ + γ² I,   E[dx_t/dt | x] = m' + ½ C' C⁻¹ (x - m),   E[z | x] = γ C⁻¹ (x - m),

and a field is the mean of these over the posterior of the pair given x. Albergo, Boffi, Vanden-Eijnden 2023 (arXiv:2303.08797), appendix A.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.types import PyTree, Time
from .interpolants import SpatiallyLinearInterpolant


class MixtureInterpolantFields(eqx.Module):
    """Closed-form velocity, score, latent and interpolant velocity between mixtures of K₀ and K₁ Gaussians, on one example x of shape (d,).

    - `weights0`, `weights1`: (K,), positive, normalised here.
    - `means0`, `means1`: (K, d).
    - `covariances0`, `covariances1`: (K, d, d), or (K,) for isotropic variances.

    Each field is a bound method `(t, x, args=None)`, so it goes where a network goes. Costs K₀ K₁ Cholesky factors of d × d at each time.
    A covariance may be singular only where the noise or the other end makes up for it. Raises `ValueError` for shapes that do not fit.
    """

    interpolant: SpatiallyLinearInterpolant
    weights0: Float[Array, " source"]
    means0: Float[Array, "source d"]
    covariances0: Float[Array, "..."]
    weights1: Float[Array, " target"]
    means1: Float[Array, "target d"]
    covariances1: Float[Array, "..."]

    def __check_init__(self):
        d = self.means0.shape[-1]
        for end in ("0", "1"):
            weights, means, covariances = (getattr(self, name + end).shape for name in ("weights", "means", "covariances"))
            if means != (*weights, d) or covariances not in (weights, (*weights, d, d)):
                expected = "weights (K,), means (K, d) and covariances (K,) or (K, d, d)"
                raise ValueError(f"end {end} must have {expected} with one d, got {weights}, {means} and {covariances}.")

    def _covariance(self, share0, share1, extra):
        """share0 C₀ + share1 C₁ + extra I for every pair, (K₀ K₁, d, d)."""
        identity = jnp.eye(self.means0.shape[-1], dtype=self.means0.dtype)
        cov0, cov1 = (c[:, None, None] * identity if c.ndim == 1 else c for c in (self.covariances0, self.covariances1))
        pairs = share0 * cov0[:, None] + share1 * cov1 + extra * identity
        return pairs.reshape(-1, *identity.shape)

    def _mean(self, share0, share1):
        """share0 m₀ + share1 m₁ for every pair, (K₀ K₁, d)."""
        return (share0 * self.means0[:, None] + share1 * self.means1).reshape(-1, self.means0.shape[-1])

    def _pairs(self, t, x):
        """log(weight × density) of every pair, (K₀ K₁,), and C⁻¹ (x - m), (K₀ K₁, d)."""
        a, b = self.interpolant.source_share(t), self.interpolant.target_share(t)
        offset = x - self._mean(a, b)
        # The inverse itself depends on t alone, so that a batch of x at one time shares it.
        factor = jnp.linalg.cholesky(self._covariance(a**2, b**2, self.interpolant.gamma.square(t)))
        root = jax.vmap(lambda lower: jax.scipy.linalg.solve_triangular(lower, jnp.eye(x.size, dtype=lower.dtype), lower=True))(factor)
        solved = jnp.einsum("kji,kjl,kl->ki", root, root, offset)
        log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1)), -1)
        log_weights = jax.nn.log_softmax(jnp.log(self.weights0))[:, None] + jax.nn.log_softmax(jnp.log(self.weights1))
        return log_weights.ravel() - (jnp.sum(offset * solved, -1) + log_det + x.size * jnp.log(2 * jnp.pi)) / 2, solved

    def _flow(self, t, x, extra):
        a, b = self.interpolant.source_share(t), self.interpolant.target_share(t)
        da, db = self.interpolant.d_source_share(t), self.interpolant.d_target_share(t)
        logits, solved = self._pairs(t, x)
        flows = self._mean(da, db) + jnp.einsum("kij,kj->ki", self._covariance(a * da, b * db, extra), solved)
        return jax.nn.softmax(logits) @ flows

    def log_prob(self, t: Time, x: Float[Array, " d"]) -> Float[Array, ""]:
        """log ρ(t, x)."""
        return jax.nn.logsumexp(self._pairs(t, x)[0])

    def velocity(self, t: Time, x: Float[Array, " d"], args: PyTree = None) -> Float[Array, " d"]:
        """b = E[dx_t/dt | x_t = x]."""
        return self._flow(t, x, self.interpolant.gamma.product(t))

    def interpolant_velocity(self, t: Time, x: Float[Array, " d"], args: PyTree = None) -> Float[Array, " d"]:
        """v = E[∂I/∂t | x_t = x]."""
        return self._flow(t, x, 0)

    def score(self, t: Time, x: Float[Array, " d"], args: PyTree = None) -> Float[Array, " d"]:
        """s = ∇ log ρ(t, x), finite at the ends too."""
        logits, solved = self._pairs(t, x)
        return -jax.nn.softmax(logits) @ solved

    def latent(self, t: Time, x: Float[Array, " d"], args: PyTree = None) -> Float[Array, " d"]:
        """η = E[z | x_t = x]."""
        return -self.interpolant.gamma(t) * self.score(t, x)


__all__ = ["MixtureInterpolantFields"]
