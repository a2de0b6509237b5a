"""What a sampler costs beside its network: microseconds per step of `integrate` and `diffeqsolve`, as ratios to the bare network calls.

    python benchmarks/samplers.py [--rounds N] [--steps N] [--solvers all|NAME,...] [--quick] [--out DIR] [--torch-python PATH]

All cells of a network are timed in turn, in rotating order, round after round, so that a slow moment of the machine hits them alike. A bare run is
one scan of the same number of network calls chained by y <- y + 1e-3 net(t, y). k-diffusion and diffusers run the torch twin of the network in a
process of their own (`samplers_torch.py`), between our rounds, against a bare torch loop of the same number of calls.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from ergodax.core import Denoiser, DenoiserTerm, NoisePrediction, VPPath, integrate
from ergodax.diffusion import (
    BDIA,
    DDIM,
    ERSDE,
    IIA,
    PNDM,
    AcceleratedDDIM,
    AcceleratedDDPM,
    Ancestral,
    ConjugateDDIM,
    DPMSolverPP2M,
    EulerMaruyama,
    Heun,
    LinearRestorationDegradation,
    ReverseDiffusion,
    TimeShift,
    WarmUp,
    uniform_grid,
)
from ergodax.diffusion.dpm_solver_2 import DPMSolver2
from ergodax.diffusion.dpm_solver_pp_sde import DPMSolverPP2MSDE, DPMSolverPP3MSDE
from ergodax.diffusion.lms import LMS
from ergodax.diffusion.usf_s3 import USF
from ergodax.nn import UNet


BATCH = 64
FIRST = ("Euler", "DDIM", "DPM++2M", "Heun")  # those that have peers in torch, the default


def solvers(path, steps):
    """{name: (solver, network calls per step)}: what runs on a `DenoiserTerm` by `integrate`."""
    plain = {
        "Euler": dfx.Euler(),
        "DDIM": DDIM(),
        "DPM++2M": DPMSolverPP2M(),
        "Heun": Heun(),
        "DPM-Solver-2": DPMSolver2(path),
        "LMS": LMS(),
        "DPM++2M SDE": DPMSolverPP2MSDE(),
        "DPM++3M SDE": DPMSolverPP3MSDE(),
        "ancestral": Ancestral(),
        "Euler-Maruyama": EulerMaruyama(),
        "reverse diffusion": ReverseDiffusion(),
        "ER-SDE": ERSDE(),
        "PLMS": PNDM(4, WarmUp.improved_euler()),
        "F-PNDM": PNDM(),
        "BDIA": BDIA(),
        "IIA-DDIM": IIA(jnp.zeros((steps, 2), jnp.float32)),
        "accelerated DDIM": AcceleratedDDIM(),
        "accelerated DDPM": AcceleratedDDPM(),
        "restoration-degradation": LinearRestorationDegradation(path),
        "conjugate DDIM": ConjugateDDIM(0.3),
        "time shift, DDIM": TimeShift(DDIM()),
        "USF: DPM++3M": USF.dpm_solver(steps, 3),
        "USF: DEIS-3": USF.deis(steps, 3),
        "USF: UniPC-3": USF.unipc(steps, 3),
    }
    more = {"Heun": 2, "DPM-Solver-2": 2, "accelerated DDIM": 2, "PLMS": 1 + 1 / steps, "F-PNDM": 1 + 9 / steps}
    return {name: (solver, more.get(name, 1)) for name, solver in plain.items()}


THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class MLP(eqx.Module):
    """512 x 3 on 64 numbers and the time."""

    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.mlp = eqx.nn.MLP(65, 64, 512, 3, jax.nn.silu, key=key)

    def __call__(self, t, x, args):
        return self.mlp(jnp.append(x, t))


class Gain(eqx.Module):
    """x times a number: a network that costs nothing, so that the sampler's own cost shows."""

    gain: jax.Array

    def __call__(self, t, x, args):
        return self.gain * x


class Batched(eqx.Module):
    """A network on one example as the vector field of a batch."""

    network: eqx.Module

    def __call__(self, t, x, args):
        return jax.vmap(self.network, in_axes=(None, 0, None))(t, x, args)


def networks(key):
    """{name: (network, shape of one example, times it is measured in each round)}"""
    return {
        "none, d=1": (Batched(Gain(jnp.ones(()))), (1,), 10),
        "MLP 512x3, d=64": (Batched(MLP(key)), (64,), 10),
        "U-Net 32-64, 8x8x1": (Batched(UNet((8, 8, 1), 32, (1, 2), key=key)), (8, 8, 1), 1),
    }


def bare(network, grid, y):
    def body(y, t):
        return y + 1e-3 * network(t, y, None), None

    return jax.lax.scan(body, y, grid[:-1])[0]


def term_of(network, grid):
    path = VPPath()
    return DenoiserTerm(Denoiser(network, path, NoisePrediction()), path, grid)


def with_scan(solver):
    """The key is for the stochastic ones. The time shift takes the batch for one example here: what it costs is one variance either way."""
    return lambda network, grid, y: integrate(term_of(network, grid), solver, y, key=jr.key(2))


def with_diffeqsolve(solver):
    def run(network, grid, y):
        steps = jnp.arange(grid.shape[0], dtype=y.dtype)
        solution = dfx.diffeqsolve(
            term_of(network, grid), solver, steps[0], steps[-1], None, y,
            stepsize_controller=dfx.StepTo(steps), adjoint=dfx.ForwardMode(), max_steps=grid.shape[0] - 1,
        )  # fmt: skip
        return solution.ys[0]

    return run


def compiled(function, *args):
    """`function` compiled for `args`, the seconds of tracing and lowering, and those of XLA."""
    dynamic, static = eqx.partition(args, eqx.is_array)
    start = time.perf_counter()
    lowered = jax.jit(lambda dynamic: function(*eqx.combine(dynamic, static))).lower(dynamic)
    middle = time.perf_counter()
    executable = lowered.compile()
    end = time.perf_counter()
    return lambda: jax.block_until_ready(executable(dynamic)), middle - start, end - middle


def timed(run):
    """Wall seconds and CPU seconds of all threads of this process; the second says more on a busy machine."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


class TorchPeers:
    """The process that times the torch peers, all of one network for each line it is sent; empty where torch or a peer is not installed."""

    def __init__(self, python, steps):
        script = pathlib.Path(__file__).with_name("samplers_torch.py")
        command = [python, str(script), "--steps", str(steps), "--threads", str(THREADS)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        hello = self.process.stdout.readline()
        if not hello:
            error = self.process.stderr.read().strip().splitlines()[-1]
            print(f"The torch peers are skipped ({error}): pip install 'ergodax[bench]', or name their interpreter with --torch-python\n")
        hello = json.loads(hello) if hello else dict(versions={}, cells=[])
        self.versions, self.cells = hello["versions"], {tuple(cell[:3]): cell[3] for cell in hello["cells"]}

    def measure(self, network):
        """{cell: (wall seconds, CPU seconds)}"""
        if not self.cells:
            return {}
        print(network, file=self.process.stdin, flush=True)
        return dict(zip([cell for cell in self.cells if cell[0] == network], json.loads(self.process.stdout.readline())))


def machine(torch_versions):
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu)
    return dict(
        cpu=cpu,
        threads=THREADS,
        device=jax.devices()[0].device_kind,
        load_at_start=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        **{package: version(package) for package in ("ergodax", "jax", "equinox", "diffrax")},
        **torch_versions,
    )


def table(rows):
    """The rows as a markdown table with aligned columns."""
    titles = list(rows[0])
    cells = [titles, *[[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(titles))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="rounds (default 10): the U-Net is timed once in each, the others ten times")
    parser.add_argument("--steps", type=int, default=50, help="solver steps N (default 50)")
    parser.add_argument("--solvers", default=",".join(FIRST), help="names with commas between, or all (default: those with peers in torch)")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 10 steps: does it run?")
    parser.add_argument("--out", type=pathlib.Path, help="folder for samplers.json")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter of the torch peers (default: this one)")
    options = parser.parse_args()
    rounds, steps = (3, 10) if options.quick else (options.rounds, options.steps)

    known = solvers(VPPath(), steps)
    chosen = list(known) if options.solvers == "all" else [name.strip() for name in options.solvers.split(",")]
    if unknown := set(chosen) - set(known):
        parser.error(f"--solvers: {', '.join(sorted(unknown))} is none of: all, {', '.join(known)}")

    peers = TorchPeers(options.torch_python, steps)
    about = machine(peers.versions)
    runs, calls, compile_seconds, visits = {}, {}, {}, []
    grid = uniform_grid(steps, 1e-3, 1 - 1e-3)
    for name, (network, shape, repeats) in networks(jr.key(0)).items():
        y = jr.normal(jr.key(1), (BATCH, *shape))
        cells = {("JAX", "bare calls"): (bare, 1)}
        for solver_name in chosen:
            solver, calls_per_step = known[solver_name]
            cells["integrate", solver_name] = with_scan(solver), calls_per_step
            if solver_name in FIRST:
                cells["diffeqsolve", solver_name] = with_diffeqsolve(solver), calls_per_step
        for cell, (function, calls_per_step) in cells.items():
            runs[name, *cell], *compile_seconds[name, *cell] = compiled(function, network, grid, y)
            calls[name, *cell] = calls_per_step
            runs[name, *cell]()
        peers.measure(name)
        visits += [name] * repeats
    calls |= peers.cells

    seconds, order = {cell: [] for cell in calls}, list(runs)
    for name in visits * rounds:
        cells = [cell for cell in order if cell[0] == name]
        runs[cells[0]]()  # not timed: the other process has just left the cores
        for cell in cells:
            seconds[cell].append(timed(runs[cell]))
        order = [*order[1:], order[0]]
        for cell, pair in peers.measure(name).items():
            seconds[cell].append(pair)

    rows = []
    for (name, driver, run), pairs in sorted(seconds.items(), key=lambda item: visits.index(item[0][0])):
        library = "JAX" if (name, driver, run) in runs else "torch"
        wall, cpu = zip(*pairs)
        bare_wall, bare_cpu = zip(*seconds[name, library, "bare calls"])
        calls_per_step = calls[name, driver, run]
        trace, xla = compile_seconds.get((name, driver, run), ("", ""))
        rows.append(
            {
                "network": name,
                "driver": driver,
                "run": run,
                "calls/step": calls_per_step,
                "us/step min": 1e6 * min(wall) / steps,
                "us/step median": 1e6 * statistics.median(wall) / steps,
                "x bare min": round(min(wall) / min(bare_wall) / calls_per_step, 3),
                "x bare median": round(statistics.median(a / b for a, b in zip(wall, bare_wall)) / calls_per_step, 3),
                "x bare CPU": round(min(cpu) / min(bare_cpu) / calls_per_step, 3),
                "trace s": trace,
                "XLA s": xla,
            }
        )
    print(f"{steps} steps, batch {BATCH}, float32, {rounds} rounds; " + ", ".join(f"{k} {v}" for k, v in about.items()) + "\n")
    print(table(rows))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        results = dict(machine=about, steps=steps, batch=BATCH, rounds=rounds, rows=rows)
        (options.out / "samplers.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
