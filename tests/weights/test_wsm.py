"""WSM: coefficients and decays, the identity with re-weighted updates, the ring against a list, and the exact moments of a noisy quadratic."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.data import NoisyQuadratic
from ergodax.schedules import cosine_cooldown, linear_cooldown, sqrt_cooldown
from ergodax.weights import (
    WSM,
    decay_to_merge,
    inverse_sqrt_decay,
    merge,
    merge_coefficients,
    merge_stacked,
    merge_to_decay,
)


DECAYS = {"linear": linear_cooldown, "sqrt": sqrt_cooldown, "cosine": cosine_cooldown, "inverse sqrt": inverse_sqrt_decay(3.0)}


def test_round_trip():
    weights = jnp.sort(jax.random.uniform(jax.random.key(0), (50,)))[::-1]
    coefficients = decay_to_merge(weights)
    assert (coefficients >= 0).all()
    np.testing.assert_allclose(coefficients.sum(), 1, rtol=1e-15)
    np.testing.assert_allclose(merge_to_decay(coefficients), weights, rtol=0, atol=1e-15)
    eighths = jnp.arange(7, 0, -1) / 8  # where nothing rounds, to the bit
    np.testing.assert_array_equal(decay_to_merge(eighths), jnp.full(8, 1 / 8))
    np.testing.assert_array_equal(merge_to_decay(jnp.full(8, 1 / 8)), eighths)
    np.testing.assert_array_equal(decay_to_merge(merge_to_decay(decay_to_merge(jnp.array([0.75, 0.5, 0.125])))), [0.25, 0.25, 0.375, 0.125])


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("linear", [0.75, 0.5, 0.25]),
        ("sqrt", [0.5, 1 - np.sqrt(0.5), 1 - np.sqrt(0.75)]),
        ("cosine", [0.5 + np.sqrt(0.125), 0.5, 0.5 - np.sqrt(0.125)]),
        ("inverse sqrt", [1.75**-0.5, 2.5**-0.5, 3.25**-0.5]),
    ],
)
def test_named_decays(decay, expected):
    """At i / (k + 1) of the window for update i; and three of five checkpoints weigh as a window of three."""
    np.testing.assert_allclose(merge_to_decay(merge_coefficients(DECAYS[decay], 4)), expected, rtol=1e-14)
    np.testing.assert_allclose(merge_coefficients(DECAYS[decay], 4), decay_to_merge(jnp.array(expected)), rtol=0, atol=1e-15)
    partial = merge_coefficients(DECAYS[decay], 5, jnp.int32(3))
    np.testing.assert_allclose(partial, [*merge_coefficients(DECAYS[decay], 3), 0, 0], rtol=0, atol=1e-15)
    assert merge_coefficients(DECAYS[decay], 1) == 1


def network(key):
    """A raw Module: weights of two dtypes, functions, None, integers."""
    one, two = jax.random.split(key)
    return {
        "mlp": eqx.nn.MLP(2, 3, 4, 1, key=one),
        "half": jax.random.normal(two, (5,), jnp.float32),
        "step": jnp.int32(7),
        "none": None,
    }


def trajectory(updates):
    """θ_n and what `updates` make of it, step by step."""
    keys = jax.random.split(jax.random.key(3), updates + 1)
    models = [network(keys[0])]
    for i, key in enumerate(keys[1:]):
        step = eqx.filter(network(key), eqx.is_inexact_array)
        model = eqx.apply_updates(models[-1], jax.tree.map(lambda leaf: -0.1 * leaf, step))
        models.append(model | {"step": jnp.int32(8 + i)})
    return models


def arrays(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))


def test_merge_is_a_replay():
    """θ_n - Σ w_i g_{n+i} for any pytree, and everything else from the last checkpoint."""
    models = trajectory(4)
    weights = jnp.array([0.9, 0.6, 0.35, 0.05])
    merged = merge(models, decay_to_merge(weights))
    leaves = [arrays(model) for model in models]
    for i, leaf in enumerate(arrays(merged)):
        replay = leaves[0][i] - sum(w * (leaves[j][i] - leaves[j + 1][i]) for j, w in enumerate(np.asarray(weights, leaf.dtype)))
        np.testing.assert_allclose(leaf, replay, rtol=0, atol=1e-6 if leaf.dtype == jnp.float32 else 1e-14)
        assert leaf.dtype == leaves[0][i].dtype
    assert merged["step"] == 11
    assert merged["none"] is None
    assert merged["mlp"](jnp.ones(2)).shape == (3,)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves) if eqx.is_array(leaves[0]) else leaves[0], *models)
    together = merge_stacked(stacked, decay_to_merge(weights))
    assert all(np.array_equal(a, b) for a, b in zip(arrays(together), arrays(merged), strict=True))
    assert together["step"] == 11


def test_sums_in_float32():
    """0.5 + 64 · 2⁻⁹ needs more than the 8 bits of bfloat16, which come back only at the end."""
    trees = [{"w": jnp.array([0.5], jnp.bfloat16)}] + [{"w": jnp.array([2.0**-9], jnp.bfloat16)}] * 64
    merged = merge(trees, jnp.ones(65))
    assert merged["w"].dtype == jnp.bfloat16
    assert merged["w"] == 0.625
    turn = merge([{"w": jnp.array([1j])}, {"w": jnp.array([3.0 + 0j])}], jnp.array([0.5, 0.5]))
    assert turn["w"] == 1.5 + 0.5j


@pytest.mark.parametrize("decay", [linear_cooldown, sqrt_cooldown])
def test_ring_equals_list(decay):
    """After every number of stored checkpoints, full or not, inside one scan that stores every other step."""
    rule = WSM(3, decay)
    weights = {"a": jax.random.normal(jax.random.key(1), (10, 2)), "b": jnp.arange(10.0, dtype=jnp.float32), "f": None}

    @jax.jit
    def run(weights):
        def step(state, inputs):
            i, w = inputs
            state = rule.update(state, w, store=i % 2 == 0)
            return state, rule.merge(state, w)

        first = jax.tree.map(lambda leaf: leaf[0], weights)
        state = rule.init(first)
        return rule.merge(state, first), jax.lax.scan(step, state, (jnp.arange(10), weights))

    empty, (state, merged) = run(weights)
    assert all(np.array_equal(empty[name], weights[name][0]) for name in "ab")
    assert state.count == 5
    for i in range(10):
        kept = [{name: weights[name][j] for name in "ab"} for j in range(0, i + 1, 2)][-3:]
        expected = merge(kept, merge_coefficients(decay, len(kept)))
        for name in "ab":
            np.testing.assert_allclose(merged[name][i], expected[name], rtol=1e-6 if name == "b" else 1e-14)
            assert merged[name].dtype == weights[name].dtype


def test_ring_of_a_module():
    models = trajectory(4)
    rule = WSM(2)
    state = rule.init(models[0])
    for model in models:
        state = eqx.filter_jit(rule.update)(state, model)
    assert all(eqx.is_array(leaf) for leaf in jax.tree.leaves(state))
    merged = rule.merge(state, models[-1])
    for a, b, c in zip(arrays(merged), arrays(models[3]), arrays(models[4]), strict=True):
        np.testing.assert_allclose(a, (b + c) / 2, rtol=1e-6)
    assert merged["step"] == 11


@pytest.mark.parametrize(
    ("peak", "against_decay", "against_constant"),
    [(0.1, [0.960, 0.842, 0.672], [1.59, 2.76, 5.51]), (0.5, [0.764, 0.568, 0.395], [4.11, 9.60, 23.62])],
)
def test_noisy_quadratic(peak, against_decay, against_constant):
    """Merged against decayed and constant, by exact second moments: 2000 steps at a constant rate, then a window of k steps.

    The numbers are from a NumPy loop over the covariances of all checkpoints.
    """
    eigenvalues = jnp.geomspace(1.0, 0.01, 20)
    problem = NoisyQuadratic(eigenvalues, 0.1 * eigenvalues, jnp.ones(20))
    windows, steps = jnp.array([30.0, 100.0, 300.0]), jnp.arange(2300.0)

    @jax.jit
    @jax.vmap
    def excess(window):
        after = steps - 1999  # the update's place in the window, from 1
        level = jnp.where(after <= window, peak, 0.0)  # a rate of 0 leaves x where it is
        decayed = level * jnp.clip((window + 1 - after) / (window + 1), 0, 1)
        uniform = ((after >= 0) & (after <= window)).astype(float) / (window + 1)
        return problem.average_excess(level, uniform), problem.excess(decayed), problem.excess(level)

    merged, decayed, constant = excess(windows)
    np.testing.assert_allclose(merged / decayed, against_decay, rtol=0, atol=5e-4)
    np.testing.assert_allclose(constant / merged, against_constant, rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WSM(0), "`num_checkpoints` must be an integer of at least 1, got 0"),
        (lambda: merge([{"a": jnp.ones(2)}], jnp.ones(2)), r"one entry for each of 1 checkpoints .* got \(2,\)"),
        (lambda: merge([{"a": jnp.ones(2)}, {"a": jnp.ones(3)}], jnp.ones(2)), "checkpoint 0 does not fit"),
        (lambda: merge_stacked({"a": jnp.ones((3, 2))}, jnp.ones(2)), r"got shape \(2,\) for first axes \[\(3,\)\]"),
        (lambda: merge_coefficients(linear_cooldown, 3, 4), r"`count` must lie in \[1, 3\], got 4"),
        (lambda: merge_to_decay(jnp.ones(1)), r"`coefficients` must be a vector of at least 2 entries, got shape \(1,\)"),
        (lambda: inverse_sqrt_decay(-1.0), r"`ratio` must lie in .* got -1"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
