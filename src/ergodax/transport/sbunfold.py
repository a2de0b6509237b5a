"""SBUnfold: undo a detector's smearing with a Schrödinger bridge from what was seen to what was there.

Diefenbacher, Liu, Mikuni, Nachman, Nie 2023 (arXiv:2308.12351). A simulation gives pairs (z, x) of truth and detector. The path between them is that
of I2SB (Liu, Vahdat, Huang, Theodorou, Nie, Anandkumar 2023, arXiv:2302.05872), a Brownian bridge on a table of N variances β_k, with k = 0 at the
detector and N - 1 at the truth:

    X_k | z, x ~ N((r_k x + s_k z)/(s_k + r_k), s_k r_k/(s_k + r_k) I),   s_k = β_0 + … + β_k,   r_k = β_k + … + β_{N-1}.

A network learns ε = (X_k - z)/√r_k from (X_k, x). Unfolding starts at the event itself, X_0 = x, and visits some of the k: with ẑ = X_k - √r_k ε,

    X_l | X_k ~ N(X_k + (r_k - r_l)/r_k (ẑ - X_k), r_l (r_k - r_l)/r_k I),    and no noise in the last step.

Their network does not look at x: then it draws from p(z | x) only if the noise of the whole bridge is that of the detector, for then the pairs
are a Schrödinger bridge's. One that looks at x does whatever the table. The steps add a bias of O(1/steps).

    model = fit_sbunfold(key, z, x, network, optax.adam(1e-3), num_steps=10_000, batch_size=128)
    unfolded = model.sample(key, data)

p(z | x) depends on the prior p(z) of the simulation. `PriorRefinement` removes this by expectation maximisation: unfold the data, weight the
simulated pairs so that their truth is distributed like the result, train again, as IcINN does (Backes et al. 2022, arXiv:2212.08674).

Here t = k/(N - 1) runs from detector to truth; the paper has the truth at time 0. Its table is its own mirror image.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from ..core.check import check_count, check_range
from ..core.fit import fit
from ..core.types import PRNGKey, PyTree, Scalar, VectorField
from .reference import Brownian
from .samples import Minibatches, Samples


def mirrored_variances(num_steps: int = 1000, lowest: Scalar = 1e-5, highest: Scalar = 3e-4) -> Float[Array, " n"]:
    """β_k: the squares of the first half of linspace(√lowest, √highest, N), then their mirror image. `num_steps` is N, even.

    The defaults are the paper's, with the sum 0.04905: a bridge of standard deviation 0.22 in standardised units.
    """
    check_count("num_steps", num_steps, low=2)
    if num_steps % 2:
        raise ValueError(f"`num_steps` must be even, got {num_steps}.")
    check_range("lowest", lowest, low=0.0)
    check_range("highest", highest, low=0.0, open_low=True)
    half = jnp.linspace(jnp.sqrt(jnp.asarray(lowest)), jnp.sqrt(jnp.asarray(highest)), num_steps)[: num_steps // 2] ** 2
    return jnp.concatenate([half, half[::-1]])


class UnfoldingBridge(eqx.Module):
    """The bridge of a table of variances β (N,), from the detector (k = 0) to the truth (k = N - 1). Methods are on one event."""

    variances: Float[Array, " n"]

    def __check_init__(self):
        check_count("the number of `variances`", self.variances.shape[0], low=2)
        check_range("variances", self.variances, low=0.0)

    @property
    def passed(self) -> Float[Array, " n"]:
        """s_k, the variance between the detector and X_k."""
        return jnp.cumsum(self.variances)

    @property
    def remaining(self) -> Float[Array, " n"]:
        """r_k, the variance between X_k and the truth."""
        return jnp.cumsum(self.variances[::-1])[::-1]

    @property
    def times(self) -> Float[Array, " n"]:
        """k/(N - 1), what the network sees of k."""
        return jnp.linspace(0, 1, self.variances.shape[0], dtype=self.variances.dtype)

    def marginal(self, k: Int[Array, ""], truth: Float[Array, "*x"], detector: Float[Array, "*x"]) -> tuple[Float[Array, "*x"], Array]:
        """Mean and variance of X_k given both ends."""
        passed, remaining = self.passed[k].astype(truth.dtype), self.remaining[k].astype(truth.dtype)
        return Brownian(1.0).bridge(passed, detector, truth, 0.0, passed + remaining)

    def posterior(self, k: Int[Array, ""], later: Int[Array, ""], x: Float[Array, "*x"], truth: Float[Array, "*x"]) -> tuple[Array, Array]:
        """Mean and variance of X_later given X_k = x and the truth."""
        return _posterior(self.remaining[k].astype(x.dtype), self.remaining[later].astype(x.dtype), x, truth)

    def unfold(self, key: PRNGKey, network: VectorField, detector: Float[Array, "*x"], num_steps: int = 100) -> Float[Array, "*x"]:
        """One draw of the truth of one event; `num_steps` network calls at k spread evenly over the table, at most N - 1."""
        check_count("num_steps", num_steps)
        last = self.variances.shape[0] - 1
        if num_steps > last:
            raise ValueError(f"`num_steps` must be at most {last} for {last + 1} variances, got {num_steps}.")
        indices = np.round(np.linspace(0, last, num_steps + 1)).astype(int)
        remaining = self.remaining[indices].astype(detector.dtype)

        def step(x, interval):
            i, time, whole, rest = interval
            mean, variance = _posterior(whole, rest, x, x - jnp.sqrt(whole) * network(time, x, detector))
            noisy = i < num_steps - 1
            deviation = jnp.where(noisy, jnp.sqrt(jnp.where(noisy, variance, 1)), 0)
            return mean + deviation * jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype), None

        times = self.times[indices[:-1]].astype(detector.dtype)
        return jax.lax.scan(step, detector, (jnp.arange(num_steps), times, remaining[:-1], remaining[1:]))[0]


def _posterior(whole, rest, x, truth):
    """Mean and variance where `rest` is left of the variance `whole` between x and the truth."""
    return Brownian(1.0).bridge(whole - rest, x, truth, 0.0, whole)


class UnfoldingLoss(eqx.Module):
    """`loss(network, batch, key) -> (scalar, {})`: the mean of |network(t, X_k, x) - (X_k - z)/√r_k|², k uniform.

    - `bridge`: an `UnfoldingBridge`.
    - `batch`: (truth, detector), each (B, *x), row by row one event.
    - `network`: on ONE event, `(t, X, x) -> array like X`; it may ignore x.

    Raises `ValueError` for pairs of unequal shape.
    """

    bridge: UnfoldingBridge

    def __call__(self, model: VectorField, batch: tuple, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        truth, detector = batch
        if truth.shape != detector.shape or truth.ndim < 1:
            raise ValueError(f"truth and detector must have one shape (batch, *event), got {truth.shape} and {detector.shape}.")
        key_step, key_noise = jax.random.split(key)
        bridge = self.bridge
        ks = jax.random.randint(key_step, truth.shape[:1], 0, bridge.variances.shape[0])
        noise = jax.random.normal(key_noise, truth.shape, truth.dtype)

        @jax.vmap
        def errors(k, z, x, noise):
            mean, variance = bridge.marginal(k, z, x)
            position = mean + jnp.sqrt(variance) * noise
            target = (position - z) / jnp.sqrt(bridge.remaining[k]).astype(z.dtype)
            return jnp.mean((model(bridge.times[k].astype(z.dtype), position, x) - target) ** 2)

        return jnp.mean(errors(ks, truth, detector, noise)), {}


class SBUnfold(eqx.Module):
    """A trained unfolding. Made by `fit_sbunfold`; the network sees standardised numbers.

    Fields: `network`, `bridge`, the means and standard deviations of both sides, `metrics` (of training) and `failed_at` (-1, or the step that was
    not finite).
    """

    network: VectorField
    bridge: UnfoldingBridge
    truth_scale: tuple[Float[Array, "*x"], Float[Array, "*x"]]
    detector_scale: tuple[Float[Array, "*x"], Float[Array, "*x"]]
    metrics: dict[str, Array]
    failed_at: Int[Array, ""]

    def sample(self, key: PRNGKey, detector: Float[Array, "n *x"], num_steps: int = 100, *, batch_size: int = 4096) -> Float[Array, "n *x"]:
        """One draw of the truth for each event, (n, *x); `num_steps` network calls an event, `batch_size` events at a time."""
        Samples(detector)
        (mean, std), (shift, scale) = self.truth_scale, self.detector_scale

        def one(event):
            key, x = event
            return mean + std * self.bridge.unfold(key, self.network, (x - shift) / scale, num_steps)

        return jax.lax.map(one, (jax.random.split(key, detector.shape[0]), detector), batch_size=min(batch_size, detector.shape[0]))


class _PairBatches(eqx.Module):
    """`batch(key, step) -> (truth, detector)`: whole pairs, drawn by the weights of the truth."""

    truth: Samples
    detector: Array
    batch_size: int = eqx.field(static=True)

    def __call__(self, key, step):
        rows = self.truth.indices(key, self.batch_size)
        return self.truth.points[rows], self.detector[rows]


def fit_sbunfold(
    key: PRNGKey,
    truth: Float[Array, "..."] | Samples,
    detector: Float[Array, "..."],
    network: VectorField,
    optimiser: optax.GradientTransformation,
    *,
    num_steps: int,
    batch_size: int = 128,
    bridge: UnfoldingBridge | None = None,
    **options: Any,
) -> SBUnfold:
    """The unfolding of a simulated sample of pairs.

    - `truth`, `detector`: (n, *x) each, row by row one event; `truth` as `Samples` with weights for the pairs. Each side is standardised by its own
      (weighted) mean and standard deviation per entry.
    - `network`, `optimiser`, `num_steps`, and as `options` the other fields of `core.Fit` (`ema_decay`, `every`, …). Theirs: 250 000 steps of AdamW
      at 1e-3 with batches of 128 and `ema_decay=0.999`.
    - `bridge`: default `UnfoldingBridge(mirrored_variances())`.

    Raises `ValueError`, as `Samples` does, for rows that are not finite, and for sides of different shapes.
    """
    truth, seen = truth if isinstance(truth, Samples) else Samples(truth), Samples(detector)
    if truth.points.shape != detector.shape:
        raise ValueError(f"`truth` and `detector` must have one shape, got {truth.points.shape} and {detector.shape}.")
    bridge = UnfoldingBridge(mirrored_variances()) if bridge is None else bridge
    scales = _moments(truth.points, truth.weights), _moments(seen.points, truth.weights)
    (mean, std), (shift, scale) = scales
    data = _PairBatches(Samples((truth.points - mean) / std, truth.weights), (detector - shift) / scale, batch_size)
    fitted = fit(UnfoldingLoss(bridge), network, optimiser, data, key, num_steps=num_steps, **options)
    return SBUnfold(fitted.average, bridge, *scales, fitted.metrics, fitted.failed_at)


def _moments(points, weights):
    """Mean and standard deviation of every entry; 1 for one that never changes."""
    weights = None if weights is None else weights.astype(points.dtype)
    mean = jnp.average(points, 0, weights)
    std = jnp.sqrt(jnp.average((points - mean) ** 2, 0, weights))
    return mean, jnp.where(std > 0, std, 1)


class ClassifierRatio(eqx.Module):
    """`ratio(key, above, below) -> (n,)`: the density ratio p_above/p_below at the rows of `below` (n, *x), by training a classifier.

    The logit of "above" that minimises the cross-entropy of equally many examples is log(p_above/p_below).

    - `network`: on ONE event, `x -> scalar`; `optimiser`, `num_steps`, `batch_size` (of each class): its training by `core.fit`.
    """

    network: Callable
    optimiser: optax.GradientTransformation
    num_steps: int = eqx.field(static=True)
    batch_size: int = eqx.field(static=True, default=128)

    def __call__(self, key: PRNGKey, above: Float[Array, "m *x"], below: Float[Array, "n *x"]) -> Float[Array, " n"]:
        """The ratios."""

        def loss(network, batch, key):
            logits = [jax.vmap(network)(rows) for rows in batch]
            return jnp.mean(jax.nn.softplus(-logits[0])) + jnp.mean(jax.nn.softplus(logits[1])), {}

        data = Minibatches((Samples(above), Samples(below)), self.batch_size)
        fitted = fit(loss, self.network, self.optimiser, data, key, num_steps=self.num_steps, every=self.num_steps)
        return jnp.exp(jax.vmap(fitted.model)(below))


class RefinementState(NamedTuple):
    """What `PriorRefinement` carries."""

    weights: Float[Array, " n"]  # of the simulated pairs, with mean 1
    unfolded: Float[Array, "m *x"]


class PriorRefinement(eqx.Module):
    """A kernel for `core.iterate`, one round of expectation maximisation a step: train on weighted pairs, unfold the data, weight the pairs anew.

        rounds = PriorRefinement(fit, ratio, z, x, data)
        state = iterate(key, rounds.step, rounds.init(), 5)          # state.unfolded, state.weights

    - `fit`: `(key, truth as Samples, detector) -> estimator` with `sample(key, data)`, such as `fit_sbunfold` with its other arguments bound.
    - `ratio`: `(key, unfolded, truth) -> (n,)`, the ratio of their densities at the rows of `truth`, such as `ClassifierRatio`.
    - `truth`, `detector`: the simulated pairs (n, *x); `data`: what the detector really saw, (m, *x).
    """

    fit: Callable
    ratio: Callable
    truth: Float[Array, "n *x"]
    detector: Float[Array, "n *x"]
    data: Float[Array, "m *x"]

    def init(self) -> RefinementState:
        """Equal weights, and the data as they are."""
        return RefinementState(jnp.ones(self.truth.shape[0], self.truth.dtype), self.data)

    def step(self, key: PRNGKey, state: RefinementState) -> tuple[RefinementState, PyTree]:
        """One round; the second value is the estimator's arrays."""
        key_fit, key_sample, key_ratio = jax.random.split(key, 3)
        model = self.fit(key_fit, Samples(self.truth, state.weights), self.detector)
        unfolded = model.sample(key_sample, self.data)
        weights = self.ratio(key_ratio, unfolded, self.truth)
        return RefinementState(weights / jnp.mean(weights), unfolded), eqx.filter(model, eqx.is_array)


__all__ = [
    "ClassifierRatio",
    "PriorRefinement",
    "RefinementState",
    "SBUnfold",
    "UnfoldingBridge",
    "UnfoldingLoss",
    "fit_sbunfold",
    "mirrored_variances",
]
