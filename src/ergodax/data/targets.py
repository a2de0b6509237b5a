"""Target densities for samplers, with everything about them that is known exactly: normaliser, moments, independent draws."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ergodax.core.check import check_count, check_range
from ergodax.core.types import PRNGKey, Scalar


class Funnel(eqx.Module):
    """Neal's funnel: v = x₀ ~ N(0, `std`²) and x_i | v ~ N(0, e^v), i = 1 … `dim` - 1. Neal 2003 (Slice sampling), §8, with his dim 10 and std 3.

    Normalised. Points have shape (..., dim). `std` may be swept.
    """

    dim: int = eqx.field(static=True, default=10)
    std: Scalar = 3.0

    def __check_init__(self):
        check_count("dim", self.dim, low=2)
        check_range("std", self.std, low=0.0, open_low=True)

    @property
    def log_normaliser(self) -> float:
        """log Z = 0."""
        return 0.0

    def log_prob(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch"]:
        """log p(x)."""
        _check_dim(x, self.dim)
        v, rest = x[..., 0], x[..., 1:]
        std = jnp.asarray(self.std, x.dtype)
        neck = -((v / std) ** 2) / 2 - jnp.log(std)
        mouth = -jnp.sum((rest * jnp.exp(-v[..., None] / 2)) ** 2, axis=-1) / 2 - (self.dim - 1) * v / 2
        return neck + mouth - self.dim * math.log(2 * math.pi) / 2

    def sample(self, key: PRNGKey, n: int | None = None) -> Float[Array, "*n dim"]:
        """`n` independent draws of shape (n, dim), or one of shape (dim,) for `n=None`; default float dtype."""
        normal = jax.random.normal(key, (*_leading(n), self.dim))
        v = jnp.asarray(self.std, normal.dtype) * normal[..., :1]
        return jnp.concatenate([v, jnp.exp(v / 2) * normal[..., 1:]], axis=-1)

    def mean(self) -> Float[Array, " dim"]:
        """0."""
        return jnp.zeros(self.dim)

    def covariance(self) -> Float[Array, "dim dim"]:
        """diag(std², e^{std²/2}, …): at std 3 the mouth's variance is 90.02, almost all of it from draws with v > 3."""
        variance = jnp.full(self.dim, self.std, float) ** 2
        return jnp.diag(jnp.concatenate([variance[:1], jnp.exp(variance[1:] / 2)]))


class ManyWell(eqx.Module):
    """dim/2 independent double wells on the pairs (x₀, x₁), (x₂, x₃), …: E = Σ a⁴ - 6a² - a/2 + b²/2 over pairs (a, b), p = exp(-E)/Z.

    2^(dim/2) modes, at a ≈ ±1.7; the right well of each pair holds 0.844 of the mass. Noé, Olsson, Köhler, Wu 2019 (Boltzmann generators,
    arXiv:1812.01729) for one pair, Midgley et al. 2023 (FAB, arXiv:2208.01893) for dim 32, where log Z = 164.69567531. Points have shape (..., dim).
    """

    dim: int = eqx.field(static=True, default=32)

    def __check_init__(self):
        check_count("dim", self.dim, low=2)
        if self.dim % 2:
            raise ValueError(f"`dim` must be even, got {self.dim}.")

    @property
    def log_normaliser(self) -> float:
        """log Z = dim/2 (log ∫ exp(-a⁴ + 6a² + a/2) da + ½ log 2π), to float64 rounding."""
        return self.dim / 2 * (math.log(_well_moments()[0]) + math.log(2 * math.pi) / 2)

    def log_prob(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch"]:
        """-E(x): NOT normalised; subtract `log_normaliser` for the log-density."""
        _check_dim(x, self.dim)
        return jnp.sum(_well(x[..., ::2]) - x[..., 1::2] ** 2 / 2, axis=-1)

    def sample(self, key: PRNGKey, n: int | None = None) -> Float[Array, "*n dim"]:
        """`n` independent draws of shape (n, dim), or one of shape (dim,) for `n=None`; default float dtype.

        b is exact. a is the inverse of the CDF of the density interpolated linearly between 4097 nodes: within 4e-6 of its law in total variation.
        """
        shape = (*_leading(n), self.dim // 2)
        well_key, noise_key = jax.random.split(key)
        a = _well_quantile(jax.random.uniform(well_key, shape))
        return jnp.stack([a, jax.random.normal(noise_key, shape)], axis=-1).reshape(*shape[:-1], self.dim)

    def mean(self) -> Float[Array, " dim"]:
        """E[x]: 1.1880 for each a, 0 for each b."""
        return jnp.tile(jnp.asarray([_well_moments()[1], 0.0]), self.dim // 2)

    def covariance(self) -> Float[Array, "dim dim"]:
        """Cov[x], diagonal: 1.5486 for each a, 1 for each b."""
        return jnp.diag(jnp.tile(jnp.asarray([_well_moments()[2], 1.0]), self.dim // 2))


def _well(a):
    return -(a**4) + 6 * a**2 + a / 2


def _well_grid():
    # Outside ±4 the density is below e^-160 of its peak, and for such an integrand the trapezoidal rule converges faster than any power of the step.
    nodes = np.linspace(-4.0, 4.0, 4097)
    return nodes, np.exp(_well(nodes))


def _well_moments():
    """∫ exp(-a⁴ + 6a² + a/2) da, and the mean and variance of a."""
    nodes, density = _well_grid()
    total = density.sum()
    mean = (density * nodes).sum() / total
    return total * (nodes[1] - nodes[0]), mean, (density * (nodes - mean) ** 2).sum() / total


def _well_quantile(uniform):
    """The inverse CDF of a, with the density interpolated linearly between the nodes."""
    nodes, density = _well_grid()
    spacing = nodes[1] - nodes[0]
    cdf = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * spacing)])
    nodes, density, cdf = (jnp.asarray(table, uniform.dtype) for table in (nodes, density / cdf[-1], cdf / cdf[-1]))
    cell = jnp.clip(jnp.searchsorted(cdf, uniform, side="right") - 1, 0, len(nodes) - 2)
    # The mass left of node + s in a cell is f₀ s + (f₁ - f₀) s²/(2h): its root, in the form without cancellation.
    mass, low, slope = uniform - cdf[cell], density[cell], (density[cell + 1] - density[cell]) / float(spacing)
    step = 2 * mass / (low + jnp.sqrt(jnp.maximum(low**2 + 2 * slope * mass, 0)))
    return nodes[cell] + jnp.clip(step, 0, float(spacing))


def _leading(n):
    if n is None:
        return ()
    check_count("n", n)
    return (n,)


def _check_dim(x, dim):
    if x.ndim < 1 or x.shape[-1] != dim:
        raise ValueError(f"`x` must have shape (..., {dim}), got {x.shape}.")


__all__ = ["Funnel", "ManyWell"]
