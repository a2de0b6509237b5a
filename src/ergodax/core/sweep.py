"""Hyper-parameter sweeps: many runs of one pure function, one compile per static shape.

    runs = sweep(train, Config(), grid(**{"learning_rate": [1e-3, 3e-3], "seed": range(8)}))

`train(config)` is a pure function of a (nested) config dataclass that returns arrays. Each run overrides some leaves of the base config. A float or
array leaf is TRACED: runs that differ only there share one compiled program, under `vmap`, `batch_size` at a time, over all devices. Any other leaf
(a width, a flag, a solver) is STATIC: runs that differ there form groups, one compile each. An integer that the program may trace, such as a seed,
is declared in its dataclass: `seed: int = traced(0)`.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from .check import check_count


def traced(default: Any) -> Any:
    """A dataclass field whose value a sweep may trace although it is an integer or a bool."""
    return dataclasses.field(default=default, metadata={"traced": True})


def grid(**axes: Iterable) -> list[dict[str, Any]]:
    """All combinations of the axes' values, the last axis fastest, as overrides. A nested leaf is named with dots: `grid(**{"optim.rate": …})`."""
    return [dict(zip(axes, values)) for values in itertools.product(*(list(values) for values in axes.values()))]


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that shared one compiled program."""

    static: dict[str, Any]  # the overrides they have in common
    runs: tuple[int, ...]  # their places in the list of overrides
    compile_seconds: float  # trace, lower and compile
    run_seconds: float


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """What came of a sweep, in the order of its overrides."""

    overrides: list[dict[str, Any]]
    outputs: list[Any]  # one pytree of numpy arrays per run
    groups: list[Group]

    @property
    def num_compiles(self) -> int:
        """One per group."""
        return len(self.groups)

    def table(self) -> dict[str, np.ndarray]:
        """Columns: each override, then each scalar that the runs returned (nested ones joined with dots): what `pandas.DataFrame` takes."""
        rows = [override | _scalars(output) for override, output in zip(self.overrides, self.outputs)]
        names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
        return {name: np.array([row.get(name) for row in rows]) for name in names}

    def best(self, metric: str, largest: bool = False) -> int:
        """The place of the run with the smallest (or largest) `metric`; runs where it is not finite do not count."""
        column = self._metric(metric)
        if not np.isfinite(column).any():
            raise ValueError(f"no run has a finite `{metric}`.")
        return int(np.argmin(np.where(np.isfinite(column), -column if largest else column, np.inf)))

    def pivot(self, metric: str, rows: str, columns: str) -> tuple[list, list, np.ndarray]:
        """Row values, column values, and the mean of `metric` for each pair (NaN where there is no run)."""
        table, values = self.table(), self._metric(metric)
        row_values, column_values = (list(dict.fromkeys(table[name].tolist())) for name in (rows, columns))
        cells = np.full((len(row_values), len(column_values)), np.nan)
        for i, j in itertools.product(range(len(row_values)), range(len(column_values))):
            here = (table[rows] == row_values[i]) & (table[columns] == column_values[j])
            if here.any():
                cells[i, j] = values[here].mean()
        return row_values, column_values, cells

    def _metric(self, metric):
        table = self.table()
        if metric not in table:
            raise ValueError(f"no column `{metric}`; there are {', '.join(table)}.")
        return table[metric].astype(float)


def sweep(
    fn: Callable[[Any], Any],
    base: Any,
    overrides: Sequence[Mapping[str, Any]],
    *,
    batch_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SweepResult:
    """Run `fn(config)` for every override of `base`.

    - `fn`: pure; takes the config, returns a pytree of arrays. Traced leaves arrive as tracers, so no Python `if` on them.
    - `base`: a frozen dataclass, possibly nested.
    - `overrides`: one mapping of dotted field names to values per run; `grid` makes them.
    - `batch_size`: runs vmapped together on one device (default: all that fall to it). 1 runs them in turn, without `vmap`: on a CPU often the
      fastest.
    - `devices`: where to run (default: all local devices); the runs of a group are dealt out evenly.
    - `progress`: called as `progress(runs done, runs in all)` after each chunk.

    Returns a `SweepResult`. Raises `ValueError` for unknown fields, values that cannot be compared, or no runs, before compiling anything.
    """
    runs = [dict(override) for override in overrides]
    if not runs:
        raise ValueError("a sweep needs at least one run, got no overrides.")
    if batch_size is not None:
        check_count("batch_size", batch_size)
    devices = jax.local_devices() if devices is None else list(devices)
    groups: dict[Any, list[int]] = {}
    for i, override in enumerate(runs):
        groups.setdefault(_signature(base, override), []).append(i)

    outputs: list[Any] = [None] * len(runs)
    done, reports = 0, []
    for places in groups.values():
        static, names = _split(base, runs[places[0]])
        columns = [np.stack([_leaf(base, name, runs[i][name]) for i in places]) for name in names]
        per_device = -(-len(places) // len(devices))
        lanes = min(per_device, batch_size or per_device)
        chunk = lanes * min(len(devices), -(-len(places) // lanes))
        run, compile_seconds = _compile(_bind(fn, replace(base, static), names), columns, len(places), lanes, devices[: chunk // lanes])
        started = time.perf_counter()
        for start in range(0, len(places), chunk):
            here = places[start : start + chunk]
            out = jax.device_get(run([_padded(column[start : start + chunk], chunk) for column in columns]))
            for lane, place in enumerate(here):
                outputs[place] = jax.tree.map(lambda a, lane=lane: a[lane], out)
            done += len(here)
            if progress is not None:
                progress(done, len(runs))
        reports.append(Group(static, tuple(places), compile_seconds, time.perf_counter() - started))
    return SweepResult(runs, outputs, reports)


def replace(config: Any, overrides: Mapping[str, Any]) -> Any:
    """`config` with some leaves replaced, named with dots. Raises `ValueError` for a name that is not there."""
    for name, value in overrides.items():
        config = _replace(config, name.split("."), value, name)
    return config


def _replace(config, path, value, name):
    head, *rest = path
    _field(config, head, name)
    return dataclasses.replace(config, **{head: _replace(getattr(config, head), rest, value, name) if rest else value})


def _field(config, head, name):
    fields = {f.name: f for f in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else {}
    if head not in fields:
        raise ValueError(f"`{name}` is not a field of {type(config).__name__}; it has {', '.join(fields) or 'none'}.")
    return fields[head]


def _find(base, name):
    """The field and the value that `name` stands for."""
    *parents, last = name.split(".")
    for head in parents:
        _field(base, head, name)
        base = getattr(base, head)
    return _field(base, last, name), getattr(base, last)


def _is_traced(base, name, value):
    field, old = _find(base, name)
    if isinstance(value, np.ndarray | jax.Array | float | np.floating):
        return True
    number = isinstance(value, int | np.integer)
    return number and (field.metadata.get("traced", False) or (isinstance(old, float) and not isinstance(value, bool)))


def _split(base, override):
    """The static overrides, and the names of the traced ones."""
    names = [name for name, value in override.items() if _is_traced(base, name, value)]
    return {name: value for name, value in override.items() if name not in names}, names


def _leaf(base, name, value):
    _, old = _find(base, name)
    return np.asarray(float(value) if isinstance(old, float) and isinstance(value, int) else value)


def _signature(base, override):
    """What two runs must share to share a program."""
    static, names = _split(base, override)
    try:
        hash(key := (tuple(static.items()), tuple((name, _leaf(base, name, override[name]).shape) for name in names)))
    except TypeError as error:
        raise ValueError(f"static values must be hashable, got {static}.") from error
    return key


def _bind(fn, config, names):
    return lambda values: fn(replace(config, dict(zip(names, values))))


def _padded(column, length):
    return np.concatenate([column, np.repeat(column[-1:], length - len(column), axis=0)])


def _compile(fn, columns, num_runs, lanes, devices):
    """Compile `fn` over a chunk of `lanes` runs on each device; seconds include tracing."""

    def on_one_device(columns):
        if lanes == 1:
            return jax.tree.map(lambda a: a[None], fn([column[0] for column in columns]))
        return jax.vmap(fn)(columns)

    started = time.perf_counter()
    spec = PartitionSpec("sweep")
    sharded = jax.shard_map(on_one_device, mesh=Mesh(np.array(devices), ("sweep",)), in_specs=spec, out_specs=spec, check_vma=False)
    example = [_padded(column[:1], lanes * len(devices)) for column in columns]
    compiled = jax.jit(sharded).lower(example).compile()
    return compiled, time.perf_counter() - started


def _scalars(output):
    leaves, _ = jax.tree.flatten_with_path(output)
    return {jax.tree_util.keystr(path, simple=True, separator=".") or "value": leaf.item() for path, leaf in leaves if np.ndim(leaf) == 0}


__all__ = ["Group", "SweepResult", "grid", "replace", "sweep", "traced"]
