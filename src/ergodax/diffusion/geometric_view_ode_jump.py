"""The geometric view of diffusion sampling, and ODE-Jump. Chen, Zhou, Mei, Shen, Chen, Wang 2023 (arXiv:2305.19947).

In y = x/α and s = σ/α every affine path is variance exploding, and its probability flow is dy/ds = (y - r(y; s))/s with the denoiser r. Two curves
belong to a run: the sampling trajectory {x_n} and the denoising trajectory {r(x_n)}.

- For data {y_i} the optimal denoiser is one step of Gaussian mean shift with bandwidth s,

      r*(y; s) = Σ_i w_i y_i,   w = softmax_i(-|y - y_i|²/(2 s²)),

  which never lowers the density of the noisy data: p_s(r*(y)) >= p_s(y).
- Euler's step (here: DDIM) is a convex combination, y₁ = (s₁/s₀) y₀ + (1 - s₁/s₀) r(y₀): annealed mean shift. To s = 0 it gives r itself.
- The sampling trajectory is nearly straight and keeps the norm √(d s² + m²) in high dimension, m² the mean square of the data; the denoising one
  obeys dr/ds = -s d²y/ds², so it moves only where the other curves, and is at the sample earlier.

Hence the ODE-Jump: stop at level s_j and return r(x_j; s_j), which saves the remaining network calls. It pays in the later part of a run: early, all
r are near the mean of the data. Written for the EDM process; here for any affine path, where s is σ/α.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from diffrax import AbstractSolver
from jaxtyping import Array, Float

from ..core.check import check_count
from ..core.loop import integrate
from ..core.path import AffinePath
from ..core.term import DenoiserTerm
from ..core.types import PRNGKey, PyTree, Scalar, Time, VectorField


def mean_shift(y: Float[Array, "*x"], data: Float[Array, "n *row"], bandwidth: Scalar) -> Float[Array, "*x"]:
    """One step of Gaussian mean shift: the mean of `data` with weights ∝ exp(-|y - y_i|²/(2 bandwidth²)). Comaniciu and Meer 2002.

    For one point `y`. Raises `ValueError` if the rows of `data` have another shape. In the limit of bandwidth 0 it is the nearest row.
    """
    if data.ndim != y.ndim + 1 or data.shape[1:] != y.shape:
        raise ValueError(f"`data` must have shape (n, *{y.shape}) beside a point of shape {y.shape}, got {data.shape}.")
    square = jnp.sum((data - y).reshape(len(data), -1) ** 2, axis=1)
    # Distances beyond the nearest, and a floor that is felt only where they are all infinite in units of the bandwidth.
    scale = jnp.maximum(jnp.asarray(bandwidth, y.dtype) ** 2, jnp.finfo(y.dtype).tiny)
    weight = jax.nn.softmax(-(square - jax.lax.stop_gradient(jnp.min(square))) / (2 * scale))
    return jnp.tensordot(weight, data, 1, precision=jax.lax.Precision.HIGHEST)


class EmpiricalDenoiser(eqx.Module):
    """The optimal denoiser r* of a data set on `path`, as a vector field `(t, x, args)` for one point x: mean shift of x/α with bandwidth σ/α.

    `data` has shape (n, *x). Needs α > 0. (With Gaussian components of finite width: `ergodax.data.GaussianMixture`.)
    """

    data: Float[Array, "n *x"]
    path: AffinePath

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """E[data | x_t = x] under the empirical law."""
        alpha = self.path.alpha(t).astype(x.dtype)
        return mean_shift(x / alpha, self.data.astype(x.dtype), self.path.sigma(t).astype(x.dtype) / alpha)


def ode_jump(
    term: DenoiserTerm,
    solver: AbstractSolver,
    x: Float[Array, "*x"],
    args: PyTree = None,
    *,
    num_steps: int,
    key: PRNGKey | None = None,
) -> Float[Array, "*x"]:
    """The denoised data after the first `num_steps` steps of the term's grid: `num_steps` steps of `solver` and one call of the model.

    `x` is the state at grid[0], of any shape that the model takes; `key` is for a stochastic solver. With DDIM and a grid whose next point is clean
    data (σ = 0) it is that last step. Raises `ValueError` for a count that the grid does not have.
    """
    check_count("num_steps", num_steps)
    if num_steps > term.num_steps:
        raise ValueError(f"`num_steps` must be at most {term.num_steps}, the steps of the grid, got {num_steps}.")
    x = integrate(eqx.tree_at(lambda term: term.grid, term, term.grid[: num_steps + 1]), solver, x, args, key=key)
    return term.denoised(term.grid[num_steps].astype(x.dtype), x, args)


def trajectories(
    term: DenoiserTerm, solver: AbstractSolver, x: Float[Array, "*x"], args: PyTree = None, *, key: PRNGKey | None = None
) -> tuple[Float[Array, "nodes *x"], Float[Array, "nodes *x"]]:
    """The sampling trajectory {x_n} and the denoising trajectory {r(x_n)} at the N + 1 points of the grid, each of shape (N + 1, *x).

    Row j of the second is what `ode_jump` returns after j steps. The model must have a value at the last point: end the grid where σ > 0 unless it
    does at σ = 0.
    """
    _, states = integrate(term, solver, x, args, key=key, save=lambda t, x: x)
    states = jnp.concatenate([x[None], states])
    times = term.grid.astype(x.dtype)
    return states, jax.lax.map(lambda node: term.denoised(node[0], node[1], args), (times, states))


def chord_deviation(trajectory: Float[Array, "nodes *x"]) -> Float[Array, " nodes"]:
    """Each point's distance from the chord between the two ends, over the chord's length. For one example; 0 on a straight line."""
    points = trajectory.reshape(len(trajectory), -1)
    chord = points[-1] - points[0]
    square = jnp.sum(chord**2)
    offset = points - points[0]
    foot = (offset @ chord / square)[:, None] * chord
    return jax.vmap(_norm)(offset - foot) / jnp.sqrt(square)


def denoiser_deviation(
    denoised: VectorField, optimal: VectorField, times: Float[Array, " nodes"], states: Float[Array, "nodes *x"], args: PyTree = None
) -> Float[Array, " nodes"]:
    """|r_θ - r*| along a trajectory, of shape (nodes,): the paper's score deviation, in units of the data.

    A trained model agrees with the empirical optimum at large and at small noise and departs between them, where it generalises.
    """

    def one(node):
        t, x = node
        return _norm(denoised(t, x, args) - optimal(t, x, args))

    return jax.lax.map(one, (times.astype(states.dtype), states))


def _norm(x):
    """|x|, with gradient 0 at 0."""
    square = jnp.sum(x**2)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


__all__ = ["EmpiricalDenoiser", "chord_deviation", "denoiser_deviation", "mean_shift", "ode_jump", "trajectories"]
