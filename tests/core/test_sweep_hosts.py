"""One sweep over several processes: the table of one process to the byte, also when one of them dies and other numbers of them go on."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from tests.child import environment

from ergodax.core import SweepResult


SCRIPT = """
import dataclasses, sys, time
import jax, jax.numpy as jnp
from ergodax.core import mesh as hosts
mesh = hosts.initialise(heartbeat_timeout_seconds=10)
from ergodax.core import sweep, traced
from ergodax.core.space import grid

@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.1
    seed: int = traced(0)
    width: int = 3

folder, pause = sys.argv[1], float(sys.argv[2])

def run(config):
    jax.debug.callback(lambda _: time.sleep(pause), config.seed)
    x = jax.random.normal(jax.random.key(config.seed), (config.width, config.width))
    ends, curve = jax.lax.scan(lambda x, _: (x - config.rate * jnp.sin(x), jnp.sum(x**2)), x, length=10)
    return {"loss": curve[-1], "curve": curve, "model": {"weight": ends}}

result = sweep(run, Config(), grid(width=[3, 4], rate=[0.1, 0.2], seed=range(5)), folder=folder, batch_size=1, mesh=mesh)
assert jax.process_index() or result.outputs[7]["model"]["weight"].shape == (3, 3)  # read in one process alone
print("finished", jax.process_index(), len(result), result.best("loss"))
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "sweep.py"
    path.write_text(SCRIPT)
    return path


def start(script, count, folder, pause=0.0):
    """The processes of a job of one device each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{probe.getsockname()[1]}", "JAX_NUM_PROCESSES": str(count)} if count > 1 else {}
    return [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), str(pause)],
            env=environment() | job | ({"JAX_PROCESS_ID": str(i)} if job else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def finish(processes):
    try:
        outputs = [process.communicate(timeout=150) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for i, (process, (out, error)) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, error
        assert f"finished {i} 20" in out
    return outputs


def test_processes_share_a_sweep_die_and_go_on(script, tmp_path):
    finish(start(script, 1, tmp_path / "one"))
    whole = tmp_path / "one"
    folder = tmp_path / "many"
    first, second = start(script, 2, folder, pause=0.2)
    deadline = time.monotonic() + 150
    while len(list((folder / "chunks").glob("*.parquet"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(second.pid, signal.SIGKILL)
    _, error = first.communicate(timeout=60)
    second.communicate(timeout=60)
    assert first.returncode == 1
    assert "error: another process of this job is gone (" in error
    kept = SweepResult.load(folder)
    assert 6 <= len(kept) < 20
    outputs = finish(start(script, 4, folder))
    assert f"{len(kept)} of them are on disk" in outputs[0][1]
    assert "4 devices (cpu) of 4 processes" in outputs[0][1]
    assert all("sweep:" not in error for _, error in outputs[1:])
    assert (folder / "table.parquet").read_bytes() == (whole / "table.parquet").read_bytes()
    for place in (0, 7, 19):
        np.testing.assert_array_equal(SweepResult.load(folder).outputs[place]["model.weight"], SweepResult.load(whole).outputs[place]["model.weight"])


def test_what_one_process_refuses_all_refuse(script, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    processes = start(script, 2, tmp_path)
    for process in processes:
        _, error = process.communicate(timeout=100)
        assert process.returncode != 0
        assert "is not empty and holds no sweep" in error
