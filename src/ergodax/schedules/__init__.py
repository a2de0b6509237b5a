"""Learning-rate and other schedules, as `optax.Schedule`: `step -> value`. Horizons, rates and shapes may be traced and swept."""

from .wsd import (
    Cooldown as Cooldown,
    cosine_cooldown as cosine_cooldown,
    exponential_cooldown as exponential_cooldown,
    linear_cooldown as linear_cooldown,
    sqrt_cooldown as sqrt_cooldown,
    wsd_schedule as wsd_schedule,
)
