"""An array of rates as a schedule: what optimised and refined schedules, or a law's optimum, become to be used with optax."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ..core.check import check_range
from ..core.schedule import as_schedule
from ..core.types import Scalar


def tabulated_schedule(values: Float[Array, " points"], peak: Scalar = 1.0, total_steps: Scalar | None = None) -> optax.Schedule:
    """`step -> peak · values`, linear between the entries, stretched to another horizon.

    - `values`: at least two. The first is that of step 0, the last that of step `total_steps` - 1, as in `values[step]`.
    - `peak`: a factor for all of them, default 1.
    - `total_steps`: the length of the run, default that of `values`; more than 1, need not be whole. Outside it the end's value is kept.

    All may be traced and swept, and so may the step, an integer or a float of any shape. The result has the dtype of `values`.
    Raises `ValueError` for values that are no vector of at least two, and for a run of one step or less.
    """
    if values.ndim != 1 or values.size < 2:
        raise ValueError(f"`values` must be a vector of at least two values, got shape {values.shape}.")
    check_range("total_steps", total_steps, low=1.0, open_low=True)
    last = values.size - 1

    def formula(step, table, factor, total):
        place = jnp.clip(step * (last / (total - 1)), 0, last)
        below = jnp.minimum(place.astype(jnp.int32), last - 1)
        share = place - below.astype(place.dtype)
        return factor * ((1 - share) * table[below] + share * table[below + 1])

    return as_schedule(values, formula, values, peak, values.size if total_steps is None else total_steps)


__all__ = ["tabulated_schedule"]
