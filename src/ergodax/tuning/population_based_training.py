"""Population-based training (Jaderberg et al., 2017, arXiv:1711.09846), with truncation selection.

After each piece a lane in the bottom fraction of the population copies the weights and hyper-parameters of one drawn from the top fraction (exploit),
then changes the hyper-parameters (explore). So they may move during training, which no fixed value can match where the best value moves too.

Deviations: all lanes are compared in the same piece, where the paper lets each worker come when it is ready. A copy keeps the parent's random key
where that is part of the state, as in `Fit`: it goes on with the same batches.
"""

import math
from collections.abc import Callable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from ..core.check import check_count, check_range
from ..core.population import AbstractRule, Decision, Lanes
from ..core.types import PRNGKey, Scalar
from .successive_halving import rank


#: Changes the hyper-parameters of one lane: `explore(key, values) -> values`.
Explore = Callable[[PRNGKey, dict[str, Array]], dict[str, Array]]


class Perturb(eqx.Module):
    """Multiply each of some hyper-parameters by one of two factors, at even odds and independently.

    - `ranges`: for each name, the smallest and largest value it may take.
    - `factors`: default 0.8 and 1.2, the paper's.
    """

    ranges: Mapping[str, tuple[Scalar, Scalar]]
    factors: tuple[Scalar, Scalar] = (0.8, 1.2)

    def __call__(self, key: PRNGKey, values: dict[str, Shaped[Array, "..."]]) -> dict[str, Shaped[Array, "..."]]:
        """The new values."""
        _check_names(self.ranges, values)
        new = dict(values)
        for key_name, (name, (low, high)) in zip(jax.random.split(key, len(self.ranges)), self.ranges.items()):
            old = values[name]
            down, up, low, high = (jnp.asarray(number, old.dtype) for number in (*self.factors, low, high))
            new[name] = jnp.clip(old * jnp.where(jax.random.bernoulli(key_name, shape=old.shape), up, down), low, high)
        return new


class Resample(eqx.Module):
    """Draw each of some hyper-parameters anew with some probability, else change them otherwise.

    - `draw`: for each name, `key -> value`.
    - `probability`: default 0.25, that of Ray Tune; the paper gives none.
    - `otherwise`: an `Explore`, applied first.
    """

    draw: Mapping[str, Callable[[PRNGKey], Array]]
    otherwise: Explore
    probability: Scalar = 0.25

    def __call__(self, key: PRNGKey, values: dict[str, Shaped[Array, "..."]]) -> dict[str, Shaped[Array, "..."]]:
        """The new values."""
        _check_names(self.draw, values)
        key, *keys = jax.random.split(key, 1 + 2 * len(self.draw))
        new = dict(self.otherwise(key, values))
        for key_whether, key_draw, (name, draw) in zip(keys[::2], keys[1::2], self.draw.items()):
            drawn = jnp.asarray(draw(key_draw), values[name].dtype)
            new[name] = jnp.where(jax.random.bernoulli(key_whether, self.probability), drawn, new[name])
        return new


class PopulationBasedTraining(AbstractRule):
    """Copy from the top, perturb, go on; as many lanes as runs, one program.

    - `num_pieces`: the pieces of a run.
    - `explore`: changes what was copied, one lane at a time: `Perturb`, `Resample`, or your own.
    - `fraction`: the share of lanes at the bottom that is replaced, and at the top that is copied: ⌈fraction · n⌉ lanes, at most half. Default 0.2,
      the paper's.

    The search needs a `key`. Raises `ValueError` without one, or for numbers out of range.
    """

    num_pieces: int
    explore: Explore
    fraction: float = 0.2

    def __check_init__(self):
        check_count("num_pieces", self.num_pieces)
        check_range("fraction", self.fraction, low=0.0, high=0.5, open_low=True)

    def sizes(self, num_runs: int) -> tuple[int, ...]:
        """All."""
        return (num_runs,)

    def init(self, num_runs: int) -> None:
        """Nothing is remembered."""

    def __call__(self, key: PRNGKey | None, lanes: Lanes, memory: None) -> Decision:
        """Exploit, then explore."""
        if key is None:
            raise ValueError("population-based training draws: give `search` a `key`.")
        num_lanes = lanes.run.size
        count = min(math.ceil(self.fraction * num_lanes), num_lanes // 2)
        key_exploit, key_explore = jax.random.split(key)
        lane, place = jnp.arange(num_lanes, dtype=lanes.run.dtype), rank(lanes)
        done = lanes.age >= self.num_pieces
        replaced = (place >= num_lanes - count) & ~done
        top = jnp.argsort(place).astype(lanes.run.dtype)[:count]
        drawn = top[jax.random.randint(key_exploit, (num_lanes,), 0, count)] if count else lane
        parent = jnp.where(replaced, drawn, lane)

        copied = {name: column[parent] for name, column in lanes.values.items()}
        explored = jax.vmap(self.explore)(jax.random.split(key_explore, num_lanes), copied)
        values = {name: jnp.where(replaced.reshape(-1, *(1,) * (new.ndim - 1)), explored[name], new) for name, new in copied.items()}
        return Decision(parent, jnp.zeros_like(done), jnp.where(done, -1, lanes.run), values, memory)


def _check_names(wanted, values):
    if unknown := [name for name in wanted if name not in values]:
        raise ValueError(f"`{unknown[0]}` is not among the values that the search varies: {', '.join(values) or 'none'}.")


__all__ = ["Explore", "Perturb", "PopulationBasedTraining", "Resample"]
