"""Couplings against scipy's assignment, a plain Sinkhorn and C²OT's definitions; what they do to conditions; batches of pairs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import linear_sum_assignment

from ergodax.core import fit
from ergodax.testing import assert_mean
from ergodax.transport import LinearInterpolant, VelocityLoss, ZeroGamma
from ergodax.transport.coupling import EntropicCoupling, IndependentCoupling, MatchedShare, OptimalCoupling, PairBatches, cosine_distances
from ergodax.transport.samples import Samples


KEY = jax.random.key(0)
X0, X1 = jax.random.normal(jax.random.key(1), (2, 16, 2))
X1 = 2 * X1 + 0.5
LABELS = jnp.arange(16) % 3
CONDITION = jnp.stack([X1[:, 0] + 0.1, 1 + X1[:, 1] ** 2], 1)
COST = np.sum((np.asarray(X1)[:, None] - np.asarray(X0)) ** 2, -1)
SQUARED = np.sum((np.asarray(CONDITION)[:, None] - np.asarray(CONDITION)) ** 2, -1)


def assigned(cost):
    return X0[linear_sum_assignment(cost)[1]]


def test_independent_coupling_is_a_shuffle():
    """Of 16 rows, each goes to each place with probability 1/16."""
    shuffled = jax.jit(jax.vmap(lambda key: IndependentCoupling()(key, X1[:, :1], jnp.arange(16.0)[:, None], None)[:, 0]))(
        jax.random.split(KEY, 2000)
    )
    np.testing.assert_array_equal(jnp.sort(shuffled, 1), jnp.broadcast_to(jnp.arange(16.0), shuffled.shape))
    assert_mean(shuffled[:, :, None] == jnp.arange(16.0), jnp.full((16, 16), 1 / 16))


def test_optimal_coupling_of_squared_distances():
    np.testing.assert_array_equal(OptimalCoupling()(KEY, X1, X0, None), assigned(COST))
    # another exponent has another optimum on these draws
    assert not np.array_equal(assigned(np.sqrt(COST)), assigned(COST))
    images = lambda x: x.reshape(16, 1, 2, 1)  # noqa: E731
    np.testing.assert_array_equal(OptimalCoupling()(KEY, images(X1), images(X0), None).reshape(16, 2), assigned(COST))


def test_condition_weight_adds_to_the_squared_distance():
    """M + w C with M not halved; swept over w; d chosen; C²OT's cosine distance. Rows of `args` add up."""
    weights = jnp.array([0.0, 0.03, 0.3, 3.0])
    swept = jax.jit(jax.vmap(lambda w: OptimalCoupling(w)(KEY, X1, X0, CONDITION)))(weights)
    expected = [assigned(COST + float(w) * SQUARED) for w in weights]
    np.testing.assert_array_equal(swept, expected)
    assert len({np.asarray(e).tobytes() for e in expected}) == 4
    np.testing.assert_array_equal(OptimalCoupling(0.3)(KEY, X1, X0, {"a": CONDITION[:, 0], "b": CONDITION[:, 1]}), expected[2])
    unit = np.asarray(CONDITION) / np.linalg.norm(CONDITION, axis=1, keepdims=True)
    np.testing.assert_allclose(cosine_distances(CONDITION, CONDITION), 1 - unit @ unit.T, atol=1e-12)
    by_angle = OptimalCoupling(5.0, cosine_distances)(KEY, X1, X0, CONDITION)
    np.testing.assert_array_equal(by_angle, assigned(COST + 5 * (1 - unit @ unit.T)))


def test_labels_are_kept_apart():
    """`within_condition`, an infinite weight, and scipy with those pairs forbidden agree; weight 0 does not."""
    expected = assigned(np.where(np.asarray(LABELS)[:, None] == np.asarray(LABELS), COST, 1e6))
    np.testing.assert_array_equal(OptimalCoupling(within_condition=True)(KEY, X1, X0, LABELS), expected)
    np.testing.assert_array_equal(OptimalCoupling(jnp.inf)(KEY, X1, X0, LABELS), expected)
    assert not np.array_equal(OptimalCoupling(0.0)(KEY, X1, X0, LABELS), expected)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3])
def test_matched_share(share):
    """The definition of C²OT: mean(M + w C <= diag M), at w at least the share, just above it less."""
    weight = float(MatchedShare(share)(jnp.asarray(COST), jnp.asarray(SQUARED)))
    matched = lambda w: np.mean(COST + w * SQUARED <= np.diag(COST)[:, None])  # noqa: E731
    assert weight > 0
    assert matched(weight * (1 - 1e-9)) >= share
    assert matched(weight * (1 + 1e-9)) < share
    np.testing.assert_array_equal(OptimalCoupling(MatchedShare(share))(KEY, X1, X0, CONDITION), assigned(COST + weight * SQUARED))


def test_matched_share_at_its_ends():
    cost, squared = jnp.asarray(COST), jnp.asarray(SQUARED)
    assert MatchedShare(0.9)(cost, squared) == 0
    assert MatchedShare(1 / 16)(cost, jnp.asarray(LABELS[:, None] != LABELS, float)) == jnp.inf
    np.testing.assert_array_equal(
        OptimalCoupling(MatchedShare(1 / 16))(KEY, X1, X0, LABELS), OptimalCoupling(within_condition=True)(KEY, X1, X0, LABELS)
    )


def sinkhorn(cost, epsilon):
    """The plan by plain alternate normalisation, far beyond any tolerance."""
    kernel = np.exp(-cost / epsilon)
    for _ in range(5000):
        kernel /= kernel.sum(0)
        kernel /= kernel.sum(1, keepdims=True)
    return kernel


def test_entropic_plan():
    """ε KL against half of M + w C; within labels block by block."""
    plan = lambda epsilon: jnp.exp(EntropicCoupling(epsilon, 0.03, tolerance=1e-9).log_plan(X1, X0, CONDITION))  # noqa: E731
    epsilons = jnp.array([2.0, 4.0, 10.0])
    np.testing.assert_allclose(jax.jit(jax.vmap(plan))(epsilons), [sinkhorn((COST + 0.03 * SQUARED) / 2, float(e)) for e in epsilons], atol=1e-7)

    apart = jax.jit(lambda: jnp.exp(EntropicCoupling(1.0, within_condition=True, tolerance=1e-9).log_plan(X1, X0, LABELS)))()
    expected = np.zeros((16, 16))
    for label in range(3):
        rows = np.ix_(label == LABELS, label == LABELS)
        expected[rows] = sinkhorn(COST[rows] / 2, 1.0)
    np.testing.assert_allclose(apart, expected, atol=1e-7)


def test_entropic_draws():
    """Row b of the plan is the law of the source of target b; a small ε tends to the optimal assignment."""
    couple = jax.jit(jax.vmap(lambda key, epsilon: EntropicCoupling(epsilon, max_iterations=20_000)(key, X1, X0, None), in_axes=(0, None)))
    keys = jax.random.split(KEY, 2000)
    which = jnp.argmin(jnp.sum((couple(keys, 1.0)[:, :, None] - X0) ** 2, -1), -1)
    plan = sinkhorn(COST / 2, 1.0)
    frequent = plan > 0.01  # a z-score of rarer events is no normal variable
    assert_mean((which[:, :, None] == jnp.arange(16))[:, frequent], plan[frequent])
    np.testing.assert_array_equal(couple(keys, 0.005)[0], assigned(COST))


def test_couplings_skew_the_source_of_a_condition_unless_told():
    """Targets ±2 by their label: without labels optimal transport gives each label one half of N(0, 1), of mean ±√(2/π) = ±0.80; within labels the
    sources of each stay N(0, 1)."""
    labels = jnp.arange(32) % 2
    target = jnp.where(labels == 1, 2.0, -2.0)[:, None]

    @jax.jit
    @jax.vmap
    def means(key):
        source = jax.random.normal(key, (32, 1))
        moved = [coupling(key, target, source, labels) for coupling in COUPLINGS]
        return jnp.stack([jnp.sum(jnp.where(labels[:, None] == 1, m, 0)) / 16 for m in moved])

    optimal, within, entropic_within = means(jax.random.split(KEY, 200)).T
    # E of the mean of the upper 16 of 32 normals: 0.7979 less O(1/32)
    assert abs(optimal.mean() - 0.7979) < 0.03
    assert_mean(within, 0.0)
    assert_mean(entropic_within, 0.0)


COUPLINGS = (OptimalCoupling(), OptimalCoupling(within_condition=True), EntropicCoupling(0.5, within_condition=True))


def test_dtype_and_refusals():
    x0, x1 = X0.astype(jnp.float32), X1.astype(jnp.float32)
    for coupling in (IndependentCoupling(), OptimalCoupling(MatchedShare(0.2)), EntropicCoupling(1.0, 0.5)):
        assert jax.eval_shape(coupling, KEY, x1, x0, CONDITION.astype(jnp.float32)).dtype == jnp.float32
    for coupling in (OptimalCoupling(1.0), EntropicCoupling(1.0, within_condition=True)):
        with pytest.raises(ValueError, match="`args` is empty"):
            coupling(KEY, X1, X0, None)
    for make in (lambda: OptimalCoupling(-1.0), lambda: EntropicCoupling(0.0), lambda: MatchedShare(1.5)):
        with pytest.raises(ValueError, match="must lie in"):
            make()


def test_pair_batches():
    """Draws from samples of unequal sizes, the conditions with their rows; trained through `fit`."""
    source, rows = Samples(jnp.arange(5.0)[:, None], jnp.array([0.0, 1.0, 1.0, 2.0, 4.0])), 10 + jnp.arange(3.0)[:, None]
    batches = PairBatches(source, Samples(rows), {"row": jnp.arange(3)}, 64)
    drawn0, drawn1, args = jax.jit(jax.vmap(lambda key: batches(key, 0)))(jax.random.split(KEY, 200))
    assert drawn0.shape == drawn1.shape == (200, 64, 1)
    np.testing.assert_array_equal(drawn1[..., 0] - 10, args["row"])
    assert_mean(jnp.mean(drawn0 == jnp.arange(1, 5.0), 1), source.weights[1:] / 8)
    assert_mean(jnp.mean(drawn1 == rows[:, 0], 1), jnp.full(3, 1 / 3))
    assert_mean(jnp.mean((drawn0 - 3.125) * (drawn1 - 11), (1, 2)), 0.0)  # independent of each other

    loss = VelocityLoss(LinearInterpolant(ZeroGamma()), coupling=OptimalCoupling(within_condition=True), antithetic=False)
    with jax.numpy_dtype_promotion("standard"):
        fitted = fit(loss, Constant(jnp.zeros(1)), optax.sgd(0.1), batches, KEY, num_steps=100, every=100, ema_decay=0.98)
    # the mean of x₁ - x₀ is 11 - 3.125; each batch's has standard deviation √(2/3 + 1.36)/8 = 0.18, of which averaging leaves less than a third
    assert abs(float(fitted.average.value[0]) - 7.875) < 0.25
    with pytest.raises(ValueError, match="3 rows of the target"):
        PairBatches(source, Samples(rows), jnp.zeros(4), 8)


class Constant(eqx.Module):
    value: jax.Array

    def __call__(self, t, x, args):
        return self.value
