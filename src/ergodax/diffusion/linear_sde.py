"""Linear diffusions of several coupled variables: the engine of PSLD, critically damped Langevin, MDM, and of VP as their one-variable case.

A state z of shape (K, *x) holds the data in row 0 and K - 1 auxiliary variables (momenta). In noise time u = 1 - t (data at u = 0)

    dz = β(u) A z du + √β(u) G dw,   z_0 = (x, v),   v ~ N(0, Σ_0),

with K × K matrices that act alike on every entry of x, so all algebra is K × K. In the clock τ(u) = ∫₀ᵘ β it is time-homogeneous:

    z_t | x ~ N(φ_t x, Σ_t),   φ_t = e^{Aτ} e₁,   Σ_t = e^{Aτ} Σ_0 e^{Aᵀτ} + ∫₀^τ e^{As} GGᵀ e^{Aᵀs} ds = L_t L_tᵀ,

    z_t = φ_t x + L_t ε,   ∇ log p(z_t | x) = -L_t^{-T} ε.

Van Loan (1978) reads e^{Aτ} and the integral off one block exponential. Its blocks grow as e^{|A|τ} where Σ_t does not, and its errors are relative
to the largest entry, while entries of Σ_t vanish as τ³; `linear_transition` gets the same two matrices by a Taylor series for τ/2ⁿ and n doublings
Σ(2h) = Σ(h) + Φ(h) Σ(h) Φ(h)ᵀ, a sum of positive terms, in float32 too.

Backwards, in our t: probability flow dz = β (-A z + ½ GGᵀ s) dt, reverse SDE dz = β (-A z + GGᵀ s) dt + √β G dw (Song et al. 2021,
arXiv:2011.13456). `LinearSDETerm` steps on the first with any diffrax solver, `reverse_sde_terms` on the second.
"""

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float

from ..core.check import check_count, check_range
from ..core.types import PRNGKey, PyTree, Scalar, Time, VectorField


_TERMS, _DOUBLINGS = 14, 16


def apply_matrix(matrix: Float[Array, "k l"], z: Float[Array, "l *x"]) -> Float[Array, "k *x"]:
    """The matrix on the rows of `z`, in the dtype of `z` and its full precision on any accelerator."""
    return jnp.tensordot(matrix.astype(z.dtype), z, axes=1, precision=jax.lax.Precision.HIGHEST)


def _mm(*matrices):
    product = matrices[0]
    for matrix in matrices[1:]:
        product = jnp.matmul(product, matrix, precision=jax.lax.Precision.HIGHEST)
    return product


# Compiled here, so that calls outside `jit` do not compile the loops anew.
@jax.jit
def linear_transition(drift: Float[Array, "k k"], diffusion: Float[Array, "k k"], elapsed: Scalar) -> tuple[Float[Array, "k k"], Float[Array, "k k"]]:
    """(Φ, Σ) = (e^{Aτ}, ∫₀^τ e^{As} GGᵀ e^{Aᵀs} ds) of dz = A z dτ + G dw over τ = `elapsed`; `diffusion` is GGᵀ.

    To rounding for |A| τ < 16384, entries near 0 included. Differentiable in everything, in both modes.
    """
    norm = jax.lax.stop_gradient(jnp.max(jnp.sum(jnp.abs(drift * elapsed), axis=0)))
    doublings = jnp.clip(jnp.ceil(jnp.log2(4 * norm)), 0, _DOUBLINGS)
    a, q = drift * elapsed / 2**doublings, diffusion * elapsed / 2**doublings
    identity = jnp.eye(len(a), dtype=a.dtype) + 0 * a

    def add_term(carry, n):
        power, integrand, phi, sigma = carry
        power, integrand = _mm(a, power) / n, (_mm(a, integrand) + _mm(integrand, a.T)) / (n + 1)
        return (power, integrand, phi + power, sigma + integrand), None

    def double(carry, n):
        phi, sigma = carry
        doubled = _mm(phi, phi), sigma + _mm(phi, sigma, phi.T)
        return jax.tree.map(lambda new, old: jnp.where(n < doublings, new, old), doubled, carry), None

    (_, _, phi, sigma), _ = jax.lax.scan(add_term, (identity, q + 0 * a, identity, q + 0 * a), jnp.arange(1, _TERMS + 1, dtype=a.dtype))
    return jax.lax.scan(double, (phi, sigma), jnp.arange(_DOUBLINGS, dtype=a.dtype))[0]


def perturbed(mean: Float[Array, " k"], factor: Float[Array, "k k"], data: Float[Array, "*x"], noise: Float[Array, "k *x"]) -> Float[Array, "k *x"]:
    """φ x + L ε."""
    return jnp.tensordot(mean.astype(data.dtype), data, axes=0) + apply_matrix(factor, noise)


def noise_score(factor: Float[Array, "k k"], noise: Float[Array, "p *x"]) -> Float[Array, "k *x"]:
    """-L^{-T} ε, with rows of 0 before an ε of fewer rows."""
    k = len(factor)
    noise = jnp.pad(noise, [(k - noise.shape[0], 0)] + [(0, 0)] * (noise.ndim - 1))
    rows = jax.scipy.linalg.solve_triangular(factor.astype(noise.dtype), noise.reshape(k, -1), trans="T", lower=True)
    return -rows.reshape(noise.shape)


class LinearBeta(eqx.Module):
    """β(u) from `beta_min` at the data (u = 0) to `beta_max` at the noise (u = 1), and its integral; any such pair of functions serves as a rate."""

    beta_min: Scalar = 0.1
    beta_max: Scalar = 20.0

    def __check_init__(self):
        check_range("beta_min", self.beta_min, low=0.0)
        check_range("beta_max", self.beta_max, low=0.0, open_low=True)

    def __call__(self, u: Time) -> Float[Array, "..."]:
        """β(u)."""
        return jnp.asarray(self.beta_min + u * (self.beta_max - self.beta_min))

    def integral(self, u: Time) -> Float[Array, "..."]:
        """∫₀ᵘ β."""
        return jnp.asarray(u * (self.beta_min + u * (self.beta_max - self.beta_min) / 2))


class LinearSDE(eqx.Module):
    """The socket for a process: β and four K × K matrices. Times are scalars in our t; states have shape (K, *x), with the data in row 0."""

    beta: eqx.AbstractVar[LinearBeta]

    @property
    @abc.abstractmethod
    def drift_matrix(self) -> Float[Array, "k k"]:
        """A."""

    @property
    @abc.abstractmethod
    def noise_matrix(self) -> Float[Array, "k k"]:
        """G."""

    @property
    @abc.abstractmethod
    def initial_covariance(self) -> Float[Array, "k k"]:
        """Σ_0, the covariance at t = 1 of the variables given the data: 0 in row and column 0."""

    @property
    @abc.abstractmethod
    def prior_covariance(self) -> Float[Array, "k k"]:
        """S, the covariance at t = 0 where sampling starts: the stationary one."""

    @property
    def diffusion_matrix(self) -> Float[Array, "k k"]:
        """GGᵀ."""
        return _mm(self.noise_matrix, self.noise_matrix.T)

    def rate(self, t: Time) -> Float[Array, "..."]:
        """β at t."""
        return self.beta(1 - jnp.asarray(t))

    def elapsed(self, t: Time) -> Float[Array, "..."]:
        """τ(1 - t), the clock's run from the data to t."""
        return self.beta.integral(1 - jnp.asarray(t))

    def moments(self, t: Time) -> tuple[Float[Array, " k"], Float[Array, "k k"]]:
        """(φ_t, Σ_t): z_t | x ~ N(φ_t x, Σ_t), with the auxiliary start marginalised."""
        t = jnp.asarray(t)
        phi, sigma = linear_transition(self.drift_matrix.astype(t.dtype), self.diffusion_matrix.astype(t.dtype), self.elapsed(t))
        return phi[:, 0], sigma + _mm(phi, self.initial_covariance.astype(t.dtype), phi.T)

    def perturb(self, t: Time, data: Float[Array, "*x"], noise: Float[Array, "k *x"]) -> Float[Array, "k *x"]:
        """z_t = φ_t x + L_t ε."""
        mean, covariance = self.moments(working_time(t, data))
        return perturbed(mean, jnp.linalg.cholesky(covariance), data, noise)

    def score(self, t: Time, noise: Float[Array, "p *x"]) -> Float[Array, "k *x"]:
        """-L_t^{-T} ε. With fewer than K rows, ε holds the LAST p: those rows of the score need no others, and the rest of it is not defined."""
        k = self.drift_matrix.shape[0]
        if not 1 <= noise.shape[0] <= k:
            raise ValueError(f"`noise` must have 1 to {k} rows (variables of the process), got shape {noise.shape}.")
        return noise_score(jnp.linalg.cholesky(self.moments(working_time(t, noise))[1]), noise)

    def denoised(self, t: Time, z: Float[Array, "k *x"], score: Float[Array, "k *x"]) -> Float[Array, "*x"]:
        """E[x | z_t = z] from all rows of the score: φ_t E[x | z] = z + Σ_t s (Tweedie), solved by least squares in the metric Σ_t⁻¹."""
        mean, covariance = self.moments(working_time(t, z))
        weights = jnp.linalg.solve(covariance, mean)
        # Σ⁻¹ Σ s = s: nothing is lost where Σ is almost singular
        total = jnp.tensordot(weights.astype(z.dtype), z, axes=1) + jnp.tensordot(mean.astype(z.dtype), score, axes=1)
        return total / jnp.dot(weights, mean).astype(z.dtype)

    def prior(self, key: PRNGKey, shape: tuple[int, ...], n: int | None = None, dtype=None) -> Float[Array, "..."]:
        """`n` draws from N(0, S) of shape (n, K, *shape) for data of `shape`, or one of shape (K, *shape) for `n=None`."""
        if n is not None:
            check_count("n", n)
        dtype = jnp.result_type(float) if dtype is None else dtype
        factor = jnp.linalg.cholesky(self.prior_covariance.astype(dtype))
        lead = () if n is None else (n,)
        noise = jax.random.normal(key, (len(factor), math.prod(lead + shape)), dtype)
        return jnp.moveaxis(apply_matrix(factor, noise).reshape(len(factor), *lead, *shape), 0, len(lead))


class NoiseScore(eqx.Module):
    """The score field of a network that predicts ε: `network(t, z, args) -> (p, *x)`, p = K or the last p rows (`LinearSDE.score`).

    `process`: whatever has `score(t, noise)`, a `LinearSDE` or a `ConstantFP`.
    """

    network: VectorField
    process: Any

    def __call__(self, t: Time, z: Float[Array, "k *x"], args: PyTree = None) -> Float[Array, "k *x"]:
        """s at one scalar `t`, of the shape of `z`."""
        return self.process.score(t, self.network(t, z, args))


class ReverseDrift(eqx.Module):
    """β (-A z + ½ (1 + κ²) GGᵀ s) as a vector field in our t. κ = `noise_scale`: 0 (default) is the probability flow, 1 the reverse SDE's drift."""

    score: VectorField
    process: LinearSDE
    noise_scale: Scalar = 0.0

    def __call__(self, t: Time, z: Float[Array, "k *x"], args: PyTree = None) -> Float[Array, "k *x"]:
        """dz/dt at one scalar `t`, of the shape of `z`."""
        t = working_time(t, z)
        return reverse_drift(self.process, t, z, self.score(t, z, args), self.noise_scale)


def reverse_drift(
    process: LinearSDE, t: Time, z: Float[Array, "k *x"], score: Float[Array, "k *x"], noise_scale: Scalar = 0.0
) -> Float[Array, "k *x"]:
    """β (-A z + ½ (1 + κ²) GGᵀ s) from the value of the score."""
    pull = (1 + jnp.asarray(noise_scale, z.dtype) ** 2) / 2 * apply_matrix(process.diffusion_matrix, score)
    return process.rate(working_time(t, z)).astype(z.dtype) * (pull - apply_matrix(process.drift_matrix, z))


class ScoreValue(NamedTuple):
    """What a solver sees of the model."""

    score: Float[Array, "k *x"]
    velocity: Float[Array, "k *x"]  # dz/dt of the probability flow


class LinearStep(NamedTuple):
    """A step's ends in our t, and the process, which solvers ask for its clocks."""

    t0: Array
    t1: Array
    process: LinearSDE


class LinearSDETerm(dfx.AbstractTerm):
    """The probability flow of a linear SDE, integrated over t: `integrate(LinearSDETerm(score, process), solver, z0, times=times)`.

    `score(t, z, args)` is ∇ log p_t of ONE state; `NoiseScore` makes one of a network. Stock diffrax solvers run on it; those of
    `conjugate_splitting_integrators` use the score and the process. Batches: `vmap` over z0, drawn by `process.prior(key, shape, n)`.
    """

    score: VectorField
    process: LinearSDE

    def vf(self, t, y, args):
        """A `ScoreValue` at time `t`."""
        t = working_time(t, y)
        score = self.score(t, y, args)
        return ScoreValue(score, reverse_drift(self.process, t, y, score))

    def contr(self, t0, t1, **kwargs):
        """A `LinearStep`."""
        return LinearStep(jnp.asarray(t0), jnp.asarray(t1), self.process)

    def prod(self, vf, control):
        """The probability flow's first-order increment."""
        return vf.velocity * (control.t1 - control.t0).astype(vf.velocity.dtype)


class _ReverseNoise(eqx.Module):
    process: LinearSDE
    noise_scale: Scalar

    def __call__(self, t, z, args):
        scale = jnp.asarray(self.noise_scale, z.dtype) * jnp.sqrt(self.process.rate(working_time(t, z)).astype(z.dtype))
        matrix = scale * self.process.noise_matrix.astype(z.dtype)
        return lx.FunctionLinearOperator(lambda w: apply_matrix(matrix, w), jax.ShapeDtypeStruct(z.shape, z.dtype))


def reverse_sde_terms(process: LinearSDE, score: VectorField, key: PRNGKey, z0: Float[Array, "k *x"], noise_scale: Scalar = 1.0) -> dfx.MultiTerm:
    """dz = β (-A z + ½ (1 + κ²) GGᵀ s) dt + κ √β G dw: `integrate(reverse_sde_terms(process, score, key, z0), diffrax.Euler(), z0, times=times)`.

    Every κ = `noise_scale` >= 0 (default 1) has the same marginals. One key a trajectory: `vmap` over keys and z0. Raises `ValueError` for κ < 0.
    """
    check_range("noise_scale", noise_scale, low=0.0)
    brownian = dfx.UnsafeBrownianPath(jax.ShapeDtypeStruct(z0.shape, z0.dtype), key)
    drift = ReverseDrift(score, process, noise_scale)
    return dfx.MultiTerm(dfx.ODETerm(drift), dfx.ControlTerm(_ReverseNoise(process, noise_scale), brownian))


class LinearSolver(dfx.AbstractSolver):
    """A deterministic solver on a `LinearSDETerm`, one step at a time."""

    term_structure: ClassVar = LinearSDETerm
    interpolation_cls: ClassVar[Callable] = dfx.LocalLinearInterpolation

    def func(self, terms, t0, y0, args):
        """The model at `t0`."""
        return terms.vf(t0, y0, args)

    def init(self, terms, t0, t1, y0, args):
        """One-step methods keep nothing."""
        return None


class NoisyLinearSolver(dfx.AbstractItoSolver):
    """A stochastic solver on `ergodax.core.with_noise(LinearSDETerm(score, process), key, z0)`."""

    term_structure: ClassVar = dfx.MultiTerm[tuple[LinearSDETerm, dfx.AbstractTerm]]
    interpolation_cls: ClassVar[Callable] = dfx.LocalLinearInterpolation

    def func(self, terms, t0, y0, args):
        """The model at `t0`."""
        return terms.terms[0].vf(t0, y0, args)

    def init(self, terms, t0, t1, y0, args):
        """One-step methods keep nothing."""
        return None


def working_time(t: Time, like: Array) -> Float[Array, "..."]:
    """`t` in the dtype that clocks and matrices of the state `like` are computed in: its own, and at least float32."""
    return jnp.asarray(t).astype(like.dtype if jnp.finfo(like.dtype).bits >= 32 else jnp.float32)


__all__ = [
    "LinearBeta",
    "LinearSDE",
    "LinearSDETerm",
    "LinearSolver",
    "LinearStep",
    "NoiseScore",
    "NoisyLinearSolver",
    "ReverseDrift",
    "ScoreValue",
    "apply_matrix",
    "linear_transition",
    "noise_score",
    "perturbed",
    "reverse_drift",
    "reverse_sde_terms",
    "working_time",
]
