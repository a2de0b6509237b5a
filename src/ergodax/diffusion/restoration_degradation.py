"""Restoration-degradation: DDIM for diffusions that need not be linear. Chen, Daras, Dimakis 2023 (arXiv:2303.03384).

The forward process is dx = f(x, u) du + g(u) dw in noise time u, with score s. A step back from u to u - h looks further back, by l > h. Restoration
estimates the state at u - l, by gradient ascent on log q(x_{u-l} | x_u); degradation runs the forward process from there for l - h, with the one
noise γ that leads from x' to the present x:

    x' = x - l (f(x, u) - g² s(x, u)),   f' = f(x', u - l),
    γ = (x - x' - l f')/(g √l),          x_{u-h} = x' + (l - h) f' + g √(l - h) γ,

where g drops out. For h << l -> 0 it is a step of the probability flow dx = (f - g² s/2) du, with local error O(h l) + O(h²/l): along l = √h the
global error is of order 1/2, and at a fixed l a bias remains. `RestorationDegradation` is this, on a `ForwardProcess` with any drift.

For a linear drift both halves have exact Gaussian forms: with λ = σ/α at the step's start, its end and the time r that is looked back to,

    x'/α_r = x/α₀ - (λ₀² - λ_r²) ε/λ₀,   γ = √(1 - λ_r²/λ₀²) ε,   x₁/α₁ = x'/α_r + √(λ₁² - λ_r²) γ,

so x₁ = α₁ D + σ₁ κ ε with κ = p q + √((1 - p²)(1 - q²)), p = λ_r/λ₀, q = λ_r/λ₁: DDIM where r is at the data. `LinearRestorationDegradation` is this,
on a `DenoiserTerm`. A look-back is a plug `(u, h) -> l`.

The paper's result, the first polynomial bounds for such samplers, is a proof and not code."""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import diffrax as dfx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.path import AffinePath
from ..core.types import Scalar, VectorField
from .solver import DenoiserSolver, clocks, finish, predicted_noise


class ReverseProcessDrift(NamedTuple):
    """A forward process at one point, and what reverses it. Unused fields cost nothing under `jit`."""

    drift: Float[Array, "*x"]  # f
    pull: Float[Array, "*x"]  # g² s
    noise_time: Float[Array, ""]  # u


class ForwardProcess(dfx.AbstractTerm):
    """dx = f(x, u) du + g(u) dw, seen backwards: the term's time is t = T - u, from noise to data.

    - `drift`, `score`: f and ∇ log p_u as `(u, x, args) -> array like x`.
    - `diffusion`: g as `u -> scalar`.
    - `horizon`: T, default 1.

    Integrate it with `times` within [0, T]. Stock diffrax solvers see the probability flow.
    """

    drift: VectorField
    diffusion: Callable
    score: VectorField
    horizon: Scalar = 1.0

    def vf(self, t, y, args):
        """The process at time `t`: a `ReverseProcessDrift`."""
        u = jnp.asarray(self.horizon - t, y.dtype)
        variance = jnp.asarray(self.diffusion(u), y.dtype) ** 2
        return ReverseProcessDrift(self.drift(u, y, args), variance * self.score(u, y, args), u)

    def contr(self, t0, t1, **kwargs):
        """t₁ - t₀."""
        return t1 - t0

    def prod(self, vf, control):
        """The probability flow's first-order increment."""
        return (vf.pull / 2 - vf.drift) * jnp.asarray(control, vf.drift.dtype)


def square_root_look_back(u, h):
    """l = √h, which balances the two local errors."""
    return jnp.sqrt(h)


def whole_look_back(u, h):
    """l = u, back to the data."""
    return u


class RestorationDegradation(dfx.AbstractSolver):
    """The sampler on a `ForwardProcess`, one call of the score per step.

    `look_back` is `(u, h) -> l`, l = √h by default. Kept between h and u, for there is nothing before the data.
    """

    look_back: Callable = square_root_look_back

    term_structure: ClassVar = ForwardProcess
    interpolation_cls: ClassVar[Callable] = dfx.LocalLinearInterpolation

    def order(self, terms):
        """1, rounded up from the 1/2 of l = √h."""
        return 1

    def func(self, terms, t0, y0, args):
        """The process at time `t0`."""
        return terms.vf(t0, y0, args)

    def init(self, terms, t0, t1, y0, args):
        """No state."""
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from time `t0` to `t1`."""
        h, now = jnp.asarray(terms.contr(t0, t1), y0.dtype), terms.vf(t0, y0, args)
        length = jnp.asarray(self.look_back(now.noise_time, h), y0.dtype)
        length = jnp.maximum(jnp.minimum(length, now.noise_time), h)
        restored = y0 - length * (now.drift - now.pull)
        drift = terms.vf(t0 + length.astype(jnp.asarray(t0).dtype), restored, args).drift
        noise = y0 - restored - length * drift  # g √l γ
        return finish(y0, restored + (length - h) * drift + _root(1 - h / length) * noise)


class LinearRestorationDegradation(DenoiserSolver):
    """The exact form on a `DenoiserTerm`, one network call per step.

    - `path`: the path of the term, for the clocks at r.
    - `look_back`: `(u, h) -> l` in u = 1 - t, l = u by default, which is DDIM. Kept between h and u.
    """

    path: AffinePath
    look_back: Callable = whole_look_back

    def order(self, terms):
        """1; 1/2 along l = √h."""
        return 1

    def init(self, terms, t0, t1, y0, args):
        """No state."""
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`."""
        step, posterior = clocks(terms, t0, t1, y0), terms.vf(t0, y0, args)
        length = jnp.asarray(self.look_back(1 - step.t0, step.dt), y0.dtype)
        time = jnp.clip(step.t0 + length, step.t1, 1)
        log_ratio = self.path.log_sigma(time) - self.path.log_alpha(time)
        p = jnp.exp(log_ratio - step.log_sigma0 + step.log_alpha0)
        # A step to σ = 0 looks back to it, and has no use for 0/0.
        clean = jnp.isneginf(step.log_sigma1)
        q = jnp.where(clean, 0, jnp.exp(log_ratio - jnp.where(clean, 0, step.log_sigma1 - step.log_alpha1)))
        kept = p * q + _root(1 - p**2) * _root(1 - q**2)
        noise = predicted_noise(step, y0, posterior)
        return finish(y0, jnp.exp(step.log_alpha1) * posterior.denoised + jnp.exp(step.log_sigma1) * kept * noise)


def _root(square):
    """√, and 0 with gradient 0 where rounding has left nothing."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


__all__ = [
    "ForwardProcess",
    "LinearRestorationDegradation",
    "RestorationDegradation",
    "ReverseProcessDrift",
    "square_root_look_back",
    "whole_look_back",
]
