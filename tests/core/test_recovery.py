"""A sweep's folder: killed at random moments it ends with the same table to the bit, and what it cannot use it refuses and leaves as it was."""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import SweepResult, sweep, traced
from ergodax.core.config import UsageError
from ergodax.core.space import grid
from ergodax.core.store import StorageError


SERVER = """
import os, sys, time
from functools import partial
import dataclasses, jax, jax.numpy as jnp, numpy as np
import filelock, orbax.checkpoint, pyarrow.parquet
from jax.experimental import io_callback
from ergodax.core import sweep, traced
from ergodax.core.space import grid

# Forked from one process that has imported everything: a start costs a second less.

@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.1
    seed: int = traced(0)
    width: int = 3

def log(path, seed):
    with open(path, "a") as file:
        file.write(f"{os.getpid()} {int(seed)}\\n")
    time.sleep(0.02)
    return np.int32(0)

def child(folder, executed):
    def run(config):
        ran = io_callback(partial(log, executed), jax.ShapeDtypeStruct((), jnp.int32), config.seed)
        x = jax.random.normal(jax.random.key(config.seed), (config.width, config.width)) + ran
        ends, curve = jax.lax.scan(lambda x, _: (x - config.rate * jnp.sin(x), jnp.sum(x**2)), x, length=10)
        return {"loss": curve[-1], "curve": curve, "model": {"weight": ends}}

    sweep(run, Config(), grid(width=[3, 4], rate=[0.1, 0.2], seed=range(5)), folder=folder, batch_size=1, announce=lambda text: None)

for line in sys.stdin:
    folder, executed = line.split()
    if (pid := os.fork()) == 0:
        try:
            child(folder, executed)
            os._exit(0)
        except BaseException as error:
            print(type(error), error, file=sys.stderr, flush=True)
            os._exit(1)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    script = folder / "server.py"
    script.write_text(SERVER)
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=os.environ | cache
    )
    yield process
    process.stdin.close()
    process.wait(60)


def start(server, folder: Path) -> int:
    """A sweep in a process of its own; its id."""
    server.stdin.write(f"{folder} {folder.with_suffix('.log')}\n")
    return int(server.stdout.readline())


def end(server) -> int:
    return int(server.stdout.readline())


def executed(folder: Path) -> list[tuple[int, int]]:
    """Process and seed of every execution of a run, in order."""
    log = folder.with_suffix(".log")
    return [tuple(map(int, line.split())) for line in log.read_text().splitlines()] if log.exists() else []


def test_killed_at_twenty_random_moments(server, tmp_path):
    """No run of a chunk on disk is computed again, a killed process loses one chunk at most, and the table is the same to the byte."""
    whole = tmp_path / "whole"
    start(server, whole)
    assert end(server) == 0
    begin = time.monotonic()
    start(server, tmp_path / "timed")
    assert end(server) == 0
    lasts = time.monotonic() - begin
    moments, kills, folders = random.Random(0), 0, 0
    while kills < 20:
        folder = tmp_path / f"killed{folders}"
        folders += 1
        done = False
        while not done:
            before = finished(folder)
            pid = start(server, folder)
            time.sleep(moments.uniform(0.0, lasts))
            done = end_or_kill(server, pid)
            kills += not done
            rows = [run for process, run in executed(folder) if process == pid]
            assert len(rows) <= 20 - len(before), "a run on disk was computed again"
            assert len(rows) - (len(finished(folder)) - len(before)) <= 2, "more than the chunk in flight was lost"
        assert (folder / "table.parquet").read_bytes() == (whole / "table.parquet").read_bytes()
        assert finished(folder) == set(range(20))
        result, expected = SweepResult.load(folder), SweepResult.load(whole)
        np.testing.assert_array_equal(result.outputs[7]["model.weight"], expected.outputs[7]["model.weight"])


def finished(folder):
    """Runs whose chunk is on disk."""
    return {run for run in SweepResult.load(folder).runs} if (folder / "sweep.json").exists() else set()


def end_or_kill(server, pid) -> bool:
    """Kill the process; whether it had come to its end by then."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    status = end(server)
    assert status in (0, signal.SIGKILL)
    return status == 0


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.1
    seed: int = traced(0)
    flag: bool = False


def run(config):
    x = jax.random.normal(jax.random.key(config.seed), (3, 3)) * config.rate
    return {"norm": jnp.sum(x**2), "curve": x[0], "samples": {"x": x, "key": jax.random.key(config.seed)}}


RUNS = grid(rate=[0.1, 0.2], seed=range(3))


def go(folder, fn=run, base=Config(), runs=RUNS, **options):
    return sweep(fn, base, runs, **({"folder": folder, "batch_size": 1, "announce": lambda text: None} | options))


@pytest.fixture(scope="module")
def finished_sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "sweep"
    go(folder)
    return folder


@pytest.fixture
def folder(finished_sweep, tmp_path):
    """A finished sweep of one's own."""
    return shutil.copytree(finished_sweep, tmp_path / "sweep")


def content(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def refused(folder, message, **options):
    """The call is refused with this message, and not a file has changed."""
    before = content(folder)
    with pytest.raises(UsageError, match=message):
        go(folder, **options)
    assert content(folder) == before


def unfinish(folder, chunk="000002"):
    """As if the sweep had been stopped before this chunk was on disk."""
    (folder / "chunks" / f"{chunk}.parquet").unlink()
    (folder / "table.parquet").unlink()


def test_a_finished_sweep_is_read_back_as_it_was(folder):
    fresh, kept = sweep(run, Config(), RUNS, batch_size=1), go(folder)
    assert kept.num_compiles == 0
    for expected, output in zip(fresh.outputs, kept.outputs, strict=True):
        assert jax.tree.structure(output) == jax.tree.structure(expected)
        np.testing.assert_array_equal(output["samples"]["x"], expected["samples"]["x"])
        np.testing.assert_array_equal(output["curve"], expected["curve"])
        assert output["norm"] == expected["norm"]
        assert output["samples"]["key"] == expected["samples"]["key"]
    assert list(kept.table()) == list(fresh.table()) == ["rate", "seed", "curve", "curve.final", "curve.min", "curve.max", "norm"]


def test_only_what_is_missing_is_computed(folder):
    table = (folder / "table.parquet").read_bytes()
    unfinish(folder)
    (folder / "chunks" / "000002.parquet.part").write_bytes(b"half")  # what a killed process leaves
    seen = []
    go(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(6, 6)]
    assert (folder / "table.parquet").read_bytes() == table
    assert len(json.loads((folder / "timing.json").read_text())) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": Config(flag=True)}, r"holds another sweep \(flag False -> True\); choose another folder"),
        ({"runs": RUNS[:-1]}, r"holds another sweep \(6 -> 5 runs\)"),
        ({"runs": [*RUNS[:-1], {"rate": 0.2, "seed": 9}]}, "run 5: .*'seed': 2.* -> .*'seed': 9"),
        ({"fn": lambda config: run(config) | {"norm": config.rate}}, r"another code version \(programs: group 0 .* Go back to the code"),
    ],
)
def test_another_sweep_is_refused(folder, options, message):
    refused(folder, message, **options)


def test_an_array_that_the_function_closes_over_is_part_of_it(tmp_path):
    def scaled(data):
        return lambda config: {"norm": jnp.sum(data) * config.rate}

    go(tmp_path, fn=scaled(jnp.ones(100)))
    go(tmp_path, fn=scaled(jnp.ones(100)))
    refused(tmp_path, "another code version", fn=scaled(jnp.ones(100).at[3].set(2)))


def test_other_versions_are_refused(folder):
    description = json.loads((folder / "sweep.json").read_text())
    description["versions"]["jaxlib"] = "0.0.1"
    (folder / "sweep.json").write_text(json.dumps(description))
    refused(folder, r"another code version \(versions: jaxlib 0.0.1 -> .*\); its runs would not compare. Go back to its environment")
    (folder / "sweep.json").write_text(json.dumps(description | {"format": 99}))
    refused(folder, "was written in format 99")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "swapped"])
def test_a_damaged_chunk_is_named(folder, damage):
    path = folder / "chunks" / "000002.parquet"
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        place = data.index(np.float64(0.1).tobytes())  # in a column of values
        data[place] ^= 1
    changed = {
        "truncated": bytes(data[:-50]),
        "flipped": bytes(data),
        "empty": b"",
        "swapped": (folder / "chunks" / "000004.parquet").read_bytes(),
    }
    path.write_bytes(changed[damage])
    message = r"000002.parquet is damaged \(.*\); delete it and start again to compute its runs anew"
    refused(folder, message)
    with pytest.raises(UsageError, match=message):
        SweepResult.load(folder)


def test_damaged_arrays_are_named_when_read(folder):
    victim = max((folder / "states" / "000002").rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    result = go(folder)
    assert result.outputs[0]["samples"]["x"].shape == (3, 3)
    with pytest.raises(UsageError, match=r"states/000002 is damaged \(its content is not what was written\); delete .*000002 and .*000002.parquet"):
        result.outputs[2]


def test_damaged_description(folder):
    (folder / "sweep.json").write_text('{"format": 1, "con')
    refused(folder, r"sweep.json is damaged \(.*\); delete the folder")


def test_a_full_disk_loses_nothing_that_was_finished(folder):
    """The part file leads to a device that is full; once it is gone the sweep goes on."""
    table = (folder / "table.parquet").read_bytes()
    unfinish(folder)
    (folder / "chunks" / "000002.parquet.part").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"cannot write chunk 000002 of .*: No space left on device. 4 finished runs are safe"):
        go(folder)
    assert not (folder / "chunks" / "000002.parquet.part").is_symlink()
    assert len(SweepResult.load(folder)) == 4
    go(folder)
    assert (folder / "table.parquet").read_bytes() == table


@pytest.fixture
def read_only(finished_sweep):
    """A sweep, not quite finished, in a folder that may not be written. Root may write anywhere, so it steps down meanwhile."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = shutil.copytree(finished_sweep, Path(temporary) / "sweep")
        unfinish(folder)
        for path in (Path(temporary), *Path(temporary).rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)
            for path in (Path(temporary), *Path(temporary).rglob("*")):
                path.chmod(0o755)


def test_a_folder_that_may_not_be_written(read_only):
    refused(read_only, "cannot write to .*sweep: Permission denied")
    with pytest.raises(UsageError, match=r"cannot write to .*new: Permission denied"):
        go(read_only.parent / "new")
    assert len(SweepResult.load(read_only)) == 4


def test_a_folder_in_use_is_refused(folder):
    import filelock

    with filelock.FileLock(folder / "lock"), pytest.raises(UsageError, match="is in use: another process runs this sweep"):
        go(folder)


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    refused(tmp_path, "is not empty and holds no sweep")
    with pytest.raises(UsageError, match=r"holds no sweep: there is no sweep.json"):
        SweepResult.load(tmp_path)
