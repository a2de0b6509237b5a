"""Min-SNR loss weighting. Hang, Gu, Li, Bao, Chen, Hu, Geng, Guo 2023 (arXiv:2303.09556).

The error of the denoised data is weighted by min(SNR(t), γ). A network output p with d D = a x + b p has D-error (b/d) times its own, so its weight
is

    w(t) = min(SNR(t), γ) (b_t/d_t)²:   min(SNR, γ)/SNR for noise, min(SNR, γ)/(SNR + 1) for v, as in the paper's section 3.4.

`SNRWeight` does the same with any other function of the SNR: what the paper compares with is SNR itself, max(SNR, 1), and 1.

Behind it stands multi-task learning, with the times for tasks: the direction -Σ_t w_t ∇L_t that no task objects to has the weights

    w = argmin |Σ_t w_t ∇L_t|² + λ |w|²   over w ≥ 0, Σ_t w_t = 1,

`pareto_weights`: they are too noisy and too dear to train with (a gradient for each time), and the clamp resembles them. The paper finds them by
gradient descent on unconstrained parameters; here it is projected gradient descent with momentum, on the Gram matrix of the gradients.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_count, check_range
from ..core.path import AffinePath
from ..core.prediction import Prediction
from ..core.types import Scalar


class SNRWeight(eqx.Module):
    """The weight `(path, prediction, t) -> array like t` whose weighting of the data error is `function(SNR)`, for `DenoisingLoss`.

    For instance `lambda snr: jnp.maximum(snr, 1)`, Salimans and Ho 2022 (arXiv:2202.00512), or `lambda snr: snr / (k + snr) ** gamma`, P2: Choi, Lee,
    Shin, Kim, Kim, Yoon 2022 (arXiv:2204.00227).
    """

    function: Callable

    def __call__(self, path: AffinePath, prediction: Prediction, t: Float[Array, "..."]) -> Float[Array, "..."]:
        """w(t), of the shape and dtype of `t`."""
        _, b, d = prediction.coefficients(path, t)
        return self.function(path.snr(t)).astype(t.dtype) * (b / d) ** 2


class MinSNR(eqx.Module):
    """The weight `(path, prediction, t) -> array like t`, for `DenoisingLoss`. `gamma` (default 5, the paper's) may be swept.

    γ → ∞ gives SNR weighting of the data error (DDPM's plain noise loss), γ → 0 constant weighting of the data error times γ.
    """

    gamma: Scalar = 5.0

    def __check_init__(self):
        check_range("gamma", self.gamma, low=0.0, open_low=True)

    def __call__(self, path: AffinePath, prediction: Prediction, t: Float[Array, "..."]) -> Float[Array, "..."]:
        """w(t), of the shape and dtype of `t`."""
        return SNRWeight(lambda snr: jnp.minimum(snr, self.gamma))(path, prediction, t)


def pareto_weights(gradients: Float[Array, "tasks parameters"], penalty: Scalar = 0.0, num_steps: int = 500) -> Float[Array, " tasks"]:
    """The weights w above, from one flattened gradient per task. `penalty` is λ ≥ 0.

    `num_steps` of accelerated projected gradient descent (Beck and Teboulle 2009). At λ = 0 the direction d = Σ_t w_t g_t has g_t·d ≥ |d|²
    for every task: stepping against it lowers all losses, or d = 0 and they are Pareto stationary. Raises `ValueError` for arguments out of range.
    """
    check_range("penalty", penalty, low=0.0)
    check_count("num_steps", num_steps)
    gram = jnp.dot(gradients, gradients.T, precision=jax.lax.Precision.HIGHEST)
    gram = gram + jnp.asarray(penalty, gram.dtype) * jnp.eye(len(gram), dtype=gram.dtype)
    # The trace bounds the largest eigenvalue, the curvature.
    rate = 1 / jnp.maximum(jnp.trace(gram), jnp.finfo(gram.dtype).tiny)

    def step(state, k):
        weights, ahead = state
        following = _onto_simplex(ahead - rate * (gram @ ahead))
        momentum = (k / (k + 3)).astype(gram.dtype)
        return (following, following + momentum * (following - weights)), None

    start = jnp.zeros_like(gram[0]) + jnp.asarray(1 / len(gram), gram.dtype)
    return jax.lax.scan(step, (start, start), jnp.arange(num_steps, dtype=gram.dtype))[0][0]


def _onto_simplex(x):
    """The nearest point of the probability simplex (Held, Wolfe, Crowder 1974)."""
    ordered = jnp.sort(x)[::-1]
    excess = (jnp.cumsum(ordered) - 1) / jnp.arange(1, len(x) + 1, dtype=x.dtype)
    last = jnp.sum(ordered > excess) - 1
    return jnp.maximum(x - excess[last], 0)


__all__ = ["MinSNR", "SNRWeight", "pareto_weights"]
