"""Action matching: the dynamics of a population from samples of its marginals alone, as the gradient of a scalar action.

With samples of q_t for t in [0, 1], and an action s_t(x), the loss

    L(s) = E_{q₀}[s₀] - E_{q₁}[s₁] + ∫₀¹ E_{q_t}[½|∇s_t|² + ∂s_t/∂t] dt

has its minimum where ∇s is the velocity of least kinetic energy that carries q_t, and exceeds it by ½ ∫ E_{q_t}|∇s - ∇s*|² dt. Neklyudov, Brekelmans,
Severo, Makhzani 2023 (arXiv:2210.06662). The paper's other dynamics add to what stands in the integral:

    convex cost c(v)     c*(∇s) for ½|∇s|², with c* the convex conjugate              dx = ∇c*(∇s) dt
    entropic             + σ²/2 Δs                                                    dx = ∇s dt + σ dW
    unbalanced           + λ/2 s², for the cost g²/(2λ) of a growth rate g            dx = ∇s dt, d log w = λ s dt

(the paper has λ = 1), and they combine. All may be weighted in time by ω(t) >= 0: ω(0) and ω(1) stand before the ends, ω before the integrand, and
ω' s is added to it. For λ = 0 an s that depends on t alone changes nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.batch import given_pairs, stratified_times
from ..core.check import check_count, check_range
from ..core.likelihood import ExactDivergence
from ..core.types import PRNGKey, PyTree, Scalar, Time, VectorField
from .snapshots import Snapshots


class ActionBatch(NamedTuple):
    """Samples of q₀, of q₁ and of q_t at times t. Weights make them samples of other measures (masses, other laws of t); None for ones.

    A loss takes the mean of weight × value: with a mass m(t), weights are m(t); with t drawn from a density p, `weights` are divided by p(t).
    """

    x0: Float[Array, "source *x"]
    x1: Float[Array, "target *x"]
    t: Float[Array, " batch"]
    x: Float[Array, "batch *x"]
    weights0: Float[Array, " source"] | None = None
    weights1: Float[Array, " target"] | None = None
    weights: Float[Array, " batch"] | None = None


def half_squared_norm(p: Float[Array, "*x"]) -> Float[Array, ""]:
    """½|p|², its own convex conjugate: the cost of kinetic energy."""
    return jnp.sum(p**2) / 2


def constant_weight(t: Time) -> Float[Array, "..."]:
    """1 at all times."""
    return jnp.ones_like(t)


def exact_divergence(key: PRNGKey) -> ExactDivergence:
    """The Laplacian without estimate; d times the cost of a gradient."""
    return ExactDivergence()


class ActionMatchingLoss(eqx.Module):
    """`loss(action, batch, key) -> (scalar, {})` on an `ActionBatch`.

    - `action`: a network on ONE example, `(t, x, args) -> scalar`, differentiable twice (thrice with `sigma`); `PotentialAction` makes one of any
      vector field. Called with `args` None.
    - `sigma`: σ >= 0 of the entropic dynamics; None (default) is σ = 0 without the cost of the Laplacian.
    - `growth`: λ >= 0 (default 0: mass is conserved).
    - `conjugate_cost`: c*, a function of the gradient, by default ½|p|².
    - `weight`: ω, `t -> weight`, differentiable; by default 1. Let it vanish where ∇s* is infinite.
    - `divergence`: `key -> divergence`, for the Laplacian, called once an example: `exact_divergence` (default) or
      `ergodax.core.HutchinsonDivergence`.

    The value may be negative. Raises `ValueError` for shapes that do not fit.
    """

    sigma: Scalar | None = None
    growth: Scalar = 0.0
    conjugate_cost: Callable = half_squared_norm
    weight: Callable = constant_weight
    divergence: Callable = exact_divergence

    def __check_init__(self):
        check_range("sigma", self.sigma, low=0.0)
        check_range("growth", self.growth, low=0.0)

    def __call__(self, action: VectorField, batch: ActionBatch, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch; unbiased in each of its three samples."""
        shapes = [a.shape for a in (batch.x0, batch.x1, batch.x, batch.t)]
        if len({shape[1:] for shape in shapes[:3]}) != 1 or shapes[2][:1] != shapes[3]:
            raise ValueError(f"x0, x1 and x must have shapes (rows, *x) with one x, and t as many entries as x has rows, got {shapes}.")

        def at_end(t, x, weights):
            t = jnp.asarray(t, x.dtype)
            return self.weight(t).astype(x.dtype) * _mean(jax.vmap(lambda x: action(t, x, None))(x), weights)

        def inside(key, t, x):
            value, (slope, gradient) = jax.value_and_grad(lambda t, x: action(t, x, None), argnums=(0, 1))(t, x)
            density = self.conjugate_cost(gradient) + slope + jnp.asarray(self.growth, x.dtype) / 2 * value**2
            if self.sigma is not None:
                _, laplacian = self.divergence(key)(jax.grad(lambda x: action(t, x, None)), x)
                density = density + jnp.asarray(self.sigma, x.dtype) ** 2 / 2 * laplacian
            weight, change = jax.jvp(self.weight, (t,), (jnp.ones_like(t),))
            return weight * density + change * value

        inner = jax.vmap(inside)(jax.random.split(key, len(batch.x)), batch.t.astype(batch.x.dtype), batch.x)
        return at_end(0, batch.x0, batch.weights0) - at_end(1, batch.x1, batch.weights1) + _mean(inner, batch.weights), {}


def _mean(values, weights):
    return jnp.mean(values if weights is None else weights.astype(values.dtype) * values)


class PotentialAction(eqx.Module):
    """s = ⟨x, f(t, x)⟩ of a network f with outputs like x, which can be any action up to a function of t alone: s(t, 0) = 0.

    Not for `growth` > 0, where that function matters.
    """

    network: VectorField

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, ""]:
        """The action at one t and x."""
        return jnp.sum(x * self.network(t, x, args))


class ActionVelocity(eqx.Module):
    """∇c*(∇s) as a vector field: `integrate(diffrax.ODETerm(velocity), …)`; entropic: `sde_terms(velocity, sigma**2, key, x0)`."""

    action: VectorField
    conjugate_cost: Callable = half_squared_norm

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """The velocity at one t and x."""
        gradient = jax.grad(lambda x: self.action(t, x, args))(x)
        return jax.grad(self.conjugate_cost)(gradient)


class ActionFlow(eqx.Module):
    """d(x, log w)/dt = (∇c*(∇s), λ s), a vector field of the pair (x, log w) for one example: the unbalanced dynamics with its weights."""

    action: VectorField
    growth: Scalar = 1.0
    conjugate_cost: Callable = half_squared_norm

    def __call__(self, t, state, args=None):
        """`state` = (x, log w) with log w a scalar."""
        x, _ = state
        return ActionVelocity(self.action, self.conjugate_cost)(t, x, args), jnp.asarray(self.growth, x.dtype) * self.action(t, x, args)


class SampledPath(eqx.Module):
    """`batch(key, step) -> ActionBatch` for `Fit`, where q_t can be sampled at every t.

    - `sample`: `(key, t) -> x`, one draw of q_t.
    - `batch_size`: of each of the three samples.
    - `times`: `(key, n) -> (n,)` (default `stratified_times`).
    """

    sample: Callable
    batch_size: int = eqx.field(static=True)
    times: Callable = stratified_times

    def __check_init__(self):
        check_count("batch_size", self.batch_size)

    def __call__(self, key: PRNGKey, step: Scalar) -> ActionBatch:
        """Fresh draws."""
        key_time, *keys = jax.random.split(key, 4)
        t = self.times(key_time, self.batch_size)
        x0, x1, x = (
            jax.vmap(self.sample)(jax.random.split(k, self.batch_size), times) for k, times in zip(keys, (jnp.zeros_like(t), jnp.ones_like(t), t))
        )
        return ActionBatch(x0, x1, t.astype(x.dtype), x)


class InterpolatedSnapshots(eqx.Module):
    """`batch(key, step) -> ActionBatch` for `Fit`, from `Snapshots` at times 0 = t₀ < … < t_K = 1: neighbours are interpolated in between.

    x_t = (1 - u) x_k + u x_{k+1} + noise √(u (1 - u) (t_{k+1} - t_k)) z with u = (t - t_k)/(t_{k+1} - t_k): the law of that is what is learned.

    - `batch_size`: rows drawn of each snapshot, so that K × `batch_size` points lie inside.
    - `coupling`: `(key, x_{k+1}, x_k, args) -> x_k`, which pairs the rows (default `given_pairs`: independently); by optimal transport the paths are
      straighter.
    - `noise`: standard deviation of the bridges between pairs per root of time (default 0).
    - `masses`: (K + 1,), positive, the total mass at each time, between them geometric; for `growth`. None: all 1.

    Raises `ValueError` for times that do not run from 0 to 1 and masses that do not fit.
    """

    snapshots: Snapshots
    batch_size: int = eqx.field(static=True)
    coupling: Callable = given_pairs
    noise: Scalar = 0.0
    masses: Float[Array, " times"] | None = None

    def __check_init__(self):
        check_count("batch_size", self.batch_size)
        check_range("noise", self.noise, low=0.0)
        check_range("masses", self.masses, low=0.0, open_low=True)
        times = self.snapshots.times
        check_range("times[0]", times[0], low=0.0, high=0.0)
        check_range("times[-1]", times[-1], low=1.0, high=1.0)
        if self.masses is not None and self.masses.shape != times.shape:
            raise ValueError(f"`masses` must have the shape of the times, {times.shape}, got {self.masses.shape}.")

    def __call__(self, key: PRNGKey, step: Scalar) -> ActionBatch:
        """Rows drawn anew."""
        key_rows, key_pairs, key_time, key_noise = jax.random.split(key, 4)
        rows, times, n = self.snapshots.resample(key_rows, self.batch_size), self.snapshots.times, self.batch_size
        intervals = len(times) - 1
        keys = jax.random.split(key_pairs, intervals)
        source = jax.lax.map(lambda pair: self.coupling(pair[0], pair[2], pair[1], None), (keys, rows[:-1], rows[1:]))
        u = jax.vmap(lambda key: stratified_times(key, n))(jax.random.split(key_time, intervals)).astype(rows.dtype)
        durations = jnp.diff(times)[:, None]
        spread = jnp.asarray(self.noise, rows.dtype) * jnp.sqrt(u * (1 - u) * durations)
        z = jax.random.normal(key_noise, source.shape, source.dtype)
        x = (1 - u)[..., None] * source + u[..., None] * rows[1:] + spread[..., None] * z
        # Every interval has the same number of points, whatever its length.
        weights = intervals * jnp.broadcast_to(durations, u.shape)
        ends = (None, None)
        if self.masses is not None:
            masses = self.masses.astype(rows.dtype)
            weights = weights * masses[:-1, None] ** (1 - u) * masses[1:, None] ** u
            ends = (jnp.full(n, masses[0]), jnp.full(n, masses[-1]))
        t = times[:-1, None] + u * durations
        return ActionBatch(rows[0], rows[-1], t.ravel(), x.reshape(-1, x.shape[-1]), *ends, weights.ravel())


__all__ = [
    "ActionBatch",
    "ActionFlow",
    "ActionMatchingLoss",
    "ActionVelocity",
    "InterpolatedSnapshots",
    "PotentialAction",
    "SampledPath",
    "constant_weight",
    "exact_divergence",
    "half_squared_norm",
]
