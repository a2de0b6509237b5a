"""IIA: solver coefficients fitted to a fine solve, by improved integration approximation. Zhang, Niwa, Kleijn 2023 (arXiv:2304.11328).

A sampler's step gets a correction that costs no network call, a combination of what the last two steps know; its coefficients are fitted once, for a
given network and grid. IIA-DDIM has the data and the noise that the network predicts (their eq. 6),

    z_{i+1} = DDIM(z_i) + φ⁰_i (x̂_i - x̂_{i-1}) + φ¹_i (ε_i - ε_{i-1}).

For one step after another, B trajectories are rolled to z_i with the steps already fitted, a reference z* at t_{i+1} is solved from the same z_i in M
small steps, and φ_i = argmin Σ_b |z* - z_{i+1}|². The first step has nothing to compare with and stays as it is. Variants are plugs:

- text to image (their eq. 8), one term β_i ε of the guided noise: `fit_iia(…, update=noise_update, differences=False)`;
- IIA-EDM: `update=heun_update, reference=Heun()`, with the differences of Heun's two velocities;
- IIA-DPM-Solver++: `reference=DPMSolverPP2M()`. Its own update is DDIM's and a multiple of x̂_i - x̂_{i-1}, so the same coefficients span it.

Deviations: least squares by singular values, and not by normal equations: the terms are collinear in the second step, and in all of them on centred
Gaussian data. For EDM the paper combines the same gradients in a form that could not be checked here."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_count
from ..core.loop import integrate
from ..core.term import DenoiserTerm
from ..core.types import PyTree
from .ddim import DDIM
from .solver import DenoiserSolver, clocks, exponential_step, finish, predicted_noise


def ddim_update(terms, t0, t1, y, args):
    """DDIM's step, and the predicted data and noise: (y at t1, stack of two arrays like y)."""
    step, posterior = clocks(terms, t0, t1, y), terms.vf(t0, y, args)
    return exponential_step(step, y, posterior.denoised), jnp.stack([posterior.denoised, predicted_noise(step, y, posterior)])


def noise_update(terms, t0, t1, y, args):
    """DDIM's step, and the predicted noise alone."""
    y1, quantities = ddim_update(terms, t0, t1, y, args)
    return y1, quantities[1:]


def heun_update(terms, t0, t1, y, args):
    """Heun's step in path time, and its velocities at both ends; Euler's, and its velocity twice, where σ = 0 at the end."""
    step, start = clocks(terms, t0, t1, y), terms.vf(t0, y, args).velocity
    clean = jnp.isneginf(step.log_sigma1)
    end = jnp.where(clean, start, terms.vf(jnp.where(clean, t0, t1), y + step.dt * start, args).velocity)
    return y + step.dt / 2 * (start + end), jnp.stack([start, end])


class IIA(DenoiserSolver):
    """A step with fitted corrections, as many network calls as `update` has. State: the quantities of the last step, and whether there is one.

    - `coefficients`: φ of shape (N, k), for the N steps of the grid they were fitted on. Zeros give the plain sampler.
    - `update`: `(terms, t0, t1, y, args) -> (y at t1, k quantities)`; `ddim_update` (default, k = 2), `heun_update` or `noise_update`.
    - `differences` (static, default true): correct with the differences to the last step, and not with the quantities themselves.
    """

    coefficients: Float[Array, "steps k"]
    update: Callable = ddim_update
    differences: bool = eqx.field(static=True, default=True)

    def order(self, terms):
        """1: what `ddim_update` has. Fitted coefficients do better, by no fixed order."""
        return 1

    def init(self, terms, t0, t1, y0, args):
        """No history."""
        return jnp.stack([jnp.zeros_like(y0)] * self.coefficients.shape[-1]), jnp.zeros((), y0.dtype)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`."""
        y1, quantities = self.update(terms, t0, t1, y0, args)
        weights = self.coefficients[jnp.round(t0).astype(int)].astype(y0.dtype)
        correction = jnp.tensordot(weights, _terms(quantities, solver_state, self.differences), 1, precision=jax.lax.Precision.HIGHEST)
        return finish(y0, y1 + correction, (quantities, jnp.ones((), y0.dtype)))


def _terms(quantities, history, differences):
    """What the coefficients multiply: 0 for a difference to nothing."""
    previous, exists = history
    return exists * (quantities - previous) if differences else quantities


def fit_iia(
    term: DenoiserTerm,
    starts: Float[Array, "batch *y"],
    args: PyTree = None,
    *,
    update: Callable = ddim_update,
    reference: DenoiserSolver | None = None,
    num_substeps: int = 10,
    differences: bool = True,
    args_axis: int | None = None,
) -> IIA:
    """Fits the coefficients of `IIA` for the network, path and grid of `term`. Costs (M + 1) N network calls per start, once.

    - `starts`: states at grid[0], B of them (the paper takes 20 to 200); the network sees one at a time, under `vmap`.
    - `args`: passed to the network: the same for all starts, or one for each along `args_axis` (prompts, classes).
    - `reference`: the solver of the fine solve, `DDIM()` by default, in M = `num_substeps` (default 10) equal steps of t. The fit cannot beat it: of
      order 1, it leaves about 1/M of DDIM's error.

    Raises `ValueError` for `num_substeps` that is not a positive integer.
    """
    check_count("num_substeps", num_substeps)
    reference = DDIM() if reference is None else reference
    shares = jnp.arange(1, num_substeps).astype(term.grid.dtype) / num_substeps

    def one(index, y, args):
        y1, quantities = update(term, index, index + 1, y, args)
        start, end = term.time(index), term.time(index + 1)
        grid = jnp.concatenate([start[None], start + shares * (end - start), end[None]])
        return y1, quantities, integrate(DenoiserTerm(term.denoised, term.path, grid), reference, y, args)

    ones = jax.vmap(one, in_axes=(None, 0, args_axis))

    def body(carry, index):
        y, history = carry
        y1, quantities, target = ones(index, y, args)
        features = _terms(quantities, history, differences)
        design = jnp.moveaxis(features, 1, -1).reshape(-1, features.shape[1])
        scale = jnp.linalg.norm(design, axis=0)
        scale = jnp.where(scale > 0, scale, 1)
        # After a plain step the terms are collinear up to rounding, for α_i (x̂_i - x̂_{i-1}) + σ_i (ε_i - ε_{i-1}) is the last correction.
        weights = jnp.linalg.lstsq(design / scale, (target - y1).ravel(), rcond=cutoff)[0] / scale
        y1 = y1 + jnp.einsum("k,bk...->b...", weights, features, precision=jax.lax.Precision.HIGHEST)
        return (y1, (quantities, jnp.ones((), y.dtype))), weights

    cutoff = float(jnp.finfo(starts.dtype).eps) ** 0.5
    indices = jnp.arange(term.num_steps).astype(term.grid.dtype)
    quantities = jax.eval_shape(ones, indices[0], starts, args)[1]
    history = jnp.zeros(quantities.shape, quantities.dtype), jnp.zeros((), starts.dtype)
    return IIA(jax.lax.scan(body, (starts, history), indices)[1], update, differences)


__all__ = ["IIA", "ddim_update", "fit_iia", "heun_update", "noise_update"]
