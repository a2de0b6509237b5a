"""Loss curves of real language models from their schedules: laws fitted on three short runs, judged on six others.

    python experiments/schedules/loss_curves.py --data DIR/llm_loss_curves [--preset smoke|default] [--out DIR] [--sizes 25 100]

The runs are those of Luo et al. 2025 (arXiv:2503.12811): two Llama-type models, schedules constant, cosine, WSD with exponential and linear decay,
and in two stages. A file is named by size and schedule, SIZEM_KIND_NUMBERS.csv with columns step, lr and loss; the name gives the rates of all steps,
which are checked against those of the file. Compared are

- the annealing law, at its minimum;
- the multi-power law: by the authors' recipe (stopped early), at the minimum of the same objective, and under the prior that leaving each training
  curve out in turn chooses; each with its sum from after the warm-up on and over the warm-up too, as in the authors' code.

Judged by R², mean absolute, root mean squared and worst error on every test curve, and seconds from curves to law, compiling included (the
authors' code takes 80 to 310). Then bands, from refits under random weights of blocks of points, and the schedule that is best under the
regularised law, beside usual ones of its length. Everything is written to DIR (see `ergodax.core.run`).
"""

import dataclasses
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ergodax.core.check import check_count, check_range
from ergodax.core.config import UsageError, parse, quit_with
from ergodax.core.report import Report
from ergodax.core.run import Run
from ergodax.laws import (
    ShapePrior,
    bands,
    bootstrap,
    cross_validated_fit,
    early_stopped_fit,
    fit_annealing_law,
    fit_multi_power_law,
    histories_of,
    loss_curve,
    losses_of,
    optimise_rates,
    rate_history,
    rough_law,
)


sys.path.append(str(Path(__file__).resolve().parent.parent))

from common import ROOT, axes


PUBLISHED = {25: (0.9988, 0.00376), 100: (0.9983, 0.00435)}
BEST = "multi-power, cross-validated prior"


@dataclasses.dataclass(frozen=True)
class Config:
    """`experiments/schedules/loss_curves.py`"""

    data: str = ""  # the folder of the curves; default llm_loss_curves in $ERGODAX_DATA
    seed: int = 0
    sizes: tuple[int, ...] = (25, 100)  # millions of parameters
    ramp: tuple[bool, ...] = (False, True)  # whether the multi-power law counts the ramp
    train: tuple[str, ...] = ("cosine_24000", "constant_24000", "wsdcon_9")
    test: tuple[str, ...] = ("constant_72000", "cosine_72000", "wsd_20000_24000", "wsdld_20000_24000", "wsdcon_3", "wsdcon_18")
    peak: float = 3e-4
    end_value: float = 3e-5
    warmup: int = 2160
    stage_step: int = 8000  # where the second stage of wsdcon begins
    block: int = 64  # steps that may share a value in the sums
    max_steps: int = 300
    bootstrap: int = 100
    bootstrap_block: int = 16  # points whose weight is drawn together
    horizon: int = 24000  # of the optimised schedule
    shape_steps: int = 200  # of its search

    def __post_init__(self):
        for name in ("warmup", "stage_step", "block", "max_steps", "bootstrap_block", "shape_steps"):
            check_count(name, getattr(self, name))
        check_count("bootstrap", self.bootstrap, low=2)
        check_count("horizon", self.horizon, low=self.warmup + 2)
        check_range("end_value", self.end_value, low=0.0, high=self.peak, open_low=True)
        if len(self.train) < 3:
            raise ValueError(f"`train` must name at least three curves, for each to be left out in turn, got {', '.join(self.train) or 'none'}.")
        for name in (*self.train, *self.test):
            schedule(self, name)

    def file(self, size: int, name: str) -> Path:
        """Of one curve."""
        folder = Path(self.data) if self.data else Path(os.environ.get("ERGODAX_DATA", "")) / "llm_loss_curves"
        return folder / f"{size}M_{name}.csv"


def schedule(config: Config, name: str, length: int | None = None) -> np.ndarray:
    """The rates of all steps that a name stands for; `length` where the name does not say."""
    kind, *words = name.split("_")
    if not words or not all(word.isdigit() for word in words) or kind not in ("constant", "cosine", "wsd", "wsdld", "wsdcon"):
        raise ValueError(f"curves are called constant_T, cosine_T, wsd_S_T, wsdld_S_T or wsdcon_K, got {name}.")
    numbers = [int(word) for word in words]
    total = (length or 2 * config.stage_step) if kind == "wsdcon" else numbers[-1]
    k = np.arange(total)
    u = np.clip((k - numbers[0]) / max(total - numbers[0], 1), 0, 1)
    v = np.clip((k - config.warmup) / (total - config.warmup), 0, 1)
    rates = {
        "constant": lambda: np.full(total, config.peak),
        "cosine": lambda: config.end_value + (config.peak - config.end_value) * (1 + np.cos(np.pi * v)) / 2,
        "wsd": lambda: config.peak * (config.end_value / config.peak) ** u,
        "wsdld": lambda: config.peak + (config.end_value - config.peak) * u,
        "wsdcon": lambda: np.where(k < config.stage_step, config.peak, numbers[0] * 1e-5),
    }[kind]()
    rates[: config.warmup] = np.linspace(0, config.peak, config.warmup)
    return rates


def find(config: Config) -> None:
    """All files are there."""
    for size in config.sizes:
        for name in (*config.train, *config.test):
            if not config.file(size, name).is_file():
                where = "give the folder llm_loss_curves by --data, or the one that holds it in the environment variable ERGODAX_DATA."
                raise UsageError(f"no data at {config.file(size, name)}: {where}")


def read(config: Config, size: int, name: str, *, warmup: int):
    """One curve, its sums from step `warmup` on."""
    table = np.genfromtxt(config.file(size, name), delimiter=",", names=True)
    steps = table["step"].astype(int)
    rates = schedule(config, name, steps[-1] + 1)
    if not np.allclose(rates[steps], table["lr"], rtol=1e-6):
        raise ValueError(f"{config.file(size, name)} has other rates than its name says: check `peak`, `end_value`, `warmup` and `stage_step`.")
    return loss_curve(steps, table["loss"], rates, warmup=warmup, block=config.block)


def methods(config: Config):
    """Name -> (whether the ramp is counted, curves -> law)."""
    out = {"annealing, minimum": (False, lambda curves: fit_annealing_law(curves, max_steps=config.max_steps).law)}
    recipes = {
        "multi-power, authors' recipe": lambda curves: early_stopped_fit(curves)[0],
        "multi-power, minimum": lambda curves: fit_multi_power_law(curves, max_steps=config.max_steps).law,
        "multi-power, cross-validated prior": lambda curves: cross_validated_fit(curves).fit.law,
    }
    for counted in config.ramp:
        out |= {f"{name}{', ramp counted' if counted else ''}": (counted, recipe) for name, recipe in recipes.items()}
    return out


def judge(config: Config, size: int, law, warmup: int) -> dict[str, np.ndarray]:
    """Scores on every test curve, and parameters."""
    out = {"R2": [], "MAE": [], "RMSE": [], "worst": []}
    for name in config.test:
        curve = read(config, size, name, warmup=warmup)
        losses = np.asarray(curve.losses)
        errors = np.asarray(law([curve.history])) - losses
        out["R2"].append(1 - np.mean(errors**2) / np.var(losses))
        out["MAE"].append(np.mean(np.abs(errors)))
        out["RMSE"].append(np.sqrt(np.mean(errors**2)))
        out["worst"].append(np.max(np.abs(errors)))
    return {key: np.array(values) for key, values in out.items()} | {"parameters": np.array(jax.tree.leaves(law))}


def fit_one(config: Config, size: int, name: str) -> dict[str, np.ndarray]:
    """One method on one model."""
    counted, recipe = methods(config)[name]
    warmup = 0 if counted else config.warmup
    started = time.perf_counter()
    law = jax.block_until_ready(recipe([read(config, size, curve, warmup=warmup) for curve in config.train]))
    seconds = time.perf_counter() - started
    return judge(config, size, law, warmup) | {"seconds": np.array(seconds)}


def trust(config: Config, size: int) -> dict[str, np.ndarray]:
    """Of the cross-validated fit: the errors that chose its prior, bands of predictions, and the best schedule under it."""
    curves = [read(config, size, name, warmup=config.warmup) for name in config.train]
    found = cross_validated_fit(curves)
    histories, losses = histories_of(curves), losses_of(curves)
    prior = ShapePrior(found.strength, rough_law(curves).drop)
    blocks = jnp.arange(losses.size) // config.bootstrap_block
    laws = bootstrap(jax.random.key(config.seed), found.fit, histories, losses, samples=config.bootstrap, blocks=blocks, prior=prior, max_steps=50)
    out = {"strength": found.strength, "strengths": found.strengths, "errors": found.errors, "standard_errors": found.fit.standard_errors()}
    out["standard_errors"] = np.array(jax.tree.leaves(out["standard_errors"]))
    for name in config.test:
        curve = read(config, size, name, warmup=config.warmup)
        low, high = bands(laws, lambda law, curve=curve: law([curve.history]))
        out[name] = np.stack([np.asarray(curve.history.at), curve.losses, found.fit.law([curve.history]), low, high])
    ramp = np.linspace(0, config.peak, config.warmup)
    started = time.perf_counter()
    options = {"ramp": ramp, "max_steps": config.shape_steps}
    rates, _ = jax.block_until_ready(optimise_rates(found.fit.law, config.horizon, config.peak, **options))
    out |= {"rates": rates, "seconds": np.array(time.perf_counter() - started)}
    planned = {"optimised": rates} | {name: jnp.asarray(values) for name, values in usual(config).items()}
    at = np.array([config.horizon - 1])

    def final(law, values):
        return law([rate_history(values, at, warmup=config.warmup)])[0]

    for name, values in planned.items():
        low, high = bands(laws, lambda law, values=values: final(law, jnp.asarray(values)))
        out[f"final {name}"] = np.array([final(found.fit.law, values), low, high])
    gain = [bands(laws, lambda law, name=name: final(law, planned[name]) - final(law, rates)) for name in usual(config)]
    out["gain"] = np.array(gain)
    return {key: np.asarray(value) for key, value in out.items()}


def usual(config: Config) -> dict[str, np.ndarray]:
    """Schedules of the same length."""
    total = config.horizon
    start = config.warmup + int(0.82 * (total - config.warmup))
    names = {"cosine": f"cosine_{total}", "WSD, exponential": f"wsd_{start}_{total}", "WSD, linear": f"wsdld_{start}_{total}"}
    out = {label: schedule(config, name) for label, name in names.items()}
    to_zero = dataclasses.replace(config, end_value=1e-3 * config.peak)
    return out | {"WSD, linear to 0": schedule(to_zero, f"wsdld_{start}_{total}"), "constant": schedule(config, f"constant_{total}")}


# What came of it


def rows_of(config: Config, size: int, results: dict) -> list[dict]:
    """A row for each method: means over test curves, the worst error of all."""
    rows = []
    for name, scores in results.items():
        row = {"size": f"{size}M", "law": name, "R²": float(scores["R2"].mean()), "MAE": float(scores["MAE"].mean())}
        rows.append(row | {"RMSE": float(scores["RMSE"].mean()), "worst": float(scores["worst"].max()), "seconds": float(scores["seconds"])})
    if size in PUBLISHED:
        r2, mae = PUBLISHED[size]
        rows.append({"size": f"{size}M", "law": "multi-power, published", "R²": r2, "MAE": mae})
    return rows


def schedules_of(config: Config, size: int, result: dict) -> list[dict]:
    """A row for each schedule: the loss that the law foresees for it, with its band, and what the best one gains on it."""
    rows = []
    for name in ("optimised", *usual(config)):
        loss, low, high = (float(x) for x in result[f"final {name}"])
        rows.append({"size": f"{size}M", "schedule": name, "final loss": loss, "low": low, "high": high})
    for row, (low, high) in zip(rows[1:], result["gain"]):
        row |= {"gain, low": float(low), "gain, high": float(high)}
    return rows


def draw_predictions(config: Config, trusted: dict[int, dict]):
    """Test curves and what was foreseen."""
    figure, panels = axes(len(trusted), len(config.test), width=3.2, height=2.8)
    for axis, (size, name) in zip(panels, ((size, name) for size in trusted for name in config.test)):
        steps, losses, foreseen, low, high = trusted[size][name]
        axis.plot(steps, losses, color="0.6", lw=2, label="run")
        axis.plot(steps, foreseen, color="C3", lw=1, label="foreseen")
        axis.fill_between(steps, low, high, color="C3", alpha=0.3, lw=0)
        axis.set_title(f"{size}M: {name}", fontsize=9)
        axis.set_xlabel("step")
        axis.set_ylim(losses.min() - 0.05, np.quantile(losses, 0.9) + 0.05)
    panels[0].legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("loss")
    return figure


def draw_validation(trusted: dict[int, dict]):
    """Errors on training curves that were left out."""
    figure, panels = axes(1, 1)
    for colour, (size, result) in zip(("C0", "C3", "C2"), trusted.items()):
        panels[0].loglog(result["strengths"], result["errors"].mean(1), "o-", ms=3, color=colour, label=f"{size}M")
        panels[0].axvline(result["strength"], color=colour, ls=":", lw=1)
    panels[0].set_xlabel("strength of the prior")
    panels[0].set_ylabel("mean error on the curve left out")
    panels[0].legend(frameon=False)
    return figure


def draw_schedules(config: Config, trusted: dict[int, dict]):
    """The optimised schedule beside usual ones."""
    figure, panels = axes(1, 1)
    for name, rates in usual(config).items():
        panels[0].plot(rates, lw=1, color="0.6", ls={"cosine": "--", "constant": ":"}.get(name, "-"))
    for colour, (size, result) in zip(("C0", "C3", "C2"), trusted.items()):
        panels[0].plot(result["rates"], color=colour, label=f"optimised, {size}M")
    panels[0].set_xlabel("step")
    panels[0].set_ylabel("rate")
    panels[0].legend(frameon=False)
    return figure


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    config, folder = parse(Config, ROOT / "configs" / "schedules" / "loss_curves", argv, out=ROOT / "runs" / "schedules_loss_curves")
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    try:
        find(config)
    except UsageError as error:
        quit_with(error)
    with Run(folder, config) as run:
        results, trusted = {}, {}
        for size in config.sizes:
            results[size] = {
                name: run.stage(f"{size}M, {name}", lambda size=size, name=name: fit_one(config, size, name)) for name in methods(config)
            }
            trusted[size] = run.stage(f"{size}M, bands and schedule", lambda size=size: trust(config, size))
        report(config, run, results, trusted)


def report(config: Config, run: Run, results: dict[int, dict], trusted: dict[int, dict]) -> None:
    """Tables, figures and the page."""
    rows = [row for size, found in results.items() for row in rows_of(config, size, found)]
    schedules = [row for size, result in trusted.items() for row in schedules_of(config, size, result)]
    curves = [
        {"size": f"{size}M", "law": name, "curve": curve} | {key: float(scores[key][i]) for key in ("R2", "MAE", "RMSE", "worst")}
        for size, found in results.items()
        for name, scores in found.items()
        for i, curve in enumerate(config.test)
    ]
    run.results({"laws": rows, "schedules": schedules, "curves": curves})
    page = Report("Loss curves from schedules", f"Fitted on {', '.join(config.train)}; judged on {', '.join(config.test)}.")
    page.heading("Test curves")
    page.table(rows)
    page.text("Means over test curves; worst: the largest error of all. Seconds from curves to law, compiling included.")
    page.figure(run.figure("predictions", draw_predictions(config, trusted), trusted), f"{BEST}. Bands hold 90 % of refits.")
    errors = {size: {key: result[key] for key in ("strengths", "errors", "strength")} for size, result in trusted.items()}
    page.figure(run.figure("validation", draw_validation(trusted), errors), "Dotted: the strength that the rule of one standard error takes.")
    page.heading("The best schedule")
    rates = {size: result["rates"] for size, result in trusted.items()} | usual(config)
    page.figure(run.figure("schedules", draw_schedules(config, trusted), rates), "Never rising, under the same law. Grey: usual ones.")
    page.table(schedules)
    page.write(run.folder / "report.html")
    for row in rows:
        line = f"{row['size']}, {row['law']}: R² {row['R²']:.5f}, MAE {row['MAE']:.5f}"
        line += f", worst {row['worst']:.4f}, {row['seconds']:.1f} s" if "seconds" in row else ""
        run.console.print(line, highlight=False, soft_wrap=True)
    for row in schedules:
        line = f"{row['size']}, {row['schedule']}: final loss {row['final loss']:.4f} [{row['low']:.4f}, {row['high']:.4f}]"
        run.console.print(line, highlight=False, soft_wrap=True)
    run.console.print(f"report: {run.folder / 'report.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
