"""Does early stopping find the best run of a sweep, and for how much less training? Digits diffusion, learning rate × warm-up × seed.

    python experiments/early_stopping.py [--preset smoke|default] [--out DIR] [--eta N --lanes N --training.train.batch-size N …]

The whole sweep is trained to the end; then successive halving, ASHA and population-based training get the same runs. A run is the training of
`experiments/digits.py`, only shorter. Everything is written to DIR (see `ergodax.core.run`).
"""

import dataclasses
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import digits
from ergodax.core import space
from ergodax.core.check import check_count
from ergodax.core.config import parse
from ergodax.core.population import Trial, fit_trial
from ergodax.core.replay import replay
from ergodax.core.report import Report
from ergodax.core.run import Run
from ergodax.core.search import SearchResult, search
from ergodax.core.sweep import sweep
from ergodax.tuning.asynchronous_halving import AsynchronousHalving
from ergodax.tuning.population_based_training import Perturb, PopulationBasedTraining
from ergodax.tuning.successive_halving import SuccessiveHalving


ROOT = Path(__file__).resolve().parent.parent
RATE, WARMUP = "train.learning_rate", "train.warmup"


@dataclasses.dataclass(frozen=True)
class Config:
    """`experiments/early_stopping.py`"""

    seed: int = 0
    training: digits.Config = dataclasses.field(default_factory=digits.Config)
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    warmups: tuple[float, ...] = (0.02, 0.2)  # shares of the steps
    seeds: int = 2
    pieces: int = 9  # of `training.train.log_every` steps each
    eta: int = 3
    lanes: int = 8  # of ASHA
    orders: int = 1000  # random orders of ASHA's queue to replay
    batch_size: int = 1  # runs vmapped together on a device

    def __post_init__(self):
        for name in ("seeds", "pieces", "lanes", "orders", "batch_size"):
            check_count(name, getattr(self, name))
        check_count("eta", self.eta, low=2)

    @property
    def steps(self) -> int:
        """Of a whole run."""
        return self.pieces * self.training.train.log_every


def runs_of(config: Config) -> space.Space:
    """All runs, in a random order: ASHA's queue should not go from small learning rates to large ones."""
    axes = {RATE: config.learning_rates, WARMUP: config.warmups, "seed": range(config.seeds)}
    runs = space.grid(axes)
    return [runs[i] for i in np.random.default_rng(config.seed).permutation(len(runs))]


def make_trial(config: Config, split):
    """`make(config of digits) -> Trial`. The test loss has the same noise for every seed, so that runs compare."""

    def make(settings: digits.Config) -> Trial:
        fitting = digits.make_fit(settings, split, config.steps)
        evaluate = fitting.evaluate
        fitting = dataclasses.replace(fitting, evaluate=lambda model, key: evaluate(model, jax.random.key(config.seed)))
        return fit_trial(fitting, jax.random.key(settings.seed))

    return make


# Stages: dicts of arrays


def train_all(config: Config, run: Run, split) -> dict[str, np.ndarray]:
    """The reference: every run to its end."""
    make, runs = make_trial(config, split), runs_of(config)

    def train(settings):
        trial = make(settings)
        return {"curve": trial.advance(trial.init(), config.steps)[1]["test_loss"]}

    with run.bar("sweep", len(runs)) as update:
        started = time.perf_counter()
        result = sweep(train, config.training, runs, batch_size=config.batch_size, progress=lambda done, total: update(done))
        seconds = time.perf_counter() - started
    compiling = sum(group.compile_seconds for group in result.groups)
    curves = np.stack([output["curve"] for output in result.outputs])
    return {"curves": curves, "seconds": seconds, "compile_seconds": compiling, "compiles": result.num_compiles}


def search_with(name: str, rule, runs: space.Space, config: Config, run: Run, split) -> dict[str, np.ndarray]:
    """One rule on these runs."""
    with run.bar(name, len(runs)) as update:
        started = time.perf_counter()
        options = {"metric": "test_loss", "piece_steps": config.training.train.log_every, "batch_size": config.batch_size}
        progress = {"progress": lambda done, total: update(done)}
        key = jax.random.key(config.seed)
        found: SearchResult = search(make_trial(config, split), config.training, runs, rule, key=key, **options, **progress)
        seconds = time.perf_counter() - started
    table = found.table()
    return {
        **{f"history/{column}": found.history[column] for column in ("run", "age", "score", "piece", RATE)},
        **{column: table[column] for column in ("pieces", "score")},
        "best": found.best(),
        "best_rate": found.best_values()[RATE],
        "steps": found.steps_used,
        "compiles": found.num_compiles,
        "seconds": seconds,
        "compile_seconds": sum(bracket.compile_seconds for bracket in found.brackets),
    }


def replay_all(config: Config, curves: np.ndarray) -> dict[str, np.ndarray]:
    """The rules on the sweep's curves: halving for several η, ASHA for several η in many orders of its queue."""
    rank = np.argsort(np.argsort(np.where(np.isnan(curves[:, -1]), np.inf, curves[:, -1])))
    keys = jax.random.split(jax.random.key(config.seed), config.orders)
    orders = jax.vmap(lambda key: jax.random.permutation(key, len(curves)))(keys)
    out = {}
    for eta in (2, 3, 4):
        halving = jax.jit(lambda costs, eta=eta: replay(SuccessiveHalving(config.pieces, eta), costs))(jnp.asarray(curves))
        out[f"halving/{eta}"] = np.array([[rank[int(halving.best)], int(halving.pieces.sum()), int(halving.num_pieces)]])
        rule = AsynchronousHalving(config.lanes, config.pieces, eta)
        ended = jax.jit(jax.vmap(lambda order, rule=rule: replay(rule, jnp.asarray(curves)[order])))(orders)
        best = np.asarray(orders)[np.arange(config.orders), np.asarray(ended.best)]
        out[f"asha/{eta}"] = np.stack([rank[best], np.asarray(ended.pieces).sum(1), np.asarray(ended.num_pieces)], axis=1)
    return out


# Results


def summary(config: Config, runs, full, found: dict[str, dict]) -> list[dict]:
    """A row for each method."""
    final = np.where(np.isnan(full["curves"][:, -1]), np.inf, full["curves"][:, -1])
    best, total = int(np.argmin(final)), final.size * config.steps
    first = {
        **{"method": "full sweep", "run": best, "learning_rate": runs[best][RATE], "test_loss": float(final[best]), "rank": 1},
        **{"steps": total, "share_of_steps": 1.0, "seconds": float(full["seconds"]), "compile_seconds": float(full["compile_seconds"])},
        "compiles": int(full["compiles"]),
    }
    rows = [first]
    for name, result in found.items():
        place = int(result["places"][result["best"]])
        score = float(result["score"][result["best"]])
        rows.append(
            {
                **{
                    "method": name,
                    "run": place,
                    "learning_rate": float(f"{result['best_rate']:.4g}"),
                    "test_loss": score,
                    "rank": 1 + int((final < score).sum()),
                },
                **{"steps": int(result["steps"]), "share_of_steps": int(result["steps"]) / total, "seconds": float(result["seconds"])},
                **{"compile_seconds": float(result["compile_seconds"]), "compiles": int(result["compiles"])},
            }
        )
        if name != "PBT":  # whose own runs change; the others only stop early
            rows[-1]["rank"] = 1 + int((final < final[place]).sum())
    return rows


def replay_table(config: Config, num_runs: int, replayed: dict[str, np.ndarray]) -> list[dict]:
    """Means over the orders of the queue."""
    rows = []
    for name, outcomes in replayed.items():
        kind, eta = name.split("/")
        rank, pieces, length = outcomes.T
        rows.append(
            {
                **{"rule": {"halving": "successive halving", "asha": "ASHA"}[kind], "eta": int(eta), "orders": len(outcomes)},
                **{"finds_best": float((rank == 0).mean()), "finds_top_3": float((rank < 3).mean()), "worst_rank": 1 + int(rank.max())},
                **{"share_of_steps": float(pieces.mean() / (num_runs * config.pieces)), "pieces_in_turn": float(length.mean())},
            }
        )
    return rows


def draw(config: Config, full, found: dict[str, dict], runs):
    """All lanes' curves: dots where a run was stopped, the best in black."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    figure, axes = plt.subplots(1, 1 + len(found), figsize=(3.6 * (1 + len(found)), 3.4), layout="constrained", sharey=True)
    colours, norm = plt.get_cmap("viridis"), LogNorm(min(config.learning_rates), max(config.learning_rates))
    step = np.arange(1, config.pieces + 1) * config.training.train.log_every
    every = {place: (full["curves"][place], run[RATE]) for place, run in enumerate(runs)}
    panels = {"full sweep": (every, int(np.nanargmin(full["curves"][:, -1])))}
    for name, result in found.items():
        lanes = {}
        for place in np.unique(result["history/run"]):
            rows = result["history/run"] == place
            lanes[int(place)] = (result["history/score"][rows], result[f"history/{RATE}"][rows][-1])
        panels[name] = (lanes, int(result["best"]))
    for axis, (name, (lanes, best)) in zip(axes, panels.items()):
        for place, (curve, rate) in lanes.items():
            x = step[: len(curve)]
            axis.plot(x, curve, color="black" if place == best else colours(norm(rate)), lw=1.8 if place == best else 0.8, zorder=2 + (place == best))
            if len(curve) < config.pieces:
                axis.plot(x[-1], curve[-1], "o", ms=3, color=colours(norm(rate)))
        axis.set(title=name, xlabel="step", yscale="log", xlim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test loss")
    figure.colorbar(plt.cm.ScalarMappable(norm, colours), ax=axes, label="learning rate (PBT: the last)", fraction=0.02)
    return figure


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    config, folder = parse(Config, ROOT / "configs" / "early_stopping", argv, out=ROOT / "runs" / "early_stopping")
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    compare(config, folder)


def compare(config: Config, folder: Path) -> None:
    """The whole sweep, the three rules, and what came of them."""
    with Run(folder, config) as run:
        split = digits.DATA[config.training.data]()
        runs = runs_of(config)
        # PBT trains all its lanes to the end, so it gets the runs of one seed and one warm-up: its steps are then comparable.
        members = [place for place, values in enumerate(runs) if values["seed"] == 0 and values[WARMUP] == config.warmups[0]]
        rules = {
            "successive halving": (SuccessiveHalving(config.pieces, config.eta), range(len(runs))),
            "ASHA": (AsynchronousHalving(config.lanes, config.pieces, config.eta), range(len(runs))),
            "PBT": (PopulationBasedTraining(config.pieces, Perturb({RATE: (1e-5, 1e-1)}), 0.25), members),
        }
        full = run.stage("full", lambda: train_all(config, run, split))
        found = {}
        for name, (rule, places) in rules.items():
            chosen = [runs[place] for place in places]
            stage = name.lower().replace(" ", "_")
            result = run.stage(stage, lambda name=name, rule=rule, chosen=chosen: search_with(name, rule, chosen, config, run, split))
            found[name] = result | {"places": np.array(places)}
        replayed = run.stage("replay", lambda: replay_all(config, full["curves"]))
        report(config, run, runs, full, found, replayed)


def report(config, run, runs, full, found, replayed) -> None:
    """Results, the figure and the page."""
    rows, replays = summary(config, runs, full, found), replay_table(config, len(runs), replayed)
    # The lanes of a population are the runs of the sweep: the same numbers but for float32's last digits.
    gap = max(
        np.nanmax(np.abs(result["history/score"] / full["curves"][result["history/run"], result["history/age"] - 1] - 1))
        for name, result in found.items()
        if name != "PBT"
    )
    metrics = {"methods": rows, "replay": replays, "largest_relative_gap_to_the_sweep": float(gap), "runs": runs, "final": full["curves"][:, -1]}
    run.results(metrics)
    curves = {name: {column: result[f"history/{column}"] for column in ("run", "age", "score")} for name, result in found.items()}
    path = run.figure("curves", draw(config, full, found, runs), {"full": full["curves"], **curves})

    page = Report(
        "Early stopping on the digits sweep", f"{len(runs)} runs of {config.steps} steps; a rule is asked every {config.training.train.log_every}."
    )
    page.heading("Which run each method picks, and what that costs")
    page.table(rows)
    page.text("rank: the place of the picked run among all runs trained to the end; for PBT, the place that its final loss would have.")
    page.figure(path, "A dot is a stop, black the run that is picked. Colour: learning rate.")
    page.heading(f"The same rules on the sweep's curves, ASHA in {config.orders} random orders of its queue")
    page.table(replays)
    page.write(run.folder / "report.html")
    for row in rows:
        shown = f"{row['method']:20s} test loss {row['test_loss']:.4f}, rank {row['rank']}, {row['share_of_steps']:.0%} of the steps"
        run.console.print(f"{shown}, {row['seconds']:.0f} s ({row['compile_seconds']:.0f} s compiling)", highlight=False)
    run.console.print(f"report: {run.folder / 'report.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
