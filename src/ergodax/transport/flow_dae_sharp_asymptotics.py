"""What a flow learns from n samples of a two-cluster mixture in high dimension. Cui, Krzakala, Vanden-Eijnden, Zdeborová 2023 (arXiv:2310.03575).

The target is ½ N(μ, s² I) + ½ N(-μ, s² I) in R^d with |μ|² of order d, the base N(0, I), the path x_t = α(t) x₀ + β(t) x₁, and at every t the
denoiser is an autoencoder of two tied layers with a skip connection,

    f(x) = c x + w φ(w·x/√d),   Σ_i |f(x_t^i) - x₁^i|² + λ |w|² minimal,

trained on the same n pairs (x₀^i, x₁^i) at all t. With φ = sign, and x̄₀, x̄₁ the means of the pairs times their cluster's sign, the minimiser is

    c = ⟨x₁, x_t⟩/⟨x_t, x_t⟩,   w = κ ((1 - c β) x̄₁ - c α x̄₀),   κ = n/(n + λ),   ⟨u, v⟩ = Σ_i u^i·v^i - n κ ū·v̄,

which needs three inner products in all (`AutoencoderFlow`). Its velocity b = (α'/α) x + (β' - α' β/α) f is, with e = ⟨x₀, x_t⟩/⟨x_t, x_t⟩,

    b = (β' c + α' e) x + κ (β' α - α' β) (e x̄₁ - c x̄₀) φ,

regular at both ends, and integrates in closed form: while the sign of a point stays,

    x(t) = r x(0) ± κ ((β(t) - r β(0)) x̄₁ + (α(t) - r α(0)) x̄₀),   r² = ⟨x_t, x_t⟩(t)/⟨x_t, x_t⟩(0).

As d → ∞, ⟨x₀, x₀⟩/d → n - 1 + λ, ⟨x₁, x₁⟩/d → (n - 1) s² + λ (ρ + s²) with ρ = |μ|²/d, and ⟨x₀, x₁⟩/d → 0 (`asymptotic_flow`). So whatever the
path, the clusters generated have means ±κ (x̄₁ - s' x̄₀) and standard deviation s', with s' = s for λ = 0, and the squared error of a mean is 2 s²/n
per dimension then: s²/n from the data and as much from the noise that was drawn, the Bayes-optimal rate at twice its constant.

Beside the paper: the solution in closed form instead of recursions in t; exact minimisers at finite d. φ is the sign, the limit of any saturating odd
activation since w·x/√d grows as √d. Clusters of the samples are found from their Gram matrix, where the paper's training finds them by descent.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_range
from ..core.types import PRNGKey, PyTree, Scalar, Time
from .interpolants import LinearInterpolant, SpatiallyLinearInterpolant, ZeroGamma


class TiedAutoencoder(eqx.Module):
    """f(x) = c x + w φ(w·x/√d) on one example x (d,): `weight` is w (d,), `skip` c, `activation` φ (default the sign)."""

    weight: Float[Array, " d"]
    skip: Float[Array, ""]
    activation: Callable = eqx.field(static=True, default=jnp.sign)

    def __call__(self, x: Float[Array, " d"], *, key: PRNGKey | None = None) -> Float[Array, " d"]:
        """f(x)."""
        return self.skip * x + self.activation(self.weight @ x / x.size**0.5) * self.weight


class AutoencoderRisk(eqx.Module):
    """`loss(autoencoder, (x_t, x₁), key) -> ((Σ_i |f(x_t^i) - x₁^i|² + λ |w|²)/d, {})`, rows of shape (n, d).

    `ridge` is λ (default 0.1, the authors'). Raises `ValueError` if it is negative.
    """

    ridge: Scalar = 0.1

    def __check_init__(self):
        check_range("ridge", self.ridge, low=0.0)

    def __call__(self, model: TiedAutoencoder, batch: tuple, key: PRNGKey | None = None) -> tuple[Float[Array, ""], dict]:
        """The empirical risk at one time."""
        noisy, clean = batch
        error = jnp.sum((jax.vmap(model)(noisy) - clean) ** 2) + self.ridge * jnp.sum(model.weight**2)
        return error / clean.shape[1], {}


class AutoencoderFlow(eqx.Module):
    """The learnt flow, as a vector field `(t, x, args)` on one example: the minimisers of the risk at all times. Made by `fit_autoencoder_flow`.

    - `interpolant`: its shares are α and β.
    - `source_mean`, `target_mean`: x̄₀ and x̄₁, (d,).
    - `gram`: ⟨·, ·⟩ of (x₀, x₁), (2, 2), up to a factor.
    - `shrinkage`: κ.
    """

    interpolant: SpatiallyLinearInterpolant
    source_mean: Float[Array, " d"]
    target_mean: Float[Array, " d"]
    gram: Float[Array, "2 2"]
    shrinkage: Float[Array, ""]

    def _shares(self, t):
        """(α, β) and (α', β')."""
        t, path = jnp.asarray(t, self.gram.dtype), self.interpolant
        return jnp.stack([path.source_share(t), path.target_share(t)]), jnp.stack([path.d_source_share(t), path.d_target_share(t)])

    def _coefficients(self, t):
        """(e, c): what the best linear prediction from x_t gives of x₀ and of x₁."""
        shares, _ = self._shares(t)
        products = self.gram @ shares
        return products / (shares @ products)

    def _direction(self, t):
        """w over κ α, which does not vanish at t = 1."""
        e, c = self._coefficients(t)
        return e * self.target_mean - c * self.source_mean

    def autoencoder(self, t: Time) -> TiedAutoencoder:
        """The minimiser of the risk at one scalar `t`."""
        (alpha, _), (_, c) = self._shares(t)[0], self._coefficients(t)
        return TiedAutoencoder(self.shrinkage * alpha * self._direction(t), c)

    def __call__(self, t: Time, x: Float[Array, " d"], args: PyTree = None) -> Float[Array, " d"]:
        """The velocity b."""
        (alpha, beta), slopes = self._shares(t)
        direction = self._direction(t)
        push = self.shrinkage * (slopes[1] * alpha - slopes[0] * beta) * jnp.sign(direction @ x)
        return (slopes @ self._coefficients(t)) * x + push * direction

    def spread(self, t: Time) -> Float[Array, ""]:
        """r: the standard deviation, at time t, of either generated cluster across the directions of x̄₀ and x̄₁."""
        start, now = self._shares(0.0)[0], self._shares(t)[0]
        return jnp.sqrt((now @ self.gram @ now) / (start @ self.gram @ start))

    def class_mean(self, t: Time) -> Float[Array, " d"]:
        """The mean, at time t, of the generated cluster that carries the sign +; the other's is its negative."""
        a, b = self._shares(t)[0] - self.spread(t) * self._shares(0.0)[0]
        return self.shrinkage * (b * self.target_mean + a * self.source_mean)

    def transport(self, t: Time, x0: Float[Array, " d"]) -> Float[Array, " d"]:
        """Where the flow has brought x(0) = `x0` by time t if its sign has not changed on the way, as d → ∞ and n²/d → 0 ensure."""
        return self.spread(t) * x0 + jnp.sign(self._direction(0.0) @ x0) * self.class_mean(t)


def fit_autoencoder_flow(
    source: Float[Array, "..."],
    target: Float[Array, "..."],
    signs: Float[Array, "..."] | None = None,
    *,
    interpolant: SpatiallyLinearInterpolant | None = None,
    ridge: Scalar = 0.1,
) -> AutoencoderFlow:
    """The flow learnt from n pairs, in O(n² d).

    - `source`, `target`: draws x₀ of the base and x₁ of the data, (n, d) each; their mean over clusters must be 0, as in the model.
    - `signs`: ±1, (n,), the cluster of each row of `target`; None: the signs of the leading eigenvector of their Gram matrix.
    - `interpolant`: α and β, without latent noise; default the linear one, 1 - t and t.
    - `ridge`: λ >= 0, above 0 for a single pair; default 0.1, the authors'. May be traced.

    Raises `ValueError` for shapes that do not fit, rows that are not finite, a negative `ridge`, or an interpolant with latent noise.
    """
    interpolant = _noiseless(interpolant)
    if source.ndim != 2 or source.shape != target.shape or not source.size:
        raise ValueError(f"`source` and `target` must have one shape (n, d), got {source.shape} and {target.shape}.")
    for name, rows in (("source", source), ("target", target)):
        check_range(name, rows, open_low=True, open_high=True)
    n = source.shape[0]
    check_range("ridge", ridge, low=0.0, open_low=n == 1)
    if signs is None:
        leading = jnp.linalg.eigh(target @ target.T)[1][:, -1]
        signs = jnp.where(leading < 0, -1, 1)
    if signs.shape != (n,):
        raise ValueError(f"`signs` must have shape ({n},), got {signs.shape}.")
    signs = signs.astype(source.dtype)
    shrinkage = n / (n + jnp.asarray(ridge, source.dtype))
    pairs = jnp.stack([source, target])
    means = jnp.einsum("n,end->ed", signs, pairs) / n
    gram = jnp.einsum("and,bnd->ab", pairs, pairs) - n * shrinkage * (means @ means.T)
    return AutoencoderFlow(interpolant, means[0], means[1], gram / source.shape[1], shrinkage)


def asymptotic_flow(
    num_samples: Scalar,
    cluster_std: Scalar,
    mean_square: Scalar = 1.0,
    *,
    interpolant: SpatiallyLinearInterpolant | None = None,
    ridge: Scalar = 0.1,
) -> AutoencoderFlow:
    """The limit d → ∞ at n = `num_samples`, in three coordinates, along μ, the mean noise x̄₁ - μ of the data, and x̄₀, in units of √d.

    So `class_mean(t)` and `autoencoder(t).weight` are overlaps: that with μ/√d is the first coordinate times √ρ, that with x̄₀/√d the third over √n.

    - `cluster_std`: s > 0; `mean_square`: ρ = |μ|²/d; `ridge`: λ (default 0.1, the authors'). All may be traced, n too.

    Raises `ValueError` for numbers out of range or an interpolant with latent noise.
    """
    interpolant = _noiseless(interpolant)
    check_range("num_samples", num_samples, low=1.0)
    check_range("cluster_std", cluster_std, low=0.0, open_low=True)
    check_range("mean_square", mean_square, low=0.0)
    check_range("ridge", ridge, low=0.0)
    dtype = jnp.result_type(float, *(value.dtype for value in (num_samples, cluster_std, mean_square, ridge) if hasattr(value, "dtype")))
    n, s, rho, ridge = (jnp.asarray(value, dtype) for value in (num_samples, cluster_std, mean_square, ridge))
    zero = jnp.zeros_like(n)
    gram = jnp.diag(jnp.stack([n - 1 + ridge, (n - 1) * s**2 + ridge * (rho + s**2)]))
    source, target = jnp.stack([zero, zero, n**-0.5]), jnp.stack([jnp.sqrt(rho), s / jnp.sqrt(n), zero])
    return AutoencoderFlow(interpolant, source, target, gram, n / (n + ridge))


def asymptotic_error(num_samples: Scalar, cluster_std: Scalar, mean_square: Scalar = 1.0, *, ridge: Scalar = 0.1) -> Float[Array, ""]:
    """|μ̂ - μ|²/d of the generated cluster's mean μ̂ as d → ∞: 2 s²/n without a ridge."""
    mean = asymptotic_flow(num_samples, cluster_std, mean_square, ridge=ridge).class_mean(1.0)
    return jnp.sum(mean.at[0].add(-jnp.sqrt(jnp.asarray(mean_square, mean.dtype))) ** 2)


def bayes_error(num_samples: Scalar, cluster_std: Scalar, mean_square: Scalar = 1.0) -> Float[Array, ""]:
    """The least mean |μ̂ - μ|²/d that n samples allow when μ ~ N(0, ρ I) and s is known, as d → ∞: s²/(n + s²/ρ)."""
    return jnp.asarray(cluster_std**2 / (num_samples + cluster_std**2 / mean_square))


def _noiseless(interpolant):
    interpolant = LinearInterpolant(ZeroGamma()) if interpolant is None else interpolant
    if not isinstance(interpolant.gamma, ZeroGamma):
        raise ValueError(f"`interpolant` must have no latent noise (ZeroGamma), got {type(interpolant.gamma).__name__}.")
    return interpolant


__all__ = ["AutoencoderFlow", "AutoencoderRisk", "TiedAutoencoder", "asymptotic_error", "asymptotic_flow", "bayes_error", "fit_autoencoder_flow"]
