"""A time-conditioned residual MLP for points, vectors and small images.

    h ← h + W₂ silu((1 + scale(c)) W₁ h + shift(c)),  c = c(t, label),

feature-wise modulation (FiLM: Perez et al. 2018, arXiv:1709.07871) inside residual blocks (He et al. 2016, arXiv:1512.03385) whose last layer starts
at zero. No normalisation: on the plane it costs accuracy, since a velocity grows with |x|, and on 8x8 digits it gains nothing (flow matching, 3
blocks of width 256, 3000 Adam steps at 1e-3: test loss 0.490 without, 0.491 with layer norm, 0.882 for a plain MLP that reads the time as an input).
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_count, check_range
from ..core.types import PRNGKey, PyTree, Time
from .embedding import Conditioning, FourierTime
from .layers import Linear, check_example, dropout, modulate, scan_layers


class _Block(eqx.Module):
    modulation: Linear
    hidden: Linear
    out: Linear
    rate: float = eqx.field(static=True)

    def __init__(self, width, rate, *, key, dtype):
        self.modulation = Linear(width, 2 * width, dtype=dtype)
        self.hidden = Linear(width, width, key=key, dtype=dtype)
        self.out = Linear(width, width, dtype=dtype)
        self.rate = rate

    def __call__(self, h, c, *, key=None):
        shift, scale = jnp.split(self.modulation(c), 2)
        return h + self.out(dropout(jax.nn.silu(modulate(self.hidden(h), shift, scale)), self.rate, key))


class TimeMLP(eqx.Module):
    """`network(t, x, args, *, key=None) -> array like x` for one example of any `shape`, which is flattened.

    - `shape`: of one example, for instance (2,) or (8, 8, 1).
    - `width`, `depth`: units per layer and number of residual blocks (two layers each). Parameters of the blocks are stacked, (depth, ...).
    - `num_classes`: with it, `args` is an integer label, -1 or None for no class (`ergodax.nn.embedding`); without it, `args` is ignored.
    - `dropout`: rate inside the blocks, static; active only in calls with a `key`. Default 0.
    - `fourier`: the time embedding, default `FourierTime()`.
    - `dtype`: of the parameters, default JAX's; the network computes in it and returns the dtype of `x`.

    The output layer starts at zero, so a fresh network returns 0. Raises `ValueError` for counts below 1 and, when called, for another shape.
    """

    conditioning: Conditioning
    inner: Linear
    blocks: _Block
    modulation: Linear
    outer: Linear
    shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int = 256,
        depth: int = 3,
        num_classes: int | None = None,
        *,
        dropout: float = 0.0,
        fourier: FourierTime | None = None,
        dtype=None,
        key: PRNGKey,
    ):
        for name, count in (("width", width), ("depth", depth), ("the size of `shape`", math.prod(shape))):
            check_count(name, count)
        check_range("dropout", dropout, low=0.0, high=1.0, open_high=True)
        key_c, key_in, key_blocks = jax.random.split(key, 3)
        size = math.prod(shape)
        self.conditioning = Conditioning(width, num_classes, fourier=fourier, key=key_c, dtype=dtype)
        self.inner = Linear(size, width, key=key_in, dtype=dtype)
        self.blocks = eqx.filter_vmap(lambda k: _Block(width, dropout, key=k, dtype=dtype))(jax.random.split(key_blocks, depth))
        self.modulation = Linear(width, 2 * width, dtype=dtype)
        self.outer = Linear(width, size, dtype=dtype)
        self.shape = tuple(shape)

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None, *, key: PRNGKey | None = None) -> Float[Array, "*x"]:
        """The network at one scalar `t` and one example `x`; `key` switches dropout on."""
        check_example(self.shape, t, x)
        c = self.conditioning(t, args)
        h = self.inner(x.reshape(-1).astype(self.inner.weight.dtype))
        h = scan_layers(self.blocks, h, c, key)
        shift, scale = jnp.split(self.modulation(c), 2)
        return self.outer(modulate(jax.nn.silu(h), shift, scale)).reshape(x.shape).astype(x.dtype)


__all__ = ["TimeMLP"]
