"""DDIM: the exponential integrator of order 1 for the probability flow. Song, Meng, Ermon 2021 (arXiv:2010.02502) eq. 12 with their σ = 0.

In x/α and σ/α it is Euler's method: k-diffusion's `sample_euler` is this solver.
"""

from .solver import DenoiserSolver, clocks, exponential_step, finish


class DDIM(DenoiserSolver):
    """Deterministic DDIM, order 1, one network call per step. Exact at steps from α = 0 and to σ = 0."""

    def order(self, terms):
        """1."""
        return 1

    def init(self, terms, t0, t1, y0, args):
        """No state."""
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`."""
        step, posterior = clocks(terms, t0, t1, y0), terms.vf(t0, y0, args)
        return finish(y0, exponential_step(step, y0, posterior.denoised))


__all__ = ["DDIM"]
