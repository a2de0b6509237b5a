"""The scaling law with learning-rate annealing: a whole loss curve from the schedule, by two areas.

Tissue, Wang, Wang 2024, "Scaling Law with Learning Rate Annealing" (arXiv:2408.11029). With the forward area S_1 and the annealing area S_2,

    L(t) = L_0 + A S_1(t)^{-α} - C S_2(t),
    S_1(t) = Σ_{k≤t} η_k,   S_2(t) = Σ_{k≤t} m_k,   m_k = λ m_{k-1} + (η_{k-1} - η_k)  =>  S_2(t) = Σ_{k≤t} (η_{k-1} - η_k) (1 - λ^{t-k+1})/(1 - λ).

S_1 counts the warm-up, S_2 starts after it (m = 0 at the peak). λ is 0.99 to 0.999 and is not fitted; here it is a parameter that fits hold fixed.
The authors minimise Huber's loss of log L with δ = 1e-3 by L-BFGS from several starts.

The recursion is linear, so S_2 takes O(T), in blocks of steps: a small matrix inside of each, a scan over them. The extension by the size of the
model is left out: `AdditiveSurface` is the law for sizes.
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_range
from ..core.types import Scalar
from .curves import LossCurve, RateHistory, curve_features, histories_of, losses_of
from .fitting import LawFit, Objective, fit_law


_BLOCK = 128


def annealing_area(rates: Float[Array, " T"], momentum: Scalar, *, warmup: int = 0) -> Float[Array, " T"]:
    """S_2 at every step, for λ = `momentum`; drops count from step `warmup` on."""
    momentum = jnp.asarray(momentum, rates.dtype)
    drops = jnp.concatenate([jnp.zeros_like(rates[:1]), rates[:-1] - rates[1:]])
    drops = jnp.where(jnp.arange(rates.size) >= warmup, drops, 0)
    blocks = jnp.pad(drops, (0, -rates.size % _BLOCK)).reshape(-1, _BLOCK)
    age = jnp.arange(_BLOCK)[:, None] - jnp.arange(_BLOCK)
    kernel = jnp.where(age >= 0, momentum ** jnp.maximum(age, 0).astype(rates.dtype), 0)
    within = blocks @ kernel.T  # m of each block, had nothing happened before it
    after = momentum ** jnp.arange(1, _BLOCK + 1).astype(rates.dtype)

    def carry_on(before, block):
        momenta = block + before * after
        return momenta[-1], momenta

    _, momenta = jax.lax.scan(carry_on, 0 * within[0, 0], within)
    return jnp.cumsum(momenta.ravel()[: rates.size])


class AnnealingLaw(eqx.Module):
    """L_0 + A S_1^{-α} - C S_2, `law([history, …]) -> losses`, those of one history after those of the other.

    L_0, A, α and C are positive and λ lies in (0, 1): they are stored as logarithms and as log(λ/(1-λ)). `of` takes, and properties give, the
    parameters themselves.
    """

    log_floor: Float[Array, "..."]
    log_coefficient: Float[Array, "..."]
    log_exponent: Float[Array, "..."]
    log_annealing: Float[Array, "..."]
    logit_momentum: Float[Array, "..."]

    @classmethod
    def of(cls, floor: Scalar, coefficient: Scalar, exponent: Scalar, annealing: Scalar, momentum: Scalar = 0.999) -> "AnnealingLaw":
        """From L_0, A, α, C, all positive, and λ (default 0.999)."""
        values = {"floor": floor, "coefficient": coefficient, "exponent": exponent, "annealing": annealing}
        for name, value in values.items():
            check_range(name, value, low=0.0, open_low=True)
        check_range("momentum", momentum, low=0.0, high=1.0, open_low=True, open_high=True)
        momentum = jnp.asarray(momentum, jnp.result_type(float, *values.values()))
        logarithms = {f"log_{name}": jnp.log(jnp.asarray(value, momentum.dtype)) for name, value in values.items()}
        return cls(**logarithms, logit_momentum=jnp.log(momentum) - jnp.log1p(-momentum))

    @classmethod
    def starts(cls, curves: Sequence[LossCurve], momentum: Scalar = 0.999) -> "AnnealingLaw":
        """Five starts: α from 0.1 to 1.5, and the rest, in which the law is linear, by least squares: so they know the unit of the rates."""
        histories, losses = histories_of(curves), losses_of(curves)
        s1, s2 = _areas(histories, momentum)
        exponents = jnp.asarray([0.1, 0.3, 0.5, 0.8, 1.5], losses.dtype)
        momentum = jnp.asarray(momentum, losses.dtype)

        def solve(exponent):
            columns = jnp.stack([jnp.ones_like(s1), (s1 / jnp.max(s1)) ** -exponent, -s2], -1)
            size = jnp.max(jnp.abs(columns), 0)
            size = jnp.where(size > 0, size, 1)
            found = jnp.maximum(jnp.linalg.lstsq(columns / size, losses)[0], 1e-3 * jnp.mean(losses)) / size
            return jnp.log(found[0]), jnp.log(found[1]) + exponent * jnp.log(jnp.max(s1)), jnp.log(exponent), jnp.log(found[2])

        return cls(*jax.vmap(solve)(exponents), jnp.full_like(exponents, jnp.log(momentum) - jnp.log1p(-momentum)))

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
    def annealing(self) -> Float[Array, "..."]:
        """C."""
        return jnp.exp(self.log_annealing)

    @property
    def momentum(self) -> Float[Array, "..."]:
        """λ."""
        return jax.nn.sigmoid(self.logit_momentum)

    def __call__(self, histories: Sequence[RateHistory]) -> Float[Array, " n"]:
        s1, s2 = _areas(histories, self.momentum)
        dtype = self.log_floor.dtype
        power = jnp.exp(self.log_coefficient - self.exponent * jnp.log(s1.astype(dtype)))
        return self.floor + power - self.annealing * s2.astype(dtype)


def _areas(histories, momentum):
    """S_1 and S_2 at all points."""
    s2 = [annealing_area(history.rates, momentum, warmup=history.warmup)[history.at] for history in histories]
    return jnp.concatenate([history.area for history in histories]), jnp.concatenate(s2)


def fit_annealing_law(
    curves: Sequence[LossCurve],
    *,
    momentum: Scalar = 0.999,
    objective: Objective | None = None,
    weights: Float[Array, "..."] | None = None,
    max_steps: int = 200,
) -> LawFit[AnnealingLaw]:
    """Fit L_0, A, α and C to whole curves, at a given λ; one with a decay must be among them, or C is not determined. Arguments as for `fit_law`."""
    starts = eqx.filter_jit(AnnealingLaw.starts)(list(curves), momentum)
    free = eqx.tree_at(lambda law: law.logit_momentum, jax.tree.map(lambda _: True, starts), False)
    options = {"objective": objective, "weights": weights, "max_steps": max_steps}
    return fit_law(starts, histories_of(curves), losses_of(curves), free=free, features=curve_features, **options)


__all__ = ["AnnealingLaw", "annealing_area", "fit_annealing_law"]
