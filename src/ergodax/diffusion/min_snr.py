"""Min-SNR loss weighting. Hang, Gu, Li, Bao, Chen, Hu, Geng, Guo 2023 (arXiv:2303.09556).

The error of the denoised data is weighted by min(SNR(t), γ). A network output p with d D = a x + b p has D-error (b/d) times its own, so its weight
is

    w(t) = min(SNR(t), γ) (b_t/d_t)²:   min(SNR, γ)/SNR for noise, min(SNR, γ)/(SNR + 1) for v, as in the paper's section 3.4.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_range
from ..core.path import AffinePath
from ..core.prediction import Prediction
from ..core.types import Scalar


class MinSNR(eqx.Module):
    """The weight `(path, prediction, t) -> array like t`, for `DenoisingLoss`. `gamma` (default 5, the paper's) may be swept.

    γ → ∞ gives SNR weighting of the data error (DDPM's plain noise loss), γ → 0 constant weighting of the data error times γ.
    """

    gamma: Scalar = 5.0

    def __check_init__(self):
        check_range("gamma", self.gamma, low=0.0, open_low=True)

    def __call__(self, path: AffinePath, prediction: Prediction, t: Float[Array, "..."]) -> Float[Array, "..."]:
        """w(t), of the shape and dtype of `t`."""
        _, b, d = prediction.coefficients(path, t)
        return jnp.minimum(path.snr(t), self.gamma).astype(t.dtype) * (b / d) ** 2


__all__ = ["MinSNR"]
