"""Unified budget-aware (UBA) schedule: one parameter between a constant rate with a late drop, cosine annealing, and an early decay.

Tang, Dong, Zeng, Xun, Lin 2025, "Stepsize anything: A unified learning rate schedule for budgeted-iteration training" (arXiv:2505.24452): the rates
that minimise the worst contraction over an interval of curvatures in T updates, relaxed to one parameter φ that follows the condition number,

    η_t = η_min + (η_max - η_min) · 2 (1 + cos(πt/T)) / (2φ + (2 - φ)(1 + cos(πt/T)))
        = η_min + (η_max - η_min) · v / (v + (φ/2)(1 - v)),   v = (1 + cos(πt/T)) / 2.

φ = 2 is cosine annealing, φ = 1 is the profile of REX applied to the cosine's, φ → 0 a constant rate that drops at T, and φ > 2 decays before the
cosine does. The authors suggest a small φ (0.25 … 1) for SGD and a larger one (2 … 10) for AdamW and for harder conditioning. Several phases with
restarts are `cycled(budget_aware_schedule(peak, period, phi), period, cycles)`. The phase πt/T is that of an independent implementation; a half-step
offset in the paper's own could not be ruled out.

On quadratics the best φ depends on the budget, the noise and the conditioning, and on whether the peak may pass the stability limit of a constant
rate, as a tuned peak of a decaying schedule does: it is not always ahead (tests).
"""

import jax.numpy as jnp
import optax

from ..core.check import check_range
from ..core.schedule import Cooldown, cosine_cooldown
from ..core.types import Scalar
from .classical import decay_schedule


def budget_aware_cooldown(phi: Scalar) -> Cooldown:
    """f(u) = v / (v + (φ/2)(1 - v)), v = (1 + cos πu)/2, for φ above 0."""
    check_range("phi", phi, low=0.0, open_low=True)

    def cooldown(fraction):
        left = cosine_cooldown(fraction)
        return left / (left + jnp.asarray(phi, left.dtype) / 2 * (1 - left))

    return cooldown


def budget_aware_schedule(
    peak: Scalar,
    total_steps: Scalar,
    phi: Scalar,
    *,
    warmup_steps: Scalar = 0,
    end_value: Scalar = 0.0,
) -> optax.Schedule:
    """From η_max = `peak` to η_min = `end_value` in `total_steps`, after a linear warm-up within them. φ may be swept as all else.

    The other arguments and errors are those of `decay_schedule`; also raises `ValueError` for a φ that is not positive.
    """
    return decay_schedule(peak, total_steps, budget_aware_cooldown(phi), warmup_steps=warmup_steps, end_value=end_value)


__all__ = ["budget_aware_cooldown", "budget_aware_schedule"]
