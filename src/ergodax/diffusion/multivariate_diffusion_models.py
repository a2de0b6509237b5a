"""Multivariate diffusion models: a likelihood bound for any linear diffusion, which trains the process too.

Singhal, Goldstein, Ranganath 2023 (arXiv:2302.07261).

The process is a `CompleteRecipe` with stationary N(0, I), dz = -β (Q + D) z du + √(2βD) dw, any number of auxiliary variables; its D = RRᵀ,
Q = C - Cᵀ, β and Σ_0 are arrays that a gradient may change. With f the drift, g gᵀ = 2βD, |a|²_g = aᵀ g gᵀ a, and π = N(0, I) at t = 0,

    log p(x) >= E[log π(z_{t=0})] + ∫ E[-½ |s|²_g - ∇·(g gᵀ s - f)] du - E[log q(v | x)]                 (implicit, their eq. 12)

             =  E[log π(z_{t=0})] + ∫ E[½ |s_q|²_g - ½ |s - s_q|²_g + ∇·f] du - E[log q(v | x)]          (denoising, eq. 13)

with s_q = -Σ_t⁻¹ (z_t - φ_t x) = -L_t^{-T} ε. The expectations of log π, log q and |s_q|² are taken in closed form. s_q is infinite at the data:
`DenoisingBound` stops at u₀ = `margin` and adds E[log p(x | z_{u₀}) - log q(z_{u₀} | x)] with a Gaussian decoder round the denoised x, which keeps it
a bound for every u₀; times are drawn log-uniformly, since the integrand grows as 1/u. `ImplicitBound` needs the score's divergence and no margin.

The model is a score with its process, such as `NoiseScore(network, process)`; both are trained:

    loss = LikelihoodLoss(DenoisingBound())                                      # loss(NoiseScore(network, malda()), batch, key), nats per dimension

ALDA and MALDA are the paper's processes of three variables (their code: github.com/rajesh-lab/MultivariateDiffusionModels). Deviations: their times
are drawn from a density fitted to the loss; the decoder here is ours. D and Q are constant in time up to β, as in their experiments.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_count, check_range
from ..core.likelihood import ExactDivergence
from ..core.types import PRNGKey, PyTree, Scalar, Time, VectorField
from .linear_sde import LinearBeta, LinearSDE, apply_matrix, noise_score, perturbed, working_time
from .psld import CompleteRecipe


_BETA, _EXACT = LinearBeta(0.1, 10.0), ExactDivergence()


def alda(friction: Scalar = 1.0, coupling: Scalar = 1.0, initial: Scalar = 0.01, beta: LinearBeta = _BETA) -> CompleteRecipe:
    """Accelerated Langevin diffusion: noise enters the second momentum alone and reaches x through the chain. After Mou et al., arXiv:1908.10859.

    D = diag(0, 0, ψ) with ψ = `friction`; Q couples x with v₁ (by 1) and v₁ with v₂ (by γ = `coupling`). Defaults are the authors'. `initial`: the
    variance of both momenta at the data.
    """
    check_range("friction", friction, low=0.0)
    check_range("initial", initial, low=0.0)
    zero = jnp.zeros((3, 3), jnp.result_type(float, friction, coupling, initial))
    pairs = zero.at[1, 0].set(1).at[2, 1].set(coupling)
    return CompleteRecipe(
        damping_root=zero.at[2, 2].set(jnp.sqrt(friction)),
        coupling=pairs,
        stationary=jnp.ones(3, zero.dtype),
        initial=jnp.full(2, initial, zero.dtype),
        beta=beta,
    )


def malda(friction: Scalar = 2.0, initial: Scalar = 0.01, beta: LinearBeta = _BETA) -> CompleteRecipe:
    """Modified accelerated Langevin diffusion: all three variables coupled (Q is 1 below the diagonal), noise in both momenta, D = diag(0, 2, 2)."""
    check_range("friction", friction, low=0.0)
    check_range("initial", initial, low=0.0)
    one = jnp.ones((3, 3), jnp.result_type(float, friction, initial))
    root = jnp.diag(jnp.sqrt(friction) * one[0]).at[0, 0].set(0)
    return CompleteRecipe(damping_root=root, coupling=jnp.tril(one, -1), stationary=one[0], initial=jnp.full(2, initial, one.dtype), beta=beta)


def random_recipe(key: PRNGKey, num_variables: int = 2, initial: Scalar = 0.01, beta: LinearBeta = _BETA) -> CompleteRecipe:
    """A start for learning all of it: R = I + noise, C = noise, both noises uniform in ±1/√K."""
    check_count("num_variables", num_variables)
    k = num_variables
    root, pairs = jax.random.uniform(key, (2, k, k), minval=-(k**-0.5), maxval=k**-0.5)
    return CompleteRecipe(damping_root=jnp.eye(k) + root, coupling=pairs, stationary=jnp.ones(k), initial=jnp.full(k - 1, initial), beta=beta)


def drift_divergence(process: LinearSDE, t: Time, x: Float[Array, "*x"]) -> Float[Array, ""]:
    """∇·f = β d tr A, for data like `x` of d entries."""
    return process.rate(working_time(t, x)).astype(x.dtype) * x.size * jnp.trace(process.drift_matrix).astype(x.dtype)


def noise_norm(process: LinearSDE, t: Time, s: Float[Array, "k *x"]) -> Float[Array, ""]:
    """|s|²_g = β |Gᵀ s|²."""
    return process.rate(working_time(t, s)).astype(s.dtype) * jnp.sum(apply_matrix(process.noise_matrix.T, s) ** 2)


def implicit_integrand(model: Any, t: Time, z: Float[Array, "k *x"], args: PyTree = None, divergence: Callable = _EXACT) -> Float[Array, ""]:
    """-½ |s|²_g - ∇·(g gᵀ s - f) at one state z; `model` is a score with its `process`."""
    process = model.process

    def pull(z):
        return process.rate(working_time(t, z)).astype(z.dtype) * apply_matrix(process.diffusion_matrix, model(t, z, args))

    _, spread = divergence(pull, z)
    return drift_divergence(process, t, z[0]) - noise_norm(process, t, model(t, z, args)) / 2 - spread


def denoising_integrand(model: Any, t: Time, x: Float[Array, "*x"], noise: Float[Array, "k *x"], args: PyTree = None) -> Float[Array, ""]:
    """E½|s_q|²_g - ½ |s - s_q|²_g + ∇·f at z_t = φ_t x + L_t ε, the first term by its expectation ½ β d tr(GGᵀ Σ_t⁻¹)."""
    process, time = model.process, working_time(t, x)
    mean, covariance = process.moments(time)
    factor = jnp.linalg.cholesky(covariance)
    error = model(t, perturbed(mean, factor, x, noise), args) - noise_score(factor, noise)
    whitened = jnp.linalg.solve(covariance, process.diffusion_matrix.astype(time.dtype))
    expected = (process.rate(time) * jnp.trace(whitened)).astype(x.dtype) * x.size
    return expected / 2 - noise_norm(process, t, error) / 2 + drift_divergence(process, t, x)


def _log_det(matrix):
    return jnp.linalg.slogdet(matrix)[1]


def prior_term(process: LinearSDE, x: Float[Array, "*x"]) -> Float[Array, ""]:
    """E[log π(z_{t=0}) | x]."""
    mean, covariance = process.moments(working_time(0.0, x))
    prior = process.prior_covariance.astype(mean.dtype)
    quadratic = jnp.trace(jnp.linalg.solve(prior, covariance)) * x.size + jnp.dot(mean, jnp.linalg.solve(prior, mean)) * jnp.sum(x**2)
    return -(quadratic + x.size * _log_det(2 * jnp.pi * prior)).astype(x.dtype) / 2


def entropy(covariance: Float[Array, "k k"], x: Float[Array, "*x"]) -> Float[Array, ""]:
    """That of d independent Gaussians with this covariance, for data like `x` of d entries."""
    return (x.size * _log_det(2 * jnp.pi * jnp.e * covariance)).astype(x.dtype) / 2


class Bound(eqx.Module):
    """The socket: an estimate of the bound on log p(x), in nats, unbiased for r uniform on (0, 1), which sets the time."""

    @abc.abstractmethod
    def __call__(self, model: VectorField, r: Scalar, x: Float[Array, "*x"], key: PRNGKey, args: PyTree = None) -> Float[Array, ""]:
        """One estimate for ONE example."""


class ImplicitBound(Bound):
    """The first form, from the score's divergence: `ExactDivergence()` (default), or `HutchinsonDivergence(key)` for many dimensions.

    Needs a score that is finite up to the data, and Σ_0 > 0. Times are u = r².
    """

    divergence: Callable = _EXACT

    def __call__(self, model, r, x, key, args=None):
        process = model.process
        noise = jax.random.normal(key, (process.drift_matrix.shape[0], *x.shape), x.dtype)
        t = 1 - r**2
        inside = 2 * r * implicit_integrand(model, t, process.perturb(t, x, noise), args, self.divergence)
        return prior_term(process, x) + inside + entropy(process.initial_covariance[1:, 1:], x)


class DenoisingBound(Bound):
    """The second form, for training. `margin` is u₀, where it stops before the data (default 1e-3, the authors')."""

    margin: Scalar = 1e-3

    def __check_init__(self):
        check_range("margin", self.margin, low=0.0, high=1.0, open_low=True, open_high=True)

    def __call__(self, model, r, x, key, args=None):
        process = model.process
        margin, noise = jnp.asarray(self.margin, x.dtype), jax.random.normal(key, (2, process.drift_matrix.shape[0], *x.shape), x.dtype)
        u = margin**r
        inside = -jnp.log(margin) * u * denoising_integrand(model, 1 - u, x, noise[0], args)
        end = 1 - margin
        mean, covariance = process.moments(working_time(end, x))
        z = perturbed(mean, jnp.linalg.cholesky(covariance), x, noise[1])
        accuracy = jnp.dot(mean, jnp.linalg.solve(covariance, mean)).astype(x.dtype)
        error = x - process.denoised(end, z, model(end, z, args))
        decoder = -accuracy * jnp.sum(error**2) / 2 + x.size * jnp.log(accuracy / (2 * jnp.pi)) / 2
        return prior_term(process, x) + inside + decoder + entropy(covariance, x)


class LikelihoodLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {})`: minus the bound, in nats per dimension, with times stratified over the batch.

    - `batch`: data of shape (B, *x), or a pair (data, args) with `args` a pytree of leading axis B.
    - `model`: a score `(t, z, args)` on ONE state with a field `process`, e.g. `NoiseScore(network, process)`; gradients reach both.

    Raises `ValueError` for data without a batch axis.
    """

    bound: Bound = DenoisingBound()

    def __call__(self, model: VectorField, batch: PyTree, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        data, args = batch if isinstance(batch, tuple) else (batch, None)
        if data.ndim < 2:
            raise ValueError(f"the data of a batch must have shape (batch, *example), got {data.shape}.")
        n = data.shape[0]
        key_time, key_noise = jax.random.split(key)
        r = jnp.mod(jax.random.uniform(key_time, ()) + jnp.arange(n) / n, 1.0).astype(data.dtype)
        bounds = jax.vmap(lambda r, x, key, args: self.bound(model, r, x, key, args))(r, data, jax.random.split(key_noise, n), args)
        return -jnp.mean(bounds) * n / data.size, {}


__all__ = [
    "Bound",
    "DenoisingBound",
    "ImplicitBound",
    "LikelihoodLoss",
    "alda",
    "denoising_integrand",
    "drift_divergence",
    "entropy",
    "implicit_integrand",
    "malda",
    "noise_norm",
    "prior_term",
    "random_recipe",
]
