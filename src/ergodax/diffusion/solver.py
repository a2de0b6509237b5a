"""What every solver on a `DenoiserTerm` shares, and the exponential step they are built of.

To write a solver: subclass `DenoiserSolver` (ODE) or `NoisyDenoiserSolver` (SDE), give `order` and `step`, and `init` where there is history. It
then runs under `ergodax.core.integrate` and under `diffrax.diffeqsolve`."""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax as dfx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.term import DenoiserTerm, Posterior, Step


class DenoiserSolver(dfx.AbstractSolver):
    """A deterministic solver on a `DenoiserTerm`."""

    term_structure: ClassVar = DenoiserTerm
    interpolation_cls: ClassVar[Callable] = dfx.LocalLinearInterpolation

    def func(self, terms, t0, y0, args):
        """The model at step index `t0`."""
        return terms.vf(t0, y0, args)


class NoisyDenoiserSolver(dfx.AbstractItoSolver):
    """A stochastic solver on a `DenoiserTerm` and a noise term beside it (`ergodax.core.with_noise`)."""

    term_structure: ClassVar = dfx.MultiTerm[tuple[DenoiserTerm, dfx.AbstractTerm]]
    interpolation_cls: ClassVar[Callable] = dfx.LocalLinearInterpolation

    def func(self, terms, t0, y0, args):
        """The model at step index `t0`."""
        return terms.terms[0].vf(t0, y0, args)

    def init(self, terms, t0, t1, y0, args) -> Any:
        """One-step methods keep nothing."""
        return None


def clocks(term: dfx.AbstractTerm, s0, s1, y: Array) -> Step:
    """The step's clocks in the dtype of `y`."""
    return jax.tree.map(lambda clock: clock.astype(y.dtype), term.contr(s0, s1))


def unit_noise(term: dfx.AbstractTerm, s0, s1) -> Array:
    """The step's N(0, I): the noise term's increment over its length in step index."""
    return term.contr(s0, s1) / jnp.sqrt(s1 - s0)


def exponential_step(step: Step, y: Float[Array, "*y"], denoised: Float[Array, "*y"]) -> Float[Array, "*y"]:
    """Exact solution over the step of the probability flow with a constant denoised D: x₁ = (σ₁/σ₀) x₀ + α₁ (1 - e^{-h}) D.

    This is DDIM with the last D, and the core of every exponential integrator with a better one. Finite for h = ∞ (α₀ = 0, or σ₁ = 0).
    """
    return jnp.exp(step.log_sigma1 - step.log_sigma0) * y - jnp.exp(step.log_alpha1) * jnp.expm1(-step.h) * denoised


def predicted_noise(step: Step, y: Float[Array, "*y"], posterior: Posterior) -> Float[Array, "*y"]:
    """ε = (x₀ - α₀ D) / σ₀ at the start of the step."""
    return (y - jnp.exp(step.log_alpha0) * posterior.denoised) * jnp.exp(-step.log_sigma0)


def finish(y0, y1, solver_state=None):
    """What diffrax wants of a step without an error estimate."""
    return y1, None, dict(y0=y0, y1=y1), solver_state, dfx.RESULTS.successful


__all__ = ["DenoiserSolver", "NoisyDenoiserSolver", "clocks", "exponential_step", "finish", "predicted_noise", "unit_noise"]
