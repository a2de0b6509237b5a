"""`experiments/schedules/real_runs.py` on a table made here, whose losses are the bound's own at each rate: it must find that out."""

import csv

import numpy as np
import pytest

from .shell import check_mistake, check_run


COLUMNS = ["dataset", "parameters", "scheduler", "decay_type", "cooldown", "lr", "warmup_steps", "iterations", "final_val_loss"]
RATES = (2e-4, 1e-3, 5e-3)


def bound(shape):
    """Ω's two parts for the first T rates, by NumPy."""
    here, energy = (np.cumsum(x[::-1])[::-1] for x in (shape, shape**2))
    return 1 / (2 * here[0]), (energy[0] / here[0] + np.sum(shape[:-1] / here[1:] * energy[:-1] / here[:-1])) / 2


def write_table(path):
    """Two horizons, two cooldowns and a cosine of one size, each with three rates; and runs that went on from others, which are left out."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for steps in (40, 100):
            k = np.arange(steps)
            warm = np.minimum(1, k / 4)
            for scheduler, share in (("cos", ""), ("wsd", 0.2), ("wsd", 0.8)):
                decay = (
                    (1 + np.cos(np.pi * np.maximum(0, (k - 4) / (steps - 4)))) / 2 if share == "" else np.minimum(1, (steps - k) / (share * steps))
                )
                distance, noise = bound(warm * decay)
                for rate in RATES:
                    loss = 2 + distance / (100 * rate) + noise * 100 * rate
                    writer.writerow(["made", 1000, scheduler, "linear", share, rate, 4, steps, loss])
        writer.writerow(["slimpajama_chunk1", 1000, "wsd_twostage", "linear", "", 1e-3, 4, 100, 9.0])


def test_real_runs(tmp_path):
    write_table(tmp_path / "runs.csv")
    argv = ["--data", str(tmp_path / "runs.csv"), "--classifiers", "softmax regression, SGD, l2"]
    metrics = check_run("schedules/real_runs.py", argv, {"ranks", "rates", "refinement"}, tmp_path / "run")
    ranks = {row["runs of"]: row for row in metrics["ranks"]}
    assert [ranks[name]["runs"] for name in ("all", "best rate, schedules as they are", "rate 0.001")] == [18, 6, 6]
    assert ranks["all, bound at the run's rate"]["Spearman"] > 0.85 > ranks["all"]["Spearman"]
    assert len(metrics["rates"]) == 6
    changes = {row["what changes"]: row for row in metrics["changes"]}
    assert [changes[name]["pairs"] for name in ("schedule, same steps", "steps, same schedule", "both", "any")] == [12, 6, 12, 30]
    assert [row["schedule"] for row in metrics["refinement"]] == ["constant", "cosine", "linear", "refined"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "nowhere.csv"], "no data at nowhere.csv: give the file llm_runs.csv by --data,"),
        (["--window-share", "0.9"], "`window_share` must lie in (0, 0.5], got 0.9."),
        (["--classifiers", "svm"], "unknown `classifiers` svm; there are logistic regression of diabetes, SGD, l2; softmax"),
    ],
)
def test_mistakes(argv, message, tmp_path):
    check_mistake("schedules/real_runs.py", argv, message, tmp_path / "run")
