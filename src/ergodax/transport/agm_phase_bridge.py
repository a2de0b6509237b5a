"""AGM, acceleration generative modelling: bridges in phase space. Chen, Gu, Dinh, Theodorou, Susskind, Zhai 2024 (arXiv:2310.07805).

A state is a pair m = (x, v) of position and velocity, stacked to shape (2, *x). It starts at m₀ ~ N(0, Σ₀), is driven by an acceleration,

    dx = v dt,    dv = a dt + g(t) dW,    g = p τ,   τ = 1 - t,

and ends at the data, x = x₁ at t = 1. Stochastic control gives, for one x₁,

    a* = (4/τ) [(x₁ - x)/τ - v] = -4w/τ,    w = v + (x - x₁)/τ.

w is how far v is from flying straight to x₁. It obeys dw = -3 (w/τ) dt + g dW by itself, and y = x - x₁ obeys d(y/τ) = (w/τ) dt: hence all moments.
With m = (1 - τ³)/3, and P, V, C the variances of x₀, v₀ and their covariance, W = P + V + 2C:

    Var y    = τ² Y,   Y = P + 2m(P + C) + m²W + (p²/9) [m (1 + τ³) + 2τ³ log τ],
    Cov(y,w) = τ³ J,   J = τ (P + C + mW) - (p²/3) [τ m + τ log τ],
    Var w    = τ³ Q,   Q = τ³W + p² m,          and Var(w | y) = τ³ R,   R = Q - τJ²/Y.

(The paper has polynomials in t for (x, v), the same numbers; those of v given x lose their digits as τ → 0, for x and v are then all but one.)

A network learns E[a | m]. With η in [0, 1] the share of the noise that is kept when sampling, each of

    dv = F_η dt + √η g dW,    F_η = E[a* - ½ (1 - η) g² ∇_v log p(m | x₁) | m],

has the same marginals: η = 1 is the paper's SDE, η = 0 its probability-flow ODE, and between them lies a family. In one line each:

    loss = PhaseBridgeLoss(bridge)                                                            # loss(network, batch, key)
    m1 = integrate(ODETerm(PhaseFlow(network, bridge)), PhaseExponential(bridge), m0, times=times)    # m0 = bridge.prior(key, shape), data m1[0]
    x1 = PhaseEstimate(network, bridge)(t, m, args)                                           # a guess of the data at any t

`diffrax.Euler()` and `Midpoint()` run on the same term; with noise, `phase_sde_terms` with `diffrax.Euler()` or `PhaseSplitting`. The paper starts at
t = 1e-5 and stops at 0.999, or at an estimate before. Both solvers are in `phase_solvers`.
"""

import math
from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_count, check_range
from ..core.types import PRNGKey, PyTree, Scalar, Time, VectorField
from .sde import sde_terms


class PhaseBridge(eqx.Module):
    """The law of (x, v) at t given x₁, and what a network is to learn of it. All methods take one scalar `t` in [0, 1) and one example.

    - `noise_scale`: p > 0 of g = p (1 - t); default 3, theirs.
    - `correlation`: of x₀ and v₀, in (-1, 1); default -0.2 (0.2 in their code, where it enters with a minus sign).
    - `position_variance`, `velocity_variance`: of x₀ and v₀; default 1.
    - `noise_share`: η of the module's docstring; default 0, the ODE.
    """

    noise_scale: Scalar = 3.0
    correlation: Scalar = -0.2
    position_variance: Scalar = 1.0
    velocity_variance: Scalar = 1.0
    noise_share: Scalar = 0.0

    def __check_init__(self):
        check_range("noise_scale", self.noise_scale, low=0.0, open_low=True)
        check_range("correlation", self.correlation, low=-1.0, high=1.0, open_low=True, open_high=True)
        check_range("position_variance", self.position_variance, low=0.0, open_low=True)
        check_range("velocity_variance", self.velocity_variance, low=0.0, open_low=True)
        check_range("noise_share", self.noise_share, low=0.0, high=1.0)

    def variance(self, t: Time) -> Float[Array, "..."]:
        """η g², the variance of the noise on v per unit of time."""
        return jnp.asarray(self.noise_share * (self.noise_scale * (1 - jnp.asarray(t))) ** 2)

    def moments(self, t: Time) -> tuple[Float[Array, "2"], Float[Array, "2 2"]]:
        """(c, Σ): (x, v) given x₁ has mean c x₁ and covariance Σ, entry by entry of x."""
        tau, _, y, j, q = self._clocks(t)
        mixed = tau**3 * j - tau * y
        return self._mean(t), jnp.stack([jnp.stack([tau**2 * y, mixed]), jnp.stack([mixed, tau**3 * q - 2 * tau**2 * j + y])])

    def perturb(self, t: Time, x1: Float[Array, "*x"], noise: Float[Array, "2 *x"]) -> Float[Array, "2 *x"]:
        """m_t from the data and standard normals e: x = c x₁ + τ√Y e₀, v by the Cholesky factor of its covariance with x."""
        tau, _, y, j, q = self._clocks(t)
        c = self._mean(t)
        x = c[0] * x1 + tau * jnp.sqrt(y) * noise[0]
        spread = jnp.sqrt(tau**3 * (q - tau * j**2 / y))
        return jnp.stack([x, c[1] * x1 + (tau**2 * j / jnp.sqrt(y) - jnp.sqrt(y)) * noise[0] + spread * noise[1]])

    def target(self, t: Time, x1: Float[Array, "*x"], noise: Float[Array, "2 *x"]) -> Float[Array, "*x"]:
        """F for the x₁ and e that made m_t, with no cancellation near t = 1."""
        tau = 1 - jnp.asarray(t)
        shared, own, score = self._loads(t)
        return 4 * tau**2 * x1 - shared * noise[0] - (own - score) * noise[1]

    def scale(self, t: Time) -> Float[Array, ""]:
        """z: the network's output is F/z. √(spread of F)/τ, with the published code's sum, not difference, of the two parts that share e₁."""
        shared, own, score = self._loads(t)
        return jnp.sqrt(shared**2 + (own + score) ** 2) / (1 - jnp.asarray(t))

    def acceleration(self, t: Time, m: Float[Array, "2 *x"], x1: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """F at m for one x₁. It is affine in x₁: at E[x₁ | m] it is the field itself."""
        known, gain = self._relation(t, m)
        return (gain * x1 - known) / (1 - jnp.asarray(t)) ** 2

    def estimate(self, t: Time, m: Float[Array, "2 *x"], acceleration: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """x₁ from F at m, the inverse of `acceleration`; E[x₁ | m] for the mean field. For η = 1: x + τ v + τ² F/4."""
        known, gain = self._relation(t, m)
        return ((1 - jnp.asarray(t)) ** 2 * acceleration + known) / gain

    def prior(self, key: PRNGKey, shape: tuple[int, ...], n: int | None = None, dtype=None) -> Float[Array, "..."]:
        """`n` draws of m₀ of shape (n, 2, *shape) for data of `shape`, or one of shape (2, *shape) for `n=None`."""
        if n is not None:
            check_count("n", n)
        dtype = jnp.result_type(float) if dtype is None else dtype
        lead = () if n is None else (n,)
        e = jax.random.normal(key, (2, math.prod(lead + shape)), dtype).reshape(2, *lead, *shape)
        noise = self.perturb(jnp.zeros((), dtype), jnp.zeros((*lead, *shape), dtype), e)
        return jnp.moveaxis(noise.astype(dtype), 0, len(lead))

    def _clocks(self, t):
        """τ, m, Y, J, Q, in the dtype of `t`."""
        t = jnp.asarray(t)
        tau, m = 1 - t, t * (3 - 3 * t + t**2) / 3
        p2, start, v = self.noise_scale**2, self.position_variance, self.velocity_variance
        mixed = self.correlation * jnp.sqrt(start * v)
        both = start + v + 2 * mixed
        # xlogy: 0 at τ = 0
        y = start + 2 * m * (start + mixed) + m**2 * both + p2 / 9 * (m * (1 + tau**3) + 2 * jax.scipy.special.xlogy(tau**3, tau))
        j = tau * (start + mixed + m * both) - p2 / 3 * (tau * m + jax.scipy.special.xlogy(tau, tau))
        return tau, m, *(clock.astype(t.dtype) for clock in (y, j, tau**3 * both + p2 * m))

    def _mean(self, t):
        tau, m, *_ = self._clocks(t)
        return jnp.stack([1 - tau * (1 + m), 4 * m])

    def _loads(self, t):
        """How F depends on the normals: on e₀, on e₁ by a*, on e₁ by the score."""
        tau, _, y, j, q = self._clocks(t)
        r = q - tau * j**2 / y
        score = (1 - self.noise_share) * self.noise_scale**2 / 2 * jnp.sqrt(tau / r)
        return 4 * tau * j / jnp.sqrt(y), 4 * jnp.sqrt(tau * r), score.astype(tau.dtype)

    def _relation(self, t, m):
        """(k, c) of c x₁ = τ² F + k: F = -4w/τ + (1 - η) g²/(2τ³R) (w - E[w | x, x₁]) is affine in x₁."""
        tau, _, y, j, q = self._clocks(t)
        share = (((1 - self.noise_share) * self.noise_scale**2) / (2 * (q - tau * j**2 / y))).astype(tau.dtype)
        slope = tau**2 * j / y
        x, v = m
        return (4 - share) * (x + tau * v) + share * slope * x, 4 - share * (1 - tau**4 - slope * self._mean(t)[0])


def phase_times(key: PRNGKey, n: int) -> Float[Array, " n"]:
    """n independent times, uniform on [1e-5, 0.999], the paper's: at t = 1 the control is infinite."""
    return jax.random.uniform(key, (n,), minval=1e-5, maxval=0.999)


class PhaseBridgeLoss(eqx.Module):
    """`loss(network, batch, key) -> (scalar, {})`: E (1/τ) |network(t, m_t, args) - F/z|², a mean over the entries of x.

    - `bridge`: a `PhaseBridge`; its `noise_share` says which field is learned.
    - `batch`: data of shape (B, *x), or a pair (data, args) with `args` a pytree of leading axis B.
    - `network`: on ONE state, `(t, m, args) -> (*x)` with m of shape (2, *x).
    - `times`: `(key, n) -> (n,)`; default `phase_times`.

    Raises `ValueError` for data without a batch axis.
    """

    bridge: PhaseBridge
    times: Callable = phase_times

    def __call__(self, model: VectorField, batch: PyTree, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        data, args = batch if isinstance(batch, tuple) else (batch, None)
        if data.ndim < 2:
            raise ValueError(f"the data of a batch must have shape (batch, *example), got {data.shape}.")
        key_noise, key_time = jax.random.split(key)
        n = data.shape[0]
        noise = jax.random.normal(key_noise, (2 * data.size,), data.dtype).reshape(n, 2, *data.shape[1:])
        times = self.times(key_time, n).astype(data.dtype)

        def one(t, x1, noise, args):
            error = model(t, self.bridge.perturb(t, x1, noise), args) - self.bridge.target(t, x1, noise) / self.bridge.scale(t)
            return jnp.mean(error**2) / (1 - t)

        return jnp.mean(jax.vmap(one)(times, data, noise, args)), {}


class PhaseFlow(eqx.Module):
    """(v, z network) as a vector field `(t, m, args)` on one state: the drift of dm."""

    network: VectorField
    bridge: PhaseBridge

    def __call__(self, t: Time, m: Float[Array, "2 *x"], args: PyTree = None) -> Float[Array, "2 *x"]:
        """dm/dt at one scalar `t` < 1."""
        return jnp.stack([m[1], self.bridge.scale(jnp.asarray(t, m.dtype)) * self.network(t, m, args)])


class PhaseEstimate(eqx.Module):
    """E[x₁ | m_t = m] by the network, as `(t, m, args) -> x₁`: early on already an image of the end."""

    network: VectorField
    bridge: PhaseBridge

    def __call__(self, t: Time, m: Float[Array, "2 *x"], args: PyTree = None) -> Float[Array, "*x"]:
        """The estimate at one scalar `t` < 1."""
        t = jnp.asarray(t, m.dtype)
        return self.bridge.estimate(t, m, self.bridge.scale(t) * self.network(t, m, args))


class _VelocityNoise(eqx.Module):
    """(0, η g²), to be spread over a state of `ndim` axes."""

    bridge: PhaseBridge
    ndim: int = eqx.field(static=True)

    def __call__(self, t):
        variance = self.bridge.variance(t)
        return jnp.stack([jnp.zeros_like(variance), variance]).reshape(2, *[1] * (self.ndim - 1))


def phase_sde_terms(network: VectorField, bridge: PhaseBridge, key: PRNGKey, m0: Float[Array, "2 *x"]) -> dfx.MultiTerm:
    """dx = v dt, dv = F dt + √η g dW: `integrate(phase_sde_terms(network, bridge, key, m0), diffrax.Euler(), m0, times=times)`.

    `network` must have been trained on a bridge with the same `noise_share`; one key a trajectory (`vmap` over keys and m0).
    """
    return sde_terms(PhaseFlow(network, bridge), _VelocityNoise(bridge, m0.ndim), key, m0)


__all__ = [
    "PhaseBridge",
    "PhaseBridgeLoss",
    "PhaseEstimate",
    "PhaseFlow",
    "phase_sde_terms",
    "phase_times",
]
