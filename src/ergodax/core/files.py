"""Files that are there whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A binary file that takes `path`'s place only once it is whole and on the disk; after an error nothing of it is left."""
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(jsonable(content), indent=2, allow_nan=False) + "\n").encode())


def jsonable(value: Any) -> Any:
    """Plain Python for JSON: arrays as lists, numbers that are not finite as null, paths as text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return jsonable(np.asarray(value).tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined with dots."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {name: value for key, item in tree.items() for name, value in flat(item, f"{prefix}.{key}" if prefix else str(key)).items()}


__all__ = ["flat", "jsonable", "replacing", "write_json"]
