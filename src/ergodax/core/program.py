"""One group of a sweep as a program: traced once, compiled for any number of lanes, with what it costs in memory and seconds."""

import dataclasses
import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from . import space
from .leaves import is_key
from .store import without_addresses


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program for chunks of `lanes` vmapped runs, `rounds` times, on each device."""

    run: Callable
    arrays: Any  # what the function closes over
    size: int  # runs of a chunk, over all devices
    memory: int | None  # bytes on each device
    seconds: float  # trace, lower and compile


class Program:
    """The runs `places` of one group, and the function they share."""

    def __init__(self, fn: Callable, base: Any, runs: Sequence[Mapping[str, Any]], places: Sequence[int], mesh: Mesh):
        self.static, names = space.split(base, runs[places[0]])
        self.places, self.mesh = tuple(places), mesh
        self.built: dict[int, Compiled] = {}  # by lanes
        self.like: Any = None  # the shapes of one run's output, once it was traced
        self._values = {place: [space.leaf(base, name, runs[place][name]) for name in names] for place in places}
        config = space.replace(base, self.static)
        self._fn = lambda values: eqx.filter(fn(space.replace(config, dict(zip(names, values)))), eqx.is_array_like)

    def fingerprint(self) -> str:
        """Of the program, see `traced_fingerprint`."""
        digest, self.like = traced_fingerprint(self._fn, self._values[self.places[0]], self.mesh)
        return digest

    def lower(self, lanes: int, rounds: int, remaining: int) -> Callable[[], Compiled]:
        """Trace and lower, now; the function it gives compiles, and may be called in another thread."""
        started = time.perf_counter()
        per_device, mesh = lanes * rounds, self.mesh
        if jax.process_count() == 1:  # devices that would only repeat the last run are left alone
            used = min(mesh.shape["sweep"], math.ceil(remaining / per_device))
            mesh = Mesh(mesh.devices.take(range(used), axis=mesh.axis_names.index("sweep")), mesh.axis_names)

        def on_one_device(columns):
            if per_device == 1:
                return jax.tree.map(lambda a: jnp.asarray(a)[None], self._fn([column[0] for column in columns]))
            if rounds == 1:
                return jax.vmap(self._fn)(columns)
            return jax.lax.map(self._fn, columns, batch_size=None if lanes == 1 else lanes)

        spec, size = PartitionSpec("sweep"), per_device * mesh.shape["sweep"]
        sharded = jax.shard_map(on_one_device, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"sweep"}, check_vma=False)
        example = self.columns(self.places[:1], size)
        # Arrays that the function closes over become arguments; XLA would copy them into the program.
        arrays, rest = eqx.partition(eqx.filter_closure_convert(sharded, example), eqx.is_array)
        lowered = jax.jit(lambda arrays, columns: eqx.combine(arrays, rest)(columns)).lower(arrays, example)
        self.like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), lowered.out_info)
        lowering = time.perf_counter() - started

        def compile() -> Compiled:
            started = time.perf_counter()
            run = lowered.compile()
            return Compiled(run, arrays, size, _memory_of(run), lowering + time.perf_counter() - started)

        return compile

    def columns(self, places: Sequence[int], size: int) -> list[np.ndarray]:
        """The traced values of these runs, the last one repeated to fill a chunk."""
        places = [*places, *[places[-1]] * (size - len(places))]
        return [np.stack(column) for column in zip(*(self._values[place] for place in places))] or [np.zeros(size, np.float32)]


def traced_fingerprint(fn: Callable, values: Any, mesh: Mesh) -> tuple[str, Any]:
    """A digest of `fn` as traced for one run on one device, with the arrays it closes over, and the shapes it returns.

    The digest is the same in every process that computes the same, however many devices there are.
    """
    one = Mesh(np.array(mesh.local_devices[:1]).reshape((1,) * len(mesh.axis_names)), mesh.axis_names)
    with jax.set_mesh(one):
        jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(values)
    digest = hashlib.sha256(without_addresses(str(jaxpr)).encode())
    for const in jaxpr.consts:
        digest.update(np.asarray(jax.random.key_data(const) if is_key(const) else const).tobytes())
    return digest.hexdigest()[:16], shapes


def memory_budget(mesh: Mesh) -> float:
    """Bytes a chunk may take on a device: nine tenths of an accelerator's, a CPU device's share of half of what is free."""
    if stats := mesh.local_devices[0].memory_stats():
        return 0.9 * stats["bytes_limit"]
    return 0.5 * _free_memory() / len(mesh.local_devices)


def _memory_of(compiled):
    if (analysis := compiled.memory_analysis()) is None:
        return None
    return analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes - analysis.alias_size_in_bytes


def _free_memory():
    """Bytes the system could give, or all it has where it does not say."""
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8e9


__all__ = ["Compiled", "Program", "memory_budget", "traced_fingerprint"]
