"""Makes the figures of the documentation, each with its numbers as CSV beside it: `python docs/figures.py` (about 20 seconds).

`solvers.svg`: distance of a solver's result from the exact probability-flow map, against network calls. The model is the exact denoiser of a mixture,
so all of it is the solver's error.
"""

import csv
from functools import partial
from pathlib import Path

import diffrax as dfx
import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt

from ergodax.core import DenoiserTerm, VPPath, integrate
from ergodax.data import eight_gaussians
from ergodax.diffusion import DDIM, DPMSolverPP2M, Heun, log_snr_grid


ASSETS = Path(__file__).parent / "assets"
SOLVERS = {"Euler": (dfx.Euler(), 1), "DDIM": (DDIM(), 1), "Heun": (Heun(), 2), "DPM-Solver++(2M)": (DPMSolverPP2M(), 1)}  # calls per step
CALLS = (8, 16, 32, 64, 128)


def solver_errors() -> list[dict]:
    """Median error over 512 starts of each solver at each number of network calls."""
    path, mixture = VPPath(), eight_gaussians()
    start = path.prior(jax.random.key(0), (512, 2))

    @partial(jax.jit, static_argnums=(0, 1))
    def solve(solver, num_steps):
        return integrate(DenoiserTerm(mixture.denoiser(path), path, log_snr_grid(path, num_steps)), solver, start)

    exact = solve(DPMSolverPP2M(), 4096)  # its own error is below 1e-6
    rows = []
    for name, (solver, calls_per_step) in SOLVERS.items():
        for calls in CALLS:
            error = jnp.linalg.norm(solve(solver, calls // calls_per_step) - exact, axis=-1)
            rows.append({"solver": name, "calls": calls, "median_error": f"{float(jnp.median(error)):.3e}"})
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """One line per solver, log-log."""
    mpl.rcParams["svg.hashsalt"] = "ergodax"  # the same bytes each time
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    for name, marker in zip(SOLVERS, "osD^", strict=True):
        chosen = [row for row in rows if row["solver"] == name]
        axes.loglog([row["calls"] for row in chosen], [float(row["median_error"]) for row in chosen], marker=marker, markersize=4, label=name)
    axes.set_xlabel("network calls")
    axes.set_ylabel("median distance from the exact flow map")
    axes.set_xticks(CALLS, [str(calls) for calls in CALLS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    ASSETS.mkdir(exist_ok=True)
    table = solver_errors()
    with (ASSETS / "solvers.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    draw(table, ASSETS / "solvers.svg")
