"""REX, reflected exponential: a schedule for short budgets that stays above the straight line and falls fastest at the end.

Chen, Wolfe, Kyrillidis 2021, "REX: Revisiting Budgeted Training with an Improved Schedule" (arXiv:2107.04197): with progress z = t/T,

    η_t = η_0 p(z),   p(z) = (1 - z) / (1/2 + (1 - z)/2) = 2 (1 - z) / (2 - z).

The paper separates a schedule into a profile, such as p, and a sampling rate, how often the rate is taken from it; REX samples at every update,
other rates are `sampled(rex_schedule(...), every=0.05 * T)`. Its delayed variants are WSD schedules, `wsd_schedule(..., cooldown=rex_cooldown)`.
There is no parameter but T and η_0, and momentum is left alone. Deviation: warm-up and end value, which the paper does not use, are those of all
schedules here.

Where it helps: runs so short that what is left of the start, not the noise, dominates, at a peak that cannot be raised further. On SGD with
λ_i = 1/i, i ≤ 100, and peaks up to 1.9 it is ahead of linear and cosine at 100 updates; behind both at 500 and 2000, or with larger peaks (tests).
"""

import optax
from jaxtyping import Array, Float

from ..core.types import Scalar
from .classical import decay_schedule


def rex_cooldown(fraction: Float[Array, "..."]) -> Float[Array, "..."]:
    """f(u) = 2 (1 - u) / (2 - u): concave, with slopes -1/2 at the start and -2 at the end."""
    return 2 * (1 - fraction) / (2 - fraction)


def rex_schedule(peak: Scalar, total_steps: Scalar, *, warmup_steps: Scalar = 0, end_value: Scalar = 0.0) -> optax.Schedule:
    """From `peak` to `end_value` in `total_steps` along p, after a linear warm-up within them; arguments and errors of `decay_schedule`."""
    return decay_schedule(peak, total_steps, rex_cooldown, warmup_steps=warmup_steps, end_value=end_value)


__all__ = ["rex_cooldown", "rex_schedule"]
