"""What a loss draws for a batch: times `(key, n) -> (n,)`, and a coupling of its two ends `(key, data, source, args) -> source`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .types import PRNGKey, PyTree


#: Times stay this far from both ends, where a clock of some path is infinite. Song et al. 2021 (arXiv:2011.13456) use the same 1e-5 for VP.
MARGIN = 1e-5


def uniform_times(key: PRNGKey, n: int) -> Float[Array, " n"]:
    """n independent times, uniform on [0, 1] less a margin of 1e-5."""
    return jax.random.uniform(key, (n,), minval=MARGIN, maxval=1 - MARGIN)


def stratified_times(key: PRNGKey, n: int) -> Float[Array, " n"]:
    """n times, one uniform shift of an equal grid: each uniform, together spread.

    Kingma, Salimans, Poole, Ho 2021 (arXiv:2107.00630), appendix I.1.
    """
    shift = jax.random.uniform(key, ())
    return MARGIN + (1 - 2 * MARGIN) * jnp.mod(shift + jnp.arange(n) / n, 1.0)


def given_pairs(key: PRNGKey, data: Float[Array, "n *x"], source: Float[Array, "n *x"], args: PyTree) -> Float[Array, "n *x"]:
    """The rows of `source` as they came: row i goes with row i of `data`. With drawn noise, the independent coupling."""
    return source


__all__ = ["given_pairs", "stratified_times", "uniform_times"]
