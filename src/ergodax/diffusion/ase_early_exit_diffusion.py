"""Early exit by diffusion time: fewer blocks of the network where the noise is strong. Moon, Choi, Yun, Yoon, Lee, Cho, Lee 2024 (arXiv:2408.05927).

A denoiser of L residual blocks goes straight from its first n(t) blocks to its output head. n is constant in equal bins of the noise time u = 1 - t
(their integer time over T) and falls with the noise: of ten bins from clean to noise the released example runs

    n = 28, 28, 24, 24, 20, 20, 16, 16, 12, 12   of L = 28 blocks, 5/7 of them on average.

A pretrained network is fine-tuned as `EarlyExit(network, exits)` with the loss it was trained with (theirs: all weights, AdamW at 1e-5 without weight
decay, an average of the weights kept), and sampled from as that by any solver. In a batch of many times, as in training, all blocks run and each
example is read out at its own exit; at one time for a whole batch, as in sampling, only n(t) blocks run.

The paper also drops the decoder's blocks of U-shaped transformers; here the blocks are one stack. Its schedule is a choice by hand: so is this one.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..core.check import check_count
from ..core.types import PRNGKey, PyTree, Time
from .skipped_blocks import keep_blocks, num_blocks


class EarlyExit(eqx.Module):
    """`network(t, x, args, *, key=None)` that runs its first n(t) blocks. Blocks beyond n(t) get a gradient of exactly 0.

    - `network`: one with stacked blocks (see `ergodax.diffusion.keep_blocks`), such as `ergodax.nn.TimeMLP` and `ergodax.nn.DiT`.
    - `exits` (static): n in equal bins of u = 1 - t from clean to noise, each between 0 and L. A u on an edge belongs to the noisier bin.

    To save work keep `t` out of the `vmap` of a batch: `jax.vmap(model, in_axes=(None, 0, None))`. Raises `ValueError` for exits out of range.
    """

    network: Any
    exits: tuple[int, ...] = eqx.field(static=True)

    def __check_init__(self):
        check_count("the number of `exits`", len(self.exits))
        depth = num_blocks(self.network)
        for exit_ in self.exits:
            check_count("each of `exits`", exit_, low=0)
            if exit_ > depth:
                raise ValueError(f"`exits` must be at most the number of blocks, {depth}, got {self.exits}.")

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None, *, key: PRNGKey | None = None) -> Float[Array, "*x"]:
        """The network's output at one scalar `t`, of the shape of `x`."""
        keep = jnp.arange(num_blocks(self.network)) < self.num_blocks_at(t)
        return keep_blocks(self.network, keep)(t, x, args, key=key)

    def num_blocks_at(self, t: Time) -> Int[Array, "..."]:
        """n(t)."""
        t = jnp.asarray(t)
        t = t if jnp.issubdtype(t.dtype, jnp.floating) else t.astype(float)
        # Edges as 1 - k/10, so that the time 1 - i/1000 of an integer time i on an edge is that edge to the bit.
        edges = jnp.asarray(1 - np.arange(1, len(self.exits)) / len(self.exits), t.dtype)
        return jnp.asarray(self.exits)[jnp.sum(t[..., None] <= edges, axis=-1)]

    @property
    def share(self) -> float:
        """The blocks run at a uniform time, on average, over L."""
        return float(np.mean(self.exits)) / num_blocks(self.network)


__all__ = ["EarlyExit"]
