"""Rows of `ergodax.schedules`."""

import jax
import jax.numpy as jnp

from ergodax.schedules import (
    ConvexScheduleBound,
    RateSearch,
    autolrs_stage,
    averaging_bound,
    budget_aware_schedule,
    cycled,
    exponential_cooldown,
    hybrid_schedule,
    last_iterate_rates,
    median_filtered,
    optimise_schedule,
    reciprocal_cooldown,
    record_gradient_norms,
    refined_rates,
    rex_schedule,
    sampled,
    tabulated_schedule,
    wsd_s_schedule,
    wsd_schedule,
)
from ergodax.testing import Plug


def wsd_schedule_(hyper, x, key):
    cooldown = exponential_cooldown(hyper["half_life"])
    return wsd_schedule(hyper["peak"], hyper["total"], warmup_steps=hyper["warmup"], decay_steps=hyper["decay"], cooldown=cooldown)(x)


def convex_schedule_bound(hyper, x, key):
    bound = ConvexScheduleBound(hyper["gradient_norms"], hyper["distance"])
    optimised = optimise_schedule(bound, x, max_steps=40)[1]
    return bound.tuned(x), bound(hyper["rate"] * x), bound.curve(x, jnp.array([2, 4])), optimised.value


def refined_schedule(hyper, x, key):
    recorder = record_gradient_norms(8)

    def step(state, scale):
        return recorder.update({"a": scale * jnp.array([3.0, 4.0], x.dtype)}, state)[1], None

    state, _ = jax.lax.scan(step, recorder.init({"a": x[:2]}), x)
    rates = refined_rates(median_filtered(state.norms, 0.4), hyper["power"])
    schedule = tabulated_schedule(rates, hyper["peak"], hyper["total"])
    return schedule(jnp.array([0, 3, 9])), averaging_bound(rates, x, hyper["distance"]), last_iterate_rates(x)


def rex_(hyper, x, key):
    schedule = rex_schedule(hyper["peak"], hyper["total"], warmup_steps=hyper["warmup"], end_value=hyper["end"])
    return schedule(x), sampled(schedule, hyper["every"])(x)


def uba_schedule_(hyper, x, key):
    schedule = budget_aware_schedule(hyper["peak"], hyper["total"], hyper["phi"], warmup_steps=hyper["warmup"], end_value=hyper["end"])
    return cycled(schedule, hyper["total"], 2)(x)


def wsd_s_(hyper, x, key):
    budgets, decays = jnp.stack([hyper["first"], hyper["second"]]), jnp.stack([hyper["decay"], 2 * hyper["decay"]])
    cooldown = reciprocal_cooldown(hyper["end_share"])
    return wsd_s_schedule(hyper["peak"], budgets, warmup_steps=hyper["warmup"], decay_steps=decays, cooldown=cooldown)(x)


def stablelm2_hybrid_lr_(hyper, x, key):
    lengths = {"period": hyper["period"], "warmup_steps": hyper["warmup"], "decay_steps": hyper["decay"]}
    return hybrid_schedule(hyper["peak"], hyper["total"], low_value=hyper["low"], **lengths)(x)


def autolrs_(hyper, x, key):
    """One stage on a quadratic with noise: state, rates, forecasts."""
    h = {name: value.astype(x.dtype) for name, value in hyper.items()}
    curvatures = jnp.array([1.0, 0.3], x.dtype)

    def train(w, rate, steps):
        def step(w, key):
            w = w - rate * curvatures * w + 0.01 * rate * jax.random.normal(key, w.shape, w.dtype)
            return w, jnp.sum(curvatures * w**2) / 2

        return jax.lax.scan(step, w, jax.random.split(key, steps))

    search = RateSearch(h["low"], h["high"], h["kappa"], num_probes=3, num_candidates=17)
    w, stage = autolrs_stage(train, x, search, 16, probe_steps=8)
    return w, stage.rate, stage.rates, stage.forecasts


ROWS = {
    "wsd_schedule": Plug(
        wsd_schedule_,
        # An example is a step in each stretch; none is on a knot, where the schedule has no derivative.
        jnp.array([3.3, 40.0, 91.3, 97.7]) + 0.2 * jnp.arange(4.0)[:, None],
        {"peak": (0.1, 0.2), "total": (100.0, 110.0), "warmup": (10.0, 20.0), "decay": (12.0, 20.0), "half_life": (0.3, 0.5)},
    ),
    "convex_schedule_bound": Plug(
        convex_schedule_bound,
        jnp.linspace(1.0, 0.2, 6) + 0.05 * jnp.sin(jnp.arange(24.0).reshape(4, 6)),
        {"gradient_norms": (1.0, 2.0), "distance": (1.0, 0.5), "rate": (0.3, 0.1)},
        check_vma=False,  # the loop of optax's line search
    ),
    "refined_schedule": Plug(
        refined_schedule,
        jnp.array([5.0, 3.0, 2.0, 1.5, 1.2, 1.3, 1.1, 2.5]) + jnp.sin(jnp.arange(32.0).reshape(4, 8)) / 7,
        {"power": (2.0, 1.0), "peak": (0.1, 0.2), "total": (14.0, 20.0), "distance": (1.0, 2.0)},
    ),
    "rex": Plug(
        rex_,
        # An example is a step in the warm-up, two in the decay and one after it; none is on a knot or where a sample is taken.
        jnp.array([3.3, 40.3, 91.3, 120.3]) + 0.2 * jnp.arange(4.0)[:, None],
        {"peak": (0.1, 0.2), "total": (100.0, 110.0), "warmup": (10.0, 20.0), "end": (0.01, 0.02), "every": (3.0, 7.0)},
    ),
    "uba_schedule": Plug(
        uba_schedule_,
        # An example is a step in each warm-up and decay of two phases, and one after them; none is on a knot.
        jnp.array([3.3, 40.3, 91.3, 114.3, 150.3, 230.3]) + 0.2 * jnp.arange(4.0)[:, None],
        {"peak": (0.1, 0.2), "total": (100.0, 110.0), "phi": (0.5, 5.0), "warmup": (10.0, 20.0), "end": (0.01, 0.02)},
    ),
    "wsd_s": Plug(
        wsd_s_,
        # An example is a step in the warm-up, in both stable stretches and both decays, and one after them; none is on a knot.
        jnp.array([3.3, 30.3, 46.3, 70.3, 95.3, 120.3]) + 0.2 * jnp.arange(4.0)[:, None],
        {"peak": (0.1, 0.2), "first": (50.0, 51.0), "second": (100.0, 101.0), "warmup": (10.0, 20.0), "decay": (7.0, 6.0), "end_share": (0.1, 0.2)},
    ),
    "stablelm2_hybrid_lr": Plug(
        stablelm2_hybrid_lr_,
        # An example is a step in the warm-up, the cosine, the square root, the last line, and after it; none is on a knot.
        jnp.array([3.3, 20.3, 50.3, 91.3, 120.3]) + 0.2 * jnp.arange(4.0)[:, None],
        {"peak": (0.1, 0.2), "total": (100.0, 110.0), "period": (120.0, 140.0), "low": (0.01, 0.02), "warmup": (10.0, 15.0), "decay": (20.0, 30.0)},
    ),
    "autolrs": Plug(
        autolrs_,
        1 + 0.1 * jax.random.normal(jax.random.key(0), (4, 2)),
        hyper={"low": (0.01, 0.03), "high": (0.9, 0.6), "kappa": (1e6, 0.0)},
        random=True,
        differentiable=False,
    ),
}
