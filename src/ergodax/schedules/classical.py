"""The classical schedules, with peaks, horizons, warm-ups and shapes that may be traced and swept in one compile.

optax has most of them, but branches in Python on their lengths (`if transition_steps <= 0`), so that each horizon is a program of its own; these
agree with optax's to rounding where both exist. (Under `jit`, optax 0.2.8's `polynomial_schedule` may raise a rounding error below 0 to its power and
end in NaN.) `optax.constant_schedule` can be traced already. All count from the first update, k = 0; a run of T
updates evaluates them at 0 … T - 1, and they are done, and stay, at T.
"""

import jax.numpy as jnp
import numpy as np
import optax

from ..core.check import check_range, is_concrete
from ..core.schedule import Cooldown, Vector, as_schedule, as_vector, cosine_cooldown, linear_cooldown, progress
from ..core.types import Scalar


def polynomial_cooldown(power: Scalar) -> Cooldown:
    """f(u) = (1 - u)^power, for a power above 0."""
    check_range("power", power, low=0.0, open_low=True)

    def cooldown(fraction):
        left = 1 - fraction
        some = left > 0  # a power below 1 has no derivative at 0
        return jnp.where(some, jnp.where(some, left, 1) ** jnp.asarray(power, left.dtype), 0)

    return cooldown


def decay_schedule(
    peak: Scalar,
    total_steps: Scalar,
    cooldown: Cooldown,
    *,
    warmup_steps: Scalar = 0,
    end_value: Scalar = 0.0,
) -> optax.Schedule:
    """Linear warm-up from 0, then all the way down as peak → `end_value` along any `cooldown`, `step -> value`; it stays there after `total_steps`.

    All lengths are in steps and need not be whole; all numbers and the step may be traced, and the result has the dtype of `peak`. Raises
    `ValueError` for negative values, an empty run, a warm-up longer than the run, and an `end_value` above `peak`.
    """
    check_range("peak", peak, low=0.0)
    check_range("total_steps", total_steps, low=0.0, open_low=True)
    check_range("warmup_steps", warmup_steps, low=0.0, high=float(total_steps) if is_concrete(total_steps) else jnp.inf)
    check_range("end_value", end_value, low=0.0, high=float(peak) if is_concrete(peak) else jnp.inf)

    def formula(s, top, end, warm, total):
        share = cooldown(progress(s - warm, total - warm, 0))
        return progress(s, warm, 1) * (top * share + end * (1 - share))

    return as_schedule(peak, formula, peak, end_value, warmup_steps, total_steps)


def linear_schedule(peak: Scalar, total_steps: Scalar, *, warmup_steps: Scalar = 0, end_value: Scalar = 0.0) -> optax.Schedule:
    """A straight line from `peak` at the end of the warm-up to `end_value`: `decay_schedule` with `linear_cooldown`."""
    return decay_schedule(peak, total_steps, linear_cooldown, warmup_steps=warmup_steps, end_value=end_value)


def cosine_schedule(peak: Scalar, total_steps: Scalar, *, warmup_steps: Scalar = 0, end_value: Scalar = 0.0) -> optax.Schedule:
    """Half a cosine (Loshchilov, Hutter 2016, arXiv:1608.03983, without restarts): `decay_schedule` with `cosine_cooldown`.

    As `optax.warmup_cosine_decay_schedule(0, peak, warmup_steps, total_steps, end_value)`.
    """
    return decay_schedule(peak, total_steps, cosine_cooldown, warmup_steps=warmup_steps, end_value=end_value)


def inverse_sqrt_schedule(peak: Scalar, timescale: Scalar, *, warmup_steps: Scalar = 0) -> optax.Schedule:
    """peak √(τ / (τ + s - W)) after a linear warm-up of W steps, with τ = `timescale`; it needs no horizon.

    τ = W is peak √(W/s), the schedule of Vaswani et al. 2017 (arXiv:1706.03762, §5.3); τ = 1 and W = 0 is peak/√(s + 1) of convex optimisation.
    Raises `ValueError` for negative values or a timescale that is not positive.
    """
    check_range("peak", peak, low=0.0)
    check_range("timescale", timescale, low=0.0, open_low=True)
    check_range("warmup_steps", warmup_steps, low=0.0)

    def formula(s, top, tau, warm):
        return progress(s, warm, 1) * top * jnp.sqrt(tau / (tau + jnp.maximum(s - warm, 0)))

    return as_schedule(peak, formula, peak, timescale, warmup_steps)


def step_schedule(peak: Scalar, boundaries: Vector, *, scale: Scalar | Vector = 0.1) -> optax.Schedule:
    """`peak`, times `scale` from each of the `boundaries` (k,) on: the 30-60-90 schedule is `step_schedule(peak, [0.3 * T, 0.6 * T, 0.9 * T])`.

    `scale` is one factor or one for each boundary. As `optax.piecewise_constant_schedule`, whose boundaries are keys and cannot be traced. Raises
    `ValueError` for negative values and shapes that do not fit.
    """
    boundaries, scale = as_vector(boundaries), as_vector(scale)
    if boundaries.ndim != 1 or scale.shape not in ((), boundaries.shape):
        shapes = f"{boundaries.shape} and {scale.shape}"
        raise ValueError(f"`boundaries` must be a vector and `scale` one number or one for each of them, got shapes {shapes}.")
    check_range("peak", peak, low=0.0)
    check_range("boundaries", boundaries, low=0.0)
    check_range("scale", scale, low=0.0)

    def formula(s, top, knots, factor):
        return top * jnp.prod(jnp.where(s[..., None] >= knots, factor, 1), axis=-1)

    return as_schedule(peak, formula, peak, boundaries, scale)


def piecewise_schedule(
    boundaries: Vector,
    values: Vector,
    *,
    shape: Cooldown = linear_cooldown,
) -> optax.Schedule:
    """Through `values` (k,) at the steps `boundaries` (k,), each stretch along `shape`, level before the first and after the last, `step -> value`.

    Where two boundaries coincide the schedule jumps, and the later value holds. `shape` is a cooldown with f(1) = 0, such as `cosine_cooldown`. The
    result has the dtype of `values`. Raises `ValueError` for boundaries that decrease, fewer than two, and shapes that do not fit.
    """
    boundaries, values = as_vector(boundaries), as_vector(values)
    if boundaries.shape != values.shape or boundaries.ndim != 1 or boundaries.size < 2:
        shapes = f"{boundaries.shape} and {values.shape}"
        raise ValueError(f"`boundaries` and `values` must be vectors of one length, at least 2, got shapes {shapes}.")
    if is_concrete(boundaries) and (np.diff(np.asarray(boundaries)) < 0).any():
        raise ValueError(f"`boundaries` must not decrease, got {boundaries}.")
    return as_schedule(values, lambda s, knots, heights: _interpolate(s, knots, heights, shape), boundaries, values)


def one_cycle_schedule(
    peak: Scalar,
    total_steps: Scalar,
    *,
    rise_steps: Scalar | None = None,
    start_factor: Scalar = 25.0,
    end_factor: Scalar = 1e4,
    shape: Cooldown = cosine_cooldown,
) -> optax.Schedule:
    """From peak/`start_factor` up to `peak` at `rise_steps` (default 0.3 T) and down to peak/(`start_factor` `end_factor`) at T = `total_steps`.

    Smith, Topin 2017 (arXiv:1708.07120) in the form of fastai, PyTorch and `optax.cosine_onecycle_schedule`, whose defaults these are; momentum is
    left alone. Their variant of three straight stretches is a `piecewise_schedule`. Raises `ValueError` for values out of range.
    """
    if rise_steps is None:
        rise_steps = total_steps * 3 / 10
    check_range("peak", peak, low=0.0)
    check_range("total_steps", total_steps, low=0.0, open_low=True)
    check_range("rise_steps", rise_steps, low=0.0, high=float(total_steps) if is_concrete(total_steps) else jnp.inf)
    check_range("start_factor", start_factor, low=0.0, open_low=True)
    check_range("end_factor", end_factor, low=0.0, open_low=True)

    def formula(s, top, rise, total, start, end):
        return _interpolate(s, jnp.stack([jnp.zeros_like(rise), rise, total]), jnp.stack([top / start, top, top / (start * end)]), shape)

    return as_schedule(peak, formula, peak, rise_steps, total_steps, start_factor, end_factor)


def _interpolate(s, knots, heights, shape):
    i = jnp.clip(jnp.searchsorted(knots, s, side="right") - 1, 0, knots.size - 2)
    left, right = knots[i], knots[i + 1]
    share = shape(progress(s - left, right - left, (s >= left).astype(s.dtype)))
    return heights[i] * share + heights[i + 1] * (1 - share)


__all__ = [
    "cosine_schedule",
    "decay_schedule",
    "inverse_sqrt_schedule",
    "linear_schedule",
    "one_cycle_schedule",
    "piecewise_schedule",
    "polynomial_cooldown",
    "step_schedule",
]
