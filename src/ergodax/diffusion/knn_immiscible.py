"""Improved immiscible diffusion: noise chosen near its data, example by example. Li, Liang, Kondratyuk, Tomizuka, Keutzer, Xu 2025.

arXiv:2505.18521. The authors round to float16 before they compare; here the dtype of the data is kept.

For every data point x draw k noises and diffuse x with the nearest of them,

    ε = argmin_j ‖x - ε_j‖,   ε_1 … ε_k ~ N(0, I).

No assignment couples the batch, so the cost is k draws per example whatever the batch, and nothing crosses devices. In high dimension the noise is
tilted only slightly towards its data; in low dimension its norm shrinks too (E‖ε‖²/d = 0.76 at d = 8, k = 4), while sampling still starts from
N(0, I). Training of any kind takes it (noise, flow matching, consistency); sampling is unchanged.

The paper's other way to the same end is to enlarge the data under the same schedule: `ScaledDataPath`. What either way lowers is the variance of the
data given x_t, which is the smallest value that `DenoisingLoss` with `DataPrediction` can reach.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_count, check_range
from ..core.path import AffinePath
from ..core.types import PRNGKey, PyTree, Scalar


class NearestNoise(eqx.Module):
    """The coupling `(key, data, noise, args) -> noise`, for `DenoisingLoss`: the noise given and k - 1 fresh ones, the nearest to its data kept.

    `num_candidates` is k (static; default 4, the paper's; 1 is standard training to the bit). No gradient flows through the choice. Raises
    `ValueError` for a count below 1.
    """

    num_candidates: int = eqx.field(static=True, default=4)

    def __check_init__(self):
        check_count("num_candidates", self.num_candidates)

    def __call__(self, key: PRNGKey, data: Float[Array, "n *x"], noise: Float[Array, "n *x"], args: PyTree) -> Float[Array, "n *x"]:
        """One noise per row of `data`, of its shape and dtype. One candidate is held at a time."""

        def nearness(candidate):
            # ‖x - ε‖²/2 without ‖x‖²/2, which is the same for all candidates and in which their differences would drown.
            return jnp.sum((candidate / 2 - data) * candidate, axis=range(1, data.ndim))

        def keep_nearer(best, key):
            fresh = jax.random.normal(key, (data.size,), data.dtype).reshape(data.shape)
            nearer = nearness(fresh) < nearness(best)
            return jnp.where(nearer.reshape(-1, *[1] * (data.ndim - 1)), fresh, best), None

        return jax.lax.scan(keep_nearer, noise, jax.random.split(key, self.num_candidates - 1))[0]


class ScaledDataPath(AffinePath):
    """`path` for data multiplied by `scale` > 0: α becomes scale · α, σ stays. `scale` may be swept; the paper enlarges images, scale > 1.

    Losses and denoisers go on to speak of the data as given, but x_t, hence what a sampler ends with, is `scale` times as large: divide it, or take
    the last `denoised`. Raises `ValueError` for a scale that is not positive.
    """

    path: AffinePath
    scale: Scalar

    def __check_init__(self):
        check_range("scale", self.scale, low=0.0, open_low=True)

    def alpha(self, t):
        alpha = self.path.alpha(t)
        return alpha * jnp.asarray(self.scale, alpha.dtype)

    def sigma(self, t):
        return self.path.sigma(t)

    def log_alpha(self, t):
        log_alpha = self.path.log_alpha(t)
        return log_alpha + jnp.log(jnp.asarray(self.scale, log_alpha.dtype))

    def log_sigma(self, t):
        return self.path.log_sigma(t)

    def time(self, log_snr):
        log_snr = jnp.asarray(log_snr)
        return self.path.time(log_snr - 2 * jnp.log(jnp.asarray(self.scale, log_snr.dtype)))


__all__ = ["NearestNoise", "ScaledDataPath"]
