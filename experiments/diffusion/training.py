"""Do the objectives train faster, or on worse data? Min-SNR, immiscible noise, learned schedules; ambient and reweighted losses on spoilt data.

    python experiments/diffusion/training.py [--preset smoke|default] [--out DIR] [--seeds N --speed.steps N …]

Three questions, each on a plane problem and on the digits, over vmapped seeds with confidence bands. All methods of one question share the network,
its size, the optimiser and the budget.

- speed: steps until the energy distance of samples, at few and at many network calls, is what the plain objective ends with;
- noisy data: a tenth clean and the rest with known noise, against training on all as if clean, on the clean part alone, and on clean data throughout;
- biased data: 90 to 10 where 50 to 50 is wanted, with a small unbiased set; against plain training on either, and reweighting of the clean data.

Everything is written to DIR (see `ergodax.core.run`).
"""

import dataclasses
import os
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import lab
import numpy as np
import optax
from scipy import stats

from ergodax import data, diffusion as d, nn
from ergodax.core import Denoiser, DenoiserTerm, Fit, FlowMatchingPath, NoisePrediction, VelocityPrediction, VPPath, VPrediction, integrate
from ergodax.core.check import check_count, check_range
from ergodax.core.config import parse
from ergodax.core.report import Report
from ergodax.core.run import Run


@dataclasses.dataclass(frozen=True)
class Size:
    """A network and its budget."""

    width: int = 96
    depth: int = 2
    steps: int = 1500
    batch_size: int = 128
    learning_rate: float = 1e-3
    every: int = 150  # steps between evaluations

    def __post_init__(self):
        for name in ("width", "depth", "steps", "batch_size", "every"):
            check_count(name, getattr(self, name))
        check_range("learning_rate", self.learning_rate, low=0.0, open_low=True)
        if self.steps % self.every:
            raise ValueError(f"`steps` {self.steps} must be a multiple of `every` {self.every}.")


@dataclasses.dataclass(frozen=True)
class Config:
    """`experiments/diffusion/training.py`"""

    seed: int = 0
    seeds: int = 8
    samples: int = 512  # of each evaluation
    few: int = 2  # network calls
    many: int = 20
    speed: Size = dataclasses.field(default_factory=Size)
    spoilt: Size = dataclasses.field(default_factory=lambda: Size(every=1500))
    problems: tuple[str, ...] = tuple(lab.PROBLEMS)
    objectives: tuple[str, ...] = ()  # of `RECIPES`, all of them if empty
    noisy_examples: int = 1000  # of which a tenth is clean, on the plane
    noise_level: float = 0.3
    biased_examples: int = 1000

    def __post_init__(self):
        for name in ("seeds", "few", "many", "noisy_examples", "biased_examples"):
            check_count(name, getattr(self, name))
        check_count("samples", self.samples, low=2)
        check_range("noise_level", self.noise_level, low=0.0, open_low=True)
        if not self.problems or set(self.problems) - set(lab.PROBLEMS):
            raise ValueError(f"`problems` must be some of {', '.join(lab.PROBLEMS)}, got {', '.join(self.problems) or 'none'}.")
        if unknown := sorted(set(self.objectives) - set(RECIPES)):
            raise ValueError(f"unknown `objectives` {', '.join(unknown)}; there are {', '.join(RECIPES)}.")

    @property
    def recipes(self) -> dict[str, "Recipe"]:
        """The objectives of this run, and what they are compared with."""
        names = set(self.objectives or RECIPES)
        names |= {RECIPES[name].against for name in names}
        return {name: recipe for name, recipe in RECIPES.items() if name in names}


# Speed


VP, FLOW = (VPPath(), NoisePrediction()), (FlowMatchingPath(), VelocityPrediction())
V = (VPPath(), VPrediction())


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An objective: `(path, prediction)`, plugs of `DenoisingLoss`, and the recipe that it is compared with."""

    frame: tuple
    plugs: dict
    against: str | None = None

    def loss(self):
        """The training loss."""
        return d.DenoisingLoss(*self.frame, **self.plugs)

    def model(self, problem: lab.Problem, size: Size, key):
        """What is trained."""
        return problem.network(size.width, size.depth, key)

    def sample(self, model, start_key, label, shape, num_steps: int):
        """One sample in `num_steps` network calls."""
        path, prediction = self.frame
        grid = d.uniform_grid(num_steps) if isinstance(path, FlowMatchingPath) else d.log_snr_grid(path, num_steps)
        term = DenoiserTerm(Denoiser(model, path, prediction), path, grid)
        return integrate(term, d.DDIM(), path.prior(start_key, shape), label)


class PixelLevels(eqx.Module):
    """A network for CVDM, which is told γ at every pixel: data and γ as two channels."""

    network: nn.TimeMLP

    def __call__(self, t, z, args):
        label, gamma = args
        return self.network(t, jnp.stack([z, 2 * gamma - 1], axis=-1), label)[..., 0]


class LabelRate(eqx.Module):
    """λ for each class and pixel."""

    table: jax.Array

    def __call__(self, label):
        return self.table[label]


class LearnedSchedule(Recipe):
    """CVDM with the label as its condition."""

    def loss(self):
        """Joint loss of network and schedule."""
        return d.CVDMLoss()

    def model(self, problem, size, key):
        """Network and schedule."""
        key_network, key_integral, key_tau = jax.random.split(key, 3)
        network = nn.TimeMLP((*problem.shape, 2), size.width, size.depth, num_classes=problem.num_classes, key=key_network)
        rate = LabelRate(jnp.full((problem.num_classes or 1, *problem.shape), jnp.log(jnp.expm1(1.0))))
        integral = d.VanishingAtData(d.MonotoneNetwork(key=key_integral))
        return d.CVDM(PixelLevels(network), d.CVDMSchedule(rate, integral, d.MonotoneNetwork(0.1, 19.9, key=key_tau)))

    def sample(self, model, start_key, label, shape, num_steps):
        """One sample, on the label's own path."""
        path = model.schedule.path(label)
        term = DenoiserTerm(Denoiser(d.LevelInput(model.network, path), path, NoisePrediction()), path, d.uniform_grid(num_steps, 1e-3, 1 - 1e-3))
        return integrate(term, d.DDIM(), path.prior(start_key, shape), label)


RECIPES = {
    "noise": Recipe(VP, {}),
    "noise, min-SNR": Recipe(VP, {"weight": d.MinSNR()}, "noise"),
    "v": Recipe(V, {}),
    "v, min-SNR": Recipe(V, {"weight": d.MinSNR()}, "v"),
    "flow": Recipe(FLOW, {}),
    "flow, assigned noise": Recipe(FLOW, {"coupling": d.Immiscible(within_condition=True)}, "flow"),
    "flow, nearest of 4": Recipe(FLOW, {"coupling": d.NearestNoise(4)}, "flow"),
    "flow, min-SNR": Recipe(FLOW, {"weight": d.MinSNR()}, "flow"),
    "CVDM": LearnedSchedule(VP, {}, "noise"),
}


def fitting(size: Size, loss, model, batches, evaluate) -> Fit:
    """The optimiser and budget that all share; `batches` as in `Fit`."""
    batch_size = None if callable(batches) else min(size.batch_size, len(jax.tree.leaves(batches)[0]))
    rate = optax.warmup_cosine_decay_schedule(0.0, size.learning_rate, size.steps // 20, size.steps)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    return Fit(loss, model, optimiser, batches, batch_size=batch_size, every=size.every, ema_decay=0.999, evaluate=evaluate)


def quality(config: Config, problem: lab.Problem, draw: Callable):
    """`(model, key) -> {few, many}`: the energy distance of samples to the reference, labels as they come in the data."""
    labels = problem.train[1]

    def evaluate(model, key):
        key_labels, key_starts = jax.random.split(key)
        chosen, keys = jax.random.choice(key_labels, labels, (config.samples,)), jax.random.split(key_starts, config.samples)
        return {
            name: data.energy_distance(jax.vmap(lambda k, c, n=n: draw(model, k, c, problem.shape, n))(keys, chosen), problem.reference)
            for name, n in (("few", config.few), ("many", config.many))
        }

    return evaluate


def speed(config: Config, run: Run, problem: lab.Problem) -> dict[str, np.ndarray]:
    """`recipe/few|many` -> (seeds, evaluations), and the floor."""
    out = {"floor": lab.floor(jax.random.key(config.seed), problem.fresh, min(config.samples, 256), problem.reference, 32)["energy_distance"]}
    for name, recipe in config.recipes.items():

        def train(key, recipe=recipe):
            key_model, key_run = jax.random.split(key)
            model = recipe.model(problem, config.speed, key_model)
            fit = fitting(config.speed, recipe.loss(), model, problem.train, quality(config, problem, recipe.sample))
            done = fit.run(key_run, config.speed.steps)
            return {"few": done.metrics["few"], "many": done.metrics["many"], "failed_at": done.failed_at}

        out |= {f"{name}/{key}": value for key, value in lab.over_seeds(run, f"{problem.name}: {name}", train, config.seeds).items()}
    return out


# Noisy data


def noisy(config: Config, run: Run, problem: lab.Problem) -> dict[str, np.ndarray]:
    """Energy distance of samples, for each way to use data of which nine tenths have known noise: `way` -> (seeds,)."""
    size, level = config.spoilt, config.noise_level
    clean, labels = problem.train
    count = min(config.noisy_examples, len(clean))
    base = d.DenoisingLoss(*V)
    recipe = RECIPES["v"]

    def data_of(key):
        key_rows, key_noise = jax.random.split(key)
        rows = jax.random.permutation(key_rows, len(clean))[:count]
        levels = jnp.where(jnp.arange(count) < count // 10, 0.0, level)
        x = clean[rows]
        noise = jax.random.normal(key_noise, x.shape)
        return x, x + noise * levels.reshape(-1, *[1] * (x.ndim - 1)), levels, labels[rows]

    def batches(way, key):
        x, y, levels, c = data_of(key)
        few = count // 10
        return {
            "all clean": (base, (x, c)),
            "noisy taken as clean": (base, (y, c)),
            "the clean tenth alone": (base, (x[:few], c[:few])),
            "ambient": (d.AmbientLoss(base), (y, levels, c)),
        }[way]

    out = {}
    for way in ("all clean", "noisy taken as clean", "the clean tenth alone", "ambient"):

        def train(key, way=way):
            key_data, key_model, key_run = jax.random.split(key, 3)
            loss, batch = batches(way, key_data)
            fit = fitting(size, loss, recipe.model(problem, size, key_model), batch, quality(config, problem, recipe.sample))
            return {"many": fit.run(key_run, size.steps).metrics["many"][-1]}

        out[way] = lab.over_seeds(run, f"{problem.name}: {way}", train, config.seeds)["many"]
    return out


# Biased data


class Logit(eqx.Module):
    """A scalar: the sum of a network's output."""

    network: nn.TimeMLP

    def __call__(self, t, x, args=None):
        return jnp.sum(self.network(t, x))


@dataclasses.dataclass(frozen=True)
class Halves:
    """Two kinds of examples, wanted in equal parts: `kinds[k](key, n) -> x`, and `share(x)`, the share of the second kind."""

    name: str
    shape: tuple[int, ...]
    kinds: tuple[Callable, Callable]
    share: Callable


def moons() -> Halves:
    """The two moons; the nearer noiseless moon decides."""
    angle = jnp.linspace(0, np.pi, 200)
    arcs = jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1), jnp.stack([1 - jnp.cos(angle), 0.5 - jnp.sin(angle)], 1)

    def kind(arc):
        def draw(key, n):
            key_place, key_noise = jax.random.split(key)
            return jax.random.choice(key_place, arc, (n,)) + 0.1 * jax.random.normal(key_noise, (n, 2))

        return draw

    def share(x):
        near = [jnp.min(jnp.sum((x[:, None] - arc) ** 2, axis=-1), axis=1) for arc in arcs]
        return jnp.mean(near[1] < near[0])

    return Halves("two moons", (2,), (kind(arcs[0]), kind(arcs[1])), share)


def threes_and_eights() -> Halves:
    """Digits 3 and 8; a linear classifier of real images decides."""
    from sklearn.linear_model import LogisticRegression

    split = data.digits()
    parts = [jnp.asarray(np.asarray(split.train_x)[np.asarray(split.train_y) == label]) for label in (3, 8)]
    x, y = np.concatenate([np.asarray(part) for part in parts]).reshape(-1, 64), np.repeat([0, 1], [len(part) for part in parts])
    judge = LogisticRegression(max_iter=1000).fit(x, y)
    slope, offset = jnp.asarray(judge.coef_[0], jnp.float32), jnp.asarray(judge.intercept_[0], jnp.float32)

    def kind(part):
        return lambda key, n: jax.random.choice(key, part, (n,))

    return Halves("digits 3 and 8", (8, 8, 1), (kind(parts[0]), kind(parts[1])), lambda images: jnp.mean(images.reshape(-1, 64) @ slope + offset > 0))


HALVES = {"eight Gaussians": moons, "digits": threes_and_eights}  # by the problem that they stand beside
WAYS = ("biased data as they are", "the unbiased tenth alone", "both together", "weights of clean data", "time-dependent weights", "bounded form")


def biased(config: Config, run: Run, halves: Halves) -> dict[str, np.ndarray]:
    """Share of the second kind in samples, and their energy distance to an equal mixture: `way/share|distance` -> (seeds,)."""
    size, (first, second) = config.spoilt, halves.kinds
    count, few = config.biased_examples, config.biased_examples // 10
    key_first, key_second = jax.random.split(jax.random.key(config.seed))
    reference = jnp.concatenate([first(key_first, 500), second(key_second, 500)])
    base, recipe = d.DenoisingLoss(*V), RECIPES["v"]
    problem = lab.Problem(halves.name, (reference, jnp.zeros(len(reference), jnp.int32)), reference, first, None)

    def train(key, way):
        keys = jax.random.split(key, 8)
        wrong = jnp.concatenate([first(keys[0], count - few), second(keys[1], few)])
        right = jnp.concatenate([first(keys[2], few // 2), second(keys[3], few - few // 2)])
        sets = wrong, right

        def ratio():
            """log w(t, x), learned from noised samples of the two sets."""

            def batch(key, step):
                ks = jax.random.split(key)
                return tuple(jax.random.choice(k, part, (size.batch_size,)) for k, part in zip(ks, sets))

            model = Logit(nn.TimeMLP(halves.shape, size.width, 1, key=keys[4]))
            fit = Fit(d.DensityRatioLoss(VPPath()), model, optax.adam(size.learning_rate), batch, every=size.steps // 4, ema_decay=0.999)
            return fit.run(keys[5], size.steps // 4).average

        def half_and_half(key, step):
            ks = jax.random.split(key)
            return jnp.concatenate([jax.random.choice(k, part, (size.batch_size // 2,)) for k, part in zip(ks, sets)])

        if way == WAYS[0]:
            loss, batches = base, wrong
        elif way == WAYS[1]:
            loss, batches = base, right
        elif way == WAYS[2]:
            loss, batches = base, jnp.concatenate(sets)
        else:
            log_ratio = jax.lax.stop_gradient(ratio())
            loss, batches = {
                WAYS[3]: lambda: (d.ImportanceWeightedLoss(base, lambda x, c: log_ratio(jnp.asarray(1 - 1e-3), x, c)), wrong),
                WAYS[4]: lambda: (d.ReweightedLoss(base, log_ratio), wrong),
                WAYS[5]: lambda: (d.ReweightedLoss(base, d.MixtureRatio(log_ratio)), half_and_half),
            }[way]()
        fit = fitting(size, loss, recipe.model(problem, size, keys[6]), batches, quality(config, problem, recipe.sample))
        done = fit.run(keys[7], size.steps)
        starts = jax.random.split(jax.random.key(config.seed + 1), config.samples)
        samples = jax.vmap(lambda k: recipe.sample(done.average, k, None, halves.shape, config.many))(starts)
        return {"share": halves.share(samples), "distance": done.metrics["many"][-1]}

    out = {}
    for way in WAYS:
        scores = lab.over_seeds(run, f"{halves.name}: {way}", lambda key, way=way: train(key, way), config.seeds)
        out |= {f"{way}/{name}": value for name, value in scores.items()}
    return out


# What came of it


def mean_of(values: np.ndarray) -> dict[str, float]:
    """The mean over seeds, and half its 95 % interval (Student's t)."""
    values, n = np.asarray(values, float), len(values)
    half = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
    return {"mean": float(values.mean()), "±": float(half)}


def crossing(curves: np.ndarray, level: float, every: int) -> float:
    """The step at which the mean curve first is at `level` or below, by linear interpolation; ∞ if never."""
    curve = curves.mean(0)
    below = np.flatnonzero(curve <= level)
    if len(below) == 0:
        return np.inf
    i = below[0]
    return every * (i + 1 - (0 if i == 0 else (level - curve[i]) / (curve[i - 1] - curve[i])))


def speed_rows(config: Config, problem: str, scores: dict) -> list[dict]:
    """For each recipe and number of calls: what it ends with, and steps to what its baseline has over the last quarter, with a bootstrap interval.

    A level below twice what fresh data reach (their 95 % quantile) would be a matter of chance; that is the level then.
    """
    rows, random = [], np.random.default_rng(config.seed)
    lowest = 2 * float(np.quantile(scores["floor"], 0.95))
    for name, recipe in config.recipes.items():
        for calls in ("few", "many"):
            base = scores[f"{recipe.against or name}/{calls}"]
            curves, level = scores[f"{name}/{calls}"], max(lowest, base[:, -max(1, base.shape[1] // 4) :].mean())
            drawn = [crossing(curves[random.integers(len(curves), size=len(curves))], level, config.speed.every) for _ in range(500)]
            final = mean_of(curves[:, -max(1, curves.shape[1] // 4) :].mean(1))
            rows.append(
                {
                    **{"problem": problem, "objective": name, "calls": getattr(config, calls), "final distance": final["mean"], "±": final["±"]},
                    **{"against": recipe.against, "level": float(level), "steps to level": crossing(curves, level, config.speed.every)},
                    **{"5 %": float(np.quantile(drawn, 0.05, method="lower")), "95 %": float(np.quantile(drawn, 0.95, method="higher"))},
                    **{"failed seeds": int((scores[f"{name}/failed_at"] >= 0).sum())},
                }
            )
    return rows


def draw_speed(config: Config, scores: dict[str, dict]):
    """Mean curves with 95 % bands, one panel for each problem and number of calls."""
    figure, panels = lab.axes(len(scores), 2, width=5.6, height=3.6)
    panel = iter(panels)
    for problem, values in scores.items():
        floor = np.quantile(values["floor"], 0.95)
        for calls in ("few", "many"):
            axis = next(panel)
            for i, (name, recipe) in enumerate(config.recipes.items()):
                curves = values[f"{name}/{calls}"]
                step = config.speed.every * np.arange(1, curves.shape[1] + 1)
                half = stats.t.ppf(0.975, len(curves) - 1) * curves.std(0, ddof=1) / np.sqrt(len(curves))
                (line,) = axis.plot(step, curves.mean(0), lw=1.3, ls="-" if recipe.against is None else "--", label=name, color=f"C{i}")
                axis.fill_between(step, curves.mean(0) - half, curves.mean(0) + half, color=line.get_color(), alpha=0.2, lw=0)
            axis.axhline(floor, color="gray", lw=0.8)
            axis.set(yscale="log", ylim=(floor / 3, None), xlabel="step", title=f"{problem}, {getattr(config, calls)} calls")
        panels[0].set_ylabel("energy distance")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


def draw_bars(groups: dict[str, dict[str, np.ndarray]], label: str, line: float | None = None):
    """A panel for each problem: the mean of each way, its 95 % interval, and every seed."""
    figure, panels = lab.axes(1, len(groups), width=5.4, height=2.6)
    for axis, (problem, ways) in zip(panels, groups.items()):
        for i, values in enumerate(ways.values()):
            centre = mean_of(values)
            axis.barh(i, centre["mean"], xerr=centre["±"], color="C0", alpha=0.35)
            axis.plot(values, np.full(len(values), i), "|", color="C0", ms=8)
        axis.set_yticks(range(len(ways)), list(ways))
        axis.invert_yaxis()
        axis.set(xlabel=label, title=problem)
        if line is not None:
            axis.axvline(line, color="gray", lw=0.8)
    return figure


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    config, folder = parse(Config, lab.ROOT / "configs" / "diffusion" / "training", argv, out=lab.ROOT / "runs" / "diffusion_training")
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    with Run(folder, config) as run:
        problems = {name: lab.PROBLEMS[name]() for name in config.problems}
        fast = {name: run.stage(f"speed {name}", lambda problem=problem: speed(config, run, problem)) for name, problem in problems.items()}
        ambient = {name: run.stage(f"noisy {name}", lambda problem=problem: noisy(config, run, problem)) for name, problem in problems.items()}
        halves = [HALVES[name]() for name in problems]
        fair = {half.name: run.stage(f"biased {half.name}", lambda half=half: biased(config, run, half)) for half in halves}
        report(config, run, fast, ambient, fair)


def report(config: Config, run: Run, fast: dict, ambient: dict, fair: dict) -> None:
    """Tables, figures and the page."""
    speeds = [row for name, scores in fast.items() for row in speed_rows(config, name, scores)]
    noise = [{"problem": problem, "training": way} | mean_of(values) for problem, ways in ambient.items() for way, values in ways.items()]
    shares = {problem: {way: scores[f"{way}/share"] for way in WAYS} for problem, scores in fair.items()}
    gaps = {problem: {way: scores[f"{way}/distance"] for way in WAYS} for problem, scores in fair.items()}
    fairness = []
    for problem, way in ((problem, way) for problem in fair for way in WAYS):
        share, gap = mean_of(shares[problem][way]), mean_of(gaps[problem][way])
        names = {"share of the rare kind": share["mean"], "± share": share["±"], "energy distance": gap["mean"], "± distance": gap["±"]}
        fairness.append({"problem": problem, "training": way} | names)
    run.results({"speed": speeds, "noisy": noise, "biased": fairness})
    page = Report(
        "Training objectives", f"{config.seeds} seeds; intervals are 95 % over seeds. Energy distances are unbiased, so 0 is a perfect model."
    )
    page.heading("Steps to a fixed quality")
    page.figure(run.figure("speed", draw_speed(config, fast), fast), "Dashed: the methods; solid: what they are compared with. Grey: the floor.")
    page.text("Level: what the baseline has over the last quarter of its steps, or twice what fresh data reach if that is more.")
    page.text("Steps to level: where the mean over seeds gets there, on the evaluations' own grid of steps; inf: never.")
    page.table(speeds)
    page.heading(f"A tenth clean, the rest with noise {config.noise_level:g}")
    page.figure(run.figure("noisy", draw_bars(ambient, "energy distance to clean data"), ambient), "Bars: mean and 95 % interval; marks: seeds.")
    page.table(noise)
    page.heading("Biased 90 to 10, wanted 50 to 50")
    page.figure(run.figure("biased", draw_bars(shares, "share of the rare kind", 0.5), shares), "The grey line is what is wanted.")
    page.figure(run.figure("biased_distance", draw_bars(gaps, "energy distance to the equal mixture"), gaps), "Lower is better.")
    page.table(fairness)
    page.write(run.folder / "report.html")
    for row in speeds:
        if row["against"]:
            shown = f"{row['problem']}, {row['calls']} calls: {row['objective']} {row['steps to level']:.0f} steps to what {row['against']} ends with"
            run.console.print(shown, highlight=False)
    run.console.print(f"report: {run.folder / 'report.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
