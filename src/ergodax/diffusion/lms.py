"""LMS: linear multistep in σ/α, k-diffusion's `sample_lms` (Crowson; there with K-LMS as its name in front ends).

In y = x/α and s = σ/α the probability flow is dy/ds = ε, and a step from s₀ to s₁ integrates the polynomial through the last noises exactly:

    y₁ = y₀ + Σ_j ε_{i-j} ∫ Π_{k≠j} (s - s_{i-k})/(s_{i-j} - s_{i-k}) ds   from s₀ to s₁.

These are the Adams-Bashforth methods on unequal steps (Hairer, Nørsett, Wanner 1993, section III.5), and in ρ = s the ρAB-DEIS of Zhang and Chen
2022 (arXiv:2204.13902). The first steps have lower orders, for there is less history."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from ..core.check import check_count
from .pndm import transfer
from .solver import DenoiserSolver, clocks, finish, predicted_noise


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(2)  # exact up to degree 3


class LMS(DenoiserSolver):
    """Linear multistep method, one network call per step. State: the last noises and their σ/α, newest first; ∞ for no history.

    `max_order` (static) is 1 (DDIM) to 4 (default). Needs α > 0 on the grid.
    """

    max_order: int = eqx.field(static=True, default=4)

    def __check_init__(self):
        check_count("max_order", self.max_order)
        if self.max_order > 4:
            raise ValueError(f"`max_order` must be 1, 2, 3 or 4, got {self.max_order}.")

    def order(self, terms):
        """`max_order`, up to the error of the first steps, which have lower orders."""
        return self.max_order

    def init(self, terms, t0, t1, y0, args):
        """No history: σ/α = ∞."""
        log_sigma = clocks(terms, t0, t1, y0).log_sigma0
        return jnp.stack([jnp.zeros_like(y0)] * self.max_order), jnp.stack([jnp.full_like(log_sigma, jnp.inf)] * self.max_order)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`."""
        noises, ratios = solver_state
        step, posterior = clocks(terms, t0, t1, y0), terms.vf(t0, y0, args)
        ratio0, ratio1 = jnp.exp(step.log_sigma0 - step.log_alpha0), jnp.exp(step.log_sigma1 - step.log_alpha1)
        noises = jnp.concatenate([predicted_noise(step, y0, posterior)[None], noises[:-1]])
        ratios = jnp.concatenate([ratio0[None], ratios[:-1]])
        # Means of the Lagrange polynomials over the step; a node that is missing has none, and is in no other.
        known = jnp.isfinite(ratios)
        s = (ratio0 + ratio1) / 2 + (ratio1 - ratio0) / 2 * jnp.asarray(_NODES, ratio0.dtype)
        others = known & ~jnp.eye(self.max_order, dtype=bool)
        gaps = jnp.where(others & known[:, None], ratios[:, None] - ratios, 1)
        factors = jnp.where(others, (s[:, None, None] - jnp.where(known, ratios, 0)) / gaps, 1)
        means = jnp.where(known, jnp.tensordot(jnp.asarray(_WEIGHTS / 2, s.dtype), jnp.prod(factors, axis=-1), 1), 0)
        return finish(y0, transfer(step, y0, jnp.tensordot(means, noises, 1)), (noises, ratios))


__all__ = ["LMS"]
