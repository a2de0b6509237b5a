"""Gaussian mixtures with everything a diffusion or flow method can be checked against, in closed form.

With x₁ ~ Σ_k w_k N(μ_k, Σ_k) and x_t = α x₁ + σ x₀ on an affine path, x_t is a mixture again,

    x_t ~ Σ_k w_k N(α μ_k, S_k),   S_k = α² Σ_k + σ² I,

and with the responsibilities r_k(x) ∝ w_k N(x; α μ_k, S_k)

    E[x₁ | x_t = x] = Σ_k r_k (μ_k + α Σ_k S_k⁻¹ (x - α μ_k)),   ∇ log p_t(x) = -Σ_k r_k S_k⁻¹ (x - α μ_k).

Each Σ_k = Q_k diag(λ_k) Q_kᵀ is decomposed once. S_k is then diagonal in the same basis at every t, so a call costs two matrix products per
component, and nothing is divided by α or σ: every formula holds at both ends of a path. Textbook identities (Bishop 2006, §2.3.3); the score is
Tweedie's formula.
"""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ergodax.core.check import check_count, check_range, is_concrete
from ergodax.core.path import AffinePath
from ergodax.core.types import PRNGKey, PyTree, Time


#: Arrays, or nested lists of numbers.
Numbers = ArrayLike | Sequence


class GaussianMixture(eqx.Module):
    """Σ_k w_k N(μ_k, Σ_k) in any dimension d.

    - `weights`: (k,), nonnegative; normalised here. A weight of exactly 0 removes its component, from gradients too.
    - `means`: (k, d). Their dtype (at least float32) is the mixture's.
    - `covariances`: (k, d, d), symmetric and positive semi-definite, or (k, d), the diagonals. Singular ones are welcome, down to 0 (a point mass):
      such a mixture has samples and denoisers, but a density only where σ_t > 0. Eigenvalues of a full matrix below 4 eps times its largest count
      as 0.

    Methods take points of shape (..., d), compute in the dtype of the points (at least float32), and return that dtype. Gradients with respect to a
    full covariance pass through `eigh`: they are finite where its eigenvalues differ. Raises `ValueError` for arguments that do not fit together,
    negative or all-zero weights, and covariances that are not symmetric or not positive semi-definite (values are checked where they can be read).
    """

    log_weights: Float[Array, " k"]
    means: Float[Array, "k d"]
    variances: Float[Array, "k d"]  # λ_k
    basis: Float[Array, "k d d"] | None  # Q_k, eigenvectors in columns; None for the standard basis

    def __init__(self, weights: Numbers, means: Numbers, covariances: Numbers):
        means = jnp.asarray(means)
        dtype = _working_dtype(means.dtype if jnp.issubdtype(means.dtype, jnp.floating) else jnp.result_type(float))
        means, weights, covariances = means.astype(dtype), jnp.asarray(weights, dtype), jnp.asarray(covariances, dtype)
        if means.ndim != 2:
            raise ValueError(f"`means` must have shape (k, d), got {means.shape}.")
        if weights.shape != means.shape[:1]:
            raise ValueError(f"`weights` must have shape {means.shape[:1]} beside means of shape {means.shape}, got {weights.shape}.")
        if covariances.shape not in (means.shape, (*means.shape, means.shape[1])):
            raise ValueError(
                f"`covariances` must have shape {(*means.shape, means.shape[1])}, or {means.shape} for diagonals, got {covariances.shape}."
            )
        check_range("means", means, open_low=True, open_high=True)
        check_range("weights", weights, low=0.0, open_high=True)
        if is_concrete(weights) and not np.any(np.asarray(weights) > 0):
            raise ValueError(f"`weights` must not all be 0, got {weights}.")

        positive = weights > 0
        log_weights = jnp.where(positive, jnp.log(jnp.where(positive, weights, 1)), -jnp.inf)
        self.log_weights = log_weights - jax.nn.logsumexp(log_weights)
        self.means = means
        if covariances.ndim == 2:
            check_range("covariances", covariances, low=0.0, open_high=True)
            self.variances, self.basis = covariances, None
        else:
            self.variances, self.basis = _decompose(covariances)

    @classmethod
    def isotropic(cls, weights: Numbers, means: Numbers, std: Numbers) -> "GaussianMixture":
        """Components N(μ_k, std_k² I): `std` is a scalar or (k,). 0 makes point masses, whose denoiser is the empirical one of a data set."""
        check_range("std", std, low=0.0, open_high=True)
        means = jnp.asarray(means)
        if np.shape(std) not in ((), means.shape[:1]):
            raise ValueError(f"`std` must be a scalar or have shape {means.shape[:1]}, got {np.shape(std)}.")
        return cls(weights, means, jnp.broadcast_to(jnp.square(jnp.asarray(std))[..., None], means.shape))

    @property
    def dim(self) -> int:
        """d."""
        return self.means.shape[-1]

    @property
    def weights(self) -> Float[Array, " k"]:
        """w_k, which sum to 1."""
        return jnp.exp(self.log_weights)

    @property
    def covariances(self) -> Float[Array, "k d d"]:
        """Σ_k."""
        basis = jnp.eye(self.dim, dtype=self.means.dtype)[None] if self.basis is None else self.basis
        return _einsum("kij,kj,klj->kil", basis, self.variances, basis)

    def mean(self) -> Float[Array, " d"]:
        """E[x]."""
        return _einsum("k,ki->i", self.weights, self.means)

    def covariance(self) -> Float[Array, "d d"]:
        """Cov[x]."""
        offset = self.means - self.mean()
        return _einsum("k,kij->ij", self.weights, self.covariances) + _einsum("k,ki,kj->ij", self.weights, offset, offset)

    def sample(self, key: PRNGKey, n: int | None = None) -> Float[Array, "*n d"]:
        """`n` independent draws of shape (n, d), or one of shape (d,) for `n=None`."""
        if n is not None:
            check_count("n", n)
        shape = () if n is None else (n,)
        component_key, noise_key = jax.random.split(key)
        component = jax.random.categorical(component_key, self.log_weights, shape=shape)
        positive = self.variances > 0
        std = jnp.where(positive, jnp.sqrt(jnp.where(positive, self.variances, 1)), 0)
        noise = std[component] * jax.random.normal(noise_key, (*shape, self.dim), self.means.dtype)
        if self.basis is not None:
            # Every basis on every draw, then a choice: k times the work, but no d x d matrix per draw in memory.
            rotated = _einsum("...j,kij->...ki", noise, self.basis)
            noise = jnp.take_along_axis(rotated, component[..., None, None], axis=-2)[..., 0, :]
        return self.means[component] + noise

    def log_prob(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch"]:
        """log p(x). NaN where a covariance is singular, for then there is no density."""
        _, logits, offset = self._cast(x)._components(x)
        return (jax.nn.logsumexp(logits, axis=-1) + offset).astype(x.dtype)

    def score(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """∇ log p(x). NaN where a covariance is singular."""
        mixture = self._cast(x)
        residual, logits, _ = mixture._components(x)
        return -mixture._combine(jax.nn.softmax(logits, axis=-1), residual / mixture.variances).astype(x.dtype)

    def marginal(self, path: AffinePath, t: Time) -> "GaussianMixture":
        """The law of x_t = α_t x₁ + σ_t x₀, at one scalar time `t`."""
        if np.shape(t) != ():
            raise ValueError(f"`t` must be one scalar time (vmap for more), got shape {np.shape(t)}.")
        t = jnp.asarray(t, self.means.dtype)
        alpha, sigma = path.alpha(t), path.sigma(t)
        return eqx.tree_at(lambda m: (m.means, m.variances), self, (alpha * self.means, alpha**2 * self.variances + sigma**2))

    def log_prob_at(self, path: AffinePath, t: Time, x: Float[Array, "*batch d"]) -> Float[Array, "*batch"]:
        """log p_t(x), the log-density of x_t at one scalar time `t`."""
        return self._cast(x).marginal(path, t).log_prob(x)

    def score_at(self, path: AffinePath, t: Time, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """∇ log p_t(x), at one scalar time `t`."""
        return self._cast(x).marginal(path, t).score(x)

    def denoised(self, path: AffinePath, t: Time, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """The posterior mean E[x₁ | x_t = x] at one scalar time `t`. The mean where α = 0; x/α (point masses: the nearest) where σ = 0."""
        mixture = self._cast(x)
        law, residual, responsibility = mixture._posterior(path, t, x)
        return mixture._denoised(path, t, law, residual, responsibility).astype(x.dtype)

    def posterior_covariance(self, path: AffinePath, t: Time, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d d"]:
        """Cov[x₁ | x_t = x] at one scalar time `t`: that within the components, Σ_k S_k⁻¹ σ², and that between their posterior means."""
        mixture = self._cast(x)
        law, residual, responsibility = mixture._posterior(path, t, x)
        t = jnp.asarray(t, mixture.means.dtype)
        within = path.sigma(t) ** 2 * mixture.variances / law.variances
        shift = path.alpha(t) * mixture.variances / law.variances * residual
        if mixture.basis is None:
            within = jnp.eye(mixture.dim, dtype=within.dtype) * within[..., None]
        else:
            within = _einsum("kij,kj,klj->kil", mixture.basis, within, mixture.basis)
            shift = _einsum("...kj,kij->...ki", shift, mixture.basis)
        centre = mixture.means + shift
        offset = centre - _einsum("...k,...ki->...i", responsibility, centre)[..., None, :]
        between = _einsum("...k,...ki,...kj->...ij", responsibility, offset, offset)
        return (_einsum("...k,kij->...ij", responsibility, within) + between).astype(x.dtype)

    def velocity_at(self, path: AffinePath, t: Time, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """The probability-flow velocity E[α' x₁ + σ' x₀ | x_t = x] at one scalar time `t`: what flow matching regresses on."""
        mixture = self._cast(x)
        law, residual, responsibility = mixture._posterior(path, t, x)
        t = jnp.asarray(t, mixture.means.dtype)
        data = path.d_alpha(t) * mixture._denoised(path, t, law, residual, responsibility)
        noise = _sigma_d_sigma(path, t) * mixture._combine(responsibility, residual / law.variances)
        return (data + noise).astype(x.dtype)

    def denoiser(self, path: AffinePath) -> "MixtureDenoiser":
        """`denoised` on `path` as a vector field `(t, x, args)`, for `ergodax.core.DenoiserTerm`."""
        return MixtureDenoiser(self, path)

    def _cast(self, x):
        """This mixture in the dtype that points `x` are computed in."""
        if x.ndim < 1 or x.shape[-1] != self.dim:
            raise ValueError(f"`x` must have shape (..., {self.dim}), got {x.shape}.")
        return jax.tree.map(lambda leaf: leaf.astype(_working_dtype(x.dtype)), self)

    def _components(self, x):
        """Residuals Q_kᵀ (x - μ_k), (..., k, d); log w_k N(x; μ_k, Σ_k) up to a number that all components share, (..., k); that number."""
        residual = x.astype(self.means.dtype)[..., None, :] - self.means
        if self.basis is not None:
            residual = _einsum("...ki,kij->...kj", residual, self.basis)
        # Log-determinants relative to a common scale: beside d log σ² they would lose digits that the responsibilities need.
        scale = jax.lax.stop_gradient(jnp.max(self.variances))
        exponent = jnp.sum(residual**2 / self.variances, axis=-1) + jnp.sum(jnp.log(self.variances / scale), axis=-1)
        return residual, self.log_weights - exponent / 2, -self.dim / 2 * (jnp.log(scale) + math.log(2 * math.pi))

    def _combine(self, responsibility, vector):
        """Σ_k r_k Q_k v_k, (..., d)."""
        if self.basis is None:
            return _einsum("...k,...ki->...i", responsibility, vector)
        return _einsum("...kj,kij->...i", responsibility[..., None] * vector, self.basis)

    def _posterior(self, path, t, x):
        """The law of x_t, residuals and responsibilities."""
        law = self.marginal(path, t)
        # The floor is felt only where a covariance is singular and σ < 1e-9: it keeps 0/0 out, and is wide enough for r²/floor not to overflow.
        floor = np.sqrt(jnp.finfo(self.means.dtype).tiny)
        law = eqx.tree_at(lambda m: m.variances, law, jnp.maximum(law.variances, floor))
        residual, logits, _ = law._components(x)
        return law, residual, jax.nn.softmax(logits, axis=-1)

    def _denoised(self, path, t, law, residual, responsibility):
        gain = path.alpha(jnp.asarray(t, self.means.dtype)) * self.variances / law.variances
        return _einsum("...k,ki->...i", responsibility, self.means) + self._combine(responsibility, gain * residual)


class MixtureDenoiser(eqx.Module):
    """The exact posterior mean of a mixture on a path, as a vector field `(t, x, args)`. Made by `GaussianMixture.denoiser`."""

    mixture: GaussianMixture
    path: AffinePath

    def __call__(self, t: Time, x: Float[Array, "*batch d"], args: PyTree = None) -> Float[Array, "*batch d"]:
        """E[x₁ | x_t = x] at one scalar time `t`, for one example or any leading axes; `args` is not used."""
        return self.mixture.denoised(self.path, t, x)


def _working_dtype(dtype):
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def _einsum(subscripts, *operands):
    # Exact targets must not be rounded to the TF32 or bfloat16 that accelerators multiply in by default.
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)


def _decompose(covariances):
    """Eigenvalues (k, d) and eigenvectors (k, d, d), with the eigenvalues that are only rounding set to 0."""
    check_range("covariances", covariances, open_low=True, open_high=True)
    eps = float(jnp.finfo(covariances.dtype).eps)
    if is_concrete(covariances):
        matrices = np.asarray(covariances)
        skew = np.abs(matrices - matrices.swapaxes(1, 2)).max(axis=(1, 2))
        if (bad := np.flatnonzero(skew > 100 * eps * np.abs(matrices).max(axis=(1, 2)))).size:
            raise ValueError(f"`covariances` must be symmetric, but number {bad[0]} differs from its transpose by {skew[bad[0]]:g}.")
    variances, basis = jnp.linalg.eigh(covariances)
    largest = jnp.abs(variances).max(axis=-1, keepdims=True)
    if is_concrete(variances):
        smallest = np.asarray(variances.min(axis=-1))
        if (bad := np.flatnonzero(smallest < -10 * variances.shape[-1] * eps * np.asarray(largest[:, 0]))).size:
            raise ValueError(f"`covariances` must be positive semi-definite, but number {bad[0]} has the eigenvalue {smallest[bad[0]]:g}.")
    return jnp.where(variances > 4 * eps * largest, variances, 0), basis


def _sigma_d_sigma(path, t):
    """σ σ'. Where σ = 0 and σ' is infinite (the VP and cosine paths at t = 1) the product has a finite limit: it is read one rounding step before."""
    inside = jnp.minimum(t, 1 - float(jnp.finfo(t.dtype).epsneg))
    product, limit = (path.sigma(s) * path.d_sigma(s) for s in (t, inside))
    return jnp.where(jnp.isfinite(product), product, limit)


__all__ = ["GaussianMixture", "MixtureDenoiser"]
