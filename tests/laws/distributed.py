"""Rows of `ergodax.distributed`."""

import jax
import jax.numpy as jnp

from ergodax.distributed import (
    Averaged,
    Fragmented,
    Replicated,
    Vocabulary,
    ZeroFlat,
    ZeroPerLeaf,
    fedhyper_client,
    fedhyper_global_momentum,
    fedhyper_server_local,
    local_rate,
    split_atoms,
    union_fragments,
)
from ergodax.testing import Plug

from .shared import BATCHES


def universal_checkpoint(hyper, x, key):
    table = [("qkv", Fragmented(parts=(2, 4))), ("rows", Vocabulary(6, multiple=4)), ("norm", Averaged()), ("bias", Replicated())]
    ranks = split_atoms({"qkv": x, "rows": x + 1, "norm": x[0], "bias": x[1]}, table, 2)
    drifted = [ranks[0], ranks[1] | {"norm": 3 * x[0]}]
    shapes = {name: leaf.shape for name, leaf in ranks[0].items()}
    vectors = ZeroFlat().split(ranks[0], 4), ZeroPerLeaf().split(ranks[0], 4)
    return {"ranks": ranks, "vectors": vectors, "atoms": union_fragments(drifted, table), "leaves": ZeroPerLeaf().union(vectors[1], shapes)}


def fedhyper_(hyper, x, key):
    """Three rounds of two clients with three local steps each: weights, rates of server and clients."""
    h = {name: value.astype(x.dtype) for name, value in hyper.items()}
    server = fedhyper_global_momentum(decay=h["decay"], high=h["high"])
    scaler = fedhyper_client(h["num_clients"], global_weight=h["global_weight"], growth=h["growth"])
    centres = jnp.array([[0.5, 0.0], [0.0, -0.5]], x.dtype)

    def local(w, last, centre):
        def step(carry, _):
            z, state = carry
            updates, state = scaler.update(-0.1 * (z - centre), state, global_update=last)
            return (z + updates, state), None

        (z, state), _ = jax.lax.scan(step, (w, scaler.init(w)), length=3)
        return z - w, state.scale

    def one(carry, _):
        w, state, last = carry
        changes, scales = jax.vmap(local, (None, None, 0))(w, last, centres)
        mean = changes.mean(axis=0)
        updates, state = server.update(mean, state)
        return (w + updates, state, mean), scales

    (w, state, mean), scales = jax.lax.scan(one, (x, server.init(x), jnp.zeros_like(x)), length=3)
    listed = fedhyper_server_local()
    return w, state, scales, local_rate(listed.update(mean, listed.init(x))[1], 0.01)


ROWS = {
    "universal_checkpoint": Plug(universal_checkpoint, BATCHES),
    "fedhyper": Plug(
        fedhyper_,
        2 + jax.random.normal(jax.random.key(0), (4, 2)),
        hyper={"decay": (0.9, 0.5), "high": (1.5, 1.2), "num_clients": (2.0, 5.0), "global_weight": (0.1, 0.9), "growth": (1.02, 1.5)},
    ),
}
