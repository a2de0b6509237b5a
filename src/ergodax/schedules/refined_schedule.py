"""Schedules by refinement: a run's gradient norms say which schedule the next run should have.

Defazio, Cutkosky, Mehta, Mishchenko 2023, "When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement" (arXiv:2310.07831).
Weights w_t > 0 that are good for the average iterate make a schedule for the last one: with

    η_t = w_t · (Σ_{p>t} w_p) / (Σ_p w_p),

the last of T iterates of stochastic subgradient descent on a convex f satisfies (Theorem 1, no logarithm)

    E f(x_T) - f* ≤ (D² + Σ_t w_t² ‖g_t‖²) / (2 Σ_t w_t).

Constant weights give linear decay, D/(G√T) (1 - t/T). For known norms w_t ∝ ‖g_t‖^-2 minimises the right side: large first gradients bring a warm-up,
and a growing norm at the end a faster decay. So: record the norms of a run, smooth them with a median filter, and refine. For Adam and its kin the
weights are 1/‖g_t‖₁, from l1 norms. One scalar, the peak, is left to tune.

    optimiser = optax.chain(record_gradient_norms(T), optax.sgd(rate))       # a run ...
    norms = optax.tree.get(state, "norms")
    rates = refined_rates(median_filtered(norms, 0.1))                       # ... and the schedule of the next
    schedule = tabulated_schedule(rates, peak, total_steps)

The norms are those of the whole gradient, before any clipping. The paper's other variants (per coordinate, and the numerical minimum of the bound
for arbitrary schedules, which is `optimise_schedule` of `convex_schedule_bound`) are not here.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ..core.check import check_count, check_range
from ..core.types import PyTree, Scalar


def last_iterate_rates(weights: Float[Array, " steps"]) -> Float[Array, " steps"]:
    """η_t of weights w_t, both of shape (T,); the last rate is 0. Raises `ValueError` for weights that are negative or no vector."""
    if weights.ndim != 1 or weights.size < 2:
        raise ValueError(f"`weights` must be a vector of at least two weights, got shape {weights.shape}.")
    check_range("weights", weights, low=0.0)
    after = jax.lax.cumsum(weights, reverse=True)
    return weights * jnp.append(after[1:], jnp.zeros_like(after[:1])) / after[0]


def averaging_bound(weights: Float[Array, " steps"], gradient_norms: Float[Array, "..."] | Scalar, distance: Scalar = 1.0) -> Float[Array, ""]:
    """(D² + Σ w_t² ‖g_t‖²) / (2 Σ w_t): what Theorem 1 promises a run with `last_iterate_rates(weights)`.

    - `gradient_norms`: one for all steps, or (T,).
    - `distance`: D = ‖x_1 - x*‖, default 1.
    """
    check_range("weights", weights, low=0.0)
    check_range("gradient_norms", gradient_norms, low=0.0)
    norms, distance = jnp.asarray(gradient_norms, weights.dtype), jnp.asarray(distance, weights.dtype)
    return (distance**2 + jnp.sum((weights * norms) ** 2)) / (2 * jnp.sum(weights))


def median_filtered(norms: Float[Array, " steps"], window_share: float = 0.1, *, batch_size: int | None = 256) -> Float[Array, " steps"]:
    """The running median over an odd window of about `window_share` · T steps, with the ends of the released code.

    - `window_share`: static, in (0, 0.5]; the paper's runs use 0.1 to 0.2. The window has 2 ⌊share · T / 2⌋ + 1 steps.
    - `batch_size`: windows that are sorted at a time, default 256, which bounds memory.

    Past its end the sequence is mirrored, before its start the first norm is repeated, so that large first gradients stay and a growing end is not
    cut off. Raises `ValueError` for a share out of range or norms that are no vector.
    """
    if norms.ndim != 1 or norms.size < 2:
        raise ValueError(f"`norms` must be a vector of at least two norms, got shape {norms.shape}.")
    check_range("window_share", window_share, low=0.0, high=0.5, open_low=True)
    half = int(window_share * norms.size) // 2
    padded = jnp.pad(jnp.pad(norms, (0, half), mode="reflect"), (half, 0), mode="edge")
    window = jnp.arange(2 * half + 1)
    return jax.lax.map(lambda start: jnp.median(padded[start + window]), jnp.arange(norms.size), batch_size=batch_size)


def refined_rates(norms: Float[Array, " steps"], power: Scalar = 2.0) -> Float[Array, " steps"]:
    """The refined schedule of (filtered) gradient norms, with peak 1, and 0 at the last of its T steps.

    - `norms`: positive, (T,). Their unit does not matter.
    - `power`: of w = norm^-power. Default 2, for SGD and l2 norms; 1 for Adam and l1 norms. May be traced.

    A schedule for optax is `tabulated_schedule(refined_rates(norms), peak, total_steps)`; with `total_steps` one more than the run's the rate of 0
    is never used. Raises `ValueError` for norms that are not positive and finite.
    """
    check_range("norms", norms, low=0.0, high=jnp.inf, open_low=True, open_high=True)
    logs = jnp.log(norms)
    rates = last_iterate_rates(jnp.exp(-jnp.asarray(power, norms.dtype) * (logs - jnp.min(logs))))
    return rates / jnp.max(rates)


class RecordedNorms(NamedTuple):
    """The state of `record_gradient_norms`."""

    count: Int[Array, ""]
    norms: Float[Array, " steps"]  # NaN where no step has been


def l1_norm(gradient: PyTree[Float[Array, "..."]]) -> Float[Array, ""]:
    """Σ |g_i| over all leaves."""
    return optax.tree.norm(gradient, ord=1)


def record_gradient_norms(num_steps: int, norm: Callable[[PyTree], Float[Array, ""]] = optax.tree.norm) -> optax.GradientTransformation:
    """Passes gradients on and keeps the norm of each in its state: first in an `optax.chain`, then `optax.tree.get(state, "norms")`.

    - `num_steps`: how many, static; later norms are not kept.
    - `norm`: of the gradient's tree, default l2; `l1_norm` for Adam.

    Norms have the dtype of the parameters, at least float32. A step that has not been is NaN, so the schedule of half a run is refused.
    """
    check_count("num_steps", num_steps, low=2)

    def init(params):
        none = norm(optax.tree.zeros_like(params))  # of the right dtype, and on the right devices
        wide = none if jnp.finfo(none.dtype).bits >= 32 else none.astype(jnp.float32)
        return RecordedNorms(jnp.zeros((), jnp.int32), jnp.full(num_steps, jnp.nan, wide.dtype) + wide)

    def update(updates, state, params=None):
        norms = state.norms.at[state.count].set(norm(updates).astype(state.norms.dtype), mode="drop")
        return updates, RecordedNorms(state.count + 1, norms)

    return optax.GradientTransformation(init, update)


__all__ = ["RecordedNorms", "averaging_bound", "l1_norm", "last_iterate_rates", "median_filtered", "record_gradient_norms", "refined_rates"]
