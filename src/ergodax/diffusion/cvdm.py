"""Conditional variational diffusion models: a noise schedule learned for every example and every pixel, together with the model.

Della Maggiora, Croquevielle, Deshpande, Horsley, Heinis, Yakimovich 2023 (arXiv:2312.02246). Data y are drawn given a condition x (a blurred image):

    q(z_u | y, x) = N(√γ(u, x) y, (1 - γ(u, x)) I),   dγ/du = -β(u, x) γ,   γ(0, x) = 1,   γ(1, x) = 0,

in noise time u = 1 - t. β = λ(x) τ(u) and γ = exp(-λ(x) R(u)), with λ(x) = softplus(rate(x)) of the shape of y and two monotone functions of u. All
is learned jointly, times by autodiff:

    L = E|ε̂ - ε|² + w [ (dγ/du + β γ)² + (γ(u₀) - 1)² + γ(u₁)² ] + w KL(q(z_{u₁} | y, x) ‖ N(0, I)) + w α (d²γ/du²)²,

the last from the discretisation error of the bound for T steps: it keeps the schedule smooth. As released (github.com/casus/cvdm): w = 2, α = 1e-3,
u₀ = 1/T, u₁ = 1 - 1/T, γ clipped to [1e-6, 1 - 1e-5]; and the sampler takes γ_i = Π_{j<=i} (1 - β(j/T, x)/T), here `product_path`.

    loss = CVDMLoss()                                               # loss(CVDM(network, schedule), (y, x), key)
    path = model.schedule.path(x)                                   # clocks of the shape of y: all solvers take them
    term = DenoiserTerm(Denoiser(LevelInput(model.network, path), path, NoisePrediction()), path, uniform_grid(50))
    sample = integrate(term, DDIM(), path.prior(key, y.shape), x)   # x goes to the network as `args`

Deviations: the KL has q on the left, as in the paper; the code has its arguments the other way round, which is the same to second order at 0. τ does
not vanish at u = 0 (the code multiplies both monotone networks by u, so that its τ cannot equal R' there). Weights are positive by softplus, not by
projection.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.batch import stratified_times
from ..core.check import check_count, check_range
from ..core.path import AffinePath
from ..core.types import PRNGKey, PyTree, Scalar, Time, VectorField
from .draw import draw


class CVDMPath(AffinePath):
    """The path of one condition, α² = γ = exp(-decay), σ² = 1 - γ, entry by entry: at a scalar `t` its clocks have the shape of the data.

    `decay`: noise time u -> -log γ, increasing in every entry. Made by `CVDMSchedule`.
    """

    decay: Callable

    def gamma(self, t: Time) -> Float[Array, "..."]:
        """γ = α²."""
        return jnp.exp(-self.decay(1 - jnp.asarray(t)))

    def alpha(self, t):
        return jnp.exp(self.log_alpha(t))

    def sigma(self, t):
        return jnp.sqrt(-jnp.expm1(2 * self.log_alpha(t)))

    def log_alpha(self, t):
        return -self.decay(1 - jnp.asarray(t)) / 2

    def log_sigma(self, t):
        return jnp.log(-jnp.expm1(2 * self.log_alpha(t))) / 2

    def time(self, log_snr):
        """By bisection, and a Newton step that carries the derivatives."""
        target = jax.nn.softplus(-jnp.asarray(log_snr))
        start = jnp.zeros_like(self.decay(jnp.zeros_like(target)) + target)

        def halve(ends, _):
            low, high = ends
            middle = (low + high) / 2
            above = self.decay(middle) > target
            return (jnp.where(above, low, middle), jnp.where(above, middle, high)), None

        (low, _), _ = jax.lax.scan(halve, (start, start + 1), length=jnp.finfo(start.dtype).nmant)
        u = jax.lax.stop_gradient(low)
        value, slope = jax.jvp(self.decay, (u,), (jnp.ones_like(u),))
        return 1 - (u - (value - target) / jnp.where(slope > 0, slope, jnp.inf))


class MonotoneNetwork(eqx.Module):
    """m(u) = a + b u + Σ_k c_k (sigmoid(d_k u + e_k) - sigmoid(e_k)), a, b, c, d > 0: positive and increasing for u >= 0.

    `intercept`, `slope`: a and b at the start, where the sum is small; `width`: its terms (default 64; the authors' 1024).
    """

    raw: Float[Array, " two"]
    outer: Float[Array, " width"]
    inner: Float[Array, " width"]
    bias: Float[Array, " width"]

    def __init__(self, intercept: float = 0.1, slope: float = 9.95, width: int = 64, *, key: PRNGKey):
        check_count("width", width)
        check_range("intercept", intercept, low=0.0, open_low=True)
        check_range("slope", slope, low=0.0, open_low=True)
        self.raw = jnp.log(jnp.expm1(jnp.array([intercept, slope])))
        self.inner = jax.random.uniform(key, (width,), minval=1.0, maxval=5.0)
        self.bias = -self.inner * jnp.linspace(0, 1, width)  # steps spread over [0, 1]
        self.outer = jnp.full_like(self.inner, -math.log(width) - 4)

    def __call__(self, u: Time) -> Float[Array, "..."]:
        """m at any shape of u."""
        u = jnp.asarray(u)
        network = jax.tree.map(lambda leaf: leaf.astype(u.dtype), self)
        intercept, slope = jax.nn.softplus(network.raw)
        steps = jax.nn.sigmoid(jax.nn.softplus(network.inner) * u[..., None] + network.bias) - jax.nn.sigmoid(network.bias)
        return intercept + slope * u + jnp.sum(jax.nn.softplus(network.outer) * steps, axis=-1)


class VanishingAtData(eqx.Module):
    """R(u) = u m(u): 0 at the data, and increasing with m."""

    network: Callable

    def __call__(self, u: Time) -> Float[Array, "..."]:
        """R at any shape of u."""
        return u * self.network(u)


class _Decay(eqx.Module):
    """-log γ = λ R(u), clipped."""

    scale: Float[Array, "*y"]
    integral: Callable
    low: Scalar
    high: Scalar

    def __call__(self, u):
        u = jnp.asarray(u)
        return jnp.clip(self.scale.astype(u.dtype) * self.integral(u), jnp.asarray(self.low, u.dtype), jnp.asarray(self.high, u.dtype))


class _Table(eqx.Module):
    """-log γ at u = i/T, and linear between; held after the last."""

    values: Float[Array, "T *y"]

    def __call__(self, u):
        u = jnp.asarray(u)
        last = self.values.shape[0] - 1
        place = jnp.broadcast_to(jnp.clip(u * (last + 1), 0, last), jnp.broadcast_shapes(u.shape, self.values.shape[1:]))
        i = jnp.clip(jnp.floor(place), 0, last - 1)
        values, row = self.values.astype(u.dtype), i.astype(int)[None]
        left, right = (jnp.take_along_axis(values, row + k, axis=0)[0] for k in (0, 1))
        return left + (place - i) * (right - left)


class CVDMSchedule(eqx.Module):
    """γ(u, x) and β(u, x).

    - `rate`: condition -> array of the shape of the data; λ = softplus of it. Any network on ONE condition.
    - `integral`: R(u), increasing from R(0) = 0, such as `VanishingAtData(MonotoneNetwork(key=key))`, which starts near VP's with β from 0.1 to 20.
    - `tau`: τ(u), such as `MonotoneNetwork(0.1, 19.9, key=key)`, which the loss ties to R'. None (static): R' itself.
    - `gamma_min`, `gamma_max`: where γ is clipped.
    """

    rate: Callable
    integral: Callable
    tau: Callable | None = None
    gamma_min: Scalar = 1e-6
    gamma_max: Scalar = 1 - 1e-5

    def __check_init__(self):
        check_range("gamma_min", self.gamma_min, low=0.0, high=1.0, open_low=True)
        check_range("gamma_max", self.gamma_max, low=0.0, high=1.0)

    def scale(self, condition: PyTree) -> Float[Array, "*y"]:
        """λ(x)."""
        return jax.nn.softplus(self.rate(condition))

    def beta(self, condition: PyTree, u: Scalar) -> Float[Array, "*y"]:
        """β = λ(x) τ(u) at one scalar noise time u."""
        u = jnp.asarray(u)
        tau = jax.jvp(self.integral, (u,), (jnp.ones_like(u),))[1] if self.tau is None else self.tau(u)
        return self.scale(condition).astype(tau.dtype) * tau

    def path(self, condition: PyTree) -> CVDMPath:
        """That of γ = exp(-λ R)."""
        return CVDMPath(_Decay(self.scale(condition), self.integral, -jnp.log(self.gamma_max), -jnp.log(self.gamma_min)))

    def product_path(self, condition: PyTree, num_steps: int) -> CVDMPath:
        """That of γ_i = Π_{j<=i} (1 - β(j/T, x)/T), T = `num_steps`: with `Ancestral()` on `uniform_grid(T - 1, 1 / T)`, the released sampler."""
        check_count("num_steps", num_steps, low=2)
        scale = self.scale(condition)
        u = jnp.arange(num_steps, dtype=scale.dtype) / num_steps
        step = jnp.clip(1 - jax.vmap(lambda u: self.beta(condition, u))(u) / num_steps, 1e-6, 1 - 1e-5)
        return CVDMPath(_Table(jnp.clip(-jnp.cumsum(jnp.log(step), axis=0), -math.log1p(-1e-5), -math.log(1e-10))))


class CVDM(eqx.Module):
    """What is trained: `network(t, z, (condition, γ)) -> array like z`, which predicts ε and is told γ at every pixel, and the schedule."""

    network: VectorField
    schedule: CVDMSchedule


class LevelInput(eqx.Module):
    """The network as a field `(t, z, condition)` on `path`, for `Denoiser(…, path, NoisePrediction())`."""

    network: VectorField
    path: CVDMPath

    def __call__(self, t: Time, z: Float[Array, "*y"], args: PyTree = None) -> Float[Array, "*y"]:
        """ε̂, of the shape of `z`."""
        return self.network(t, z, (args, self.path.gamma(t)))


class CVDMLoss(eqx.Module):
    """`loss(model, (y, condition), key) -> (scalar, {each term})` for a `CVDM`; y of shape (B, *y), conditions a pytree of leading axis B.

    - `margin`: 1/T, where the boundary terms are taken; default 1e-3, for the released T = 1000 of training.
    - `curvature`: α, default 1e-3. `schedule_weight`, `prior_weight`, `curvature_weight`: w, default 2 each, as released.
    - `times`: `(key, n) -> (n,)`; default `stratified_times`.

    All terms are means over pixels. Raises `ValueError` for values out of range, and for a batch without conditions.
    """

    margin: Scalar = 1e-3
    curvature: Scalar = 1e-3
    schedule_weight: Scalar = 2.0
    prior_weight: Scalar = 2.0
    curvature_weight: Scalar = 2.0
    times: Callable = stratified_times

    def __check_init__(self):
        check_range("margin", self.margin, low=0.0, high=0.5)
        for name in ("curvature", "schedule_weight", "prior_weight", "curvature_weight"):
            check_range(name, getattr(self, name), low=0.0)

    def __call__(self, model: Any, batch: PyTree, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        if not isinstance(batch, tuple):
            raise ValueError(f"a batch must be a pair (data, conditions), got {type(batch).__name__}.")

        def one(t, y, noise, condition):
            path = model.schedule.path(condition)

            def slope(t):
                return jax.jvp(path.gamma, (t,), (jnp.ones_like(t),))

            (gamma, d_gamma), (_, d2_gamma) = jax.jvp(slope, (t,), (jnp.ones_like(t),))
            at_noise, at_data = (path.gamma(jnp.asarray(end, y.dtype)) for end in (self.margin, 1 - self.margin))
            predicted = model.network(t, path.interpolate(t, y, noise), (condition, gamma))
            residual = model.schedule.beta(condition, 1 - t) * gamma - d_gamma
            kl = (at_noise * (y**2 - 1) - jnp.log1p(-at_noise)) / 2
            terms = {
                "noise": (predicted - noise) ** 2,
                "schedule": residual**2 + (at_data - 1) ** 2 + at_noise**2,
                "prior": kl,
                "curvature": jnp.asarray(self.curvature, y.dtype) * d2_gamma**2,
            }
            return jax.tree.map(jnp.mean, terms)

        terms = jax.tree.map(jnp.mean, jax.vmap(one)(*draw(batch, key, self.times)))
        schedule = self.schedule_weight * terms["schedule"] + self.prior_weight * terms["prior"] + self.curvature_weight * terms["curvature"]
        return terms["noise"] + schedule, terms


__all__ = ["CVDM", "CVDMLoss", "CVDMPath", "CVDMSchedule", "LevelInput", "MonotoneNetwork", "VanishingAtData"]
