"""`DenoiserTerm`: the one diffrax term that diffusion and flow solvers step on.

It holds the posterior mean of the data, the path, and the time grid, and is integrated over STEP INDICES s = 0 … N with t = grid[s]. So diffrax's
time always runs forward, a grid may go back in t (Restart, RePaint), and every step has its own noise key. One term and N solvers, not N × M: every
parametrisation of the network was converted before, in `ergodax.core.prediction`."""

from typing import NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .check import check_increasing, check_times
from .path import AffinePath
from .prediction import VelocityPrediction
from .types import PRNGKey, Scalar, VectorField


class Posterior(NamedTuple):
    """What a solver sees of the model at the start of a step. Unused fields cost nothing under `jit`."""

    denoised: Float[Array, "*x"]  # E[data | x_t]
    velocity: Float[Array, "*x"]  # dx/dt of the probability flow
    diffusion: Float[Array, ""]  # g² of the path's forward SDE, in units of t


class Step(NamedTuple):
    """The path's clocks at both ends of a step."""

    t0: Array
    t1: Array
    log_alpha0: Array
    log_alpha1: Array
    log_sigma0: Array
    log_sigma1: Array

    @property
    def h(self) -> Array:
        """λ₁ - λ₀ with λ = log(α/σ); +inf where the step starts at α = 0 or ends at σ = 0."""
        return (self.log_alpha1 - self.log_sigma1) - (self.log_alpha0 - self.log_sigma0)

    @property
    def dt(self) -> Array:
        """t₁ - t₀."""
        return self.t1 - self.t0


class DenoiserTerm(dfx.AbstractTerm):
    """`denoised(t, x, args)` on `path`, over the steps of `grid`.

    - `denoised`: E[data | x_t = x], array like x; `ergodax.core.Denoiser` makes one of a network.
    - `grid`: times of shape (N + 1,), from noise to data; may be traced and swept. Must increase unless `restarts=True` (static), which says that
      going back in t is meant.

    Solvers of `ergodax.diffusion` use the posterior mean and the clocks. Stock explicit diffrax solvers (`Euler`, `Tsit5`, …) run on this term too:
    they see the probability-flow ODE dx = u dt, piecewise in the grid's t. Raises `ValueError` for a grid of another shape or order.
    """

    denoised: VectorField
    path: AffinePath
    grid: Float[Array, " steps"]
    restarts: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check_grid = check_times if self.restarts else check_increasing
        check_grid("grid", self.grid)

    @property
    def num_steps(self) -> int:
        """N, the number of steps of the grid."""
        return self.grid.shape[0] - 1

    def time(self, s: Scalar) -> Float[Array, ""]:
        """grid[s], linear between the indices, and exact on them."""
        s = jnp.asarray(s, self.grid.dtype)
        i = jnp.clip(jnp.floor(s), 0, self.num_steps - 1)
        w, i = s - i, i.astype(int)
        return (1 - w) * self.grid[i] + w * self.grid[i + 1]

    def vf(self, t, y, args):
        """The model at step index `t`: a `Posterior`."""
        time = self.time(t).astype(y.dtype)
        denoised = self.denoised(time, y, args)
        velocity = VelocityPrediction().from_denoised(self.path, time, y, denoised)
        return Posterior(denoised, velocity, self.path.diffusion(time))

    def contr(self, t0, t1, **kwargs):
        """The clocks of the step from index `t0` to `t1`: a `Step`."""
        start, end = self.time(t0), self.time(t1)
        path = self.path
        return Step(start, end, path.log_alpha(start), path.log_alpha(end), path.log_sigma(start), path.log_sigma(end))

    def prod(self, vf, control):
        """The probability flow's first-order increment, u Δt."""
        return vf.velocity * control.dt.astype(vf.velocity.dtype)


def _one(t, y, args):
    return jnp.ones((), y.dtype)


def with_noise(term: dfx.AbstractTerm, key: PRNGKey, y0: Float[Array, "*x"]) -> dfx.MultiTerm:
    """`term` with a unit Brownian motion in step index beside it: what a stochastic solver steps on, one fresh N(0, I) per step from `key`."""
    brownian = dfx.UnsafeBrownianPath(jax.ShapeDtypeStruct(y0.shape, y0.dtype), key)
    return dfx.MultiTerm(term, dfx.ControlTerm(_one, brownian))


__all__ = ["DenoiserTerm", "Posterior", "Step", "with_noise"]
