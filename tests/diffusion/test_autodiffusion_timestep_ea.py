"""AutoDiffusion: the search against brute force over all subsets, its operators, and networks with skipped blocks."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from ergodax.core import DenoiserTerm, VPPath, integrate
from ergodax.data import GaussianMixture
from ergodax.diffusion import DDIM
from ergodax.diffusion.autodiffusion_timestep_ea import SkippingNetwork, TimestepCandidate, TimestepSpace, timestep_grid
from ergodax.diffusion.evolution import Evolution, evolve
from ergodax.diffusion.skipped_blocks import keep_blocks
from ergodax.nn import TimeMLP


T, K = 20, 4
PATH, TIMES = VPPath(), jnp.linspace(0.0, 1.0, T + 1)
MIXTURE = GaussianMixture.isotropic([0.4, 0.6], [[-1.5], [1.0]], [0.3, 0.4])
STARTS = jnp.asarray(norm.ppf((np.arange(100) + 0.5) / 100))[:, None]
DATA = jnp.sort(MIXTURE.sample(jax.random.key(9), 20000)[:, 0]).reshape(100, 200).mean(1)


def cost(candidate):
    """The squared W₂ distance of the samples from 100 quantile starts to the data."""
    grid = timestep_grid(TIMES, candidate.steps)
    end = integrate(DenoiserTerm(MIXTURE.denoiser(PATH), PATH, grid), DDIM(), STARTS)[:, 0]
    return jnp.mean((jnp.sort(end) - DATA) ** 2)


def make_search(space, **options):
    return Evolution(space.random, space.mutate, space.crossover, space.valid, **options)


SPACE = TimestepSpace(T, K)
SEARCH = make_search(SPACE, num_tries=4)
FIRST = TimestepCandidate(jnp.arange(4)[:, None] + jnp.arange(4), jnp.ones((4, 4, 0), bool))


def all_candidates():
    steps = jnp.asarray(list(itertools.combinations(range(T), K)))
    return TimestepCandidate(steps, jnp.ones((len(steps), K, 0), bool))


@functools.cache
def brute_force():
    """The costs of all 4845 candidates, in their order, and as a table over steps."""
    candidates = all_candidates()
    costs = jax.jit(lambda c: jax.lax.map(cost, c, batch_size=512))(candidates)
    return np.asarray(costs), jnp.full((T,) * K, jnp.nan).at[tuple(candidates.steps.T)].set(costs)


@functools.cache
def searches():
    """20 searches in one program, on the table of costs."""
    table = brute_force()[1]

    def one(key):
        first, rest = jax.random.split(key)
        return evolve(rest, SEARCH, lambda c: table[tuple(c.steps)], SEARCH.first(first, 50), 10)

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 20))


def test_against_brute_force():
    """550 evaluations of 4845: within 1 % of the optimum in at least 19 of 20 searches; 550 random subsets are in few."""
    brute, table = brute_force()
    memory = searches()
    costs, counts = np.asarray(memory.costs), np.asarray(memory.count)
    assert np.all(counts == 550)
    assert np.sum(costs.min(1) < 1.01 * brute.min()) >= 19, costs.min(1) / brute.min()
    rng = np.random.default_rng(0)
    assert np.sum([rng.choice(brute, 550, replace=False).min() < 1.01 * brute.min() for _ in range(20)]) < 10
    assert brute.min() < 0.5 * float(cost(SPACE.uniform()))
    # The costs are those of the candidates beside them, and every candidate is new, sorted and without a repeated step.
    steps = np.asarray(memory.candidates.steps[0])
    np.testing.assert_array_equal(costs[0], table[tuple(steps.T)])
    assert len({tuple(s) for s in steps}) == 550
    best, value = SEARCH.best(jax.tree.map(lambda leaf: leaf[0], memory))
    np.testing.assert_allclose(cost(best), value, rtol=1e-9)


def test_generations():
    """A mutant differs from a parent in few steps, a child holds steps of two parents; parents are the best of all before."""
    memory = jax.tree.map(lambda leaf: leaf[0], searches())
    steps, costs = np.asarray(memory.candidates.steps), np.asarray(memory.costs)
    near = []
    for start in range(50, 550, 50):
        parents = [set(s) for s in steps[:start][np.argsort(costs[:start])[:10]]]
        near += [max(len(parent & set(s)) for parent in parents) >= 3 for s in steps[start : start + 25]]
        if start == 50:  # later, parents are alike and their children known: random candidates fill the rest
            pairs = [a | b for a, b in itertools.combinations(parents, 2)]
            assert all(any(set(s) <= pair for pair in pairs) for s in steps[75:100])
    assert np.mean(near) > 0.6  # of random ones it would be 0.13


def test_first_generation():
    random, around = jax.jit(lambda key: (SEARCH.first(key, 21), SEARCH.first(key, 21, around=SPACE.uniform())))(jax.random.key(1))
    for generation in (random, around):
        assert len({tuple(s) for s in np.asarray(generation.steps)}) == 21
    np.testing.assert_array_equal(around.steps[0], [0, 5, 10, 15])
    near = [len(set(np.asarray(s)) & {0, 5, 10, 15}) for s in around.steps[:11]]
    assert np.mean(near) > 2.4 > 1.2 > np.mean([len(set(np.asarray(s)) & {0, 5, 10, 15}) for s in random.steps])


def test_a_small_space_is_exhausted():
    """Two of four times: six candidates; where nothing new is left, known ones come again. A NaN cost is never the best."""
    space = TimestepSpace(4, 2)
    search = make_search(space, num_parents=2, num_mutants=3, num_crossovers=3)

    @jax.jit
    def run(key):
        first = search.first(key, 4)
        return evolve(key, search, lambda c: jnp.where(c.steps[0] == 0, jnp.nan, c.steps.sum().astype(float)), first, 4, batch_size=1)

    memory = run(jax.random.key(1))
    assert len({tuple(s) for s in np.asarray(memory.candidates.steps)}) == 6
    best, value = search.best(memory)
    np.testing.assert_array_equal(best.steps, [1, 2])
    assert value == 3.0


def test_mutation_rates():
    """Each step is replaced with probability 0.1 by one not in the list; the count of kept blocks stays, and they move."""
    space = TimestepSpace(50, 5, num_blocks=4, budget=13, mutation_rate=0.1)
    candidate = jax.jit(space.random)(jax.random.key(0))
    assert int(candidate.keep.sum()) == 13
    assert int(space.uniform().keep.sum()) == 13
    mutants = jax.jit(jax.vmap(space.mutate, in_axes=(0, None)))(jax.random.split(jax.random.key(1), 4000), candidate)
    old = set(np.asarray(candidate.steps))
    kept = np.asarray([len(old & set(s)) for s in np.asarray(mutants.steps)])
    assert abs(kept.mean() - 4.5) < 4.5 * (5 * 0.1 * 0.9 / 4000) ** 0.5
    assert np.all(np.diff(mutants.steps, axis=1) > 0)
    assert np.all(np.asarray(mutants.keep.sum((1, 2))) == 13)
    moved = np.asarray((mutants.keep != candidate.keep).mean(0))
    # An entry moves if it is touched and, of the touched, one of the other kind takes its place: less than 0.1, and more than a fifth of it.
    assert 0.02 < moved.mean() < 0.1
    with_budget = jax.jit(jax.vmap(space.valid))(mutants._replace(keep=mutants.keep.at[:7, 0].set(True)))
    np.testing.assert_array_equal(with_budget, np.asarray(mutants.keep.at[:7, 0].set(True).sum((1, 2))) <= 13)
    child = jax.jit(space.crossover)(jax.random.key(2), candidate, candidate._replace(steps=candidate.steps[::-1]))
    assert bool(jnp.all(jnp.diff(child.steps) >= 0))


def awake(network):
    """`network` with random parameters: fresh blocks are the identity."""
    leaves, structure = jax.tree.flatten(network)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(structure, [jnp.asarray(0.3 * rng.normal(size=leaf.shape)) for leaf in leaves])


def test_skipped_blocks():
    """A network of fewer blocks is the network with these blocks alone, at the steps that ask for it."""
    x = jax.random.normal(jax.random.key(0), (4, 4, 1))
    keep, grid = jnp.array([True, False, True, True, False]), jnp.array([0.1, 0.3, 0.8])

    @jax.jit
    def outputs(network):
        fewer = eqx.tree_at(lambda n: n.blocks, network, jax.tree.map(lambda leaf: leaf[jnp.array([0, 2, 3])], network.blocks))
        skipping = SkippingNetwork(network, grid, jnp.stack([jnp.ones(5, bool), keep]))
        few, all_ = (fewer(0.3, x, None), keep_blocks(network, keep)(0.3, x, None), skipping(0.3, x, None)), (network(0.1, x, None),)
        return few, (*all_, keep_blocks(network, jnp.ones(5, bool))(0.1, x, None), skipping(0.1, x, None))

    network = awake(TimeMLP((4, 4, 1), 8, 5, key=jax.random.key(1)))
    few, whole = outputs(network)
    for ours in few[1:]:
        np.testing.assert_allclose(ours, few[0], rtol=1e-12)
    for ours in whole[1:]:
        np.testing.assert_allclose(ours, whole[0], rtol=1e-12)
    assert float(jnp.abs(few[0] - whole[0]).max()) > 1e-3
    with pytest.raises(ValueError, match=r"`keep` must have shape \(5,\)"):
        keep_blocks(network, jnp.ones(4, bool))
    with pytest.raises(ValueError, match="stacked `blocks`"):
        keep_blocks(lambda t, x, args: x, jnp.ones(4, bool))


def test_refusals():
    for make, message in (
        (lambda: TimestepSpace(3, 4), "`num_times` must be an integer of at least 4"),
        (lambda: TimestepSpace(5, 4, mutation_rate=1.5), "`mutation_rate`"),
        (lambda: TimestepSpace(5, 4, 2, budget=9), "`budget`"),
        (lambda: make_search(SPACE, num_parents=0), "`num_parents`"),
        (lambda: evolve(jax.random.key(0), SEARCH, cost, FIRST, 1), "must hold `num_parents` = 10 candidates, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    memory = SEARCH.init(FIRST, jnp.arange(4.0), 6)
    with pytest.raises(ValueError, match="the memory holds 6 candidates; 4 are told, and 4 more came"):
        SEARCH.tell(memory, FIRST, jnp.arange(4.0))
