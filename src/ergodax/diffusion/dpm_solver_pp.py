"""DPM-Solver++(2M): the two-step multistep exponential integrator. Lu, Zhou, Bao, Chen, Li, Zhu 2022 (arXiv:2211.01095) algorithm 2.

    D = (1 + 1/(2r)) D_i - 1/(2r) D_{i-1},   r = h_{i-1}/h_i,   x_{i+1} = (σ_{i+1}/σ_i) x_i + α_{i+1} (1 - e^{-h_i}) D,

with h the steps of λ = log(α/σ). The first step, and a last step to σ = 0, have order 1, as the authors do. Written with h_{-1} = ∞ for "no
history", so no step is special."""

import jax.numpy as jnp

from .solver import DenoiserSolver, clocks, exponential_step, finish


class DPMSolverPP2M(DenoiserSolver):
    """DPM-Solver++(2M), order 2, one network call per step. State: the previous denoised and the previous h."""

    def order(self, terms):
        """2."""
        return 2

    def init(self, terms, t0, t1, y0, args):
        """No history: h = ∞."""
        return jnp.zeros_like(y0), jnp.full_like(clocks(terms, t0, t1, y0).h, jnp.inf)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`."""
        previous, h_previous = solver_state
        step, posterior = clocks(terms, t0, t1, y0), terms.vf(t0, y0, args)
        h = step.h
        finite = jnp.isfinite(h)
        weight = jnp.where(finite, jnp.where(finite, h, 0.0) / (2 * h_previous), 0.0)
        denoised = (1 + weight) * posterior.denoised - weight * previous
        return finish(y0, exponential_step(step, y0, denoised), (posterior.denoised, h))


__all__ = ["DPMSolverPP2M"]
