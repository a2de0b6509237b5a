"""Rows of `ergodax.distributed`."""

from ergodax.distributed import Averaged, Fragmented, Replicated, Vocabulary, ZeroFlat, ZeroPerLeaf, split_atoms, union_fragments
from ergodax.testing import Plug

from .shared import BATCHES


def universal_checkpoint(hyper, x, key):
    table = [("qkv", Fragmented(parts=(2, 4))), ("rows", Vocabulary(6, multiple=4)), ("norm", Averaged()), ("bias", Replicated())]
    ranks = split_atoms({"qkv": x, "rows": x + 1, "norm": x[0], "bias": x[1]}, table, 2)
    drifted = [ranks[0], ranks[1] | {"norm": 3 * x[0]}]
    shapes = {name: leaf.shape for name, leaf in ranks[0].items()}
    vectors = ZeroFlat().split(ranks[0], 4), ZeroPerLeaf().split(ranks[0], 4)
    return {"ranks": ranks, "vectors": vectors, "atoms": union_fragments(drifted, table), "leaves": ZeroPerLeaf().union(vectors[1], shapes)}


ROWS = {
    "universal_checkpoint": Plug(universal_checkpoint, BATCHES),
}
