"""What a search keeps on disk, so that it can be killed at any moment and lose nothing but the piece in flight.

    DIR/search.json                what is searched: config, runs, rule, versions, a fingerprint of each program
    DIR/bracket-N/pieces/P.npz     what the lanes showed after piece P
    DIR/bracket-N/checkpoints/P/   the lanes themselves, by orbax; the last two

A piece counts as done when its checkpoint is in place, and that takes its place whole or not at all, after the piece's record.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .check import require
from .config import UsageError
from .files import flat, jsonable, replacing, write_json
from .leaves import named, restored
from .mesh import is_primary
from .store import describe
from .types import PyTree


@contextlib.contextmanager
def claimed(folder: Path | None, what: Mapping[str, Any]) -> Iterator[None]:
    """The folder as this search's own while it runs.

    Raises `UsageError`, and leaves everything as it is, if the folder belongs to another search, to other code or versions, to a process that still
    runs, is damaged, or cannot be written.
    """
    if folder is None:
        yield
        return
    path, content = folder / "search.json", json.loads(json.dumps(jsonable(describe(what))))
    if path.exists():
        with _undamaged(path):
            old = _flat(json.loads(path.read_text()))
        new = _flat(content)
        if differing := [name for name in new | old if old.get(name) != new.get(name)]:
            changes = ", ".join(f"{name} {old.get(name)} -> {new.get(name)}" for name in differing[:5])
            raise UsageError(f"{folder} holds another search, or was begun with other code ({changes}); choose another folder, or delete it.")
    elif folder.is_dir() and any(entry.name != "lock" for entry in folder.iterdir()):
        raise UsageError(f"{folder} is not empty and holds no search; choose another folder.")
    with _locked(folder) if is_primary() else contextlib.nullcontext():
        if is_primary() and not path.exists():
            write_json(path, content)
        yield


@contextlib.contextmanager
def _locked(folder):
    filelock = require("filelock", "experiments")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / "lock")
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UsageError(f"{folder} is in use: another process runs this search.") from None
    except (OSError, NotImplementedError) as error:
        raise UsageError(f"cannot write to {folder}: {getattr(error, 'strerror', None) or error}.") from error
    try:
        yield
    finally:
        lock.release()


class BracketFolder:
    """The pieces of one bracket. Without a folder it holds none and keeps none."""

    def __init__(self, folder: Path | None):
        self._manager = None
        if folder is not None:
            self._folder = folder
            self._orbax = require("orbax.checkpoint", "experiments")
            options = self._orbax.CheckpointManagerOptions(max_to_keep=2, create=True, enable_async_checkpointing=False)
            self._manager = self._orbax.CheckpointManager(folder.absolute() / "checkpoints", options=options)

    def __enter__(self) -> "BracketFolder":
        return self

    def __exit__(self, *error) -> None:
        if self._manager is not None:
            self._manager.close()

    @property
    def _done(self):
        return 0 if self._manager is None else self._manager.latest_step() or 0

    def records(self) -> list[dict[str, Any]]:
        """Those of the pieces that are done."""
        return [self._read(piece) for piece in range(1, self._done + 1)]

    def restored(self, carry: PyTree) -> PyTree:
        """What was saved last, placed as `carry` is; `carry` itself before the first piece."""
        if self._manager is None or not self._done:
            return carry
        with _undamaged(self._folder / "checkpoints"):
            return restored(carry, self._manager.restore(self._done, args=self._orbax.args.StandardRestore(named(carry))))

    def save(self, piece: int, record: Mapping[str, Any], carry: PyTree) -> None:
        """Put a piece on disk. All processes call it."""
        if self._manager is None:
            return
        if is_primary():
            path = self._path(piece)
            path.parent.mkdir(exist_ok=True)
            values = {f"values/{name}": column for name, column in record["values"].items()}
            with replacing(path) as file:
                np.savez(file, **{name: column for name, column in record.items() if name != "values"}, **values)
        self._manager.save(piece, args=self._orbax.args.StandardSave(named(carry)))

    def _path(self, piece):
        return self._folder / "pieces" / f"{piece}.npz"

    def _read(self, piece):
        with _undamaged(self._path(piece)), np.load(self._path(piece)) as content:
            columns = dict(content)
        values = {name.removeprefix("values/"): columns.pop(name) for name in list(columns) if name.startswith("values/")}
        return columns | {"values": values}


def _flat(about):
    """One level of names, lists by place."""
    return flat({name: {str(i): item for i, item in enumerate(part)} if isinstance(part, list) else part for name, part in about.items()})


@contextlib.contextmanager
def _undamaged(path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # numpy, zipfile, orbax and tensorstore each have errors of their own
        raise UsageError(f"{path} is damaged ({' '.join(str(error).split())[:200]}); delete the search's folder to begin again.") from error


__all__ = ["BracketFolder", "claimed"]
