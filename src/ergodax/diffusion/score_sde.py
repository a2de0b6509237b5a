"""Score-based generative modelling through SDEs. Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole 2021 (arXiv:2011.13456).

The paper's forward SDEs are `ergodax.core.VPPath`, `VEPath` and `SubVPPath` (their time u is our 1 - t); its reverse SDE (eq. 6) is
`EulerMaruyama`, its probability flow (eq. 13) `ergodax.core.ProbabilityFlow`, its likelihood (eq. 39) `ergodax.core.log_likelihood`, its VE
ancestral sampler (eq. 47) `Ancestral`. Here is the one solver of its own, the reverse diffusion predictor (eq. 46). With the forward chain x_{i+1}
= r x_i + G z between two noise levels of the path, r = α_{i+1}/α_i and G² = σ²_{i+1} - r² σ²_i, it steps

    x_i = (2 - r) x_{i+1} + G² s(x_{i+1}) + G z.

The paper writes it for VP (r = √(1 - β_{i+1}), G² = β_{i+1}) and VE (r = 1); on any affine path the same two clocks serve.
"""

import jax.numpy as jnp

from .solver import NoisyDenoiserSolver, clocks, finish, predicted_noise, unit_noise


class ReverseDiffusion(NoisyDenoiserSolver):
    """The reverse diffusion predictor, one network call per step. Needs α > 0 on the grid, as r does."""

    def order(self, terms):
        """1, in law."""
        return 1

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`."""
        model, noise = terms.terms
        step, posterior = clocks(model, t0, t1, y0), model.vf(t0, y0, args)
        ratio = jnp.exp(step.log_alpha0 - step.log_alpha1)
        share = -jnp.expm1(-2 * step.h)  # G²/σ₀²
        sigma0 = jnp.exp(step.log_sigma0)
        kick = jnp.sqrt(share) * unit_noise(noise, t0, t1) - share * predicted_noise(step, y0, posterior)
        return finish(y0, (2 - ratio) * y0 + sigma0 * kick)


__all__ = ["ReverseDiffusion"]
