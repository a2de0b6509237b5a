"""BDIA: exact diffusion inversion by bi-directional integration approximation. Zhang, Lewis, Kleijn 2023 (arXiv:2307.10829).

Let D_{i→j}(x) be a one-step move of a sampler from x at time t_i to t_j, forward or backward. The first step is x₁ = D_{0→1}(x₀); after it

    x_{i+1} = D_{i→i+1}(x_i) + γ (x_{i-1} - D_{i→i-1}(x_i)),

so the last interval is integrated again, backward from its end, with weight γ. For DDIM's move both D share one network call. Given x_i and x_{i+1}
the rule is linear in x_{i-1}, hence inverted exactly:

    x_{i-1} = D_{i→i-1}(x_i) + (x_{i+1} - D_{i→i+1}(x_i))/γ,

the same rule on the reversed grid with 1/γ. Round-trip editing is `bdia_invert` with the source prompt, then `bdia_integrate` with the edit prompt.

γ = 0 is the sampler itself, γ = 1 the two-step leapfrog; the authors use 0.5 for text to image. (γ as in the paper's code; its README writes 1 - γ.)
With DDIM's move and smooth grids the order is 2 at γ = 1, else 1, with an error of (1 - γ)/(1 + γ) of DDIM's. Inversion amplifies rounding like |γ|⁻ⁿ
over n steps: in float64 γ = 0.5 returns to 1e-7 over 10 steps and is lost at 40, γ = 1 holds.

`heun_move` is BDIA-EDM by the general rule, with 3 network calls per step where Heun has 2."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_range, is_concrete
from ..core.term import DenoiserTerm
from ..core.types import PyTree, Scalar
from .solver import DenoiserSolver, clocks, exponential_step, finish


def ddim_move(terms, s0, s1, y, posterior, args):
    """DDIM from step index `s0` to `s1`, in either direction; `posterior` is the model at (s0, y)."""
    return exponential_step(clocks(terms, s0, s1, y), y, posterior.denoised)


def heun_move(terms, s0, s1, y, posterior, args):
    """Heun's method in path time from `s0` to `s1`, one more network call: Euler's where σ = 0 at the end, as in `Heun`."""
    step = clocks(terms, s0, s1, y)
    euler, clean = y + step.dt * posterior.velocity, jnp.isneginf(step.log_sigma1)
    end = terms.vf(jnp.where(clean, s0, s1), euler, args)
    return jnp.where(clean, euler, y + step.dt / 2 * (posterior.velocity + end.velocity))


class BDIA(DenoiserSolver):
    """BDIA, one network call per step with `ddim_move`. State: the previous y and its step index.

    - `gamma` (default 1): the weight γ, any finite number; stable for |γ| <= 1.
    - `move`: `(terms, s0, s1, y, posterior, args) -> y at s1`; `ddim_move` (default) or `heun_move`.
    """

    gamma: Scalar = 1.0
    move: Callable = ddim_move

    def __check_init__(self):
        check_range("gamma", self.gamma, open_low=True, open_high=True)

    def order(self, terms):
        """1, for the default move and γ other than 1."""
        return 1

    def init(self, terms, t0, t1, y0, args):
        """No history: an infinite step index."""
        return jnp.zeros_like(y0), jnp.asarray(-jnp.inf, jnp.asarray(t0).dtype)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`."""
        previous, index = solver_state
        history = jnp.isfinite(index)
        gamma = jnp.where(history, jnp.asarray(self.gamma, y0.dtype), 0)
        posterior = terms.vf(t0, y0, args)
        back = self.move(terms, t0, jnp.where(history, index, t1), y0, posterior, args)
        y1 = self.move(terms, t0, t1, y0, posterior, args) + gamma * (previous - back)
        return finish(y0, y1, (y0, t0))


Pair = tuple[Float[Array, "*y"], Float[Array, "*y"]]


def bdia_integrate(term: DenoiserTerm, solver: BDIA, pair: Pair, args: PyTree = None) -> Pair:
    """From the states at grid[0] and grid[1] to those at grid[N - 1] and grid[N], N >= 2: every step has history, none is the plain first step."""
    _check_steps(term)

    def body(carry, index):
        previous, y = carry
        y1, _, _, _, _ = solver.step(term, index, index + 1, y, args, (previous, index - 1), made_jump=False)
        return (y, y1), None

    return jax.lax.scan(body, pair, jnp.arange(1, term.num_steps, dtype=term.grid.dtype))[0]


def bdia_invert(term: DenoiserTerm, solver: BDIA, pair: Pair, args: PyTree = None) -> Pair:
    """The exact inverse of `bdia_integrate`, up to rounding: from the states at grid[N - 1] and grid[N] to those at grid[0] and grid[1].

    - `pair`: of a sample, the last two states of its run (`save=lambda t, y: y` of `integrate` has them). Of given data y, any approximation before
      it, such as a DDIM step on the grid `term.grid[-1:-3:-1]` (with `restarts=True`): the round trip is exact whatever it is.

    Noise is predicted at every time but grid[0] and grid[N]. Raises `ValueError` for γ = 0 and for a grid of less than two steps.
    """
    _check_steps(term)
    if is_concrete(solver.gamma) and solver.gamma == 0:
        raise ValueError("`gamma` must not be 0: the plain sampler has no exact inverse.")
    backward = DenoiserTerm(term.denoised, term.path, term.grid[::-1], restarts=True)
    second, first = bdia_integrate(backward, BDIA(1 / solver.gamma, solver.move), pair[::-1], args)
    return first, second


def _check_steps(term):
    if term.num_steps < 2:
        raise ValueError(f"`term` must have a grid of at least two steps, got {term.num_steps}.")


__all__ = ["BDIA", "bdia_integrate", "bdia_invert", "ddim_move", "heun_move"]
