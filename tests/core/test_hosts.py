"""Jobs of several processes on CPU: the numbers of one process, an end for all when one dies, and a restart with another number of them."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from tests.child import environment


SCRIPT = """
import dataclasses, sys, time
import jax
from ergodax.core import mesh as hosts
jax.config.update("jax_enable_x64", True)
mesh = hosts.initialise(data=None, heartbeat_timeout_seconds=60)

import jax.numpy as jnp, numpy as np, optax
from ergodax.core import Fit
from ergodax.core.run import Run

@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0

folder, pause, save_seconds, rules = sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]
rng = np.random.default_rng(0)
x = rng.normal(size=(40, 3))
weights = {"first": rng.normal(size=(3, 8)), "bias": np.zeros(8), "second": 0.3 * rng.normal(size=(8, 2))}

def network(weights, x):
    return jnp.tanh(x @ weights["first"] + weights["bias"]) @ weights["second"]

def loss(model, batch, key):
    x, y = batch
    error = network(model, x) - y - 0.1 * jax.random.normal(key, y.shape)
    return jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error))}

def evaluate(model, key):
    jax.debug.callback(lambda: time.sleep(pause))
    return {"test": jnp.mean(network(model, x) ** 2)}

parallel = {
    "single": None,
    "replicated": hosts.DataParallel(mesh),
    "sharded": hosts.DataParallel(mesh, hosts.FullySharded(min_size=1)),
}
with Run(folder, Config(), save_seconds=save_seconds) as run:
    assert run.stage("decided", lambda: {"index": jax.process_index()})["index"] == 0
    for rule in rules:
        options = {"batch_size": 8, "every": 5, "ema_decay": 0.9, "evaluate": evaluate, "parallel": parallel[rule]}
        fitting = Fit(loss, jax.tree.map(jnp.asarray, weights), optax.adam(1e-2), (x, np.sin(x[:, :2])), **options)
        fitted, rows = run.train(fitting, jax.random.key(2), 40, name=rule)
        leaves = jax.tree.leaves((fitted.model, fitted.average))
        if rule == "sharded":
            assert jax.device_count() == 1 or any(not leaf.is_fully_replicated for leaf in leaves)
        numbers = {name: fitted.metrics[name] for name in ("mae", "test")}
        numbers |= {"weights": np.concatenate([hosts.to_host(leaf).ravel() for leaf in leaves]), "step": [row["step"] for row in rows]}
        run.stage(rule, lambda: numbers | {"processes": jax.process_count()})
    run.figure("none", type("Figure", (), {"savefig": lambda self, path, **options: path.touch()})(), {})
    run.results({"loss": fitted.metrics["loss"]})
print("finished", jax.process_index())
"""


def start(script, count, folder, *rules, pause=0.0, save_seconds=1000.0):
    """The processes of a job that finds itself by environment variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)} if count > 1 else {}
    return [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), str(pause), str(save_seconds), *rules],
            env=environment() | job | ({"JAX_PROCESS_ID": str(i)} if job else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def finish(processes):
    outputs = [process.communicate(timeout=200) for process in processes]
    for i, (process, (out, error)) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, error
        assert f"finished {i}" in out
    return outputs


def checkpoints(folder):
    """The steps of those that are whole."""
    return [int(path.name) for path in (folder / "checkpoints" / "sharded").glob("*") if path.name.isdecimal()]


def stage(folder, name):
    with np.load(folder / "stages" / f"{name}.npz") as content:
        return dict(content)


def assert_same(one, other):
    """To the rounding of sums in another order, over 40 steps."""
    for name in ("weights", "mae", "test"):
        np.testing.assert_allclose(one[name], other[name], rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(one["step"], other["step"])


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def alone(script, tmp_path_factory):
    """One process, without a mesh."""
    folder = tmp_path_factory.mktemp("alone")
    finish(start(script, 1, folder, "single"))
    return stage(folder, "single")


@pytest.mark.parametrize(("count", "rules"), [(2, ("replicated", "sharded")), (4, ("sharded",))])
def test_numbers_are_those_of_one_process(script, alone, tmp_path, count, rules):
    outputs = finish(start(script, count, tmp_path, *rules))
    for rule in rules:
        numbers = stage(tmp_path, rule)
        assert numbers["processes"] == count
        assert_same(numbers, alone)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "config.json", "figures", "metrics.jsonl", "results.json", "stages"}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 8 * len(rules)  # the first process alone writes
    assert "sharded: done" in outputs[0][1]
    assert all("done" not in error for _, error in outputs[1:])


@pytest.fixture(scope="module")
def widowed(script, tmp_path_factory):
    """Two processes, the second killed in the middle: the folder, and how the first one ended."""
    folder = tmp_path_factory.mktemp("widowed")
    first, second = start(script, 2, folder, "sharded", pause=0.3, save_seconds=0.0)
    deadline = time.monotonic() + 150
    while len(checkpoints(folder)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(second.pid, signal.SIGKILL)
    killed = time.monotonic()
    _, error = first.communicate(timeout=60)
    seconds = time.monotonic() - killed
    second.communicate(timeout=60)
    return folder, first.returncode, error, seconds


def test_a_process_that_dies_ends_the_others(widowed):
    folder, code, error, seconds = widowed
    assert code == 1
    assert "error: another process of this job is gone (" in error
    assert "start the same command again to go on from the last checkpoint." in error
    assert seconds < 50  # no timeout was waited for
    assert not (folder / "results.json").exists()


@pytest.mark.parametrize("count", [1, 4])
def test_a_restart_with_another_number_of_processes_ends_the_same(script, alone, widowed, tmp_path, count):
    folder = tmp_path / "run"
    shutil.copytree(widowed[0], folder)
    assert 0 < max(checkpoints(folder)) < 40
    finish(start(script, count, folder, "sharded"))
    numbers = stage(folder, "sharded")
    assert numbers["processes"] == count
    assert_same(numbers, alone)
