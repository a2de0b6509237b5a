"""The denoising objective, in the `loss(model, batch, key)` socket, with its three choices as plugs.

    L = E_t E_{x₁, x₀} [ w(t) · mean((network(t, x_t) - p*)²) ],   x_t = α_t x₁ + σ_t x₀,   p* the target of the parametrisation.

- weight w: `uniform_weight`, `MinSNR()`, or any `(path, prediction, t) -> array`;
- times: `core.uniform_times`, `core.stratified_times`, or any `(key, n) -> (n,)`;
- coupling: `core.given_pairs` (the noise as drawn), `Immiscible()`, or any `(key, data, noise, args) -> noise`, which may only reorder the noise.
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


def uniform_weight(path: AffinePath, prediction: Prediction, t: Float[Array, "..."]) -> Float[Array, "..."]:
    """1: the plain mean squared error of the network's output."""
    return jnp.ones_like(t)


class DenoisingLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {})` for any path and parametrisation.

    - `batch`: data of shape (B, *x), or a pair (data, args) with `args` a pytree of leading axis B, such as integer labels.
    - `model`: a network on ONE example, `(t, x, args) -> array like x`; vmapped here.
    - `label_dropout`: probability of replacing an example's args by `null` (default 0), which classifier-free guidance needs.

    Raises `ValueError` for a probability out of range or data without a batch axis.
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
        data, args = batch if isinstance(batch, tuple) else (batch, None)
        if data.ndim < 2:
            raise ValueError(f"the data of a batch must have shape (batch, *example), got {data.shape}.")
        n = data.shape[0]
        key_noise, key_coupling, key_time, key_drop = jax.random.split(key, 4)
        # Drawn flat: XLA compiles draws of several axes many times slower.
        noise = jax.random.normal(key_noise, (data.size,), data.dtype).reshape(data.shape)
        noise = self.coupling(key_coupling, data, noise, args)
        times = self.times(key_time, n).astype(data.dtype)
        dropped = jax.random.uniform(key_drop, (n,)) < self.label_dropout

        def one(t, x1, x0, drop, condition):
            condition = (
                jax.tree.map(lambda c, null: jnp.where(drop, jnp.asarray(null, c.dtype), c), condition, self.null) if args is not None else None
            )
            error = model(t, self.path.interpolate(t, x1, x0), condition) - self.prediction.target(self.path, t, x1, x0)
            return self.weight(self.path, self.prediction, t) * jnp.mean(error**2)

        return jnp.mean(jax.vmap(one)(times, data, noise, dropped, args)), {}


__all__ = ["DenoisingLoss", "uniform_weight"]
