"""Many hosts as one machine: JAX's distributed runtime, the ("sweep", "data") mesh, and how one training run spreads over it.

The same program runs once on every host. `initialise` joins these processes and lays all their devices out as a mesh of two axes: runs of a sweep go
along "sweep", the examples of one run's batch along "data". Nothing here schedules anything: what each device does follows from the shardings.
"""

import contextlib
import math
import os
import pickle
import re
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import equinox as eqx
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .check import check_count
from .config import UsageError
from .types import PyTree


_WHOLE = PartitionSpec()

# Joining


def initialise(
    *,
    data: int | None = 1,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout_seconds: int = 30,
    **options: Any,
) -> Mesh:
    """Join the processes of this job, and return the mesh of all their devices, with the axes "sweep" and "data".

    Call it before anything else of JAX runs. Under SLURM, on a TPU pod, in a Kubernetes job and under Open MPI it needs no arguments: JAX finds the
    others by itself. Elsewhere each process says who it is, by the arguments or by the environment variables `JAX_COORDINATOR_ADDRESS`,
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`; with neither, it is a job of one process. Called again, it only makes the mesh.

    - `data`: devices that share one run's batch (default 1); the rest of them, which `data` must divide, are the axis "sweep". None puts all in
      "data". Neighbours along "data" sit on one host as far as they can.
    - `coordinator_address`: host and port of process 0, `"10.0.0.1:8476"`, which all can reach and which is free there.
    - `num_processes`, `process_id`: how many there are, and which of 0 … `num_processes` - 1 this one is.
    - `heartbeat_timeout_seconds`: a process not heard of for so long is dead, and the others are stopped (default 30; JAX's is 100).
    - `options`: further arguments of `jax.distributed.initialize`.

    Raises `ValueError` if `data` does not divide the number of devices or a process does not know all three of who it is; `RuntimeError` if JAX was
    used before and this is (or may be) one process of several.
    """
    if data is not None:
        check_count("data", data)
    if not jax.distributed.is_initialized():
        num_processes = _from_environment("JAX_NUM_PROCESSES", num_processes)
        process_id = _from_environment("JAX_PROCESS_ID", process_id)
        coordinator_address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
        _join(coordinator_address, num_processes, process_id, heartbeat_timeout_seconds=heartbeat_timeout_seconds, **options)
    count = jax.device_count()
    data = count if data is None else data
    if count % data:
        raise ValueError(f"`data` must divide the {count} devices of the job ({jax.process_count()} processes), got {data}.")
    return jax.make_mesh((count // data, data), ("sweep", "data"), axis_types=(AxisType.Auto, AxisType.Auto))


def _from_environment(name, value):
    text = os.environ.get(name)
    if value is not None or not text:
        return value
    if not text.isdecimal():
        raise ValueError(f"the environment variable {name} must be a whole number, got {text!r}.")
    return int(text)


def _join(coordinator_address, num_processes, process_id, **options):
    told = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    try:
        jax.distributed.initialize(**told, **options)
    except ValueError as error:
        # What JAX says where neither the arguments nor a cluster tell.
        if all(value is None for value in told.values()) and "coordinator_address should be defined" in str(error):
            return
        missing = ", ".join(name for name, value in told.items() if value is None)
        raise ValueError(f"this process does not know {missing or 'its place'}: {error}") from error
    except RuntimeError as error:
        if "must be called before" not in str(error):
            raise
        # Too late to join. Harmless for a process on its own, such as a notebook.
        several = any(int(os.environ.get(name, 1)) > 1 for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
        if several or any(value is not None for value in told.values()):
            raise RuntimeError("`initialise` must come before everything else that uses JAX, here it came after.") from error


# What all processes must agree on


def is_primary() -> bool:
    """Whether this is the process that prints and writes files: number 0."""
    return jax.process_index() == 0


def from_primary(decide: Callable[[], Any]) -> Any:
    """`decide()`, called in the primary process alone, in all processes: for what depends on a disk, a clock or a random device.

    All processes must call it. What `decide` returns is pickled; what it raises is raised everywhere.
    """
    if jax.process_count() == 1:
        return decide()
    value, error = None, None
    if is_primary():
        try:
            value = decide()
        except Exception as raised:  # handed on to the others, who would wait for ever
            error = raised
    content = np.frombuffer(pickle.dumps((value, error)), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(content.size)))
    content = multihost_utils.broadcast_one_to_all(content if is_primary() else np.zeros(size, np.uint8))
    value, error = pickle.loads(content.tobytes())
    if error is not None:
        raise error
    return value


def any_process(*flags: bool) -> tuple[bool, ...]:
    """For each flag, whether it is set in any process. All processes must call it."""
    if jax.process_count() == 1:
        return flags
    return tuple(bool(flag) for flag in multihost_utils.process_allgather(np.array(flags)).any(axis=0))


def barrier(name: str) -> None:
    """Wait until all processes are here; `name` must be the same in all of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def to_host(tree: PyTree) -> PyTree:
    """Every array whole, as numpy, in every process, wherever its parts are. All processes must call it."""

    def one(leaf):
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(one, tree)


# When one of them fails


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Within, an exception in one process of several ends the job: here with one clear line, in the others because this one is gone.

    Without it, the others wait for minutes for the one that failed. `UsageError`, which all raise alike, goes through, and so does everything in a
    job of one process.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or isinstance(error, UsageError):
            raise
        end_job(error)


def end_job(error: Exception) -> NoReturn:
    """Say what ended this process of several, and leave at once with exit code 1."""
    if _LOST.search(str(error)):
        reason = str(error).strip().splitlines()[0]
        leave(f"another process of this job is gone ({reason}); start the same command again to go on from the last checkpoint.", 1)
    traceback.print_exception(error)
    leave(f"process {jax.process_index()} of {jax.process_count()} failed, which ends the job ({type(error).__name__}: {error}).", 1)


def leave(message: str, code: int) -> NoReturn:
    """Print one line to stderr and end this process of several, at once: a normal exit would first wait until all the others exit too."""
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    if is_primary():
        time.sleep(1)  # its end is the coordinator's, at which JAX aborts the others: let them have their say
    os._exit(code)


#: What JAX's errors say when a process is gone: by the network between CPUs, GPUs, or the coordinator.
_LOST = re.compile(
    r"gloo|nccl|connection (reset|closed|refused)|socket closed|heartbeat|coordination service|UNAVAILABLE|DEADLINE_EXCEEDED", re.IGNORECASE
)


# One training run over the axis "data"


def replicated(path: str, leaf: Any, axis_size: int) -> PartitionSpec:
    """The rule that keeps every parameter whole on every device."""
    return _WHOLE


class FullySharded(eqx.Module):
    """The rule that cuts each large parameter along its longest axis that the "data" axis divides (of equals the last): a device stores its share.

    `min_size`: smaller arrays stay whole (default 65536 numbers: their all-gather costs more than their memory).
    """

    min_size: int = eqx.field(static=True, default=2**16)

    def __check_init__(self):
        check_count("min_size", self.min_size)

    def __call__(self, path: str, leaf: Any, axis_size: int) -> PartitionSpec:
        """The axis of `leaf` (anything with a shape) to cut."""
        fitting = [(size, axis) for axis, size in enumerate(leaf.shape) if size % axis_size == 0]
        if math.prod(leaf.shape) < self.min_size or not fitting:
            return _WHOLE
        _, axis = max(fitting)
        return PartitionSpec(*axis * [None], "data")


class DataParallel(eqx.Module):
    """How one training run uses the axis "data" of a mesh: each device works on its share of the batch, and gradients are averaged.

    - `mesh`: any mesh with an axis "data", such as `initialise` makes; axes of the mesh that are not "data" do the same work again.
    - `rule`: `rule(path, leaf, axis_size) -> PartitionSpec`, where the parameter at `path` ("blocks/hidden/weight", leaves with a shape and a dtype)
      is stored, and with it what the optimiser and the average hold of its shape. Default `replicated`; see `FullySharded`. Only the axis "data" may
      appear in it. A parameter that is not whole is gathered for each step.

    The numbers are those of one device up to the order of sums. Inside `jax.shard_map` over other axes ("sweep"), "data" must be left automatic.
    """

    mesh: Mesh = eqx.field(static=True)
    rule: Callable[[str, Any, int], PartitionSpec] = eqx.field(static=True, default=replicated)

    def __check_init__(self):
        if "data" not in self.mesh.axis_names:
            raise ValueError(f'the mesh must have an axis "data", got {self.mesh.axis_names}.')

    @property
    def axis_size(self) -> int:
        """Devices along "data"."""
        return self.mesh.shape["data"]

    def specs(self, tree: PyTree) -> PyTree:
        """The rule's `PartitionSpec` for every leaf."""

        def one(path, leaf):
            return self.rule(jax.tree_util.keystr(path, simple=True, separator="/"), leaf, self.axis_size)

        return jax.tree.map_with_path(one, tree)

    def sharding(self, spec: PartitionSpec = _WHOLE) -> NamedSharding:
        """`spec` on this mesh; by default whole everywhere."""
        return NamedSharding(self.mesh, spec)

    def put(self, tree: PyTree, specs: PyTree = None) -> PyTree:
        """Arrays that every process holds whole, as arrays of the mesh; by default whole on every device.

        All processes must call it. Raises `ValueError` if they do not hold the same numbers.
        """
        leaves, structure = jax.tree.flatten(tree)
        shardings = [self.sharding()] * len(leaves) if specs is None else [self.sharding(spec) for spec in structure.flatten_up_to(specs)]
        _check_same(leaves)
        return jax.tree.unflatten(structure, [_put(leaf, sharding) for leaf, sharding in zip(leaves, shardings, strict=True)])

    def stored(self, tree: PyTree) -> PyTree:
        """Inside `jax.jit`: parameters where the rule stores them."""
        return jax.tree.map(self._constrain, tree, self.specs(tree))

    def gathered(self, tree: PyTree) -> PyTree:
        """Inside `jax.jit`: parameters whole on every device."""
        return jax.tree.map(lambda leaf: self._constrain(leaf, _WHOLE), tree)

    def batch(self, tree: PyTree, axis: int = 0) -> PyTree:
        """Inside `jax.jit`: a batch with its `axis` dealt out; leaves without that axis stay whole. Raises `ValueError` if it does not divide."""

        def one(leaf):
            if leaf.ndim <= axis:
                return leaf
            if leaf.shape[axis] % self.axis_size:
                raise ValueError(f'the {self.axis_size} devices along "data" must divide a batch, got {leaf.shape[axis]} examples at a time.')
            return self._constrain(leaf, PartitionSpec(*axis * [None], "data"))

        return jax.tree.map(one, tree)

    def _constrain(self, leaf, spec):
        # Inside a shard_map the mesh is the context's, where some axes are manual.
        return jax.lax.with_sharding_constraint(leaf, self.sharding(spec) if jax.sharding.get_abstract_mesh().empty else spec)


def _put(leaf, sharding):
    if _is_key(leaf):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    if _is_local(leaf) and not sharding.is_fully_addressable:
        return jax.make_array_from_callback(leaf.shape, sharding, np.asarray(leaf).__getitem__)
    return jax.device_put(leaf, sharding)


def _check_same(leaves):
    """Raise unless all processes have the same numbers in `leaves`: seeded by their place, say, they would train different models as one."""
    if jax.process_count() == 1:
        return
    digest = 0
    for leaf in filter(_is_local, leaves):
        digest = zlib.crc32(np.ascontiguousarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf).tobytes(), digest)
    digests = multihost_utils.process_allgather(np.uint32(digest))
    if len(set(digests.tolist())) > 1:
        raise ValueError("the processes hold different numbers; model, data and key must be made from the same seed in all of them.")


def _is_key(leaf):
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_local(leaf):
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


__all__ = [
    "DataParallel",
    "FullySharded",
    "any_process",
    "barrier",
    "end_job",
    "ending_together",
    "from_primary",
    "initialise",
    "is_primary",
    "leave",
    "replicated",
    "to_host",
]
