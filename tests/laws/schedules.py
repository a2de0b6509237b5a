"""Rows of `ergodax.schedules`."""

import jax.numpy as jnp

from ergodax.schedules import exponential_cooldown, wsd_schedule
from ergodax.testing import Plug


def wsd_schedule_(hyper, x, key):
    cooldown = exponential_cooldown(hyper["half_life"])
    return wsd_schedule(hyper["peak"], hyper["total"], warmup_steps=hyper["warmup"], decay_steps=hyper["decay"], cooldown=cooldown)(x)


ROWS = {
    "wsd_schedule": Plug(
        wsd_schedule_,
        # An example is a step in each stretch; none is on a knot, where the schedule has no derivative.
        jnp.array([3.3, 40.0, 91.3, 97.7]) + 0.2 * jnp.arange(4.0)[:, None],
        {"peak": (0.1, 0.2), "total": (100.0, 110.0), "warmup": (10.0, 20.0), "decay": (12.0, 20.0), "half_life": (0.3, 0.5)},
    ),
}
