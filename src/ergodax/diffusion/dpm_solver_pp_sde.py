"""SDE-DPM-Solver++: multistep exponential integrators of a reverse-time SDE, as k-diffusion's `sample_dpmpp_2m_sde` and `sample_dpmpp_3m_sde`.

Lu, Zhou, Bao, Chen, Li, Zhu 2022 (arXiv:2211.01095), section 5, has the family with η = 1 and order 2; η and the order 3 are k-diffusion's (Crowson).
With h the step of λ = log(α/σ) and H = (1 + η) h,

    x₁ = (σ₁/σ₀) e^{-ηh} x₀ + α₁ ((1 - e^{-H}) D + φ₂ d₁ - φ₃ d₂) + σ₁ √(1 - e^{-2ηh}) z,   φ₂ = (e^{-H} - 1)/H + 1,   φ₃ = φ₂/H - 1/2,

where D is the denoised data, d₁ and d₂ are differences over the past steps: with r₀ = h₋₁/h, r₁ = h₋₂/h, δ₀ = (D - D₋₁)/r₀, δ₁ = (D₋₁ - D₋₂)/r₁,

- 2M: d₁ = δ₀, d₂ = 0, with φ₂ or (their midpoint rule) (1 - e^{-H})/2 in its place;
- 3M: d₁ = δ₀ + (δ₀ - δ₁) r₀/(r₀ + r₁), d₂ = (δ₀ - δ₁)/(r₀ + r₁).

η = 0 is the probability flow: DPM-Solver++(2M), and a (3M) that has half the Taylor coefficient on its second derivative, and so order 2. Missing
history has h = ∞, and so no difference; a last step to σ = 0 gives D."""

import equinox as eqx
import jax.numpy as jnp

from ..core.check import check_range
from ..core.types import Scalar
from .solver import NoisyDenoiserSolver, clocks, finish, unit_noise


def _phi_2(h):
    """(e^{-h} - 1)/h + 1, by its series where that would cancel."""
    small = h < 0.1
    safe = jnp.where(small, 1, h)
    series = h / 2 * (1 - h / 3 * (1 - h / 4 * (1 - h / 5 * (1 - h / 6 * (1 - h / 7 * (1 - h / 8 * (1 - h / 9)))))))
    return jnp.where(small, series, jnp.expm1(-safe) / safe + 1)


def _minus_phi_3(h):
    """1/2 - φ₂/h, likewise."""
    small = h < 0.1
    safe = jnp.where(small, 1, h)
    series = h / 6 * (1 - h / 4 * (1 - h / 5 * (1 - h / 6 * (1 - h / 7 * (1 - h / 8 * (1 - h / 9))))))
    return jnp.where(small, series, 0.5 - (jnp.expm1(-safe) / safe + 1) / safe)


def _finite(h):
    """The step, and 1 in the place of ∞, with a mask."""
    known = jnp.isfinite(h)
    return jnp.where(known, h, 1), known


def _step(eta, step, y, denoised, noise):
    """x₁ with `denoised` the sum of everything that α₁ multiplies."""
    eta = jnp.asarray(eta, y.dtype)
    h, known = _finite(step.h)
    shrink = jnp.exp(step.log_sigma1 - step.log_sigma0) * jnp.where(known, jnp.exp(-eta * h), 1)
    share = jnp.where(known, -jnp.expm1(-2 * eta * h), 0)
    fresh = jnp.where(share > 0, jnp.sqrt(jnp.where(share > 0, share, 1)), 0)
    return shrink * y + jnp.exp(step.log_alpha1) * denoised + jnp.exp(step.log_sigma1) * fresh * noise


class DPMSolverPP2MSDE(NoisyDenoiserSolver):
    """SDE-DPM-Solver++(2M), one network call per step. State: the previous denoised and the previous h.

    - `eta` (default 1): how much noise; 0 is the probability flow.
    - `midpoint` (static, default true): their midpoint rule, else ("heun") φ₂.
    """

    eta: Scalar = 1.0
    midpoint: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        check_range("eta", self.eta, low=0.0)

    def order(self, terms):
        """2, at η = 0."""
        return 2

    def init(self, terms, t0, t1, y0, args):
        """No history: h = ∞."""
        return jnp.zeros_like(y0), jnp.full_like(clocks(terms.terms[0], t0, t1, y0).h, jnp.inf)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`."""
        previous, h_previous = solver_state
        step, denoised = clocks(terms.terms[0], t0, t1, y0), terms.terms[0].vf(t0, y0, args).denoised
        h, known = _finite(step.h)
        whole = (1 + jnp.asarray(self.eta, y0.dtype)) * h
        weight = -jnp.expm1(-whole) / 2 if self.midpoint else _phi_2(whole)
        constant = jnp.where(known, -jnp.expm1(-whole), 1)
        data = constant * denoised + jnp.where(known, weight * h / h_previous, 0) * (denoised - previous)
        return finish(y0, _step(self.eta, step, y0, data, unit_noise(terms.terms[1], t0, t1)), (denoised, step.h))


class DPMSolverPP3MSDE(NoisyDenoiserSolver):
    """SDE-DPM-Solver++(3M), one network call per step. State: the previous two denoised and the previous two h.

    `eta` (default 1): how much noise; 0 is the probability flow. The second step has the differences of 2M.
    """

    eta: Scalar = 1.0

    def __check_init__(self):
        check_range("eta", self.eta, low=0.0)

    def order(self, terms):
        """2, at η = 0."""
        return 2

    def init(self, terms, t0, t1, y0, args):
        """No history: h = ∞."""
        infinite = jnp.full_like(clocks(terms.terms[0], t0, t1, y0).h, jnp.inf)
        return jnp.zeros_like(y0), jnp.zeros_like(y0), infinite, infinite

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`."""
        previous, before, h_previous, h_before = solver_state
        step, denoised = clocks(terms.terms[0], t0, t1, y0), terms.terms[0].vf(t0, y0, args).denoised
        h, known = _finite(step.h)
        h0, h1 = _finite(h_previous)[0], _finite(h_before)[0]
        whole = (1 + jnp.asarray(self.eta, y0.dtype)) * h
        slope, slope_before = (denoised - previous) * (h / h0), (previous - before) * (h / h1)
        three = jnp.isfinite(h_before)
        second = jnp.where(three, h / (h0 + h1), 0) * (slope - slope_before)
        first = slope + jnp.where(three, h0 / h, 0) * second
        constant = jnp.where(known, -jnp.expm1(-whole), 1)
        use = known & jnp.isfinite(h_previous)
        data = constant * denoised + jnp.where(use, _phi_2(whole), 0) * first + jnp.where(use, _minus_phi_3(whole), 0) * second
        return finish(y0, _step(self.eta, step, y0, data, unit_noise(terms.terms[1], t0, t1)), (denoised, previous, step.h, h_previous))


__all__ = ["DPMSolverPP2MSDE", "DPMSolverPP3MSDE"]
