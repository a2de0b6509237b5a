"""Loss curves under learning-rate schedules: what laws such as `MultiPowerLaw` and `AnnealingLaw` are fitted on.

Step k has the rate η_k, k = 0…T-1, warm-up included, and S(t) = Σ_{k≤t} η_k is the area under the schedule. The laws see a schedule through S, and
through its drops d_k = η_{k-1} - η_k and the area since each of them, S_k(t) = Σ_{τ=k}^t η_τ:

    Σ_{W ≤ k ≤ t} d_k g(η_k, S_k(t)),   W the length of the warm-up.

**Cost.** For n points and K drops that sum takes n K values of g: 4 million for a cosine of 24000 steps logged 170 times. g varies slowly, so
`block=b` lets up to b steps between two points share one value, at the mean of their rates and areas weighted by |d_k|: first order in the block,
exact for constant stretches and lone drops, and b times cheaper. Drops of zero cost nothing if the rates can be read. With
b = 16 the predictions of published laws for real schedules change by 2e-5 at most, a hundredth of their errors.
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, Float, Int, Real

from ..core.check import check_count, check_range, is_concrete
from ..core.types import Scalar, Schedule


class RateHistory(eqx.Module):
    """A schedule as laws see it, and the steps at which the loss is asked for. Made by `rate_history`.

    - `rates`: η, (T,).
    - `at`: steps t, (n,), and `area`: S(t) there.
    - `drop`, `rate`, `before`, `last`: (K,) for every drop d, the rate η after it, the area before its step, and its (last) step.
    - `warmup`: W.
    """

    rates: Float[Array, " T"]
    at: Int[Array, " n"]
    area: Float[Array, " n"]
    drop: Float[Array, " K"]
    rate: Float[Array, " K"]
    before: Float[Array, " K"]
    last: Int[Array, " K"]
    warmup: int = eqx.field(static=True)

    def drop_sum(self, weight: Callable[[Float[Array, " K"], Float[Array, " K"]], Float[Array, " K"]]) -> Float[Array, " n"]:
        """Σ_{k ≤ t} d_k g(η_k, S_k(t)) at every t, for `weight` = g. Points are done in portions, so memory stays below some 100 MB."""
        if not self.drop.size:
            return jnp.zeros_like(self.area)

        def point(t_area):
            t, area = t_area
            past = self.last <= t
            return jnp.sum(jnp.where(past, self.drop * weight(self.rate, jnp.where(past, area - self.before, 0)), 0))

        return jax.lax.map(point, (self.at, self.area), batch_size=min(self.at.size, max(1, 2**21 // self.drop.size)))


def _blocks(at: np.ndarray, first: int, length: int, block: int) -> np.ndarray:
    """The number of the block of each step from `first` on: at most `block` steps, none with a point before its last step."""
    ends = np.unique(np.concatenate([at[at >= first], [length - 1]]))
    sizes = np.diff(np.concatenate([[first - 1], ends]))
    within = np.arange(length - first) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.cumsum(within % block == 0) - 1


def rate_history(
    rates: Float[Array, "..."] | Float[np.ndarray, "..."], at: Int[Array, "..."] | Int[np.ndarray, "..."], *, warmup: int = 0, block: int = 1
) -> RateHistory:
    """From the rates of all steps.

    - `rates`: η_0…η_{T-1}, floating and not negative; a schedule goes in as `schedule(jnp.arange(T))`. May be traced if `block` is 1.
    - `at`: the steps to predict, 0…T-1.
    - `warmup`: W, the steps of the ramp, whose rises are left out: drops count from step W on, and points must not lie before it. Default 0, which
      counts a ramp that is there as negative drops, as the code of the multi-power law does.
    - `block`: how many steps may share a value, see above. Default 1, exact.

    Raises `ValueError` for wrong shapes, rates that are negative or not finite, and steps outside of W…T-1.
    """
    check_count("warmup", warmup, low=0)
    check_count("block", block)
    rates, at = jnp.asarray(rates), jnp.asarray(at)
    if rates.ndim != 1 or rates.size <= warmup or not jnp.issubdtype(rates.dtype, jnp.floating):
        raise ValueError(f"`rates` must be a floating vector of more than `warmup` = {warmup} steps, got {rates.dtype} of shape {rates.shape}.")
    if at.ndim != 1 or at.size == 0 or not jnp.issubdtype(at.dtype, jnp.integer):
        raise ValueError(f"`at` must be a vector of at least one whole step, got {at.dtype} of shape {at.shape}.")
    check_range("rates", rates, low=0.0, open_high=True)
    check_range("at", at, low=warmup, high=rates.size - 1)
    area = jnp.cumsum(rates)
    first = max(warmup, 1)  # step 0 has no predecessor
    drop, rate, before, last = rates[first - 1 : -1] - rates[first:], rates[first:], area[first - 1 : -1], jnp.arange(first, rates.size)
    if block > 1:
        number = _blocks(np.asarray(at), first, rates.size, block)
        count, size = int(number[-1]) + 1 if number.size else 0, jnp.abs(drop)

        def total(values):
            return jax.ops.segment_sum(values, number, count, indices_are_sorted=True)

        mass = total(size)
        share = jnp.where(mass[number] > 0, size / jnp.where(mass[number] > 0, mass[number], 1), 0)
        drop, rate, before, last = total(drop), total(share * rate), total(share * before), jax.ops.segment_max(last, number, count)
    if is_concrete((drop, at)):
        seen = (np.asarray(drop) != 0) & (np.asarray(last) <= np.max(np.asarray(at)))
        drop, rate, before, last = drop[seen], rate[seen], before[seen], last[seen]
    return RateHistory(rates, at, area[at], drop, rate, before, last, warmup)


class LossCurve(eqx.Module):
    """A run: its schedule, seen at the logged steps, and the losses there. Made by `loss_curve`."""

    history: RateHistory
    losses: Float[Array, " n"]


def loss_curve(
    steps: Real[np.ndarray, "..."] | Real[Array, "..."],
    losses: Float[np.ndarray, "..."] | Float[Array, "..."],
    rates: Schedule | Float[np.ndarray, "..."] | Float[Array, "..."],
    *,
    warmup: int = 0,
    block: int = 1,
) -> LossCurve:
    """From the columns of a log.

    - `steps`: (n,), whole numbers that increase, from `warmup` on: laws do not describe a warm-up.
    - `losses`: (n,), positive. Smooth them first if they are those of single batches.
    - `rates`: a schedule, or the rates of ALL steps 0…T-1, T > the last of `steps`. For a log that has the rate only at its steps:
      `interpolate_rates`.
    - `warmup`, `block`: as for `rate_history`.

    Raises `ValueError`, with the place, for columns of different lengths, fewer than two points, numbers that are not finite, losses that are not
    positive, steps that do not increase or lie in the warm-up, and too few rates.
    """
    at, losses = np.asarray(steps), jnp.asarray(losses)
    if at.ndim != 1 or at.shape != losses.shape or at.size < 2:
        raise ValueError(f"`steps` and `losses` must be columns of one length of at least 2, got shapes {at.shape} and {losses.shape}.")
    if not np.issubdtype(at.dtype, np.integer):
        raise ValueError(f"`steps` must be whole numbers, got {at.dtype}: are the columns in order?")
    if (bad := np.flatnonzero(np.diff(at) <= 0)).size:
        raise ValueError(f"`steps` must increase, but row {bad[0] + 1} has {at[bad[0] + 1]} after {at[bad[0]]}.")
    if at[0] < warmup:
        raise ValueError(
            f"`steps` must not lie in the warm-up, 0…{warmup - 1}, which laws do not describe, but row 0 has {at[0]}: leave such rows out."
        )
    if is_concrete(losses) and (bad := np.flatnonzero(~((np.asarray(losses) > 0) & np.isfinite(np.asarray(losses))))).size:
        raise ValueError(f"`losses` must be positive and finite, but row {bad[0]} (step {at[bad[0]]}) has {losses[bad[0]]}.")
    every = jnp.asarray(rates(jnp.arange(at[-1] + 1)) if callable(rates) else rates)
    if every.ndim == 1 and every.size <= at[-1]:
        raise ValueError(
            f"`rates` must have an entry for every step up to the last logged one, {at[-1]}, got {every.size}: "
            "if they are those of the logged steps, use `interpolate_rates`."
        )
    return LossCurve(rate_history(every.astype(losses.dtype), at, warmup=warmup, block=block), losses)


def interpolate_rates(steps: Int[np.ndarray, " n"], rates: Real[np.ndarray, " n"], *, warmup: int = 0) -> Float[np.ndarray, " T"]:
    """Rates of all steps 0…max(steps) from those at logged ones: straight lines between, constant before, but for a linear ramp from 0 over `warmup`.

    A jump between two logged steps becomes a slope between them; give the schedule itself where you have it.
    """
    every = np.interp(np.arange(steps[-1] + 1), steps, rates)
    every[:warmup] = every[0] * np.arange(1, warmup + 1) / max(warmup, 1)
    return every


def histories_of(curves: Sequence[LossCurve]) -> list[RateHistory]:
    """What a law is called on."""
    return [curve.history for curve in curves]


def losses_of(curves: Sequence[LossCurve]) -> Float[Array, " n"]:
    """What it is fitted to: the losses of all curves, one after the other."""
    return jnp.concatenate([curve.losses for curve in curves])


def curve_numbers(curves: Sequence[LossCurve]) -> Int[Array, " n"]:
    """For every point the number of its curve: `blocks` for a bootstrap, or what to leave out."""
    return jnp.concatenate([jnp.full(curve.losses.shape, i) for i, curve in enumerate(curves)])


def curve_features(histories: Sequence[RateHistory]) -> list[Array]:
    """Steps, areas and rates at the points: what counts when a fitted law is asked about another schedule."""
    return [jnp.concatenate(parts) for parts in zip(*((h.at, h.area, h.rates[h.at]) for h in histories))]


def linear_start(
    area: Float[Array, " n"], exponent: Float[Array, ""], columns: Sequence[Float[Array, " n"]], losses: Float[Array, " n"]
) -> tuple[Float[Array, ""], ...]:
    """Logarithms of L_0, of A, and of what multiplies `columns` in L_0 + A area^-exponent + …, by least squares, kept away from 0: for `starts`."""
    stacked = jnp.stack([jnp.ones_like(area), (area / jnp.max(area)) ** -exponent, *columns], -1)
    size = jnp.max(jnp.abs(stacked), 0)
    size = jnp.where(size > 0, size, 1)
    found = jnp.log(jnp.maximum(jnp.linalg.lstsq(stacked / size, losses)[0], 1e-3 * jnp.mean(losses)) / size)
    return found[0], found[1] + exponent * jnp.log(jnp.max(area)), *found[2:]


def optimise_rates(
    law: Callable[[Sequence[RateHistory]], Float[Array, "1"]],
    total_steps: int,
    peak: Scalar,
    *,
    ramp: Float[Array, "..."] | Float[np.ndarray, "..."] | None = None,
    count_ramp: bool = False,
    end_value: Scalar = 0.0,
    max_steps: int = 200,
) -> tuple[Float[Array, " total_steps"], Float[Array, ""]]:
    """The schedule whose predicted final loss is lowest, of those that never rise after the warm-up: (rates, loss).

    η = end_value + (peak - end_value) (1 - what has fallen), with the falls the softmax of free numbers, one for each step and one for what never
    falls; L-BFGS on these, from linear decay. The result is no worse than that, and as good as the law: it says nothing of what the law has not seen.

    - `law`: fitted, `MultiPowerLaw` or `AnnealingLaw`; in its dtype's range, at `total_steps` (static), O(T) for a step of the search.
    - `peak`, `end_value`: the largest rate, and the smallest that is allowed (default 0).
    - `ramp`: the rates of the warm-up, kept (default none). `count_ramp`: whether the law counts its rises, as in `rate_history`.
    - `max_steps`: of L-BFGS, default 200; some 50 do for 24000 rates.
    """
    check_count("total_steps", total_steps, low=2)
    check_count("max_steps", max_steps)
    check_range("peak", peak, low=0.0, open_low=True)
    check_range("end_value", end_value, low=0.0, high=float(peak) if is_concrete(peak) else np.inf)
    dtype = jnp.result_type(*jax.tree.leaves(law))
    ramp = jnp.zeros(0, dtype) if ramp is None else jnp.asarray(ramp, dtype)
    if ramp.size >= total_steps:
        raise ValueError(f"`ramp` must be shorter than `total_steps` = {total_steps}, got {ramp.size} rates.")
    start = jnp.zeros(total_steps - ramp.size + 1, dtype)
    return _optimise(law, start, jnp.asarray(peak, dtype), jnp.asarray(end_value, dtype), ramp, count_ramp, max_steps)


@eqx.filter_jit
def _optimise(law, start, peak, end_value, ramp, count_ramp, max_steps):
    def rates_of(z):
        left = jax.lax.cumsum(jax.nn.softmax(z), reverse=True)[1:]
        return jnp.concatenate([ramp, end_value + (peak - end_value) * left])

    def final(z, law):
        rates = rates_of(z)
        return law([rate_history(rates, jnp.asarray([rates.size - 1]), warmup=0 if count_ramp else ramp.size)])[0]

    solver = optx.BestSoFarMinimiser(optx.LBFGS(rtol=1e-10, atol=1e-12))
    best = jax.lax.stop_gradient(optx.minimise(final, solver, start, law, max_steps=max_steps, throw=False).value)
    return rates_of(best), final(best, law)


__all__ = [
    "LossCurve",
    "RateHistory",
    "curve_features",
    "curve_numbers",
    "histories_of",
    "interpolate_rates",
    "loss_curve",
    "losses_of",
    "optimise_rates",
    "rate_history",
]
