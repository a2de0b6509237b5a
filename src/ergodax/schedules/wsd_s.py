"""WSD-S: one run with a cooled-down checkpoint at each of several budgets, going on from the cooled-down weights.

Wen, Li, Wang, Hall, Liang, Ma 2024, "Understanding Warmup-Stable-Decay Learning Rates: A River Valley Loss Landscape Perspective" (arXiv:2410.05192,
§5): for budgets T_1 < T_2 < …, a linear warm-up, η_max, and n_k updates of decay before each T_k; at T_k the rate jumps back to η_max. WSD would
rewind to the checkpoint before the decay instead. Update T_k - n_k + j of a decay has s = (j + 1)/n_k, so that the last one before T_k runs at η_min,
and

    1/η(s) = (1 - s)/η_max + s/η_min,   η_min = η_max / 10.

The river valley behind it, L(x, y) = h y²/2 - c x with gradient noise of variance σ² in the steep y: at a constant rate E[h y²/2] settles at
η σ² / (2 (2 - ηh)), which a decay removes, while the progress c Σ η_t along the river is kept; decay as η ∝ 1/t removes it fastest.

A decay lasts about 10 % in the paper; whether of T_k or of the segment T_k - T_{k-1} is open. In the valley above 10 % of T_k costs up to 6 % of the
progress for budgets that double, 10 % of the segment costs nothing to speak of, and cyclic cosine costs 41 % (tests).
"""

import jax.numpy as jnp
import numpy as np
import optax

from ..core.check import check_range, is_concrete
from ..core.schedule import Cooldown, Vector, as_schedule, as_vector, progress
from ..core.types import Scalar


def reciprocal_cooldown(end_share: Scalar = 0.1) -> Cooldown:
    """1/f(u) = 1 - u + u/end_share: the reciprocal of the rate is a straight line, and f(1) = `end_share`, the paper's 0.1 by default.

    Raises `ValueError` for a share outside (0, 1].
    """
    check_range("end_share", end_share, low=0.0, high=1.0, open_low=True)

    def cooldown(fraction):
        end = jnp.asarray(end_share, fraction.dtype)
        return end / (end * (1 - fraction) + fraction)

    return cooldown


def wsd_s_schedule(
    peak: Scalar,
    budgets: Vector,
    *,
    warmup_steps: Scalar = 0,
    decay_steps: Scalar | Vector | None = None,
    cooldown: Cooldown | None = None,
    end_value: Scalar = 0.0,
) -> optax.Schedule:
    """The WSD-S schedule, `step -> value`.

    - `peak`: η_max.
    - `budgets`: T_1 < T_2 < …, (k,): a decay ends with update T_k - 1, and update T_k has the peak again, also after the last, so that a list with
      more budgets gives the same schedule up to its own decays.
    - `warmup_steps`: default 0 (none); the value at step 0 is 0 otherwise.
    - `decay_steps`: n_k, one length or one for each budget, 0 for none. Default a tenth of each T_k; a tenth of each segment is
      `0.1 * jnp.diff(budgets, prepend=0)`.
    - `cooldown`: its shape, default `reciprocal_cooldown()`, which ends at peak/10; `end_value`: where a cooldown that reaches 0 ends, default 0.

    All but the number of budgets may be traced and swept, the step too; lengths need not be whole. The result has the dtype of `peak`. Raises
    `ValueError` for negative values, budgets that do not increase, an `end_value` above `peak`, and decays that do not fit.
    """
    budgets = as_vector(budgets)
    if budgets.ndim != 1 or not budgets.size:
        raise ValueError(f"`budgets` must be a vector of at least one number of steps, got shape {budgets.shape}.")
    decay_steps = budgets / 10 if decay_steps is None else as_vector(decay_steps)
    if decay_steps.shape not in ((), budgets.shape):
        raise ValueError(f"`decay_steps` must be one number or one for each budget, shape {budgets.shape}, got shape {decay_steps.shape}.")
    if cooldown is None:
        cooldown = reciprocal_cooldown()
    check_range("peak", peak, low=0.0)
    check_range("warmup_steps", warmup_steps, low=0.0)
    check_range("decay_steps", decay_steps, low=0.0)
    check_range("end_value", end_value, low=0.0, high=float(peak) if is_concrete(peak) else jnp.inf)
    if is_concrete((budgets, decay_steps, warmup_steps)):
        segments = np.diff(np.asarray(budgets, float), prepend=0.0)
        if (segments <= 0).any():
            raise ValueError(f"`budgets` must be positive and increase, got {budgets}.")
        if (np.asarray(decay_steps, float) > (segments - float(warmup_steps) * (np.arange(segments.size) == 0)) * (1 + 1e-6)).any():
            raise ValueError(f"each decay must fit between its budget and the one before (or the warm-up), got {decay_steps} for {budgets}.")

    def formula(s, top, end, warm, targets, lengths):
        k = jnp.minimum(jnp.searchsorted(targets, s, side="right"), targets.size - 1)
        length = jnp.broadcast_to(lengths, targets.shape)[k]
        share = cooldown(progress(s - (targets[k] - length) + 1, length, 0))
        share = jnp.where(s < targets[-1], share, 1)
        return progress(s, warm, 1) * (top * share + end * (1 - share))

    return as_schedule(peak, formula, peak, end_value, warmup_steps, budgets, decay_steps)


__all__ = ["reciprocal_cooldown", "wsd_s_schedule"]
