"""The experiments of `experiments/transport`, tiny: what they promise is in their folder, a second call reads it back, mistakes end with code 2."""

import sys

import numpy as np
import pytest

from .shell import ROOT, check_mistake, check_run


sys.path.append(str(ROOT / "experiments" / "transport"))

import eot_benchmark


def test_couplings(tmp_path):
    argv = ["--tasks", "labels", "--couplings", "independent", "optimal by condition"]
    metrics = check_run("transport/couplings.py", argv, {"distances", "paths"}, tmp_path / "run")
    assert [row["coupling"] for row in metrics["couplings"]] == ["independent", "optimal by condition"]
    assert all(np.isfinite(row["path energy"]) for row in metrics["couplings"])


def test_single_cell(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "cells.npz", **{f"day{day}": rng.normal(day, 1, (30 + day, 3)) for day in (2, 3, 4, 7)})
    argv = ["--data", str(tmp_path / "cells.npz"), "--methods", "OT midpoint", "OT flow matching", "LightSB", "SBIRR"]
    metrics = check_run("transport/single_cell.py", argv, {"scores", "cells"}, tmp_path / "run")
    names = ["half of the day itself", "OT midpoint", "OT flow matching", "LightSB, ε = 10", "piecewise bridges", "SBIRR"]
    assert [(row["day"], row["method"]) for row in metrics["predictions"]] == [(day, name) for day in (3, 4) for name in names]


def test_ecology(tmp_path):
    argv = ["--systems", "Lotka-Volterra", "--seeds", "1"]
    metrics = check_run("transport/ecology.py", argv, {"distances", "rates", "paths"}, tmp_path / "run")
    assert [row["reference"] for row in metrics["references"]] == ["fresh data", "Brownian", "affine family", "true family", "true parameters"]
    assert [row["rate"] for row in metrics["rates"]] == ["growth", "eaten", "death", "eating"]


def test_eot_benchmark(tmp_path):
    metrics = check_run("transport/eot_benchmark.py", ["--dims", "2", "--epsilons", "1.0"], {"scores"}, tmp_path / "run")
    assert [row["method"] for row in metrics["pairs"]] == ["LightSB", "energy-guided potential"]


def test_samplers(tmp_path):
    metrics = check_run("transport/samplers.py", [], {"scores", "samples"}, tmp_path / "run")
    assert [row["method"] for row in metrics["samplers"]] == ["exact", "SMC", "RealNVP"]
    assert all(np.isfinite(row["log Z error"]) and 0 < row["gradients"] <= 3000 for row in metrics["samplers"][1:])


@pytest.mark.parametrize(
    ("name", "argv", "message"),
    [
        ("couplings", ["--couplings", "optimum"], "unknown `couplings` optimum; there are entropic, independent, optimal,"),
        ("single_cell", ["--data", "nowhere.npz"], "no data at nowhere.npz: give the file cite_pca50.npz by --data,"),
        ("ecology", ["--systems", "SIR"], "`systems` must be some of Lotka-Volterra, repressilator, got SIR."),
        ("ecology", ["--steps", "5"], "`steps` must be even, so that half-way lies on the grid, got 5."),
        ("samplers", ["--methods", "HMC"], "unknown `methods` HMC; there are NUTS, SMC, mixed flow, RealNVP, Langevin, SNF, smooth flow."),
        ("eot_benchmark", ["--epsilons", "0.0"], "`epsilons` must lie in (0, inf)"),
        ("eot_benchmark", ["--torch-python", "no/such/python"], "`torch_python` no/such/python is no program."),
    ],
)
def test_mistakes(name, argv, message, tmp_path):
    check_mistake(f"transport/{name}.py", argv, message, tmp_path / "run")


def test_verdicts_of_the_eot_benchmark():
    """Beside the authors' formulation, which needs torch: compiling is shared by all ε of a dimension."""
    ours = {"d": 2, "ε": 0.1, "method": eot_benchmark.METHODS["light_sb"], "KL": 0.01, "CPU s": 1.0, "compile CPU s": 6.0}
    theirs = ours | {"method": eot_benchmark.METHODS["torch"], "KL": 0.02, "CPU s": 30.0}
    (row,) = eot_benchmark.verdicts(eot_benchmark.Config(epsilons=(0.1, 1.0, 10.0)), [ours, theirs, ours | {"d": 16}])
    assert row["at or below"]
    assert (row["times faster"], row["with compiling"]) == (30.0, 10.0)
