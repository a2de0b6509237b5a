"""A time predictor: a classifier that reads from a noisy x which of K times of a path it belongs to, and its loss.

With times drawn uniformly, cross-entropy is least at the posterior p(k | x) ∝ p_{t_k}(x): the logits are log p_{t_k}(x) up to a number. Used by the
time correction sampler (Jung et al. 2024, arXiv:2411.00551) and by denoising Langevin Gibbs (Kim and Ye 2022, arXiv:2209.14593), which take any
callable `x -> (K,) logits`; exact ones come from `ergodax.data.GaussianMixture.log_prob_at`.
"""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_count, check_times
from ..core.path import AffinePath
from ..core.types import PRNGKey


class TimePredictor(eqx.Module):
    """`predictor(x) -> (num_times,)` logits for one example of any `shape`: a multilayer perceptron.

    - `width` (default 128), `depth` (default 2): units per hidden layer and their number.
    - `dtype`: of the parameters, default JAX's; the logits have the dtype of `x`.

    It reads x scaled to at most unit size, and log(1 + mean x²), which on most paths says most of the time. Raises `ValueError` for counts below 1
    and, when called, for another shape.
    """

    network: eqx.nn.MLP
    shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, shape: tuple[int, ...], num_times: int, width: int = 128, depth: int = 2, *, dtype=None, key: PRNGKey):
        for name, count in (("num_times", num_times), ("width", width), ("depth", depth), ("the size of `shape`", math.prod(shape))):
            check_count(name, count)
        self.network = eqx.nn.MLP(math.prod(shape) + 1, num_times, width, depth, jax.nn.silu, dtype=dtype, key=key)
        self.shape = tuple(shape)

    def __call__(self, x: Float[Array, "*x"], *, key: PRNGKey | None = None) -> Float[Array, " times"]:
        """The logits; `key` is not used."""
        if x.shape != self.shape:
            raise ValueError(f"`x` must be one example of shape {self.shape}, got {x.shape}; use jax.vmap for a batch.")
        flat = x.reshape(-1)
        power = 1 + jnp.mean(flat**2)
        features = jnp.append(flat / jnp.sqrt(power), jnp.log(power))
        return self.network(features.astype(self.network.layers[0].weight.dtype)).astype(x.dtype)


class TimePredictorLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {"accuracy"})`: cross-entropy of the index k of x = α data + σ noise at `times[k]`, k uniform.

    - `times`: shape (K,), K >= 2, in any order, where the path's clocks are finite; for the time correction sampler the grid without its last point.
    - `batch`: data of shape (B, *x). `model`: `x -> (K,)` logits for ONE example; vmapped here.

    The least value is the mean conditional entropy of k given x, not 0. Raises `ValueError` for `times` or data of another shape.
    """

    path: AffinePath
    times: Float[Array, " times"]

    def __check_init__(self):
        check_times("times", self.times)

    def __call__(self, model: Callable, batch: Float[Array, "n *x"], key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        if batch.ndim < 2:
            raise ValueError(f"the data of a batch must have shape (batch, *example), got {batch.shape}.")
        key_index, key_noise = jax.random.split(key)
        index = jax.random.randint(key_index, batch.shape[:1], 0, self.times.shape[0])
        noise = jax.random.normal(key_noise, (batch.size,), batch.dtype).reshape(batch.shape)

        def one(k, data, noise):
            logits = model(self.path.interpolate(self.times[k].astype(data.dtype), data, noise))
            return -jax.nn.log_softmax(logits)[k], jnp.argmax(logits) == k

        losses, hits = jax.vmap(one)(index, batch, noise)
        return jnp.mean(losses), {"accuracy": jnp.mean(hits.astype(batch.dtype))}


__all__ = ["TimePredictor", "TimePredictorLoss"]
