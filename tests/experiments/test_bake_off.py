"""The bake-off of schedules, tiny: what it promises is in its folder, a second call reads it back, mistakes end with code 2."""

import numpy as np
import pytest

from .shell import check_mistake, check_run


def test_bake_off(tmp_path):
    argv = ["--tasks", "table", "--budgets", "1.0", "--autolrs", "table", "--adamw.batch-sizes", "4"]
    figures = {"ranks", "losses", "bound", "merging", "timescale"}
    metrics = check_run("schedules/bake_off.py", argv, figures, tmp_path / "run")
    ranks = metrics["ranks"]
    assert len({row["schedule"] for row in ranks}) == 18
    assert sum(row["mean rank"] for row in ranks) == pytest.approx(18 * 19 / 2)
    assert all(row["5 %"] <= row["95 %"] for row in ranks)
    assert all(np.isfinite(row["loss"]) for row in metrics["final"]["table"])
    assert [row["decay"] for row in metrics["merging"]] == ["linear", "sqrt", "cosine"]
    assert [row["with search"] for row in metrics["AutoLRS"]] == [200, 200, 100, 100]
    assert {row["peak"] for row in metrics["timescale"]} == {"0.01", "best"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "images"], "`tasks` must be some of digits, text, flow, table, got images."),
        (["--budgets", "0.5"], "`budgets` must increase and end with 1, got (0.5,)."),
    ],
)
def test_mistakes(argv, message, tmp_path):
    check_mistake("schedules/bake_off.py", argv, message, tmp_path / "run")
