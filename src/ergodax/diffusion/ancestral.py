"""Ancestral sampling: DDPM's posterior steps and everything between them and DDIM, as one family in η.

    x₁ = α₁ D + σ₁ (√(1 - q) ε + √q z),   q = η² (1 - e^{-2h}),   ε = (x₀ - α₀ D)/σ₀,   z ~ N(0, I).

η = 1 is DDPM with the posterior ("small") variance, Ho, Jain, Abbeel 2020 (arXiv:2006.11239); η = 0 is DDIM; between them Song, Meng, Ermon 2021
(arXiv:2010.02502) eq. 16, and k-diffusion's `sample_euler_ancestral`.
"""

import jax.numpy as jnp

from ..core.check import check_range
from ..core.types import Scalar
from .solver import NoisyDenoiserSolver, clocks, finish, predicted_noise, unit_noise


class Ancestral(NoisyDenoiserSolver):
    """DDPM's ancestral steps, one network call per step. `eta` (default 1) scales the fresh noise; q is kept below 1 for `eta` > 1."""

    eta: Scalar = 1.0

    def __check_init__(self):
        check_range("eta", self.eta, low=0.0)

    def order(self, terms):
        """1, in law; 1 as an ODE solver at η = 0."""
        return 1

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`."""
        model, noise = terms.terms
        step, posterior = clocks(model, t0, t1, y0), model.vf(t0, y0, args)
        q = jnp.minimum(-jnp.expm1(-2 * step.h) * self.eta**2, 1.0).astype(y0.dtype)
        mixed = jnp.sqrt(1 - q) * predicted_noise(step, y0, posterior) + jnp.sqrt(q) * unit_noise(noise, t0, t1)
        return finish(y0, jnp.exp(step.log_alpha1) * posterior.denoised + jnp.exp(step.log_sigma1) * mixed)


__all__ = ["Ancestral"]
