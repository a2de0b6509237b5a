"""DPM-Solver-2: the singlestep exponential integrator of order 2. Lu, Zhou, Bao, Chen, Li, Zhu 2022 (arXiv:2206.00927) algorithm 1, r = 1/2.

    u = φ(x₀, ε(x₀), 0 → ½),   x₁ = φ(x₀, ε(u), 0 → 1),

with φ DDIM's step with a given noise and ½ the middle in λ = log(α/σ). In x/α and σ/α it is the midpoint rule with its middle at √(σ₀σ₁):
k-diffusion's `sample_dpm_2` is this solver. A step to σ = 0, where the middle is not defined, is DDIM's, as there."""

import jax.numpy as jnp

from ..core.path import AffinePath
from .pndm import transfer
from .solver import DenoiserSolver, clocks, finish, predicted_noise


class DPMSolver2(DenoiserSolver):
    """DPM-Solver-2, order 2, two network calls per step. Needs α > 0 on the grid.

    - `path`: the path of the term, for the time of the middle.
    """

    path: AffinePath

    def order(self, terms):
        """2."""
        return 2

    def init(self, terms, t0, t1, y0, args):
        """No state."""
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`."""
        step, posterior = clocks(terms, t0, t1, y0), terms.vf(t0, y0, args)
        clean = jnp.isneginf(step.log_sigma1)
        # The middle is found in the precision of the grid. Where there is none the model is asked at the start again, where it is finite.
        exact = terms.contr(t0, t1)
        log_snr = exact.log_alpha0 - exact.log_sigma0 + jnp.where(clean, exact.log_alpha0 - exact.log_sigma0, exact.log_alpha1 - exact.log_sigma1)
        middle = t0 + (t1 - t0) * jnp.asarray((self.path.time(log_snr) - exact.t0) / exact.dt, jnp.asarray(t0).dtype)
        noise = predicted_noise(step, y0, posterior)
        half = clocks(terms, t0, middle, y0)
        y = transfer(half, y0, noise)
        noise_middle = predicted_noise(clocks(terms, middle, t1, y0), y, terms.vf(middle, y, args))
        return finish(y0, transfer(step, y0, jnp.where(clean, noise, noise_middle)))


__all__ = ["DPMSolver2"]
