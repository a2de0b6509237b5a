"""One round of reflow done well: 2-rectified flow++. Lee, Lin, Fanti 2024 (arXiv:2405.20320).

A flow trained on independent pairs bends. Reflow draws noise x₀, solves the flow to its x₁, and trains a second flow on these pairs: they hardly
cross, so it is nearly straight and takes one or two steps. The paper's changes to that training, in our time (noise at 0; theirs runs the other way):

    start        the first model itself, its parametrisation converted          `MatchedVelocity`
    times        p(t) ∝ e^{a t} + e^{a (1 - t)}, a = 4                           `UShapedTimes`
    loss         pseudo-Huber (√(‖e‖² + c²) - c)/d, c = 0.00054 d,               `ReflowLoss`, `PseudoHuber`
                 e = x₁ - x₀ - v(t, x_t), x_t = (1 - t) x₀ + t x₁; with a perceptual distance ℓ it becomes
                 t Huber(e) + ℓ(x̂, x₁)/(1 - t), x̂ = x_t + (1 - t) v
    pairs        from noise, and from real data by the flow backwards            `reflow_pairs`, `inverted_pairs`: concatenate
    sampling     x ← (1 - t') x₀ + t' x̂ with the x₀ of the start kept            `FixedNoiseEuler`

(‖e‖ is taken over all d entries.) The sampler is Euler's in its first step. Left out: networks, LPIPS itself (ℓ is a plug), batch sizes, dropout.
"""

from collections.abc import Callable
from typing import ClassVar

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.batch import MARGIN
from ..core.check import check_range
from ..core.likelihood import TimeReversed
from ..core.loop import integrate
from ..core.path import AffinePath
from ..core.types import PRNGKey, PyTree, Scalar, Time, VectorField


class UShapedTimes(eqx.Module):
    """`(key, n) -> (n,)` times of density ∝ e^{a t} + e^{a (1 - t)} on [0, 1], squeezed to leave a margin of 1e-5 at both ends as the authors do.

    `concentration` is a > 0 (default 4, the paper's); may be swept. a → 0 is uniform.
    """

    concentration: Scalar = 4.0

    def __check_init__(self):
        check_range("concentration", self.concentration, low=0.0, open_low=True)

    def __call__(self, key: PRNGKey, n: int) -> Float[Array, " n"]:
        """n independent times."""
        key_time, key_side = jax.random.split(key)
        # The law of e^{a t} by its inverse distribution function, mirrored with probability ½.
        u = jax.random.uniform(key_time, (n,))
        a = jnp.asarray(self.concentration, u.dtype)
        t = jnp.log1p(u * jnp.expm1(a)) / a
        t = jnp.where(jax.random.bernoulli(key_side, shape=(n,)), t, 1 - t)
        return MARGIN + (1 - 2 * MARGIN) * t


class PseudoHuber(eqx.Module):
    """(√(‖e‖² + c²) - c)/d with c = `scale` · d and d the number of entries: ‖e‖²/(2cd) for small errors, ‖e‖/d for large ones.

    `scale` > 0 (default 0.00054, the paper's); may be swept.
    """

    scale: Scalar = 0.00054

    def __check_init__(self):
        check_range("scale", self.scale, low=0.0, open_low=True)

    def __call__(self, error: Float[Array, "*x"]) -> Float[Array, ""]:
        """The premetric of one example's error."""
        c = jnp.asarray(self.scale, error.dtype) * error.size
        square = jnp.sum(error**2)
        return square / (jnp.sqrt(square + c**2) + c) / error.size  # without the cancellation of √ - c


class ReflowLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {})` on pairs of a flow: batch (x₀, x₁) of shape (B, *x) each, or (x₀, x₁, args).

    - `model`: the velocity, a network on one example `(t, x, args) -> array like x`.
    - `times`: `(key, n) -> (n,)` (default `UShapedTimes()`).
    - `metric`: error -> scalar (default `PseudoHuber()`).
    - `perceptual`: ℓ, `(x̂, x₁) -> scalar` on one example, or None (default): no such term, and the metric has weight 1.

    The pairs must stay as they are: there is no coupling. Raises `ValueError` for pairs of unequal shape.
    """

    times: Callable = UShapedTimes()
    metric: Callable = PseudoHuber()
    perceptual: Callable | None = None

    def __call__(self, model: VectorField, batch: tuple, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        x0, x1, args = batch if len(batch) == 3 else (*batch, None)
        if x0.shape != x1.shape or x0.ndim < 1:
            raise ValueError(f"x₀ and x₁ must have one shape (batch, *example), got {x0.shape} and {x1.shape}.")
        t = self.times(key, x0.shape[0]).astype(x0.dtype)

        def one(t, x0, x1, args):
            x = (1 - t) * x0 + t * x1
            velocity = model(t, x, args)
            loss = self.metric(x1 - x0 - velocity)
            if self.perceptual is None:
                return loss
            return t * loss + self.perceptual(x + (1 - t) * velocity, x1) / (1 - t)

        return jnp.mean(jax.vmap(one)(t, x0, x1, args)), {}


def reflow_pairs(
    velocity: VectorField, x0: Float[Array, "*x"], args: PyTree = None, *, times: Float[Array, " steps"], solver: dfx.AbstractSolver | None = None
) -> tuple[Array, Array]:
    """(x₀, x₁) with x₁ the flow of `velocity` from one x₀ over `times`, (N + 1,) from 0 to 1; `vmap` for many. `solver`: default `diffrax.Heun()`."""
    return x0, integrate(dfx.ODETerm(velocity), dfx.Heun() if solver is None else solver, x0, args, times=times)


def inverted_pairs(
    velocity: VectorField, x1: Float[Array, "*x"], args: PyTree = None, *, times: Float[Array, " steps"], solver: dfx.AbstractSolver | None = None
) -> tuple[Array, Array]:
    """(x₀, x₁) with x₀ the flow of `velocity` backwards from one data point x₁; `times` as in `reflow_pairs`, increasing."""
    term = dfx.ODETerm(TimeReversed(velocity))
    return integrate(term, dfx.Heun() if solver is None else solver, x1, args, times=-times[::-1]), x1


class MatchedVelocity(eqx.Module):
    """A denoiser trained on any affine path as the velocity of the straight path: what the student starts from.

    At time t the teacher is asked at its time of equal signal-to-noise ratio, t²/(1 - t)², with x scaled to its path; v = (D - x)/(1 - t). With
    `EDMPath` that is noise level (1 - t)/t and input x/t. Ratios beyond the path's own ends are met by those ends.

    - `denoised`: E[x₁ | x_t] on `path`, `(t, x, args) -> array like x`, such as `ergodax.core.Denoiser`.
    - `path`: the path that it was trained on.

    Not finite at t = 1, where v says nothing of D: end solves before it, or with a solver that does not look there.
    """

    denoised: VectorField
    path: AffinePath

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """v at one scalar `t`, of the shape of `x`."""
        t = jnp.asarray(t, x.dtype)
        ends = jnp.clip(self.path.log_snr(jnp.array([0.0, 1.0], x.dtype)), -40, 40)
        time = jnp.clip(self.path.time(jnp.clip(2 * (jnp.log(t) - jnp.log1p(-t)), ends[0], ends[1])), 0, 1).astype(x.dtype)
        # α/t = σ/(1 - t), read off the larger share.
        scale = jnp.where(t < 0.5, self.path.sigma(time) / jnp.maximum(1 - t, 0.5), self.path.alpha(time) / jnp.maximum(t, 0.5))
        return (self.denoised(time, scale * x, args) - x) / (1 - t)


class FixedNoiseEuler(dfx.AbstractSolver):
    """x ← (1 - t') x₀ + t' x̂ with x̂ = x + (1 - t) v(t, x): the improved update, for velocities of straight paths that start at x₀ at t = 0.

    A diffrax solver for an `ODETerm`; its state is x₀, the y it was initialised with, so solves must begin at t = 0.
    """

    term_structure: ClassVar = dfx.AbstractTerm
    interpolation_cls: ClassVar[Callable] = dfx.LocalLinearInterpolation

    def order(self, terms):
        """1."""
        return 1

    def init(self, terms, t0, t1, y0, args):
        """x₀."""
        return y0

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step, one evaluation."""
        velocity = terms.vf(t0, y0, args)

        def update(start, y, v):
            t, s = jnp.asarray(t0, y.dtype), jnp.asarray(t1, y.dtype)
            return (1 - s) * start + s * (y + (1 - t) * v)

        y1 = jax.tree.map(update, solver_state, y0, velocity)
        return y1, None, dict(y0=y0, y1=y1), solver_state, dfx.RESULTS.successful

    def func(self, terms, t0, y0, args):
        """The velocity."""
        return terms.vf(t0, y0, args)


__all__ = ["FixedNoiseEuler", "MatchedVelocity", "PseudoHuber", "ReflowLoss", "UShapedTimes", "inverted_pairs", "reflow_pairs"]
