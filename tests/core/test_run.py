"""The host shell: resume to the bit after a kill, refusals, and what a run leaves in its folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ergodax.core.config import UsageError
from ergodax.core.files import jsonable, write_json
from ergodax.core.report import Report, show
from ergodax.core.run import Run


SCRIPT = """
import dataclasses, sys, time
import equinox as eqx, jax, jax.numpy as jnp, optax
from ergodax.core import Fit
from ergodax.core.config import UsageError, quit_with
from ergodax.core.run import Run

@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    bad_at: int = -1

folder, seed, bad_at, pause = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
x = jax.random.normal(jax.random.key(0), (64, 3))
model = eqx.nn.MLP(3, 1, 16, 2, key=jax.random.key(seed))

def loss(model, batch, key):
    x, row = batch
    noise = jax.random.normal(key, (x.shape[0], 1))
    return jnp.mean((jax.vmap(model)(x) - jnp.sum(x, 1, keepdims=True) - 0.1 * noise) ** 2), {}

def data(key, step):
    rows = jax.random.randint(key, (16,), 0, 64)
    jax.debug.callback(lambda: time.sleep(pause))
    return x[rows] + jnp.where(step == bad_at, jnp.nan, 0.0), rows

try:
    with Run(folder, Config(seed, bad_at), save_seconds=0.0) as run:
        fitted, rows = run.train(Fit(loss, model, optax.adam(1e-2), data, every=5, ema_decay=0.9), jax.random.key(seed), 60)
        stage = run.stage("norm", lambda: {"norm": sum(jnp.sum(a**2) for a in jax.tree.leaves(eqx.filter(fitted.average, eqx.is_array)))})
        run.results({"norm": float(stage["norm"]), "losses": fitted.metrics["loss"]})
except UsageError as error:
    quit_with(error)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "train.py"
    path.write_text(SCRIPT)
    return path


def command(script, folder, seed=0, bad_at=-1, pause=0.0):
    return [sys.executable, str(script), str(folder), str(seed), str(bad_at), str(pause)]


def finish(*args, **kwargs):
    return subprocess.run(command(*args, **kwargs), capture_output=True, text=True, timeout=300)


def metrics(folder):
    return json.loads((folder / "results.json").read_text())["metrics"]


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert finish(script, folder).returncode == 0
    return folder


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_and_resumed_is_the_same_to_the_bit(script, uninterrupted, tmp_path, kind):
    """Stopped in the middle of training; the second start does only the rest, and every logged and final number is the same."""
    process = subprocess.Popen(command(script, tmp_path, pause=0.02), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while len(list((tmp_path / "checkpoints" / "train").glob("[0-9]*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, kind)
    _, error = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if kind == signal.SIGKILL else 130)
    if kind == signal.SIGINT:
        assert "goes on from here" in error
    assert not (tmp_path / "results.json").exists()
    (tmp_path / "metrics.jsonl").open("a").write('{"run": "train", "st')  # a line cut short
    before = len(logged_up_to_cut(tmp_path))
    again = finish(script, tmp_path)
    assert again.returncode == 0, again.stderr
    assert 0 < before < 12
    assert metrics(tmp_path) == metrics(uninterrupted)
    assert [(row["step"], row["loss"], row["grad_norm"]) for row in logged(tmp_path)] == [
        (row["step"], row["loss"], row["grad_norm"]) for row in logged(uninterrupted)
    ]


def logged_up_to_cut(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()[:-1]


def test_a_finished_run_is_read_back(script, uninterrupted):
    before = metrics(uninterrupted)
    assert finish(script, uninterrupted).returncode == 0
    assert metrics(uninterrupted) == before


def test_nan_stops_names_the_step_and_keeps_the_checkpoint(script, tmp_path):
    process = finish(script, tmp_path, bad_at=33)
    assert process.returncode == 1
    assert "loss or gradient not finite at step 33; the checkpoint of step 30 is in" in process.stderr
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints" / "train").glob("[0-9]*")) == [25, 30]
    assert logged(tmp_path)[-1]["step"] == 30


def test_another_config_is_refused_and_touches_nothing(script, uninterrupted):
    before = sorted((path, path.stat().st_mtime_ns) for path in uninterrupted.rglob("*"))
    process = finish(script, uninterrupted, seed=1)
    assert process.returncode == 2
    assert "holds a run with another config (seed 0 -> 1)" in process.stderr
    assert sorted((path, path.stat().st_mtime_ns) for path in uninterrupted.rglob("*")) == before


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class Config:
        seed: int = 0

    with pytest.raises(UsageError, match="cannot write to"):
        Run(tmp_path / "file" / "run", Config())


def test_json_is_strict_and_whole(tmp_path):
    write_json(tmp_path / "x.json", {"a": np.float32(1.5), "b": [np.nan, np.inf], "c": np.arange(2), "d": Path("p"), "e": None})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1.5, "b": [None, None], "c": [0, 1], "d": "p", "e": None}
    assert list(tmp_path.iterdir()) == [tmp_path / "x.json"]
    assert jsonable({"x": (1, 2.0)}) == {"x": [1, 2.0]}


def test_report_escapes_and_embeds(tmp_path):
    (tmp_path / "x.png").write_bytes(b"picture")
    page = Report("A < B", "lead & more")
    page.heading("H")
    page.table([{"name": "<x>", "value": 0.123456, "flag": True, "none": None}])
    page.figure(tmp_path / "x.png", 'a "caption"')
    page.write(tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    for part in ("A &lt; B", "lead &amp; more", "&lt;x&gt;", "0.1235", "<td>yes</td>", "cGljdHVyZQ==", "a &quot;caption&quot;"):
        assert part in html
    assert "<script" not in html
    assert show(1e-7) == "1e-07"
