"""The convex last-iterate bound: what a learning-rate schedule can promise, the best base rate for it, and the schedule that promises most.

Schaipp, Hägele, Taylor, Simsekli, Bach 2025, "The Surprising Agreement Between Convex Optimization Theory and Learning-Rate Scheduling for Large
Model Training" (arXiv:2501.18965), Theorem 1, which is Theorem 10 of Defazio, Cutkosky, Mehta, Mishchenko 2023 (arXiv:2310.07831). For a convex f,
subgradients with ‖g_t‖ ≤ G_t, D = ‖x_1 - x*‖ and x_{t+1} = x_t - η_t g_t, the expected gap of the last iterate, f(x_T) - f*, is at most

    Ω_T = D²/(2 Σ_t η_t) + Σ_t η_t² G_t² / (2 Σ_t η_t) + ½ Σ_{k<T} η_k / (Σ_{t>k} η_t) · (Σ_{t≥k} η_t² G_t²) / (Σ_{t≥k} η_t).

For η_t = γ s_t this is A/γ + γ B, so the best base rate is γ* = √(A/B), where the bound is 2 √(AB). Real training runs follow it closely: it ranks
schedules, explains why a cooldown drops the loss, and carries the best base rate from one schedule or horizon to another by the ratio of γ*.

**Rates.** Entry k of `rates` is that of update k, so a schedule goes in as `schedule(jnp.arange(T))`. The last rate makes no step that is judged
(x_T is where the T-th gradient is taken), but must be positive: Ω is infinite if it is 0. A schedule that reaches 0 at step T, as `wsd_schedule` with
`total_steps=T` does, is what the authors plan over T + 1 steps and judge on the first T. (1 + cos πu)/2 rounds to 0 near its end in float32: judge
cosines of more than some 5000 steps in float64.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ..core.check import check_count, check_range, is_concrete
from ..core.types import Scalar


class TunedBound(NamedTuple):
    """A shape at its best base rate: γ*, and Ω there."""

    base_rate: Float[Array, ""]
    value: Float[Array, ""]


class ConvexScheduleBound(eqx.Module):
    """Ω as a law, `bound(rates) -> value`: rates of shape (T,), not negative, in O(T).

    - `gradient_norms`: G_t, one for all steps or (T,), such as those recorded in a run. Default 1.
    - `distance`: D. Default 1. Only D/G moves γ*, and only D G scales the tuned value.

    Results have the dtype of `rates`. Raises `ValueError` for rates or norms that are negative or have the wrong shape, and for a distance that is
    not positive.
    """

    gradient_norms: Float[Array, "..."] | Scalar = 1.0
    distance: Scalar = 1.0

    def __check_init__(self):
        check_range("gradient_norms", self.gradient_norms, low=0.0)
        check_range("distance", self.distance, low=0.0, open_low=True)

    def _parts(self, rates, steps):
        """A and B of Ω = A/γ + γ B for the first `steps` rates. Sums run backwards, so that none is a difference of large ones."""
        if rates.ndim != 1 or rates.size == 0:
            raise ValueError(f"`rates` must be a vector of at least one rate, got shape {rates.shape}.")
        norms = jnp.asarray(self.gradient_norms, rates.dtype)
        if norms.ndim and norms.shape != rates.shape:
            raise ValueError(f"`gradient_norms` must be a scalar or have the shape of `rates`, {rates.shape}, got {norms.shape}.")
        check_range("rates", rates, low=0.0)
        check_range("steps", steps, low=1, high=rates.size)
        last = (rates.size if steps is None else steps) - 1
        k = jnp.arange(rates.size)
        rates = jnp.where(k <= last, rates, 0)
        energy = jax.lax.cumsum((rates * norms) ** 2, reverse=True)  # Σ_{t≥k} η_t² G_t²
        here = jax.lax.cumsum(rates, reverse=True)  # Σ_{t≥k} η_t
        after = jnp.append(here[1:], jnp.zeros_like(here[:1]))
        share = jnp.where(k < last, rates, 0) * energy
        reachable = after > 0
        terms = jnp.where(reachable, share / jnp.where(reachable, here * after, 1), jnp.where(share > 0, jnp.inf, 0))
        total = here[0]
        descent = energy[0] / jnp.where(total > 0, total, 1)
        return jnp.asarray(self.distance, rates.dtype) ** 2 / (2 * total), (descent + jnp.sum(terms)) / 2

    def __call__(self, rates: Float[Array, " steps"], steps: Scalar | None = None) -> Float[Array, ""]:
        """Ω at the end, or at iterate `steps` (1…T, may be traced): then later rates do not matter, so padded schedules share one program."""
        distance, noise = self._parts(rates, steps)
        return distance + noise

    def curve(
        self, rates: Float[Array, " steps"], at: Int[Array, " points"] | None = None, *, batch_size: int | None = None
    ) -> Float[Array, " points"]:
        """Ω_t at the iterates `at`, default 1…T: the predicted loss curve. O(T) work for each, `batch_size` of them at once (default one)."""
        check_range("at", at, low=1, high=rates.size)
        at = jnp.arange(1, rates.size + 1) if at is None else at
        return jax.lax.map(lambda t: self(rates, t), at, batch_size=batch_size)

    def tuned(self, shape: Float[Array, " steps"], steps: Scalar | None = None) -> TunedBound:
        """γ* and Ω for the schedule γ · `shape`."""
        distance, noise = self._parts(shape, steps)
        return TunedBound(jnp.sqrt(distance / noise), 2 * jnp.sqrt(distance * noise))

    def transfer(self, base_rate: Scalar, old: Float[Array, " before"], new: Float[Array, " after"]) -> Float[Array, ""]:
        """The base rate for the shape `new` (of any length) when `base_rate` was best for `old`: times γ*(new)/γ*(old).

        With recorded norms the lengths must be theirs; constant norms, whose value cancels, serve any.
        """
        return jnp.asarray(base_rate, new.dtype) * self.tuned(new).base_rate / self.tuned(old).base_rate.astype(new.dtype)


def optimise_schedule(
    bound: ConvexScheduleBound, start: Float[Array, " steps"], *, monotone: bool = False, max_steps: int = 200
) -> tuple[Float[Array, " steps"], TunedBound]:
    """The rates that make Ω smallest, by gradient: (shape with largest rate 1, its best base rate and Ω).

    - `start`: a positive shape of the length of the run, such as ones. The result is never worse than it, made monotone by its running minimum.
    - `monotone`: only shapes that never rise. For constant norms both kinds end at linear decay but for the last few rates.
    - `max_steps`: of L-BFGS, on the logarithms of the rates, or of their falls; default 200; 400 rates are done after 60.

    Under differentiation the shape is held fixed, which is exact for the value (it is a minimum) and leaves out how the shape moves.
    Raises `ValueError` for a start that is not positive.
    """
    check_count("max_steps", max_steps)
    check_range("start", start, low=0.0, open_low=True)

    def shape(z):
        rates = jnp.exp(z - jnp.max(z))
        rates = jax.lax.cumsum(rates, reverse=True) if monotone else rates
        return rates / jnp.max(rates)

    start = (jax.lax.cummin(start) if monotone else start) / jnp.max(start)
    falls = start - jnp.append(start[1:], jnp.zeros_like(start[:1]))
    z = jnp.log(jnp.maximum(falls, 1 / start.size) if monotone else start)  # a fall of 0 would stay so

    def value(z):
        return jnp.log(bound.tuned(shape(z)).value)

    optimiser, value_and_grad = optax.lbfgs(), optax.value_and_grad_from_state(value)

    def descend(carry, _):
        z, state = carry
        now, gradient = value_and_grad(z, state=state)
        update, state = optimiser.update(gradient, state, z, value=now, grad=gradient, value_fn=value)
        return (z + update, state), None

    with jax.numpy_dtype_promotion("standard"):  # optax's line search mixes its own integers and floats
        (z, _), _ = jax.lax.scan(descend, (z, optimiser.init(z)), length=max_steps)
    better = shape(jax.lax.stop_gradient(z))
    best = jnp.where(bound.tuned(better).value <= bound.tuned(start).value, better, jax.lax.stop_gradient(start))
    return best, bound.tuned(best)


def matching_parameter(
    bound: ConvexScheduleBound,
    family: Callable[[Float[Array, ""]], Float[Array, " steps"]],
    base_rate: Scalar,
    low: Scalar,
    high: Scalar,
) -> Float[Array, ""]:
    """The c in [low, high] for which γ* of the shape `family(c)` is `base_rate`: how to extend a run at the rate it was tuned for.

    The best rate falls with the horizon, but a run that is to be continued has already made its constant stretch at γ*(T₁). The authors' remedy is a
    longer cooldown (c its share of T₂), or a lower rate after the old stretch (c the factor), such that the old rate is the best one again for all
    T₂ steps. `base_rate` is in the units of `bound`: `bound.tuned(old shape).base_rate`.

    50 halvings of the range, so γ* should be continuous in c (count a cooldown in fractions of steps) and monotone. If no c fits, the end that comes
    closer is returned. Everything may be traced; under differentiation the result is constant. Raises `ValueError` for an empty range.
    """
    check_range("base_rate", base_rate, low=0.0, open_low=True)
    if is_concrete((low, high)) and not low < high:
        raise ValueError(f"`low` must be below `high`, got {low} and {high}.")
    dtype = jnp.result_type(base_rate) if jnp.issubdtype(jnp.result_type(base_rate), jnp.floating) else jnp.result_type(float)
    ends = jnp.stack([jnp.asarray(low, dtype), jnp.asarray(high, dtype)])

    def excess(c):
        return jnp.log(bound.tuned(family(c)).base_rate.astype(dtype) / base_rate)

    first, last = excess(ends[0]), excess(ends[1])

    def halve(_, ends):
        middle = jnp.mean(ends)
        beyond = excess(middle) * first <= 0
        return jnp.where(beyond, jnp.stack([ends[0], middle]), jnp.stack([middle, ends[1]]))

    inside = jnp.mean(jax.lax.fori_loop(0, 50, halve, ends))
    closer = jnp.where(jnp.abs(first) <= jnp.abs(last), ends[0], ends[1])
    return jax.lax.stop_gradient(jnp.where(first * last <= 0, inside, closer))


__all__ = ["ConvexScheduleBound", "TunedBound", "matching_parameter", "optimise_schedule"]
