"""Samplers at equal numbers of gradients: mixed flows, stochastic normalising flows and smooth flows beside NUTS and tempered SMC.

    python experiments/transport/samplers.py [--preset smoke|default] [--out DIR] [--problems funnel many-well] [--methods NUTS SNF] …

Problems are targets with a base that all methods start from: Neal's funnel (d = 10) from N(0, 3² I), unequal mixtures in two dimensions (eight modes
on a circle) and in eight (five modes), and the many-well (d = 32) twice: from N(0, I), and from a base that knows the wells (two equal modes in each
pair of coordinates). Each method may spend `budget` gradients on a seed, training and tuning included:

- a call of log p or of its gradient at a new point is one gradient. Values where the gradient is taken too are free, and so are base densities;
- training through a gradient (the Langevin steps of an SNF) needs a product with the Hessian as well: one more for each;
- NUTS: `chains` chains; one for each leapfrog step, in the warm-up too. Draws beyond the budget are dropped;
- SMC: adaptive tempering from the base with Hamiltonian moves of adapted size; what is left of the budget moves particles at the target;
- flows (RealNVP, smooth flow) and SNF: `training` of the budget for minimising J_KL from the base, the rest for weighted draws. The SNF has the
  coupling layers of `RealNVP` and the steps of `Langevin`, which trains step sizes and the schedule only;
- mixed flow: the step size of best ELBO of a grid, then orbits; of each one state is weighted by p/q_N. `num_leapfrog` + 1 gradients a map.

The smooth flow starts from the uniform law of a cube, through normal quantiles: it cannot have the base on the wells, and is left out there.
Arithmetic is float32, that of mixed flows float64: their densities need the way back through every map.

For each problem and method, over several seeds in one program: log Z and ELBO less the truth; the energy distance of `samples` draws to exact ones,
weighted (resampled) and as they come, beside its floor, exact to exact; how far shares of modes are off (total variation; of many-well in a pair);

    effective draws = 1/mean((f̂ - E f)²/Var f)

over seeds and the features of a problem (funnel: v and v²; mixtures: coordinates; many-well: one of each pair), as many independent draws would have
the same error, bias included; `ESS`, what a method itself would report: Kish's of weights; of chains from the variance between them; gradients used;
CPU seconds. `forces` is the claim of the smooth flow's paper: density and forces learned from samples of a torus, beside circular rational-quadratic
splines. Everything is written to DIR (see `ergodax.core.run`).
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.special import ndtri
from jax.scipy.stats import norm

from ergodax.core import fit
from ergodax.core.check import check_count, check_range, require
from ergodax.core.config import parse
from ergodax.core.report import Report
from ergodax.core.run import Run
from ergodax.data import Funnel, GaussianMixture, ManyWell, energy_distance
from ergodax.transport import (
    Bijection,
    BlockSequence,
    Chain,
    CircularShift,
    Coupling,
    DeterministicBlock,
    ExtendedDensity,
    Flow,
    ForceMatchingLoss,
    HamiltonianFlow,
    IncreasingBijection,
    Inverted,
    LangevinBlock,
    MixFlow,
    PathKLLoss,
    PeriodicInput,
    ScannedBlocks,
    SmoothCircleTransformer,
    SmoothIntervalTransformer,
    StochasticNormalizingFlow,
    effective_sample_size,
    log_mean_weight,
    weighted_mean,
)
from ergodax.transport.bijection import StandardUniform


sys.path.append(str(Path(__file__).resolve().parent.parent))

from common import ROOT, axes, heat, interval, over_seeds


@dataclasses.dataclass(frozen=True)
class Forces:
    """The smooth flow and the spline flow on the torus; 0 seeds leave the part out."""

    seeds: int = 2
    steps: int = 5000
    looks: int = 10  # at test points on the way
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight: float = 1e-2  # of the forces
    layers: int = 4
    width: int = 16
    points: int = 4000  # to train on, and to test on

    def __post_init__(self):
        check_count("seeds", self.seeds, low=0)
        for name in ("steps", "looks", "batch_size", "layers", "width", "points"):
            check_count(name, getattr(self, name))
        if self.steps % self.looks:
            raise ValueError(f"`steps` must be a multiple of `looks`, got {self.steps} and {self.looks}.")
        for name in ("learning_rate", "weight"):
            check_range(name, getattr(self, name), low=0.0, open_low=True)
        check_range("batch_size", self.batch_size, high=self.points)


@dataclasses.dataclass(frozen=True)
class Config:
    """`experiments/transport/samplers.py`"""

    seed: int = 0
    seeds: int = 4
    problems: tuple[str, ...] = ()  # all of them if empty
    methods: tuple[str, ...] = ()  # likewise
    budget: int = 500_000
    samples: int = 1000
    # NUTS
    chains: int = 16
    warmup: int = 300
    doublings: int = 8
    # SMC
    particles: int = 1000
    num_leapfrog: int = 5  # of SMC and of the mixed flow
    smc_ess: float = 0.9
    # flows
    training: float = 0.5
    batch_size: int = 256
    path_batch_size: int = 64  # of what goes through Langevin steps
    learning_rate: float = 5e-3
    levels: int = 5  # a pair of coupling layers each, in an SNF followed by Langevin steps
    width: int = 32
    bumps: int = 4
    langevin_steps: int = 2
    langevin_size: float = 0.02
    # mixed flow
    maps: int = 100
    step_sizes: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
    tuning_orbits: int = 10
    forces: Forces = dataclasses.field(default_factory=Forces)

    def __post_init__(self):
        for name in ("seeds", "budget", "chains", "warmup", "doublings", "num_leapfrog", "batch_size", "path_batch_size", "levels", "width", "bumps"):
            check_count(name, getattr(self, name))
        for name in ("langevin_steps", "tuning_orbits"):
            check_count(name, getattr(self, name))
        for name in ("samples", "particles", "maps"):
            check_count(name, getattr(self, name), low=2)
        for name in ("learning_rate", "langevin_size", "step_sizes"):
            check_range(name, getattr(self, name), low=0.0, open_low=True)
        for name in ("smc_ess", "training"):
            check_range(name, getattr(self, name), low=0.0, high=1.0, open_low=True, open_high=True)
        for name, known in (("problems", PROBLEMS), ("methods", METHODS)):
            if unknown := sorted(set(getattr(self, name)) - set(known)):
                raise ValueError(f"unknown `{name}` {', '.join(unknown)}; there are {', '.join(known)}.")


# Problems


class Problem(NamedTuple):
    """A target and the base to start from.

    - `width`: the standard deviation of a normal base; None for another base.
    - `features`: x -> numbers whose means are compared.
    - `shares`: points (n, d) -> shares of modes (groups, modes), or None.
    """

    target: Any
    base: Any
    width: float | None
    features: Callable
    shares: Callable | None


class Wells(eqx.Module):
    """Independent pairs: two equal modes on the wells in one coordinate, N(0, 1) in the other."""

    pairs: int

    def _pair(self):
        return GaussianMixture(jnp.full(2, 0.5), jnp.array([[-1.7, 0.0], [1.7, 0.0]]), jnp.array([[0.06, 1.0], [0.06, 1.0]]))

    def sample(self, key):
        """One draw."""
        return self._pair().sample(key, self.pairs).reshape(2 * self.pairs)

    def log_prob(self, x):
        """The log-density at one point."""
        return jnp.sum(self._pair().log_prob(x.reshape(self.pairs, 2)))


def normal(d: int, std: float) -> GaussianMixture:
    """N(0, std² I)."""
    return GaussianMixture.isotropic(jnp.ones(1), jnp.zeros((1, d)), std)


def mixture(means, std: float, width: float) -> Problem:
    """Modes of one width with weights 1 : 2 : 3 …"""
    weights = np.arange(1.0, len(means) + 1)
    target = GaussianMixture.isotropic(weights / weights.sum(), jnp.asarray(means), std)

    def shares(x):
        nearest = np.linalg.norm(x[:, None] - np.asarray(means), axis=-1).argmin(1)
        return np.bincount(nearest, minlength=len(means))[None] / len(x)

    return Problem(target, normal(target.dim, width), width, lambda x: x, shares)


def circle() -> Problem:
    """Eight modes in the plane."""
    angle = 2 * np.pi * np.arange(8) / 8
    return mixture(5 * np.stack([np.cos(angle), np.sin(angle)], -1), 0.4, 4.0)


def scattered() -> Problem:
    """Five modes in eight dimensions."""
    means = np.random.default_rng(0).normal(size=(5, 8))
    return mixture(5 * means / np.linalg.norm(means, axis=1, keepdims=True), 0.5, 2.5)


def funnel() -> Problem:
    """Neal's."""
    return Problem(Funnel(10), normal(10, 3.0), 3.0, lambda x: jnp.stack([x[0], x[0] ** 2]), None)


def many_well(base: Any, width: float | None) -> Problem:
    """With d = 32."""

    def shares(x):
        right = (x[:, ::2] > 0).mean(0)
        return np.stack([right, 1 - right], -1)

    return Problem(ManyWell(32), base, width, lambda x: x[::2], shares)


PROBLEMS = {
    "funnel": funnel,
    "mixture, d = 2": circle,
    "mixture, d = 8": scattered,
    "many-well": lambda: many_well(normal(32, 1.0), 1.0),
    "many-well, base on wells": lambda: many_well(Wells(16), None),
}


def log_normaliser(problem: Problem) -> float:
    """log Z; a `GaussianMixture` is normalised."""
    return getattr(problem.target, "log_normaliser", 0.0)


# Methods: `method(config, problem)` is a function `key -> dict of arrays` that spends the budget once


def outcome(config: Config, problem: Problem, key, draws, raw, log_weights, gradients) -> dict[str, jax.Array]:
    """Of weighted `draws` (n, d), and of `raw` ones (m, d) that are not weighted."""
    systematic = require("blackjax.smc.resampling", "mcmc").systematic  # equal weights leave all as they are
    picked = systematic(key, jax.nn.softmax(log_weights), config.samples)
    spread = np.linspace(0, len(raw) - 1, config.samples).astype(int)
    return {
        "samples": draws[picked],
        "raw": raw[spread],
        "features": weighted_mean(log_weights, jax.vmap(problem.features)(draws)),
        "log_z": log_mean_weight(log_weights),
        "elbo": jnp.mean(log_weights),
        "ess": effective_sample_size(log_weights),
        "draws": jnp.asarray(len(draws)),
        "gradients": jnp.asarray(gradients),
    }


def nuts(config: Config, problem: Problem) -> Callable:
    """blackjax's, each chain with its own window adaptation."""
    blackjax = require("blackjax", "mcmc")
    log_prob, share = problem.target.log_prob, config.budget // config.chains
    kernel, most = blackjax.nuts.build_kernel(), share // 3  # fewer transitions than that unless they take less than three steps each

    def run(key):
        key_start, key_warm, key_run, key_pick = jax.random.split(key, 4)
        starts = jax.vmap(problem.base.sample)(jax.random.split(key_start, config.chains))
        options = {"adaptation_info_fn": lambda state, info, adaptation: info.num_integration_steps, "max_num_doublings": config.doublings}
        warmup = blackjax.window_adaptation(blackjax.nuts, log_prob, **options)

        def warm(key, start):
            (state, tuned), taken = warmup.run(key, start, num_steps=config.warmup)
            return state, tuned["step_size"], tuned["inverse_mass_matrix"], 1 + jnp.sum(taken)

        states, step_size, mass, spent = jax.vmap(warm)(jax.random.split(key_warm, config.chains), starts)

        def advance(carry):
            i, states, spent, draws, kept = carry
            keys = jax.random.split(jax.random.fold_in(key_run, i), config.chains)
            step = lambda key, state, size, mass: kernel(key, state, log_prob, size, mass, config.doublings)  # noqa: E731
            states, info = jax.vmap(step)(keys, states, step_size, mass)
            spent = spent + info.num_integration_steps
            return i + 1, states, spent, draws.at[i].set(states.position), kept.at[i].set(spent <= share)

        def unfinished(carry):
            return (carry[0] < most) & jnp.any(carry[2] < share)

        draws, kept = jnp.zeros((most, *starts.shape)), jnp.zeros((most, config.chains), bool)
        _, _, spent, draws, kept = jax.lax.while_loop(unfinished, advance, (0, states, spent, draws, kept))
        features = jax.vmap(jax.vmap(problem.features))(draws)
        weights = kept / jnp.maximum(jnp.sum(kept, 0), 1)
        of_chains = jnp.einsum("tc,tcf->cf", weights, features)
        picked = jax.random.choice(key_pick, draws.reshape(-1, starts.shape[1]), (config.samples,), p=(weights / config.chains).reshape(-1))
        between = jnp.var(of_chains, axis=0, ddof=1) / config.chains
        none = jnp.full((), jnp.nan, draws.dtype)
        return {
            "samples": picked,
            "raw": picked,
            "features": jnp.mean(of_chains, 0),
            "log_z": none,
            "elbo": none,
            "between": between,
            "draws": jnp.sum(kept),
            "gradients": jnp.sum(jnp.minimum(spent, share)),
        }

    return run


def smc(config: Config, problem: Problem) -> Callable:
    """blackjax's adaptive tempering; the log of the step size follows the acceptance to 0.75, the mass matrix the particles' variances."""
    blackjax = require("blackjax", "mcmc")
    target, base, n = problem.target, problem.base, config.particles
    log_likelihood = lambda x: target.log_prob(x) - base.log_prob(x)  # noqa: E731
    tempering = blackjax.smc.adaptive_tempered
    moves = blackjax.hmc.build_kernel(), blackjax.hmc.init
    kernel = tempering.build_kernel(base.log_prob, log_likelihood, *moves, blackjax.smc.resampling.systematic, config.smc_ess)
    num_steps = max(config.budget // (n * (config.num_leapfrog + 1)), 1)

    def run(key):
        key_start, key_run, key_pick = jax.random.split(key, 3)
        state = tempering.init(jax.vmap(base.sample)(jax.random.split(key_start, n)))

        def step(carry, key):
            state, log_size, log_z = carry
            mass = jnp.maximum(jnp.var(state.particles, axis=0), 1e-6)
            parameters = {"step_size": jnp.exp(log_size), "inverse_mass_matrix": mass, "num_integration_steps": jnp.asarray(config.num_leapfrog)}
            state, info = kernel(key, state, 1, jax.tree.map(lambda v: v[None], parameters))
            log_size = log_size + 0.5 * (jnp.mean(info.update_info.acceptance_rate) - 0.75)
            return (state, log_size, log_z + info.log_likelihood_increment), state.tempering_param

        start = state._replace(tempering_param=jnp.zeros(())), jnp.log(0.3), jnp.zeros(())
        (state, _, log_z), path = jax.lax.scan(step, start, jax.random.split(key_run, num_steps))
        found = outcome(
            config, problem, key_pick, state.particles, state.particles, jnp.log(state.weights), n * num_steps * (config.num_leapfrog + 1)
        )
        return found | {"log_z": log_z, "elbo": jnp.nan * log_z, "ess": jnp.nan * log_z, "tempering": path[-1], "levels": jnp.sum(path < 1) + 1}

    return run


def mixed_flow(config: Config, problem: Problem) -> Callable:
    """A Hamiltonian mixed flow with the paper's Laplace momenta."""
    target, reference = ExtendedDensity(problem.target), ExtendedDensity(problem.base)
    cost = 2 * (config.maps - 1) * (config.num_leapfrog + 1)
    tuning = len(config.step_sizes) * config.tuning_orbits * cost
    count = max((config.budget - tuning) // (cost + 1), 2)

    def run(key):
        key_tune, key_orbits, key_pick = jax.random.split(key, 3)

        def flow(step_size):
            return MixFlow(HamiltonianFlow(problem.target.log_prob, step_size, config.num_leapfrog), reference, config.maps)

        def elbo(step_size):
            return jnp.mean(jax.vmap(lambda key: flow(step_size).elbo(key, target.log_prob))(jax.random.split(key_tune, config.tuning_orbits)))

        sizes = jnp.array(config.step_sizes)
        size = sizes[jnp.argmax(jnp.nan_to_num(jax.lax.map(elbo, sizes), nan=-jnp.inf))]

        def one(key):
            key_orbit, key_state = jax.random.split(key)
            orbit = flow(size).orbit(key_orbit)
            place = jax.random.randint(key_state, (), 0, config.maps)
            state = jax.tree.map(lambda v: v[place], orbit)
            return orbit.position, state.position, target.log_prob(state) - flow(size).log_prob(state)

        orbits, draws, log_weights = jax.vmap(one)(jax.random.split(key_orbits, count))
        raw = orbits.reshape(-1, orbits.shape[-1])
        found = outcome(config, problem, key_pick, draws, raw, log_weights, tuning + count * (cost + 1))
        return found | {"raw_features": jnp.mean(jax.vmap(problem.features)(raw), 0), "step_size": size}

    return run


class NormalQuantile(Bijection):
    """[0, 1]ᵈ -> Rᵈ: the quantiles of N(0, `std`²)."""

    std: float

    def forward(self, x):
        info = jnp.finfo(x.dtype)
        z = ndtri(jnp.clip(x, info.tiny, 1 - info.epsneg))
        return self.std * z, jnp.sum(jnp.log(self.std) - norm.logpdf(z))

    def inverse(self, y):
        return norm.cdf(y / self.std), jnp.sum(norm.logpdf(y / self.std) - jnp.log(self.std))


def couplings(config: Config, key, d: int, **transformer) -> tuple[Coupling, ...]:
    """A pair of layers that move the one half of the coordinates and then the other; their conditioners start at 0."""

    def layer(key, kept):
        moved = d - len(kept)
        numbers = 4 * config.bumps if transformer else 2
        network = eqx.nn.MLP(len(kept), moved * numbers, config.width, 2, jax.nn.silu, key=key)
        last = lambda network: (network.layers[-1].weight, network.layers[-1].bias)  # noqa: E731
        return Coupling(eqx.tree_at(last, network, replace_fn=jnp.zeros_like), kept, **transformer)

    keys = jax.random.split(key)
    return layer(keys[0], tuple(range(0, d, 2))), layer(keys[1], tuple(range(1, d, 2)))


def path_flow(config: Config, problem: Problem, make: Callable, base: Any, each: int) -> Callable:
    """`make(key) -> block` trained by J_KL and sampled; a path takes `each` gradients on its way, and one at its end."""
    batch_size = config.path_batch_size if each else config.batch_size
    step_cost = batch_size * (2 * each + 1)
    num_steps = max(int(config.training * config.budget) // step_cost, 1)
    spent = num_steps * step_cost
    count = max((config.budget - spent) // (each + 1), 2)
    log_target = problem.target.log_prob

    def run(key):
        key_model, key_fit, key_draw, key_pick = jax.random.split(key, 4)
        optimiser = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(config.learning_rate, num_steps)))
        loss = PathKLLoss(log_target, batch_size)
        model = StochasticNormalizingFlow(make(key_model), base)
        fitted = fit(loss, model, optimiser, lambda key, step: (), key_fit, num_steps=num_steps, every=num_steps)
        draw = lambda key: fitted.model.sample(key, log_target)  # noqa: E731
        draws = jax.lax.map(draw, jax.random.split(key_draw, count), batch_size=4096)
        # paths that left for infinity count as nothing
        lost = ~jnp.isfinite(draws.log_weight) | ~jnp.all(jnp.isfinite(draws.position), 1)
        position, log_weight = jnp.where(lost[:, None], 0.0, draws.position), jnp.where(lost, -jnp.inf, draws.log_weight)
        found = outcome(config, problem, key_pick, position, position, log_weight, spent + count * (each + 1))
        return found | {
            "raw_features": jnp.mean(jax.vmap(problem.features)(position), 0),
            "lost": jnp.mean(lost),
            "failed_at": fitted.failed_at,
            "train_steps": jnp.asarray(num_steps),
        }

    return run


def real_nvp(config: Config, problem: Problem) -> Callable:
    """Affine coupling layers alone."""

    def make(key):
        level = lambda key: BlockSequence(tuple(map(DeterministicBlock, couplings(config, key, problem.target.dim))))  # noqa: E731
        return ScannedBlocks(eqx.filter_vmap(level)(jax.random.split(key, config.levels)))

    return path_flow(config, problem, make, problem.base, 0)


def langevin(config: Config, problem: Problem) -> Callable:
    """Langevin steps alone, towards the target; their sizes and shares are trained."""
    shares = jnp.linspace(0.0, 1.0, config.levels + 1)[1:]

    def make(key):
        level = lambda share: LangevinBlock(jnp.log(config.langevin_size), share, config.langevin_steps)  # noqa: E731
        return ScannedBlocks(eqx.filter_vmap(level)(shares))

    return path_flow(config, problem, make, problem.base, config.levels * (config.langevin_steps + 1))


def snf(config: Config, problem: Problem) -> Callable:
    """Both in turns."""
    shares = jnp.linspace(0.0, 1.0, config.levels + 1)[1:]

    def make(key):
        def level(key, share):
            layers = map(DeterministicBlock, couplings(config, key, problem.target.dim))
            return BlockSequence((*layers, LangevinBlock(jnp.log(config.langevin_size), share, config.langevin_steps)))

        return ScannedBlocks(eqx.filter_vmap(level)(jax.random.split(key, config.levels), shares))

    return path_flow(config, problem, make, problem.base, config.levels * (config.langevin_steps + 1))


def smooth_flow(config: Config, problem: Problem) -> Callable | None:
    """Smooth coupling layers on the cube, half as many levels as affine ones, then normal quantiles."""
    if problem.width is None:
        return None
    d = problem.target.dim

    def make(key):
        keys = jax.random.split(key, max(config.levels // 2, 1))
        level = lambda key: BlockSequence(tuple(map(DeterministicBlock, couplings(config, key, d, transformer=SmoothIntervalTransformer()))))  # noqa: E731
        return BlockSequence((ScannedBlocks(eqx.filter_vmap(level)(keys)), DeterministicBlock(NormalQuantile(problem.width))))

    return path_flow(config, problem, make, StandardUniform((d,)), 0)


METHODS = {
    "NUTS": nuts,
    "SMC": smc,
    "mixed flow": mixed_flow,
    "RealNVP": real_nvp,
    "Langevin": langevin,
    "SNF": snf,
    "smooth flow": smooth_flow,
}


def compare(config: Config, run: Run, name: str) -> dict[str, dict]:
    """All methods on one problem, and exact draws."""
    problem = PROBLEMS[name]()

    def fresh(seed, count):
        return np.asarray(problem.target.sample(jax.random.fold_in(jax.random.key(config.seed + 1), seed), count))

    def distance(samples):
        return np.array([float(energy_distance(jnp.asarray(x, jnp.float32), jnp.asarray(fresh(i, config.samples)))) for i, x in enumerate(samples)])

    def shares(samples):
        return np.stack([problem.shares(x) for x in samples]) if problem.shares else np.full((len(samples), 1, 1), np.nan)

    def exact():
        many = fresh(config.seeds, 200 * config.samples)
        features = np.asarray(jax.vmap(problem.features)(many), float)
        others = np.stack([fresh(config.seeds + 1 + i, config.samples) for i in range(config.seeds)])
        moments = {"mean": features.mean(0), "variance": features.var(0), "true shares": shares([many])[0]}
        return moments | {"distance": distance(others), "shares": shares(others), "shown": others[0][:, :2]}

    out = {"exact": run.stage(f"{name}, exact", exact)}
    for label, method in METHODS.items():
        if (config.methods and label not in config.methods) or method(config, problem) is None:
            continue

        def stage(label=label, method=method):
            started = time.process_time()
            with jax.enable_x64(label == "mixed flow"):
                found = over_seeds(run, f"{name}: {label}", method(config, PROBLEMS[name]()), config.seeds, batch_size=1)
            seconds = time.process_time() - started
            scores = {key: value for key, value in found.items() if key not in ("samples", "raw")}
            scores |= {"distance": distance(found["samples"]), "shares": shares(found["samples"]), "raw distance": distance(found["raw"])}
            return scores | {"shown": found["samples"][0][:, :2], "seconds": np.array(seconds)}

        out[label] = run.stage(f"{name}, {label}", stage)
    return out


# Forces


class SplineCircle(IncreasingBijection):
    """Monotone rational quadratics between knots on the circle, with one slope at 0 = 1. Rezende et al. 2020 (arXiv:2002.02428)."""

    widths: jax.Array
    heights: jax.Array
    slopes: jax.Array

    def value(self, x):
        left, low = jnp.cumsum(self.widths) - self.widths, jnp.cumsum(self.heights) - self.heights
        k = jnp.clip(jnp.sum(left <= x) - 1, 0, left.size - 1)
        width, height, slope, next_slope = self.widths[k], self.heights[k], self.slopes[k], self.slopes[(k + 1) % left.size]
        mean, t = height / width, (x - left[k]) / width
        return low[k] + height * (mean * t**2 + slope * t * (1 - t)) / (mean + (slope + next_slope - 2 * mean) * t * (1 - t))


class SplineTransformer(eqx.Module):
    """3K + 1 raw numbers -> `SplineCircle` of K pieces, then the shift by the first."""

    def __call__(self, parameters):
        """The map of one coordinate."""
        widths, heights, slopes = jnp.split(parameters[1:], 3)
        fraction = lambda v: 1e-3 + (1 - 1e-3 * v.size) * jax.nn.softmax(v)  # noqa: E731
        return Chain((SplineCircle(fraction(widths), fraction(heights), 1e-3 + jax.nn.softplus(slopes + 0.54)), CircularShift(parameters[0])))


#: Transformers with about as many numbers for a coordinate.
CIRCLES = {"smooth": (SmoothCircleTransformer(), 17), "spline": (SplineTransformer(), 16)}


def torus_energy(x):
    """On [0, 1)², of the size of kT."""
    a, b = 2 * jnp.pi * x
    return -(1.2 * jnp.cos(a - 1) + jnp.cos(2 * a + b) + 0.8 * jnp.cos(a - 2 * b + 2) + 0.7 * jnp.sin(3 * b))


def torus_sample(key, n: int):
    """`n` draws by rejection: the energy is above -3.7."""
    key_points, key_accept, key_first = jax.random.split(key, 3)
    x = jax.random.uniform(key_points, (60 * n, 2))
    accepted = jax.random.uniform(key_accept, (60 * n,)) < jnp.exp(-jax.vmap(torus_energy)(x) - 3.7)
    return x[jax.random.choice(key_first, len(x), (n,), p=accepted / jnp.sum(accepted))]


def learn_forces(config: Forces, transformer: Callable, numbers: int) -> Callable:
    """`key -> dict`: test NLL and force errors on the way, of one flow."""
    forces = jax.vmap(lambda x: -jax.grad(torus_energy)(x))
    train, test = (torus_sample(jax.random.key(seed), config.points) for seed in (1, 2))
    loss = ForceMatchingLoss(force_weight=config.weight)

    def run(key):
        key_model, key_fit = jax.random.split(key)
        networks = [PeriodicInput(eqx.nn.MLP(2, numbers, config.width, 1, jax.nn.silu, key=k)) for k in jax.random.split(key_model, config.layers)]
        chain = Chain(tuple(Coupling(network, (i % 2,), transformer) for i, network in enumerate(networks)))
        flow = Flow(Inverted(chain), StandardUniform((2,)))
        optimiser = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps)))
        look = lambda model, key: {f"test {name}": value for name, value in loss(model, (test, forces(test)), key)[1].items()}  # noqa: E731
        options = {"batch_size": config.batch_size, "every": config.steps // config.looks, "evaluate": look}
        fitted = fit(loss, flow, optimiser, (train, forces(train)), key_fit, num_steps=config.steps, **options)
        return {"nll": fitted.metrics["test nll"], "force": fitted.metrics["test force"], "failed_at": fitted.failed_at}

    return run


def compare_forces(config: Config, run: Run) -> dict[str, dict]:
    """Both flows."""
    out = {}
    for name, (transformer, numbers) in CIRCLES.items():

        def stage(name=name, transformer=transformer, numbers=numbers):
            started = time.process_time()
            found = over_seeds(run, f"forces: {name}", learn_forces(config.forces, transformer, numbers), config.forces.seeds, batch_size=1)
            return found | {"seconds": np.array(time.process_time() - started)}

        out[name] = run.stage(f"forces, {name}", stage)
    return out


# What came of it


def effective_draws(features, exact: dict) -> float:
    """Independent draws with the same mean squared error, over seeds and features."""
    return float(1 / np.mean((features - exact["mean"]) ** 2 / exact["variance"]))


def modes_off(scores: dict, exact: dict) -> np.ndarray:
    """Total variation between shares of modes and the true ones, for each seed; in the mean over groups."""
    return np.abs(scores["shares"] - exact["true shares"]).sum(-1).mean(-1) / 2


def rows_of(name: str, result: dict) -> list[dict]:
    """A row for exact draws and for each method."""
    exact, truth, rows = result["exact"], log_normaliser(PROBLEMS[name]()), []
    for label, scores in result.items():
        row = {"problem": name, "method": label}
        if label != "exact":
            row["log Z error"], row["± log Z"] = interval(scores["log_z"] - truth)
            row["ELBO error"] = interval(scores["elbo"] - truth)[0]
        row["energy distance"], row["± energy"] = interval(scores["distance"])
        if label != "exact":
            row["as they come"] = interval(scores["raw distance"])[0]
        row["modes off"], row["± modes"] = interval(modes_off(scores, exact))
        if label != "exact":
            ess = scores["ess"] if "ess" in scores else 1 / np.mean(scores["between"] / exact["variance"], axis=1)
            row["draws"], row["ESS"], row["effective draws"] = (
                float(scores["draws"].mean()),
                float(ess.mean()),
                effective_draws(scores["features"], exact),
            )
            row["gradients"], row["CPU seconds"] = float(scores["gradients"].mean()), float(scores["seconds"]) / len(scores["log_z"])
        rows.append(row)
    return rows


def rows_of_forces(forces: dict) -> list[dict]:
    """A row for each flow, at the end."""
    rows = []
    for name, scores in forces.items():
        nll, nll_error = interval(scores["nll"][:, -1])
        force, force_error = interval(scores["force"][:, -1])
        seconds = float(scores["seconds"]) / len(scores["nll"])
        rows.append({"flow": name, "NLL": nll, "± NLL": nll_error, "force MSE": force, "± force": force_error, "CPU seconds": seconds})
    return rows


def root_mean_square(values) -> float:
    """Over seeds."""
    return float(np.sqrt(np.mean(np.asarray(values, float) ** 2)))


def methods_of(results: dict[str, dict]) -> list[str]:
    """Those that ran on some problem, after exact draws."""
    return ["exact", *(label for label in METHODS if any(label in result for result in results.values()))]


def scores_of(results: dict[str, dict]) -> dict[str, np.ndarray]:
    """Measures, each a table of methods by problems."""
    methods = methods_of(results)
    found = {title: np.full((len(methods), len(results)), np.nan) for title in ("log Z", "energy", "effective draws", "modes")}
    for j, (name, result) in enumerate(results.items()):
        exact, truth = result["exact"], log_normaliser(PROBLEMS[name]())
        for i, label in enumerate(methods):
            if label not in result:
                continue
            scores = result[label]
            found["energy"][i, j] = root_mean_square(scores["distance"])
            found["modes"][i, j] = modes_off(scores, exact).mean()
            if label != "exact":
                found["log Z"][i, j] = root_mean_square(scores["log_z"] - truth)
                found["effective draws"][i, j] = effective_draws(scores["features"], exact)
    return found


def draw_scores(found: dict[str, np.ndarray], methods: list[str], problems: list[str]):
    """Tables in colours."""
    titles = {
        "log Z": "error of log Z (root mean square)",
        "energy": "energy distance (root mean square)",
        "effective draws": "effective draws (more is better)",
        "modes": "shares of modes, total variation",
    }
    figure, panels = axes(2, 2, 5.6, 3.3)
    for axis, (name, title) in zip(panels, titles.items()):
        if np.isfinite(found[name]).any():
            heat(axis, found[name], methods, [problem.replace(", ", ",\n") for problem in problems], title)
        else:
            axis.set_axis_off()
    return figure


def draw_samples(results: dict[str, dict]):
    """The first two coordinates, a row for each problem; axes are those of exact draws."""
    labels = methods_of(results)
    figure, panels = axes(len(results), len(labels), 1.9, 1.9)
    for row, (name, result) in enumerate(results.items()):
        exact = result["exact"]["shown"]
        low, high = exact.min(0), exact.max(0)
        for column, label in enumerate(labels):
            axis = panels[row * len(labels) + column]
            if label not in result:
                axis.set_axis_off()
                continue
            axis.plot(*result[label]["shown"].T, ".", ms=1.5, alpha=0.5, color="0.3" if label == "exact" else "C0")
            axis.set(xlim=(low[0] - 1, high[0] + 1), ylim=(low[1] - 1, high[1] + 1), xticks=[], yticks=[])
            axis.set_title(label, fontsize=9)
        panels[row * len(labels)].set_ylabel(name, fontsize=8)
    return figure


def draw_forces(config: Forces, forces: dict):
    """On test points, against training."""
    figure, panels = axes(1, 2, 4.4, 3.2)
    steps = np.arange(1, config.looks + 1) * (config.steps // config.looks)
    for axis, key, title in zip(panels, ("force", "nll"), ("mean squared error of forces", "negative log-likelihood")):
        for i, (name, scores) in enumerate(forces.items()):
            axis.plot(steps, scores[key].mean(0), marker="o", ms=3, color=f"C{i}", label=f"{name} flow")
            axis.fill_between(steps, scores[key].min(0), scores[key].max(0), color=f"C{i}", alpha=0.15, lw=0)
        axis.set(xlabel="step", title=title)
    panels[0].set_yscale("log")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    config, folder = parse(Config, ROOT / "configs" / "transport" / "samplers", argv, out=ROOT / "runs" / "transport_samplers")
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    with Run(folder, config) as run:
        results = {name: compare(config, run, name) for name in config.problems or PROBLEMS}
        report(config, run, results, compare_forces(config, run) if config.forces.seeds else {})


def report(config: Config, run: Run, results: dict[str, dict], forces: dict[str, dict]) -> None:
    """Tables, figures and the page."""
    rows = [row for name, result in results.items() for row in rows_of(name, result)]
    of_forces = rows_of_forces(forces)
    run.results({"samplers": rows, "forces": of_forces})
    lead = f"{config.seeds} seeds, {config.budget} gradients each, training included; ± is twice the standard error over seeds."
    page = Report("Samplers at equal numbers of gradients", lead)
    page.heading("Scores")
    found, methods = scores_of(results), methods_of(results)
    figure = draw_scores(found, methods, list(results))
    page.figure(run.figure("scores", figure, {"problems": list(results), "methods": methods} | found), "Dark is small.")
    page.table(rows)
    page.text("Errors of log Z and of the ELBO: less the truth. as they come: the energy distance of draws without their weights.")
    page.text(
        "effective draws: independent ones with the same mean squared error. ESS: what the method itself would report. CPU seconds: of a seed, with"
    )
    page.text("its part of compiling. modes off: total variation between shares of modes and true ones, of many-well in the mean over pairs.")
    page.heading("Samples")
    shown = {name: {label: scores["shown"] for label, scores in result.items()} for name, result in results.items()}
    page.figure(run.figure("samples", draw_samples(results), shown), "The first seed, two coordinates; weighted draws are resampled.")
    if forces:
        page.heading("Forces")
        measures = {name: {key: scores[key] for key in ("force", "nll")} for name, scores in forces.items()}
        page.figure(run.figure("forces", draw_forces(config.forces, forces), measures), "On test points. Bands span the seeds.")
        page.table(of_forces)
    page.write(run.folder / "report.html")
    for row in rows:
        log_z = f"log Z {row['log Z error']:+.3f} ± {row['± log Z']:.3f}, " if np.isfinite(row.get("log Z error", np.nan)) else ""
        draws = f", effective draws {row['effective draws']:.3g}, {row['CPU seconds']:.1f} s" if "effective draws" in row else ""
        line = f"{row['problem']}, {row['method']}: {log_z}energy distance {row['energy distance']:.4f}{draws}"
        run.console.print(line, highlight=False, soft_wrap=True)
    for row in of_forces:
        line = f"forces, {row['flow']}: NLL {row['NLL']:.4f}, force MSE {row['force MSE']:.3f} ± {row['± force']:.3f}"
        run.console.print(line, highlight=False, soft_wrap=True)
    run.console.print(f"report: {run.folder / 'report.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
