"""The early-stopping experiment, tiny: every method's row is there, and the lanes are the runs of the sweep."""

import importlib
import json
from pathlib import Path

import jax

from ergodax.core.config import load


ROOT = Path(__file__).parent.parent.parent


def test_everything_promised_is_there(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        experiment = importlib.import_module("early_stopping")
        experiment.compare(load(experiment.Config, ROOT / "configs" / "early_stopping" / "smoke.yaml"), tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    metrics = results["metrics"]
    rows = {row["method"]: row for row in metrics["methods"]}
    assert list(rows) == ["full sweep", "successive halving", "ASHA", "PBT"]
    assert rows["full sweep"]["steps"] == 8 * 4 * 5
    assert rows["successive halving"]["steps"] == (8 + 4 + 2 * 2) * 5
    assert rows["PBT"]["steps"] == 2 * 4 * 5
    assert all(row["compiles"] == 1 for row in rows.values())
    assert rows["ASHA"]["steps"] < rows["full sweep"]["steps"]
    assert metrics["largest_relative_gap_to_the_sweep"] < 1e-4
    halving = [row for row in metrics["replay"] if row["rule"] == "successive halving" and row["eta"] == 2]
    assert halving[0]["share_of_steps"] == rows["successive halving"]["share_of_steps"]
    assert halving[0]["finds_best"] == (rows["successive halving"]["rank"] == 1)
    assert (tmp_path / "run" / "figures" / "curves.png").stat().st_size > 5000
    assert (tmp_path / "run" / "report.html").read_text().count("data:image/png;base64,") == 1
