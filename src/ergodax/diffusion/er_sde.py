"""ER-SDE-Solver: exponential integrators of the extended reverse-time SDE. Cui, Zhang, Bao, Liao 2023 (arXiv:2309.06169).

In λ = σ/α and x/α every affine path is variance exploding, and a whole family of reverse SDEs, with the noise level h(t) free, has its marginals. A
noise scale function φ stands for h; with r = φ(λ₁)/φ(λ₀) < 1 and D the denoised data, the step from λ₀ down to λ₁ is

    x₁/α₁ = r x₀/α₀ + (1 - r) D + J₁ D' + J₂ D'' + √(λ₁² - r² λ₀²) z,   z ~ N(0, I),
    J₁ = λ₁ - λ₀ + φ(λ₁) ∫ dλ/φ,   J₂ = (λ₁ - λ₀)²/2 + φ(λ₁) ∫ (λ - λ₀)/φ dλ,   both integrals from λ₁ to λ₀,

with differences over the past steps, D' = (D - D₋₁)/(λ₀ - λ₋₁) and D'' = 2 (D' - D'₋₁)/(λ₀ - λ₋₂). φ = λ is the probability flow (order 1: DDIM),
φ = λ² the usual reverse SDE (order 1: `Ancestral`), φ = λ (exp(λ^0.3) + 10) what the authors recommend.

φ comes as its growth g(λ) = φ(λ)/λ, any callable: finite at λ = 0, and not decreasing, which is the paper's condition λ₁² ≥ r² λ₀². Then nothing is
infinite at α = 0 or σ = 0, and ∫ dλ/φ = ∫ d log λ / g is smooth.

- As in the released code the first step has order 1, the second at most 2, and a last step to σ = 0 order 1.
- Deviation: the integrals are by 16 Gauss-Legendre nodes in log λ. The released left sum of 100 nodes is off by about 1/200 of them, which costs the
  orders 2 and 3 their slope.
- D' is a one-sided difference, so "order 3" also converges with order 2, with a smaller constant."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core.check import check_count, check_range
from ..core.types import Scalar
from .solver import NoisyDenoiserSolver, clocks, finish, unit_noise


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


class PowerNoiseScale(eqx.Module):
    """φ = λ^power: 1 is the ODE, 2 the reverse SDE, 1.5 and 2.5 are the paper's SDE_2 and SDE_3. `power` is at least 1."""

    power: Scalar

    def __check_init__(self):
        check_range("power", self.power, low=1.0)

    def __call__(self, ratio: Float[Array, "..."]) -> Float[Array, "..."]:
        """φ(λ)/λ at λ = σ/α."""
        return ratio ** jnp.asarray(self.power - 1, ratio.dtype)


class ExponentialNoiseScale(eqx.Module):
    """φ = λ (exp(λ^exponent) + offset), the paper's recommended SDE_5; defaults 0.3 and 10 are theirs."""

    exponent: Scalar = 0.3
    offset: Scalar = 10.0

    def __check_init__(self):
        check_range("exponent", self.exponent, low=0.0, open_low=True)
        check_range("offset", self.offset, low=0.0)

    def __call__(self, ratio: Float[Array, "..."]) -> Float[Array, "..."]:
        """φ(λ)/λ at λ = σ/α."""
        return jnp.exp(ratio ** jnp.asarray(self.exponent, ratio.dtype)) + jnp.asarray(self.offset, ratio.dtype)


class ERSDE(NoisyDenoiserSolver):
    """ER-SDE-Solver, one network call per step. State: the last denoised and D', and the last two λ.

    - `growth`: λ -> φ(λ)/λ; `ExponentialNoiseScale()` by default. Where it decreases the noise is left out, and the marginals are lost.
    - `max_order` (static): 1, 2 or 3 (default), how many of the terms above are used.
    """

    growth: Callable = ExponentialNoiseScale()
    max_order: int = eqx.field(static=True, default=3)

    def __check_init__(self):
        check_count("max_order", self.max_order)
        if self.max_order > 3:
            raise ValueError(f"`max_order` must be 1, 2 or 3, got {self.max_order}.")

    def order(self, terms):
        """At φ = λ: 1 for `max_order` 1, else 2."""
        return min(self.max_order, 2)

    def init(self, terms, t0, t1, y0, args):
        """No history: λ = ∞."""
        return jnp.zeros_like(y0), jnp.zeros_like(y0), jnp.asarray(jnp.inf, y0.dtype), jnp.asarray(jnp.inf, y0.dtype)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`."""
        model, noise = terms.terms
        previous, slope_previous, ratio_previous, ratio_before = solver_state
        step, denoised = clocks(model, t0, t1, y0), model.vf(t0, y0, args).denoised
        ratio0, ratio1 = jnp.exp(step.log_sigma0 - step.log_alpha0), jnp.exp(step.log_sigma1 - step.log_alpha1)
        shrink = self.growth(ratio1) / self.growth(ratio0)  # r λ₀/λ₁
        slope = (denoised - previous) / _finite_or_infinity(ratio0 - ratio_previous)
        data = (1 - jnp.exp(-step.h) * shrink) * denoised
        if self.max_order >= 2:
            first, second = self._integrals(step)
            data = data + first * slope
            if self.max_order == 3:
                data = data + second * 2 * (slope - slope_previous) / _finite_or_infinity(ratio0 - ratio_before)
        share = 1 - shrink**2
        fresh = jnp.where(share > 0, jnp.sqrt(jnp.where(share > 0, share, 1)), 0)
        kept = jnp.exp(step.log_sigma1 - step.log_sigma0) * shrink * y0
        y1 = kept + jnp.exp(step.log_alpha1) * data + jnp.exp(step.log_sigma1) * fresh * unit_noise(noise, t0, t1)
        return finish(y0, y1, (denoised, slope, ratio0, ratio_previous))

    def _integrals(self, step):
        """J_k = ∫ (λ - λ₀)^{k-1} (φ(λ₁)/φ(λ) - 1) dλ from λ₁ to λ₀, without the cancellation of their parts; 0 where an end is infinite."""
        finite = jnp.isfinite(step.h)
        log0 = jnp.where(finite, step.log_sigma0 - step.log_alpha0, 0)
        log1 = jnp.where(finite, step.log_sigma1 - step.log_alpha1, 0)
        half = (log0 - log1) / 2
        ratio = jnp.exp((log0 + log1) / 2 + half * _NODES.astype(log0.dtype))
        excess = jnp.exp(log1) * self.growth(jnp.exp(log1)) / self.growth(ratio) - ratio
        weighted = half * _WEIGHTS.astype(log0.dtype) * excess
        return jnp.sum(weighted), jnp.sum(weighted * (ratio - jnp.exp(log0)))


def _finite_or_infinity(gap):
    """The gap between two λ, ∞ (and so a difference quotient of 0) where one is missing or infinite."""
    return jnp.where(jnp.isfinite(gap), gap, jnp.inf)


__all__ = ["ERSDE", "ExponentialNoiseScale", "PowerNoiseScale"]
