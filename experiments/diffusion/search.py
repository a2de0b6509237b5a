"""What does a search buy? Time steps and solver schedules against hand-made ones at 4 to 10 network calls, and blocks of the network left out.

    python experiments/diffusion/search.py [--preset smoke|default] [--out DIR] [--nfe 4 6 8 10] …

- schedules: evolution over the time steps (AutoDiffusion) of DDIM and of DPM-Solver++(2M), and over all decisions of a solver schedule (S³), on exact
  mixtures and on a digits model. The cost is the distance to the exact flow map over some starts; what is reported comes from other starts, beside
  every hand-made grid and solver, with what the search cost.
- compute: blocks left out of the network by early exit, by feature inheritance, and by a search over steps and blocks together; against running
  fewer steps for the same number of blocks.

Everything is written to DIR (see `ergodax.core.run`).
"""

import dataclasses
import os
import time
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import lab
import numpy as np
import optax
from lab import digits

from ergodax import diffusion as d
from ergodax.core import Denoiser, DenoiserTerm, Fit
from ergodax.core.check import check_count, check_range
from ergodax.core.config import parse
from ergodax.core.report import Report
from ergodax.core.run import Run


HAND_MADE = {"DDIM": lambda n: d.DDIM(), "DPM-Solver++(2M)": lambda n: d.DPMSolverPP2M(), "UniPC-2": lambda n: d.USF.unipc(n, 2)}
EXITS = {"gentle": (1.0, 1.0, 0.875, 0.875, 0.75, 0.75, 0.625, 0.5, 0.375, 0.25), "steep": (1.0, 0.75, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25)}


@dataclasses.dataclass(frozen=True)
class Config:
    """`experiments/diffusion/search.py`"""

    seed: int = 0
    nfe: tuple[int, ...] = (4, 6, 8, 10)
    targets: tuple[str, ...] = (*lab.MIXTURES, lab.DIGITS)
    times: int = 100  # T of the time-step search
    generations: int = 10
    stages: int = 30  # of S³, 20 evaluations each
    fitting: int = 128  # starts that the search sees
    held_out: int = 1024
    fine_steps: int = 1024  # of the flow map taken for exact
    model_fine_steps: int = 256
    sigma_min: float = 0.02
    sigma_max: float = 80.0
    model: digits.Config = dataclasses.field(default_factory=lambda: digits.Config(network=digits.Network(width=128, depth=8)))
    compute_steps: int = 20  # solver steps of the second part
    tuning_steps: int = 1000  # of training for early exit
    budget: float = 0.5  # share of the blocks that the joint search may use

    def __post_init__(self):
        for name in ("times", "generations", "stages", "fine_steps", "model_fine_steps", "compute_steps", "tuning_steps"):
            check_count(name, getattr(self, name))
        for name in ("fitting", "held_out"):
            check_count(name, getattr(self, name), low=2)
        for nfe in self.nfe:
            check_count("nfe", nfe, low=2)
            check_range("nfe", nfe, high=self.times)
        check_range("budget", self.budget, low=0.0, high=1.0, open_low=True)
        check_range("sigma_min", self.sigma_min, low=0.0, high=self.sigma_max, open_low=True, open_high=True)
        if not self.targets or set(self.targets) - {*lab.MIXTURES, lab.DIGITS}:
            raise ValueError(f"`targets` must be some of {', '.join((*lab.MIXTURES, lab.DIGITS))}, got {', '.join(self.targets) or 'none'}.")


class Bench:
    """A target with starts to search on, others to judge by, and the exact flow map of both."""

    def __init__(self, config: Config, target: lab.Target, fine_steps: int):
        self.config, self.target = config, target
        self.fine = lab.grids(target.path, fine_steps, config.sigma_min, config.sigma_max)[0]
        key_fit, key_held, key_law, self.key = jax.random.split(jax.random.key(config.seed), 4)
        start = self.fine[0]
        self.fit, self.held = (target.starts(key, n, start) for key, n in ((key_fit, config.fitting), (key_held, config.held_out)))
        self.exact_fit, self.exact_held = (eqx.filter_jit(self.sample)(d.DPMSolverPP2M(), self.fine, starts) for starts in (self.fit, self.held))
        self.reference = target.reference(key_law, 4 * config.held_out, self.fine[-1])

    def sample(self, solver, grid, starts, field=None):
        """One solve for each start."""
        return lab.solve(DenoiserTerm(self.target.field if field is None else field, self.target.path, grid), solver, *starts)

    def cost(self, solver, grid):
        """The mean squared distance to the flow map, over the starts to search on."""
        return jnp.mean((self.sample(solver, grid, self.fit) - self.exact_fit) ** 2)

    def judge(self, solver, grid, field=None) -> dict[str, float]:
        """The same in its root, and distances to the law, over the others."""
        samples = eqx.filter_jit(self.sample)(solver, grid, self.held, field)
        error = float(jnp.sqrt(jnp.mean((samples - self.exact_held) ** 2)))
        return {"flow_error": error} | {name: float(value) for name, value in lab.distances(self.key, samples, self.reference).items()}


def search_steps(bench: Bench, make, nfe: int, key):
    """AutoDiffusion's evolution over K of T times. Returns (grid, number of candidates evaluated)."""
    config = bench.config
    space = d.TimestepSpace(config.times, nfe)
    fine = lab.grids(bench.target.path, config.times, config.sigma_min, config.sigma_max)[0]
    search = d.Evolution(space.random, space.mutate, space.crossover, space.valid)
    key_first, key_run = jax.random.split(key)

    @jax.jit
    def run():
        def cost(candidate):
            # The first step is where sampling starts.
            return bench.cost(make(nfe), d.timestep_grid(fine, candidate.steps.at[0].set(0)))

        return d.evolve(key_run, search, cost, search.first(key_first, 50, around=space.uniform()), config.generations)

    memory = run()
    best, _ = search.best(memory)
    return d.timestep_grid(fine, best.steps.at[0].set(0)), int(memory.count)


def search_schedule(bench: Bench, nfe: int, key):
    """S³. Returns (solver, grid, number of candidates evaluated)."""
    config = bench.config
    space = d.SolverSpace(bench.target.path, nfe, bench.fine[0], bench.fine[-1])
    search = d.Evolution(space.random, space.mutate, space.crossover, num_parents=20, num_mutants=60, num_crossovers=20)
    key_first, key_run = jax.random.split(key)

    @jax.jit
    def run():
        first = search.first(key_first, 50, around=space.embed(d.USF.unipc(nfe, 2)))
        return d.s3_search(key_run, search, lambda c: bench.cost(c.solver, space.grid(c)), space.encode, first, config.stages)

    memory = run()
    best, _ = search.best(memory)
    return best.solver, space.grid(best), int(memory.count)


def schedules(config: Config, run: Run, bench: Bench) -> dict[str, np.ndarray]:
    """`nfe/way/measure` for all hand-made and found schedules."""
    out, name = {}, bench.target.name
    ways = len(HAND_MADE) * len(lab.GRIDS) + 3

    def note(key, scores, grid, evaluations=0, seconds=0.0):
        calls = evaluations * nfe * config.fitting
        out.update({f"{key}/{measure}": np.array(value) for measure, value in scores.items()})
        out.update({f"{key}/{n}": np.array(v) for n, v in (("evaluations", evaluations), ("seconds", seconds), ("calls", calls), ("grid", grid))})

    with run.bar(name, len(config.nfe) * ways) as update:
        for i, nfe in enumerate(config.nfe):
            grids = lab.grids(bench.target.path, nfe, config.sigma_min, config.sigma_max)
            for solver, make in HAND_MADE.items():
                for label, grid in zip(lab.GRIDS, grids):
                    note(f"{nfe}/{solver}, {label}", bench.judge(make(nfe), grid), grid)
            key = jax.random.fold_in(bench.key, nfe)
            update((i + 1) * ways - 3, f"NFE {nfe}, hand-made")
            for j, solver in enumerate(("DDIM", "DPM-Solver++(2M)")):
                started = time.perf_counter()
                grid, count = search_steps(bench, HAND_MADE[solver], nfe, key)
                note(f"{nfe}/{solver}, searched steps", bench.judge(HAND_MADE[solver](nfe), grid), grid, count, time.perf_counter() - started)
                update((i + 1) * ways - 2 + j, f"NFE {nfe}, {solver}, searched steps")
            started = time.perf_counter()
            solver, grid, count = search_schedule(bench, nfe, key)
            note(f"{nfe}/S³", bench.judge(solver, grid), grid, count, time.perf_counter() - started)
            update((i + 1) * ways, f"NFE {nfe}, S³")
    return out


# Compute


class Trunk(eqx.Module):
    """What a `TimeMLP` does before its blocks."""

    network: eqx.Module

    def __call__(self, t, x, args):
        return self.network.inner(x.reshape(-1)), self.network.conditioning(t, args)


class Head(eqx.Module):
    """What it does after them."""

    network: eqx.Module

    def __call__(self, t, x, h, c):
        last = eqx.tree_at(lambda n: n.blocks, self.network, jax.tree.map(lambda leaf: leaf[:0], self.network.blocks))
        shift, scale = jnp.split(last.modulation(c), 2)
        return last.outer((1 + scale) * jax.nn.silu(h) + shift).reshape(x.shape)


def compute(config: Config, run: Run, bench: Bench, model) -> dict[str, np.ndarray]:
    """`way/share|flow_error|sliced_wasserstein`: the share of the plain sampler's block evaluations, and what it leads to."""
    path, prediction = digits.PATHS[config.model.path]
    depth, n, out = config.model.network.depth, config.compute_steps, {}
    split = digits.DATA[config.model.data]()

    def grid_of(steps):
        return lab.grids(path, steps, config.sigma_min, config.sigma_max)[1]

    def note(name, share, solver, grid, network=model, **extra):
        field = Denoiser(network, path, prediction)
        scores = bench.judge(solver, grid, field) | extra | {"share": share}
        out.update({f"{name}/{measure}": np.array(value) for measure, value in scores.items()})

    solver = d.DPMSolverPP2M()
    for steps in sorted({max(2, round(n * share)) for share in (0.25, 0.5, 0.625, 0.75, 1.0)}):
        note(f"plain, {steps} steps", steps / n, solver, grid_of(steps))

    # Early exit: tuned with the loss that the network was trained with, and the full network tuned for as long.
    tuned = {"full": (1.0,) * 10} | EXITS
    for name, shares in tuned.items():
        network = d.EarlyExit(model, tuple(max(1, round(share * depth)) for share in shares))
        times = grid_of(n)[:-1]
        share = float(jnp.mean(jax.vmap(network.num_blocks_at)(times))) / depth
        note(f"early exit, {name}, not tuned", share, solver, grid_of(n), network)
        optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(3e-4, config.tuning_steps), weight_decay=0.0))
        options = {"batch_size": config.model.train.batch_size, "ema_decay": 0.995, "every": config.tuning_steps}
        fit = Fit(digits.make_loss(config.model), network, optimiser, (split.train_x, split.train_y), **options)
        note(f"early exit, {name}", share, solver, grid_of(n), eqx.filter_jit(fit.run)(jax.random.key(config.seed), config.tuning_steps).average)

    # Feature inheritance: the inner blocks are inherited, the first and the last are always run.
    inherited = (np.arange(depth) > 0) & (np.arange(depth) < depth - 1)
    network = d.BlockStack(Trunk(model), model.blocks, Head(model), inherited)
    modes = {f"every {m}": d.key_steps(n, m) for m in (1, 2, 3, 4)} | {"every 3, dense end": d.key_steps(n, 3, 0, n // 4)}
    for label, keys in modes.items():
        share = 1 - float(inherited.mean()) * (1 - float(np.mean(keys)))
        note(f"inheritance, {label}", share, d.FeatureInheritance(solver, network, keys), grid_of(n), network)

    # Steps and blocks together.
    steps = n // 2
    started, fine = time.perf_counter(), grid_of(config.times)
    budget = round(config.budget * steps * depth)
    space = d.TimestepSpace(config.times, steps, depth, budget)
    search = d.Evolution(space.random, space.mutate, space.crossover, space.valid)
    key_first, key_run = jax.random.split(bench.key)

    def skipping(candidate):
        grid = d.timestep_grid(fine, candidate.steps.at[0].set(0))
        return Denoiser(d.SkippingNetwork(model, grid, candidate.keep), path, prediction), grid

    @jax.jit
    def evolve():
        def cost(candidate):
            field, grid = skipping(candidate)
            return jnp.mean((bench.sample(solver, grid, bench.fit, field) - bench.exact_fit) ** 2)

        return d.evolve(key_run, search, cost, search.first(key_first, 50, around=space.uniform()), config.generations)

    memory = evolve()
    best, _ = search.best(memory)
    for name, candidate in (("searched steps and blocks", best), ("evenly spread blocks", space.uniform())):
        field, grid = skipping(candidate)
        scores = bench.judge(solver, grid, field) | {"share": float(candidate.keep.mean()) * steps / n}
        out |= {f"{name}/{measure}": np.array(value) for measure, value in scores.items()}
    out["searched steps and blocks/seconds"] = np.array(time.perf_counter() - started)
    return out


# What came of it


SEARCHED = ("DDIM, searched steps", "DPM-Solver++(2M), searched steps", "S³")


def schedule_rows(config: Config, target: str, scores: dict) -> list[dict]:
    """A row for each NFE and way, the hand-made ones by their best."""
    rows = []
    for nfe in config.nfe:
        ways = {key.split("/")[1] for key in scores if key.startswith(f"{nfe}/")}
        hand = sorted((float(scores[f"{nfe}/{way}/flow_error"]), way) for way in ways - set(SEARCHED))
        best = next((error, way) for error, way in hand if np.isfinite(error))
        for way in (best[1], *SEARCHED):
            values = {measure: float(scores[f"{nfe}/{way}/{measure}"]) for measure in ("flow_error", "sliced_wasserstein", "energy_distance")}
            cost = {name: int(scores[f"{nfe}/{way}/{name}"]) for name in ("evaluations", "calls")}
            shown = {"target": target, "nfe": nfe, "schedule": way, "hand-made": way not in SEARCHED}
            rows.append(
                shown
                | values
                | {"error / best hand-made": values["flow_error"] / best[0]}
                | cost
                | {"seconds": float(scores[f"{nfe}/{way}/seconds"])}
            )
    return rows


def compute_rows(scores: dict) -> list[dict]:
    """A row for each way to leave blocks out."""
    names = dict.fromkeys(key.rsplit("/", 1)[0] for key in scores if key.endswith("/share"))
    measures = ("share", "flow_error", "sliced_wasserstein", "energy_distance")
    return [{"way": name} | {measure: float(scores[f"{name}/{measure}"]) for measure in measures} for name in names]


def draw_schedules(config: Config, rows: list[dict]):
    """Error against network calls, a panel for each target."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    figure, panels = lab.axes(1, len(targets), width=3.8, height=3.2)
    for axis, target in zip(panels, targets):
        here = [row for row in rows if row["target"] == target]
        for way in ("best hand-made", *SEARCHED):
            line = [row for row in here if (row["hand-made"] if way == "best hand-made" else row["schedule"] == way)]
            style = {"color": "black", "ls": "--"} if way == "best hand-made" else {}
            axis.plot([row["nfe"] for row in line], [row["flow_error"] for row in line], marker="o", ms=4, label=way, **style)
        axis.set(yscale="log", xlabel="network calls", title=target)
        axis.set_xticks(config.nfe)
    panels[0].set_ylabel("RMS distance from the flow map, other starts")
    panels[0].legend(frameon=False, fontsize=7)
    return figure


def draw_grids(config: Config, scores: dict[str, dict], path, nfe: int):
    """Where the nodes lie, in log(σ/α), hand-made above, found below."""
    figure, panels = lab.axes(1, len(scores), width=3.8, height=2.4)
    for axis, (target, values) in zip(panels, scores.items()):
        ways = [f"DDIM, {grid}" for grid in lab.GRIDS] + list(SEARCHED)
        for i, way in enumerate(ways):
            nodes = -0.5 * path.log_snr(jnp.asarray(values[f"{nfe}/{way}/grid"]))
            axis.plot(nodes, np.full(len(nodes), i), "o-", ms=4, lw=0.6, color="0.5" if i < len(lab.GRIDS) else f"C{i - len(lab.GRIDS)}")
        axis.set_yticks(range(len(ways)), [*lab.GRIDS, *SEARCHED], fontsize=7)
        axis.invert_yaxis()
        axis.invert_xaxis()
        axis.set(xlabel="log(σ/α)", title=f"{target}, {nfe} calls")
    return figure


def draw_compute(rows: list[dict]):
    """Error and distance to real digits against the share of block evaluations."""
    figure, panels = lab.axes(1, 2)
    kinds = {"plain": ("black", "-"), "early exit": ("C0", ""), "inheritance": ("C1", "-"), "searched": ("C2", ""), "evenly": ("C3", "")}
    for axis, measure in zip(panels, ("flow_error", "sliced_wasserstein")):
        for kind, (colour, line) in kinds.items():
            here = sorted((row for row in rows if row["way"].startswith(kind)), key=lambda row: row["share"])
            here = [row for row in here if "not tuned" not in row["way"]]
            axis.plot([row["share"] for row in here], [row[measure] for row in here], marker="o", ms=4, ls=line or "none", color=colour, label=kind)
            for row in here:
                axis.annotate(row["way"].split(", ")[-1], (row["share"], row[measure]), fontsize=6, xytext=(3, 3), textcoords="offset points")
        axis.set(xlabel="share of block evaluations", yscale="log", title=measure.replace("_", " "))
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    config, folder = parse(Config, lab.ROOT / "configs" / "diffusion" / "search", argv, out=lab.ROOT / "runs" / "diffusion_search")
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    with Run(folder, config) as run:
        scores = {}
        model_target = lab.digits_target(run, config.model)
        for name in config.targets:
            target, steps = (model_target, config.model_fine_steps) if name == lab.DIGITS else (lab.mixture_target(name), config.fine_steps)
            bench = partial(Bench, config, target, steps)
            scores[name] = run.stage(f"schedules {name}", lambda bench=bench: schedules(config, run, bench()))
        bench = partial(Bench, config, model_target, config.model_fine_steps)
        saved = run.stage("compute", lambda: compute(config, run, bench(), model_target.field.network))
        report(config, run, scores, saved, model_target)


def report(config: Config, run: Run, scores: dict[str, dict], saved: dict, model_target: lab.Target) -> None:
    """Tables, figures and the page."""
    rows = [row for target, values in scores.items() for row in schedule_rows(config, target, values)]
    savings = compute_rows(saved)
    everything = {f"{target}/{key}": value for target, values in scores.items() for key, value in values.items() if not key.endswith("/grid")}
    run.results({"schedules": rows, "compute": savings, "all": everything})
    lead = f"Costs are distances to the exact flow map over {config.fitting} starts; the tables come from {config.held_out} others."
    page = Report("Search", lead)
    page.heading("Found schedules against the best of the hand-made ones")
    page.figure(
        run.figure("schedules", draw_schedules(config, rows), {"rows": rows}), "The best of nine hand-made ones: three solvers on three grids."
    )
    page.table(rows)
    page.text("calls: what the search cost, in network calls on one example.")
    shown = min(config.nfe, key=lambda nfe: abs(nfe - 6))
    page.figure(
        run.figure("grids", draw_grids(config, scores, model_target.path, shown), {"nfe": shown} | scores), "Noise to data from left to right."
    )
    page.heading("Blocks left out of the digits model")
    page.figure(
        run.figure("compute", draw_compute(savings), {"rows": savings}), "Left and below is better. Early exits are fine-tuned, all else is not."
    )
    page.table(savings)
    page.write(run.folder / "report.html")
    for row in rows:
        if not row["hand-made"]:
            shown = f"{row['target']}, NFE {row['nfe']}: {row['schedule']} has {row['error / best hand-made']:.2f} of the best hand-made error"
            run.console.print(f"{shown} ({row['evaluations']} evaluations)", highlight=False)
    run.console.print(f"report: {run.folder / 'report.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
