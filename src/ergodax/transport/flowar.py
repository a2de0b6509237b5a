"""FlowAR: images scale by scale, each scale drawn by flow matching given the coarser ones. Ren, Yu, He, Shen, Yuille, Chen 2024 (arXiv:2412.15205).

An image, or the latent of any autoencoder, s_K, becomes K scales by plain averaging, each side twice the last: s_k = Down(s_K, 2^{K-k}), and

    p(s_K | label) = Π_k p(s_k | s_1, …, s_{k-1}, label),

where all but the last are conditions only: no residuals, no codebook. A transformer reads the label in the place of scale 1, and Up(s_{k-1}) in that
of scale k, attends within a scale and to coarser ones, and gives c_k, semantics of the size of s_k (`ScaleTransformer`). A second network is the
velocity of a flow at every scale: x_t = t s_k + (1 - t) ε, and

    L = Σ_k E |v(x_t, t, c_k) - (s_k - ε)|²,

in blocks h ← h + α ⊙ f(γ ⊙ LN(h) + β) whose α, β, γ are computed place by place from c_k and t (spatially adaptive layer norm, `SpatialVelocity`).

    model = FlowAR((16, 16, 4), num_scales=5, num_classes=10, key=key)
    fitted = fit(FlowARLoss(), model, optimiser, (latents, labels), key, num_steps=100_000, every=100, batch_size=64)
    *_, latent = generate_scales(fitted.model, key, label, guidance_scale=2.4)

`ScaleModel` is the socket: anything with semantics and a velocity trains and samples the same way. Guidance follows the released code: its weight
grows linearly with the scale, from 1 at the coarsest to w at the finest, and it can be left out near the noise.

Deviations of the networks: one stack of blocks instead of an encoder and a decoder, layer norm, GELU and learned places instead of RMS norm, SwiGLU
and rotary embeddings; Up is cubic interpolation to the next scale (theirs to the finest, then averaged); blocks begin as the identity. The loss is
that of `VelocityLoss`, half the above without its constant.
"""

import abc
from collections.abc import Callable, Sequence

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..core.check import check_count, check_range
from ..core.loop import integrate
from ..core.types import PRNGKey, PyTree, Scalar, Time
from .interpolants import LinearInterpolant, ZeroGamma
from .stochastic_interpolants import VelocityLoss


def downsample(x: Float[Array, "height width channels"], factor: int) -> Float[Array, "rows columns channels"]:
    """Down: the means over squares of `factor` pixels a side, which must divide height and width."""
    h, w, channels = x.shape
    return jnp.mean(x.reshape(h // factor, factor, w // factor, factor, channels), axis=(1, 3))


def upsample(x: Float[Array, "rows columns channels"]) -> Float[Array, "height width channels"]:
    """Up: cubic interpolation to twice the height and width."""
    h, w, channels = x.shape
    return jax.image.resize(x, (2 * h, 2 * w, channels), jax.image.ResizeMethod.CUBIC)


def scale_pyramid(x: Float[Array, "height width channels"], num_scales: int) -> list[Float[Array, "rows columns channels"]]:
    """s_1, …, s_K of one image, coarsest first; the last is `x`."""
    return [downsample(x, 2**k) for k in reversed(range(num_scales))]


class ScaleModel(eqx.Module):
    """The socket: what `FlowARLoss` trains and `generate_scales` samples from, on one example of `shape` (height, width, channels)."""

    shape: eqx.AbstractVar[tuple[int, ...]]
    num_scales: eqx.AbstractVar[int]

    @abc.abstractmethod
    def semantics(self, coarser: Sequence[Float[Array, "rows columns channels"]], label: PyTree = None) -> list[PyTree]:
        """c_1, …, c_{m+1} from the m < K coarsest scales; c_k from s_1, …, s_{k-1} and the label alone (-1 or None: no class)."""

    @abc.abstractmethod
    def velocity(self, t: Time, x: Float[Array, "rows columns channels"], args: PyTree) -> Float[Array, "rows columns channels"]:
        """v at one scalar `t` and any scale, `args` being its c_k. A vector field."""

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """Of all scales, coarsest first."""
        h, w, channels = self.shape
        return [(h // 2**k, w // 2**k, channels) for k in reversed(range(self.num_scales))]


class _Block(eqx.Module):
    """Attention and an MLP, both with adaptive layer norm: c is one vector for all tokens, (1, width), or one for each, (tokens, width)."""

    modulation: eqx.nn.Linear
    qkv: eqx.nn.Linear
    mixed: eqx.nn.Linear
    hidden: eqx.nn.Linear
    out: eqx.nn.Linear
    heads: int = eqx.field(static=True)

    def __init__(self, width, heads, mlp_ratio, *, key, dtype):
        keys = jax.random.split(key, 5)
        sizes = ((width, 6 * width), (width, 3 * width), (width, width), (width, mlp_ratio * width), (mlp_ratio * width, width))
        layers = [eqx.nn.Linear(i, o, dtype=dtype, key=k) for (i, o), k in zip(sizes, keys)]
        self.modulation, self.qkv, self.mixed, self.hidden, self.out = jax.tree.map(jnp.zeros_like, layers[0]), *layers[1:]
        self.heads = heads

    def __call__(self, h, c, mask=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(jax.vmap(self.modulation)(jax.nn.silu(c)), 6, axis=1)
        h = h + gate1 * self._attention(_normalise(h) * (1 + scale1) + shift1, mask)
        return h + gate2 * jax.vmap(lambda x: self.out(jax.nn.gelu(self.hidden(x))))(_normalise(h) * (1 + scale2) + shift2)

    def _attention(self, x, mask):
        q, k, v = jnp.moveaxis(jax.vmap(self.qkv)(x).reshape(len(x), 3, self.heads, -1), 1, 0)
        wide = x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32
        logits = jnp.einsum("qhd,khd->hqk", q, k, preferred_element_type=wide) / q.shape[2] ** 0.5
        weights = jax.nn.softmax(logits if mask is None else jnp.where(mask, logits, -jnp.inf)).astype(x.dtype)
        return jax.vmap(self.mixed)(jnp.einsum("hqk,khd->qhd", weights, v).reshape(x.shape))


def _normalise(x):
    centred = x - jnp.mean(x, -1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-6)


def _through(blocks, h, c, mask=None):
    """`h` through stacked blocks, compiled once."""
    return jax.lax.scan(lambda h, block: (block(h, c, mask), None), h, blocks)[0]


def _stack(depth, width, heads, mlp_ratio, key, dtype):
    return eqx.filter_vmap(lambda k: _Block(width, heads, mlp_ratio, key=k, dtype=dtype))(jax.random.split(key, depth))


class ScaleTransformer(eqx.Module):
    """`transformer(coarser, label) -> [c_1, …, c_{m+1}]`, c_k of shape (rows, columns, width); a scale attends to itself and to coarser ones.

    Arguments as those of `FlowAR`. Without `num_classes` the label is ignored. With it, it is one integer; -1 or None is no class, the null row.
    """

    label: Float[Array, "rows width"]
    place: Float[Array, "tokens width"]
    inner: eqx.nn.Linear
    blocks: _Block
    shapes: tuple[tuple[int, int, int], ...] = eqx.field(static=True)

    def __init__(self, shapes, width: int, depth: int, heads: int, num_classes: int | None, mlp_ratio: int = 4, *, key: PRNGKey, dtype=None):
        key_label, key_place, key_inner, key_blocks = jax.random.split(key, 4)
        dtype = jnp.result_type(float) if dtype is None else dtype
        self.shapes = tuple(shapes)
        tokens = sum(h * w for h, w, _ in shapes)
        self.label = 0.02 * jax.random.normal(key_label, ((num_classes or 0) + 1, width), dtype)
        self.place = 0.02 * jax.random.normal(key_place, (tokens, width), dtype)
        self.inner = eqx.nn.Linear(shapes[0][2], width, dtype=dtype, key=key_inner)
        self.blocks = _stack(depth, width, heads, mlp_ratio, key_blocks, dtype)

    def __call__(self, coarser: Sequence[Float[Array, "..."]], label: PyTree = None) -> list[Float[Array, "rows columns width"]]:
        """The semantics of every scale up to the one after the last given. Raises `ValueError` for scales of other shapes or a label out of range."""
        shapes, given = self.shapes[: len(coarser) + 1], [x.shape for x in coarser]
        if list(self.shapes[: len(coarser)]) != given or len(coarser) >= len(self.shapes):
            raise ValueError(f"`coarser` must hold the first scales, of shapes {list(self.shapes[:-1])}, got {given}.")
        null = len(self.label) - 1
        if null:
            check_range("label", label, low=-1, high=null - 1)
        row = jnp.asarray(-1 if label is None or null == 0 else label)
        condition = self.label[jnp.where(row < 0, null, row)]
        sizes = [h * w for h, w, _ in shapes]
        pixels = [upsample(x).reshape(-1, x.shape[2]).astype(self.place.dtype) for x in coarser]
        tokens = jnp.concatenate([jnp.broadcast_to(condition, (sizes[0], condition.size)), *map(jax.vmap(self.inner), pixels)])
        scale = np.repeat(np.arange(len(sizes)), sizes)
        h = _through(self.blocks, tokens + self.place[: len(tokens)], condition[None], jnp.asarray(scale[:, None] >= scale))
        parts = jnp.split(_normalise(h), np.cumsum(sizes)[:-1].tolist())
        return [part.reshape(*shape[:2], -1) for part, shape in zip(parts, shapes)]


class SpatialVelocity(eqx.Module):
    """`velocity(t, x, c) -> array like x`: x (rows, columns, channels), c (rows, columns, width), any number of rows and columns.

    A transformer with spatially adaptive layer norm. Its output layer starts at zero. Arguments as those of `FlowAR`.
    """

    inner: eqx.nn.Linear
    semantics: eqx.nn.Linear
    time_hidden: eqx.nn.Linear
    time_out: eqx.nn.Linear
    blocks: _Block
    modulation: eqx.nn.Linear
    outer: eqx.nn.Linear
    num_frequencies: int = eqx.field(static=True)

    def __init__(self, channels: int, width: int, depth: int, heads: int, mlp_ratio: int = 4, *, key: PRNGKey, dtype=None):
        key_inner, key_semantics, key_hidden, key_time, key_blocks, key_last = jax.random.split(key, 6)
        self.num_frequencies = 32
        self.inner = eqx.nn.Linear(channels, width, dtype=dtype, key=key_inner)
        self.semantics = eqx.nn.Linear(width, width, dtype=dtype, key=key_semantics)
        self.time_hidden = eqx.nn.Linear(2 * self.num_frequencies, width, dtype=dtype, key=key_hidden)
        self.time_out = eqx.nn.Linear(width, width, dtype=dtype, key=key_time)
        self.blocks = _stack(depth, width, heads, mlp_ratio, key_blocks, dtype)
        last = eqx.nn.Linear(width, 2 * width, dtype=dtype, key=key_last), eqx.nn.Linear(width, channels, dtype=dtype, key=key_last)
        self.modulation, self.outer = jax.tree.map(jnp.zeros_like, last)

    def __call__(self, t: Time, x: Float[Array, "rows columns channels"], args: Float[Array, "rows columns width"]) -> Float[Array, "*x"]:
        """v at one scalar `t`."""
        dtype = self.inner.weight.dtype
        frequency = jnp.asarray(np.geomspace(1, 100, self.num_frequencies), dtype)
        angle = frequency * jnp.asarray(t, dtype)
        time = self.time_out(jax.nn.silu(self.time_hidden(jnp.concatenate([jnp.cos(angle), jnp.sin(angle)]))))
        c = jax.vmap(self.semantics)(args.reshape(-1, args.shape[2])) + time
        h = _through(self.blocks, jax.vmap(self.inner)(x.reshape(-1, x.shape[2]).astype(dtype)), c)
        shift, scale = jnp.split(jax.vmap(self.modulation)(jax.nn.silu(c)), 2, axis=1)
        return jax.vmap(self.outer)(_normalise(h) * (1 + scale) + shift).reshape(x.shape).astype(x.dtype)


class FlowAR(ScaleModel):
    """The two networks for images of `shape` (height, width, channels), whose sides must be multiples of 2^(`num_scales` - 1).

    - `num_scales`: K (the paper: 5, sides 1, 2, 4, 8, 16).
    - `width`, `heads`: of both transformers, `heads` dividing `width`; `depth`, `flow_depth`: blocks of either (default 128, 4, 4 and 2).
    - `num_classes`: labels 0 … `num_classes` - 1, or None for no labels. `mlp_ratio`: hidden units of a block per unit of width (default 4).
    - `dtype`: of the parameters, default JAX's. Inputs of another dtype are computed in it; velocities keep the dtype of x.

    A fresh model has velocity 0. Raises `ValueError` for sizes that do not fit.
    """

    transformer: ScaleTransformer
    flow: SpatialVelocity
    shape: tuple[int, ...] = eqx.field(static=True)
    num_scales: int = eqx.field(static=True)

    def __init__(
        self,
        shape: tuple[int, ...],
        num_scales: int,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        flow_depth: int = 2,
        num_classes: int | None = None,
        *,
        mlp_ratio: int = 4,
        key: PRNGKey,
        dtype=None,
    ):
        counts = {"num_scales": num_scales, "width": width, "depth": depth, "heads": heads, "flow_depth": flow_depth, "mlp_ratio": mlp_ratio}
        for name, count in counts.items():
            check_count(name, count)
        if len(shape) != 3 or min(shape) < 1 or shape[0] % 2 ** (num_scales - 1) or shape[1] % 2 ** (num_scales - 1):
            raise ValueError(f"`shape` must be (height, width, channels), sides multiples of {2 ** (num_scales - 1)}, got {shape}.")
        if width % heads:
            raise ValueError(f"`heads` must divide `width`, got {heads} and {width}.")
        self.shape, self.num_scales = tuple(shape), num_scales
        key_transformer, key_flow = jax.random.split(key)
        self.transformer = ScaleTransformer(self.shapes, width, depth, heads, num_classes, mlp_ratio, key=key_transformer, dtype=dtype)
        self.flow = SpatialVelocity(shape[2], width, flow_depth, heads, mlp_ratio, key=key_flow, dtype=dtype)

    def semantics(self, coarser, label=None):
        return self.transformer(coarser, label)

    def velocity(self, t, x, args):
        return self.flow(t, x, args)


class FlowARLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {})`: the sum over scales of a loss of the velocity, given semantics of the true coarser scales.

    - `batch`: images (B, height, width, channels), or (images, labels) with integer labels (B,).
    - `loss`: called as `loss(model.velocity, (noise, s_k, c_k), key)`, default flow matching. Pixels of all scales weigh the same, as in the
      released code.
    - `label_dropout`: labels become "no class" with this probability, for guidance (default 0.1, the authors').

    Raises `ValueError` for images of another shape or a probability outside [0, 1].
    """

    loss: Callable = VelocityLoss(LinearInterpolant(ZeroGamma()), antithetic=False)
    label_dropout: Scalar = 0.1

    def __check_init__(self):
        check_range("label_dropout", self.label_dropout, low=0.0, high=1.0)

    def __call__(self, model: ScaleModel, batch: PyTree, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        images, labels = batch if isinstance(batch, tuple) else (batch, None)
        if images.shape[1:] != model.shape:
            raise ValueError(f"images must have shape (batch, *{model.shape}), got {images.shape}.")
        key_label, *keys = jax.random.split(key, 2 * model.num_scales + 1)
        if labels is not None:
            labels = jnp.where(jax.random.bernoulli(key_label, self.label_dropout, labels.shape), -1, labels)
        scales = jax.vmap(lambda image: scale_pyramid(image, model.num_scales))(images)
        conditions = jax.vmap(lambda scales, label: model.semantics(scales[:-1], label))(scales, labels)
        noises = [jax.random.normal(k, s.shape, s.dtype) for k, s in zip(keys, scales)]
        parts = zip(noises, scales, conditions, keys[model.num_scales :])
        return jnp.sum(jnp.stack([self.loss(model.velocity, tuple(ends), k)[0] for *ends, k in parts])), {}


def generate_scales(
    model: ScaleModel,
    key: PRNGKey,
    label: Int[Array, ""] | int | None = None,
    *,
    guidance_scale: Scalar | None = None,
    guidance_start: Scalar = 0.0,
    solver: dfx.AbstractSolver | None = None,
    times: Float[Array, " steps"] | None = None,
) -> list[Float[Array, "rows columns channels"]]:
    """Draw one example: all its scales, coarsest first (`vmap` over keys and labels for a batch).

    - `label`: its class, or None (-1) for none.
    - `guidance_scale`: w; at scale k the velocity is v(∅) + w_k (v(label) - v(∅)), w_k = 1 + (w - 1)(k - 1)/(K - 1). None (default): v(label) alone,
      at half the cost.
    - `guidance_start`: unguided before this time (default 0; the released code starts at 0.1 or 0.3).
    - `solver`, `times`: of the flow at every scale (default Euler, 25 steps from 0 to 1, the authors').

    The noise has JAX's default dtype, or that of `times`.
    """
    times = jnp.linspace(0, 1, 26) if times is None else times
    solver = dfx.Euler() if solver is None else solver
    scales = []
    for k, shape in enumerate(model.shapes):
        key, key_noise = jax.random.split(key)
        condition = model.semantics(scales, label)[-1]
        field = model.velocity
        if guidance_scale is not None:
            both = jax.tree.map(lambda *c: jnp.stack(c), model.semantics(scales, -1)[-1], condition)
            weight = 1 + (guidance_scale - 1) * (k / max(model.num_scales - 1, 1))
            field, condition = _Guided(model.velocity, weight, guidance_start), both
        noise = jax.random.normal(key_noise, shape, times.dtype)
        scales.append(integrate(dfx.ODETerm(field), solver, noise, condition, times=times))
    return scales


class _Guided(eqx.Module):
    """v(∅) + w (v(c) - v(∅)) from `start` on, v(c) before it; `args` holds both conditions, stacked."""

    field: Callable
    weight: Scalar
    start: Scalar

    def __call__(self, t, x, args):
        unconditional, conditional = jax.vmap(self.field, (None, None, 0))(t, x, args)
        weight = jnp.where(t >= self.start, jnp.asarray(self.weight, x.dtype), 1)
        return unconditional + weight * (conditional - unconditional)


__all__ = [
    "FlowAR",
    "FlowARLoss",
    "ScaleModel",
    "ScaleTransformer",
    "SpatialVelocity",
    "downsample",
    "generate_scales",
    "scale_pyramid",
    "upsample",
]
