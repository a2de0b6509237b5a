"""Population-based training: who copies whom and what becomes of the values, by hand; the paper's toy, which no fixed value solves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from ergodax.core.population import Lanes, Trial
from ergodax.core.search import search
from ergodax.tuning.population_based_training import Perturb, PopulationBasedTraining, Resample
from ergodax.tuning.successive_halving import SuccessiveHalving


COST = jnp.array([0.5, 0.1, jnp.inf, 0.2, 0.9, 0.4, 0.3, 0.8, 0.6, 0.7])  # top two: 1, 3; bottom two: 2, 4
RATE = jnp.linspace(1.0, 2.0, 10)
VALUES = {"rate": RATE, "weight": jnp.stack([RATE, -RATE], axis=1), "seed": jnp.arange(10)}


def lanes(age):
    return Lanes(COST, VALUES, jnp.arange(10, dtype=jnp.int32), jnp.full(10, age, jnp.int32), VALUES)


def decide(rule, num_keys, age=1):
    keys = jax.random.split(jax.random.key(0), num_keys)
    return jax.jit(jax.vmap(lambda key: rule(key, lanes(age), None)))(keys)


def test_truncation_and_perturbation_by_hand():
    rule = PopulationBasedTraining(9, Perturb({"rate": (0.1, 1.5), "weight": (-10.0, 10.0)}), fraction=0.2)
    decision = decide(rule, 2000)
    parent = np.asarray(decision.parent)
    others = [0, 1, 3, 5, 6, 7, 8, 9]
    assert (parent[:, others] == others).all()
    assert set(np.unique(parent[:, [2, 4]])) == {1, 3}
    share = (parent[:, [2, 4]] == 1).mean(0)
    assert (np.abs(share - 0.5) < 4.5 * np.sqrt(0.25 / 2000)).all()
    assert not decision.fresh.any()
    np.testing.assert_array_equal(decision.run, np.broadcast_to(np.arange(10), (2000, 10)))

    rate, weight = np.asarray(decision.values["rate"]), np.asarray(decision.values["weight"])
    np.testing.assert_array_equal(rate[:, others], np.broadcast_to(RATE[jnp.array(others)], (2000, 8)))
    np.testing.assert_array_equal(decision.values["seed"], np.arange(10)[parent])  # copied, not perturbed
    factor = rate[:, 2] / np.asarray(RATE)[parent[:, 2]]
    expected = np.where(factor < 1, 0.8, np.minimum(1.2, 1.5 / np.asarray(RATE)[parent[:, 2]]))
    np.testing.assert_allclose(factor, expected, rtol=1e-12)
    ups = np.stack(
        [factor > 1, weight[:, 2, 0] / np.asarray(RATE)[parent[:, 2]] > 1, weight[:, 2, 1] / -np.asarray(RATE)[parent[:, 2]] > 1, rate[:, 4] > 1.15]
    )
    assert (np.abs(ups[:3].mean(1) - 0.5) < 4.5 * np.sqrt(0.25 / 2000)).all()
    assert (np.abs(np.corrcoef(ups[:3]) - np.eye(3)) < 4.5 / np.sqrt(2000)).all()  # each number has its own draw


def test_the_last_piece_changes_nothing():
    rule = PopulationBasedTraining(9, Perturb({"rate": (0.1, 10.0)}))
    decision = decide(rule, 3, age=9)
    np.testing.assert_array_equal(decision.parent, np.broadcast_to(np.arange(10), (3, 10)))
    assert (decision.run == -1).all()
    np.testing.assert_array_equal(decision.values["rate"], np.broadcast_to(RATE, (3, 10)))


@pytest.mark.parametrize(("num_lanes", "fraction", "count"), [(10, 0.25, 3), (3, 0.5, 1), (4, 0.5, 2), (8, 0.2, 2), (1, 0.2, 0)])
def test_how_many_are_replaced(num_lanes, fraction, count):
    """⌈fraction · n⌉, and never more than half: top and bottom do not overlap."""
    rule = PopulationBasedTraining(9, lambda key, values: values, fraction)
    run = jnp.arange(num_lanes, dtype=jnp.int32)
    decision = rule(jax.random.key(0), Lanes(jnp.arange(num_lanes, dtype=float), {}, run, jnp.ones_like(run), {}), None)
    assert (decision.parent != run).sum() == count
    assert (decision.parent[num_lanes - count :] < count).all()


def test_resample():
    """Drawn anew with the probability, else perturbed."""
    explore = Resample({"rate": lambda key: 5.0 + jax.random.uniform(key)}, Perturb({"rate": (0.0, 10.0)}), probability=0.25)
    keys = jax.random.split(jax.random.key(1), 4000)
    rate = np.asarray(jax.vmap(lambda key: explore(key, {"rate": jnp.array(1.0), "seed": jnp.array(3)})["rate"])(keys))
    drawn = rate >= 5.0
    assert abs(drawn.mean() - 0.25) < 4.5 * np.sqrt(0.25 * 0.75 / 4000)
    assert abs(rate[drawn].mean() - 5.5) < 4.5 * np.sqrt(1 / 12 / drawn.sum())
    np.testing.assert_allclose(np.unique(rate[~drawn]), [0.8, 1.2], rtol=1e-12)


@dataclasses.dataclass(frozen=True)
class Surrogate:
    first: float = 0.0
    second: float = 0.0


def toy(config):
    """Figure 2 of the paper: climb 1.2 - h₀ θ₀² - h₁ θ₁² from (0.9, 0.9); what counts is 1.2 - θ₀² - θ₁²."""
    weights = jnp.stack([jnp.asarray(config.first, float), jnp.asarray(config.second, float)])

    def advance(theta, num_steps):
        theta = jax.lax.fori_loop(0, num_steps, lambda _, theta: theta - 0.02 * weights * theta, theta)
        return theta, {"score": 1.2 - jnp.sum(theta**2)}

    return Trial(lambda: jnp.full(2, 0.9), advance)


def step_at_random(key, values):
    names = sorted(values)
    noise = 0.2 * jax.random.normal(key, (len(names),))
    return {name: jnp.clip(values[name] + noise[i], 0.0, 1.0) for i, name in enumerate(names)}


def test_the_toy_of_the_paper():
    """Each of the two workers sees one coordinate alone. Trained as they are they never pass 1.2 - 0.9² = 0.39; together they reach the top."""
    runs = [{"first": 1.0, "second": 0.0}, {"first": 0.0, "second": 1.0}]
    options = {"metric": "score", "piece_steps": 4, "largest": True, "batch_size": 1}
    alone = search(toy, Surrogate(), runs, SuccessiveHalving(100, min_pieces=100), **options)  # no rung
    rule = PopulationBasedTraining(100, step_at_random, fraction=0.5)
    found = [search(toy, Surrogate(), runs, rule, key=jax.random.key(seed), **options) for seed in range(3)]
    for result in found:
        assert result.num_compiles == 1
        best = result.table()["score"].max()
        assert best > 1.15
        np.testing.assert_allclose(1.2 - jnp.sum(result.state**2), best, rtol=1e-12)
        assert (result.history["parent"][2:] != result.history["lane"][2:]).any()
    np.testing.assert_allclose(alone.table()["score"], 1.2 - 0.81 * (1 + 0.98**800), rtol=1e-9)


def test_same_key_same_search_and_on_any_number_of_devices():
    runs = [{"first": first, "second": 1.0 - first} for first in (0.0, 0.2, 0.5, 0.7, 1.0)]
    rule = PopulationBasedTraining(8, Perturb({"first": (0.01, 1.0), "second": (0.01, 1.0)}), fraction=0.4)
    options = {"metric": "score", "piece_steps": 2, "largest": True}
    one = search(toy, Surrogate(), runs, rule, key=jax.random.key(0), mesh=Mesh(np.array(jax.devices()[:1]), ("sweep",)), **options)
    two = search(toy, Surrogate(), runs, rule, key=jax.random.key(0), **options)
    for name, column in one.history.items():
        np.testing.assert_allclose(two.history[name], column, rtol=1e-12)
    other = search(toy, Surrogate(), runs, rule, key=jax.random.key(1), **options)
    assert (other.history["first"] != one.history["first"]).any()
    row = (one.history["run"] == one.best()) & (one.history["age"] == 8)
    assert one.best_values() == {"first": one.history["first"][row][0], "second": one.history["second"][row][0]}


def test_refusals():
    explore = Perturb({"rat": (0.1, 1.0)})
    with pytest.raises(ValueError, match="`rat` is not among the values that the search varies: rate, seed, weight"):
        PopulationBasedTraining(9, explore)(jax.random.key(0), lanes(1), None)
    with pytest.raises(ValueError, match="give `search` a `key`"):
        PopulationBasedTraining(9, explore)(None, lanes(1), None)
    with pytest.raises(ValueError, match=r"`fraction` must lie in \(0, 0.5\], got 0.6"):
        PopulationBasedTraining(9, explore, 0.6)
