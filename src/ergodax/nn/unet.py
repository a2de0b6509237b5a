"""A small U-Net for images: residual convolution blocks at several resolutions, each block of the way down joined to one of the way up.

U-Net: Ronneberger, Fischer, Brox 2015 (arXiv:1505.04597). Residual blocks with group norm and swish, and attention at low resolution: Ho, Jain,
Abbeel 2020 (arXiv:2006.11239), appendix B. Time and class enter as scale and shift of the second norm of each block: Dhariwal and Nichol 2021
(arXiv:2105.05233), section 3. Deviations: one skip per block and none from the resampling layers; attention only between the two middle blocks.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_count, check_range
from ..core.types import PRNGKey, PyTree, Time
from .embedding import Conditioning, FourierTime
from .layers import Attention, Conv, Linear, check_example, check_image, dropout, group_normalise, modulate


class _GroupNorm(eqx.Module):
    scale: Float[Array, "*lanes channels"]
    shift: Float[Array, "*lanes channels"]

    def __init__(self, channels, *, dtype):
        self.scale = jnp.zeros((channels,), jnp.result_type(float) if dtype is None else dtype)
        self.shift = jnp.zeros_like(self.scale)

    def __call__(self, x):
        return modulate(group_normalise(x), self.shift, self.scale)


class _ResidualBlock(eqx.Module):
    norm: _GroupNorm
    conv1: Conv
    modulation: Linear
    conv2: Conv
    shortcut: Linear | None
    rate: float = eqx.field(static=True)

    def __init__(self, in_channels, out_channels, cond, rate, *, key, dtype):
        key_conv, key_shortcut = jax.random.split(key)
        self.norm = _GroupNorm(in_channels, dtype=dtype)
        self.conv1 = Conv(in_channels, out_channels, key=key_conv, dtype=dtype)
        self.modulation = Linear(cond, 2 * out_channels, dtype=dtype)
        self.conv2 = Conv(out_channels, out_channels, dtype=dtype)
        self.shortcut = None if in_channels == out_channels else Linear(in_channels, out_channels, key=key_shortcut, dtype=dtype)
        self.rate = rate

    def __call__(self, x, c, *, key=None):
        h = self.conv1(jax.nn.silu(self.norm(x)))
        shift, scale = jnp.split(self.modulation(c), 2)
        h = jax.nn.silu(modulate(group_normalise(h), shift, scale))
        return (x if self.shortcut is None else self.shortcut(x)) + self.conv2(dropout(h, self.rate, key))


class _AttentionBlock(eqx.Module):
    norm: _GroupNorm
    attention: Attention

    def __init__(self, channels, heads, *, key, dtype):
        self.norm = _GroupNorm(channels, dtype=dtype)
        self.attention = Attention(channels, heads, zero_output=True, key=key, dtype=dtype)

    def __call__(self, x):
        return x + self.attention(self.norm(x).reshape(-1, x.shape[-1])).reshape(x.shape)


class UNet(eqx.Module):
    """`network(t, x, args, *, key=None) -> array like x` for one image x of `shape` (height, width, channels).

    - `width`, `multipliers`: level i has `width * multipliers[i]` channels and half the side of level i - 1, so height and width must be multiples of
      2^(levels - 1). For 8x8 images (1, 2) gives 8 -> 4; for 28x28 (1, 2, 2) gives 28 -> 14 -> 7.
    - `num_classes`: with it, `args` is an integer label, -1 or None for no class (`ergodax.nn.embedding`); without it, `args` is ignored.
    - `num_blocks`: residual blocks per level, on each way. Default 1.
    - `heads`: heads of the attention at the lowest resolution, which must divide its channels; None (default) for no attention.
    - `dropout`: rate inside the blocks, static; active only in calls with a `key`. Default 0; Ho et al. use 0.1 on CIFAR-10.
    - `fourier`: the time embedding, default `FourierTime()`.
    - `dtype`: of the parameters, default JAX's; the network computes in it and returns the dtype of `x`.

    The last convolution starts at zero, so a fresh network returns 0. Raises `ValueError` for sizes that do not fit.
    """

    conditioning: Conditioning
    inner: Conv
    down: tuple[tuple[_ResidualBlock, ...], ...]
    downsample: tuple[Conv, ...]
    middle: tuple[_ResidualBlock, _ResidualBlock]
    attention: _AttentionBlock | None
    up: tuple[tuple[_ResidualBlock, ...], ...]
    upsample: tuple[Conv, ...]
    norm: _GroupNorm
    outer: Conv
    shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int = 32,
        multipliers: tuple[int, ...] = (1, 2),
        num_classes: int | None = None,
        *,
        num_blocks: int = 1,
        heads: int | None = None,
        dropout: float = 0.0,
        fourier: FourierTime | None = None,
        dtype=None,
        key: PRNGKey,
    ):
        for name, count in (("width", width), ("num_blocks", num_blocks), ("the number of `multipliers`", len(multipliers))):
            check_count(name, count)
        for multiplier in multipliers:
            check_count("multipliers", multiplier)
        check_image(shape, 2 ** (len(multipliers) - 1))
        check_range("dropout", dropout, low=0.0, high=1.0, open_high=True)
        counter = iter(jax.random.split(key, 3 + 2 * len(multipliers) * (num_blocks + 1)))
        widths, cond = [width * m for m in multipliers], 4 * width

        def block(in_channels, out_channels):
            return _ResidualBlock(in_channels, out_channels, cond, dropout, key=next(counter), dtype=dtype)

        def conv(in_channels, out_channels, stride=1):
            return Conv(in_channels, out_channels, stride=stride, key=next(counter), dtype=dtype)

        self.conditioning = Conditioning(cond, num_classes, fourier=fourier, key=next(counter), dtype=dtype)
        self.inner = conv(shape[-1], widths[0])
        before = [widths[0], *widths[:-1]]
        self.down = tuple(tuple(block(a if i == 0 else b, b) for i in range(num_blocks)) for a, b in zip(before, widths))
        self.downsample = tuple(conv(w, w, stride=2) for w in widths[:-1])
        self.middle = block(widths[-1], widths[-1]), block(widths[-1], widths[-1])
        self.attention = None if heads is None else _AttentionBlock(widths[-1], heads, key=next(counter), dtype=dtype)
        after = [*widths[1:], widths[-1]]
        self.up = tuple(tuple(block((a if i == 0 else b) + b, b) for i in range(num_blocks)) for a, b in zip(after, widths))
        self.upsample = tuple(conv(w, w) for w in widths[1:])
        self.norm = _GroupNorm(widths[0], dtype=dtype)
        self.outer = Conv(widths[0], shape[-1], dtype=dtype)
        self.shape = tuple(shape)

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None, *, key: PRNGKey | None = None) -> Float[Array, "*x"]:
        """The network at one scalar `t` and one image `x`; `key` switches dropout on."""
        check_example(self.shape, t, x)
        c = self.conditioning(t, args)
        levels, num_blocks = len(self.down), len(self.down[0])
        num_keys = 2 * levels * num_blocks + 2
        keys = iter([None] * num_keys if key is None else jax.random.split(key, num_keys))
        h, skips = self.inner(x.astype(self.inner.weight.dtype)), []
        for level in range(levels):
            for block in self.down[level]:
                h = block(h, c, key=next(keys))
                skips.append(h)
            if level < levels - 1:
                h = self.downsample[level](h)
        h = self.middle[0](h, c, key=next(keys))
        h = h if self.attention is None else self.attention(h)
        h = self.middle[1](h, c, key=next(keys))
        for level in reversed(range(levels)):
            for block in self.up[level]:
                h = block(jnp.concatenate([h, skips.pop()], -1), c, key=next(keys))
            if level > 0:
                h = self.upsample[level - 1](jnp.repeat(jnp.repeat(h, 2, 0), 2, 1))
        return self.outer(jax.nn.silu(self.norm(h))).astype(x.dtype)


__all__ = ["UNet"]
