"""Rows of `ergodax.tuning`."""

import jax
import jax.numpy as jnp

from ergodax.core import (
    Lanes,
    replay,
)
from ergodax.testing import Plug
from ergodax.tuning import AsynchronousHalving, Perturb, PopulationBasedTraining, SuccessiveHalving


CURVES = jax.random.normal(jax.random.key(2), (4, 6, 4))


def successive_halving(hyper, x, key):
    return replay(SuccessiveHalving(4, eta=2), x)


def asynchronous_halving(hyper, x, key):
    return replay(AsynchronousHalving(3, 4, eta=2), x)


def population_based_training(hyper, x, key):
    rule = PopulationBasedTraining(4, Perturb({"rate": (0.01, 1.0)}, (hyper["down"], 1.2)), fraction=0.3)
    lane = jnp.arange(len(x), dtype=jnp.int32)
    return rule(key, Lanes(x[:, 0], {"rate": x[:, 1] ** 2}, lane, jnp.full_like(lane, 2), {}), rule.init(len(x)))


ROWS = {
    "asynchronous_halving": Plug(asynchronous_halving, CURVES, differentiable=False),
    "population_based_training": Plug(population_based_training, CURVES, {"down": (0.8, 0.5)}, random=True, differentiable=False),
    "successive_halving": Plug(successive_halving, CURVES, differentiable=False),
}
