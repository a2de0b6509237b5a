"""Rows of `ergodax.weights`."""

import jax

from ergodax.testing import Plug
from ergodax.weights import WSM, inverse_sqrt_decay


def wsm_(hyper, x, key):
    """A ring of 3 in which 5 checkpoints of a small run were stored: state and merge."""
    rule = WSM(3, inverse_sqrt_decay(hyper["ratio"].astype(x["w"].dtype)))

    def step(state, weights):
        return rule.update(state, weights), None

    state, _ = jax.lax.scan(step, rule.init({"w": x["w"][0], "b": x["b"][0]}), x)
    return state.checkpoints, rule.merge(state, {"w": x["w"][-1], "b": x["b"][-1]})


ROWS = {
    "wsm": Plug(
        wsm_,
        {"w": jax.random.normal(jax.random.key(0), (4, 5, 3)), "b": jax.random.normal(jax.random.key(1), (4, 5))},
        hyper={"ratio": (4.0, 20.0)},
    ),
}
