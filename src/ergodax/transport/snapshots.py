"""A population seen at several times, each time in other individuals: the data of methods that infer dynamics from snapshots."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core.check import check_count, check_increasing
from ..core.types import PRNGKey
from .samples import Samples


class Snapshots(eqx.Module):
    """Samples of unequal sizes at times t₀ < … < t_K, in arrays of one size: what is short is filled up with rows of weight 0.

    - `times`: (K + 1,), strictly increasing.
    - `samples`: one array (n_k, d) a time, of one floating dtype, which all that follows is in.
    - `weights`: one array (n_k,) a time, not negative, normalised here; None (default) for equal ones.

    Fields: `times` (K + 1,), `points` (K + 1, n, d) with n the largest n_k, and `weights` (K + 1, n). Raises `ValueError` for shapes that do not fit,
    and names the rows with numbers that are not finite.
    """

    times: Float[Array, " times"]
    points: Float[Array, "times n d"]
    weights: Float[Array, "times n"]

    def __init__(self, times, samples: Sequence, weights: Sequence | None = None):
        shapes = [np.shape(rows) for rows in samples]
        if any(len(shape) != 2 for shape in shapes) or len({shape[1] for shape in shapes}) != 1:
            raise ValueError(f"each of `samples` must have shape (rows, d) with one d, got {shapes}.")
        check_increasing("times", times)
        if np.shape(times) != (len(shapes),):
            raise ValueError(f"there must be as many `times` as `samples`, got {np.shape(times)} and {len(shapes)}.")
        dtype = jnp.result_type(*samples)
        given = [jnp.ones(shape[0], dtype) for shape in shapes] if weights is None else [jnp.asarray(weight, dtype) for weight in weights]
        if len(given) != len(shapes):
            raise ValueError(f"there must be as many `weights` as `samples`, got {len(given)} and {len(shapes)}.")
        rows = [jnp.asarray(rows, dtype) for rows in samples]
        for k, parts in enumerate(zip(rows, given)):
            _check(k, *parts)
        most = max(shape[0] for shape in shapes)
        self.times = jnp.asarray(times, dtype)
        # Filled up with rows of the sample itself, which no rounding of a weight can make wrong.
        self.points = jnp.stack([jnp.pad(points, ((0, most - len(points)), (0, 0)), mode="edge") for points in rows])
        self.weights = jnp.stack([jnp.pad(weight / jnp.sum(weight), (0, most - len(weight))) for weight in given])

    def resample(self, key: PRNGKey, n: int) -> Float[Array, "times n d"]:
        """`n` rows of each snapshot in random order, each as often as its weight says, to the next or the last whole number.

        Systematic resampling: with equal weights and n rows of n, every row comes once.
        """
        check_count("n", n)

        def one(key, points, weights):
            key_shift, key_order = jax.random.split(key)
            positions = (jax.random.uniform(key_shift, (), weights.dtype) + jnp.arange(n, dtype=weights.dtype)) / n
            indices = jnp.searchsorted(jnp.cumsum(weights), positions, side="right")
            return points[jax.random.permutation(key_order, jnp.minimum(indices, len(points) - 1))]

        return jax.vmap(one)(jax.random.split(key, len(self.times)), self.points, self.weights)


def _check(k, rows, weights):
    try:
        Samples(rows, weights)
    except ValueError as error:
        raise ValueError(f"`samples[{k}]`: {error}") from error


__all__ = ["Snapshots"]
