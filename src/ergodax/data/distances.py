"""Distances between two samples, for evaluation: pure, jittable, differentiable, and in memory that grows with one sample at a time.

Rows may have any shape (images, too) and are flattened. The measures say how far two *samples* are apart; compare every number with the one that two
fresh samples of the data give at the same sizes.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ergodax.core.check import check_count, check_range
from ergodax.core.types import PRNGKey, Scalar


def sliced_wasserstein(
    key: PRNGKey,
    x: Float[Array, "n *row"],
    y: Float[Array, "m *row"],
    num_projections: int = 128,
    p: Scalar = 2.0,
) -> Float[Array, ""]:
    """The sliced p-Wasserstein distance (E_θ W_p(θ·x, θ·y)^p)^{1/p}, over `num_projections` uniform directions θ.

    Rabin, Peyré, Delon, Bernot 2011; Bonneel, Rabin, Peyré, Pfister 2015. Each W_p^p = ∫₀¹ |F⁻¹(u) - G⁻¹(u)|^p du is exact for samples of any two
    sizes: both quantile functions are constant between the points i/n and j/m, so the integral is a sum over those (sorting, then a static merge).
    In one dimension this is W_p itself. Its floor for equal laws is not 0 but of order n^{-1/2} (p = 1) or above. Raises `ValueError` for rows of
    different shapes or p < 1.
    """
    check_count("num_projections", num_projections)
    check_range("p", p, low=1.0)
    x, y = _rows(x, y)
    direction = jax.random.normal(key, (num_projections, x.shape[1]), x.dtype)
    direction = direction / jnp.linalg.norm(direction, axis=1, keepdims=True)
    # Breakpoints in units of 1/(nm): whole numbers, so that no rounding moves a cell to a neighbour's quantile.
    n, m = len(x), len(y)
    cuts = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
    width = jnp.asarray(np.diff(cuts) / (n * m), x.dtype)
    x, y = (jnp.sort(jnp.dot(direction, z.T, precision=jax.lax.Precision.HIGHEST), axis=1) for z in (x, y))
    p = jnp.asarray(p, x.dtype)
    gap = jnp.abs(x[:, cuts[:-1] // m] - y[:, cuts[:-1] // n])
    return _root(jnp.mean(jnp.sum(width * gap**p, axis=1)), p)


def energy_distance(x: Float[Array, "n *row"], y: Float[Array, "m *row"], *, chunk_size: int = 128) -> Float[Array, ""]:
    """The energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'|, as its U-statistic. Székely and Rizzo 2013.

    Pairs of a row with itself are left out, so the estimate is unbiased: its mean is 0 for equal laws, whatever the sizes, and it can come out
    slightly negative. (The V-statistic, whose root scipy returns, is biased upwards by E|X - X'|/n + E|Y - Y'|/m.) `chunk_size` rows are compared
    with all others at a time. Raises `ValueError` for rows of different shapes or fewer than two of them.
    """
    check_count("chunk_size", chunk_size)
    x, y = _rows(x, y)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"`x` and `y` must have at least two rows each, got {len(x)} and {len(y)}.")
    centre = jnp.mean(y, axis=0)
    x, y, n, m = x - centre, y - centre, len(x), len(y)
    between = _sum_of_distances(x, y, False, chunk_size) / (n * m)
    within = _sum_of_distances(x, x, True, chunk_size) / (n * (n - 1)) + _sum_of_distances(y, y, True, chunk_size) / (m * (m - 1))
    return 2 * between - within


def nearest_distance(x: Float[Array, "n *row"], reference: Float[Array, "m *row"], *, chunk_size: int = 128) -> Float[Array, " n"]:
    """The Euclidean distance of each row of `x` to its nearest row of `reference`; `chunk_size` rows are searched for at a time.

    Computed from differences, so that a copy has distance exactly 0 in any precision. (In more than 64 dimensions only for the 8 best candidates of a
    faster search, which can miss the nearest row only among more than 8 that are equally near to rounding.)
    """
    check_count("chunk_size", chunk_size)
    x, reference = _rows(x, reference)
    centre = jnp.mean(reference, axis=0)
    return _nearest_distances(x - centre, reference - centre, chunk_size)


def memorised_share(
    samples: Float[Array, "n *row"],
    train: Float[Array, "train *row"],
    test: Float[Array, "test *row"],
    quantile: Scalar = 0.05,
    *,
    chunk_size: int = 128,
) -> Float[Array, ""]:
    """The share of `samples` that lie closer to their nearest training row than real unseen rows do.

    Closer means: strictly below the j-th smallest of the `test` rows' own nearest-training distances, j = `quantile` (m + 1) rounded, at least 1, of
    m test rows. A fresh row of the data's law is as likely to fall into any of the m + 1 gaps between those distances, so real data score j/(m + 1) ≈
    `quantile` in expectation, exactly so without ties. That is the floor to compare with, not 0; pure copying scores 1. A low quantile asks for
    samples closer than *almost all* real rows; the smallest one alone (quantile → 0) would hang on a single, possibly duplicated, test image.

    Distances are pixel-wise: a generator that favours a dense class (ones among digits), or blurs, scores above the floor without copying, so compare
    within classes or with a model trained on other data before calling a small excess memorisation. Samples that are not finite count as not
    memorised.
    """
    check_range("quantile", quantile, low=0.0, high=1.0)
    seen, unseen = (nearest_distance(rows, train, chunk_size=chunk_size) for rows in (samples, test))
    m = len(unseen)
    rank = jnp.clip(jnp.round(jnp.asarray(quantile) * (m + 1)).astype(int), 1, m)
    return jnp.mean((seen < jnp.sort(unseen)[rank - 1]).astype(seen.dtype))


def _rows(x, y):
    """Both samples as matrices, in a common dtype of at least float32."""
    if x.ndim < 1 or x.shape[1:] != y.shape[1:] or not (len(x) and len(y)):
        raise ValueError(f"Two samples need rows of the same shape, and at least one row each, got shapes {x.shape} and {y.shape}.")
    dtype = x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.dtype(jnp.float32)
    return x.reshape(len(x), -1).astype(dtype), y.reshape(len(y), -1).astype(dtype)


# Compiled here, so that calls outside `jit` do not compile a fresh loop each time; the chunks are recomputed for gradients, not stored.
@partial(jax.jit, static_argnames=("is_self", "chunk_size"))
def _sum_of_distances(rows, others, is_self, chunk_size):
    """Σ_ij |rows_i - others_j|, without i = j for `is_self`."""

    def one(i):
        squared = _squared_distances(rows[i], others)
        return jnp.sum(_root(jnp.where(is_self & (jnp.arange(len(others)) == i), 0, squared), 2))

    return jnp.sum(jax.lax.map(jax.checkpoint(one), jnp.arange(len(rows)), batch_size=chunk_size))


@partial(jax.jit, static_argnames="chunk_size")
def _nearest_distances(rows, others, chunk_size):
    def one(row):
        _, candidates = jax.lax.top_k(-_squared_distances(row, others), min(8, len(others)))
        return _root(jnp.min(jnp.sum((row - others[candidates]) ** 2, axis=1)), 2)

    return jax.lax.map(jax.checkpoint(one), rows, batch_size=chunk_size)


def _squared_distances(row, others):
    """|row - others|², (m,)."""
    # Short rows lie close together and need differences; |a|² + |b|² - 2ab is eight times as fast where rows are long, and enough to search with.
    if len(row) <= 64:
        return jnp.sum((row - others) ** 2, axis=1)
    cross = jnp.dot(others, row, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(row**2) + jnp.sum(others**2, axis=1) - 2 * cross, 0)


def _root(value, p):
    """value^{1/p}, with gradient 0 at 0."""
    zero = value == 0
    return jnp.where(zero, 0, jnp.where(zero, 1, value) ** (1 / p))


__all__ = ["energy_distance", "memorised_share", "nearest_distance", "sliced_wasserstein"]
