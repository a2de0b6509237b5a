"""A sweep of 16 small training runs in one program, against 16 runs in turn in one process, and 16 processes.

    python benchmarks/sweep.py [--runs 16] [--steps 300] [--out DIR]

Every way trains the same 16 networks (4 learning rates x 4 seeds of a time-conditioned MLP on the eight Gaussians) to the same numbers; wall time
counts everything from the start of a fresh process, so that what a person waits for is compared. Prints one table and writes it as JSON, with the
machine named.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path


RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def make(steps: int):
    """The training run as a pure function of its config, and its config."""
    import dataclasses

    import jax
    import optax

    from ergodax.core import FlowMatchingPath, VelocityPrediction, fit, traced
    from ergodax.data import eight_gaussians
    from ergodax.diffusion import DenoisingLoss
    from ergodax.nn import TimeMLP

    @dataclasses.dataclass(frozen=True)
    class Config:
        rate: float = 1e-3
        seed: int = traced(0)

    data = eight_gaussians().sample(jax.random.key(0), 2048)
    loss = DenoisingLoss(FlowMatchingPath(), VelocityPrediction())

    def train(config):
        key = jax.random.key(config.seed)
        network = TimeMLP((2,), 64, 2, key=key)
        return fit(loss, network, optax.adam(config.rate), data, key, num_steps=steps, batch_size=128, every=50).metrics["loss"][-1]

    return train, Config


def one_program(num_runs: int, steps: int, batch_size: int | None) -> dict:
    """`sweep`."""
    from ergodax.core import grid, sweep

    train, config = make(steps)
    result = sweep(train, config(), grid(rate=RATES, seed=range(num_runs // len(RATES))), batch_size=batch_size)
    return {"losses": [float(output) for output in result.outputs], "compiles": result.num_compiles}


def in_turn(num_runs: int, steps: int, reuse: bool) -> dict:
    """A Python loop: `jax.jit` of each run, as a script does (reuse=False), or of one function of traced values (reuse=True)."""
    import jax

    from ergodax.core import grid

    train, config = make(steps)
    overrides = grid(rate=RATES, seed=range(num_runs // len(RATES)))
    if reuse:
        run = jax.jit(lambda rate, seed: train(config(rate, seed)))
        return {"losses": [float(run(o["rate"], o["seed"])) for o in overrides], "compiles": 1}
    return {"losses": [float(jax.jit(lambda o=o: train(config(**o)))()) for o in overrides], "compiles": len(overrides)}


def single(index: int, num_runs: int, steps: int) -> dict:
    """One of the runs, for a process of its own."""
    import jax

    from ergodax.core import grid

    train, config = make(steps)
    override = grid(rate=RATES, seed=range(num_runs // len(RATES)))[index]
    return {"losses": [float(jax.jit(lambda: train(config(**override)))())], "compiles": 1}


def child(way: str, args) -> None:
    """What a fresh process does."""
    import os

    import jax

    name, _, index = way.partition(":")
    if name.startswith("sweep"):
        jax.config.update("jax_num_cpu_devices", os.cpu_count())
    out = {
        "sweep, one lane a device": lambda: one_program(args.runs, args.steps, 1),
        "sweep, all lanes vmapped": lambda: one_program(args.runs, args.steps, None),
        "in turn, one compile": lambda: in_turn(args.runs, args.steps, True),
        "in turn, a compile each": lambda: in_turn(args.runs, args.steps, False),
        "process": lambda: single(int(index), args.runs, args.steps),
    }[name]()
    print(json.dumps(out))


def spawn(way: str, args) -> dict:
    """A fresh process, timed from outside."""
    command = [sys.executable, __file__, "--runs", str(args.runs), "--steps", str(args.steps), "--child", way]
    started = time.perf_counter()
    out = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return out | {"seconds": time.perf_counter() - started}


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args)

    from ergodax.core.run import environment, write_json

    rows = [
        {"way": way} | spawn(way, args)
        for way in ("sweep, one lane a device", "sweep, all lanes vmapped", "in turn, one compile", "in turn, a compile each")
    ]
    processes = [spawn(f"process:{i}", args) for i in range(args.runs)]
    rows.append(
        {
            "way": f"{args.runs} processes, one after the other",
            "losses": [loss for process in processes for loss in process["losses"]],
            "compiles": args.runs,
            "seconds": sum(process["seconds"] for process in processes),
        }
    )
    best = rows[0]["seconds"]
    print(f"\n{args.runs} runs of {args.steps} steps\n")
    print("| way | wall s | ratio | compiles | largest relative difference of a loss |\n| --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        difference = max(abs(a - b) / abs(b) for a, b in zip(row["losses"], rows[2]["losses"]))
        print(f"| {row['way']} | {row['seconds']:.1f} | {row['seconds'] / best:.1f} | {row['compiles']} | {difference:.1e} |")
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "sweep.json", {"rows": rows, "environment": environment()})


if __name__ == "__main__":
    main()
