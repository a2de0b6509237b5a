"""Rows of `ergodax.optim`."""

import jax
import jax.numpy as jnp

from ergodax.optim import heavy_ball_step_decay
from ergodax.testing import Plug


def shb_step_decay_(hyper, x, key):
    """Six updates of a quadratic: the way, and the velocity."""
    h = {name: value.astype(x.dtype) for name, value in hyper.items()}
    transform = heavy_ball_step_decay(h["rate"], h["total_steps"], h["condition_number"], factor=h["factor"], num_stages=h["num_stages"])
    curvatures = jnp.array([1.0, 0.2], x.dtype)

    def step(carry, _):
        w, state = carry
        updates, state = transform.update(curvatures * w, state)
        return (w + updates, state), w

    (w, state), way = jax.lax.scan(step, (x, transform.init(x)), length=6)
    return way, w, state.velocity


ROWS = {
    "shb_step_decay": Plug(
        shb_step_decay_,
        jax.random.normal(jax.random.key(0), (4, 2)),
        hyper={"rate": (0.5, 0.9), "total_steps": (6.3, 8.1), "condition_number": (5.0, 9.0), "factor": (2.0, 3.0), "num_stages": (2.9, 1.9)},
    ),
}
