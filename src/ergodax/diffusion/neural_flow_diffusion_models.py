"""Neural flow diffusion models: a forward process that is learned with the model. Bartosh, Vetrov, Naesseth 2024 (arXiv:2404.12940).

Noise ε ~ N(0, I) becomes z_t = F(ε, t, x) by any F that is invertible in ε and smooth in t: that fixes q(z_t | x), the velocity of its flow, and the
score. By default, in their noise time u = 1 - t,

    z = μ + σ ε,   μ = (1 - u) x + u (1 - u) μ̄(t, x),   σ = δ^{1 - u} σ̄(t, x)^{u (1 - u)},   δ = 0.01,

N(x, δ²) at the data and N(0, I) at the noise whatever the two networks say. For every g the conditional SDE (here from noise to data, in our t)

    dz = B(z, t, x) dt + g_t dW,   B = f + ½ g² ∇ log q(z | x),   f = ∂F/∂t at ε = F⁻¹(z, t, x)   (one jvp)

has the marginals q(z_t | x). The model puts x̂(t, z) in the place of x. No simulation is needed to train all three, F, x̂ and g, on the bound

    -log p(x) <= E ∫ |B(z, t, x) - B(z, t, x̂)|²/(2 g²) dt + KL(q(z_0 | x) ‖ N(0, I)) - E log p(x | z_1),   p(x | z) = N(z, δ²).

NFDM-OT adds c E|d/dt f(z, t, x̂(t, z))|², the derivative along the model's own flow, which is 0 where that is straight.

    loss = NFDMLoss()                                                            # loss(model, batch, key)
    model = NFDM(GaussianForward(mean_network, scale_network), network, Volatility(key=key))
    z1 = integrate(diffrax.ODETerm(NFDMDrift(model, 0.0)), diffrax.Heun(), z0, times=times)                    # deterministic
    z1 = integrate(nfdm_sde_terms(model, key, z0), diffrax.Euler(), z0, times=times)                           # the SDE that the bound is for

Linear F with their best g are the paths of `ergodax.core` (`PathForward`), the bound is then that of Kingma et al. 2021 (arXiv:2107.00630).
Another g than that of training leaves the samples' law as it is only if B is linear in x, as it is for a `PathForward`.
"""

import abc
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float

from ..core.batch import stratified_times
from ..core.check import check_range
from ..core.likelihood import standard_normal_log_prob
from ..core.path import AffinePath
from ..core.types import PRNGKey, PyTree, Scalar, Time, VectorField
from .draw import draw


class NeuralForward(eqx.Module):
    """The socket for F, on ONE example; `args` is a condition such as a label."""

    @abc.abstractmethod
    def transform(self, noise: Float[Array, "*x"], t: Time, data: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """z = F(ε, t, x)."""

    @abc.abstractmethod
    def inverse(self, z: Float[Array, "*x"], t: Time, data: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """ε = F⁻¹(z, t, x)."""

    @abc.abstractmethod
    def log_prob(self, z: Float[Array, "*x"], t: Time, data: Float[Array, "*x"], args: PyTree = None) -> Float[Array, ""]:
        """log q(z | x) = log N(ε; 0, I) - log |det ∂F/∂ε|."""

    def velocity(self, z: Float[Array, "*x"], t: Time, data: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """f: ∂F/∂t at a fixed ε, through z."""
        noise, t = self.inverse(z, t, data, args), jnp.asarray(t)
        return jax.jvp(lambda t: self.transform(noise, t, data, args), (t,), (jnp.ones_like(t),))[1]

    def drift(self, z: Float[Array, "*x"], t: Time, data: Float[Array, "*x"], volatility: Scalar, args: PyTree = None) -> Float[Array, "*x"]:
        """B with g = `volatility`."""
        score = jax.grad(lambda z: self.log_prob(z, t, data, args))(z)
        return self.velocity(z, t, data, args) + jnp.asarray(volatility, z.dtype) ** 2 / 2 * score


def _gaussian_log_prob(noise, log_scale):
    return standard_normal_log_prob(noise) - jnp.sum(jnp.broadcast_to(log_scale, noise.shape))


class GaussianForward(NeuralForward):
    """The default F.

    - `mean_network`, `scale_network`: `(t, x, args) -> array like x` for μ̄ and log σ̄; a `TimeMLP` starts at 0, that is μ = t x, σ = δᵗ.
    - `delta`: δ, default 0.01.
    """

    mean_network: VectorField
    scale_network: VectorField
    delta: Scalar = 0.01

    def __check_init__(self):
        check_range("delta", self.delta, low=0.0, high=1.0, open_low=True)

    def moments(self, t: Time, data: Float[Array, "*x"], args: PyTree = None) -> tuple[Float[Array, "*x"], Float[Array, "*x"]]:
        """μ and log σ."""
        t = jnp.asarray(t, data.dtype)
        bridge = t * (1 - t)
        mean = t * data + bridge * self.mean_network(t, data, args)
        return mean, t * jnp.log(jnp.asarray(self.delta, data.dtype)) + bridge * self.scale_network(t, data, args)

    def transform(self, noise, t, data, args=None):
        mean, log_scale = self.moments(t, data, args)
        return mean + jnp.exp(log_scale) * noise

    def inverse(self, z, t, data, args=None):
        mean, log_scale = self.moments(t, data, args)
        return (z - mean) * jnp.exp(-log_scale)

    def log_prob(self, z, t, data, args=None):
        mean, log_scale = self.moments(t, data, args)
        return _gaussian_log_prob((z - mean) * jnp.exp(-log_scale), log_scale)


class PathForward(NeuralForward):
    """F = α x + σ ε of a path; its best g is `path_volatility(path)`."""

    path: AffinePath

    def transform(self, noise, t, data, args=None):
        return self.path.interpolate(t, data, noise)

    def inverse(self, z, t, data, args=None):
        return (z - self.path.alpha(t) * data) / self.path.sigma(t)

    def log_prob(self, z, t, data, args=None):
        return _gaussian_log_prob(self.inverse(z, t, data, args), self.path.log_sigma(t))


def path_volatility(path: AffinePath) -> Callable:
    """t -> g with g² = (σ²)' - 2 (α'/α) σ² in noise time: it minimises the bound, in which 1.125 times as much is lost by half or twice that g²."""
    return lambda t: jnp.sqrt(path.diffusion(t))


class Volatility(eqx.Module):
    """g(t) = softplus of a small network of t, positive. `width` (default 32) and `depth` (default 1) are those of `eqx.nn.MLP`."""

    network: eqx.nn.MLP

    def __init__(self, width: int = 32, depth: int = 1, *, key: PRNGKey):
        self.network = eqx.nn.MLP("scalar", "scalar", width, depth, activation=jax.nn.tanh, key=key)

    def __call__(self, t: Time) -> Float[Array, ""]:
        """g at one scalar t."""
        t = jnp.asarray(t)
        network = jax.tree.map(lambda leaf: leaf.astype(t.dtype) if eqx.is_inexact_array(leaf) else leaf, self.network)
        return jax.nn.softplus(network(t))


class NFDM(eqx.Module):
    """What is trained.

    - `forward`: F. `network`: x̂, called as `(t, z, args)`. `volatility`: t -> g > 0.
    """

    forward: NeuralForward
    network: VectorField
    volatility: Callable


class NFDMDrift(eqx.Module):
    """B(z, t, x̂(t, z)) with κ g in the place of g, as a vector field `(t, z, args)`: κ = `noise_scale` = 1 (default) or 0, the flow's velocity."""

    model: NFDM
    noise_scale: Scalar = 1.0

    def __call__(self, t: Time, z: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """dz/dt at one scalar `t`, for ONE example."""
        model, t = self.model, jnp.asarray(t, z.dtype)
        volatility = jnp.asarray(self.noise_scale, z.dtype) * model.volatility(t)
        return model.forward.drift(z, t, model.network(t, z, args), volatility, args)


class _Noise(eqx.Module):
    model: NFDM

    def __call__(self, t, z, args):
        return lx.DiagonalLinearOperator(jnp.broadcast_to(self.model.volatility(jnp.asarray(t, z.dtype)), z.shape))


def nfdm_sde_terms(model: NFDM, key: PRNGKey, z0: Float[Array, "*x"]) -> dfx.MultiTerm:
    """dz = B(z, t, x̂) dt + g dW for `integrate` and diffrax's stochastic solvers. One key a trajectory: `vmap` over keys and z0."""
    brownian = dfx.UnsafeBrownianPath(jax.ShapeDtypeStruct(z0.shape, z0.dtype), key)
    return dfx.MultiTerm(dfx.ODETerm(NFDMDrift(model)), dfx.ControlTerm(_Noise(model), brownian))


def nfdm_integrand(model: NFDM, t: Scalar, z: Float[Array, "*x"], data: Float[Array, "*x"], args: PyTree = None) -> Float[Array, ""]:
    """|B(z, t, x) - B(z, t, x̂)|²/(2 g²)."""
    volatility = model.volatility(t)
    error = model.forward.drift(z, t, data, volatility, args) - model.forward.drift(z, t, model.network(t, z, args), volatility, args)
    return jnp.sum(error**2) / (2 * volatility**2)


def acceleration(model: NFDM, t: Scalar, z: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
    """d/dt of f(z, t, x̂) along the model's flow, ∂f/∂t + (∇f) f: 0 for straight trajectories."""

    def velocity(t, z):
        return model.forward.velocity(z, t, model.network(t, z, args), args)

    return jax.jvp(velocity, (t, z), (jnp.ones_like(t), velocity(t, z)))[1]


class NFDMLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {each term})`: the bound for an `NFDM`, in nats per dimension, by one draw of t and ε for each example.

    - `batch`: data of shape (B, *x), or a pair (data, args) with `args` a pytree of leading axis B.
    - `decoder_std`: that of p(x | z_1); δ, default 0.01.
    - `curvature`: c of NFDM-OT. None (default, static): left out.
    - `times`: `(key, n) -> (n,)`; default `stratified_times`.

    The terms are "diffusion", "prior", "reconstruction", and "curvature" without its c. Raises `ValueError` for data without a batch axis.
    """

    decoder_std: Scalar = 0.01
    curvature: Scalar | None = None
    times: Callable = stratified_times

    def __check_init__(self):
        check_range("decoder_std", self.decoder_std, low=0.0, open_low=True)
        check_range("curvature", self.curvature, low=0.0)

    def __call__(self, model: Any, batch: PyTree, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""

        def one(t, x, noise, args):
            forward = model.forward
            start, end = jnp.zeros_like(t), jnp.ones_like(t)
            z, first, last = (forward.transform(noise, s, x, args) for s in (t, start, end))
            terms = {
                "diffusion": nfdm_integrand(model, t, z, x, args),
                "prior": forward.log_prob(first, start, x, args) - standard_normal_log_prob(first),
                "reconstruction": -standard_normal_log_prob(x - last, jnp.asarray(self.decoder_std, x.dtype)),
            }
            if self.curvature is not None:
                terms["curvature"] = jnp.sum(acceleration(model, t, z, args) ** 2)
            return jax.tree.map(lambda term: term / x.size, terms)

        terms = jax.tree.map(jnp.mean, jax.vmap(one)(*draw(batch, key, self.times)))
        total = terms["diffusion"] + terms["prior"] + terms["reconstruction"]
        return total if self.curvature is None else total + self.curvature * terms["curvature"], terms


__all__ = [
    "NFDM",
    "GaussianForward",
    "NFDMDrift",
    "NFDMLoss",
    "NeuralForward",
    "PathForward",
    "Volatility",
    "acceleration",
    "nfdm_integrand",
    "nfdm_sde_terms",
    "path_volatility",
]
