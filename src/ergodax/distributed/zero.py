"""ZeRO's flat slices: leaves to the vectors that data-parallel ranks hold, and back, for universal checkpointing.

Rajbhandari, Rasley, Ruwase, He 2020 (arXiv:1910.02054) deal parameters and optimiser state out over the data-parallel ranks as slices of flat,
padded vectors; Lian et al. 2024 (arXiv:2406.18820) strip the padding and restore the leaves. The leaves here are those of ONE rank of the other mesh
axes (its tensor-parallel fragments, its pipeline stage); the patterns of `fragments.py` go on from there. Parameters and each moment have vectors of
their own, of the same layout.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import equinox as eqx

from ..core.check import check_count
from .fragments import AnyArray, _checked, _concatenate, _library, _padded, _padded_size


class ZeroFlat(eqx.Module):
    """ZeRO stages 1 and 2: the leaves of a rank flattened, joined, padded at the end, and dealt out evenly over the data-parallel ranks.

    - `alignment`: the padding is up to a multiple of `alignment` × ranks, default 1 (DeepSpeed's optimiser has 2).
    """

    alignment: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        check_count("alignment", self.alignment)

    def split(self, leaves: Mapping[str, AnyArray], num_ranks: int) -> list[AnyArray]:
        """One vector per rank. The order is that of `leaves`, which must share a dtype."""
        check_count("num_ranks", num_ranks)
        flat = _concatenate([leaf.reshape(-1) for leaf in _same_dtype(leaves)], 0)
        return list(_library([flat]).split(_padded(flat, self.alignment * num_ranks), num_ranks))

    def union(self, fragments: Sequence[AnyArray], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, AnyArray]:
        """The leaves, without the padding. `shapes` are theirs, in the order in which they were joined.

        Raises `ValueError` if the vectors differ in length or dtype, or are not as long as `shapes` says.
        """
        fragments = _checked(fragments)
        size = sum(math.prod(shape) for shape in shapes.values())
        _check_length(fragments, _padded_size(size, self.alignment * len(fragments)) // len(fragments))
        return _unflatten(_concatenate(fragments, 0), shapes)


class ZeroPerLeaf(eqx.Module):
    """ZeRO stage 3: each leaf flattened, padded and dealt out on its own; a rank's vector joins its slices."""

    def split(self, leaves: Mapping[str, AnyArray], num_ranks: int) -> list[AnyArray]:
        """One vector per rank. The order is that of `leaves`, which must share a dtype."""
        check_count("num_ranks", num_ranks)
        slices = [ZeroFlat().split({"leaf": leaf}, num_ranks) for leaf in _same_dtype(leaves)]
        return [_concatenate(list(pieces), 0) for pieces in zip(*slices)]

    def union(self, fragments: Sequence[AnyArray], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, AnyArray]:
        """The leaves, without the padding. `shapes` are theirs, in the order in which they were joined; errors as in `ZeroFlat`."""
        fragments = _checked(fragments)
        sizes = [_padded_size(math.prod(shape), len(fragments)) // len(fragments) for shape in shapes.values()]
        _check_length(fragments, sum(sizes))
        ends = list(itertools.accumulate(sizes))
        slices = [[fragment[end - size : end] for fragment in fragments] for size, end in zip(sizes, ends)]
        return {name: ZeroFlat().union(pieces, {name: shape})[name] for pieces, (name, shape) in zip(slices, shapes.items())}


def _same_dtype(leaves):
    if len(dtypes := {str(leaf.dtype) for leaf in leaves.values()}) != 1:
        raise ValueError(f"the leaves of a flat vector must share a dtype, got {', '.join(sorted(dtypes)) or 'no leaf'}.")
    return list(leaves.values())


def _check_length(fragments, length):
    if fragments[0].shape != (length,):
        raise ValueError(f"the shapes make vectors of length {length} on {len(fragments)} ranks, but theirs is {fragments[0].shape}.")


def _unflatten(flat, shapes):
    ends = itertools.accumulate(math.prod(shape) for shape in shapes.values())
    return {name: flat[end - math.prod(shape) : end].reshape(shape) for (name, shape), end in zip(shapes.items(), ends)}


__all__ = ["ZeroFlat", "ZeroPerLeaf"]
