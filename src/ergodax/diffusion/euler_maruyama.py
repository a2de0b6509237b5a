"""Euler–Maruyama for the reverse-time SDE in path time,

    dx = (u + ½ κ² g² s) dt + κ g dw,

with u the probability-flow velocity, s the score, g² the path's diffusion. κ = 1 is the reverse SDE of Song et al. 2021 (arXiv:2011.13456) eq. 6, κ
= 0 their probability-flow ODE; every κ has the same marginals."""

import jax.numpy as jnp

from ..core.check import check_range
from ..core.types import Scalar
from .solver import NoisyDenoiserSolver, clocks, finish, predicted_noise, unit_noise


class EulerMaruyama(NoisyDenoiserSolver):
    """Weak order 1, one network call per step. `noise_scale` is κ (default 1).

    g² must be finite on the grid: start after t = 0 on a path with α(0) = 0, such as `FlowMatchingPath`.
    """

    noise_scale: Scalar = 1.0

    def __check_init__(self):
        check_range("noise_scale", self.noise_scale, low=0.0)

    def order(self, terms):
        """1, at κ = 0."""
        return 1

    def strong_order(self, terms):
        """1: the noise is additive in x."""
        return 1

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`."""
        model, noise = terms.terms
        step, posterior = clocks(model, t0, t1, y0), model.vf(t0, y0, args)
        variance = jnp.asarray(self.noise_scale**2 * posterior.diffusion, y0.dtype)
        score = -predicted_noise(step, y0, posterior) * jnp.exp(-step.log_sigma0)
        drift = posterior.velocity + variance / 2 * score
        return finish(y0, y0 + step.dt * drift + jnp.sqrt(variance * step.dt) * unit_noise(noise, t0, t1))


__all__ = ["EulerMaruyama"]
