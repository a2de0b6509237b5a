"""What a sweep keeps on disk, so that it can be killed at any moment and lose nothing but the chunk in flight.

    DIR/sweep.json            the config, every run's overrides, versions, a fingerprint of each program
    DIR/chunks/000000.parquet one row per run of a finished chunk: config leaves, scalars, curves (named by its first run)
    DIR/states/000000/        the chunk's larger arrays (parameters, samples), by orbax
    DIR/table.parquet         all rows, once every run is done
    DIR/timing.json           seconds, compiles and cache hits of each session that got to an end

A chunk counts as done when its parquet file is in place, and that takes its place whole or not at all, after the arrays that belong to it.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .check import require
from .config import UsageError
from .files import flat, jsonable, replacing, write_json
from .leaves import is_key, named
from .mesh import from_primary


_FORMAT = 1


class StorageError(RuntimeError):
    """A result could not be written. What was finished before is safe."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A finished chunk, as its file tells it."""

    runs: tuple[int, ...]
    batch_size: int  # lanes vmapped together
    seconds: float  # from its start to its end
    compile_seconds: float  # of the program it ran, if that was compiled for it
    states: str | None = None  # digest of the folder of states, if there is one


class Store:
    """The folder of one sweep. The first process decides and writes for all of them.

    `description`: what the sweep computes, JSON-able; `config`, `runs`, `leaves`, `versions` and `programs`.

    Raises `UsageError`, and leaves everything as it is, if the folder belongs to another sweep, to other versions, to a process that still runs, is
    damaged, or cannot be written.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any]):
        self.folder = folder.absolute()
        self._lock: Any = None
        self.chunks: list[Chunk] = from_primary(lambda: self._claim({"format": _FORMAT} | jsonable(description)))

    def _claim(self, description):
        filelock = require("filelock", "experiments")
        path = self.folder / "sweep.json"
        try:
            if path.exists():
                _compare(self.folder, _read_json(path), description)
                if chunks := read_chunks(self.folder):
                    read_rows(self.folder, chunks)  # damage is found before anything is touched
            elif self.folder.exists() and any(entry.name != "lock" for entry in self.folder.iterdir()):
                raise UsageError(f"{self.folder} is not empty and holds no sweep; choose another folder.")
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(self.folder / "lock")
            self._lock.acquire(timeout=0)
            for name in ("chunks", "states"):
                (self.folder / name).mkdir(exist_ok=True)
            if not path.exists():
                write_json(path, description)
        except filelock.Timeout:
            raise UsageError(f"{self.folder} is in use: another process runs this sweep.") from None
        except OSError as error:
            raise UsageError(f"cannot write to {self.folder}: {error.strerror}.") from error
        return read_chunks(self.folder)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *error) -> None:
        if self._lock is not None:
            self._lock.release()

    @property
    def finished(self) -> bool:
        """Whether the whole table is there."""
        return (self.folder / "table.parquet").exists()

    def commit(self, chunk: Chunk, columns: Mapping[str, Any], states: Any) -> None:
        """Put a finished chunk on disk. `columns`: what `table_of` takes, a value per run; `states`: a pytree of stacked arrays, or None.

        All processes call it, since each of them may hold a part of the states. Raises `StorageError` if the disk does not take it.
        """
        name = f"{chunk.runs[0]:06d}"
        try:
            if states is not None:
                with require("orbax.checkpoint", "experiments").StandardCheckpointer() as checkpointer:
                    checkpointer.save(self.folder / "states" / name, named(states), force=True)
            self.chunks.append(from_primary(lambda: self._write(name, chunk, columns, states is not None)))
        except (OSError, ValueError) as error:  # orbax has a ValueError for what the disk says
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            safe = f"{sum(len(done.runs) for done in self.chunks)} finished runs are safe; once that is mended, the same call goes on from there"
            raise StorageError(f"cannot write chunk {name} of {self.folder}: {reason}. {safe}.") from error

    def _write(self, name, chunk, columns, has_states):
        if has_states:
            chunk = dataclasses.replace(chunk, states=_digest(self.folder / "states" / name))
        write_table(self.folder / "chunks" / f"{name}.parquet", table_of(columns), {"ergodax": json.dumps(dataclasses.asdict(chunk))})
        return chunk

    def finish(self, timing: Mapping[str, Any]) -> None:
        """Write the whole table, if it is not there, and add to `timing.json` what this session took."""
        from_primary(lambda: self._finish(timing))

    def _finish(self, timing):
        table, sessions = self.folder / "table.parquet", self.folder / "timing.json"
        if table.exists():
            return
        try:
            write_json(sessions, [*(_read_json(sessions) if sessions.exists() else []), timing])
            write_table(table, read_rows(self.folder, self.chunks), {})
        except OSError as error:
            raise StorageError(f"cannot write the table of {self.folder}: {error.strerror}. Every run is safe in its chunk.") from error


def read_description(folder: Path) -> dict[str, Any]:
    """`sweep.json`. Raises `UsageError` if the folder holds no sweep."""
    if not (folder / "sweep.json").exists():
        raise UsageError(f"{folder} holds no sweep: there is no sweep.json.")
    return _read_json(folder / "sweep.json")


def read_chunks(folder: Path) -> list[Chunk]:
    """The finished chunks, in the order of their runs. Raises `UsageError` naming a file that is damaged."""
    chunks = []
    for path in sorted((folder / "chunks").glob("*.parquet")):
        with _undamaged(path):
            about = json.loads(require("pyarrow.parquet", "experiments").read_schema(path).metadata[b"ergodax"])
            chunks.append(Chunk(**about | {"runs": tuple(about["runs"])}))
            if path.stem != f"{chunks[-1].runs[0]:06d}":
                raise ValueError(f"it is the chunk of run {chunks[-1].runs[0]}")
    return chunks


def read_rows(folder: Path, chunks: Sequence[Chunk]) -> Any:
    """The rows of the finished chunks, by run, as a pyarrow table. Raises `UsageError` naming a file that is damaged."""
    pyarrow, parquet = require("pyarrow", "experiments"), require("pyarrow.parquet", "experiments")
    tables = []
    for chunk in chunks:
        path = folder / "chunks" / f"{chunk.runs[0]:06d}.parquet"
        with _undamaged(path):
            tables.append(parquet.read_table(path, page_checksum_verification=True, use_threads=False).replace_schema_metadata(None))
            if tables[-1]["run"].to_pylist() != list(chunk.runs):
                raise ValueError("its rows are not those of its runs")
    return pyarrow.concat_tables(tables, promote_options="default").sort_by("run")


def read_states(folder: Path, chunk: Chunk) -> dict[str, np.ndarray]:
    """The larger arrays of a chunk by name, stacked in the order of its runs. Raises `UsageError` if they are damaged."""
    path = folder / "states" / f"{chunk.runs[0]:06d}"
    with _undamaged(path, f"{path} and {folder / 'chunks' / path.name}.parquet"):
        if _digest(path) != chunk.states:
            raise ValueError("its content is not what was written")
        orbax = require("orbax.checkpoint", "experiments")
        me = jax.process_index()  # each process reads for itself, without waiting for the others
        alone = orbax.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}")
        handler = orbax.PyTreeCheckpointHandler(multiprocessing_options=alone)
        with orbax.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            names = checkpointer.metadata(path).item_metadata.tree
            as_numpy = {name: orbax.RestoreArgs(restore_type=np.ndarray) for name in names}  # whole in every process, wherever they were
            return checkpointer.restore(path, args=orbax.args.PyTreeRestore(restore_args=as_numpy))


def write_table(path: Path, table: Any, about: Mapping[str, str]) -> None:
    """A pyarrow table as a parquet file, whole or not at all."""
    parquet = require("pyarrow.parquet", "experiments")
    with replacing(path) as file:
        parquet.write_table(table.replace_schema_metadata(dict(about)), file, write_page_checksum=True)


def table_of(columns: Mapping[str, Any]) -> Any:
    """A pyarrow table: arrays of one axis as they are, of two as lists, pyarrow arrays untouched."""
    pyarrow = require("pyarrow", "experiments")

    def column(values):
        if not isinstance(values, np.ndarray):
            return values
        if values.dtype.itemsize == 2 and values.dtype.kind in "fV":  # half precisions, of which parquet knows one
            values = values.astype(np.float32)
        return pyarrow.array(list(values) if values.ndim == 2 else values, pyarrow.list_(_arrow(values)) if values.ndim == 2 else _arrow(values))

    return pyarrow.table({name: column(values) for name, values in columns.items()})


def leaf_column(values: Sequence[Any]) -> Any:
    """The values of one config leaf over all runs as a typed pyarrow array; what is not a bool, number or text is described in text."""
    pyarrow = require("pyarrow", "experiments")
    plain = [value.item() if isinstance(value, np.generic | np.ndarray | jax.Array) and np.ndim(value) == 0 else value for value in values]
    kinds = {type(value) for value in plain if value is not None}
    for allowed, arrow in (({bool}, pyarrow.bool_()), ({int}, pyarrow.int64()), ({int, float}, pyarrow.float64()), ({str}, pyarrow.string())):
        if kinds <= allowed:
            return pyarrow.array(plain, arrow)
    return pyarrow.array([None if value is None else label(value) for value in plain], pyarrow.string())


def describe(value: Any) -> Any:
    """A config leaf in JSON: what is not plain by its `repr` without addresses, arrays by shape and digest."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray | jax.Array) and np.ndim(value) == 0 and not is_key(value)):
        return np.asarray(value).item()
    if isinstance(value, np.ndarray | jax.Array):
        data = np.asarray(jax.random.key_data(value) if is_key(value) else value)
        return f"array {data.dtype}{list(data.shape)} {hashlib.sha256(data.tobytes()).hexdigest()[:12]}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__qualname__} | fields
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return without_addresses(getattr(value, "__qualname__", None) or repr(value))


def label(value: Any) -> str:
    """A config leaf in a few words: a number or text as it is, an object by its type and what differs from its defaults."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return str(describe(value))
    fields = ((field.name, getattr(value, field.name), field.default) for field in dataclasses.fields(value))
    given = ", ".join(f"{name}={label(now)}" for name, now, default in fields if describe(now) != describe(default))
    return f"{type(value).__name__}({given})"


def without_addresses(text: str) -> str:
    """`text` without the addresses of objects, which change from process to process."""
    return re.sub(r"0x[0-9a-f]+", "0x", text)


def versions() -> dict[str, str]:
    """What decides the numbers besides the program."""
    return {name: metadata.version(name) for name in ("ergodax", "jax", "jaxlib")} | {"platform": jax.default_backend()}


def _arrow(values):
    return require("pyarrow", "experiments").from_numpy_dtype(values.dtype)


def _compare(folder, old, new):
    if old.get("format") != _FORMAT:
        raise UsageError(f"{folder} was written in format {old.get('format')}, this version writes {_FORMAT}; choose another folder.")
    if old["config"] != new["config"] or old["runs"] != new["runs"]:
        raise UsageError(f"{folder} holds another sweep ({_difference(old, new)}); choose another folder, or delete it.")
    for part, advice in (("versions", "its environment"), ("programs", "the code it was begun with")):
        if (before := old.get(part)) != (now := new.get(part)):
            changes = ", ".join(f"{name} {before.get(name)} -> {now.get(name)}" for name in now if before.get(name) != now.get(name))
            raise UsageError(
                f"{folder} was computed by another code version ({part}: {changes}); its runs would not compare. Go back to {advice}, choose another "
                "folder, or read what is there with `SweepResult.load`."
            )


def _difference(old, new):
    before, now = flat(old["config"]), flat(new["config"])
    changes = [f"{name} {before.get(name)} -> {now.get(name)}" for name in before | now if before.get(name) != now.get(name)]
    if len(old["runs"]) != len(new["runs"]):
        changes.append(f"{len(old['runs'])} -> {len(new['runs'])} runs")
    else:
        differing = [i for i, pair in enumerate(zip(old["runs"], new["runs"])) if pair[0] != pair[1]]
        changes += [f"run {i}: {old['runs'][i]} -> {new['runs'][i]}" for i in differing[:1]]
    return ", ".join(changes[:5])


def _read_json(path):
    with _undamaged(path, f"the folder {path.parent}"):
        return json.loads(path.read_text())


@contextlib.contextmanager
def _undamaged(path: Path, remedy: str = "") -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # pyarrow, orbax and tensorstore each have errors of their own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"{path} is damaged ({reason}); delete {remedy or 'it'} and start again to compute its runs anew.") from error


def _digest(folder):
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


__all__ = ["Chunk", "StorageError", "Store"]
