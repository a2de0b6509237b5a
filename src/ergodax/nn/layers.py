"""Small layers that the networks share, on one example, channels last. Every leaf is an array of real parameters; all else is static.

So a network goes through `jax.jit`, `jax.grad` and optax as it stands, with no filter, and a `lax.scan` can run over stacked layers. Layers compute
in the dtype of their parameters; normalisation and softmax compute in at least float32.
"""

import functools
import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_count
from ..core.types import PRNGKey, Time


def check_example(shape: tuple[int, ...], t: Time, x: Float[Array, "*x"]) -> None:
    """Raise unless `x` is one example of `shape` and `t` one time."""
    if jnp.shape(x) != shape or jnp.ndim(t) != 0:
        raise ValueError(
            f"The network takes one scalar `t` and one example `x` of shape {shape}, got shapes {jnp.shape(t)} and {jnp.shape(x)}; "
            "use jax.vmap for a batch."
        )


def check_image(shape: tuple[int, ...], divisor: int) -> None:
    """Raise unless `shape` is (height, width, channels) with both sides multiples of `divisor`."""
    if len(shape) != 3 or min(shape) < 1 or shape[0] % divisor or shape[1] % divisor:
        raise ValueError(f"`shape` must be (height, width, channels) with height and width multiples of {divisor}, got {shape}.")


def wide(dtype) -> jnp.dtype:
    """`dtype`, but at least float32."""
    return jnp.dtype(dtype) if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def _xavier(key, shape, fans, dtype):
    """Uniform on ±√(6 / fans), fans = inputs + outputs of one unit (Glorot and Bengio 2010); zero without a `key`."""
    dtype = jnp.result_type(float) if dtype is None else dtype
    if key is None:
        return jnp.zeros(shape, dtype)
    limit = (6 / fans) ** 0.5
    # Drawn flat: XLA's CPU compiler takes ten times longer over a draw of several axes.
    return jax.random.uniform(key, (math.prod(shape),), dtype, -limit, limit).reshape(shape)


class Linear(eqx.Module):
    """x W + b over the last axis: (..., in) -> (..., out). Xavier-uniform weights and a bias of zero; all zero without a `key`.

    A zero layer is how a residual branch or an output starts by saying nothing. Any leading axes, because one product with all tokens is a quarter
    faster on CPU than a `vmap` of `eqx.nn.Linear` over them.
    """

    weight: Float[Array, "*lanes in_size out_size"]
    bias: Float[Array, "*lanes out_size"] | None

    def __init__(self, in_size: int, out_size: int, *, bias: bool = True, key: PRNGKey | None = None, dtype=None):
        self.weight = _xavier(key, (in_size, out_size), in_size + out_size, dtype)
        self.bias = _xavier(None, (out_size,), 1, dtype) if bias else None

    def __call__(self, x: Float[Array, "*tokens in_size"], *, key: PRNGKey | None = None) -> Float[Array, "*tokens out_size"]:
        """The product with every vector of `x`."""
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


def conv_as_product(x: Float[Array, "height width in_channels"], weight: Array, stride: int) -> Float[Array, "rows columns out_channels"]:
    """A 3x3 convolution with padding `SAME` as a product of (rows, columns, 9 · in) with (9 · in, out)."""
    h, w, channels = x.shape
    before = (3 - stride) // 2
    after = 3 - stride - before
    x = jnp.pad(x, ((before, after), (before, after), (0, 0)))
    shifted = [x[i : i + h : stride, j : j + w : stride] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, -1) @ weight.reshape(9 * channels, -1)


def conv_as_convolution(x: Float[Array, "height width in_channels"], weight: Array, stride: int) -> Float[Array, "rows columns out_channels"]:
    """The same as XLA's convolution."""
    return jax.lax.conv_general_dilated(x[None], weight, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))[0]


class Conv(eqx.Module):
    """A 3x3 convolution with padding `SAME`: (height, width, in) -> (height / stride, width / stride, out), sides multiples of `stride`, 1 or 2.

    Xavier-uniform weights and a bias of zero; all zero without a `key`. On CPU it runs as one matrix product over shifted copies, because XLA's CPU
    convolution is tens of times slower inside a `scan` (jax-ml/jax#12868), where training happens; elsewhere as XLA's convolution.
    """

    weight: Float[Array, "*lanes 3 3 in_channels out_channels"]
    bias: Float[Array, "*lanes out_channels"]
    stride: int = eqx.field(static=True)

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, key: PRNGKey | None = None, dtype=None):
        self.weight = _xavier(key, (3, 3, in_channels, out_channels), 9 * (in_channels + out_channels), dtype)
        self.bias = _xavier(None, (out_channels,), 1, dtype)
        self.stride = stride

    def __call__(self, x: Float[Array, "height width in_channels"], *, key: PRNGKey | None = None) -> Float[Array, "rows columns out_channels"]:
        """The convolution of one image."""
        product, convolution = (functools.partial(f, stride=self.stride) for f in (conv_as_product, conv_as_convolution))
        return jax.lax.platform_dependent(x, self.weight, cpu=product, default=convolution) + self.bias


class Attention(eqx.Module):
    """Multi-head self-attention over tokens (N, width). Vaswani et al. 2017 (arXiv:1706.03762) eq. 1.

    Queries, keys and values have no bias: a bias of the keys cancels in the softmax, and the others are linear in the shift of the norm before.
    Raises `ValueError` unless `heads` divides `width`.
    """

    qkv: Linear
    out: Linear
    heads: int = eqx.field(static=True)

    def __init__(self, width: int, heads: int, *, zero_output: bool = False, key: PRNGKey, dtype=None):
        check_count("heads", heads)
        if width % heads:
            raise ValueError(f"`heads` must divide the width, got {heads} heads for a width of {width}.")
        key_qkv, key_out = jax.random.split(key)
        self.qkv = Linear(width, 3 * width, bias=False, key=key_qkv, dtype=dtype)
        self.out = Linear(width, width, key=None if zero_output else key_out, dtype=dtype)
        self.heads = heads

    def __call__(self, x: Float[Array, "tokens width"], *, key: PRNGKey | None = None) -> Float[Array, "tokens width"]:
        """Attention among all tokens."""
        n, width = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(n, 3, self.heads, width // self.heads), 1, 0)
        logits = jnp.einsum("qhd,khd->hqk", q, k, preferred_element_type=wide(x.dtype))
        weights = jax.nn.softmax(logits / (width // self.heads) ** 0.5).astype(x.dtype)
        return self.out(jnp.einsum("hqk,khd->qhd", weights, v).reshape(n, width))


def normalise(x: Float[Array, "*x"], axis: int | tuple[int, ...] = -1, eps: float = 1e-6) -> Float[Array, "*x"]:
    """`x` with mean 0 and variance 1 along `axis`: a layer norm without parameters. Ba, Kiros, Hinton 2016 (arXiv:1607.06450)."""
    centred = x.astype(wide(x.dtype))
    centred = centred - jnp.mean(centred, axis, keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.mean(centred**2, axis, keepdims=True) + eps)).astype(x.dtype)


def group_normalise(x: Float[Array, "height width channels"]) -> Float[Array, "height width channels"]:
    """Group norm without parameters: mean 0 and variance 1 in each group of neighbouring channels. Wu and He 2018 (arXiv:1803.08494).

    Groups hold at least four channels where that divides; at most 32 groups, the paper's default.
    """
    h, w, channels = x.shape
    groups = max(g for g in range(1, min(32, max(1, channels // 4)) + 1) if channels % g == 0)
    return normalise(x.reshape(h, w, groups, channels // groups), (0, 1, 3)).reshape(h, w, channels)


def modulate(x: Float[Array, "*x width"], shift: Float[Array, " width"], scale: Float[Array, " width"]) -> Float[Array, "*x width"]:
    """x (1 + scale) + shift: feature-wise modulation (FiLM). Perez, Strub, de Vries, Dumoulin, Courville 2018 (arXiv:1709.07871)."""
    return x * (1 + scale) + shift


def dropout(x: Float[Array, "*x"], rate: float, key: PRNGKey | None) -> Float[Array, "*x"]:
    """Each entry is set to zero with probability `rate` and the rest divided by 1 - `rate`; nothing happens without a `key`."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, (x.size,)).reshape(x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def scan_layers(layers: Callable, h: Float[Array, "*h"], c: Float[Array, " cond"], key: PRNGKey | None = None) -> Float[Array, "*h"]:
    """`h` through stacked `layers` (leaves with a leading axis of depth), each called as `layer(h, c, key=...)`; compiles one layer.

    Up to four layers are unrolled: they compile fast enough, and XLA fuses across them.
    """
    depth = jax.tree.leaves(layers)[0].shape[0]
    keys = None if key is None else jax.random.split(key, depth)
    h, _ = jax.lax.scan(lambda h, xs: (xs[0](h, c, key=xs[1]), None), h, (layers, keys), unroll=depth if depth <= 4 else 1)
    return h


__all__ = [
    "Attention",
    "Conv",
    "Linear",
    "check_example",
    "check_image",
    "conv_as_convolution",
    "conv_as_product",
    "dropout",
    "group_normalise",
    "modulate",
    "normalise",
    "scan_layers",
    "wide",
]
