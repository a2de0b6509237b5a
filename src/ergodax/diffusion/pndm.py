"""PNDM: pseudo numerical methods. Liu, Ren, Lin, Zhao 2022 (arXiv:2202.09778).

A classical method has two parts, a combination e of gradients and a step along it. PNDM keeps the combination and takes DDIM's transfer map, exact
for a constant noise e, as the step (their eq. 11):

    φ(x, e, t → s) = (α_s/α_t) x - (α_s σ_t/α_t - σ_s) e.

After a warm-up the gradients ε are combined as in the Adams-Bashforth methods (their eq. 12 has four of them, S-PNDM two):

    e = (3 ε₀ - ε₁)/2,   (23 ε₀ - 16 ε₁ + 5 ε₂)/12,   (55 ε₀ - 59 ε₁ + 37 ε₂ - 9 ε₃)/24,   ε₀ the newest.

The warm-up is a pseudo Runge-Kutta step in which stage k starts from the last gradient alone, ε_k = ε(φ(x, ε_{k-1}, t → t + c_k Δt)):

- F-PNDM: `PNDM()`, three steps of Runge-Kutta 4, 12 network calls in all (their eq. 13);
- S-PNDM: `PNDM(2, WarmUp.improved_euler())`, one step of improved Euler, 2 network calls;
- PLMS of latent diffusion, and of diffusers with `skip_prk_steps`: `PNDM(4, WarmUp.improved_euler())`, whose combination grows with the history.

Converges with order 2 (their theorem) on equal steps of t, which they use, and on other smooth grids. Written for VP paths and discrete timesteps, it
holds on any affine path. Their t runs from data to noise, ours from noise to data."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core.check import check_count
from ..core.term import Step
from .solver import DenoiserSolver, clocks, finish, predicted_noise


class WarmUp(eqx.Module):
    """How a multistep solver starts: `num_steps` steps of the Runge-Kutta method with abscissae 0, `nodes` and one weight for each.

    All static. Raises `ValueError` unless there is one weight more than nodes.
    """

    num_steps: int = eqx.field(static=True)
    nodes: tuple[float, ...] = eqx.field(static=True)
    weights: tuple[float, ...] = eqx.field(static=True)

    def __check_init__(self):
        check_count("num_steps", self.num_steps, low=0)
        if len(self.weights) != len(self.nodes) + 1:
            raise ValueError(f"`weights` must be one more than the {len(self.nodes)} `nodes`, got {len(self.weights)}.")

    @classmethod
    def runge_kutta(cls) -> "WarmUp":
        """Three steps of the classical method of order 4."""
        return cls(3, (0.5, 0.5, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6))

    @classmethod
    def improved_euler(cls) -> "WarmUp":
        """One step of Heun's method."""
        return cls(1, (1.0,), (0.5, 0.5))


_ADAMS_BASHFORTH = np.array([[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0], [55 / 24, -59 / 24, 37 / 24, -9 / 24]])


def transfer(step: Step, y: Float[Array, "*y"], noise: Float[Array, "*y"]) -> Float[Array, "*y"]:
    """φ: the step of DDIM with the predicted noise `noise`, exact if the noise is constant. Needs α > 0 at the start."""
    ratio = jnp.exp(step.log_alpha1 - step.log_alpha0)
    return ratio * y + (jnp.exp(step.log_sigma1) - ratio * jnp.exp(step.log_sigma0)) * noise


class PNDM(DenoiserSolver):
    """Pseudo linear multistep method, one network call per step after the warm-up. State: the last noises, newest first, and their number.

    - `max_order` (static): how many noises are combined at most, 1 (DDIM, after the warm-up) to 4 (default).
    - `warm_up`: `WarmUp.runge_kutta()` (default) or `WarmUp.improved_euler()`. Its last stage looks at the end of the step, where σ must be positive.

    Needs α > 0 on the grid: noise says nothing of the data where there is none.
    """

    max_order: int = eqx.field(static=True, default=4)
    warm_up: WarmUp = WarmUp.runge_kutta()

    def __check_init__(self):
        check_count("max_order", self.max_order)
        if self.max_order > 4:
            raise ValueError(f"`max_order` must be 1, 2, 3 or 4, got {self.max_order}.")

    def order(self, terms):
        """2, or 1 without history."""
        return min(self.max_order, 2)

    def init(self, terms, t0, t1, y0, args):
        """No history."""
        return jnp.stack([jnp.zeros_like(y0)] * self.max_order), jnp.zeros((), int)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`."""
        noises, count = solver_state
        whole, first = clocks(terms, t0, t1, y0), terms.vf(t0, y0, args)
        noise = predicted_noise(whole, y0, first)
        noises = jnp.concatenate([noise[None], noises[:-1]])

        def runge_kutta(noise):
            def stage(previous, coefficients):
                node, weight = coefficients
                middle = t0 + node * (t1 - t0)
                y = transfer(clocks(terms, t0, middle, y0), y0, previous)
                noise = predicted_noise(clocks(terms, middle, t1, y0), y, terms.vf(middle, y, args))
                return noise, weight * noise

            table = jnp.asarray(self.warm_up.nodes, t0.dtype), jnp.asarray(self.warm_up.weights[1:], y0.dtype)
            return self.warm_up.weights[0] * noise + jnp.sum(jax.lax.scan(stage, noise, table)[1], axis=0)

        def multistep(noise):
            weights = jnp.asarray(_ADAMS_BASHFORTH[: self.max_order, : self.max_order], y0.dtype)
            return jnp.tensordot(weights[jnp.minimum(count, self.max_order - 1)], noises, 1, precision=jax.lax.Precision.HIGHEST)

        # A branch and not a mask: its condition is the same for a whole batch, so that only one of the two runs.
        combined = jax.lax.cond(count < self.warm_up.num_steps, runge_kutta, multistep, noise)
        return finish(y0, transfer(whole, y0, combined), (noises, count + 1))


__all__ = ["PNDM", "WarmUp", "transfer"]
