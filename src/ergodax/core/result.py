"""What came of a sweep: one row per run, its curves and its arrays."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .check import require
from .leaves import restored
from .store import Chunk, label, leaf_column, read_chunks, read_description, read_rows, read_states, table_of, write_table


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that share one program."""

    static: dict[str, Any]  # the overrides they have in common
    runs: tuple[int, ...]  # their places in the list of overrides
    batch_size: int  # runs vmapped together in its last chunk
    memory: int | None  # bytes that a chunk takes on each device, by XLA's account; None if nothing was left to run
    compiles: int  # programs built: one, and one for each further batch size that was tried
    compile_seconds: float  # trace, lower and compile; little if the persistent cache had the programs
    run_seconds: float
    tried: dict[int, float]  # seconds per run on one device, by batch size


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """Runs in the order of their overrides.

    - `runs`: their places in the list of overrides; all of them, unless the sweep was read from disk before its end.
    - `leaves`: the config leaves that the sweep sets, as lists of values.
    - `metrics`: what the runs returned, by name: shape (runs,), or (runs, length) for a curve.
    - `outputs`: the whole output of each run, a pytree of numpy arrays; read from disk when asked for, if the sweep has a folder.
    - `groups`: one per program.
    - `cache_hits`: programs that came from the persistent compile cache.
    """

    runs: Sequence[int]
    leaves: dict[str, list]
    metrics: dict[str, np.ndarray]
    outputs: Sequence[Any]
    groups: list[Group]
    cache_hits: int = 0

    @staticmethod
    def load(folder: Path | str) -> "SweepResult":
        """The finished runs of a sweep's folder; outputs are dicts by name. Raises `UsageError` if it holds none or is damaged."""
        folder = Path(folder).absolute()
        description, chunks = read_description(folder), read_chunks(folder)
        if not chunks:
            return SweepResult([], {name: [] for name in description["leaves"]}, {}, [], [])
        rows = read_rows(folder, chunks)
        runs, leaves = rows["run"].to_pylist(), {name: rows[name].to_pylist() for name in description["leaves"]}
        metrics = {name: _column(rows[name]) for name in rows.column_names if name != "run" and name not in leaves}
        return SweepResult(runs, leaves, metrics, StoredOutputs(folder, chunks, metrics, runs), [])

    @property
    def num_compiles(self) -> int:
        """Programs built."""
        return sum(group.compiles for group in self.groups)

    def __len__(self) -> int:
        return len(self.runs)

    def table(self) -> dict[str, np.ndarray]:
        """Typed columns: config leaves, scalar metrics, curves (an array per run) each with its `.final`, `.min` and `.max` (NaN left out).

        What a run does not have, a None among numbers too, is NaN in a column of numbers and None in any other. Half precisions are float32.
        """
        table = {name: _typed(values) for name, values in self.leaves.items()}
        for name, values in self.metrics.items():
            if not is_curve(values):
                table[name] = _widened(values)
                continue
            rows = [None if row is None else _widened(np.atleast_1d(row)) for row in values]
            table[name] = _objects(rows)
            for word, part in (("final", lambda row: row[-1]), ("min", _present(np.min)), ("max", _present(np.max))):
                table[f"{name}.{word}"] = np.array([np.nan if row is None or not row.size else part(row) for row in rows])
        return table

    def to_pandas(self) -> Any:
        """`table()` as a `pandas.DataFrame`, indexed by run."""
        pandas = require("pandas", "experiments")
        return pandas.DataFrame(self.table(), index=pandas.Index(self.runs, name="run"))

    def to_parquet(self, path: Path | str) -> None:
        """`table()` with a first column `run` as a parquet file, whole or not at all. Objects among the config leaves become text."""
        columns = {"run": np.asarray(self.runs, np.int64)} | self.table() | {name: leaf_column(values) for name, values in self.leaves.items()}
        plain = {name: list(values) if isinstance(values, np.ndarray) and values.dtype.kind in "OU" else values for name, values in columns.items()}
        write_table(Path(path), table_of(plain), {})

    def numbers(self, name: str) -> np.ndarray:
        """A column of `table()` that holds numbers, as floats. Raises `ValueError` if there is none of that name."""
        numeric = {name: values for name, values in self.table().items() if values.dtype.kind in "biuf"}
        if name not in numeric:
            raise ValueError(f"no column `{name}`; there are {', '.join(numeric) or 'none'}.")
        return numeric[name].astype(float)

    def leaf(self, name: str) -> list:
        """The values of a config leaf, to compare: what is not plain is described in text. Raises `ValueError` for an unknown leaf."""
        if name not in self.leaves:
            raise ValueError(f"the sweep does not set `{name}`; it sets {', '.join(self.leaves) or 'nothing'}.")
        return [_plain(value) for value in self.leaves[name]]

    def grouped(self, names: Sequence[str]) -> dict[tuple, list[int]]:
        """Places among `runs` by the values of some config leaves, in the order they come."""
        columns, groups = [self.leaf(name) for name in names], {}
        for place in range(len(self)):
            groups.setdefault(tuple(column[place] for column in columns), []).append(place)
        return groups

    def best(self, metric: str, largest: bool = False) -> int:
        """The place among `runs` of the one with the smallest (or largest) `metric`; runs where it is not finite do not count."""
        column = self.numbers(metric)
        if not np.isfinite(column).any():
            raise ValueError(f"no run has a finite `{metric}`.")
        return int(np.argmin(np.where(np.isfinite(column), -column if largest else column, np.inf)))

    def pivot(self, metric: str, rows: str, columns: str) -> tuple[list, list, np.ndarray]:
        """Values of two config leaves and the mean of `metric` for each pair (NaN where there is no run, or one without a finite value)."""
        values, groups = self.numbers(metric), self.grouped([rows, columns])
        row_values, column_values = (list(dict.fromkeys(key[axis] for key in groups)) for axis in (0, 1))
        cells = np.full((len(row_values), len(column_values)), np.nan)
        for (row, column), places in groups.items():
            cells[row_values.index(row), column_values.index(column)] = values[places].mean()
        return row_values, column_values, cells


class StoredOutputs(Sequence):
    """The outputs of a sweep's runs, read from its folder one chunk at a time.

    `like`: the shapes of each run's output; without them an output is a dict of its leaves by name.
    """

    def __init__(self, folder: Path, chunks: Sequence[Chunk], metrics: Mapping[str, np.ndarray], runs: Sequence[int], like: Any = None):
        self._folder, self._metrics, self._like, self._runs = folder, metrics, like, list(runs)
        self._chunk_of = {run: chunk for chunk in chunks for run in chunk.runs}
        self._last: tuple[Any, dict[str, np.ndarray]] = (None, {})

    def __len__(self) -> int:
        return len(self._runs)

    def __getitem__(self, place: Any) -> Any:
        """The output of the run at this place, or of a slice of them."""
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        run = self._runs[place]
        chunk = self._chunk_of[run]
        if chunk.states is not None and self._last[0] is not chunk:
            self._last = (chunk, read_states(self._folder, chunk))
        lane = chunk.runs.index(run)
        leaves = {name: values[place] for name, values in self._metrics.items()}
        leaves |= {name: values[lane] for name, values in self._last[1].items()} if chunk.states is not None else {}
        return leaves if self._like is None else restored(self._like[run], leaves | {"": leaves.get("value")})


def is_curve(values: np.ndarray) -> bool:
    """Whether a metric is a curve: an array of two axes, or of arrays of different lengths."""
    return values.ndim == 2 or (values.dtype == object and any(np.ndim(value) == 1 for value in values))


def stacked(values: Sequence[Any]) -> np.ndarray:
    """Values of all runs as one array; numbers that are missing (`None`) are NaN. An array of objects if shapes differ or an array is missing."""
    shapes = {np.shape(value) for value in values if value is not None}
    if shapes == {()} and any(value is None for value in values):
        kind = np.result_type(*(value for value in values if value is not None))
        return np.array([np.nan if value is None else value for value in values], kind if kind.kind == "f" else float)
    return np.stack(values) if len(shapes) == 1 and not any(value is None for value in values) else _objects(values)


def _column(values):
    """A pyarrow column of a metric as numpy array."""
    array = values.to_numpy(zero_copy_only=False)
    return stacked(list(array)) if array.dtype == object else array


def _plain(value):
    """A config leaf that can be compared."""
    value = _item(value)
    return value if value is None or isinstance(value, bool | int | float | str) else label(value)


def _typed(values):
    """A config leaf as a column."""
    plain = [_item(value) for value in values]
    kinds = {type(value) for value in plain}
    if kinds & {int, float} and kinds <= {int, float, type(None)}:
        return np.array([np.nan if value is None else value for value in plain])
    return np.array(plain) if kinds in ({bool}, {str}) else _objects(plain)


def _item(value):
    """An array without axes as a Python number."""
    return value.item() if isinstance(value, np.generic | np.ndarray | jax.Array) and np.ndim(value) == 0 else value


def _widened(values):
    return values.astype(np.float32) if values.dtype.itemsize == 2 and values.dtype.kind in "fV" else values


def _objects(values):
    return np.fromiter(values, dtype=object, count=len(values))


def _present(part):
    return lambda row: np.nan if np.isnan(row).all() else part(row[~np.isnan(row)])


__all__ = ["Group", "StoredOutputs", "SweepResult", "is_curve", "stacked"]
