"""Schedules made from schedules: started late, held between samples, repeated. Lengths may be traced, and any `optax.Schedule` may be wrapped."""

import jax.numpy as jnp
import optax

from ..core.check import check_range
from ..core.schedule import as_schedule, progress
from ..core.types import Scalar


def warmed_up(schedule: optax.Schedule, warmup_steps: Scalar, *, init_value: Scalar = 0.0) -> optax.Schedule:
    """A straight line from `init_value` to schedule(0) in `warmup_steps` steps, then `schedule` from its start: all of it comes later by the warm-up.

    As `optax.join_schedules([optax.linear_schedule(init_value, schedule(0), warmup_steps), schedule], [warmup_steps])`. Raises `ValueError` for
    negative lengths.
    """
    check_range("warmup_steps", warmup_steps, low=0.0)
    first = jnp.asarray(schedule(jnp.zeros(())))

    def formula(s, top, start, warm):
        fraction = progress(s, warm, 1)
        return jnp.where(s < warm, top * fraction + start * (1 - fraction), jnp.asarray(schedule(jnp.maximum(s - warm, 0)), s.dtype))

    return as_schedule(first, formula, first, init_value, warmup_steps)


def sampled(schedule: optax.Schedule, every: Scalar) -> optax.Schedule:
    """`schedule`, looked at only every `every` steps and held in between: schedule(⌊step/every⌋ every). Raises `ValueError` unless `every` > 0."""
    check_range("every", every, low=0.0, open_low=True)

    def held(step):
        s = _real(step)
        length = jnp.asarray(every, s.dtype)
        return schedule(jnp.floor(s / length) * length)

    return held


def cycled(schedule: optax.Schedule, period: Scalar, cycles: Scalar | None = None) -> optax.Schedule:
    """`schedule` again and again, from its start every `period` steps; after `cycles` of them (default: never) it goes on instead of restarting.

    A cosine schedule of `period` steps becomes SGDR (arXiv:1608.03983) with equal periods. Raises `ValueError` for values that are not positive.
    """
    check_range("period", period, low=0.0, open_low=True)
    check_range("cycles", cycles, low=0.0, open_low=True)

    def repeated(step):
        s = jnp.maximum(_real(step), 0)
        length = jnp.asarray(period, s.dtype)
        within = jnp.mod(s, length)
        if cycles is None:
            return schedule(within)
        count = jnp.asarray(cycles, s.dtype)
        return schedule(jnp.where(s < count * length, within, s - (count - 1) * length))

    return repeated


def _real(step):
    """A step as a float of its own dtype, or of the default one."""
    step = jnp.asarray(step)
    return step if jnp.issubdtype(step.dtype, jnp.floating) else step.astype(float)


__all__ = ["cycled", "sampled", "warmed_up"]
