"""Hyper-parameter sweeps: many runs of one pure function, one compile per static shape, on every device there is, safe on disk chunk by chunk.

    runs = sweep(train, Config(), grid(learning_rate=[1e-3, 3e-3], seed=range(8)), folder="runs/rates")

`train(config)` is a pure function of a (nested) config dataclass that returns arrays. Each run overrides some leaves of the base config;
`ergodax.core.space` makes lists of overrides and says which leaves are traced and which are static. Runs with the same static leaves form a group:
one program, whose lanes are dealt out over the devices of a mesh.
"""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from . import space
from .cache import CompileCount
from .check import check_count, check_range
from .leaves import is_key, name_of, named
from .mesh import ending_together, from_primary, is_primary, to_host
from .program import Compiled, Program, memory_budget
from .result import Group, StoredOutputs, SweepResult, stacked
from .store import Chunk, Store, describe, label, leaf_column, versions


def sweep(
    fn: Callable[[Any], Any],
    base: Any,
    overrides: Sequence[Mapping[str, Any]],
    *,
    batch_size: int | None = None,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
    folder: Path | str | None = None,
    memory: float | None = None,
    announce: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SweepResult:
    """Run `fn(config)` for every override of `base`.

    - `fn`: pure; takes the config, returns a pytree of arrays. Traced leaves arrive as tracers, so no Python `if` on them. What is no array in its
      output (an activation function in a model, say) is left out.
    - `base`: a frozen dataclass, possibly nested.
    - `overrides`: one mapping of dotted field names to values per run; `ergodax.core.space` makes them.
    - `batch_size`: at most so many runs are vmapped together on one device. 1 takes them in turn, without `vmap`: often the fastest on a CPU. By
      default an accelerator takes as many as its memory holds, and a CPU measures on the first chunks, see `next_batch_size`. The last digits of
      results may depend on it.
    - `chunk_size`: runs of one device between two saves (default: the batch size); they go through `jax.lax.map`.
    - `mesh`: runs are dealt out over its axis `sweep` (default: all devices of all processes); other axes are left to `fn`, see `ergodax.core.mesh`.
    - `folder`: keep every finished chunk there. Called again, after whatever happened, the sweep goes on where it was, with the same numbers. Arrays
      of two or more axes, and models, go to orbax and are read back when they are asked for.
    - `memory`: bytes that a chunk may take on a device (default: nine tenths of an accelerator's, a CPU device's share of half of what is free).
    - `announce`: is given the plan before anything runs, a few lines of text (default: printed to stderr if there is a folder, by the first process).
    - `progress`: called as `progress(runs done, runs in all)` after each chunk.

    Raises `ValueError` for unknown fields, values that cannot be compared, or no runs, before compiling anything; `UsageError` if `folder` cannot be
    used, `StorageError` if the disk no longer takes what is finished.
    """
    started, counted = time.perf_counter(), CompileCount()
    runs = [dict(override) for override in overrides]
    _check(runs, batch_size, chunk_size, memory)
    mesh = Mesh(np.array(jax.devices()), ("sweep",)) if mesh is None else mesh
    if "sweep" not in mesh.axis_names:
        raise ValueError(f"the mesh of a sweep needs an axis `sweep`, got axes {mesh.axis_names}.")
    programs = [Program(fn, base, runs, places, mesh) for places in _grouped(base, runs)]
    leaves = _leaves(base, runs)
    say = announce or (_print if folder is not None and is_primary() else lambda text: None)
    with ending_together():
        if folder is None:
            groups, shelf = _Groups(programs, [], batch_size, chunk_size, memory), _Memory()
            _run(groups, shelf, leaves, len(runs), counted, say, progress)
        else:
            with Store(Path(folder), _description(base, runs, leaves, programs)) as store:
                groups, shelf = _Groups(programs, store.chunks, batch_size, chunk_size, memory), _Disk(store, leaves)
                _run(groups, shelf, leaves, len(runs), counted, say, progress)
                store.finish({"seconds": time.perf_counter() - started, "cache_hits": counted.hits, "groups": [_timing(g) for g in groups.report()]})
        metrics, outputs = shelf.collect(programs)
    return SweepResult(range(len(runs)), leaves, metrics, outputs, groups.report(), counted.hits)


def next_batch_size(tried: Mapping[int, float], remaining: float, compile_seconds: float) -> int:
    """How many runs a CPU device vmaps in the next chunk: 1, 8, 64, … as long as that helps, then the best.

    `tried`: seconds per run by batch size; `remaining`: runs left to each device; `compile_seconds`: what one more program would cost. A larger size
    is tried if the last was at least a tenth faster than the one before, enough runs are left to fill it twice, and they would take four times as
    long as compiling it. A pure function of what finished chunks took, so that a resumed sweep decides as it would have.
    """
    if not tried:
        return 1
    *_, before, last = [0, *sorted(tried)]
    best = last if tried[last] < 0.9 * tried.get(before, math.inf) else before
    if best == last and remaining >= 16 * last and remaining * tried[last] > 4 * compile_seconds:
        return 8 * last
    return best


def _run(groups, shelf, leaves, total, counted, say, progress):
    """Every chunk in turn, each on its shelf before the next."""
    groups.prepare()
    columns = _metric_dtypes(groups.programs, leaves)
    say(groups.plan(total, counted.hits))
    for program, here, batch_size, compiled in groups.chunks():
        started = time.perf_counter()
        out = jax.block_until_ready(compiled.run(compiled.arrays, program.columns(here, compiled.size)))
        seconds, compile_seconds = from_primary(lambda started=started, compiled=compiled: (time.perf_counter() - started, compiled.seconds))
        chunk = Chunk(tuple(here), batch_size, seconds, compile_seconds)
        shelf.keep(chunk, out, columns)
        groups.note(program, chunk)
        if progress is not None:
            progress(groups.done, total)


class _Groups:
    """How far each program is, and how large its next chunk will be."""

    def __init__(self, programs: Sequence[Program], finished: Sequence[Chunk], batch_size, chunk_size, memory):
        self.programs, self._batch_size, self._chunk_size = programs, batch_size, chunk_size
        self._mesh = programs[0].mesh
        self._budget = memory_budget(self._mesh) if memory is None else memory
        self._measures = batch_size is None and self._mesh.devices.flat[0].platform == "cpu"
        self._todo = {program: list(program.places) for program in programs}
        self._history: dict[Program, list[Chunk]] = {program: [] for program in programs}
        self._limit: dict[Program, int] = {}  # what memory was found to hold
        self.done, self._prepared = 0, 0.0
        of = {place: program for program in programs for place in program.places}
        for chunk in finished:
            self.note(of[chunk.runs[0]], chunk)
            self._todo[of[chunk.runs[0]]] = [place for place in self._todo[of[chunk.runs[0]]] if place not in set(chunk.runs)]
        self._resumed = self.done

    def prepare(self) -> None:
        """Compile what every group starts with, groups side by side where there is one process (many must compile in one order)."""
        waiting = [(program, self._size(program)) for program in self.programs if self._todo[program]]
        started = time.perf_counter()
        jobs = [(program, size, self._lower(program, size)) for program, size in waiting]
        with ThreadPoolExecutor(os.cpu_count() if jax.process_count() == 1 else 1) as pool:
            list(pool.map(lambda job: self._fit(*job), jobs))
        self._prepared = time.perf_counter() - started

    def chunks(self):
        """Program, runs, batch size and compiled program of each chunk that is left."""
        for program in self.programs:
            todo = self._todo[program]
            while todo:
                batch_size, compiled = self._fit(program, self._size(program))
                here = todo[: compiled.size]
                del todo[: compiled.size]
                yield program, here, batch_size, compiled

    def note(self, program: Program, chunk: Chunk) -> None:
        """A finished chunk."""
        self._history[program].append(chunk)
        self.done += len(chunk.runs)

    def plan(self, total: int, cache_hits: int) -> str:
        """What will be done, for people."""
        built = [compiled for program in self.programs for compiled in program.built.values()]
        devices, processes = self._mesh.shape["sweep"], jax.process_count()
        lines = [
            f"sweep: {_count(total, 'run')} in {_count(len(self.programs), 'group')}; {_count(len(built), 'compile')} ({self._prepared:.1f} s, "
            f"{cache_hits} from the cache); {_count(devices, 'device')} ({self._mesh.devices.flat[0].device_kind})"
            + (f" of {processes} processes" if processes > 1 else "")
        ]
        if self._resumed:
            lines.append(f"  {self._resumed} of them are on disk")
        for program in self.programs:
            static = ", ".join(f"{name}={label(value)}" for name, value in program.static.items()) or "all values traced"
            line = f"  {static}: {_count(len(program.places), 'run')}"
            for batch_size, compiled in program.built.items():
                how = "one after the other" if batch_size == 1 else f"{batch_size} vmapped"
                line += (
                    f"; {how} on each device{', more if measured to be faster' if self._measures else ''}; {_bytes(compiled.memory)} a chunk there"
                )
            lines.append(line)
        return "\n".join(lines)

    def report(self) -> list[Group]:
        """What came of each."""
        groups = []
        for program in self.programs:
            history, built = self._history[program], program.built
            groups.append(
                Group(
                    static=program.static,
                    runs=program.places,
                    batch_size=history[-1].batch_size,
                    memory=built[history[-1].batch_size].memory if history[-1].batch_size in built else None,
                    compiles=len(built),
                    compile_seconds=sum(compiled.seconds for compiled in built.values()),
                    run_seconds=sum(chunk.seconds for chunk in history),
                    tried=self._tried(program),
                )
            )
        return groups

    def _tried(self, program):
        """Seconds per run on a device by batch size: the least of its chunks, since the first pays for what comes once."""
        tried: dict[int, float] = {}
        for chunk in self._history[program]:
            seconds = chunk.seconds / math.ceil(len(chunk.runs) / self._mesh.shape["sweep"])
            tried[chunk.batch_size] = min(seconds, tried.get(chunk.batch_size, math.inf))
        return tried

    def _size(self, program) -> int:
        """The batch size of the next chunk."""
        wanted = self._wanted(program)
        return min(wanted, self._limit.get(program, wanted))

    def _wanted(self, program):
        devices, history = self._mesh.shape["sweep"], self._history[program]
        if self._measures:
            return next_batch_size(self._tried(program), len(self._todo[program]) / devices, history[-1].compile_seconds if history else 0.0)
        if self._batch_size is None and history:
            return history[-1].batch_size  # what memory was found to hold
        per_device = math.ceil(len(program.places) / devices)
        chunks = math.ceil(per_device / (self._batch_size or per_device))
        return math.ceil(per_device / chunks)  # as even as can be

    def _lower(self, program, batch_size):
        rounds = max(1, (self._chunk_size or batch_size) // batch_size)
        return program.lower(batch_size, rounds, len(self._todo[program]))

    def _fit(self, program, batch_size, compile=None) -> tuple[int, Compiled]:
        """The program for this batch size, or for the largest that memory holds."""
        while batch_size not in program.built:
            compiled = (compile or self._lower(program, batch_size))()
            if batch_size == 1 or compiled.memory is None or compiled.memory <= self._budget:
                program.built[batch_size] = compiled
            else:
                batch_size, compile = max(1, min(batch_size - 1, int(batch_size * self._budget / compiled.memory))), None
                self._limit[program] = batch_size
        return batch_size, program.built[batch_size]


class _Memory:
    """Keeps the outputs of a sweep without a folder."""

    def __init__(self):
        self._outputs: dict[int, Any] = {}
        self._metrics: dict[int, dict[str, np.ndarray]] = {}

    def keep(self, chunk: Chunk, out: Any, columns: Mapping[str, np.dtype]) -> None:
        """The outputs of a chunk's runs."""
        whole = jax.tree.map(_whole, out)
        for lane, run in enumerate(chunk.runs):
            self._outputs[run] = jax.tree.map(lambda a, lane=lane: a[lane], whole)
            self._metrics[run] = {name: leaf.astype(columns[name]) for name, leaf in _parts(self._outputs[run]).items() if name in columns}

    def collect(self, programs: Sequence[Program]) -> tuple[dict[str, np.ndarray], Sequence[Any]]:
        """Metrics of all runs by name, and their whole outputs."""
        rows = [self._metrics[run] for run in sorted(self._metrics)]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: stacked([row.get(name) for row in rows]) for name in names}, [self._outputs[run] for run in sorted(self._outputs)]


class _Disk:
    """Puts every chunk into a store."""

    def __init__(self, store: Store, leaves: Mapping[str, list]):
        self._store, self._leaves = store, {name: leaf_column(values) for name, values in leaves.items()}

    def keep(self, chunk: Chunk, out: Any, columns: Mapping[str, np.dtype]) -> None:
        """The outputs of a chunk's runs."""
        parts = _parts(out)
        rows = {"run": np.asarray(chunk.runs, np.int64)} | {name: values.take(np.asarray(chunk.runs)) for name, values in self._leaves.items()}
        rows |= {name: _whole(leaf)[: len(chunk.runs)].astype(columns[name]) for name, leaf in parts.items() if name in columns}
        self._store.commit(chunk, rows, {name: leaf for name, leaf in parts.items() if name not in columns} or None)

    def collect(self, programs: Sequence[Program]) -> tuple[dict[str, np.ndarray], Sequence[Any]]:
        """Metrics of all runs by name, and their whole outputs, read when they are asked for."""
        loaded = SweepResult.load(self._store.folder)
        like = {place: program.like for program in programs for place in program.places}
        return loaded.metrics, StoredOutputs(self._store.folder, self._store.chunks, loaded.metrics, loaded.runs, like)


def _check(runs, batch_size, chunk_size, memory):
    if not runs:
        raise ValueError("a sweep needs at least one run, got no overrides.")
    for name, size in (("batch_size", batch_size), ("chunk_size", chunk_size)):
        if size is not None:
            check_count(name, size)
    check_range("memory", memory, low=0.0, open_low=True)


def _grouped(base, runs):
    groups: dict[Any, list[int]] = {}
    for place, override in enumerate(runs):
        groups.setdefault(space.signature(base, override), []).append(place)
    return groups.values()


def _leaves(base, runs):
    """Every leaf that some run sets, with its value in every run."""
    names = dict.fromkeys(name for override in runs for name in override)
    return {name: [override.get(name, space.value(base, name)) for override in runs] for name in names}


def _description(base, runs, leaves, programs):
    """What must be the same for two calls to be one sweep."""
    return {
        "config": describe(base),
        "runs": [describe(override) for override in runs],
        "leaves": list(leaves),
        "versions": versions(),
        "programs": {f"group {i}": program.fingerprint() for i, program in enumerate(programs)},
    }


def _column_names(like):
    """Leaves for the table: scalars and curves, alone or in plain dicts. An entry that holds larger arrays, or is a model, goes to orbax whole."""
    entries = like if isinstance(like, Mapping) else like._asdict() if hasattr(like, "_asdict") else {"value": like}
    names = set()
    for name, entry in entries.items():
        places, _ = jax.tree.flatten_with_path(entry)
        plain = all(isinstance(key, jax.tree_util.DictKey) for path, _ in places for key in path)
        if plain and all(leaf.ndim <= 1 and not is_key(leaf) and leaf.dtype.kind != "c" for _, leaf in places):
            names |= {".".join(filter(None, [str(name), name_of(path)])) for path, _ in places}
    return names


def _metric_dtypes(programs, leaves):
    """The dtype of each metric in the table, the same for all groups."""
    found: dict[str, list[Any]] = {}
    for like in (program.like for program in programs if program.like is not None):
        names = _column_names(like)
        for path, leaf in jax.tree.leaves_with_path(like):
            if (name := name_of(path) or "value") in names:
                found.setdefault(name, []).append(leaf)
    if clash := sorted({"run", *leaves}.intersection(found)):
        raise ValueError(f"the runs return {clash}, which are names of other columns (config leaves, `run`); return them under other names.")
    if mixed := [name for name, leaves in found.items() if len({leaf.ndim for leaf in leaves}) > 1]:
        raise ValueError(f"{mixed} are numbers in some groups and curves in others; return them under different names.")
    with jax.numpy_dtype_promotion("standard"):
        dtypes = {name: jnp.result_type(*(leaf.dtype for leaf in leaves)) for name, leaves in found.items()}
    return {name: np.dtype(np.float32) if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4 else dtype for name, dtype in dtypes.items()}


def _parts(out):
    return {name or "value": leaf for name, leaf in named(out).items()}


def _whole(leaf):
    """The whole array, on every process; random keys stay as they are."""
    if is_key(leaf):
        return jax.random.wrap_key_data(_whole(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
    return to_host(leaf)


def _timing(group):
    return dataclasses.asdict(group) | {"static": describe(group.static), "runs": len(group.runs)}


def _count(number, word):
    return f"{number} {word}{'' if number == 1 else 's'}"


def _bytes(size):
    return "unknown memory" if size is None else f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def _print(text):
    print(text, file=sys.stderr)


__all__ = ["next_batch_size", "sweep"]
