"""The experiments of `experiments/diffusion`, tiny: what they promise is in their folder, a second call reads it back, mistakes end with code 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent.parent
TINY = {
    "solver_ladder": ["--nfe", "4", "8", "--solvers", "DDIM", "UniPC-2", "ancestral", "--targets", "eight Gaussians, 2-D", "--samples", "16"],
    "training": [
        "--objectives",
        "flow, nearest of 4",
        "CVDM",
        "--speed.steps",
        "4",
        "--speed.every",
        "2",
        "--spoilt.steps",
        "4",
        "--spoilt.every",
        "4",
    ],
    "search": ["--generations", "1", "--stages", "1", "--tuning-steps", "4", "--model.train.steps", "20"],
    "processes": ["--processes", "VP", "flow matching", "--problems", "eight Gaussians"],
}
FIGURES = {
    "solver_ladder": {"best", "table_eight_gaussians"},
    "training": {"speed", "noisy", "biased", "biased_distance"},
    "search": {"schedules", "grids", "compute"},
    "processes": {"distance", "curvature", "paths_eight_Gaussians"},
}


def run(name, *argv):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "200", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    environment.pop("XLA_FLAGS", None)  # the scripts set their own number of devices
    command = [sys.executable, str(ROOT / "experiments" / "diffusion" / f"{name}.py"), "--preset", "smoke", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)


@pytest.mark.parametrize("name", list(TINY))
def test_everything_promised_is_there(name, tmp_path):
    folder = tmp_path / "run"
    done = run(name, *TINY[name], "--out", str(folder))
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "results.json").read_text())
    assert {path.stem for path in (folder / "figures").glob("*.png")} == FIGURES[name]
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(FIGURES[name])
    again = run(name, *TINY[name], "--out", str(folder))
    assert again.returncode == 0, again.stderr
    assert json.loads((folder / "results.json").read_text())["metrics"] == results["metrics"]


@pytest.mark.parametrize(
    ("name", "argv", "message"),
    [
        ("solver_ladder", ["--solvers", "DIDM"], "unknown `solvers` DIDM; there are Euler, DDIM,"),
        ("solver_ladder", ["--targets", "moon"], "`targets` must be some of eight Gaussians, 2-D,"),
        ("training", ["--speed.steps", "7", "--speed.every", "2"], "`steps` 7 must be a multiple of `every` 2."),
        ("processes", ["--processes", "DDPM"], "unknown `processes` DDPM; there are VP,"),
        ("search", ["--nfe", "1"], "`nfe` must be an integer of at least 2, got 1."),
    ],
)
def test_mistakes(name, argv, message, tmp_path):
    done = run(name, *argv, "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert message in " ".join((done.stderr + done.stdout).split())
    assert not (tmp_path / "run").exists()
