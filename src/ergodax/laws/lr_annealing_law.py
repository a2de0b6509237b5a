"""The scaling law with learning-rate annealing: a whole loss curve from the schedule, by two areas.

Tissue, Wang, Wang 2024, "Scaling Law with Learning Rate Annealing" (arXiv:2408.11029). With the forward area S_1 and the annealing area S_2,

    L(t) = L_0 + A S_1(t)^{-α} - C S_2(t),
    S_1(t) = Σ_{k≤t} η_k,   S_2(t) = Σ_{k≤t} m_k,   m_k = λ m_{k-1} + (η_{k-1} - η_k)  =>  S_2(t) = Σ_{k≤t} (η_{k-1} - η_k) (1 - λ^{t-k+1})/(1 - λ).

S_1 counts the warm-up, S_2 starts after it (m = 0 at the peak). λ is 0.99 to 0.999 and is not fitted; here it is a parameter that fits hold fixed.
The authors minimise Huber's loss of log L with δ = 1e-3 by L-BFGS from several starts.

Runs of models of N parameters share one law,

    L(t, N) = L_0 + A S_1(t)^{-α} + B N^{-β} - C N^γ S_2(t),

of which the exponent γ of the annealing term is ours to fit, with either sign: that the size enters there is the paper's, the form was not confirmed.

The recursion is linear, so S_2 takes O(T), in blocks of steps: a small matrix inside of each, a scan over them.
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_range, is_concrete
from ..core.types import Scalar
from .curves import LossCurve, RateHistory, curve_features, histories_of, linear_start, losses_of
from .fitting import LawFit, Objective, fit_law
from .power_law import logarithms


_BLOCK = 128
_EXPONENTS = (0.1, 0.3, 0.5, 0.8, 1.5)


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
        logs = logarithms(floor=floor, coefficient=coefficient, exponent=exponent, annealing=annealing)
        check_range("momentum", momentum, low=0.0, high=1.0, open_low=True, open_high=True)
        momentum = jnp.asarray(momentum, logs["log_floor"].dtype)
        return cls(**logs, logit_momentum=jnp.log(momentum) - jnp.log1p(-momentum))

    @classmethod
    def starts(cls, curves: Sequence[LossCurve], momentum: Scalar = 0.999) -> "AnnealingLaw":
        """Five starts: α from 0.1 to 1.5, and the rest, in which the law is linear, by least squares: so they know the unit of the rates."""
        s1, s2 = _areas(histories_of(curves), momentum)
        losses = losses_of(curves)
        exponents = jnp.asarray(_EXPONENTS, losses.dtype)
        momentum = jnp.asarray(momentum, losses.dtype)

        def solve(exponent):
            log_floor, log_coefficient, log_annealing = linear_start(s1, exponent, [-s2], losses)
            return log_floor, log_coefficient, jnp.log(exponent), log_annealing

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


class SizedAnnealingLaw(eqx.Module):
    """L_0 + A S_1^{-α} + B N^{-β} - C N^γ S_2, `law(([history, …], sizes)) -> losses`, with one size N for each history.

    N counts in units of `unit` parameters, which fits hold fixed: so B is what size costs a model of one unit, and C is its annealing. B and β are
    positive and stored as logarithms; `of` takes, and properties give, the numbers themselves. `curve` holds L_0, A, α, C and λ.
    """

    curve: AnnealingLaw
    log_size_coefficient: Float[Array, "..."]
    log_size_exponent: Float[Array, "..."]
    annealing_exponent: Float[Array, "..."]
    unit: Float[Array, "..."]

    @classmethod
    def of(
        cls, curve: AnnealingLaw, size_coefficient: Scalar, size_exponent: Scalar, annealing_exponent: Scalar = 0.0, unit: Scalar = 1.0
    ) -> "SizedAnnealingLaw":
        """From the law of one unit without B, and B, β (positive), γ (default 0) and the unit (default one parameter)."""
        for name, value in {"size_coefficient": size_coefficient, "size_exponent": size_exponent, "unit": unit}.items():
            check_range(name, value, low=0.0, open_low=True)
        b, beta, gamma, one = (jnp.asarray(x, curve.log_floor.dtype) for x in (size_coefficient, size_exponent, annealing_exponent, unit))
        return cls(curve, jnp.log(b), jnp.log(beta), gamma, one)

    @classmethod
    def starts(cls, curves: Sequence[LossCurve], sizes: Sequence[Scalar], momentum: Scalar = 0.999) -> "SizedAnnealingLaw":
        """Ten starts: α from 0.1 to 1.5, β = 0.2 and 0.5, γ = 0, the rest by least squares. The unit is the geometric mean of the sizes."""
        histories, losses = histories_of(curves), losses_of(curves)
        s1, s2 = _areas(histories, momentum)
        numbers = _per_point(histories, sizes, losses.dtype)
        unit = jnp.exp(jnp.mean(jnp.log(jnp.asarray(sizes, losses.dtype))))
        momentum = jnp.asarray(momentum, losses.dtype)
        grid = (jnp.asarray(values, losses.dtype) for values in (_EXPONENTS, (0.2, 0.5)))
        exponents, betas = (axis.ravel() for axis in jnp.meshgrid(*grid))

        def solve(exponent, beta):
            log_floor, log_coefficient, log_size, log_annealing = linear_start(s1, exponent, [(numbers / unit) ** -beta, -s2], losses)
            curve = AnnealingLaw(log_floor, log_coefficient, jnp.log(exponent), log_annealing, jnp.log(momentum) - jnp.log1p(-momentum))
            return cls(curve, log_size, jnp.log(beta), jnp.zeros_like(beta), unit)

        return jax.vmap(solve)(exponents, betas)

    @property
    def size_coefficient(self) -> Float[Array, "..."]:
        """B."""
        return jnp.exp(self.log_size_coefficient)

    @property
    def size_exponent(self) -> Float[Array, "..."]:
        """β."""
        return jnp.exp(self.log_size_exponent)

    def __call__(self, histories_and_sizes: tuple[Sequence[RateHistory], Sequence[Scalar]]) -> Float[Array, " n"]:
        histories, sizes = histories_and_sizes
        curve, dtype = self.curve, self.unit.dtype
        s1, s2 = (area.astype(dtype) for area in _areas(histories, curve.momentum))
        logs = jnp.log(_per_point(histories, sizes, dtype) / self.unit)
        power = jnp.exp(curve.log_coefficient - curve.exponent * jnp.log(s1)) + jnp.exp(self.log_size_coefficient - self.size_exponent * logs)
        return curve.floor + power - jnp.exp(curve.log_annealing + self.annealing_exponent * logs) * s2


def _per_point(histories, sizes, dtype):
    """The size of the run that each point belongs to."""
    return jnp.concatenate([jnp.full(history.at.shape, size, dtype) for history, size in zip(histories, sizes, strict=True)])


def _sized_features(histories_and_sizes):
    histories, sizes = histories_and_sizes
    return [*curve_features(histories), _per_point(histories, sizes, histories[0].rates.dtype)]


def fit_sized_annealing_law(
    curves: Sequence[LossCurve],
    sizes: Sequence[Scalar],
    *,
    momentum: Scalar = 0.999,
    objective: Objective | None = None,
    weights: Float[Array, "..."] | None = None,
    max_steps: int = 500,
) -> LawFit[SizedAnnealingLaw]:
    """Fit all but λ to whole curves of models of several sizes, one of `sizes` (numbers of parameters) for each; the rest as for `fit_annealing_law`.

    Raises `ValueError` unless every curve has a positive size and at least three differ: L_0, B and β need as many.
    """
    if len(sizes) != len(curves):
        raise ValueError(f"`sizes` must have one number for each of the {len(curves)} curves, got {len(sizes)}.")
    check_range("sizes", tuple(sizes), low=0.0, open_low=True)
    if is_concrete(tuple(sizes)) and len({float(size) for size in sizes}) < 3:
        raise ValueError(f"`sizes` must hold at least three different ones to determine L_0, B and β, got {list(sizes)}.")
    starts = eqx.filter_jit(SizedAnnealingLaw.starts)(list(curves), list(sizes), momentum)
    free = eqx.tree_at(lambda law: (law.curve.logit_momentum, law.unit), jax.tree.map(lambda _: True, starts), (False, False))
    options = {"objective": objective, "weights": weights, "max_steps": max_steps}
    return fit_law(starts, (histories_of(curves), list(sizes)), losses_of(curves), free=free, features=_sized_features, **options)


__all__ = ["AnnealingLaw", "SizedAnnealingLaw", "annealing_area", "fit_annealing_law", "fit_sized_annealing_law"]
