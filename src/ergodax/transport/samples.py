"""What users bring to both ends: arrays of points, of unequal sizes, with or without weights, checked once and drawn in minibatches."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from ..core.check import check_count, check_range, is_concrete
from ..core.types import PRNGKey


class Samples(eqx.Module):
    """An empirical law: the rows of `points`, each with its weight.

    - `points`: (n, *x), floating, all finite.
    - `weights`: (n,), nonnegative and not all 0; they need not sum to 1. None (default): all alike.

    Raises `ValueError` for arrays that are empty, not floating, of shapes that do not fit, or have rows that are not finite (it names the first).
    """

    points: Real[Array, "..."]
    weights: Float[Array, "..."] | None = None

    def __check_init__(self):
        points, weights = self.points, self.weights
        if points.ndim < 1 or points.shape[0] < 1 or not jnp.issubdtype(points.dtype, jnp.floating):
            raise ValueError(f"`points` must be floating, with at least one row, got {points.dtype} of shape {points.shape}.")
        if is_concrete(points):
            bad = np.flatnonzero(~np.isfinite(np.asarray(points)).reshape(points.shape[0], -1).all(1))
            if bad.size:
                raise ValueError(f"`points` must be finite, but {bad.size} of {points.shape[0]} rows are not, the first is row {bad[0]}.")
        if weights is None:
            return
        if weights.shape != points.shape[:1]:
            raise ValueError(f"`weights` must have shape {points.shape[:1]}, one for each row, got {weights.shape}.")
        check_range("weights", weights, low=0.0, open_high=True)
        if is_concrete(weights) and not np.any(np.asarray(weights) > 0):
            raise ValueError("`weights` must not all be 0.")

    def indices(self, key: PRNGKey, n: int) -> Int[Array, " n"]:
        """n row numbers, drawn with replacement."""
        if self.weights is None:
            return jax.random.randint(key, (n,), 0, self.points.shape[0])
        # The inverse of the cumulative weights; below their sum, so that no rounding gets past the last row that has weight.
        cumulative = jnp.cumsum(self.weights)
        level = cumulative[-1] * jax.random.uniform(key, (n,), cumulative.dtype)
        return jnp.searchsorted(cumulative, jnp.minimum(level, jnp.nextafter(cumulative[-1], jnp.zeros_like(level))), side="right")

    def sample(self, key: PRNGKey, n: int) -> Float[Array, "n *x"]:
        """n rows, drawn with replacement."""
        return self.points[self.indices(key, n)]

    def moments(self) -> tuple[Float[Array, "*x"], Float[Array, ""]]:
        """The mean, and the variance of one number of a row, on the average over those."""
        rows = self.points.shape[0]
        share = jnp.full((rows,), 1 / rows, self.points.dtype) if self.weights is None else self.weights / jnp.sum(self.weights)
        mean = jnp.tensordot(share.astype(self.points.dtype), self.points, 1)
        return mean, jnp.mean(jnp.tensordot(share.astype(self.points.dtype), (self.points - mean) ** 2, 1))


class Minibatches(eqx.Module):
    """`batch(key, step) -> (x, ...)` for `core.Fit`: `batch_size` rows of each of several laws, drawn independently of each other.

    - `laws`: `Samples`, or anything with `sample(key, n)`, such as a `GaussianMixture`: source first, target last.
    """

    laws: tuple
    batch_size: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("batch_size", self.batch_size)

    def __call__(self, key: PRNGKey, step: Int[Array, ""]) -> tuple:
        """One batch for each law."""
        return tuple(law.sample(part, self.batch_size) for law, part in zip(self.laws, jax.random.split(key, len(self.laws)), strict=True))


__all__ = ["Minibatches", "Samples"]
