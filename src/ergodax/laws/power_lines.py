"""Power lines: how weight decay and batch size should grow with model and data.

Bergsma, Dey, Gosal, Gray, Soboleva, Hestness 2025 (arXiv:2505.13738). AdamW, θ_t = (1 - η λ) θ_{t-1} - η u_t, is an exponential moving average with
the share a = η λ of the updates -u_t / λ:

    θ_t = (1 - a)^t θ_0 + Σ_{s ≤ t} a (1 - a)^{t-s} (-u_s / λ),

and it forgets in 1/a steps, as a share of a run of D / B steps

    τ = B / (η λ D).

Three straight lines on logarithmic axes, each a `PowerLaw` fitted to a sweep (`sweep_optimum` reads the best value off each row of it):

    τ*(D/N) = c (D/N)^m,   m ≈ -0.53, c ≈ 1.08: the best weight decay is then λ* = B / (η D τ*), linear in B (`optimal_weight_decay`);
    B_opt(D) ∝ D^0.38, the batch of the lowest loss at given N and D;
    B_crit(D_min) ∝ D_min^0.46, of `BatchTokens`, D(B) = D_min (1 + B / B_crit): the tokens to a target loss, a fit per target.

Neither batch depends on N. D(B) also says what speed costs: `BatchTokens.trade_off` gives steps and operations of every batch.

The paper itself could not be read: m is as a review of it reports, c and the exponents of the two batch laws are from memory, and the factors of the
latter, whose unit is in doubt, are left to your own sweep. B and D count tokens here, or any one unit.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_range, is_concrete
from ..core.types import Scalar
from .power_law import Amount, PowerLaw, logarithms


def adamw_timescale(batch: Amount, rate: Amount, decay: Amount, tokens: Amount) -> Float[Array, "..."]:
    """τ = B / (η λ D), a share of the run; `batch` and `tokens` in one unit. All may be arrays that broadcast."""
    return jnp.asarray(batch / (rate * decay * tokens))


def weight_decay(timescale: Amount, batch: Amount, rate: Amount, tokens: Amount) -> Float[Array, "..."]:
    """λ = B / (η D τ), the decay that has this timescale."""
    return jnp.asarray(batch / (rate * tokens * timescale))


def optimal_weight_decay(
    parameters: Amount,
    tokens: Amount,
    batch: Amount,
    rate: Amount,
    *,
    timescale: PowerLaw | None = None,
) -> Float[Array, "..."]:
    """λ* = B / (η D τ*(D/N)) for a model of N = `parameters` trained on D = `tokens` in batches of B tokens with the peak rate η.

    `timescale`: τ* as a law of D/N, from your own sweep; default 1.084 (D/N)^-0.527, found for language models of 0.1 to 3.3 billion parameters in μP
    (see the module's note on the factor). Holds while B is below its critical value.

    Raises `ValueError` for sizes that are not positive.
    """
    for name, value in (("parameters", parameters), ("tokens", tokens), ("batch", batch), ("rate", rate)):
        check_range(name, value, low=0.0, open_low=True)
    ratio = jnp.asarray(tokens / parameters)
    if timescale is None:
        timescale = PowerLaw.of(jnp.asarray(1.084, ratio.dtype), jnp.asarray(-0.527, ratio.dtype))
    return weight_decay(timescale(ratio), batch, rate, tokens)


def average_weights(shares: Float[Array, " steps"]) -> tuple[Float[Array, ""], Float[Array, " steps"]]:
    """What a moving average θ_t = (1 - a_t) θ_{t-1} + a_t x_t holds at the end: the weight of θ_0, and that of every x_t. They sum to one.

    `shares`: a_t in [0, 1], for AdamW η_t λ: with a schedule, how much the end remembers of each stretch of the run.
    """
    kept = jnp.cumprod((1 - shares)[::-1])[::-1]
    return kept[0], shares * jnp.append(kept[1:], jnp.ones_like(kept[:1]))


def sweep_optimum(values: Float[Array, "..."], losses: Float[Array, "..."]) -> Float[Array, ""]:
    """The best value of a sweep on a logarithmic axis: where the parabola through the best point and its neighbours is lowest.

    - `values`: positive and increasing, n ≥ 3 (a weight decay, a batch, a rate); `losses`: what each reached.

    Raises `ValueError` for other shapes, and where the best value is the first or the last: the sweep then has not seen its optimum. A traced sweep
    is not looked at, and returns a value outside of it there, or NaN.
    """
    if jnp.ndim(values) != 1 or jnp.shape(values) != jnp.shape(losses) or jnp.size(values) < 3:
        raise ValueError(f"`values` and `losses` must be vectors of one length of at least 3, got {jnp.shape(values)} and {jnp.shape(losses)}.")
    check_range("values", values, low=0.0, open_low=True)
    best = jnp.argmin(losses)
    if is_concrete((values, losses)) and best in (0, len(values) - 1):
        raise ValueError(f"the lowest of `losses` is at the end of the sweep, {values[best]:g}: widen the range of `values`.")
    middle = jnp.clip(best, 1, len(values) - 2)
    x, y = jnp.log(values)[middle + jnp.arange(-1, 2)], losses[middle + jnp.arange(-1, 2)]
    left, right = x[1] - x[0], x[2] - x[1]
    down, up = (y[0] - y[1]) / left, (y[2] - y[1]) / right  # slopes to both sides, positive round a minimum
    return jnp.exp(x[1] + (down * right - up * left) / (2 * (down + up)))


class BatchTokens(eqx.Module):
    """The tokens that a run needs for its target loss, D(B) = D_min (1 + B / B_crit): both sizes positive, stored as logarithms.

    `law(B)`. Its time in steps is D(B)/B ≥ D_min/B_crit. At B_crit both tokens and steps are twice their least.
    """

    log_minimum: Float[Array, "..."]
    log_critical: Float[Array, "..."]

    @classmethod
    def of(cls, minimum: Scalar, critical: Scalar) -> "BatchTokens":
        """From D_min and B_crit."""
        return cls(**logarithms(minimum=minimum, critical=critical))

    @classmethod
    def starts(cls, batches: Float[Array, " n"], tokens: Float[Array, " n"]) -> "BatchTokens":
        """Three starts: D_min the smallest number of tokens, B_crit the smallest, geometric mean and largest batch."""
        log_batches, log_least = jnp.log(batches), jnp.log(jnp.min(tokens))
        critical = jnp.stack([jnp.min(log_batches), jnp.mean(log_batches), jnp.max(log_batches)])
        return cls(jnp.full_like(critical, log_least), critical)

    @property
    def minimum(self) -> Float[Array, "..."]:
        """D_min, what the smallest batches need."""
        return jnp.exp(self.log_minimum)

    @property
    def critical(self) -> Float[Array, "..."]:
        """B_crit."""
        return jnp.exp(self.log_critical)

    def __call__(self, batch: Amount) -> Float[Array, "..."]:
        return self.minimum * (1 + jnp.asarray(batch, self.log_minimum.dtype) / self.critical)

    def trade_off(self, parameters: Scalar, batches: Amount, *, cost: Scalar = 6.0) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """(steps, operations) of a model of N = `parameters` at each batch, D(B)/B and `cost` N D(B): the Pareto curve of time against compute.

        (steps / least steps - 1) (operations / least operations - 1) = 1 all along it.
        """
        batches = jnp.asarray(batches, self.log_minimum.dtype)
        tokens = self(batches)
        return tokens / batches, jnp.asarray(cost * parameters * tokens)


__all__ = ["BatchTokens", "adamw_timescale", "average_weights", "optimal_weight_decay", "sweep_optimum", "weight_decay"]
