"""AutoLRS: a constant learning rate for each stage of training, found by Bayesian optimisation at its start, on the fly.

Jin, Zhou, Zhao, Zhu, Guo, Canini, Krishnamurthy 2021, "AutoLRS: Automatic Learning-Rate Schedule by Bayesian Optimization on the Fly"
(arXiv:2105.10762). Training is cut into stages of τ steps, τ = 1000, 2000, 4000, 8000, 8000, …. Each begins with k = 10 probes, all from the same
state: a Gaussian process over the logarithm of the rate proposes one, τ' = τ/10 steps are trained with it, and the loss after τ steps is forecast
from theirs (`forecast_loss`). The rate with the lowest forecast then trains the stage. The probes cost k τ' = τ steps: as much as the training
itself.

The process has a Matérn-5/2 kernel; the next rate is where mean - κ · deviation is least. The authors' code has κ = 10⁶, that is, it explores
wherever it knows least; with κ = 1 the probes gather where the loss is low, and the rate comes out more precisely. Once a stage of the full length
is done, validation losses take the place of training losses, if `validate` is given.

Deviations from the authors' code. The first probe is the middle of the range; there it is drawn. The kernel's length, the noise and the scale have
the greatest likelihood on a grid; there by gradients. A diverged probe scores 10⁶ as there, but the process sees the worst of the other scores in
its place: 10⁶ would flatten all differences. There, a validation series that reaches the first loss of all is not forecast; here it is.

Nothing is saved or restored: states are values, so the probes leave no trace.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ..core.check import check_count, check_range, is_concrete
from ..core.leaves import is_key
from ..core.types import Scalar
from .loss_forecast import forecast_loss, forecast_validation_loss


#: `train(state, rate, steps) -> (state, losses)`: any training of `steps` (a Python integer) at one rate. `losses` are those of the steps, or as many
#: equally spaced values as there are, at least 4.
Train = Callable[[Any, Float[Array, ""], int], tuple[Any, Float[Array, " n"]]]

#: `forecast(losses, time) -> loss`, `time` in units of the spacing of `losses`, which stand at 0, 1, ….
Forecast = Callable[[Float[Array, " n"], Scalar], Float[Array, ""]]

_LENGTHS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # of the kernel, in units of the logarithm of the range
_NOISES = (1e-4, 1e-2)  # variance, as a share of the signal's


class Probes(eqx.Module):
    """The rates tried so far, as places in a grid of candidates, and what they scored.

    - `places`: (k,); those from `count` on mean nothing.
    - `scores`: (k,), lower is better.
    - `count`: how many.
    - `following`: the place to try next.
    """

    places: Int[Array, " k"]
    scores: Float[Array, " k"]
    count: Int[Array, ""]
    following: Int[Array, ""]


class RateSearch(eqx.Module):
    """Bayesian optimisation of a learning rate, by ask and tell.

    - `low`, `high`: the range of rates, may be traced.
    - `kappa`: κ of the lower confidence bound, default 1e6 as in the authors' code; 1 for a sharper search.
    - `penalty`: the score of a run that diverged, default 1e6.
    - `num_probes`: k, default 10.
    - `num_candidates`: rates on the logarithmic grid, default 257. None is tried twice.

    Raises `ValueError` for a range that is empty or not positive, and for counts that do not fit.
    """

    low: Scalar
    high: Scalar
    kappa: Scalar = 1e6
    penalty: Scalar = 1e6
    num_probes: int = eqx.field(static=True, default=10)
    num_candidates: int = eqx.field(static=True, default=257)

    def __check_init__(self):
        check_range("low", self.low, low=0.0, open_low=True)
        check_range("high", self.high, low=float(self.low) if is_concrete(self.low) else 0.0, open_low=True)
        check_range("kappa", self.kappa, low=0.0)
        check_count("num_probes", self.num_probes)
        check_count("num_candidates", self.num_candidates, low=self.num_probes)

    def init(self) -> Probes:
        """Nothing tried yet; scores in the dtype of `low`."""
        k = self.num_probes
        zero = jnp.zeros((), jnp.int32)
        return Probes(jnp.zeros(k, jnp.int32), jnp.zeros_like(self._grid, shape=(k,)), zero, zero + self.num_candidates // 2)

    def ask(self, probes: Probes) -> Float[Array, ""]:
        """The next rate to try; the middle of the range at first."""
        return self._grid[probes.following]

    def tell(self, probes: Probes, score: Float[Array, ""]) -> Probes:
        """With the score of the rate that `ask` gave; one that is not finite, or above the penalty, becomes the penalty."""
        score = jnp.asarray(score, probes.scores.dtype)
        penalty = jnp.asarray(self.penalty, score.dtype)
        score = jnp.where(jnp.isfinite(score) & (score < penalty), score, penalty)
        places, scores = probes.places.at[probes.count].set(probes.following), probes.scores.at[probes.count].set(score)
        count = probes.count + 1
        return Probes(places, scores, count, self._following(places, scores, count))

    def rates(self, probes: Probes) -> Float[Array, " k"]:
        """The rates tried, in order."""
        return self._grid[probes.places]

    def best(self, probes: Probes) -> Float[Array, ""]:
        """The rate with the lowest score; if all diverged, the first."""
        told = self._told(probes.count)
        return self.rates(probes)[jnp.argmin(jnp.where(told, probes.scores, jnp.inf))]

    @property
    def _grid(self):
        dtype = jnp.result_type(self.low) if jnp.issubdtype(jnp.result_type(self.low), jnp.floating) else jnp.result_type(float)
        low, high = (jnp.log(jnp.asarray(end, dtype)) for end in (self.low, self.high))
        return jnp.exp(low + (high - low) * jnp.linspace(0, 1, self.num_candidates, dtype=dtype))

    def _told(self, count):
        return jnp.arange(self.num_probes, dtype=jnp.int32) < count

    def _following(self, places, scores, count):
        """Where the lower confidence bound is least, of the candidates that were not tried."""
        told = self._told(count)
        candidates = jnp.linspace(0, 1, self.num_candidates, dtype=scores.dtype)
        worst = jnp.max(jnp.where(told & (scores < jnp.asarray(self.penalty, scores.dtype)), scores, -jnp.inf))
        bounded = jnp.where(told, jnp.minimum(scores, jnp.where(jnp.isfinite(worst), worst, 0)), 0)
        mean, deviation = gaussian_process(candidates[places], bounded, told, candidates)
        bound = mean - jnp.asarray(self.kappa, mean.dtype) * deviation
        bound = bound.at[jnp.where(told, places, self.num_candidates)].set(jnp.inf, mode="drop")
        return jnp.argmin(bound).astype(jnp.int32)


def gaussian_process(
    places: Float[Array, " k"], values: Float[Array, " k"], told: Array, candidates: Float[Array, " m"]
) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    """Mean and deviation at the candidates of a Gaussian process with a Matérn-5/2 kernel, in units of the values.

    - `places`, `values`: the data, where `told` (k,) says so.

    Mean, scale, length and noise are those of greatest likelihood, the last two on a grid.
    """
    weights = told.astype(values.dtype)
    total = jnp.maximum(jnp.sum(weights), 1)
    centre = jnp.sum(weights * values) / total
    centred = weights * (values - centre)
    spread = jnp.sqrt(jnp.sum(centred**2) / total)
    spread = jnp.where(spread > 0, spread, 1)
    target = centred / spread

    def kernel(length):
        """Of the data and the candidates, (k + m), with the data."""
        r = 5**0.5 * jnp.abs(jnp.concatenate([places, candidates])[:, None] - places) / length
        return (1 + r + r**2 / 3) * jnp.exp(-r) * weights

    def fit(length, noise):
        k = places.size
        among, across = jnp.split(kernel(length), [k])
        among = weights[:, None] * among + jnp.diag(1 - weights + noise * weights)

        def eliminate(rows, j):
            """One column of Cholesky's factor, carried through to candidates and values: no call to LAPACK, which can hang in nested loops."""
            column = rows[:, j] / jnp.sqrt(rows[j, j])
            return rows - column[:, None] * column[:k], column

        _, columns = jax.lax.scan(eliminate, jnp.concatenate([among, across, target[None]]), jnp.arange(k))
        factor, explained, solved = columns[:, :k], columns[:, k:-1], columns[:, -1]
        scale = jnp.maximum(jnp.sum(solved**2) / total, 1e-6)
        likelihood = -total * jnp.log(scale) / 2 - jnp.sum(jnp.log(jnp.diag(factor)))
        return likelihood, solved @ explained, jnp.sqrt(scale * jnp.maximum(1 - jnp.sum(explained**2, axis=0), 0))

    lengths, noises = (grid.ravel() for grid in jnp.meshgrid(jnp.asarray(_LENGTHS, values.dtype), jnp.asarray(_NOISES, values.dtype)))
    likelihood, mean, deviation = jax.vmap(fit)(lengths, noises)
    best = jnp.argmax(likelihood)
    return centre + spread * mean[best], spread * deviation[best]


class Stage(eqx.Module):
    """What one stage did.

    - `rate`: the one it trained with.
    - `losses`: of its training, as `train` returned them.
    - `rates`, `forecasts`: of the probes in order, (k,).
    - `steps`, `probe_steps`: τ and τ'.
    """

    rate: Float[Array, ""]
    losses: Float[Array, " n"]
    rates: Float[Array, " k"]
    forecasts: Float[Array, " k"]
    steps: int = eqx.field(static=True)
    probe_steps: int = eqx.field(static=True)

    @property
    def search_steps(self) -> int:
        """What the search cost, in training steps: k τ'."""
        return self.rates.shape[-1] * self.probe_steps


def autolrs_stage(
    train: Train,
    state: Any,
    search: RateSearch,
    steps: int,
    *,
    probe_steps: int | None = None,
    probe: Train | None = None,
    forecast: Forecast = forecast_loss,
) -> tuple[Any, Stage]:
    """Find a rate and train one stage with it.

    - `train`: pure, as it is traced once for all probes. A training that is not (a loop over files) asks and tells a `RateSearch` itself.
    - `state`: any pytree of arrays: weights, optimiser, key, place in the data.
    - `steps`: τ.
    - `probe_steps`: τ', default τ / 10.
    - `probe`: what the probes call, default `train`: the same training, with losses to forecast from, such as validation losses every τ'/16 steps.
    - `forecast`: default `forecast_loss`.

    Returns the state after the stage, and its record. Compiles, and batches over states and ranges. Raises `ValueError` for lengths out of range.
    """
    if probe_steps is None:
        probe_steps = max(1, steps // 10)
    check_count("probe_steps", probe_steps)
    check_count("steps", steps, low=probe_steps)

    def one(probes, _):
        _, losses = (train if probe is None else probe)(state, search.ask(probes), probe_steps)
        score = forecast(losses, steps / probe_steps * losses.shape[0])
        return search.tell(probes, jnp.where(jnp.isfinite(losses).all(), score, jnp.inf)), None

    probes = jax.tree.map(lambda leaf: leaf + _zero(state).astype(leaf.dtype), search.init())  # `shard_map` wants to see on what it will depend
    probes, _ = jax.lax.scan(one, probes, length=search.num_probes)
    rate = search.best(probes)
    state, losses = train(state, rate, steps)
    return state, Stage(rate, losses, search.rates(probes), probes.scores, steps, probe_steps)


def _zero(state):
    """0, made of all arrays of the state."""
    arrays = [jax.random.key_data(leaf) if is_key(leaf) else leaf for leaf in jax.tree.leaves(eqx.filter(state, eqx.is_array))]
    return sum((jnp.sum(jnp.zeros_like(leaf, dtype=jnp.float32)) for leaf in arrays), start=jnp.zeros((), jnp.float32))


def stage_lengths(total_steps: int, *, first: int = 1000, longest: int = 8000) -> tuple[int, ...]:
    """τ of each stage: `first`, doubled up to `longest`, the last cut off at `total_steps`. Raises `ValueError` for counts out of range."""
    check_count("total_steps", total_steps)
    check_count("first", first)
    check_count("longest", longest, low=first)
    lengths, length = [], first
    while sum(lengths) < total_steps:
        lengths.append(min(length, total_steps - sum(lengths)))
        length = min(2 * length, longest)
    return tuple(lengths)


def train_autolrs(
    train: Train,
    state: Any,
    search: RateSearch,
    total_steps: int,
    *,
    first: int = 1000,
    longest: int = 8000,
    validate: Train | None = None,
    forecast: Forecast = forecast_loss,
    forecast_validation: Forecast = forecast_validation_loss,
) -> tuple[Any, tuple[Stage, ...]]:
    """Train for `total_steps`, stage by stage. As many steps again go into the search: `sum(stage.search_steps for stage in stages)`.

    - `first`, `longest`: see `stage_lengths`.
    - `validate`: the training with validation losses (the authors: one every τ'/16 steps), which the probes call once a stage of the longest length
      is done, with `forecast_validation` for their forecasts.

    The other arguments are those of `autolrs_stage`. Returns the state at the end, and the stages.
    """
    stages, done = [], False
    for steps in stage_lengths(total_steps, first=first, longest=longest):
        probe, ahead = (train, forecast) if validate is None or not done else (validate, forecast_validation)
        state, stage = autolrs_stage(train, state, search, steps, probe=probe, forecast=ahead)
        stages.append(stage)
        done = done or steps == longest
    return state, tuple(stages)


def stages_schedule(stages: Sequence[Stage]) -> optax.Schedule:
    """The schedule that was found, `step -> value`, to train another run with; the last rate is held."""
    rates = jnp.stack([stage.rate for stage in stages])
    ends = [sum(stage.steps for stage in stages[: i + 1]) for i in range(len(stages) - 1)]

    def schedule(step):
        return rates[sum((jnp.asarray(step) >= end).astype(jnp.int32) for end in ends) if ends else jnp.zeros(jnp.shape(step), jnp.int32)]

    return schedule


__all__ = [
    "Forecast",
    "Probes",
    "RateSearch",
    "Stage",
    "Train",
    "autolrs_stage",
    "gaussian_process",
    "stage_lengths",
    "stages_schedule",
    "train_autolrs",
]
