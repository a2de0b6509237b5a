"""The graph network against dense matrices, the loss against flow matching within each environment, and populations that training has not seen."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import linear_sum_assignment

from ergodax.core import fit
from ergodax.transport import (
    LinearInterpolant,
    MetaBatch,
    MetaFlow,
    MetaFlowMatchingLoss,
    PopulationBatches,
    PopulationEmbedding,
    PopulationField,
    VelocityLoss,
    ZeroGamma,
    alternating_updates,
    stack_populations,
)


EMBEDDING = PopulationEmbedding(2, 5, 6, 3, 4, key=jax.random.key(0))
FIELD = PopulationField(2, 6, 8, 2, key=jax.random.key(1))
POPULATIONS = [np.random.default_rng(i).standard_normal((n, 2)) for i, n in enumerate((9, 3, 1, 12))]
embed = jax.jit(lambda points, weights: EMBEDDING(points, weights))


def dense(points, weights):
    """D^{-1/2} (A + I) D^{-1/2} with the degrees of a directed graph, built edge by edge."""
    n = len(points)
    distance = np.linalg.norm(points[:, None] - points, axis=-1) + np.diag(np.full(n, np.inf))
    adjacency = np.eye(n)
    for i in range(n):
        adjacency[i, np.argsort(distance[i])[: min(4, n - 1)]] = 1
    adjacency /= adjacency.sum(1, keepdims=True)
    h = points
    for i, layer in enumerate(EMBEDDING.layers):
        h = adjacency @ (np.maximum(h, 0) if i else h) @ np.asarray(layer.weight).T + np.asarray(layer.bias)
    pooled = np.average(h, axis=0, weights=weights)
    return pooled / np.linalg.norm(pooled)


def test_embedding_against_dense_graph():
    """Any size, any order, any filling; weights count in the mean."""
    points, weights = stack_populations(POPULATIONS)
    for population, filled, present in zip(POPULATIONS, points, weights):
        rng = np.random.default_rng(len(population))
        order, importance = rng.permutation(len(filled)), present * rng.uniform(0.5, 2, len(filled))
        expected = dense(population, importance[: len(population)])
        garbage = np.where(present[:, None] > 0, filled, np.nan)
        np.testing.assert_allclose(embed(garbage[order], importance[order]), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(EMBEDDING(jnp.asarray(POPULATIONS[0])), dense(POPULATIONS[0], np.ones(9)), rtol=1e-10, atol=1e-12)


def batches(**options):
    points, weights = stack_populations(POPULATIONS)
    target, target_weights = stack_populations([np.repeat(points, 2, 0) + 10 * (i + 1) for i, points in enumerate(POPULATIONS)])
    if options.get("paired"):
        target, target_weights = points + 10 * np.arange(1, 5)[:, None, None], weights
    return PopulationBatches(points, weights, target, target_weights, np.arange(4.0)[:, None], **options)


@pytest.mark.parametrize("paired", [False, True])
def test_batches(paired):
    """Every pair is of one environment, whose condition and population come along; nothing absent is drawn; paired rows stay together."""
    draw = batches(num_environments=3, num_pairs=40, population_size=5, paired=paired)
    batch = jax.tree.map(np.asarray, jax.jit(lambda key: draw(key, 0))(jax.random.key(2)))
    assert len(set(batch.condition[:, 0].tolist())) == 3
    for i, number in enumerate(batch.condition[:, 0].astype(int)):
        population = POPULATIONS[number]
        shift = 10 * (number + 1)
        assert {*batch.source[i, :, 0].tolist()} <= {*population[:, 0].tolist()}
        nearest = np.abs(batch.target[i][:, None] - shift - population).sum(-1).min(1)
        np.testing.assert_allclose(nearest, 0.0, atol=1e-12)
        if paired:
            np.testing.assert_allclose(batch.target[i] - batch.source[i], shift, rtol=1e-12)
        kept = batch.population[i][batch.weights[i] > 0]
        assert len(kept) == min(5, len(population)) == len({*kept[:, 0].tolist()} & {*population[:, 0].tolist()})


def test_draws_follow_the_weights():
    points, weights = np.arange(4.0).reshape(1, 4, 1), np.array([[0.0, 1.0, 3.0, 4.0]])
    batch = PopulationBatches(points, weights, points, weights, num_environments=1, num_pairs=4000)(jax.random.key(3))
    counts = np.bincount(np.asarray(batch.source[0, :, 0]).astype(int), minlength=4)
    expected = 4000 * weights[0] / 8
    assert (np.abs(counts - expected) <= 4 * np.sqrt(expected * (1 - weights[0] / 8))).all()


def environments(m):
    """A batch of m environments with 7 pairs each."""
    points, weights = stack_populations(POPULATIONS)
    source, target = np.random.default_rng(9).standard_normal((2, m, 7, 2))
    return MetaBatch(*map(jnp.asarray, (points[:m], weights[:m], source, target, np.arange(1.0, m + 1)[:, None])))


def by_first_coordinate(key, data, source, args):
    return source[jnp.argsort(source[:, 0])][jnp.argsort(jnp.argsort(data[:, 0]))]


def test_loss_is_flow_matching_within_environments():
    """With the embedding of each environment given, to the digits; with a constant one this is plain flow matching, coupled by transport here."""
    base = VelocityLoss(LinearInterpolant(ZeroGamma()), coupling=by_first_coordinate, antithetic=False)
    batch, key = environments(3), jax.random.key(5)

    @jax.jit
    def compare(constant):
        def plain(embeddings):
            losses = []
            for i, k in enumerate(jax.random.split(key, 3)):
                args = tuple(jnp.broadcast_to(a, (7, a.size)) for a in (embeddings[i], batch.condition[i]))
                losses.append(base(FIELD, (batch.source[i], batch.target[i], args), k)[0])
            return sum(losses) / 3

        meta = MetaFlowMatchingLoss(base)
        pairs = [
            (EMBEDDING, [EMBEDDING(*population) for population in zip(batch.population, batch.weights)]),
            (lambda points, weights: constant, [constant] * 3),
        ]
        return [(meta(MetaFlow(embedding, FIELD), batch, key)[0], plain(given)) for embedding, given in pairs]

    for own, expected in compare(jnp.linspace(-1, 1, 5)):
        np.testing.assert_allclose(own, expected, rtol=1e-12)


def test_loss_is_the_regression_of_the_paper():
    """½ E|v(x_t | φ(p₀)) - (x₁ - x₀)|² less its constant, at one time, and its gradient reaches φ."""
    batch = environments(2)
    loss = MetaFlowMatchingLoss(VelocityLoss(LinearInterpolant(ZeroGamma()), times=lambda key, n: jnp.full(n, 0.3), antithetic=False))

    def regression(embedding):
        def point(x0, x1, e, condition):
            return jnp.sum((FIELD(0.3, 0.7 * x0 + 0.3 * x1, (e, condition)) - (x1 - x0)) ** 2) - jnp.sum((x1 - x0) ** 2)

        embeddings = jnp.stack([embedding(*population) for population in zip(batch.population, batch.weights)])
        points = jax.vmap(jax.vmap(point, (0, 0, None, None)))(batch.source, batch.target, embeddings, batch.condition)
        return jnp.mean(points) / 2

    both = [regression, lambda embedding: loss(MetaFlow(embedding, FIELD), batch, jax.random.key(7))[0]]
    (value, gradient), own = jax.jit(lambda embedding: [jax.value_and_grad(f)(embedding) for f in both])(EMBEDDING)
    np.testing.assert_allclose(own[0], value, rtol=1e-12)
    for a, b in zip(jax.tree.leaves(own[1]), jax.tree.leaves(gradient)):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
        assert np.abs(a).max() > 0


def wasserstein(x, y):
    cost = np.sum((x[:, None] - y) ** 2, -1)
    return np.mean(cost[linear_sum_assignment(cost)]) ** 0.5


def test_populations_never_seen():
    """The map x - mean(p₀): on new populations W₂ is below a fifth of that of the best field that does not see the population."""
    rng = np.random.default_rng(0)

    def draw(m):
        centres, sizes = 1.5 * rng.standard_normal((m, 2)), rng.integers(15, 30, m)
        return [(centre + 0.5 * rng.standard_normal((n, 2))).astype(np.float32) for centre, n in zip(centres, sizes)]

    before, unseen = draw(256), draw(20)
    data = PopulationBatches(
        *stack_populations(before), *stack_populations([p - p.mean(0) for p in before]), num_environments=16, num_pairs=16, paired=True
    )
    key_embedding, key_field = jax.random.split(jax.random.key(0))
    embedding = PopulationEmbedding(2, 16, 32, 2, 4, key=key_embedding, dtype=jnp.float32)
    model = MetaFlow(embedding, PopulationField(2, 16, 64, 2, 1, key=key_field, dtype=jnp.float32))
    optimiser = optax.adam(optax.cosine_decay_schedule(5e-3, 300))
    with jax.numpy_dtype_promotion("standard"):
        fitted = fit(MetaFlowMatchingLoss(), model, optimiser, data, jax.random.key(1), num_steps=300, every=300)
    move = jax.jit(jax.vmap(lambda p, w: fitted.model.transport(p, w, times=jnp.linspace(0, 1, 6, dtype=jnp.float32))))
    moved = np.asarray(move(*stack_populations(unseen)))
    meta = np.mean([wasserstein(y[: len(p)], p - p.mean(0)) ** 2 for y, p in zip(moved, unseen)]) ** 0.5
    # Flow matching at its optimum turns N(0, 2.5 I), all populations together, into N(0, 0.25 I) by scaling.
    plain = np.mean([wasserstein(0.1**0.5 * p, p - p.mean(0)) ** 2 for p in unseen]) ** 0.5
    assert meta < 0.2 * plain


def test_alternating_updates():
    """Even steps move the field, odd ones the embedding, each with the state of its own optimiser."""
    model = MetaFlow(*(eqx.nn.Linear(1, 1, use_bias=False, key=jax.random.key(i)) for i in range(2)))
    gradient, seen = jax.tree.map(jnp.ones_like, model), []
    with jax.numpy_dtype_promotion("standard"):
        optimiser = alternating_updates(optax.trace(0.5), optax.sgd(0.1))
        state = optimiser.init(model)
        for _ in range(4):
            updates, state = optimiser.update(gradient, state, model)
            seen.append([leaf.item() for leaf in jax.tree.leaves(updates)])
    np.testing.assert_allclose(seen, [(0, 1), (-0.1, 0), (0, 1.5), (-0.1, 0)])


def test_refusals():
    x, w = np.zeros((2, 3, 2)), np.ones((2, 3))
    for populations, message in [([x[0], x[0] * np.nan], "number 1"), ([x[0], np.zeros((3, 1))], "number 1"), ([], "at least one")]:
        with pytest.raises(ValueError, match=message):
            stack_populations(populations)
    for arguments, options, message in [
        ((x, w, x[:1], w[:1]), {"num_environments": 1}, "expected points"),
        ((x, w, x, w[:, :2]), {"num_environments": 1}, "expected points"),
        ((x, w, x, w), {}, "at most 2"),
        ((x, w, x, -w), {"num_environments": 1}, "`target_weights`"),
        ((x, w, x[:, :2], w[:, :2]), {"num_environments": 1, "paired": True}, "paired"),
        ((x, w, x, w), {"num_environments": 1, "num_pairs": 0}, "`num_pairs`"),
    ]:
        with pytest.raises(ValueError, match=message):
            PopulationBatches(*arguments, **options)
    with pytest.raises(ValueError, match="must hold 6 numbers in all, got 2"):
        FIELD(0.5, jnp.zeros(2), jnp.zeros(2))
    with pytest.raises(ValueError, match="`num_neighbours`"):
        PopulationEmbedding(2, num_neighbours=-1, key=jax.random.key(0))
