"""Each network against its equations, written out in numpy, and against its number of parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.nn import DiT, FourierTime, LabelEmbedding, TimeMLP, UNet
from ergodax.nn.dit import patchify, position_code, unpatchify
from ergodax.nn.layers import Attention, Conv, Linear, conv_as_convolution, conv_as_product, dropout, group_normalise, normalise, scan_layers


KEY = jax.random.key(7)
RNG = np.random.default_rng(3)
IMAGE = RNG.normal(size=(4, 4, 3))


def random_network(make, scale=0.3):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.asarray(scale * rng.normal(size=a.shape)), jax.eval_shape(make, KEY))


def size(make):
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(make, KEY)))


def run(network, t, x, args=None):
    return jax.jit(lambda network, x: network(t, x, args))(network, jnp.asarray(x))


def silu(x):
    return x / (1 + np.exp(-x))


def dense(layer, x):
    return x @ np.asarray(layer.weight) + (0 if layer.bias is None else np.asarray(layer.bias))


def standard(x, axis=-1):
    return (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + 1e-6)


def group_standard(x, groups):
    return standard(x.reshape(*x.shape[:2], groups, -1), (0, 1, 3)).reshape(x.shape)


def conv(layer, x):
    """Padding `SAME` needs one row and column before and after at stride 1, and one after at stride 2 (even sides)."""
    h, w, _ = x.shape
    x = np.pad(x, ((2 - layer.stride, 1),) * 2 + ((0, 0),))
    rows, columns = range(0, h, layer.stride), range(0, w, layer.stride)
    windows = np.asarray([[x[i : i + 3, j : j + 3] for j in columns] for i in rows])
    return np.einsum("rcijk,ijkl->rcl", windows, np.asarray(layer.weight)) + np.asarray(layer.bias)


def attend(layer, x):
    """One head at a time."""
    q, k, v = np.split(dense(layer.qkv, x), 3, -1)
    d, out = q.shape[-1] // layer.heads, []
    for i in range(layer.heads):
        part = slice(i * d, (i + 1) * d)
        weights = np.exp(q[:, part] @ k[:, part].T / np.sqrt(d))
        out.append(weights / weights.sum(-1, keepdims=True) @ v[:, part])
    return dense(layer.out, np.concatenate(out, -1))


def condition(c, t, label=None):
    value = dense(c.out, silu(dense(c.hidden, fourier(t, 64, 100))))
    return silu(value if label is None else value + np.asarray(c.label.weight)[label])


def fourier(t, size, max_frequency):
    frequency = max_frequency ** (np.arange(size // 2) / (size // 2 - 1))
    return np.concatenate([np.cos(frequency * t), np.sin(frequency * t)])


def test_layers():
    for stride in (1, 2):
        layer = random_network(lambda key, stride=stride: Conv(3, 5, stride=stride, key=key))
        for way in (conv_as_product, conv_as_convolution):
            np.testing.assert_allclose(way(jnp.asarray(IMAGE), layer.weight, stride) + layer.bias, conv(layer, IMAGE), atol=1e-12)
    layer = random_network(lambda key: Attention(8, 2, key=key), scale=1.0)
    tokens = RNG.normal(size=(5, 8))
    np.testing.assert_allclose(jax.jit(lambda layer, x: layer(x))(layer, jnp.asarray(tokens)), attend(layer, tokens), atol=1e-12)
    np.testing.assert_allclose(jax.jit(normalise)(jnp.asarray(tokens)), standard(tokens), atol=1e-12)


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (6, 1), (12, 3), (256, 32)])
def test_groups_of_group_norm(channels, groups):
    """Four channels a group where that divides, and at most 32 groups."""
    x = RNG.normal(size=(2, 2, channels))
    np.testing.assert_allclose(jax.jit(group_normalise)(jnp.asarray(x)), group_standard(x, groups), atol=1e-12)


@pytest.mark.parametrize(("make", "fans"), [(lambda: Linear(40, 60, key=KEY), 100), (lambda: Conv(12, 20, key=KEY), 9 * 32)], ids=["linear", "conv"])
def test_weights_start_as_glorot_and_bengio_say(make, fans):
    """Uniform on ±√(6/(in + out)): of n draws the largest |u| is within a factor 1 - 12/n of the end but for e⁻¹², and the variance is limit²/3."""
    layer = make()
    limit, weight = np.sqrt(6 / fans), np.asarray(layer.weight)
    assert limit * (1 - 12 / weight.size) < np.abs(weight).max() <= limit
    # The variance of u² is limit⁴ (1/5 - 1/9).
    z = (np.mean(weight**2) - limit**2 / 3) / (limit**2 * np.sqrt(4 / 45 / weight.size))
    assert abs(z) < 4.5
    assert not layer.bias.any()


def test_label_rows_start_small():
    """N(0, 0.02²): the mean square of n draws has relative standard error √(2/n)."""
    rows = np.asarray(LabelEmbedding(15, 64, key=KEY).weight)
    assert abs(np.mean(rows**2) / 0.02**2 - 1) < 4.5 * np.sqrt(2 / rows.size)
    assert abs(rows.mean()) < 4.5 * 0.02 / np.sqrt(rows.size)


def test_low_precision_norms_compute_wide():
    """Around 1000 bfloat16 steps by 4 and a mean in bfloat16 is off by as much; in float32 the norm is right to bfloat16's rounding of its result."""
    x = jnp.asarray(1000 + 8 * RNG.normal(size=64), jnp.bfloat16)
    expected = standard(np.asarray(x, float))
    np.testing.assert_allclose(np.asarray(jax.jit(normalise)(x), float), expected, atol=2**-8 * np.abs(expected).max())


def test_low_precision_softmax_computes_wide():
    """Tokens (16, 1, 0, 0) and (16, 0, 0, 0) have products 257, 256 and 256, 256, which bfloat16 cannot tell apart: the weights would all be 1/2."""
    layer = jax.eval_shape(lambda key: Attention(4, 1, key=key, dtype=jnp.bfloat16), KEY)
    weights = np.concatenate([np.eye(4)] * 3, 1), np.eye(4), np.zeros(4)
    layer = jax.tree.unflatten(jax.tree.structure(layer), [jnp.asarray(w, jnp.bfloat16) for w in weights])
    out = jax.jit(lambda layer, x: layer(x))(layer, jnp.asarray([[16, 1, 0, 0], [16, 0, 0, 0]], jnp.bfloat16))
    np.testing.assert_allclose(np.asarray(out, float)[:, 1], [1 / (1 + np.exp(-0.5)), 0.5], atol=2**-8)


def test_dropout_keeps_the_mean():
    x = np.asarray(dropout(jnp.ones(20000, jnp.float32), 0.3, KEY))
    np.testing.assert_allclose(np.unique(x), [0, 1 / 0.7], rtol=1e-6)
    assert abs(np.mean(x == 0) - 0.3) < 4.5 * np.sqrt(0.3 * 0.7 / 20000)


def test_fourier_time():
    """Frequencies geometric from 1 to the maximum; at least float32, where [0, 1] is right to 1e-5."""
    np.testing.assert_allclose(FourierTime(8, 27.0)(0.7), [f(0.7 * w) for f in (np.cos, np.sin) for w in (1, 3, 9, 27)], atol=1e-14)
    t = np.linspace(0, 1, 101).astype(np.float32)
    low = jax.jit(jax.vmap(FourierTime()))(jnp.asarray(t))
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, [fourier(float(s), 64, 100) for s in t], atol=1e-5)
    assert jax.eval_shape(FourierTime(), jnp.bfloat16(0.5)).dtype == jnp.float32
    np.testing.assert_allclose(FourierTime(8, 27.0)(1), fourier(1.0, 8, 27), atol=1e-14)


@pytest.mark.parametrize("depth", [2, 6])
def test_mlp_is_its_formula(depth):
    """Also past four blocks, where the layers are scanned and not unrolled."""
    network = random_network(lambda key: TimeMLP((3,), 8, depth, 2, key=key))
    x = np.asarray([0.5, -1.0, 2.0])
    c = condition(network.conditioning, 0.4, 1)
    h = dense(network.inner, x)
    for i in range(depth):
        block = jax.tree.map(lambda a, i=i: a[i], network.blocks)
        shift, scale = np.split(dense(block.modulation, c), 2)
        h = h + dense(block.out, silu(dense(block.hidden, h) * (1 + scale) + shift))
    shift, scale = np.split(dense(network.modulation, c), 2)
    np.testing.assert_allclose(run(network, 0.4, x, 1), dense(network.outer, silu(h) * (1 + scale) + shift), atol=1e-11)


def unet():
    return random_network(lambda key: UNet((4, 4, 3), 4, (1, 2), 2, num_blocks=2, heads=2, key=key))


def test_unet_is_its_graph():
    """Two levels of two blocks, written out: on the way up each block meets one of the same level of the way down, last made first used."""
    network = unet()
    c = condition(network.conditioning, 0.4, 1)

    def norm(n, h):
        return group_standard(h, h.shape[-1] // 4) * (1 + np.asarray(n.scale)) + np.asarray(n.shift)

    def block(b, *parts):
        h = np.concatenate(parts, -1)
        shift, scale = np.split(dense(b.modulation, c), 2)
        y = conv(b.conv1, silu(norm(b.norm, h)))
        y = conv(b.conv2, silu(group_standard(y, y.shape[-1] // 4) * (1 + scale) + shift))
        return y + (h if b.shortcut is None else dense(b.shortcut, h))

    down, up, attention = network.down, network.up, network.attention
    first = block(down[0][0], conv(network.inner, IMAGE))
    second = block(down[0][1], first)
    third = block(down[1][0], conv(network.downsample[0], second))
    fourth = block(down[1][1], third)
    h = block(network.middle[0], fourth)
    h = h + attend(attention.attention, norm(attention.norm, h).reshape(4, 8)).reshape(2, 2, 8)
    h = block(network.middle[1], h)
    h = block(up[1][1], block(up[1][0], h, fourth), third)
    h = conv(network.upsample[0], np.kron(h, np.ones((2, 2, 1))))
    h = block(up[0][1], block(up[0][0], h, second), first)
    expected = conv(network.outer, silu(norm(network.norm, h)))
    np.testing.assert_allclose(run(network, 0.4, IMAGE, 1), expected, atol=1e-10)


def test_unet_uses_every_skip():
    """Cutting any one of them (the last columns of the block that reads it) changes the output."""
    network = unet()
    evaluate = jax.jit(lambda network: network(0.4, jnp.asarray(IMAGE), 1))
    whole = evaluate(network)
    for level, i in ((0, 0), (0, 1), (1, 0), (1, 1)):

        def read(network, level=level, i=i):
            return network.up[level][i].conv1.weight, network.up[level][i].shortcut.weight

        skipped = 4 * (level + 1)
        weights = [np.concatenate([w[..., :-skipped, :], np.zeros_like(w[..., -skipped:, :])], -2) for w in map(np.asarray, read(network))]
        cut = eqx.tree_at(read, network, [jnp.asarray(w) for w in weights])
        assert np.abs(evaluate(cut) - whole).max() > 1e-3


def test_unet_goes_from_28_to_14_to_7():
    network = jax.eval_shape(lambda key: UNet((28, 28, 1), 8, (1, 2, 2), heads=2, key=key), KEY)
    text = str(jax.make_jaxpr(lambda n, x: n(0.5, x))(network, jnp.zeros((28, 28, 1))))
    assert all(f"f64[1,{side},{side},16]" in text for side in (14, 7))
    assert "f64[2,49,49]" in text  # attention weights: heads, 7 · 7 queries, 7 · 7 keys


def test_patches():
    """Tokens in reading order, each the square it names; there and back is exact, also for images that are not square."""
    x = jnp.asarray(RNG.normal(size=(4, 6, 3)))
    tokens = patchify(x, 2)
    assert tokens.shape == (6, 12)
    assert np.array_equal(tokens[4], np.asarray(x)[2:4, 2:4].reshape(-1))
    assert np.array_equal(unpatchify(tokens, (4, 6, 3), 2), x)


def test_position_code():
    row, column = 2, 3
    expected = [f(place * w) for place in (row, column) for f in (np.sin, np.cos) for w in (1, 0.01)]
    np.testing.assert_allclose(position_code(3, 5, 8)[row * 5 + column], expected, atol=1e-14)


def dit():
    return random_network(lambda key: DiT((4, 4, 3), 2, 8, 2, 2, 2, key=key))


def test_dit_is_its_formula():
    network = dit()
    c = condition(network.conditioning, 0.4, 1)
    squares = [np.s_[i : i + 2, j : j + 2] for i in (0, 2) for j in (0, 2)]
    h = dense(network.inner, np.asarray([IMAGE[square].reshape(-1) for square in squares])) + position_code(2, 2, 8)
    for i in range(2):
        block = jax.tree.map(lambda a, i=i: a[i], network.blocks)
        shift1, scale1, gate1, shift2, scale2, gate2 = dense(block.modulation, c).reshape(6, 8)
        h = h + gate1 * attend(block.attention, standard(h) * (1 + scale1) + shift1)
        y = dense(block.hidden, standard(h) * (1 + scale2) + shift2)
        h = h + gate2 * dense(block.out, y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))))
    shift, scale = np.split(dense(network.modulation, c), 2)
    expected = np.zeros_like(IMAGE)
    for square, token in zip(squares, dense(network.outer, standard(h) * (1 + scale) + shift)):
        expected[square] = token.reshape(2, 2, 3)
    np.testing.assert_allclose(run(network, 0.4, IMAGE, 1), expected, atol=1e-11)


def test_dit_blocks_take_tokens_as_a_set_and_the_network_does_not():
    network, order = dit(), np.asarray([2, 0, 3, 1])
    tokens, c = jnp.asarray(RNG.normal(size=(4, 8))), jnp.asarray(RNG.normal(size=8))
    blocks = jax.jit(lambda h: scan_layers(network.blocks, h, c))
    np.testing.assert_allclose(blocks(tokens[order]), blocks(tokens)[order], atol=1e-12)
    there = jax.jit(lambda tokens: patchify(network(0.4, unpatchify(tokens, (4, 4, 3), 2)), 2))
    tokens = jnp.asarray(RNG.normal(size=(4, 12)))
    assert np.abs(there(tokens[order]) - there(tokens)[order]).max() > 1e-3


def test_parameter_counts():
    w, d, depth, classes = 12, 6, 5, 3
    conditioning = (64 * w + w) + (w * w + w) + (classes + 1) * w
    block = (w * w + w) + (w * 2 * w + 2 * w) + (w * w + w)
    mlp = conditioning + (d * w + w) + depth * block + (w * 2 * w + 2 * w) + (w * d + d)
    assert size(lambda key: TimeMLP((2, 3), w, depth, classes, key=key)) == mlp
    assert size(lambda key: TimeMLP((2, 3), w, depth, key=key)) == mlp - (classes + 1) * w
    assert size(lambda key: TimeMLP((2, 3), w, depth, classes, fourier=FourierTime(10), key=key)) == mlp - 54 * w

    block = (w * 6 * w + 6 * w) + (w * 3 * w) + (w * w + w) + (w * 4 * w + 4 * w) + (4 * w * w + w)
    dit = conditioning + (8 * w + w) + depth * block + (w * 2 * w + 2 * w) + (w * 8 + 8)
    assert size(lambda key: DiT((4, 4, 2), 2, w, depth, 3, classes, key=key)) == dit

    def conv(a, b):
        return 9 * a * b + b

    def residual(a, b):
        return 2 * a + conv(a, b) + (4 * w * 2 * b + 2 * b) + conv(b, b) + (a * b + b if a != b else 0)

    conditioning = (64 * 4 * w + 4 * w) + (4 * w * 4 * w + 4 * w)
    down = residual(w, w) + residual(w, w) + conv(w, w) + residual(w, 2 * w) + residual(2 * w, 2 * w)
    middle = 2 * residual(2 * w, 2 * w) + 2 * 2 * w + (2 * w * 6 * w) + (2 * w * 2 * w + 2 * w)
    up = residual(4 * w, 2 * w) + residual(4 * w, 2 * w) + conv(2 * w, 2 * w) + residual(3 * w, w) + residual(2 * w, w)
    unet = conditioning + conv(2, w) + down + middle + up + 2 * w + conv(w, 2)
    assert size(lambda key: UNet((4, 4, 2), w, (1, 2), num_blocks=2, heads=3, key=key)) == unet
