"""The experiments of `experiments/diffusion`, tiny: what they promise is in their folder, a second call reads it back, mistakes end with code 2."""

import pytest

from .shell import check_mistake, check_run


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


@pytest.mark.parametrize("name", list(TINY))
def test_everything_promised_is_there(name, tmp_path):
    check_run(f"diffusion/{name}.py", TINY[name], FIGURES[name], tmp_path / "run")


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
    check_mistake(f"diffusion/{name}.py", argv, message, tmp_path / "run")
