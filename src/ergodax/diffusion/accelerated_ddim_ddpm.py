"""Provably accelerated DDIM and DDPM. Li, Huang, Efimov, Wei, Chi, Chen 2024 (arXiv:2403.03852).

In DDPM's notation a = α_t = 1 - β_t for the step from t to t - 1, a₊ = α_{t+1} for the noisier one before it, s the score, Y a variance preserving
state. The deterministic sampler looks one step back along the flow and corrects with the difference of scores,

    Y⁻ = √a₊ (Y - (1 - a₊)/2 s_t(Y)),
    Y₁ = (Y + (1 - a)/2 s_t(Y) + (1 - a)²/(4 (1 - a₊)) (s_t(Y) - √a₊ s_{t+1}(Y⁻)))/√a,

whose law is within O(1/T²) of the data's in total variation; without the correction, a DDIM-type sampler, O(1/T). The stochastic one splits DDPM's
noise into two halves and asks for the score after the first,

    Y⁺ = Y + √((1 - a)/2) z,   Y₁ = (Y⁺ + (1 - a) s_t(Y⁺) + √((1 - a)/2) z⁺)/√a,   z, z⁺ ~ N(0, I),

with O(1/T) where DDPM has O(1/√T). The noise schedule of the theorems is `accelerated_grid`.

Beyond the paper: any affine path is variance preserving in y = x/√(α² + σ²), with ᾱ = α²/(α² + σ²) and a = ᾱ₀/ᾱ₁, and the solvers run on that.
Deviation: the paper also has a score at T + 1, before its first step; here the first step has nothing before it and is the plain one. α must be
positive on the grid."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_count, check_range, is_concrete
from ..core.path import AffinePath
from ..core.types import Scalar
from .solver import DenoiserSolver, NoisyDenoiserSolver, clocks, finish, predicted_noise, unit_noise


def _log_share(log_alpha, log_sigma):
    """log ᾱ."""
    return -jax.nn.softplus(2 * (log_sigma - log_alpha))


def _scale(log_alpha, log_sigma):
    """√(α² + σ²)."""
    return jnp.exp(jnp.logaddexp(2 * log_alpha, 2 * log_sigma) / 2)


def _score(step, y, posterior):
    """The score of the variance preserving state at the start of the step."""
    return -predicted_noise(step, y, posterior) * _scale(step.log_alpha0, step.log_sigma0) * jnp.exp(-step.log_sigma0)


def _log_a(step):
    return _log_share(step.log_alpha0, step.log_sigma0) - _log_share(step.log_alpha1, step.log_sigma1)


class AcceleratedDDIM(DenoiserSolver):
    """The accelerated deterministic sampler, two network calls per step. State: the step index before.

    `correction` (default 1) multiplies the correction term: 0 is the paper's plain deterministic sampler.
    """

    correction: Scalar = 1.0

    def __check_init__(self):
        check_range("correction", self.correction, low=0.0)

    def order(self, terms):
        """2; 1 without the correction."""
        return 2

    def init(self, terms, t0, t1, y0, args):
        """No history: an infinite step index."""
        return jnp.asarray(-jnp.inf, jnp.asarray(t0).dtype)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`."""
        history = jnp.isfinite(solver_state)
        # Without history: the way back is the step itself, with no weight.
        t_before = jnp.where(history, solver_state, t1)
        step, before = clocks(terms, t0, t1, y0), clocks(terms, t_before, t0, y0)
        state = y0 / _scale(step.log_alpha0, step.log_sigma0)
        score, log_a, log_a_before = _score(step, y0, terms.vf(t0, y0, args)), _log_a(step), _log_a(before)
        beta, beta_before = -jnp.expm1(log_a), -jnp.expm1(log_a_before)
        root_before = jnp.exp(log_a_before / 2)
        y_before = _scale(before.log_alpha0, before.log_sigma0) * root_before * (state - beta_before / 2 * score)
        # Where the step ends at σ = 0 and has no history, the model is not asked there.
        asked = jnp.where(history, t_before, t0)
        score_before = _score(clocks(terms, asked, t0, y0), y_before, terms.vf(asked, y_before, args))
        weight = jnp.where(history, jnp.asarray(self.correction, y0.dtype) * beta**2 / (4 * beta_before), 0)
        state = (state + beta / 2 * score + weight * (score - root_before * score_before)) * jnp.exp(-log_a / 2)
        return finish(y0, _scale(step.log_alpha1, step.log_sigma1) * state, t0)


class AcceleratedDDPM(NoisyDenoiserSolver):
    """The accelerated stochastic sampler, one network call per step, at the state with half of the step's noise."""

    def order(self, terms):
        """1, in law."""
        return 1

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`."""
        model, noise = terms.terms
        step, middle = clocks(model, t0, t1, y0), (t0 + t1) / 2
        scale0, scale1, log_a = _scale(step.log_alpha0, step.log_sigma0), _scale(step.log_alpha1, step.log_sigma1), _log_a(step)
        beta = -jnp.expm1(log_a)
        half = jnp.sqrt(beta / 2)
        y = y0 + scale0 * half * unit_noise(noise, t0, middle)
        score = _score(step, y, model.vf(t0, y, args))
        state = (y / scale0 + beta * score + half * unit_noise(noise, middle, t1)) * jnp.exp(-log_a / 2)
        return finish(y0, scale1 * state)


def accelerated_grid(path: AffinePath, num_steps: int, c0: Scalar = 2.0, c1: Scalar = 4.0) -> Float[Array, " steps"]:
    """The schedule of the theorems as a grid on `path`, T = `num_steps`: β₁ = T^-c0, β_t = r min{β₁ (1 + r)^t, 1}, r = c1 log(T)/T.

    T noise levels, ᾱ_T to ᾱ₁, and t = 1 after them. The paper asks for large enough constants; the defaults serve targets of unit size. The path
    must reach ᾱ_T, as paths with α(0) = 0 do. Raises `ValueError` where r >= 1.
    """
    check_count("num_steps", num_steps, low=2)
    check_range("c0", c0, low=0.0, open_low=True)
    check_range("c1", c1, low=0.0, open_low=True)
    rate = c1 * (math.log(num_steps) / num_steps)
    if is_concrete(rate) and rate >= 1:
        raise ValueError(f"`num_steps` must be larger for c1 = {c1}: c1 log(T)/T must lie below 1, got {rate:g} for T = {num_steps}.")
    dtype = jnp.result_type(c0, c1, float)
    first, rate = jnp.asarray(num_steps**-c0, dtype), jnp.asarray(rate, dtype)
    growth = first * (1 + rate) ** jnp.arange(2, num_steps + 1).astype(dtype)
    log_share = jnp.cumsum(jnp.log1p(-jnp.append(first, rate * jnp.minimum(growth, 1))))[::-1]
    return jnp.append(path.time(log_share - jnp.log(-jnp.expm1(log_share))), 1.0)


__all__ = ["AcceleratedDDIM", "AcceleratedDDPM", "accelerated_grid"]
