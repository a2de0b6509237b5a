"""The hybrid schedule of Stable LM 2: a quarter of a cosine, an inverse square root that needs no horizon, and a short line down to 0.

Bellagente, Tow, Mahan, Phung et al. 2024, "Stable LM 2 1.6B Technical Report" (arXiv:2402.17834), for M, m the largest and the smallest rate, N
the planned number of updates and i the update:

    η_i = min(i/N_w, 1) · ( m + (M - m)/2 · (cos(2πi/N) + 1) )   for i ≤ N/4,
          α / √(i + β)                                           for i > N/4,

then linearly to 0 from the value reached. α and β make value and slope continuous at N/4, where they are (M + m)/2 and -(M - m) π/N:

    N/4 + β = N (M + m) / (4π (M - m)),   α = (M + m)/2 · √(N/4 + β).

The square-root stretch does not know the end, so a run may be cooled down, or continued, from anywhere in it: pass `period` = N and another
`total_steps`. Deviation: the report says only that the rate warms up linearly; the factor above, counted from update 0, keeps it continuous.
"""

import jax.numpy as jnp
import optax

from ..core.check import check_range, is_concrete
from ..core.schedule import as_schedule, progress
from ..core.types import Scalar


def hybrid_schedule(
    peak: Scalar,
    total_steps: Scalar,
    *,
    period: Scalar | None = None,
    low_value: Scalar | None = None,
    warmup_steps: Scalar | None = None,
    decay_steps: Scalar | None = None,
) -> optax.Schedule:
    """The hybrid schedule, `step -> value`. The defaults keep the proportions of the report's run: 540 000 updates, M = 1e-3, m = 1e-4.

    - `peak`: M. `low_value`: m, default M/10; the trough of the cosine, not the end of the run.
    - `total_steps`: the end, where the rate is 0, and stays. `period`: N, default `total_steps`.
    - `warmup_steps`: N_w, default 0.018 N (9720 of 540 000). `decay_steps`: of the last line, default 4/27 of `total_steps` (80 000 of 540 000).

    Lengths need not be whole; all numbers and the step may be traced and swept. The result has the dtype of `peak`. Raises `ValueError` for negative
    values, an empty run or period, m above M, or a warm-up and a last line that do not fit into the run.
    """
    period = total_steps if period is None else period
    low_value = peak / 10 if low_value is None else low_value
    warmup_steps = period * 9 / 500 if warmup_steps is None else warmup_steps
    decay_steps = total_steps * 4 / 27 if decay_steps is None else decay_steps
    check_range("peak", peak, low=0.0)
    check_range("low_value", low_value, low=0.0, high=float(peak) if is_concrete(peak) else jnp.inf)
    check_range("total_steps", total_steps, low=0.0, open_low=True)
    check_range("period", period, low=0.0, open_low=True)
    check_range("warmup_steps", warmup_steps, low=0.0)
    check_range("decay_steps", decay_steps, low=0.0)
    lengths = (warmup_steps, decay_steps, total_steps)
    if is_concrete(lengths) and float(warmup_steps) + float(decay_steps) > float(total_steps) * (1 + 1e-6):
        raise ValueError("`warmup_steps` + `decay_steps` must be at most `total_steps`, got {} + {} > {}.".format(*lengths))

    def formula(s, top, low, warm, decay, total, whole):
        i = jnp.clip(s, 0, total - decay)  # the last line starts from the value reached there
        mean, half = (top + low) / 2, (top - low) / 2
        cosine = mean + half * jnp.cos(2 * jnp.pi * i / whole)
        inverse_width = 4 * jnp.pi * half / (whole * jnp.where(mean > 0, mean, 1))  # 1/(N/4 + β), finite at m = M
        tail = mean / jnp.sqrt(1 + inverse_width * jnp.maximum(i - whole / 4, 0))
        return progress(s, warm, 1) * jnp.where(i <= whole / 4, cosine, tail) * (1 - progress(s - (total - decay), decay, 0))

    return as_schedule(peak, formula, peak, low_value, *lengths, period)


__all__ = ["hybrid_schedule"]
