"""Tuning one number, for checks that compare schedules at their best peak."""

import jax
import jax.numpy as jnp


def best_peak(value, low, high, *, points=24, zooms=3):
    """The minimiser of `value(peak)` in [low, high] and its minimum: a vmapped geometric grid, then `zooms` grids between the best one's neighbours.

    `value` may be traced and should have one minimum; NaN counts as inf. The logarithm of the peak is right to
    log(high/low) 2^zooms/(points-1)^(zooms+1), 9e-5 for a range of 1 to 24, and the minimum to its curvature times the square of that.
    """

    def zoom(ends, _):
        peaks = jnp.exp(jnp.linspace(*ends, points))
        values = jax.vmap(value)(peaks)
        values = jnp.where(jnp.isnan(values), jnp.inf, values)
        best = jnp.argmin(values)
        around = (jnp.maximum(best - 1, 0), jnp.minimum(best + 1, points - 1))
        return tuple(jnp.log(peaks[i]) for i in around), (peaks[best], values[best])

    _, (peaks, values) = jax.lax.scan(zoom, (jnp.log(low), jnp.log(high)), length=zooms + 1)
    return peaks[-1], values[-1]
