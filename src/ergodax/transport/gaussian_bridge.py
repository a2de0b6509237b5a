"""The Schrödinger bridge between two Gaussians in closed form: the truth that every bridge method is checked against.

Between N(m₀, C₀) and N(m₁, C₁), relative to x₁ | x₀ ~ N(a x₀ + c, q I), the plan is Gaussian, and only λ = q/a of the reference enters its
cross-covariance (Janati, Muzellec, Peyré, Cuturi 2020, arXiv:2006.02572, theorem 1, where a = 1):

    C₀₁ = C₀^{½} [(C₀^{½} C₁ C₀^{½} + λ²/4 I)^{½} + λ/2 I]⁻¹ C₀^{½} C₁,

a form that needs no inverse of C₀. Between its ends the bridge is the reference's own bridge over that plan; its drift is the reference's, steered to
E[x₁ | x_t] (Bunne, Hsieh, Cuturi, Krause 2023, arXiv:2202.05722, have the Brownian case).
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.types import PyTree, Time
from .reference import LinearReference


class GaussianBridge(eqx.Module):
    """The bridge from N(`mean0`, `cov0`) at t = 0 to N(`mean1`, `cov1`) at t = 1. As a vector field `(t, x, args)`, the drift of its SDE on [0, 1).

    - `mean0`, `mean1`: (d,); `cov0`, `cov1`: (d, d), symmetric and positive definite (`cov0` may be singular).
    - `reference`: a `LinearReference`. With `Brownian(epsilon)` the plan is that of entropic OT with cost ½|x₀ - x₁|² and weight ε.

    Raises `ValueError` for shapes that do not fit.
    """

    mean0: Float[Array, " d"]
    cov0: Float[Array, "..."]
    mean1: Float[Array, " d"]
    cov1: Float[Array, "..."]
    reference: LinearReference

    def __check_init__(self):
        shapes = [part.shape for part in (self.mean0, self.cov0, self.mean1, self.cov1)]
        d = self.mean0.shape[0]
        if shapes != [(d,), (d, d)] * 2:
            raise ValueError(f"means must have shape (d,) and covariances (d, d) with one d, got {shapes}.")

    def cross_covariance(self) -> Float[Array, "d d"]:
        """Cov(x₀, x₁) = C₀₁."""
        a, _, q = self.reference.transition(0.0, 1.0)
        half = q / a / 2
        root = _matrix_root(self.cov0)
        values, basis = jnp.linalg.eigh(root @ self.cov1 @ root)
        inverse = (basis / (jnp.sqrt(jnp.maximum(values, 0) + half**2) + half)) @ basis.T
        return root @ inverse @ root @ self.cov1

    def conditional(self, x0: Float[Array, "*batch d"]) -> tuple[Float[Array, "*batch d"], Float[Array, "d d"]]:
        """Mean and covariance of x₁ given x₀."""
        cross = self.cross_covariance()
        gain = jnp.linalg.solve(self.cov0, cross)
        return self.mean1 + (x0 - self.mean0) @ gain, self.cov1 - cross.T @ gain

    def marginal(self, t: Time) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
        """Mean and covariance of x_t at one scalar time."""
        a, b, c, variance = self._shares(t)
        cross = self.cross_covariance()
        identity = jnp.eye(self.mean0.shape[0], dtype=self.mean0.dtype)
        covariance = a**2 * self.cov0 + b**2 * self.cov1 + a * b * (cross + cross.T) + variance * identity
        return a * self.mean0 + b * self.mean1 + c, covariance

    def target(self, t: Time, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """E[x₁ | x_t = x]."""
        a, b, _, _ = self._shares(t)
        mean, covariance = self.marginal(t)
        return self.mean1 + (a * self.cross_covariance().T + b * self.cov1) @ jnp.linalg.solve(covariance, x - mean)

    def __call__(self, t: Time, x: Float[Array, " d"], args: PyTree = None) -> Float[Array, " d"]:
        """The drift at one scalar time t < 1."""
        return self.reference(t, x) + self.reference.steering(t, x, self.target(t, x))

    def _shares(self, t):
        """(a, b, c, v): x_t = a x₀ + b x₁ + c + √v z, the reference's bridge."""
        zero = jnp.zeros_like(self.mean0)
        shift, variance = self.reference.bridge(t, zero, zero)
        a, b = (self.reference.bridge(t, *ends)[0] - shift for ends in ((zero + 1, zero), (zero, zero + 1)))
        return a[0], b[0], shift, variance


def _matrix_root(matrix):
    values, basis = jnp.linalg.eigh(matrix)
    return (basis * jnp.sqrt(jnp.maximum(values, 0))) @ basis.T


__all__ = ["GaussianBridge"]
