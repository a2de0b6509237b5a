"""Ambient diffusion: training on clean and noisy data together. Daras, Cherapanamjeri, Daskalakis 2024 (arXiv:2411.02780).

A datum may be y = x₁ + s z₀ with a known noise level s (0: clean). With s_t = σ_t/α_t, a time of more noise than its own, s_t > s, is reached by
adding what is missing, x_t/α_t = y + √(s_t² - s²) z, and the denoiser D is fitted through E[y | x_t] = a E[x₁ | x_t] + (1 - a) x_t/α_t,

    ‖a D(x_t) + (1 - a) x_t/α_t - y‖²,   a = (s_t² - s²)/s_t²,

whose minimiser is E[x₁ | x_t] (Tweedie's formula twice): noisy data, clean model. At s_t ≤ s a noisy datum says nothing and counts nothing (a = 0);
clean data (a = 1) give the usual loss at every time. By linearity the same holds for every parametrisation p of the network: its error is

    a p - p*(a y - (s²/s_t) √a z, √a z),   p*(data, noise) the usual target.

Sampling is the usual one. Without any clean data D is unknown below s: end the grid at `noise_level_time(path, s)` and return `denoised` there.

The paper asks how many noisy data a clean one is worth; few clean among many noisy is nearly as good as all clean.
Left out: the optional consistency loss of the authors' code, which trains D below s from its own samples.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_range
from ..core.path import AffinePath
from ..core.types import PRNGKey, PyTree, Scalar, VectorField
from .draw import draw
from .objective import DenoisingLoss


class AmbientLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {})` for data with known noise.

    - `base`: the `DenoisingLoss` to extend; its path, prediction, weight, times, coupling (of the noise that is added) and label dropout are used.
    - `batch`: a pair (data, noise_level) or a triple (data, noise_level, args): data of shape (B, *x), levels s ≥ 0 of shape (B,) in units of the
      data. (For y = α x₁ + σ z₀ give y/α and σ/α.)

    The mean is over the whole batch, so data that count nothing lower it. Raises `ValueError` for a batch that is no pair or triple, levels of
    another shape or negative ones.
    """

    base: DenoisingLoss

    def __call__(self, model: VectorField, batch: PyTree, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch. Levels of 0 give `base` itself."""
        if not isinstance(batch, tuple) or len(batch) not in (2, 3):
            raise ValueError(f"the batch must be (data, noise_level) or (data, noise_level, args), got {jax.tree.structure(batch)}.")
        data, levels, *args = batch
        if levels.shape != data.shape[:1]:
            raise ValueError(f"noise levels must have shape {data.shape[:1]} beside data of shape {data.shape}, got {levels.shape}.")
        check_range("noise_level", levels, low=0.0)
        path, prediction, base = self.base.path, self.base.prediction, self.base
        drawn = draw((data, *args) if args else data, key, base.times, base.coupling, base.label_dropout, base.null)

        def one(t, y, z, condition, level):
            alpha, sigma = path.alpha(t), path.sigma(t)
            known = level * alpha / sigma  # s/s_t, finite where α = 0
            a = jnp.maximum(1 - known**2, 0)
            # √a, with a derivative at a = 0 too
            root = jnp.where(a > 0, jnp.sqrt(jnp.where(a > 0, a, 1)), 0)
            target = prediction.target(path, t, a * y - level * known * root * z, root * z)
            error = a * model(t, path.interpolate(t, y, root * z), condition) - target
            return base.weight(path, prediction, t) * jnp.mean(error**2)

        return jnp.mean(jax.vmap(one)(*drawn, levels.astype(data.dtype))), {}


def noise_level_time(path: AffinePath, noise_level: Scalar) -> Float[Array, ""]:
    """The time t at which σ_t/α_t is `noise_level` > 0, a scalar that may be traced."""
    check_range("noise_level", noise_level, low=0.0, open_low=True)
    return path.time(-2 * jnp.log(noise_level))


__all__ = ["AmbientLoss", "noise_level_time"]
