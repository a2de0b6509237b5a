"""The main job, tiny: everything it promises is in its folder, and mistakes end with code 2 before anything compiles."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.child import environment


ROOT = Path(__file__).parent.parent.parent
TINY = [
    *("--preset", "smoke", "--network.width", "16", "--network.depth", "1", "--train.steps", "40", "--sweep.steps", "20"),
    *("--sample.nfe", "5", "20", "--sample.guidance", "1.0", "2.0"),
]


def digits(*argv, timeout=300):
    command = [sys.executable, str(ROOT / "experiments" / "digits.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment(COLUMNS="200"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "run"
    done = digits(*TINY, "--out", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


def test_everything_promised_is_there(folder):
    results = json.loads((folder / "results.json").read_text())
    metrics = results["metrics"]
    assert set(results) == {"config", "metrics", "timing", "compile_cache", "environment"}
    assert results["config"]["train"]["steps"] == 40
    assert {row["solver"] for row in metrics["solvers"]} == {"Euler", "Heun", "DDIM", "DPM-Solver++(2M)", "ancestral", "Euler–Maruyama"}
    assert len(metrics["solvers"]) == 12
    assert set(metrics["floor"]) == {"class_accuracy", "sliced_wasserstein", "energy_distance", "memorised_share"}
    assert (len(metrics["sweep"]["losses"]), len(metrics["sweep"]["losses"][0])) == (4, 2)
    assert metrics["sweep"]["compiles"] == 1
    assert all("compile_seconds" in results["timing"][part] for part in ("train", "samples", "sweep"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [20, 40]
    assert rows[-1]["loss"] == metrics["final_loss"]
    for name in ("samples", "solvers", "guidance", "losses", "sweep"):
        assert (folder / "figures" / f"{name}.png").stat().st_size > 5000
        json.loads((folder / "figures" / f"{name}.json").read_text())
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert 'src="http' not in page


def test_a_second_call_reads_everything_back(folder):
    before = json.loads((folder / "results.json").read_text())
    started = time.monotonic()
    again = digits(*TINY, "--out", str(folder))
    assert again.returncode == 0, again.stderr
    after = json.loads((folder / "results.json").read_text())
    assert after["metrics"] == before["metrics"]
    assert {part: value["seconds"] for part, value in after["timing"].items()} == {part: value["seconds"] for part, value in before["timing"].items()}
    assert time.monotonic() - started < 120


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "huge"], "unknown preset `huge`; there are default, mnist, smoke."),
        (["--train.stepz", "3"], "--train.stepz"),
        (["--sample.nfe", "-5"], "`sample.nfe` must be an integer of at least 4, got -5."),
        (["--train.decay", "1.5"], "`train.decay` must lie in [0, 1], got 1.5."),
        (["--train.warmup", "0.9"], "`train.warmup + train.decay`"),
        (["--sample.sigma-min", "100"], "`sample.sigma_min` must lie in (0, 80), got 100.0."),
        (["--train.steps", "30", "--train.log-every", "20"], "must be multiples of `train.log_every` 20"),
        (["--network.kind", "resnet"], "resnet"),
    ],
)
def test_mistakes(argv, message, tmp_path):
    done = digits(*argv, "--out", str(tmp_path / "run"), timeout=120)
    assert done.returncode == 2
    assert message in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()
