"""Time-dependent importance reweighting: an unbiased model from biased data. Kim, Na, Park, Jang, Kim, Kang, Moon 2024 (arXiv:2403.01189).

The data come from p_bias, and a small set from p_ref is at hand. Noised to time t, the two laws have the ratio w(t, x) = p_ref,t(x)/p_bias,t(x),
which a discriminator of noised samples learns. The same ratio weighs the squared error and moves its target,

    L = E_t E_{x₁ ~ p_bias, x_t} [ λ(t) w(t, x_t) ‖s(t, x_t) - ∇ log p(x_t | x₁) - ∇ log w(t, x_t)‖² ],

with the ratio and its gradient held fixed. The minimiser is the score of p_ref,t, since E[∇ log p(x_t | x₁) | x_t] = ∇ log p_bias,t. In any
parametrisation d D = a x + b p the target of the network moves by (d/b) (σ²/α) ∇ log w: by ∇ log w for the score, -σ ∇ log w for noise,
(σ²/α) ∇ log w for the data.

`log_ratio` belongs to the law that the batch is drawn from:
- batches of biased data: `log_ratio` = log w, the logit of the discriminator that `DensityRatioLoss` trains;
- batches half biased, half reference: p_ref,t/p_mix,t = 2 d with d = w/(1 + w), which is bounded by 2: `MixtureRatio(log w)`.

Deviation: the correction of the authors' released code for the second form, -σ² ∇d, is not the gradient of log d, and its weights broadcast over the
batch; here both are as the derivation asks.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.batch import stratified_times
from ..core.path import AffinePath
from ..core.types import PRNGKey, PyTree, Time, VectorField
from .draw import draw
from .objective import DenoisingLoss


def _reweighted(base: DenoisingLoss, model, batch, key, reweigh):
    """`base` with a log-weight and a shift of the target for every example, `reweigh(t, x1, x, condition)`, both held fixed."""
    path, prediction = base.path, base.prediction
    drawn = draw(batch, key, base.times, base.coupling, base.label_dropout, base.null)

    def one(t, x1, x0, condition):
        x = path.interpolate(t, x1, x0)
        log_weight, shift = jax.lax.stop_gradient(reweigh(t, x1, x, condition))
        error = model(t, x, condition) - (prediction.target(path, t, x1, x0) + shift)
        return base.weight(path, prediction, t) * jnp.exp(log_weight) * jnp.mean(error**2)

    return jnp.mean(jax.vmap(one)(*drawn)), {}


class ReweightedLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {})`: a denoising loss whose minimiser is the model of another law than the data's.

    - `base`: the `DenoisingLoss` to reweigh; its path, prediction, weight, times, coupling and label dropout are used.
    - `log_ratio`: `(t, x, args) -> scalar`, the logarithm of wanted over drawn density at time t, on ONE example. No gradient flows into it.
    """

    base: DenoisingLoss
    log_ratio: Callable

    def __call__(self, model: VectorField, batch: PyTree, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch, in the shapes of `DenoisingLoss`. log w = 0 gives `base` itself."""
        path, prediction = self.base.path, self.base.prediction

        def reweigh(t, x1, x, condition):
            log_ratio, slope = jax.value_and_grad(lambda x: self.log_ratio(t, x, condition))(x)
            _, b, d = prediction.coefficients(path, t)
            return log_ratio, d / b * path.sigma(t) ** 2 / path.alpha(t) * slope

        return _reweighted(self.base, model, batch, key, reweigh)


class ImportanceWeightedLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {})` weighted by the ratio of the clean data: what the paper improves on (its IW-DSM).

    Unbiased too, but its weights spread more: fewer examples count. `log_ratio`: `(x, args) -> scalar` at clean data; `base` as in `ReweightedLoss`.
    """

    base: DenoisingLoss
    log_ratio: Callable

    def __call__(self, model: VectorField, batch: PyTree, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        return _reweighted(self.base, model, batch, key, lambda t, x1, x, condition: (self.log_ratio(x1, condition), jnp.zeros_like(x)))


class MixtureRatio(eqx.Module):
    """log p_ref/p_mix, p_mix = (p_ref + p_bias)/2, of a `log_ratio` log p_ref/p_bias: log 2 + log sigmoid. No weight exceeds 2."""

    log_ratio: Callable

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, ""]:
        """A scalar for one example."""
        return jnp.log(2.0).astype(x.dtype) + jax.nn.log_sigmoid(self.log_ratio(t, x, args))


def unit_weight(path: AffinePath, t: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 at every time."""
    return jnp.ones_like(t)


class DensityRatioLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {})` that trains the logit log w(t, x) = log p_ref,t(x)/p_bias,t(x): cross-entropy over all times.

        L = E_t λ(t) ( E_ref softplus(-log w(t, x_t)) + E_bias softplus(log w(t, x_t)) ) / 2

    - `batch`: a pair (biased, reference); each data of shape (B, *x), or a pair (data, args). The two may differ in B: each counts by its mean.
    - `model`: `(t, x, args) -> scalar` on ONE example.
    - `weight`: `(path, t) -> array like t` (default 1); `times`: as in `DenoisingLoss`.
    """

    path: AffinePath
    weight: Callable = unit_weight
    times: Callable = stratified_times

    def __call__(self, model: Callable, batch: tuple[PyTree, PyTree], key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""

        def cross_entropy(sign, part, key):
            times, data, noise, args = draw(part, key, self.times)
            logits = jax.vmap(lambda t, x1, x0, c: model(t, self.path.interpolate(t, x1, x0), c))(times, data, noise, args)
            return jnp.mean(self.weight(self.path, times) * jax.nn.softplus(-sign * logits))

        key_biased, key_reference = jax.random.split(key)
        biased, reference = batch
        return (cross_entropy(-1, biased, key_biased) + cross_entropy(1, reference, key_reference)) / 2, {}


__all__ = ["DensityRatioLoss", "ImportanceWeightedLoss", "MixtureRatio", "ReweightedLoss", "unit_weight"]
