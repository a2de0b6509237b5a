"""Corruption-aware training: structured noise on the conditioning. Maduabuchi, Chen, Han, Wang 2025 (arXiv:2505.21545).

A conditional model is trained with its usual loss, on conditioning embeddings z of shape (B, L, D) that are perturbed afresh in each batch; data and
diffusion noise are untouched. With strength ρ:

- BCNI, batch-centred noise injection: z' = z + ρ d U, U uniform on (-1, 1) entrywise, d = |z - mean of z over the batch| for each example and token.
  What is far from the rest of the batch is perturbed more.
- SACN, spectrum-aware contextual noise: with z as a matrix of n = B·L rows, its thin SVD z = Σ_k s_k u_k v_kᵀ, k = 0 … K-1, and the root mean square
  q of each row,

      z' = z + ρ q Σ_k ξ_k e^{-k/K} √s_k u_k v_kᵀ,   ξ_k ~ N(0, 1):

  noise along the leading directions of the batch. The paper's text has the factor √s_k, the released code has not.

- The released code multiplies ξ into the rows of U, by broadcasting, and so runs for n ≤ D only; here ξ_k goes with its direction, as in the paper.
- Without √s_k, directions with s_k = 0 are left out: a thin SVD returns any it likes.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_range
from ..core.types import PRNGKey, PyTree, Scalar, VectorField


class BatchCentredNoise(eqx.Module):
    """BCNI: `(key, z) -> z'`. `strength` is ρ, may be swept (the paper's go from 0.025 to 0.2)."""

    strength: Scalar = 0.075

    def __check_init__(self):
        check_range("strength", self.strength, low=0.0)

    def __call__(self, key: PRNGKey, embedding: Float[Array, "batch *tokens dim"]) -> Float[Array, "batch *tokens dim"]:
        """Of the shape and dtype of `embedding`, a batch of at least 2 axes. No gradient flows through the distance where it is 0."""
        offset = embedding - jnp.mean(embedding, axis=0)
        square = jnp.sum(offset**2, axis=-1, keepdims=True)
        distance = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
        uniform = jax.random.uniform(key, (embedding.size,), embedding.dtype, -1.0, 1.0).reshape(embedding.shape)
        return embedding + jnp.asarray(self.strength, embedding.dtype) * distance * uniform


class SpectrumAwareNoise(eqx.Module):
    """SACN: `(key, z) -> z'`.

    - `strength`: ρ, may be swept.
    - `weight_by_spectrum` (static, default True as in the paper's text): with √s_k; False is the released code's weighting.

    The basis is taken as given: no gradient flows through the SVD. Its cost is that of an SVD of (n, D) per batch.
    """

    strength: Scalar = 0.075
    weight_by_spectrum: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        check_range("strength", self.strength, low=0.0)

    def __call__(self, key: PRNGKey, embedding: Float[Array, "batch *tokens dim"]) -> Float[Array, "batch *tokens dim"]:
        """Of the shape and dtype of `embedding`, a batch of at least 2 axes; computed in at least float32."""
        dtype = embedding.dtype if jnp.finfo(embedding.dtype).bits >= 32 else jnp.float32
        rows = embedding.reshape(-1, embedding.shape[-1]).astype(dtype)
        left, values, right = jnp.linalg.svd(jax.lax.stop_gradient(rows), full_matrices=False)
        count = values.size
        present = values > max(rows.shape) * jnp.finfo(dtype).eps * values[0]
        weight = jnp.sqrt(values) if self.weight_by_spectrum else jnp.ones_like(values)
        decay = jnp.exp(-jnp.arange(count).astype(dtype) / count)
        draws = jax.random.normal(key, (count,), dtype) * decay * jnp.where(present, weight, 0)
        square = jnp.mean(rows**2, axis=1, keepdims=True)
        scale = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
        noise = jnp.asarray(self.strength, dtype) * scale * jnp.dot(left * draws, right, precision=jax.lax.Precision.HIGHEST)
        return embedding + noise.reshape(embedding.shape).astype(embedding.dtype)


class CorruptedConditionLoss(eqx.Module):
    """Any `loss(model, (data, args), key)` on perturbed `args`: `corrupt(key, leaf)` replaces every floating leaf of `args`.

    - `loss`: for instance `DenoisingLoss`; its batch must be a pair.
    - `corrupt`: `BatchCentredNoise()`, `SpectrumAwareNoise()`, or any `(key, array) -> array`.

    Raises `ValueError` for a batch without `args`.
    """

    loss: Callable
    corrupt: Callable

    def __call__(self, model: VectorField, batch: PyTree, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        if not isinstance(batch, tuple) or len(batch) != 2:
            raise ValueError(f"the batch must be a pair (data, args), got {type(batch).__name__}.")
        data, args = batch
        key_corrupt, key_loss = jax.random.split(key)
        leaves, structure = jax.tree.flatten(args)
        keys = jax.random.split(key_corrupt, len(leaves))
        leaves = [self.corrupt(k, leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf for k, leaf in zip(keys, leaves)]
        return self.loss(model, (data, jax.tree.unflatten(structure, leaves)), key_loss)


__all__ = ["BatchCentredNoise", "CorruptedConditionLoss", "SpectrumAwareNoise"]
