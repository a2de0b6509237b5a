"""The experiments of `experiments/schedules`, tiny: what they promise is in their folder, a second call reads it back, mistakes end with code 2."""

import sys

import numpy as np
import pytest

from ergodax.laws.curves import rate_history
from ergodax.laws.multi_power_law import MultiPowerLaw

from .shell import ROOT, check_mistake, check_run


sys.path.append(str(ROOT / "experiments" / "schedules"))

import loss_curves


def write_curves(folder):
    """Tiny runs whose losses follow a multi-power law."""
    rng = np.random.default_rng(0)
    law = MultiPowerLaw.of(3.0, 0.2, 0.5, 300.0, 2.0, 0.6, 0.6)
    config = loss_curves.Config(warmup=20, stage_step=100)
    steps = np.arange(24, 200, 8)
    for name in ("cosine_240", "constant_240", "wsdcon_9", "wsd_200_240"):
        rates = loss_curves.schedule(config, name)
        losses = law([rate_history(rates, steps, warmup=20)]) * np.exp(1e-3 * rng.normal(size=steps.size))
        rows = np.stack([steps, rates[steps], losses], 1)
        np.savetxt(folder / f"25M_{name}.csv", rows, delimiter=",", header="step,lr,loss", comments="", fmt=("%d", "%.12g", "%.6f"))


def test_loss_curves(tmp_path):
    write_curves(tmp_path)
    figures = {"predictions", "validation", "schedules"}
    metrics = check_run("schedules/loss_curves.py", ["--data", str(tmp_path)], figures, tmp_path / "run")
    assert metrics["laws"][0]["law"] == "annealing, minimum"
    assert len(metrics["laws"]) == 5
    assert [row["schedule"] for row in metrics["schedules"]][:2] == ["optimised", "cosine"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no data at 25M_cosine_240.csv: give the folder llm_loss_curves by --data"),
        (["--train", "cosine_240"], "`train` must name at least three curves"),
        (["--test", "linear_240"], "curves are called constant_T, cosine_T, wsd_S_T, wsdld_S_T or wsdcon_K, got linear_240."),
    ],
)
def test_loss_curves_mistakes(argv, message, tmp_path):
    check_mistake("schedules/loss_curves.py", ["--data", ".", *argv], message, tmp_path / "run")
