"""Heun's method for the probability flow in path time, as EDM uses it. Karras, Aittala, Aila, Laine 2022 (arXiv:2206.00364) algorithm 1.

    x̂ = x₀ + Δt u(t₀, x₀),   x₁ = x₀ + Δt/2 (u(t₀, x₀) + u(t₁, x̂)),

and x₁ = x̂ where σ₁ = 0, since u does not exist there. On `EDMPath` Δt is their step in σ. (Euler in path time is `diffrax.Euler`, which runs on
the same term; `diffrax.Heun` lacks the last line.)"""

import jax.numpy as jnp

from .solver import DenoiserSolver, clocks, finish


class Heun(DenoiserSolver):
    """Explicit trapezoidal rule, order 2, two network calls per step."""

    def order(self, terms):
        """2."""
        return 2

    def init(self, terms, t0, t1, y0, args):
        """No state."""
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`."""
        step, start = clocks(terms, t0, t1, y0), terms.vf(t0, y0, args)
        euler = y0 + step.dt * start.velocity
        # The model is never asked at σ = 0: its answer there could be NaN, and a NaN in a branch not taken still ruins gradients.
        clean = jnp.isneginf(step.log_sigma1)
        end = terms.vf(jnp.where(clean, t0, t1), euler, args)
        return finish(y0, jnp.where(clean, euler, y0 + step.dt / 2 * (start.velocity + end.velocity)))


__all__ = ["Heun"]
