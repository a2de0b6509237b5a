"""Time-shift sampler: the network is asked at the noise level that the state has. Li, Qu, Yao, Sun, Moens 2023 (arXiv:2305.15583).

Errors of a sampler change the variance of its states, so that a state at the nominal time t looks to the network like one of another time (exposure
bias). After each step, while t is on the noisy side of a cutoff, the state's own variance picks the time that the next step starts from, network
call and coefficients:

    v = variance over all components of x_t (unbiased),   t_s = argmin |v - σ²_τ| over τ in [t - w/2, t + w/2].

`TimeShift` does this round any solver on a `DenoiserTerm`; it costs one variance per step and no network call.

- The rule leaves out the data's own variance: α² v₀ + σ² is what x_t really has, so t_s lies too far on the noisy side unless v₀ is small (at v₀ = 1
  on a VP path it is the window's end always). With exact data of v₀ = 0 in d dimensions t_s scatters about t with a standard deviation of
  √(2/d) σ²/|dσ²/dt|.
- As in the paper's text; the released loop for pseudo-numerical methods shifts the target of the step instead, by the variance before it.
- Theirs is a table of 1000 levels: their window w and cutoff t_c are `window` = w/1000, `cutoff` = 1 - t_c/1000 and `num_candidates` = w + 1 here.
"""

from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_count, check_range
from ..core.types import Scalar
from .wrapped_solver import WrappedSolver, join


class TimeShift(WrappedSolver):
    """`solver` with shifted time steps, on ONE example (every example has its own time: `vmap` the solve over a batch).

    - `solver`: any solver on a `DenoiserTerm`. A stochastic one needs a `window` below the length of two steps: its step may not go back in t.
    - `window` (default 0.03): w, in units of t. 0 is `solver` itself.
    - `cutoff` (default 0.7): times are shifted where grid time < `cutoff`. 0 is `solver` itself.
    - `num_candidates` (static, default 31): equally spaced τ in the window; odd, so that t is one of them.

    Candidates are times of the grid's continuation into its steps; none lies before its start. State: the shifted step index and the state of
    `solver`. The choice of t_s has gradient 0. Raises `ValueError` for a value out of range or an example of one number, which has no variance.
    """

    solver: dfx.AbstractSolver  # pyrefly: ignore[bad-override]
    window: Scalar = 0.03
    cutoff: Scalar = 0.7
    num_candidates: int = eqx.field(static=True, default=31)

    def __check_init__(self):
        check_range("window", self.window, low=0.0, high=1.0)
        check_range("cutoff", self.cutoff, low=0.0, high=1.0)
        check_count("num_candidates", self.num_candidates)
        if self.num_candidates % 2 == 0:
            raise ValueError(f"`num_candidates` must be odd, got {self.num_candidates}.")

    def init(self, terms, t0, t1, y0, args):
        """The nominal start."""
        if y0.size < 2:
            raise ValueError(f"an example must have at least two numbers to have a variance, got shape {y0.shape}.")
        state = jnp.asarray(t0), self.solver.init(terms, t0, t1, y0, args)
        # Made of the example, as later states are, whose clocks are its own: under `shard_map` they differ between devices.
        return jax.tree.map(lambda leaf: leaf + jnp.zeros_like(y0.ravel()[0], leaf.dtype), state)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step of `solver` from the shifted index to `t1`, and the shift of `t1`."""
        start, state = solver_state
        model, *noise = self.parts(terms)
        shifted = join(model, *(_NominalNoise(term, start, t0, t1) for term in noise))
        y1, error, dense, state, result = self.solver.step(shifted, start, t1, y0, args, state, made_jump)
        return y1, error, dense, (self.matching_index(model, t1, y1), state), result

    def matching_index(self, model: dfx.AbstractTerm, s: Float[Array, ""], y: Float[Array, "*y"]) -> Float[Array, ""]:
        """The step index of t_s for the state `y` at step index `s`, a fraction between the whole ones."""
        before, here, after = (model.contr(i, i).t0 for i in (s - 1, s, s + 1))
        offset = jnp.asarray(self.window, s.dtype) * jnp.linspace(-0.5, 0.5, self.num_candidates, dtype=s.dtype)
        # A window in t, in step index: the grid's own slope on either side.
        candidates = jnp.maximum(s + offset / jnp.where(offset < 0, here - before, after - here), 0)
        variance = jnp.exp(2 * jax.vmap(lambda i: model.contr(i, i).log_sigma0)(candidates)).astype(y.dtype)
        distance = jnp.abs(jnp.var(y, ddof=1) - variance)
        # Beyond the end of the path a candidate has no variance, and is none.
        best = candidates[jnp.argmin(jnp.where(jnp.isnan(distance), jnp.inf, distance))]
        return jax.lax.stop_gradient(jnp.where(here < jnp.asarray(self.cutoff, here.dtype), best, s))


class _NominalNoise(dfx.AbstractTerm):
    """The noise of the nominal step from `nominal` to `end`, stretched to the step from `start`: steps that start elsewhere still draw independent
    noises, and so do the parts of one.
    """

    term: dfx.AbstractTerm
    start: Any
    nominal: Any
    end: Any

    def vf(self, t, y, args):
        return self.term.vf(t, y, args)

    def contr(self, t0, t1, **kwargs):
        stretch = (self.end - self.nominal) / (self.end - self.start)
        inner = [self.nominal + (t - self.start) / (self.end - self.start) * (self.end - self.nominal) for t in (t0, t1)]
        return self.term.contr(*inner, **kwargs) / jnp.sqrt(stretch)

    def prod(self, vf, control):
        return self.term.prod(vf, control)


__all__ = ["TimeShift"]
