"""Universal checkpointing: a training state saved on one parallel layout goes on from there on any other.

Lian, Jacobs, Kurilenko, Tanaka, Bekman, Ruwase, Zhang 2024, "Universal Checkpointing: Efficient and Flexible Checkpointing for Large Scale
Distributed Training" (arXiv:2406.18820). A checkpoint holds one ATOM per leaf (parameter, Adam moment, step, random key): the whole array under its
name, with no trace of the mesh it was cut for. A `jax.Array` knows its own layout, so nothing has to be said to save it, and to load it only where it
shall go:

    save_universal(folder, state)                    # state sharded over mesh A
    state = load_universal(folder, like)             # like: arrays, or ShapeDtypeStructs, with shardings over mesh B

Saving and loading are orbax's: every process writes and reads only the shards it holds. Jobs with hand-made shards make their atoms with the pattern
language of `fragments.py`, as a flat dict of names and arrays. Names join the keys of nested containers with "/", so that what is saved from a flat
dict {"params/w": …} is loaded into a nested state {"params": {"w": …}}, and the other way round.
"""

import contextlib
import math
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..core.check import require
from ..core.types import PyTree


def save_universal(folder: Path | str, state: PyTree) -> None:
    """Save every array of `state` as an atom.

    - `folder`: made if absent. A checkpoint that it holds is replaced once the new one is complete: a job killed at any moment leaves the one or the
      other. Use one folder per step to keep several.
    - `state`: any pytree: JAX arrays sharded in any way, random keys, NumPy arrays and Python numbers. `None`, functions and other leaves are not
      saved. In a job of several processes all of them call this, and arrays are either global or (uncommitted) the same everywhere.

    Raises `ValueError` for a state without arrays, and for two leaves of one name.
    """
    atoms = {name: _stored(leaf) for name, leaf in _named(state).items() if math.prod(np.shape(leaf))}  # orbax has no place for empty arrays
    if not atoms:
        raise ValueError("`state` holds no array to save.")
    orbax = require("orbax.checkpoint", "experiments")
    with _manager(orbax, folder, create=True) as manager:
        latest = manager.latest_step()
        manager.save(0 if latest is None else latest + 1, args=orbax.args.PyTreeSave(atoms))


def load_universal(folder: Path | str, like: PyTree = None) -> PyTree:
    """Load atoms into a pytree like `like`, on its shardings and in its dtypes.

    - `folder`: what `save_universal` was given.
    - `like`: JAX arrays, `jax.ShapeDtypeStruct`s (`jax.eval_shape` makes them), NumPy arrays and Python numbers; other leaves come back as they are.
      A leaf with a sharding (committed to it) is read straight into it, each process its own shards; one without goes to the default device. Atoms
      that `like` lacks are not read. None, the default, gives all atoms as a flat dict of NumPy arrays, keys as their data.

    Raises `ValueError` for a folder without a complete checkpoint, a leaf that is not in it, another shape, a dtype of another kind (float for
    integer), or a sharding that does not divide the shape.
    """
    orbax = require("orbax.checkpoint", "experiments")
    with _manager(orbax, folder, create=False) as manager:
        with _reading(folder):
            latest = manager.latest_step()
            metadata = None if latest is None else manager.item_metadata(latest)
        if metadata is None:
            raise ValueError(f"{folder} holds no complete checkpoint.")
        stored = dict(metadata.tree)
        if like is None:
            like = {name: np.broadcast_to(np.zeros((), atom.dtype), atom.shape) for name, atom in stored.items()}
        targets = _named(like)
        restore = {}
        for name, leaf in targets.items():
            shape, dtype, sharding = _wanted(leaf)
            if math.prod(shape) == 0:
                continue
            _check_target(folder, name, stored, shape, dtype, sharding)
            if sharding is None:
                restore[name] = orbax.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
            else:
                restore[name] = orbax.ArrayRestoreArgs(sharding=sharding, global_shape=shape, dtype=dtype)
        with _reading(folder):
            args = orbax.args.PyTreeRestore(item=dict.fromkeys(restore, 0), restore_args=restore, partial_restore=True)
            atoms = manager.restore(latest, args=args) if restore else {}
    leaves, structure = jax.tree.flatten(like)
    names = iter(targets)
    return jax.tree.unflatten(structure, [_like(leaf, atoms.get(next(names))) if _is_atom(leaf) else leaf for leaf in leaves])


def _manager(orbax, folder, create):
    # The manager numbers the checkpoints and drops the old one after the new one is complete.
    options = orbax.CheckpointManagerOptions(max_to_keep=1 if create else None, create=create, enable_async_checkpointing=False)
    return orbax.CheckpointManager(Path(folder).absolute(), item_handlers=orbax.PyTreeCheckpointHandler(), options=options)


@contextlib.contextmanager
def _reading(folder):
    try:
        yield
    except Exception as error:  # orbax and its storage raise many kinds
        raise ValueError(f"{folder} could not be read: {error}") from error


def _is_atom(leaf):
    return eqx.is_array_like(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _is_key(leaf):
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named(state):
    """The leaves that are atoms, by the names of their places."""
    leaves, _ = jax.tree.flatten_with_path(state)
    named = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves if _is_atom(leaf)]
    if len(dict(named)) < len(named):
        names = [name for name, _ in named]
        raise ValueError(f"two leaves are named `{next(name for name in names if names.count(name) > 1)}`.")
    return dict(named)


def _stored(leaf):
    """A leaf as orbax takes it; one that is not bound to devices goes by way of the host, which several processes may do too."""
    leaf = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    return leaf if isinstance(leaf, jax.Array) and leaf.committed else np.asarray(leaf)


def _wanted(leaf):
    """Shape, dtype and sharding (None for the host) of the atom that fills `leaf`."""
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    sharding = None if isinstance(leaf, jax.Array) and not leaf.committed else getattr(leaf, "sharding", None)
    return np.shape(data), getattr(data, "dtype", None) or np.asarray(data).dtype, sharding


def _check_target(folder, name, stored, shape, dtype, sharding):
    if name not in stored:
        raise ValueError(f"{folder} holds no leaf `{name}`; it has {', '.join(stored)}.")
    atom = stored[name]
    if tuple(atom.shape) != shape:
        raise ValueError(f"leaf `{name}` has shape {tuple(atom.shape)} in {folder}, but {shape} was asked for.")
    if _kind(atom.dtype) != _kind(dtype):
        raise ValueError(f"leaf `{name}` is {atom.dtype} in {folder}, which does not become {dtype}.")
    if isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh):
        raise ValueError(f"leaf `{name}` needs a sharding over devices, got one over an abstract mesh (from `jax.eval_shape`?).")
    if sharding is not None:
        try:
            sharding.shard_shape(shape)
        except ValueError as error:
            raise ValueError(f"leaf `{name}`: {error}") from error


def _kind(dtype):
    return [jnp.issubdtype(dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)]


def _like(leaf, atom):
    """The atom as a leaf of the same kind as `leaf`."""
    shape, dtype, sharding = _wanted(leaf)
    if atom is None:
        atom = np.zeros(shape, dtype)  # an empty array, which was not stored
    if isinstance(leaf, np.ndarray | np.generic):
        return atom
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return type(leaf)(atom.item())
    atom = jnp.asarray(atom) if sharding is None else jax.device_put(atom, sharding)
    return jax.random.wrap_key_data(atom, impl=jax.random.key_impl(jnp.empty((), leaf.dtype))) if _is_key(leaf) else atom


__all__ = ["load_universal", "save_universal"]
