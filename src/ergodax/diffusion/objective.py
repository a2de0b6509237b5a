"""The denoising objective, in the `loss(model, batch, key)` socket, with its three choices as plugs.

    L = E_t E_{x₁, x₀} [ w(t) · mean((network(t, x_t) - p*)²) ],   x_t = α_t x₁ + σ_t x₀,   p* the target of the parametrisation.

- weight w: `uniform_weight`, `MinSNR()`, or any `(path, prediction, t) -> array`;
- times: `core.uniform_times`, `core.stratified_times`, or any `(key, n) -> (n,)`;
- coupling: `core.given_pairs` (the noise as drawn), `Immiscible()`, `NearestNoise()`, `PFGMPPNoise()`, or any
  `(key, data, noise, args) -> noise`, which reorders the noise, draws it nearer to the data, or changes its law.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.batch import given_pairs, stratified_times
from ..core.check import check_range
from ..core.path import AffinePath
from ..core.prediction import Prediction
from ..core.types import PRNGKey, PyTree, Scalar, VectorField
from .draw import draw


def uniform_weight(path: AffinePath, prediction: Prediction, t: Float[Array, "..."]) -> Float[Array, "..."]:
    """1: the plain mean squared error of the network's output."""
    return jnp.ones_like(t)


class DenoisingLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {})` for any path and parametrisation.

    - `batch`: data of shape (B, *x), or a pair (data, args) with `args` a pytree of leading axis B, such as integer labels.
    - `model`: a network on ONE example, `(t, x, args) -> array like x`; vmapped here.
    - `label_dropout`: probability of replacing an example's args by `null` (default 0), which classifier-free guidance needs.

    Raises `ValueError` for a probability out of range, data without a batch axis, or `times` that draw more than one time an example.
    """

    path: AffinePath
    prediction: Prediction
    weight: Callable = uniform_weight
    times: Callable = stratified_times
    coupling: Callable = given_pairs
    label_dropout: Scalar = 0.0
    null: PyTree = -1

    def __check_init__(self):
        check_range("label_dropout", self.label_dropout, low=0.0, high=1.0)

    def __call__(self, model: VectorField, batch: PyTree, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        drawn = draw(batch, key, self.times, self.coupling, self.label_dropout, self.null)
        if drawn.times.ndim != 1:
            raise ValueError(f"`times` must draw one time an example, shape (n,), got {drawn.times.shape}; `FramewiseLoss` takes a time a frame.")

        def one(t, x1, x0, condition):
            error = model(t, self.path.interpolate(t, x1, x0), condition) - self.prediction.target(self.path, t, x1, x0)
            return self.weight(self.path, self.prediction, t) * jnp.mean(error**2)

        return jnp.mean(jax.vmap(one)(*drawn)), {}


__all__ = ["DenoisingLoss", "uniform_weight"]
