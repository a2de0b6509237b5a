"""Warmup-Stable-Decay (WSD): a linear warm-up, a long constant stretch, and a short cooldown at the end.

Hu, Tu, Han, He, Cui et al. 2024, "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies"
(arXiv:2404.06395, §4):

    WSD(T; s) = (s/W) η     for s < W,
                η           for W ≤ s < T,
                f(s - T) η  for s ≥ T,   f decreasing, 0 < f ≤ 1,

with W the end of the warm-up and T the end of the stable stretch. Their cooldown halves the rate every T_half steps, f(u) = 0.5^{u/T_half}; they
find that cooling down over a tenth of the run is enough. Before T the rate does not know the horizon, so any stable checkpoint can be cooled down,
or trained on: the whole curve of loss against data comes from one run.

Here the run's length is the argument, as in optax's schedules: T = `total_steps` - `decay_steps`. A cooldown is any function of the fraction of
itself that is done, with f(0) = 1, and is passed as an object. The paper's scaling law and batch-size law are `laws.AdditiveSurface` and
`laws.batch_size_of_loss`; its μP scaling is not here.
"""

import jax.numpy as jnp
import optax

from ..core.check import check_range, is_concrete
from ..core.schedule import Cooldown, as_schedule, progress
from ..core.types import Scalar


def exponential_cooldown(half_life: Scalar = 0.3) -> Cooldown:
    """f(u) = 0.5^{u / half_life}, the paper's cooldown.

    - `half_life`: as a share of the cooldown. The paper counts it in steps (5000): pass `5000 / decay_steps`. The default 0.3 is ours; it ends
      near a tenth of the rate, f(1) = 0.099.

    Raises `ValueError` for a half-life that is not positive.
    """
    check_range("half_life", half_life, low=0.0, open_low=True)

    def cooldown(fraction):
        return jnp.exp2(-fraction / jnp.asarray(half_life, fraction.dtype))

    return cooldown


def wsd_schedule(
    peak: Scalar,
    total_steps: Scalar,
    *,
    warmup_steps: Scalar = 0,
    decay_steps: Scalar | None = None,
    cooldown: Cooldown | None = None,
    end_value: Scalar = 0.0,
) -> optax.Schedule:
    """The WSD schedule, `step -> value`: from 0 up to `peak`, level, then down as peak → `end_value` along `cooldown`.

    - `peak`: the constant rate η.
    - `total_steps`: the length of the run. The cooldown is done there, and the schedule stays at its last value.
    - `warmup_steps`: W, default 0 (none). As in the paper the value at step 0 is 0 if W > 0, so an optimiser's first step does nothing; use
      `lambda step: schedule(step + 1)` to start from η/W instead.
    - `decay_steps`: the cooldown's length, default `total_steps / 10` (the paper's 10 %); 0 for none.
    - `cooldown`: its shape, default `exponential_cooldown()`.
    - `end_value`: where a cooldown that reaches f = 0 ends, default 0.

    Lengths are in steps and need not be whole, so a share is written as one: `decay_steps=0.2 * total_steps`. All of them, `peak` and `end_value`
    may be traced and swept in one compile, and so may the step, an integer or a float of any shape; before step 0 the value is that of step 0. The
    result has the dtype of `peak` (the default float for a Python number).

    Raises `ValueError` for negative values, an empty run, an `end_value` above `peak`, or a warm-up and a cooldown that do not fit into the run.
    """
    if decay_steps is None:
        decay_steps = total_steps / 10
    if cooldown is None:
        cooldown = exponential_cooldown()
    check_range("peak", peak, low=0.0)
    check_range("total_steps", total_steps, low=0.0, open_low=True)
    check_range("warmup_steps", warmup_steps, low=0.0)
    check_range("decay_steps", decay_steps, low=0.0)
    check_range("end_value", end_value, low=0.0, high=float(peak) if is_concrete(peak) else jnp.inf)
    lengths = (warmup_steps, decay_steps, total_steps)
    if is_concrete(lengths) and float(warmup_steps) + float(decay_steps) > float(total_steps) * (1 + 1e-6):  # two shares may round up
        raise ValueError("`warmup_steps` + `decay_steps` must be at most `total_steps`, got {} + {} > {}.".format(*lengths))

    def formula(s, top, end, warm, decay, total):
        share = cooldown(progress(s - (total - decay), decay, 0))
        return progress(s, warm, 1) * (top * share + end * (1 - share))

    return as_schedule(peak, formula, peak, end_value, *lengths)


__all__ = ["exponential_cooldown", "wsd_schedule"]
