"""Many small training runs: one `sweep`, against a loop over one jitted run, one process each, and the same training in torch.

    python benchmarks/sweeps.py [--quick] [--only ways|growth] [--out DIR] [--torch-python PATH]

Every run trains an MLP on the eight Gaussians by flow matching with Adam; runs differ in learning rate and seed. Wall time counts everything from the
start of a fresh process, imports and compiles included, with no persistent compile cache: what a person waits for. The second part grows a sweep:
more runs, more devices (virtual ones of this CPU), more processes. Prints tables and, with `--out`, writes them as JSON with the machine named.
"""

import argparse
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run: three hidden layers, SELU, as torchcfm's MLP."""

    width: int
    batch: int
    steps: int

    @property
    def parameters(self) -> int:
        """(2 + 1) -> width -> width -> width -> 2."""
        return 4 * self.width + 2 * self.width * (self.width + 1) + 2 * (self.width + 1)

    @property
    def flops(self) -> int:
        """Of the matrix products of one step: forward, and twice that backward."""
        return 6 * self.batch * (5 * self.width + 2 * self.width**2)

    @property
    def traffic(self) -> int:
        """Bytes of one step if all comes from memory: parameters are read forward and backward; Adam reads parameter, gradient and two moments and
        writes three; activations are written once and read twice."""
        return 4 * (9 * self.parameters + 3 * 6 * self.width * self.batch)


JOBS = {"50k": Job(156, 256, 2000), "small": Job(32, 64, 500)}
RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def overrides(num_runs: int):
    """Four learning rates, as many seeds as that takes."""
    from ergodax.core import grid

    return grid(seed=range(max(1, num_runs // 4)), rate=RATES[: min(num_runs, 4)])


def make(job: Job):
    """The training run as a pure function of its config, and its config."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import optax

    from ergodax.core import fit, traced
    from ergodax.data import eight_gaussians

    @dataclasses.dataclass(frozen=True)
    class Config:
        rate: float = 1e-3
        seed: int = traced(0)

    data = eight_gaussians().sample(jax.random.key(0), 4096)

    def loss(model, batch, key):
        noise_key, time_key = jax.random.split(key)
        noise, t = jax.random.normal(noise_key, batch.shape), jax.random.uniform(time_key, (len(batch), 1))
        predicted = jax.vmap(model)(jnp.concatenate([(1 - t) * noise + t * batch, t], axis=1))
        return jnp.mean((predicted - (batch - noise)) ** 2), {}

    def train(config):
        key = jax.random.key(config.seed)
        network = eqx.nn.MLP(3, 2, job.width, 3, jax.nn.selu, key=key)
        fitted = fit(loss, network, optax.adam(config.rate), data, key, num_steps=job.steps, batch_size=job.batch, every=job.steps // 10)
        return fitted.metrics["loss"][-1]

    return train, Config


def by_sweep(job: Job, num_runs: int, batch_size: int | None, devices: int, join: list | None) -> dict:
    """`sweep`; with `join`, as one process of several."""
    import jax

    from ergodax.core import sweep

    mesh = None
    if join:
        from ergodax.core.mesh import initialise

        address, count, index = join
        mesh = initialise(coordinator_address=address, num_processes=int(count), process_id=int(index))
    else:
        jax.config.update("jax_num_cpu_devices", devices)
    train, config = make(job)
    result = sweep(train, config(), overrides(num_runs), batch_size=batch_size, mesh=mesh)
    group = result.groups[0]
    return {
        "losses": result.table()["value"].tolist(),
        "compile": group.compile_seconds,
        "run": group.run_seconds,
        "batch_size": group.batch_size,
        "tried": group.tried,
        "memory": group.memory,
    }


def by_loop(job: Job, num_runs: int) -> dict:
    """A Python loop over one jitted function of the traced values."""
    import jax

    train, config = make(job)
    started = time.perf_counter()
    run = jax.jit(lambda rate, seed: train(config(rate, seed))).lower(1e-3, 0).compile()
    compiled = time.perf_counter()
    losses = [float(run(o["rate"], o["seed"])) for o in overrides(num_runs)]
    return {"losses": losses, "compile": compiled - started, "run": time.perf_counter() - compiled}


def by_itself(job: Job, index: int, num_runs: int) -> dict:
    """One of the runs, for a process of its own: a script that knows its values."""
    import jax

    train, config = make(job)
    return {"losses": [float(jax.jit(lambda: train(config(**overrides(num_runs)[index])))())]}


def bare(job: Job) -> dict:
    """Seconds per step of nothing but network, gradient and Adam on one batch that stays: what arithmetic costs here; and the speed of its largest
    matrix product.
    """
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import optax

    network = eqx.nn.MLP(3, 2, job.width, 3, jax.nn.selu, key=jax.random.key(0))
    params, static = eqx.partition(network, eqx.is_array)
    x, y, adam = jnp.ones((job.batch, 3)), jnp.ones((job.batch, 2)), optax.adam(1e-3)

    def step(carry, _):
        params, state = carry
        loss, gradient = jax.value_and_grad(lambda p: jnp.mean((jax.vmap(eqx.combine(p, static))(x) - y) ** 2))(params)
        updates, state = adam.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    def least(fn, *args):
        jax.block_until_ready(fn(*args))
        times = []
        for _ in range(5):
            started = time.perf_counter()
            jax.block_until_ready(fn(*args))
            times.append(time.perf_counter() - started)
        return min(times)

    steps = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=500)[1])
    a = jnp.ones((job.width, job.width)) * 1e-3
    products = jax.jit(lambda b: jax.lax.fori_loop(0, 500, lambda _, b: b @ a, b))
    return {
        "step": least(steps, (params, adam.init(params))) / 500,
        "gflops": 2 * job.batch * job.width**2 * 500 / least(products, jnp.ones((job.batch, job.width))) / 1e9,
    }


def child(spec: dict) -> None:
    """What a fresh process does."""
    job = Job(**spec["job"])
    ways = {
        "sweep": lambda: by_sweep(job, spec["runs"], spec.get("batch_size"), spec.get("devices", os.cpu_count()), spec.get("join")),
        "loop": lambda: by_loop(job, spec["runs"]),
        "alone": lambda: by_itself(job, spec["index"], spec["runs"]),
        "bare": lambda: bare(job),
    }
    print(json.dumps(ways[spec["way"]]()))


def spawn(way: str, job: Job, **spec) -> dict:
    """A fresh process, timed from outside."""
    spec |= {"way": way, "job": dataclasses.asdict(job)}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps(spec)], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{spec} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"wall": time.perf_counter() - started}


def processes(job: Job, num_runs: int, measured: int) -> dict:
    """Every run in a process of its own, as many at a time as there are cores: the first `measured` of them, the time scaled to all."""
    started = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(lambda index: spawn("alone", job, index=index, runs=num_runs), range(measured)))
    return {"losses": [part["losses"][0] for part in parts], "measured": measured, "wall": (time.perf_counter() - started) * num_runs / measured}


def in_torch(python: str, job: Job, num_runs: int) -> dict | None:
    """The same training in torch, run after run; None where that Python has no torch."""
    command = [python, str(Path(__file__).with_name("sweeps_torch.py")), json.dumps(dataclasses.asdict(job) | {"runs": num_runs, "rates": RATES})]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"torch: skipped ({done.stderr.strip().splitlines()[-1]})", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1]) | {"wall": time.perf_counter() - started}


def hosts(job: Job, num_runs: int, count: int) -> dict:
    """One sweep over several processes of one device each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        parts = list(pool.map(lambda index: spawn("sweep", job, runs=num_runs, batch_size=1, join=[address, count, index]), range(count)))
    return parts[0] | {"wall": time.perf_counter() - started}


def compare(args) -> dict:
    """Every way of running all runs, for each job."""
    out = {}
    for name, job in JOBS.items():
        job = dataclasses.replace(job, steps=10 * (job.steps // 200)) if args.quick else job
        runs = 8 if args.quick else 64
        floor = spawn("bare", job)
        rows = {
            "(a) sweep": spawn("sweep", job, runs=runs),
            "(a) sweep, one lane a device": spawn("sweep", job, runs=runs, batch_size=1),
            "(a) sweep, 8 lanes a device": spawn("sweep", job, runs=runs, batch_size=8),
            "(b) loop over one jitted run": spawn("loop", job, runs=runs),
            f"(c) {runs} processes, {os.cpu_count()} at a time": processes(job, runs, min(runs, args.processes)),
            "(d) torch, run after run": in_torch(args.torch_python, job, runs),
        }
        rows = {way: row for way, row in rows.items() if row is not None}
        best, losses = rows["(a) sweep"]["wall"], rows["(b) loop over one jitted run"]["losses"]
        steps = runs * job.steps
        print(f"\n{name}: {runs} runs of {job.steps} steps, {job.parameters} parameters, batch {job.batch}\n")
        print("| way | wall s | x (a) | compile s | run s | us per step of a run | loss differs by |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for way, row in rows.items():
            difference = "" if way.startswith("(d)") else f"{max(abs(a - b) / abs(b) for a, b in zip(row['losses'], losses)):.0e}"
            parts = " | ".join(f"{row[part]:.1f}" if part in row else "" for part in ("compile", "run"))
            seconds = row["wall"]
            print(f"| {way} | {seconds:.1f} | {seconds / best:.1f} | {parts} | {1e6 * seconds / steps:.0f} | {difference} |", flush=True)
        print(
            f"\nA step is {job.flops / 1e6:.1f} Mflop of matrix products and at most {job.traffic / 1e6:.2f} MB of memory traffic. Alone, network, "
            f"gradient and Adam take {1e6 * floor['step']:.0f} us ({job.flops / floor['step'] / 1e9:.0f} Gflop/s; the product of the largest layer "
            f"alone {floor['gflops']:.0f} Gflop/s, with all cores). (a) tried, seconds per run by batch size: {rows['(a) sweep']['tried']}."
        )
        out[name] = {"job": dataclasses.asdict(job), "rows": rows, "floor": floor}
    return out


def grow(args) -> dict:
    """More runs, more devices, more processes."""
    job, counts = JOBS["small"], (1, 4, 16) if args.quick else (1, 4, 16, 64, 256)
    runs = counts[-2]
    out = {
        "runs": [
            {"runs": count} | spawn("sweep", job, runs=count, batch_size=1) | {"loop": spawn("loop", job, runs=count)["wall"]} for count in counts
        ],
        "devices": [{"devices": count} | spawn("sweep", job, runs=runs, batch_size=1, devices=count) for count in (1, 2, 4, 8)],
        "hosts": [{"processes": count} | hosts(job, runs, count) for count in (1, 2, 4)],
    }
    print(f"\nThe small job, one lane a device; `loop` is the loop over one jitted run; devices and processes share {runs} runs\n")
    for part, rows in out.items():
        print(f"| {next(iter(rows[0]))} | wall s | compile s | run s | run s per run |{' loop, wall s |' if part == 'runs' else ' same losses |'}")
        print("| ---: " * 6 + "|")
        for row in rows:
            count, number = next(iter(row.items()))[1], row["runs"] if part == "runs" else runs
            last = f"{row['loop']:.1f}" if part == "runs" else "yes" if row["losses"] == rows[0]["losses"] else "no"
            print(f"| {count} | {row['wall']:.1f} | {row['compile']:.1f} | {row['run']:.2f} | {row['run'] / number:.4f} | {last} |")
        print()
    return out


def main() -> None:
    """The tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the steps and an eighth of the runs, to try the script")
    parser.add_argument("--only", choices=["ways", "growth"])
    parser.add_argument("--processes", type=int, default=64, help="how many runs of (c) are measured; the time is scaled to all")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has torch and torchcfm")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child)
    out = {}
    if args.only != "growth":
        out["ways"] = compare(args)
    if args.only != "ways":
        out["growth"] = grow(args)
    if args.out:
        from ergodax.core.files import write_json
        from ergodax.core.run import environment

        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "sweeps.json", out | {"environment": environment()})


if __name__ == "__main__":
    main()
