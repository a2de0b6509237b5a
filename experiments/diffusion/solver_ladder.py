"""Which solver at which number of network calls? Every sampler of `ergodax.diffusion` at equal NFE, on three exact mixtures and on the digits model.

    python experiments/diffusion/solver_ladder.py [--preset smoke|default] [--out DIR] [--nfe 5 10 20] [--solvers DDIM Heun] …

On a mixture the model is exact and sampling starts from the exact marginal, so all error is the solver's: the distance to the exact flow map (ODE
solvers, from the same starts) and the sliced Wasserstein and energy distances to the exact law (all solvers), beside what fresh draws of the law
score. Each solver runs on three grids between the same two noise levels, over several seeds, in one program. Then the claims of the papers are put to
these numbers. Everything is written to DIR (see `ergodax.core.run`).
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from functools import partial

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lab
import numpy as np
from lab import digits

from ergodax import diffusion as d
from ergodax.core import DenoiserTerm
from ergodax.core.check import check_count, check_range
from ergodax.core.config import parse
from ergodax.core.report import Report
from ergodax.core.run import Run


DISTANCES = ("sliced_wasserstein", "energy_distance")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A sampler: `make(term, starts, labels) -> solver`, where held-out starts are for those that are fitted.

    A solve of N steps costs `calls` N + `extra` network calls; it takes at least `least` steps.
    """

    make: Callable
    calls: int = 1
    extra: int = 0
    least: int = 1
    noisy: bool = False

    def steps(self, nfe: int) -> int:
        """As many as the calls allow, 0 if too few."""
        steps = (nfe - self.extra) // self.calls
        return steps if steps >= self.least else 0


def given(solver, *args, **options) -> Entry:
    """A solver that needs no fitting."""
    return Entry(lambda term, starts, labels: solver, *args, **options)


def counted(make: Callable, **options) -> Entry:
    """A solver with decisions for each step: `make(number of steps)`."""
    return Entry(lambda term, starts, labels: make(term.num_steps), **options)


def best_stability(term, starts, labels):
    """λ-DDIM with the λ that is best on the held-out starts, as the paper searches for it."""
    rates = jnp.linspace(-3.0, 3.0, 13)
    fine = jnp.interp(jnp.linspace(0, term.num_steps, 129), jnp.arange(term.num_steps + 1), term.grid)
    exact = lab.solve(DenoiserTerm(term.denoised, term.path, fine), d.DPMSolverPP2M(), starts, labels)
    errors = jax.vmap(lambda rate: jnp.mean((lab.solve(term, d.ConjugateDDIM(rate), starts, labels) - exact) ** 2))(rates)
    return d.ConjugateDDIM(rates[jnp.argmin(jnp.where(jnp.isnan(errors), jnp.inf, errors))])


def fitted_iia(term, starts, labels):
    """IIA-DDIM, fitted on the held-out starts."""
    return d.fit_iia(term, starts, labels, args_axis=0)


ENTRIES = {
    "Euler": given(dfx.Euler()),
    "DDIM": given(d.DDIM()),
    "Heun": given(d.Heun(), calls=2),
    "DPM-Solver++(2M)": given(d.DPMSolverPP2M()),
    "S-PNDM": given(d.PNDM(2, d.WarmUp.improved_euler()), extra=1),
    "F-PNDM": given(d.PNDM(), extra=9, least=4),
    "BDIA, γ = 1": given(d.BDIA()),
    "BDIA, γ = 0.5": given(d.BDIA(0.5)),
    "IIA-DDIM": Entry(fitted_iia),
    "λ-DDIM": Entry(best_stability),
    "accelerated DDIM": given(d.AcceleratedDDIM(), calls=2),
    "restoration–degradation, l = √h": Entry(lambda term, starts, labels: d.LinearRestorationDegradation(term.path, d.square_root_look_back)),
    "time-shift DDIM": given(d.TimeShift(d.DDIM())),
    "DPM-Solver++(3M)": counted(lambda n: d.USF.dpm_solver(n, 3), least=3),
    "DPM-Solver++(2S)": counted(lambda n: d.USF.dpm_solver(n, 2, single_step=True), least=2),
    "DPM-Solver++(3S)": counted(lambda n: d.USF.dpm_solver(n, 3, single_step=True), least=3),
    "DPM-Solver(2M)": counted(lambda n: d.USF.dpm_solver(n, 2, noise=True), least=2),
    "DEIS-3": counted(lambda n: d.USF.deis(n, 3), least=3),
    "UniPC-2": counted(lambda n: d.USF.unipc(n, 2), least=2),
    "UniPC-3": counted(lambda n: d.USF.unipc(n, 3), least=3),
    "DPM-Solver-2": Entry(lambda term, starts, labels: d.DPMSolver2(term.path), calls=2),
    "LMS": given(d.LMS()),
    "ER-SDE as ODE, order 3": given(d.ERSDE(d.PowerNoiseScale(1.0), 3)),
    "ER-SDE, order 1": given(d.ERSDE(max_order=1), noisy=True),
    "ER-SDE, order 2": given(d.ERSDE(max_order=2), noisy=True),
    "ER-SDE, order 3": given(d.ERSDE(max_order=3), noisy=True),
    "ancestral": given(d.Ancestral(), noisy=True),
    "Euler–Maruyama": given(d.EulerMaruyama(), noisy=True),
    "reverse diffusion": given(d.ReverseDiffusion(), noisy=True),
    "DPM-Solver++(2M) SDE": given(d.DPMSolverPP2MSDE(), noisy=True),
    "DPM-Solver++(3M) SDE": given(d.DPMSolverPP3MSDE(), noisy=True),
    "predictor–corrector": given(d.PredictorCorrector(d.ReverseDiffusion()), calls=2, noisy=True),
    "accelerated DDPM": given(d.AcceleratedDDPM(), noisy=True),
}

# (paper, better, worse, measure, NFEs of the claim)
CLAIMS = [
    ("Heun before Euler's method (2206.00364)", "Heun", "Euler", "flow_error", (20, 40, 80)),
    ("exponential step before Euler's (2206.00927)", "DDIM", "Euler", "flow_error", (5, 8, 10, 15, 20)),
    ("DPM-Solver++(2M) before DDIM (2211.01095)", "DPM-Solver++(2M)", "DDIM", "flow_error", (10, 15, 20, 40)),
    ("UniPC-2 before DPM-Solver++(2M) (2302.04867)", "UniPC-2", "DPM-Solver++(2M)", "flow_error", (5, 8, 10, 15)),
    ("UniPC-3 before UniPC-2 (2302.04867)", "UniPC-3", "UniPC-2", "flow_error", (8, 10, 15)),
    ("DEIS-3 before DDIM (2204.13902)", "DEIS-3", "DDIM", "flow_error", (5, 8, 10, 15, 20)),
    ("data before noise prediction (2211.01095)", "DPM-Solver++(2M)", "DPM-Solver(2M)", "flow_error", (10, 15, 20)),
    ("DPM-Solver++(3M) before (2M) (2211.01095)", "DPM-Solver++(3M)", "DPM-Solver++(2M)", "flow_error", (10, 15, 20, 40)),
    ("multistep before singlestep (2211.01095)", "DPM-Solver++(2M)", "DPM-Solver++(2S)", "flow_error", (10, 15, 20)),
    ("predictor–corrector before predictor (2011.13456)", "predictor–corrector", "reverse diffusion", "sliced_wasserstein", (40, 80)),
    ("DPM-Solver++(2M) SDE before ancestral (2211.01095)", "DPM-Solver++(2M) SDE", "ancestral", "sliced_wasserstein", (10, 15, 20, 40)),
    ("F-PNDM before DDIM (2202.09778)", "F-PNDM", "DDIM", "flow_error", (20, 40, 80)),
    ("F-PNDM before S-PNDM (2202.09778)", "F-PNDM", "S-PNDM", "flow_error", (20, 40, 80)),
    ("IIA-DDIM before DDIM (2304.11328)", "IIA-DDIM", "DDIM", "flow_error", (5, 8, 10, 15, 20)),
    ("λ-DDIM before DDIM (2310.07894)", "λ-DDIM", "DDIM", "flow_error", (10, 15, 20, 40)),
    ("BDIA before DDIM (2307.10829)", "BDIA, γ = 0.5", "DDIM", "flow_error", (10, 20, 40)),
    ("accelerated DDIM before DDIM (2403.03852)", "accelerated DDIM", "DDIM", "flow_error", (10, 20, 40, 80)),
    ("accelerated DDPM before DDPM (2403.03852)", "accelerated DDPM", "ancestral", "sliced_wasserstein", (10, 20, 40, 80)),
    ("time shift before DDIM (2305.15583)", "time-shift DDIM", "DDIM", "sliced_wasserstein", (5, 8, 10, 20)),
    ("ER-SDE order 3 before order 1 (2309.06169)", "ER-SDE, order 3", "ER-SDE, order 1", "sliced_wasserstein", (10, 15, 20, 40)),
    ("ER-SDE order 3 before DPM-Solver++(2M) (2309.06169)", "ER-SDE, order 3", "DPM-Solver++(2M)", "sliced_wasserstein", (20, 40)),
    ("ER-SDE order 3 before ancestral (2309.06169)", "ER-SDE, order 3", "ancestral", "sliced_wasserstein", (10, 15, 20, 40)),
    ("SDE before ODE at many calls (2309.06169)", "ER-SDE, order 3", "ER-SDE as ODE, order 3", "sliced_wasserstein", (40, 80)),
]


@dataclasses.dataclass(frozen=True)
class Config:
    """`experiments/diffusion/solver_ladder.py`"""

    seed: int = 0
    nfe: tuple[int, ...] = (5, 8, 10, 15, 20, 40, 80)
    solvers: tuple[str, ...] = ()  # all of them if empty
    targets: tuple[str, ...] = (*lab.MIXTURES, lab.DIGITS)
    seeds: int = 8  # sets of starts, vmapped
    samples: int = 512  # starts in a set
    fitting: int = 64  # held-out starts of the fitted solvers
    reference: int = 512  # draws of the law that a set of samples is compared with
    fine_steps: int = 2048  # of the flow map taken for exact
    sigma_min: float = 0.02  # both ends of the grids, relative to the data
    sigma_max: float = 80.0
    model: digits.Config = dataclasses.field(default_factory=digits.Config)
    model_seeds: int = 4
    model_samples: int = 256
    model_fine_steps: int = 256

    def __post_init__(self):
        for name in ("seeds", "fitting", "fine_steps", "model_seeds", "model_fine_steps"):
            check_count(name, getattr(self, name))
        for name in ("samples", "reference", "model_samples"):
            check_count(name, getattr(self, name), low=2)
        for nfe in self.nfe:
            check_count("nfe", nfe, low=2)
        check_range("sigma_min", self.sigma_min, low=0.0, high=self.sigma_max, open_low=True, open_high=True)
        if unknown := sorted(set(self.solvers) - set(ENTRIES)):
            raise ValueError(f"unknown `solvers` {', '.join(unknown)}; there are {', '.join(ENTRIES)}.")
        if not self.targets or set(self.targets) - {*lab.MIXTURES, lab.DIGITS}:
            raise ValueError(f"`targets` must be some of {', '.join((*lab.MIXTURES, lab.DIGITS))}, got {', '.join(self.targets) or 'none'}.")

    @property
    def entries(self) -> dict[str, Entry]:
        """The solvers of this run."""
        return {name: ENTRIES[name] for name in self.solvers or ENTRIES}


class Bench:
    """A target with its starts, its exact flow map and its floors: what a solver is put on."""

    def __init__(self, config: Config, target: lab.Target, seeds: int, samples: int, fine_steps: int):
        self.config, self.target = config, target
        start, self.end = lab.grids(target.path, 1, config.sigma_min, config.sigma_max)[0]
        key_starts, key_fit, key_law, key_floor, key_noise, self.key = jax.random.split(jax.random.key(config.seed), 6)
        draws = [target.starts(key, samples, start) for key in jax.random.split(key_starts, seeds)]
        self.starts, self.labels = (jnp.stack(parts) for parts in zip(*draws))
        self.fitting = target.starts(key_fit, config.fitting, start)
        self.keys = jax.random.split(key_noise, (seeds, samples))
        self.reference = target.reference(key_law, config.reference, self.end)
        self.floor = lab.floor(key_floor, lambda key, n: target.law(key, n, self.end), samples, self.reference, 4 * seeds)
        fine = lab.grids(target.path, fine_steps, config.sigma_min, config.sigma_max)[0]
        self.exact = eqx.filter_jit(self._all)(fine[None], ENTRIES["DPM-Solver++(2M)"], target.field)[0]

    def _all(self, grids, entry, field):
        def on(grid):
            term = DenoiserTerm(field, self.target.path, grid)
            solver = entry.make(term, *self.fitting)
            return jax.vmap(partial(lab.solve, term, solver))(self.starts, self.labels, self.keys)

        return jax.vmap(on)(grids)

    def measure(self, entry: Entry, nfe: int) -> dict[str, np.ndarray]:
        """Arrays (grids, seeds) of every measure."""
        grid = lab.grids(self.target.path, entry.steps(nfe), self.config.sigma_min, self.config.sigma_max)
        samples = eqx.filter_jit(self._all)(grid, entry, self.target.field)
        out = {}
        if not entry.noisy:
            error = jnp.sqrt(jnp.mean((samples - self.exact) ** 2, axis=tuple(range(3, samples.ndim))))
            out = {"flow_error": np.median(error, axis=2), "flow_rms": np.sqrt(np.mean(np.square(error), axis=2))}
        scores = [[lab.distances(self.key, one, self.reference) for one in row] for row in samples]
        return out | {name: np.array([[float(score[name]) for score in row] for row in scores]) for name in DISTANCES}


def climb(config: Config, run: Run, name: str, make_bench: Callable[[], Bench]) -> dict[str, np.ndarray]:
    """All solvers at all NFEs on one target: `solver/nfe/measure` -> (grids, seeds). Each solver is a stage of the run."""
    bench = functools.cache(make_bench)  # made if anything is left to do
    out = {f"floor/{key}": scores for key, scores in run.stage(f"{name}, floor", lambda: bench().floor).items()}
    with run.bar(name, len(config.entries)) as update:
        for i, (solver, entry) in enumerate(config.entries.items()):

            def measured(entry=entry):
                return {f"{nfe}/{key}": v for nfe in config.nfe if entry.steps(nfe) for key, v in bench().measure(entry, nfe).items()}

            out |= {f"{solver}/{key}": values for key, values in run.stage(f"{name}, {solver}", measured).items()}
            jax.clear_caches()  # hundreds of compiled programs at once exceed what the system lets one process map
            update(i + 1, solver)
    return out


# What came of it


def rows_of(config: Config, target: str, scores: dict) -> list[dict]:
    """A row for each solver and NFE: every measure at its best grid, with the standard error over the seeds."""
    floors = {name: scores[f"floor/{name}"] for name in DISTANCES}
    rows = []
    for solver, entry in config.entries.items():
        for nfe in config.nfe:
            steps = entry.steps(nfe)
            row = {"target": target, "solver": solver, "nfe": nfe, "calls": entry.calls * steps + entry.extra if steps else None}
            for measure in ("flow_error", *DISTANCES):
                values = scores.get(f"{solver}/{nfe}/{measure}")
                if values is None:
                    row |= {measure: None, f"{measure}_se": None, f"{measure}_grid": None}
                    continue
                means = np.where(np.isfinite(values).all(1), values.mean(1), np.inf)
                best = int(np.argmin(means))
                error = values[best].std(ddof=1) / np.sqrt(values.shape[1]) if values.shape[1] > 1 else np.nan
                row |= {measure: float(means[best]), f"{measure}_se": float(error), f"{measure}_grid": lab.GRIDS[best]}
            distance, fresh = row["sliced_wasserstein"], floors["sliced_wasserstein"]
            row["sliced_wasserstein_ratio"] = None if distance is None else distance / float(fresh.mean())
            rows.append(row)
    return rows


def winners(rows: list[dict]) -> list[dict]:
    """The best solver for each target and NFE, by the flow map and by the law."""
    out = []
    for target, nfe in dict.fromkeys((row["target"], row["nfe"]) for row in rows):
        here = [row for row in rows if (row["target"], row["nfe"]) == (target, nfe)]
        won = {"target": target, "nfe": nfe}
        for measure, title in (("flow_error", "flow map"), ("sliced_wasserstein", "law")):
            ran = [row for row in here if row[measure] is not None]
            best = min(ran, key=lambda row: row[measure], default=None)
            if best is None:
                won |= {title: None, f"{title}: grid": None, f"{title}: as good": None}
                continue
            # Within two standard errors of the difference, on the same starts or not.
            ties = [
                row["solver"]
                for row in ran
                if row is not best and row[measure] - best[measure] < 2 * np.hypot(row[f"{measure}_se"], best[f"{measure}_se"])
            ]
            won |= {
                title: best["solver"],
                f"{title}: grid": best[f"{measure}_grid"],
                f"{title}: as good": ", ".join(ties) if len(ties) < 6 else f"{len(ties)} others",
            }
        out.append(won)
    return out


def judge_claims(config: Config, rows: list[dict]) -> list[dict]:
    """Each claim on each target: where the better one is better by more than two standard errors, and where it is worse."""
    table = {(row["target"], row["solver"], row["nfe"]): row for row in rows}
    out = []
    for text, better, worse, measure, nfes in CLAIMS:
        if better not in config.entries or worse not in config.entries:
            continue
        for target in dict.fromkeys(row["target"] for row in rows):
            verdicts: dict[str, list[str]] = {"holds": [], "no difference": [], "fails": []}
            for nfe in [nfe for nfe in nfes if nfe in config.nfe]:
                first, second = table[target, better, nfe], table[target, worse, nfe]
                if first[measure] is None or second[measure] is None:
                    continue
                gap, error = second[measure] - first[measure], np.hypot(first[f"{measure}_se"], second[f"{measure}_se"])
                verdict = "no difference" if np.isnan(gap) or abs(gap) <= 2 * error else "holds" if gap > 0 else "fails"
                verdicts[verdict].append(str(nfe))
            shown = {f"{verdict} at NFE": " ".join(places) for verdict, places in verdicts.items()}
            out.append({"claim": text, "by": measure.replace("_", " "), "target": target} | shown)
    return out


def draw_table(config: Config, rows: list[dict], target: str):
    """Two tables in colours: error of the flow map, and distance to the law in units of its floor."""
    names = list(config.entries)
    figure, (left, right) = lab.axes(1, 2, width=6.0, height=1.2 + 0.24 * len(names))
    here = {(row["solver"], row["nfe"]): row for row in rows if row["target"] == target}
    titles = {"flow_error": "median distance from the exact flow map (RMS per dimension)", "sliced_wasserstein_ratio": "sliced Wasserstein / floor"}
    for axis, (measure, title) in zip((left, right), titles.items()):
        values = [[here[name, nfe][measure] for nfe in config.nfe] for name in names]
        values = np.array([[np.nan if value is None else value for value in line] for line in values])
        kept = np.flatnonzero(~np.isnan(values).all(1))
        limits = (0.9, 10.0) if measure == "sliced_wasserstein_ratio" else None
        lab.heat(axis, values[kept], [names[i] for i in kept], [str(nfe) for nfe in config.nfe], title, limits)
        axis.set_xlabel("network calls")
    return figure


def draw_best(config: Config, rows: list[dict], scores: dict[str, dict], count: int = 6):
    """The solvers that win somewhere, with bands of two standard errors, and the band of fresh draws."""
    targets = list(scores)
    figure, panels = lab.axes(2, len(targets), width=4.2, height=3.2)
    for column, target in enumerate(targets):
        fresh = scores[target]["floor/sliced_wasserstein"]
        for line, measure in enumerate(("flow_error", "sliced_wasserstein")):
            axis = panels[line * len(targets) + column]
            here = [row for row in rows if row["target"] == target and row[measure] is not None and np.isfinite(row[measure])]
            place: dict[str, list[int]] = {}
            for nfe in config.nfe:
                ranked = sorted((row for row in here if row["nfe"] == nfe), key=lambda row: row[measure])
                for position, row in enumerate(ranked):
                    place.setdefault(row["solver"], []).append(position)
            chosen = sorted(place, key=lambda solver: np.mean(place[solver]))[:count]
            for solver in chosen:
                points = [row for row in here if row["solver"] == solver]
                x, y, se = (np.array([row[name] for row in points]) for name in ("calls", measure, f"{measure}_se"))
                axis.plot(x, y, marker="o", ms=3, lw=1.2, ls="--" if config.entries[solver].noisy else "-", label=solver)
                axis.fill_between(x, np.maximum(y - 2 * se, y / 10), y + 2 * se, alpha=0.2, lw=0)
            if measure == "sliced_wasserstein":
                axis.axhspan(*np.quantile(fresh, [0.05, 0.95]), color="0.8", zorder=0, label="fresh draws")
            axis.set(xscale="log", yscale="log")
            axis.set_xticks(config.nfe, [str(nfe) for nfe in config.nfe])
            axis.minorticks_off()
            axis.legend(frameon=False, fontsize=6)
            if line == 0:
                axis.set_title(target, fontsize=10)
            if column == 0:
                axis.set_ylabel({"flow_error": "distance from the flow map", "sliced_wasserstein": "sliced Wasserstein"}[measure])
            if line == 1:
                axis.set_xlabel("network calls")
    return figure


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    config, folder = parse(Config, lab.ROOT / "configs" / "diffusion" / "solver_ladder", argv, out=lab.ROOT / "runs" / "solver_ladder")
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    with Run(folder, config) as run:
        scores = {}
        for name in config.targets:
            if name == lab.DIGITS:
                target = lab.digits_target(run, config.model)
                bench = partial(Bench, config, target, config.model_seeds, config.model_samples, config.model_fine_steps)
            else:
                bench = partial(Bench, config, lab.mixture_target(name), config.seeds, config.samples, config.fine_steps)
            scores[name] = climb(config, run, name, bench)
        report(config, run, scores)


def report(config: Config, run: Run, scores: dict[str, dict]) -> None:
    """Tables, figures and the page."""
    rows = [row for target, values in scores.items() for row in rows_of(config, target, values)]
    won, claims = winners(rows), judge_claims(config, rows)
    floors = {target: {name: values[f"floor/{name}"] for name in DISTANCES} for target, values in scores.items()}
    run.results({"solvers": rows, "winners": won, "claims": claims, "floors": floors})
    page = Report("Solver ladder", f"{len(config.entries)} samplers at equal numbers of network calls; bands and ties are two standard errors.")
    page.heading("Which solver at which number of calls")
    page.table(won)
    if claims:
        page.heading("Where the papers' rankings hold")
        page.text("Each solver at its best grid of three, chosen by the same numbers. What is not listed, the claim or the solver does not have.")
        page.table(claims)
    page.heading("The best of them")
    page.figure(run.figure("best", draw_best(config, rows, scores), {"rows": rows}), "Dashed: stochastic solvers. Grey: what fresh draws score.")
    for target in scores:
        page.heading(target)
        here = [row for row in rows if row["target"] == target]
        name = "table_" + target.split(",")[0].lower().replace(" ", "_")
        page.figure(run.figure(name, draw_table(config, rows, target), {"rows": here}), "Each cell at its best grid; × diverged.")
        page.table(here, sortable=True)
    page.write(run.folder / "report.html")
    for row in won:
        run.console.print(f"{row['target']}, NFE {row['nfe']}: flow {row['flow map']} | law {row['law']}", highlight=False, soft_wrap=True)
    run.console.print(f"report: {run.folder / 'report.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
