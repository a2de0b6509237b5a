"""Light Schrödinger bridge: a bridge whose potential is a mixture, so that plan, drift and likelihood are closed forms. Korotin, Gushchin, Burnaev
2024 (arXiv:2310.01174).

Between p₀ and p₁, relative to √ε W (entropic OT of cost ½|x₀ - x₁|², weight ε), with the adjusted potential v(x₁) = Σ_k α_k N(x₁; r_k, ε S_k),

    π(x₁ | x₀) = Σ_k a_k(x₀)/c(x₀) N(x₁; r_k + S_k x₀, ε S_k),   a_k = α_k exp((x₀ᵀ S_k x₀ + 2 r_kᵀ x₀)/2ε),   c = Σ_k a_k        (props. 3.2, 3.3)
    L = E_{p₀} log c(x₀) - E_{p₁} log v(x₁) = KL(π* ‖ π) + constant                                                            (prop. 3.1)

Everything follows from one function, with M_k = (1 - t) I + t S_k:

    φ(t, x) = ∫ N(x₁; x, ε(1 - t) I) e^{|x₁|²/2ε} v(x₁) dx₁
            = (2πε)^{-d/2} Σ_k α_k |M_k|^{-½} exp((xᵀ M_k⁻¹ (S_k - I) x + 2 xᵀ M_k⁻¹ r_k - t r_kᵀ M_k⁻¹ r_k)/2ε),

    drift g(t, x) = ε ∇ log φ = Σ_k w_k M_k⁻¹ (r_k + (S_k - I) x),   w_k the share of component k in the sum,

finite at both ends: φ(0, x) ∝ c(x) e^{-|x|²/2ε} and φ(1, x) ∝ v(x) e^{|x|²/2ε}, so L is E log φ(0, x₀) - E log φ(1, x₁) but for moments of the data.
This is the paper's drift (prop. 3.3, written there with A_k = t/(ε(1 - t)) I + S_k⁻¹/ε) after its 1/(1 - t) terms cancel by hand.

Deviations: full S_k are L Lᵀ (log-Cholesky) where the authors turn eigenvalues by a trained rotation; they start at S = 1 (or .1), we from the
Gaussian bridge's own S; their rate is constant, ours decays.
"""

import math

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ..core.check import check_count, check_range
from ..core.fit import fit
from ..core.types import PRNGKey, PyTree, Scalar, Time
from .samples import Minibatches, Samples
from .sde import sde_terms


class LightSB(eqx.Module):
    """The bridge with K components in d dimensions. As a vector field `(t, x, args)`, the drift of its SDE with noise √ε, on [0, 1].

    - `log_weights`: (K,), log α_k.
    - `centres`: (K, d), r_k.
    - `log_scales`: (K, d), logarithms of diagonal S_k; or (K, d, d), lower triangles L_k with logarithms on the diagonal, S_k = L_k L_kᵀ.
    - `epsilon`: ε > 0, the variance of the reference's noise per unit of time. `LightSBLoss` does not train it.

    Methods take points of shape (..., d). Cost: O(K d) a point and memory O(K d) for diagonal S_k, d times that for full ones, whose factor of M_k at
    each time costs K d³. In float32 the data should be centred: exponents of size |x|²/ε lose digits. Raises `ValueError` for shapes that do not fit
    and ε <= 0.
    """

    log_weights: Float[Array, "..."]
    centres: Float[Array, "k d"]
    log_scales: Float[Array, "..."]
    epsilon: Scalar

    def __check_init__(self):
        shape = self.centres.shape
        if self.log_weights.shape != shape[:1] or self.log_scales.shape not in (shape, (*shape, shape[-1])):
            expected = "`log_weights` (K,), `centres` (K, d) and `log_scales` (K, d) or (K, d, d)"
            raise ValueError(f"expected {expected}, got {self.log_weights.shape}, {shape} and {self.log_scales.shape}.")
        check_range("epsilon", self.epsilon, low=0.0, open_low=True)

    @classmethod
    def initialise(cls, key: PRNGKey, x0: Samples, x1: Samples, num_components: int, epsilon: Scalar, *, full: bool = False) -> "LightSB":
        """Where training starts: components through drawn rows of the target, each with the same share of the source.

        - `x0`, `x1`: source and target in d dimensions; `num_components`: K; `full`: whether S_k are full.

        All S_k = s I with ε s + s² v₀ = v₁: one component of that s carries variance v₀ to v₁. The α_k are then balanced by Sinkhorn's iteration on
        1024 points of the source, without which, at small ε, some components begin with no mass and Adam brings them none for long.
        """
        check_count("num_components", num_components)
        key_centres, key_balance = jax.random.split(key)
        (mean0, v0), (_, v1) = x0.moments(), x1.moments()
        weight = jnp.asarray(epsilon, mean0.dtype)
        scale = 2 * v1 / (weight + jnp.sqrt(weight**2 + 4 * v0 * v1))
        num_rows = x1.points.shape[0]
        share = jnp.ones_like(x1.points[:, 0]) if x1.weights is None else x1.weights
        rows = jax.random.choice(key_centres, num_rows, (num_components,), replace=num_rows < num_components, p=share / jnp.sum(share))
        centres = x1.points[rows] - scale * mean0
        log_scales = jnp.log(scale) * jnp.ones_like(centres)
        if full:
            log_scales = log_scales[:, None] * jnp.eye(centres.shape[1], dtype=centres.dtype) / 2
        return cls(jnp.zeros_like(centres[:, 0]), centres, log_scales, epsilon).balanced(x0.sample(key_balance, 1024))

    def balanced(self, x0: Float[Array, "n d"], num_steps: int = 500) -> "LightSB":
        """α so that all components have the same share of the points `x0`: Sinkhorn's iteration with the other parameters fixed."""
        logits, k = self._logits(self._expansion(0.0), x0), self.centres.shape[0]

        def step(log_weights, _):
            share = jax.nn.log_softmax(logits + log_weights, axis=-1)
            return log_weights - jax.nn.logsumexp(share, axis=0) + math.log(x0.shape[0] / k), None

        log_weights, _ = jax.lax.scan(step, jnp.zeros_like(self.log_weights), None, length=num_steps)
        return eqx.tree_at(lambda m: m.log_weights, self, self.log_weights + log_weights)

    def placed(self, shift0: Float[Array, " d"], shift1: Float[Array, " d"], scale: Scalar) -> "LightSB":
        """The same bridge for `shift0 + scale x0` and `shift1 + scale x1`, at ε `scale`²: the S_k stay."""
        scale = jnp.asarray(scale, self.centres.dtype)
        root, centres, epsilon = self._root(), scale * self.centres, self._epsilon * scale**2
        if root.ndim == 2:
            moved = root**2 * shift0
        else:
            moved = _dot("kij,klj,l->ki", root, root, shift0)
        log_weights = self.log_weights + (moved - 2 * centres) @ shift0 / (2 * epsilon)
        return LightSB(log_weights, centres + shift1 - moved, self.log_scales, epsilon)

    def log_potential(self, t: Time, x: Float[Array, "*batch d"]) -> Float[Array, "*batch"]:
        """log φ(t, x), at one scalar time on [0, 1]."""
        return jax.nn.logsumexp(self._logits(self._expansion(t), x), axis=-1) - x.shape[-1] / 2 * jnp.log(2 * jnp.pi * self._epsilon)

    def __call__(self, t: Time, x: Float[Array, "*batch d"], args: PyTree = None) -> Float[Array, "*batch d"]:
        """The drift g(t, x), at one scalar time on [0, 1]."""
        curvature, linear, _ = expansion = self._expansion(t)
        share = jax.nn.softmax(self._logits(expansion, x), axis=-1)
        pull = _dot("...k,kd->...d", share, curvature) * x if curvature.ndim == 2 else _dot("...k,kij,...j->...i", share, curvature, x)
        return _dot("...k,kd->...d", share, linear) + pull

    def terms(self, key: PRNGKey, y0: Float[Array, " d"]) -> dfx.MultiTerm:
        """For `integrate(bridge.terms(key, x0), diffrax.Euler(), x0, times=times)`."""
        return sde_terms(self, self.epsilon, key, y0)

    def sample(self, key: PRNGKey, x0: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """One draw of x₁ for each x₀, exact. For x_t between, `sample_bridge(Brownian(ε), key, t, x0, x1)`."""
        key_component, key_noise = jax.random.split(key)
        component = jax.random.categorical(key_component, self._logits(self._expansion(0.0), x0))
        noise = jnp.sqrt(self._epsilon) * jax.random.normal(key_noise, x0.shape, x0.dtype)
        root = self._root()[component]
        if root.ndim == x0.ndim:
            return self.centres[component] + root * (root * x0 + noise)
        return self.centres[component] + _dot("...ij,...j->...i", root, _dot("...ji,...j->...i", root, x0) + noise)

    def log_prob(self, x1: Float[Array, "*#batch d"], x0: Float[Array, "*#batch d"]) -> Float[Array, "*#batch"]:
        """log π(x₁ | x₀)."""
        root, x0 = self._root(), x0[..., None, :]
        offset = x1[..., None, :] - self.centres
        if root.ndim == 2:
            white, log_det = offset / root - root * x0, 2 * jnp.sum(jnp.log(root), -1)
        else:
            inverse = _inverse(root)
            white = _dot("kij,...kj->...ki", inverse, offset) - _dot("kji,...j->...ki", root, x0[..., 0, :])
            log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)), -1)
        log_share = jax.nn.log_softmax(self._logits(self._expansion(0.0), x0[..., 0, :]), axis=-1)
        exponent = jnp.sum(white**2, -1) / self._epsilon + log_det + x1.shape[-1] * jnp.log(2 * jnp.pi * self._epsilon)
        return jax.nn.logsumexp(log_share - exponent / 2, axis=-1)

    def mean(self, x0: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """E[x₁ | x₀], which is x₀ + g(0, x₀)."""
        return x0 + self(0.0, x0)

    def covariance(self, x0: Float[Array, " d"]) -> Float[Array, "d d"]:
        """Cov[x₁ | x₀], for one x₀."""
        root = self._root()
        root = root[..., None] * jnp.eye(x0.size, dtype=root.dtype) if root.ndim == 2 else root
        share = jax.nn.softmax(self._logits(self._expansion(0.0), x0))
        scale = _dot("kij,klj->kil", root, root)
        offset = self.centres + scale @ x0 - self.mean(x0)
        return self._epsilon * _dot("k,kij->ij", share, scale) + _dot("k,ki,kj->ij", share, offset, offset)

    @property
    def _epsilon(self):
        return jnp.asarray(self.epsilon, self.centres.dtype)

    def _root(self):
        """√S, (K, d), or L, (K, d, d)."""
        if self.log_scales.ndim == 2:
            return jnp.exp(self.log_scales / 2)
        diagonal = jnp.diagonal(self.log_scales, axis1=-2, axis2=-1)
        return jnp.tril(self.log_scales, -1) + jnp.exp(diagonal)[..., None] * jnp.eye(self.centres.shape[-1], dtype=diagonal.dtype)

    def _expansion(self, t):
        """M⁻¹ (S - I), M⁻¹ r, and what does not depend on x of the logarithms of the terms of φ."""
        t, root = jnp.asarray(t, self.centres.dtype), self._root()
        if root.ndim == 2:
            scale = root**2
            shifted = (1 - t) + t * scale
            linear, curvature, log_det = self.centres / shifted, (scale - 1) / shifted, jnp.sum(jnp.log(shifted), -1)
        else:
            identity = jnp.eye(root.shape[-1], dtype=root.dtype)
            scale = _dot("kij,klj->kil", root, root)
            factor = jnp.linalg.cholesky((1 - t) * identity + t * scale)
            inverse = _inverse(factor)
            inverse = _dot("kji,kjl->kil", inverse, inverse)
            linear, curvature = _dot("kij,kj->ki", inverse, self.centres), _dot("kij,kjl->kil", inverse, scale - identity)
            log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1)), -1)
        constant = self.log_weights - log_det / 2 - t * jnp.sum(self.centres * linear, -1) / (2 * self._epsilon)
        return curvature, linear, constant

    def _logits(self, expansion, x):
        """Logarithms of the terms of φ, less the common (2πε)^{-d/2}, (..., K)."""
        curvature, linear, constant = expansion
        if curvature.ndim == 2:
            quadratic = _dot("...d,kd->...k", x**2, curvature)
        else:
            quadratic = _dot("...ki,...i->...k", _dot("kij,...j->...ki", curvature, x), x)
        return constant + (quadratic / 2 + _dot("...d,kd->...k", x, linear)) / self._epsilon


class LightSBLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {})`: E log φ(0, x₀) - E log φ(1, x₁), which is KL(π* ‖ π) and a constant of the data.

    - `model`: a `LightSB`; its ε is held fixed.
    - `batch`: (x₀, x₁) of shapes (B, d) and (B', d), not paired. `key` is not used.
    """

    def __call__(self, model: LightSB, batch: tuple, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        x0, x1 = batch
        model = eqx.tree_at(lambda m: m.epsilon, model, jax.lax.stop_gradient(model.epsilon))
        return jnp.mean(model.log_potential(0.0, x0)) - jnp.mean(model.log_potential(1.0, x1)), {}


def fit_light_sb(
    key: PRNGKey,
    x0: Float[Array, "..."] | Samples,
    x1: Float[Array, "..."] | Samples,
    epsilon: Scalar,
    num_components: int = 50,
    *,
    full: bool = False,
    num_steps: int = 5000,
    batch_size: int = 128,
    learning_rate: Scalar = 0.02,
) -> LightSB:
    """The bridge between two samples.

    - `x0`, `x1`: points at t = 0 and t = 1, (n, d) and (m, d), in any numbers; as `Samples` with weights.
    - `epsilon`: ε, in units of x²; `num_components`: K (default 50, the paper's benchmark); `full`: whether S_k are full instead of diagonal.
    - `num_steps`, `batch_size` (128 as in the paper), `learning_rate`: of Adam, whose rate falls to 0 by a cosine.

    The defaults are those of `experiments/transport/eot_benchmark.py`. Trained on points centred at either mean and divided by the root of the
    target's mean variance, so that neither units nor precision matter, then placed back. With `jax.vmap`, over keys (restarts), ε and rates.
    For progress, held-out losses or other optimisers, train `LightSB.initialise(...)` by `LightSBLoss` and `Minibatches` in `core.Fit`.
    Raises `ValueError` as `Samples` does, for ends of different d and for a target that does not vary.
    """
    x0, x1 = (x if isinstance(x, Samples) else Samples(x) for x in (x0, x1))
    if x0.points.ndim != 2 or x0.points.shape[1:] != x1.points.shape[1:]:
        raise ValueError(f"both ends must have shape (n, d) with one d, got {x0.points.shape} and {x1.points.shape}.")
    (mean0, _), (mean1, variance) = x0.moments(), x1.moments()
    check_range("variance of x1", variance, low=0.0, open_low=True)
    spread = jnp.sqrt(variance)
    x0, x1 = Samples((x0.points - mean0) / spread, x0.weights), Samples((x1.points - mean1) / spread, x1.weights)
    key_start, key_fit = jax.random.split(key)
    model = LightSB.initialise(key_start, x0, x1, num_components, jnp.asarray(epsilon, spread.dtype) / variance, full=full)
    optimiser = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))
    fitted = fit(LightSBLoss(), model, optimiser, Minibatches((x0, x1), batch_size), key_fit, num_steps=num_steps, every=num_steps)
    return fitted.model.placed(mean0, mean1, spread)


def _inverse(lower):
    identity = jnp.eye(lower.shape[-1], dtype=lower.dtype)
    return jax.vmap(lambda one: jax.scipy.linalg.solve_triangular(one, identity, lower=True))(lower)


def _dot(subscripts, *operands):
    # Exponents are differences of large numbers: TF32 or bfloat16 products would spoil them.
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)


__all__ = ["LightSB", "LightSBLoss", "fit_light_sb"]
