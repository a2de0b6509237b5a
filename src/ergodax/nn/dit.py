"""Diffusion transformer (DiT) with adaLN-Zero blocks. Peebles and Xie 2023 (arXiv:2212.09748).

The image is cut into patches, each embedded linearly and marked with its place by a fixed sine-cosine code. In each block (their figure 3)

    h ← h + α₁ Attention(LN(h)(1 + γ₁) + β₁),  h ← h + α₂ MLP(LN(h)(1 + γ₂) + β₂),

with (β₁, γ₁, α₁, β₂, γ₂, α₂) linear in the conditioning c(t, label) and zero at the start, so that every block begins as the identity.

Deviations: c is `ergodax.nn.Conditioning`, with silu applied once before all blocks instead of once in each (the same function); attention has no
bias for queries, keys and values; the output holds no variance.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core.check import check_count
from ..core.types import PRNGKey, PyTree, Time
from .embedding import Conditioning, FourierTime
from .layers import Attention, Linear, check_example, check_image, modulate, normalise, scan_layers


def patchify(x: Float[Array, "height width channels"], patch: int) -> Float[Array, "tokens size"]:
    """Cut an image into squares of `patch` pixels a side: tokens in reading order, each of size patch² · channels."""
    h, w, channels = x.shape
    squares = x.reshape(h // patch, patch, w // patch, patch, channels).transpose(0, 2, 1, 3, 4)
    return squares.reshape(-1, patch * patch * channels)


def unpatchify(tokens: Float[Array, "tokens size"], shape: tuple[int, ...], patch: int) -> Float[Array, "height width channels"]:
    """The image of `shape` whose patches are `tokens`: the inverse of `patchify`."""
    h, w, channels = shape
    squares = tokens.reshape(h // patch, w // patch, patch, patch, channels).transpose(0, 2, 1, 3, 4)
    return squares.reshape(shape)


def position_code(rows: int, columns: int, width: int) -> Float[np.ndarray, "tokens width"]:
    """A fixed code of each token's place: sin and cos of row and column at frequencies 10000^(-4k / width). He et al. 2022 (arXiv:2111.06377)."""
    frequency = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.divmod(np.arange(rows * columns), columns)
    angles = [place[:, None] * frequency for place in (row, column)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], -1)


class _Block(eqx.Module):
    modulation: Linear
    attention: Attention
    hidden: Linear
    out: Linear

    def __init__(self, width, heads, mlp_ratio, *, key, dtype):
        key_attention, key_hidden, key_out = jax.random.split(key, 3)
        self.modulation = Linear(width, 6 * width, dtype=dtype)
        self.attention = Attention(width, heads, key=key_attention, dtype=dtype)
        self.hidden = Linear(width, mlp_ratio * width, key=key_hidden, dtype=dtype)
        self.out = Linear(mlp_ratio * width, width, key=key_out, dtype=dtype)

    def __call__(self, h, c, *, key=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(c), 6)
        h = h + gate1 * self.attention(modulate(normalise(h), shift1, scale1))
        hidden = jax.nn.gelu(self.hidden(modulate(normalise(h), shift2, scale2)))
        return h + gate2 * self.out(hidden)


class DiT(eqx.Module):
    """`network(t, x, args, *, key=None) -> array like x` for one image x of `shape` (height, width, channels).

    - `patch`: side of a patch, which must divide height and width. 2 suits 8x8 images (16 tokens), 4 suits 28x28 (49 tokens).
    - `width`, `depth`, `heads`: of the transformer; `width` must be a multiple of 4 and of `heads`. Parameters of the blocks are stacked,
      (depth, ...), and scanned, so compile time hardly grows with depth. (DiT-S of the paper: 384, 12, 6.)
    - `num_classes`: with it, `args` is an integer label, -1 or None for no class (`ergodax.nn.embedding`); without it, `args` is ignored.
    - `mlp_ratio`: hidden units of a block's MLP per unit of width, default 4 (the paper's).
    - `fourier`: the time embedding, default `FourierTime()`.
    - `dtype`: of the parameters, default JAX's; the network computes in it and returns the dtype of `x`.

    The output layer starts at zero, so a fresh network returns 0. There is no dropout, as in the paper: `key` is ignored. Raises `ValueError` for
    sizes that do not fit.
    """

    conditioning: Conditioning
    inner: Linear
    blocks: _Block
    modulation: Linear
    outer: Linear
    shape: tuple[int, ...] = eqx.field(static=True)
    patch: int = eqx.field(static=True)

    def __init__(
        self,
        shape: tuple[int, ...],
        patch: int = 2,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        num_classes: int | None = None,
        *,
        mlp_ratio: int = 4,
        fourier: FourierTime | None = None,
        dtype=None,
        key: PRNGKey,
    ):
        for name, count in (("patch", patch), ("width", width), ("depth", depth), ("mlp_ratio", mlp_ratio)):
            check_count(name, count)
        check_image(shape, patch)
        if width % 4:
            raise ValueError(f"`width` must be a multiple of 4 (sine and cosine of row and column), got {width}.")
        key_c, key_in, key_blocks = jax.random.split(key, 3)
        size = patch**2 * shape[-1]
        self.conditioning = Conditioning(width, num_classes, fourier=fourier, key=key_c, dtype=dtype)
        self.inner = Linear(size, width, key=key_in, dtype=dtype)
        self.blocks = eqx.filter_vmap(lambda k: _Block(width, heads, mlp_ratio, key=k, dtype=dtype))(jax.random.split(key_blocks, depth))
        self.modulation = Linear(width, 2 * width, dtype=dtype)
        self.outer = Linear(width, size, dtype=dtype)
        self.shape = tuple(shape)
        self.patch = patch

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None, *, key: PRNGKey | None = None) -> Float[Array, "*x"]:
        """The network at one scalar `t` and one image `x`."""
        check_example(self.shape, t, x)
        c = self.conditioning(t, args)
        tokens = self.inner(patchify(x.astype(self.inner.weight.dtype), self.patch))
        rows, columns = self.shape[0] // self.patch, self.shape[1] // self.patch
        h = tokens + jnp.asarray(position_code(rows, columns, tokens.shape[-1]), tokens.dtype)
        h = scan_layers(self.blocks, h, c)
        shift, scale = jnp.split(self.modulation(c), 2)
        tokens = self.outer(modulate(normalise(h), shift, scale))
        return unpatchify(tokens, self.shape, self.patch).astype(x.dtype)


__all__ = ["DiT", "patchify", "position_code", "unpatchify"]
