"""Successive halving and its asynchronous form against brute force on random costs; `replay` against the search itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core.population import Lanes, Trial
from ergodax.core.replay import replay
from ergodax.core.search import search
from ergodax.tuning.asynchronous_halving import AsynchronousHalving
from ergodax.tuning.successive_halving import SuccessiveHalving, rank, rungs


def random_costs(seed, num_runs, num_pieces, nans=True):
    """Distinct random costs; some runs fail for good, one from the start."""
    generator = np.random.default_rng(seed)
    costs = generator.normal(size=(num_runs, num_pieces)) - 0.3 * np.arange(num_pieces)
    if nans:
        costs[2] = np.nan
        costs[5, num_pieces // 2 :] = np.nan
    return costs


def worst_last(cost):
    return np.where(np.isnan(cost), np.inf, cost)


def halve(costs, num_pieces, eta, min_pieces):
    """Hyperband's inner loop, on sorted lists."""
    alive, pieces = list(range(len(costs))), np.zeros(len(costs), int)
    at, rung = 0, min_pieces
    while True:
        at = min(rung, num_pieces)
        pieces[alive] = at
        if at == num_pieces:
            last = worst_last(costs[alive, at - 1])
            return pieces, alive[int(np.argmin(last))]
        order = sorted(alive, key=lambda run: (worst_last(costs[run, at - 1]), run))
        alive = sorted(order[: max(1, len(alive) // eta)])
        rung *= eta


def asynchronous(costs, num_lanes, num_pieces, eta, min_pieces):
    """Workers in lock-step; numpy's quantile decides."""
    waiting = list(range(len(costs)))
    lanes = [(waiting.pop(0), 0) for _ in range(min(num_lanes, len(costs)))]
    recorded, pieces, time = {}, np.zeros(len(costs), int), 0
    while lanes:
        time += 1
        lanes = [(run, age + 1) for run, age in lanes]
        for run, age in lanes:
            pieces[run] = age
            if age in rungs(num_pieces, eta, min_pieces):
                recorded.setdefault(age, []).append(worst_last(costs[run, age - 1]))
        following = []
        for run, age in lanes:
            cost = worst_last(costs[run, age - 1])
            goes_on = age < num_pieces
            if age in recorded and age in rungs(num_pieces, eta, min_pieces):
                # np.quantile does not interpolate with infinity
                threshold = np.quantile(recorded[age], 1 / eta, method="lower")
                goes_on = goes_on and np.isfinite(cost) and cost <= threshold
            if goes_on:
                following.append((run, age))
            elif waiting:
                following.append((waiting.pop(0), 0))
        lanes = following
    furthest = max(pieces[run] for run in range(len(costs)) if np.isfinite(costs[run, pieces[run] - 1]))
    last = [worst_last(costs[run, pieces[run] - 1]) if pieces[run] == furthest else np.inf for run in range(len(costs))]
    return pieces, int(np.argmin(last)), time


@pytest.mark.parametrize(
    ("num_pieces", "eta", "min_pieces", "expected"), [(9, 3, 1, (1, 3)), (10, 3, 1, (1, 3, 9)), (12, 2, 3, (3, 6)), (1, 3, 1, ()), (4, 4, 4, ())]
)
def test_rungs(num_pieces, eta, min_pieces, expected):
    assert rungs(num_pieces, eta, min_pieces) == expected


def test_sizes_are_those_of_hyperband():
    """n_i = ⌊n η^-i⌋: the first bracket of Hyperband's Table 1, R = 81 and η = 3."""
    rule = SuccessiveHalving(81, 3)
    assert rungs(81, 3, 1) == (1, 3, 9, 27)
    assert rule.sizes(81) == (81, 27, 9, 3, 1)
    assert SuccessiveHalving(27, 2).sizes(10) == (10, 5, 2, 1)


def test_rank_puts_failed_before_idle():
    cost = jnp.array([jnp.inf, 0.5, jnp.inf, 0.1, 0.5])
    lanes = Lanes(cost, {}, jnp.array([-1, 3, 0, 1, 2]), jnp.zeros(5, jnp.int32), {})
    np.testing.assert_array_equal(rank(lanes), [4, 1, 3, 0, 2])


@pytest.mark.parametrize(("num_runs", "num_pieces", "eta", "min_pieces"), [(27, 9, 3, 1), (20, 11, 2, 2), (7, 4, 4, 1)])
def test_successive_halving_is_brute_force(num_runs, num_pieces, eta, min_pieces):
    """Many random cases in one vmapped call."""
    costs = np.stack([random_costs(seed, num_runs, num_pieces, nans=seed % 3 > 0) for seed in range(40)])
    out = jax.jit(jax.vmap(lambda c: replay(SuccessiveHalving(num_pieces, eta, min_pieces), c)))(costs)
    for case, cost in enumerate(costs):
        pieces, best = halve(cost, num_pieces, eta, min_pieces)
        np.testing.assert_array_equal(out.pieces[case], pieces)
        if np.isfinite(cost[best, -1]):
            assert out.best[case] == best
        assert out.num_pieces[case] == num_pieces


@pytest.mark.parametrize(
    ("num_runs", "num_lanes", "num_pieces", "eta", "min_pieces"), [(30, 4, 9, 3, 1), (20, 20, 8, 2, 1), (12, 5, 16, 4, 2), (9, 1, 4, 2, 1)]
)
def test_asynchronous_halving_is_brute_force(num_runs, num_lanes, num_pieces, eta, min_pieces):
    """With few lanes, with one, and with all lanes at once."""
    costs = np.stack([random_costs(seed, num_runs, num_pieces, nans=seed % 3 > 0) for seed in range(40)])
    out = jax.jit(jax.vmap(lambda c: replay(AsynchronousHalving(num_lanes, num_pieces, eta, min_pieces), c)))(costs)
    for case, cost in enumerate(costs):
        pieces, best, time = asynchronous(cost, num_lanes, num_pieces, eta, min_pieces)
        np.testing.assert_array_equal(out.pieces[case], pieces)
        assert out.best[case] == best
        assert out.num_pieces[case] == time
    assert (np.asarray(out.pieces) > 0).all()  # everybody has a turn


def test_equal_costs_all_go_on_in_asha_and_the_first_in_halving():
    """Whoever is no worse than the threshold stays, so equal runs are treated alike where numbers need not come out even."""
    costs = jnp.zeros((6, 4))
    np.testing.assert_array_equal(replay(AsynchronousHalving(6, 4, 2), costs).pieces, [4] * 6)
    np.testing.assert_array_equal(replay(SuccessiveHalving(4, 2), costs).pieces, [4, 2, 2, 1, 1, 1])


@dataclasses.dataclass(frozen=True)
class Config:
    curve: object = None


@pytest.mark.parametrize("rule", [SuccessiveHalving(6, 2), AsynchronousHalving(4, 6, 3)])
@pytest.mark.parametrize("largest", [False, True])
def test_replay_is_the_search(rule, largest):
    """A search whose trials read their curve from a table does what `replay` says, and finds the largest as it finds the smallest."""
    costs = random_costs(0, 12, 6)
    scores = -costs if largest else costs

    def make(config):
        def advance(age, num_steps):
            return age + num_steps, {"score": config.curve[age]}

        return Trial(lambda: jnp.zeros((), jnp.int32), advance)

    found = search(make, Config(), [{"curve": curve} for curve in scores], rule, metric="score", piece_steps=1, batch_size=1, largest=largest)
    out = replay(rule, jnp.asarray(costs))
    np.testing.assert_array_equal(found.table()["pieces"], out.pieces)
    assert found.best() == out.best
    assert found.history["piece"].max() == int(out.num_pieces)
    expected = scores[np.arange(12), found.table()["pieces"] - 1]
    np.testing.assert_array_equal(found.table()["score"], expected)


def test_refusals():
    with pytest.raises(ValueError, match="`eta` must be an integer of at least 2, got 1"):
        SuccessiveHalving(9, 1)
    with pytest.raises(ValueError, match="`num_pieces` must be an integer of at least 4, got 3"):
        AsynchronousHalving(2, 3, min_pieces=4)
    with pytest.raises(ValueError, match="`num_lanes` must be an integer of at least 1, got 0"):
        AsynchronousHalving(0, 3)
    with pytest.raises(ValueError, match="`costs` must cover the 9 pieces of the rule, got 4"):
        replay(SuccessiveHalving(9), jnp.zeros((3, 4)))
