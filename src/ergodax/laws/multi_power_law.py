"""The multi-power law: a whole loss curve from the schedule, with a power law for every drop of the rate.

Luo, Wen, Hu, Sun, Liu, Sun, Lyu, Chen 2025, "A Multi-Power Law for Loss Curve Prediction Across Learning Rate Schedules" (arXiv:2503.12811):

    L(t) = L_0 + A S(t)^{-α} - LD(t),   LD(t) = B Σ_{k≤t} (η_{k-1} - η_k) G(η_k^{-γ} S_k(t)),   G(x) = 1 - (C x + 1)^{-β},

with S(t) the area under the schedule, warm-up included, and S_k(t) = Σ_{τ=k}^t η_τ. Seven parameters, fitted on two or three short curves to
Huber's loss of log L with δ = 1e-3.

**The warm-up.** The sum starts after the ramp. The authors' code lets it run over the ramp too, whose rises are negative drops: that adds up to
B η_peak to the loss, later in training the more, and lowers L_0 by about as much. Published parameters belong to that convention:
`loss_curve(…, warmup=0)` gives it, `warmup=W` the other.

**Three fits.** `fit_multi_power_law` finds the minimum (Levenberg-Marquardt, from several starts). The authors stop long before it
(`early_stopped_fit`, their recipe: AdamW from a rough law), and predict better for it: on three curves the shape of G (C, β, γ) is hardly
determined, and the minimum runs away with it, to β near 0 and B of ten times its size. What early stopping does by accident, as AdamW's 200 steps
of 0.05 hardly move B, a prior can do on purpose: `ShapePrior` pulls B, C, β and γ towards the point from which the authors start, the B of a rough
law and (1, ½, ½). `cross_validated_fit` chooses how hard from the training curves alone, by leaving each of them out in turn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from ..core.check import check_count
from ..core.types import Scalar
from .curves import LossCurve, RateHistory, curve_features, curve_numbers, histories_of, linear_start, losses_of
from .fitting import LawFit, Objective, fit_law, huber_log, stack_laws
from .power_law import logarithms


class MultiPowerLaw(eqx.Module):
    """L_0 + A S^{-α} - LD, `law([history, …]) -> losses`, those of one history after those of the other.

    All but γ are positive and stored as logarithms. `of` takes, and properties give, the parameters themselves.
    """

    log_floor: Float[Array, "..."]
    log_coefficient: Float[Array, "..."]
    log_exponent: Float[Array, "..."]
    log_drop: Float[Array, "..."]
    log_scale: Float[Array, "..."]
    log_power: Float[Array, "..."]
    rate_power: Float[Array, "..."]

    @classmethod
    def of(
        cls, floor: Scalar, coefficient: Scalar, exponent: Scalar, drop: Scalar, scale: Scalar, power: Scalar, rate_power: Scalar
    ) -> "MultiPowerLaw":
        """From L_0, A, α, B, C, β (all positive) and γ, the authors' order."""
        logs = logarithms(floor=floor, coefficient=coefficient, exponent=exponent, drop=drop, scale=scale, power=power)
        return cls(**logs, rate_power=jnp.asarray(rate_power, logs["log_floor"].dtype))

    @classmethod
    def starts(cls, curves: Sequence[LossCurve]) -> "MultiPowerLaw":
        """Twelve starts: α and (C, β) from a small grid, γ = ½, and the rest, in which the law is linear, by least squares.

        C counts in the inverse of η^{-γ} S at the last point, so the starts know the unit of the rates; the first is near the authors' on theirs.
        """
        histories, losses = histories_of(curves), losses_of(curves)
        area = jnp.concatenate([history.area for history in histories])
        top, peak = jnp.max(area), jnp.max(jnp.stack([jnp.max(history.rates) for history in histories]))
        dtype = losses.dtype
        exponents, powers, scales = (
            axis.ravel() for axis in jnp.meshgrid(*(jnp.asarray(x, dtype) for x in ([0.3, 0.6], [0.3, 0.6], [10.0, 100.0, 1000.0])))
        )
        scales = scales / (top * peak**-0.5)
        half = jnp.asarray(0.5, dtype)

        def solve(exponent, power, scale):
            law = cls.of(1.0, 1.0, exponent, 1.0, scale, power, half)
            log_floor, log_coefficient, log_drop = linear_start(area, exponent, [-law.reduction(histories)], losses)
            return cls(log_floor, log_coefficient, law.log_exponent, log_drop, law.log_scale, law.log_power, half)

        return jax.vmap(solve)(exponents, powers, scales)

    @property
    def floor(self) -> Float[Array, "..."]:
        """L_0."""
        return jnp.exp(self.log_floor)

    @property
    def coefficient(self) -> Float[Array, "..."]:
        """A."""
        return jnp.exp(self.log_coefficient)

    @property
    def exponent(self) -> Float[Array, "..."]:
        """α."""
        return jnp.exp(self.log_exponent)

    @property
    def drop(self) -> Float[Array, "..."]:
        """B."""
        return jnp.exp(self.log_drop)

    @property
    def scale(self) -> Float[Array, "..."]:
        """C."""
        return jnp.exp(self.log_scale)

    @property
    def power(self) -> Float[Array, "..."]:
        """β."""
        return jnp.exp(self.log_power)

    def reduction(self, histories: Sequence[RateHistory]) -> Float[Array, " n"]:
        """LD at all points."""
        dtype = self.log_drop.dtype

        def weight(rate, area):
            rate, area = rate.astype(dtype), area.astype(dtype)
            some = area > 0  # not so where the rate is 0 for good
            x = jnp.where(some, area, 0) * jnp.exp(self.log_scale - self.rate_power * jnp.log(jnp.where(some & (rate > 0), rate, 1)))
            return -jnp.expm1(-self.power * jnp.log1p(x))

        return self.drop * jnp.concatenate([history.drop_sum(weight).astype(dtype) for history in histories])

    def __call__(self, histories: Sequence[RateHistory]) -> Float[Array, " n"]:
        area = jnp.concatenate([history.area for history in histories]).astype(self.log_floor.dtype)
        return self.floor + jnp.exp(self.log_coefficient - self.exponent * jnp.log(area)) - self.reduction(histories)


class _RoughLaw(eqx.Module):
    """L_0 + A S^{-α} - B (η_peak - η)."""

    log_floor: Float[Array, "..."]
    log_coefficient: Float[Array, "..."]
    log_exponent: Float[Array, "..."]
    log_drop: Float[Array, "..."]

    def __call__(self, area_fall: tuple[Array, Array]) -> Array:
        area, fall = area_fall
        power = jnp.exp(self.log_coefficient - jnp.exp(self.log_exponent) * jnp.log(area))
        return jnp.exp(self.log_floor) + power - jnp.exp(self.log_drop) * fall


def rough_law(curves: Sequence[LossCurve], *, objective: Objective | None = None, weights: Float[Array, "..."] | None = None) -> MultiPowerLaw:
    """The authors' first fit, of L_0 + A S^{-α} - B (η_peak - η), with C = 1 and β = γ = ½ put to it: where recipes start."""
    area = jnp.concatenate([curve.history.area for curve in curves])
    fall = jnp.concatenate([jnp.max(curve.history.rates) - curve.history.rates[curve.history.at] for curve in curves])
    first = MultiPowerLaw.starts(curves)
    starts = _RoughLaw(first.log_floor, first.log_coefficient, first.log_exponent, first.log_drop)
    law = fit_law(starts, (area, fall), losses_of(curves), objective=objective, weights=weights).law
    one = jnp.ones_like(law.log_drop)
    return MultiPowerLaw(law.log_floor, law.log_coefficient, law.log_exponent, law.log_drop, 0 * one, jnp.log(one / 2), one / 2)


class ShapePrior(eqx.Module):
    """√κ (5 log(B/B_0), ½ log(C/C_0), log(β/β_0), 2 (γ - γ_0)): a ridge of strength κ, in units of the objective.

    - `strength`: κ, may be traced.
    - `drop`: B_0, from the rough law, see `rough_law`.
    - `scale`, `power`, `rate_power`: C_0, β_0 and γ_0, default 1, ½ and ½. C_0 belongs to rates of the order of 1e-3.
    """

    strength: Scalar
    drop: Scalar
    scale: Scalar = 1.0
    power: Scalar = 0.5
    rate_power: Scalar = 0.5

    def __call__(self, law: MultiPowerLaw) -> Float[Array, "4"]:
        numbers = (self.strength, self.drop, self.scale, self.power, self.rate_power)
        strength, drop, scale, power, rate_power = (jnp.asarray(x, law.log_drop.dtype) for x in numbers)
        drop, scale, power = law.log_drop - jnp.log(drop), law.log_scale - jnp.log(scale), law.log_power - jnp.log(power)
        return jnp.sqrt(strength) * jnp.stack([5 * drop, scale / 2, power, 2 * (law.rate_power - rate_power)])


def fit_multi_power_law(
    curves: Sequence[LossCurve],
    *,
    objective: Objective | None = None,
    weights: Float[Array, "..."] | None = None,
    prior: ShapePrior | None = None,
    starts: MultiPowerLaw | None = None,
    max_steps: int = 300,
) -> LawFit[MultiPowerLaw]:
    """The minimum of the objective (default `huber_log(1e-3)`) over the points of all curves, from `starts` (default `MultiPowerLaw.starts`)."""
    starts = eqx.filter_jit(MultiPowerLaw.starts)(list(curves)) if starts is None else starts
    options = {"objective": objective, "weights": weights, "prior": prior, "max_steps": max_steps}
    return fit_law(starts, histories_of(curves), losses_of(curves), features=curve_features, **options)


def early_stopped_fit(
    curves: Sequence[LossCurve],
    *,
    objective: Objective | None = None,
    max_steps: int = 200,
    patience: int = 20,
    weight_decay: Scalar = 0.01,
    learning_rate: Scalar = 5e-2,
    exponent_rate: Scalar = 5e-3,
) -> tuple[MultiPowerLaw, Float[Array, ""]]:
    """The authors' recipe: (law, its objective), which is NOT a minimum.

    First L_0 + A S^{-α} - B (η_peak - η) is fitted. Then all seven parameters, from C = 1 and β = γ = ½, go by AdamW without logarithms, at rate
    `learning_rate` (default 5e-2) for L_0, A, B and C and `exponent_rate` (5e-3) for α, β and γ, for `max_steps` (200) or until `patience` (20) steps
    brought no new minimum; the best iterate is kept. Where that is hangs on rounding: figures of errors repeat to two digits elsewhere.
    """
    check_count("max_steps", max_steps)
    check_count("patience", patience)
    objective = huber_log() if objective is None else objective
    return _early_stopped(list(curves), objective, max_steps, patience, weight_decay, learning_rate, exponent_rate)


@eqx.filter_jit
def _early_stopped(curves, objective, max_steps, patience, weight_decay, learning_rate, exponent_rate):
    histories, losses = histories_of(curves), losses_of(curves)
    rough = rough_law(curves, objective=objective)
    half = jnp.asarray(0.5, losses.dtype)
    values = jnp.stack([rough.floor, rough.coefficient, rough.exponent, rough.drop, 2 * half, half, half])
    slow = jnp.asarray([False, False, True, False, False, True, True])
    rates = jnp.where(slow, exponent_rate, learning_rate).astype(losses.dtype)
    optimiser = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(weight_decay))

    def value(values):
        law = MultiPowerLaw.of(*values)
        return jnp.sum(objective(law(histories), losses) ** 2) / 2

    def step(carry):
        values, state, best, lowest, since, k = carry
        here, gradient = jax.value_and_grad(value)(values)
        better = here < lowest
        best, lowest, since = jnp.where(better, values, best), jnp.minimum(here, lowest), jnp.where(better, 0, since + 1)
        with jax.numpy_dtype_promotion("standard"):
            update, state = optimiser.update(gradient, state, values)
        return jax.tree.map(lambda value, change: value - rates * change, values, update), state, best, lowest, since, k + 1

    def go_on(carry):
        *_, since, k = carry
        return (since < patience) & (k < max_steps)

    lowest = jnp.full_like(values[0], jnp.inf)
    count = jnp.zeros_like(lowest, int)
    _, _, best, lowest, *_ = jax.lax.while_loop(go_on, step, (values, optimiser.init(values), values, lowest, count, count))
    return MultiPowerLaw.of(*best), lowest


class CrossValidation(NamedTuple):
    """What `cross_validated_fit` found: the fit on all curves, its strength, and the errors that chose it.

    - `errors`: (strengths, curves), the mean absolute error on each curve of the fit on the others.
    """

    fit: LawFit[MultiPowerLaw]
    strength: Float[Array, ""]
    strengths: Float[Array, " k"]
    errors: Float[Array, "k curves"]


def cross_validated_fit(
    curves: Sequence[LossCurve],
    *,
    strengths: Float[Array, " k"] | Float[np.ndarray, " k"] | None = None,
    objective: Objective | None = None,
    max_steps: int = 100,
) -> CrossValidation:
    """The fit under `ShapePrior`, as strong as the training curves ask for.

    Every curve is predicted by fits on the others, at all `strengths` (increasing; default nine from 1e-6 to 1e-2) in one program. Of the strengths
    whose mean error is within one standard error (over curves) of the smallest, the strongest is taken: the rule of one standard error
    (Breiman, Friedman, Olshen, Stone 1984). Nothing else is looked at. All may be traced, except for shapes.

    Raises `ValueError` for fewer than three curves: of two, a fit has one.
    """
    if len(curves) < 3:
        raise ValueError(f"`curves` must be at least three, for each to be left out in turn, got {len(curves)}.")
    strengths = jnp.geomspace(1e-6, 1e-2, 9, dtype=losses_of(curves).dtype) if strengths is None else jnp.asarray(strengths)
    return _cross_validated(list(curves), strengths, huber_log() if objective is None else objective, max_steps)


@eqx.filter_jit
def _cross_validated(curves, strengths, objective, max_steps):
    histories, losses, numbers = histories_of(curves), losses_of(curves), curve_numbers(curves)

    def fitted(strength, weights):
        rough = rough_law(curves, objective=objective, weights=weights)
        prior = ShapePrior(strength, rough.drop)
        return fit_multi_power_law(curves, objective=objective, weights=weights, prior=prior, starts=stack_laws(rough), max_steps=max_steps)

    def error(strength, number):
        out = numbers == number
        law = fitted(strength, jnp.where(out, 0, jnp.ones_like(losses))).law
        return jnp.sum(jnp.where(out, jnp.abs(law(histories) - losses), 0)) / jnp.sum(jnp.where(out, jnp.ones_like(losses), 0))

    errors = jax.vmap(lambda strength: jax.vmap(lambda number: error(strength, number))(jnp.arange(len(curves))))(strengths)
    mean, spread = jnp.mean(errors, 1), jnp.std(errors, 1, ddof=1) / jnp.sqrt(jnp.asarray(len(curves), errors.dtype))
    best = jnp.argmin(mean)
    chosen = jnp.max(jnp.where(mean <= mean[best] + spread[best], jnp.arange(strengths.size), 0))
    strength = strengths[chosen]
    return CrossValidation(fitted(strength, jnp.ones_like(losses)), strength, strengths, errors)


__all__ = [
    "CrossValidation",
    "MultiPowerLaw",
    "ShapePrior",
    "cross_validated_fit",
    "early_stopped_fit",
    "fit_multi_power_law",
    "rough_law",
]
