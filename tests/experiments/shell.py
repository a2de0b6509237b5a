"""What tests of experiments share: a script is started as a user starts it, tiny, and its folder is looked through."""

import json
import subprocess
import sys
from pathlib import Path

from tests.child import environment


ROOT = Path(__file__).parent.parent.parent


def run(script: str, *argv: str, timeout: int = 400) -> subprocess.CompletedProcess:
    """`experiments/SCRIPT --preset smoke ARGV`."""
    command = [sys.executable, str(ROOT / "experiments" / script), "--preset", "smoke", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment(COLUMNS="200"))


def check_run(script: str, argv: list[str], figures: set[str], folder: Path) -> dict:
    """It ends well, its figures are there and on its page, and a second call reads the same metrics back, which are returned."""
    done = run(script, *argv, "--out", str(folder))
    assert done.returncode == 0, done.stderr
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    assert {path.stem for path in (folder / "figures").glob("*.png")} == figures
    assert (folder / "report.html").read_text().count("data:image/png;base64,") == len(figures)
    again = run(script, *argv, "--out", str(folder))
    assert again.returncode == 0, again.stderr
    assert json.loads((folder / "results.json").read_text())["metrics"] == metrics
    return metrics


def check_mistake(script: str, argv: list[str], message: str, folder: Path) -> None:
    """It ends with code 2 and says what was wrong, before anything is written."""
    done = run(script, *argv, "--out", str(folder))
    assert done.returncode == 2
    assert message in " ".join((done.stderr + done.stdout).split())
    assert not folder.exists()
