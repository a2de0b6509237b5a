"""The pattern language of universal checkpointing: fragments, as the ranks of a parallel job hold them, to whole leaves and back.

Lian et al. 2024 (arXiv:2406.18820). A job with hand-made shards (Megatron, DeepSpeed, `shard_map`) writes, for each rank, a mapping of names to local
arrays. What a fragment is to the whole leaf, its atom, is said by a table of (regular expression, `Pattern`). A table describes ONE mesh axis, so a
layout of several axes is undone axis by axis, and made in the reverse order:

    dp       ZeroFlat().union(vectors, shapes)                  (zero.py) where its ranks hold slices of a flat vector; if copies, as for pp
    pp       union_fragments(ranks, [(".*", Replicated())])     a leaf of one stage alone is a single copy; tied ones must be equal
    tp       union_fragments(ranks, [(".*qkv/weight", Fragmented(parts=(8, 4, 4))), (".*norm.*", Replicated()), …])

An expression must match the whole name: `.*qkv/weight` covers the weight and both its moments, if these are named so. The atoms go to
`save_universal`, and `load_universal(folder)` gives them back.

Deviations from the paper and its released converter (DeepSpeed's `ds_to_universal.py`). There, a leaf that no pattern matches is joined along
dimension 0; here that is an error, as are two patterns for a leaf and a pattern for none. There, patterns work from file to file; here they are
functions of arrays, NumPy's (on the host, in their own precision) or JAX's (also traced, where only shapes and dtypes can be checked). Files fit in:
`numpy.load` of an .npz is a mapping that reads a leaf when it is asked for.
"""

import abc
import contextlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from ..core.check import check_count, is_concrete


#: An array of either library.
AnyArray = Shaped[Array, "..."] | Shaped[np.ndarray, "..."]


class Pattern(eqx.Module):
    """The socket of the pattern language: what the fragments of a leaf on the ranks of one mesh axis are to the whole, its atom."""

    @abc.abstractmethod
    def union(self, fragments: Sequence[AnyArray | None]) -> AnyArray:
        """The atom, from one fragment per rank; None for a rank that holds none. Raises `ValueError` where they do not fit together."""

    @abc.abstractmethod
    def split(self, atom: AnyArray, num_ranks: int) -> Sequence[AnyArray | None]:
        """One fragment per rank, the inverse of `union`. Raises `ValueError` where the atom cannot be cut so."""


class Replicated(Pattern):
    """Every rank that holds the leaf holds all of it (the paper's `replicate_params`). The copies must be equal to the bit."""

    def union(self, fragments):
        copies = _checked([fragment for fragment in fragments if fragment is not None])
        if is_concrete(copies):
            first, *others = (np.frombuffer(np.asarray(copy).tobytes(), np.uint8) for copy in copies)  # bits: NaN equals NaN
            for i, other in enumerate(others, 1):
                if (differing := np.flatnonzero(first != other)).size:
                    entry = int(differing[0]) // copies[0].dtype.itemsize
                    values = [np.ravel(np.asarray(copies[j]))[entry] for j in (0, i)]
                    raise ValueError(f"copies 0 and {i} must be equal, but entry {entry} is {values[0]} and {values[1]}.")
        return copies[0]

    def split(self, atom, num_ranks):
        return [atom] * num_ranks


class Unique(Pattern):
    """One rank alone holds the leaf (`unique_params`), as on a pipeline stage. `rank` is the one that gets it in `split` (default 0)."""

    rank: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        check_count("rank", self.rank, low=0)

    def union(self, fragments):
        holders = [i for i, fragment in enumerate(fragments) if fragment is not None]
        if len(holders) != 1:
            raise ValueError(f"exactly one rank must hold it, but ranks {holders} do.")
        return fragments[holders[0]]

    def split(self, atom, num_ranks):
        if self.rank >= num_ranks:
            raise ValueError(f"it belongs to rank {self.rank}, but there are {num_ranks} ranks.")
        return [atom if i == self.rank else None for i in range(num_ranks)]


class Averaged(Pattern):
    """Copies that drifted apart (`params_to_average`): the atom is their mean, taken in at least float32."""

    def union(self, fragments):
        copies = _checked(fragments)
        dtype = copies[0].dtype
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(f"only floating-point leaves have a mean, got {dtype}.")
        wide = dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)
        return (sum((copy.astype(wide) for copy in copies[1:]), start=copies[0].astype(wide)) / len(copies)).astype(dtype)

    def split(self, atom, num_ranks):
        return [atom] * num_ranks


class Fragmented(Pattern):
    """The leaf is cut along `dim` (`fragment_params`).

    - `dim`: the dimension that is cut, default 0.
    - `parts`: sizes along `dim` of sub-parameters of which each is cut on its own: `(8, 4, 4)` for queries, keys and values fused into one leaf,
      `(hidden,) * num_experts` for experts stacked into [num_experts · hidden, dim]. Default None: the leaf is one part.
    """

    dim: int = eqx.field(static=True, default=0)
    parts: tuple[int, ...] | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_count("dim", self.dim, low=0)
        for part in self.parts or ():
            check_count("parts", part)

    def union(self, fragments):
        fragments = _checked(fragments, self.dim)
        joined = _concatenate(fragments, self.dim)
        if not self.parts:
            return joined
        _checked(fragments)  # of equal size too
        local = self._local_parts(joined.shape, len(fragments))
        cuts = list(itertools.accumulate(local))[:-1]
        pieces = zip(*(_library(fragments).split(fragment, cuts, axis=self.dim) for fragment in fragments))
        return _concatenate(list(itertools.chain.from_iterable(pieces)), self.dim)

    def split(self, atom, num_ranks):
        local = self._local_parts(atom.shape, num_ranks)
        cuts = list(itertools.accumulate(size * num_ranks for size in local))[:-1]
        library = _library([atom])
        pieces = [library.split(part, num_ranks, axis=self.dim) for part in library.split(atom, cuts, axis=self.dim)]
        return [_concatenate(list(ranks), self.dim) for ranks in zip(*pieces)]

    def _local_parts(self, shape, num_ranks):
        """The sizes of the parts on one rank."""
        if len(shape) <= self.dim:
            raise ValueError(f"it is cut along dimension {self.dim}, but has shape {tuple(shape)}.")
        parts = self.parts or (shape[self.dim],)
        if sum(parts) != shape[self.dim]:
            raise ValueError(f"parts {parts} sum to {sum(parts)}, but dimension {self.dim} has size {shape[self.dim]}.")
        if any(part % num_ranks for part in parts):
            raise ValueError(f"{num_ranks} ranks must divide each of the parts {parts} of dimension {self.dim}.")
        return [part // num_ranks for part in parts]


class Vocabulary(Pattern):
    """Rows of an embedding, cut along dimension 0 after padding. The atom has the true rows alone; `split` pads with zeros.

    - `size`: the true number of rows.
    - `multiple`: each rank's rows are a multiple of it, default 1 (Megatron's default is 128).
    """

    size: int = eqx.field(static=True)
    multiple: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        check_count("size", self.size)
        check_count("multiple", self.multiple)

    def union(self, fragments):
        joined = Fragmented().union(fragments)
        if joined.shape[0] < self.size:
            raise ValueError(f"the vocabulary has {self.size} rows, but the ranks hold {joined.shape[0]}.")
        return joined[: self.size]

    def split(self, atom, num_ranks):
        if atom.shape[:1] != (self.size,):
            raise ValueError(f"the vocabulary has {self.size} rows, but the shape is {tuple(atom.shape)}.")
        return Fragmented().split(_padded(atom, self.multiple * num_ranks), num_ranks)


def union_fragments(ranks: Sequence[Mapping[str, Any]], patterns: Sequence[tuple[str, Pattern]]) -> dict[str, AnyArray]:
    """The atoms, from what each rank of a mesh axis holds.

    - `ranks`: for each rank, in order, its local arrays by name.
    - `patterns`: (regular expression, pattern); the expression must match the whole name.

    Raises `ValueError`, naming the leaf, where a leaf has no pattern or two, where a pattern has no leaf, and where fragments do not fit together
    (copies that differ, such as step counts; shapes, dtypes, a rank without its fragment).
    """
    atoms = {}
    for name, pattern in _assigned(itertools.chain.from_iterable(ranks), patterns).items():
        with _naming(name):
            atoms[name] = pattern.union([_array(rank[name]) if name in rank else None for rank in ranks])
    return atoms


def split_atoms(atoms: Mapping[str, Any], patterns: Sequence[tuple[str, Pattern]], num_ranks: int) -> list[dict[str, AnyArray]]:
    """What each of `num_ranks` ranks of a mesh axis holds: the inverse of `union_fragments`, with the same errors."""
    check_count("num_ranks", num_ranks)
    ranks: list[dict[str, AnyArray]] = [{} for _ in range(num_ranks)]
    for name, pattern in _assigned(atoms, patterns).items():
        with _naming(name):
            for rank, fragment in zip(ranks, pattern.split(_array(atoms[name]), num_ranks), strict=True):
                if fragment is not None:
                    rank[name] = fragment
    return ranks


def _array(value):
    return value if isinstance(value, jax.Array) else np.asarray(value)


def _library(arrays):
    return jnp if any(isinstance(array, jax.Array) for array in arrays) else np


def _concatenate(arrays, dim):
    return _library(arrays).concatenate(arrays, axis=dim)


def _padded_size(size, multiple):
    return -(-size // multiple) * multiple


def _padded(array, multiple):
    """`array` with zeros after its last row, up to a multiple of rows."""
    missing = _padded_size(array.shape[0], multiple) - array.shape[0]
    return _library([array]).pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))


def _checked(fragments, dim=None):
    """The fragments, if all ranks have one, of one dtype, and of one shape but for `dim`."""
    if not fragments or any(fragment is None for fragment in fragments):
        raise ValueError(f"ranks {[i for i, fragment in enumerate(fragments) if fragment is None]} of {len(fragments)} hold none.")
    kinds = {(fragment.dtype, tuple(size for i, size in enumerate(fragment.shape) if i != dim), fragment.ndim) for fragment in fragments}
    if len(kinds) > 1 or (dim is not None and fragments[0].ndim <= dim):
        along = "" if dim is None else f" (cut along dimension {dim})"
        raise ValueError(f"the fragments do not fit together{along}: {', '.join(f'{f.dtype}{list(f.shape)}' for f in fragments)}.")
    return list(fragments)


def _assigned(names: Iterable[str], patterns: Sequence[tuple[str, Pattern]]) -> dict[str, Pattern]:
    """The one pattern of each name."""
    assigned, used = {}, set()
    for name in dict.fromkeys(names):
        matches = [(expression, pattern) for expression, pattern in patterns if re.fullmatch(expression, name)]
        if len(matches) != 1:
            raise ValueError(f"leaf `{name}` needs one pattern, but {[expression for expression, _ in matches] or 'none'} match it.")
        [(expression, assigned[name])] = matches
        used.add(expression)
    if unused := [expression for expression, _ in patterns if expression not in used]:
        raise ValueError(f"patterns {unused} match no leaf; there are {', '.join(assigned)}.")
    return assigned


@contextlib.contextmanager
def _naming(name):
    try:
        yield
    except ValueError as error:
        raise ValueError(f"leaf `{name}`: {error}") from error


__all__ = [
    "Averaged",
    "Fragmented",
    "Pattern",
    "Replicated",
    "Unique",
    "Vocabulary",
    "split_atoms",
    "union_fragments",
]
