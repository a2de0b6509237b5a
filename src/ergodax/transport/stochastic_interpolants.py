"""Learning and sampling with stochastic interpolants. Albergo, Boffi, Vanden-Eijnden 2023 (arXiv:2303.08797).

With x_t = I(t, x₀, x₁) + γ(t) z of `ergodax.transport.Interpolant` and ρ(t) its density, four fields are conditional means (theorems 6-8):

    velocity               b(t, x) = E[∂I/∂t + γ' z | x_t = x]
    score                  s(t, x) = ∇ log ρ(t, x) = -E[z | x_t = x]/γ
    latent ("denoiser")    η(t, x) = E[z | x_t = x] = -γ s
    interpolant velocity   v(t, x) = E[∂I/∂t | x_t = x],   b = v - γ γ' s

each the minimiser of E[½|f|² - target · f] over f(t, x_t). Then, for ANY ε(t) >= 0, all of these have x_t ~ ρ(t):

    dX = b dt,    dX = (b + ε s) dt + √(2ε) dW,    and backwards in time dX = (b - ε s) dt + √(2ε) dW.

ε is chosen at sampling time and may be swept. The paper's z is named the latent here, since `ergodax.core.Denoiser` predicts the data.

What the losses say of the samples: by Girsanov's formula, models b̂ and ŝ in the forward diffusion with constant ε end in a law ρ̂(1) with

    KL(ρ(1) ‖ ρ̂(1)) <= 1/(4ε) ∫ E|b̂ + ε ŝ - b - ε s|² dt <= ΔL_b/ε + ε ΔL_s,

ΔL = ½ ∫ E|f̂ - f|² dt the excess of a loss over its minimum: `kl_bound`. Interpolants are in `interpolants.py`, those with Gaussian x₀ and what is
learned on them in `one_sided.py`; the Schrödinger bridge by learning I itself is `interpolant_bridge.py`.
"""

import abc
from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.batch import given_pairs, uniform_times
from ..core.check import check_range
from ..core.likelihood import TimeReversed
from ..core.types import PRNGKey, PyTree, Scalar, Time, VectorField
from .interpolants import Gamma, Interpolant
from .sde import sde_terms


class InterpolantLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {})`: the mean over the batch of ½|f|² - target · f, summed over an example's dimensions.

    - `batch`: (x₀, x₁) of shape (B, *x) each, or (x₀, x₁, args) with `args` a pytree of leading axis B.
    - `model`: a network on ONE example, `(t, x, args) -> array like x`; vmapped here.
    - `times`: `(key, n) -> (n,)` (default `uniform_times`).
    - `coupling`: `(key, x₁, x₀, args) -> x₀`, which pairs the rows anew (default `given_pairs`), for instance by optimal transport.
    - `antithetic` (static): average over z and -z, at two model calls an example. A target that grows as 1/γ or γ' at the ends has infinite variance
      there; the pair cancels it to leading order. On by default for those (`VelocityLoss`, `ScoreLoss`), off for the bounded ones.

    The value may be negative: it lacks the target's own variance, which is infinite for the score. Raises `ValueError` for pairs of unequal shape.
    """

    interpolant: eqx.AbstractVar[Interpolant]
    times: eqx.AbstractVar[Callable]
    coupling: eqx.AbstractVar[Callable]
    antithetic: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def target(self, t: Time, x0: Float[Array, "*x"], x1: Float[Array, "*x"], z: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """What f(t, x_t) regresses on, for one example."""

    def __call__(self, model: VectorField, batch: tuple, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        x0, x1, args = batch if len(batch) == 3 else (*batch, None)
        if x0.shape != x1.shape or x0.ndim < 1:
            raise ValueError(f"x₀ and x₁ must have one shape (batch, *example), got {x0.shape} and {x1.shape}.")
        key_coupling, key_time, key_latent = jax.random.split(key, 3)
        x0 = self.coupling(key_coupling, x1, x0, args)
        t = self.times(key_time, x0.shape[0]).astype(x0.dtype)
        z = jax.random.normal(key_latent, x0.shape, x0.dtype)

        @jax.vmap
        def losses(t, x0, x1, z, args):
            value = model(t, self.interpolant.interpolate(t, x0, x1, z), args)
            return jnp.sum(value**2) / 2 - jnp.sum(self.target(t, x0, x1, z) * value)

        loss = losses(t, x0, x1, z, args)
        if self.antithetic:
            loss = (loss + losses(t, x0, x1, -z, args)) / 2
        return jnp.mean(loss), {}


class VelocityLoss(InterpolantLoss):
    """Learns b: target ∂I/∂t + γ' z. With γ = 0 and `LinearInterpolant` it is x₁ - x₀, flow matching; `antithetic=False` then saves half."""

    interpolant: Interpolant
    times: Callable = uniform_times
    coupling: Callable = given_pairs
    antithetic: bool = eqx.field(static=True, default=True)

    def target(self, t, x0, x1, z):
        return self.interpolant.d_interpolate(t, x0, x1, z)


class ScoreLoss(InterpolantLoss):
    """Learns s: target -z/γ."""

    interpolant: Interpolant
    times: Callable = uniform_times
    coupling: Callable = given_pairs
    antithetic: bool = eqx.field(static=True, default=True)

    def target(self, t, x0, x1, z):
        return -z / self.interpolant.gamma(t)


class LatentLoss(InterpolantLoss):
    """Learns η: target z, of unit variance at all times; the score follows by `ScoreFromLatent`. The paper's advice over `ScoreLoss`."""

    interpolant: Interpolant
    times: Callable = uniform_times
    coupling: Callable = given_pairs
    antithetic: bool = eqx.field(static=True, default=False)

    def target(self, t, x0, x1, z):
        return z


class InterpolantVelocityLoss(InterpolantLoss):
    """Learns v: target ∂I/∂t; b follows by `VelocityFromScore`."""

    interpolant: Interpolant
    times: Callable = uniform_times
    coupling: Callable = given_pairs
    antithetic: bool = eqx.field(static=True, default=False)

    def target(self, t, x0, x1, z):
        return self.interpolant.d_mean(t, x0, x1)


class VelocityFromScore(eqx.Module):
    """b = v - γ γ' s as a vector field."""

    interpolant_velocity: VectorField
    score: VectorField
    gamma: Gamma

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """b at one scalar `t`, of the shape of `x`."""
        return self.interpolant_velocity(t, x, args) - self.gamma.product(t) * self.score(t, x, args)


class ScoreFromLatent(eqx.Module):
    """s = -η/γ as a vector field, and 0 where γ = 0: there x_t says nothing of z, so η = 0 says nothing of s."""

    latent: VectorField
    gamma: Gamma

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """s at one scalar `t`, of the shape of `x`."""
        gamma = self.gamma(t)
        return -self.latent(t, x, args) / jnp.where(gamma > 0, gamma, jnp.inf)


class GammaDiffusion(eqx.Module):
    """ε(t) = c γ(t), with c = `scale` (default 1): with `ScoreFromLatent`, ε s = -c η is bounded, and exact at the ends, where both are 0."""

    gamma: Gamma
    scale: Scalar = 1.0

    def __check_init__(self):
        check_range("scale", self.scale, low=0.0)

    def __call__(self, t: Time) -> Float[Array, "..."]:
        """ε, broadcast over `t`."""
        return jnp.asarray(self.scale * self.gamma(t))


def kl_bound(velocity_excess: Scalar, score_excess: Scalar, epsilon: Scalar) -> Float[Array, ""]:
    """ΔL_b/ε + ε ΔL_s, in nats: how far the forward diffusion with ε ends from the target at most, KL(ρ₁ ‖ ρ̂(1)).

    - `velocity_excess`, `score_excess`: by how much `VelocityLoss` and `ScoreLoss`, averaged over uniform times, exceed their minima: half the mean
      squared errors of b̂ and ŝ. For a flow (ε = 0) there is no such bound: these losses do not control its likelihood.
    - `epsilon`: ε > 0, constant in time.

    With differences of the losses of two models, the difference of their bounds. Raises `ValueError` for ε <= 0.
    """
    check_range("epsilon", epsilon, low=0.0, open_low=True)
    return jnp.asarray(velocity_excess / epsilon + epsilon * score_excess)


def kl_optimal_epsilon(velocity_excess: Scalar, score_excess: Scalar) -> Float[Array, ""]:
    """√(ΔL_b/ΔL_s), the ε of the least `kl_bound`, which is 2 √(ΔL_b ΔL_s)."""
    return jnp.sqrt(jnp.asarray(velocity_excess / score_excess))


class _Variance(eqx.Module):
    """2 ε(t); `sign` -1 reads ε at -t."""

    epsilon: Scalar | Callable
    sign: int = eqx.field(static=True)

    def __call__(self, t):
        return 2 * (self.epsilon(self.sign * t) if callable(self.epsilon) else self.epsilon)


class _Drift(eqx.Module):
    """b ± ε s."""

    velocity: VectorField
    score: VectorField
    epsilon: Scalar | Callable
    sign: int = eqx.field(static=True)

    def __call__(self, t, x, args):
        epsilon = jnp.asarray(self.epsilon(t) if callable(self.epsilon) else self.epsilon, x.dtype)
        return self.velocity(t, x, args) + self.sign * epsilon * self.score(t, x, args)


def _sde_terms(velocity, score, epsilon, key, y0, sign):
    if not callable(epsilon):
        check_range("epsilon", epsilon, low=0.0)
    drift = _Drift(velocity, score, epsilon, sign)
    return sde_terms(drift if sign > 0 else TimeReversed(drift), _Variance(epsilon, sign), key, y0)


def ode_term(velocity: VectorField) -> dfx.ODETerm:
    """dX = b dt from x₀ to x₁: `integrate(ode_term(b), solver, x0, times=times)`."""
    return dfx.ODETerm(velocity)


def backward_ode_term(velocity: VectorField) -> dfx.ODETerm:
    """The same flow from x₁ back to x₀ in τ = -t: `integrate(backward_ode_term(b), solver, x1, times=-times[::-1])`."""
    return dfx.ODETerm(TimeReversed(velocity))


def forward_sde_terms(velocity: VectorField, score: VectorField, epsilon: Scalar | Callable, key: PRNGKey, y0: Float[Array, "*x"]) -> dfx.MultiTerm:
    """dX = (b + ε s) dt + √(2ε) dW from x₀ to x₁: `integrate(forward_sde_terms(b, s, eps, key, x0), solver, x0, times=times)`.

    - `velocity`, `score`: fields `(t, x, args) -> array like x`.
    - `epsilon`: ε >= 0, a number or `t -> ε(t)`; either may be traced. ε = 0 is the flow.
    - `key`: fresh noise for each step; one key a trajectory (`vmap` over keys and y0 for a batch).
    - `y0`: the state at the start, for its shape and dtype.

    The noise does not depend on the state, so Itô and Stratonovich solvers agree: `diffrax.Euler` has weak order 1, `diffrax.Heun` 2.

    The ends. The true score is finite there if the two densities are smooth, but a learned η says nothing of it where γ = 0. Either let ε vanish with
    γ (`GammaDiffusion`), which is exact from t = 0 to t = 1, or start at t₀ > 0 and stop before 1.

    Raises `ValueError` for a negative number `epsilon`.
    """
    return _sde_terms(velocity, score, epsilon, key, y0, 1)


def backward_sde_terms(velocity: VectorField, score: VectorField, epsilon: Scalar | Callable, key: PRNGKey, y0: Float[Array, "*x"]) -> dfx.MultiTerm:
    """dX = (b - ε s) dt + √(2ε) dW from x₁ back to x₀, in τ = -t: `integrate(..., times=-times[::-1])`. As `forward_sde_terms`, with ε of t."""
    return _sde_terms(velocity, score, epsilon, key, y0, -1)


__all__ = [
    "GammaDiffusion",
    "InterpolantLoss",
    "InterpolantVelocityLoss",
    "LatentLoss",
    "ScoreFromLatent",
    "ScoreLoss",
    "VelocityFromScore",
    "VelocityLoss",
    "backward_ode_term",
    "backward_sde_terms",
    "forward_sde_terms",
    "kl_bound",
    "kl_optimal_epsilon",
    "ode_term",
]
