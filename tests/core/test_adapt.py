"""The same MLP in Equinox, as a plain function, in linen and in nnx: equal outputs, equal training, no second compilation."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from ergodax.core.adapt import FromFunction, from_linen, from_nnx
from ergodax.testing import count_traces


WIDTH = 8
BATCH = 5
X = jax.random.normal(jax.random.key(1), (BATCH, 2))
T = jnp.linspace(0.1, 0.9, BATCH)
Y = jnp.sin(3 * X)


class EquinoxMLP(eqx.Module):
    inner: eqx.nn.Linear
    outer: eqx.nn.Linear

    def __init__(self, key):
        key_inner, key_outer = jax.random.split(key)
        self.inner, self.outer = eqx.nn.Linear(3, WIDTH, key=key_inner), eqx.nn.Linear(WIDTH, 2, key=key_outer)

    def __call__(self, t, x, args=None, *, key=None):
        return self.outer(jax.nn.silu(self.inner(jnp.append(x, t))))


def function(params, t, x, args):
    h = jax.nn.silu(jnp.append(x, t) @ params["inner"]["kernel"] + params["inner"]["bias"])
    return h @ params["outer"]["kernel"] + params["outer"]["bias"]


class LinenMLP(linen.Module):
    widths: tuple[int, ...] = (WIDTH, 2)

    @linen.compact
    def __call__(self, t, x, args=None):
        dense = partial(linen.Dense, param_dtype=float, dtype=float)
        h = jax.nn.silu(dense(self.widths[0], name="inner")(jnp.append(x, t)))
        return dense(self.widths[1], name="outer")(h)


class NNXMLP(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(3, WIDTH, param_dtype=float, rngs=rngs)
        self.outer = nnx.Linear(WIDTH, 2, param_dtype=float, rngs=rngs)

    def __call__(self, t, x, args=None):
        return self.outer(jax.nn.silu(self.inner(jnp.append(x, t))))


def as_dict(network):
    """The weights of an Equinox MLP in Flax's layout."""
    return {name: {"kernel": layer.weight.T, "bias": layer.bias} for name, layer in (("inner", network.inner), ("outer", network.outer))}


def of_function(weights):
    return FromFunction(function, weights)


def of_linen(weights):
    return from_linen(LinenMLP(), {"params": weights})


def of_nnx(weights):
    module = NNXMLP(nnx.Rngs(0))
    for name, layer in (("inner", module.inner), ("outer", module.outer)):
        layer.kernel[...], layer.bias[...] = weights[name]["kernel"], weights[name]["bias"]
    return from_nnx(module)


#: Each adapter, and how to read the weights back in Flax's layout.
WRAPPED = {
    "function": (of_function, lambda network: network.params),
    "linen": (of_linen, lambda network: network.params["params"]),
    "nnx": (of_nnx, lambda network: nnx.to_pure_dict(network.params[0])),
}
each = pytest.mark.parametrize("name", WRAPPED)


def loss(network, x, y):
    return jnp.mean((jax.vmap(network)(T, x) - y) ** 2)


@eqx.filter_jit
def train(network, num_steps=5):
    optimiser = optax.adam(1e-1)
    params, static = eqx.partition(network, eqx.is_inexact_array)

    def step(carry, _):
        params, state = carry
        gradient = jax.grad(lambda params: loss(eqx.combine(params, static), X, Y))(params)
        updates, state = optimiser.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimiser.init(params)), None, length=num_steps)
    return eqx.combine(params, static)


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """optax and Flax themselves do not run under strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def reference():
    network = EquinoxMLP(jax.random.key(0))
    return network, train(network)


@each
def test_equals_and_trains_as_the_equinox_network(name, reference):
    wrap, read = WRAPPED[name]
    network, trained = reference
    wrapped = wrap(as_dict(network))
    np.testing.assert_allclose(jax.vmap(wrapped)(T, X), jax.vmap(network)(T, X), atol=1e-13)
    assert sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(wrapped, eqx.is_inexact_array))) == 3 * WIDTH + WIDTH + 2 * WIDTH + 2
    moved = read(train(wrapped))
    for actual, expected, start in zip(*map(jax.tree.leaves, (moved, as_dict(trained), as_dict(network)))):
        np.testing.assert_allclose(actual, expected, atol=1e-10)
        assert np.abs(actual - start).min() > 1e-3


@each
def test_a_second_construction_compiles_nothing(name, reference):
    wrap, _ = WRAPPED[name]
    counted, traces = count_traces(lambda network, t, x: network(t, x))
    compiled = eqx.filter_jit(counted)
    for network in reference:
        compiled(wrap(as_dict(network)), T[0], X[0])
    assert traces() == 1


@each
def test_stacked_weights_under_vmap_equal_a_loop(name, reference):
    wrap, _ = WRAPPED[name]
    networks = [wrap(as_dict(network)) for network in reference]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *networks)
    together = eqx.filter_vmap(lambda network: network(T[0], X[0]))(stacked)
    np.testing.assert_allclose(together, jnp.stack([network(T[0], X[0]) for network in networks]), atol=1e-13)


class Batched(linen.Module):
    """A module in the manner of Flax examples: x first, batches only, labels embedded, a flag for training."""

    @linen.compact
    def __call__(self, x, t, label, train):
        dense = partial(linen.Dense, param_dtype=float, dtype=float)
        h = linen.Conv(4, (3, 3), param_dtype=float, dtype=float)(x)
        h = h + dense(4)(t[:, None])[:, None, None] + linen.Embed(3, 4, param_dtype=float, dtype=float)(label)[:, None, None]
        h = linen.BatchNorm(use_running_average=True, param_dtype=float, dtype=float)(h)
        h = linen.Dropout(0.5, deterministic=not train)(h)
        return dense(1)(h)


def image_call(apply, t, x, args, key):
    return apply(x, t, args, train=key is not None)


def test_linen_batches_order_of_arguments_dropout_and_batch_statistics():
    module = Batched()
    x, label = jax.random.normal(jax.random.key(3), (BATCH, 4, 4, 1)), jnp.asarray([0, 1, 2, 1, 0])
    variables = module.init(jax.random.key(0), x, T, label, train=False)
    variables = jax.tree.map(lambda a: a + 0.3, variables)
    batch = module.apply(variables, x, T, label, train=False)
    # As it is, it takes batches; with a batch axis added, one example.
    np.testing.assert_allclose(from_linen(module, variables, call=image_call)(T, x, label), batch, atol=1e-13)
    one = from_linen(module, variables, call=image_call, batched=True)
    np.testing.assert_allclose(jax.vmap(one)(T, x, label), batch, atol=1e-13)

    first, again, other = (one(T[0], x[0], label[0], key=jax.random.key(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, batch[0])

    gradient = eqx.filter_grad(lambda network: jnp.sum(network(T[0], x[0], label[0]) ** 2))(one)
    assert all(leaf.any() for leaf in jax.tree.leaves(gradient.params["params"]))
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient.params["batch_stats"]))


class NoisyNNX(nnx.Module):
    def __init__(self, rngs):
        self.inner, self.outer = nnx.Linear(2, 16, rngs=rngs), nnx.Linear(16, 2, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(16, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, t, x, args=None):
        return self.outer(self.dropout(self.norm(self.inner(x))))


def test_nnx_dropout_and_batch_statistics():
    module = NoisyNNX(nnx.Rngs(0))
    network = from_nnx(module)
    x = X[0].astype(jnp.float32)
    module.eval()
    np.testing.assert_allclose(network(T[0], x), module(T[0], x), atol=1e-6)
    first, again, other = (network(T[0], x, key=jax.random.key(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, network(T[0], x))
    gradient = eqx.filter_grad(lambda network: jnp.sum(network(T[0], x) ** 2))(network)
    assert all(leaf.any() for leaf in jax.tree.leaves(gradient.params[0]))
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient.params[1]))


def test_trained_nnx_weights_go_back(reference):
    network = of_nnx(as_dict(reference[0]))
    module = NNXMLP(nnx.Rngs(3))
    nnx.update(module, network.params[0])
    np.testing.assert_allclose(module(T[0], X[0]), network(T[0], X[0]), atol=1e-13)


def test_a_function_may_take_args_and_a_key():
    def noisy(params, t, x, args, *, key):
        return params * x + args + (0 if key is None else jax.random.normal(key, x.shape))

    network = FromFunction(noisy, jnp.asarray(2.0), uses_key=True)
    np.testing.assert_allclose(network(0.1, X[0], 1.5), 2 * X[0] + 1.5)
    expected = 2 * X[0] + 1.5 + jax.random.normal(jax.random.key(4), (2,))
    np.testing.assert_allclose(network(0.1, X[0], 1.5, key=jax.random.key(4)), expected)
    # Without `uses_key`, the key is dropped.
    np.testing.assert_allclose(FromFunction(lambda p, t, x, args: p * x, 3.0)(0.1, X[0], key=jax.random.key(0)), 3 * X[0])


class Unhashable(linen.Module):
    widths: list

    def __call__(self, t, x, args=None):
        return x


def test_refuses():
    with pytest.raises(ValueError, match=r"flax.linen.Module, got NNXMLP"):
        from_linen(NNXMLP(nnx.Rngs(0)), {"params": {}})
    with pytest.raises(ValueError, match=r"flax.nnx.Module, got LinenMLP"):
        from_nnx(LinenMLP())
    with pytest.raises(ValueError, match=r"'params'.*\['kernel'\]"):
        from_linen(LinenMLP(), {"kernel": jnp.ones(2)})
    with pytest.raises(ValueError, match="hashable"):
        from_linen(Unhashable([1, 2]), {"params": {}})
    with pytest.raises(ValueError, match=r"shape \(2,\) and returned \(1, 2\); does it need `batched=True`"):
        FromFunction(lambda p, t, x, args: x[None], ())(0.1, X[0])
