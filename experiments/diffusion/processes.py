"""Which process? Each one trained with the same network, optimiser and budget, on eight Gaussians of the plane and on the digits (told their labels).

    python experiments/diffusion/processes.py [--preset smoke|default] [--out DIR] [--processes VP "flow matching" …] [--problems digits] …

Data are centred and scaled to unit variance, and all numbers are in these units. All processes sample deterministically with one network call a step,
each on one grid: the exponential Euler step (DDIM) where the process has one, else Euler's method. Networks have EDM's input and output scaling where
there is one, so that Gaussian processes on affine paths differ in nothing but the law of the training times, the weight and the grid. The scaling is
the default, for data of standard deviation ½: at 1 nothing linear is left to learn, and a network whose output starts at 0 then learns slowly. Over
several seeds, whose range the bands show:

- energy distance of samples to held-out data against network calls, beside that of fresh data;
- negative log-likelihood of held-out data with a little noise, by the probability flow, beside the exact one on the plane;
- curvature of the trajectories at the most calls, ∫|dx/dτ - (x₁ - x₀)|² dτ / |x₁ - x₀|² in the process's own time τ, scaled to [0, 1];
- calls needed: the fewest from which on the distance stays within two standard deviations of fresh data of what it is at the most calls.

Everything is written to DIR (see `ergodax.core.run`).
"""

import abc
import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lab
import numpy as np
import optax
import training
from jaxtyping import Array

from ergodax import data, diffusion as d, nn
from ergodax.core import (
    AffinePath,
    CosinePath,
    Denoiser,
    DenoiserTerm,
    EDMInput,
    EDMPath,
    EDMPrediction,
    ExactDivergence,
    Fit,
    FlowMatchingPath,
    HutchinsonDivergence,
    NoisePrediction,
    ProbabilityFlow,
    SubVPPath,
    VEPath,
    VPPath,
    given_pairs,
    integrate,
    log_likelihood,
    standard_normal_log_prob,
    stratified_times,
)
from ergodax.core.check import check_count, check_range
from ergodax.core.config import parse
from ergodax.core.report import Report
from ergodax.core.run import Run
from ergodax.diffusion.cvdm import CVDMLoss, LevelInput
from ergodax.diffusion.diffusion_time import TimesFrom, fit_gaussian_mixture
from ergodax.diffusion.fp_diffusion import ConstantFP, FPLoss, FPReverse
from ergodax.diffusion.kinetic_optimal_path import TRIGONOMETRIC
from ergodax.diffusion.linear_sde import perturbed


@dataclasses.dataclass(frozen=True)
class Budget:
    """Of one problem: network, training, and what is measured."""

    seeds: int = 8
    level: float = 0.02  # noise on the data whose likelihood is taken
    width: int = 128
    depth: int = 3
    steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 1e-3

    def __post_init__(self):
        for name in ("seeds", "width", "depth", "steps", "batch_size"):
            check_count(name, getattr(self, name))
        check_range("learning_rate", self.learning_rate, low=0.0, open_low=True)
        check_range("level", self.level, low=0.01)  # what some processes end with


@dataclasses.dataclass(frozen=True)
class Config:
    """`experiments/diffusion/processes.py`"""

    seed: int = 0
    processes: tuple[str, ...] = ()  # all of them if empty
    problems: tuple[str, ...] = tuple(lab.PROBLEMS)
    nfe: tuple[int, ...] = (3, 5, 7, 10, 15, 20, 30, 50, 100)
    samples: int = 512
    points: int = 128  # held-out ones, for the likelihood
    likelihood_steps: int = 100
    redraws: int = 64  # of fresh data, for the floor
    metric_nodes: int = 65  # of the kinetic optimal path's table
    metric_points: int = 1500  # of the data it is estimated from
    mixture_components: int = 8  # of each class, where a short diffusion ends
    plane: Budget = dataclasses.field(default_factory=Budget)
    digits: Budget = dataclasses.field(default_factory=lambda: Budget(seeds=4, level=0.05))

    def __post_init__(self):
        for name in ("points", "likelihood_steps", "metric_points", "mixture_components"):
            check_count(name, getattr(self, name))
        for name in ("samples", "redraws", "metric_nodes"):
            check_count(name, getattr(self, name), low=2)
        for nfe in self.nfe:
            check_count("nfe", nfe, low=2)
        if list(self.nfe) != sorted(set(self.nfe)):
            raise ValueError(f"`nfe` must increase, got {self.nfe}.")
        if unknown := sorted(set(self.processes) - set(PROCESSES)):
            raise ValueError(f"unknown `processes` {', '.join(unknown)}; there are {', '.join(PROCESSES)}.")
        if not self.problems or set(self.problems) - set(lab.PROBLEMS):
            raise ValueError(f"`problems` must be some of {', '.join(lab.PROBLEMS)}, got {', '.join(self.problems) or 'none'}.")

    def budget(self, problem: lab.Problem) -> Budget:
        """That of the problem."""
        return self.plane if problem.shape == (2,) else self.digits


# Processes


class Noised(NamedTuple):
    """An example as the process has it shortly before its end: a state from which a `point` = example + N(0, `covariance`) can be read.

    log p(point) = log p(state) + `correction`, or at least that where the state holds more than the point.
    """

    state: Array
    point: Array
    covariance: Array  # (d, d)
    correction: Array


class Flow(NamedTuple):
    """What a likelihood needs of a trained process, for one label."""

    velocity: Callable
    times: Array
    log_prior: Callable  # at times[0]
    noised: Callable  # (key, example) -> a `Noised` at times[-1]


class Process(eqx.Module):
    """The socket: how to train a process, and how to sample with what came of it. States, labels and keys are those of ONE example."""

    @abc.abstractmethod
    def model(self, problem: lab.Problem, size: Budget, key) -> Any:
        """What is trained."""

    @abc.abstractmethod
    def loss(self, model, batch, key):
        """As in `Fit`."""

    @abc.abstractmethod
    def time(self, i, n):
        """The time after `i` of `n` steps."""

    @abc.abstractmethod
    def start(self, model, key, label, shape):
        """A state to start sampling from."""

    @abc.abstractmethod
    def step(self, model, times, state, label):
        """One step, of one network call, between two times."""

    def data(self, state):
        """The data's part of a state."""
        return state

    def flow(self, model, label, config: Config, level: float, shape) -> Flow | None:
        """The flow and its ends, or None if the process has no density."""
        return None


def uniform(i, n):
    """Equal steps of all of [0, 1]."""
    return i / n


def uniform_inside(i, n):
    """Equal steps that leave out both ends, where clocks are infinite."""
    return 1e-3 + (1 - 2e-3) * i / n


def quadratic(i, n):
    """Finer towards the data."""
    return 1 - (1 - i / n) ** 2


def quadratic_times(num_steps: int, end):
    """Of a flow that need not start after 0."""
    return end * quadratic(jnp.arange(num_steps + 1.0), num_steps)


class Karras(eqx.Module):
    """Equal steps of the seventh root of σ, and one to 0."""

    path: EDMPath
    sigma_min: float = 0.002

    def __call__(self, i, n):
        high, low = self.path.sigma_max ** (1 / 7), self.sigma_min ** (1 / 7)
        level = (high + jnp.minimum(i / (n - 1), 1) * (low - high)) ** 7
        return jnp.where(i < n, 1 - level / self.path.sigma_max, 1.0)


class LogNormalTimes(eqx.Module):
    """EDM's law of the training times, ln σ ~ N(-1.2, 1.2²) for data of standard deviation ½, here for 1. Karras et al. 2022 (arXiv:2206.00364)."""

    path: AffinePath

    def __call__(self, key, n):
        normal = jax.scipy.stats.norm.ppf(stratified_times(key, n))
        return jnp.clip(self.path.time(-2 * (-1.2 + math.log(2) + 1.2 * normal)), 0.0, 1.0)


class GaussianStart(eqx.Module):
    """N(0, σ²)."""

    def sample(self, key, path, t, shape, label):
        return path.sigma(t) * jax.random.normal(key, shape)

    def log_prob(self, path, t, x, label):
        return standard_normal_log_prob(x, path.sigma(t))


class StudentStart(eqx.Module):
    """That of PFGM++, Student's t law of scale σ."""

    extra_dims: float

    def sample(self, key, path, t, shape, label):
        return d.pfgmpp_prior(key, path, (1, *shape), self.extra_dims)[0]

    def log_prob(self, path, t, x, label):
        n, m, scale2 = x.size, self.extra_dims, self.extra_dims * path.sigma(t) ** 2
        constant = jax.scipy.special.gammaln((n + m) / 2) - jax.scipy.special.gammaln(m / 2) - n / 2 * jnp.log(jnp.pi * scale2)
        return constant - (n + m) / 2 * jnp.log1p(jnp.sum(x**2) / scale2)


class MixtureStart(eqx.Module):
    """A mixture for each class, all stacked."""

    mixtures: data.GaussianMixture

    def _of(self, label):
        return jax.tree.map(lambda leaf: leaf[label], self.mixtures)

    def sample(self, key, path, t, shape, label):
        return self._of(label).sample(key).reshape(shape)

    def log_prob(self, path, t, x, label):
        return self._of(label).log_prob(x.reshape(-1))


def class_mixtures(key, problem: lab.Problem, transform: Callable, components: int, rows: int = 1000) -> data.GaussianMixture:
    """Mixtures fitted to what `transform(key, x) -> vector` makes of each class."""
    x, labels = problem.train

    @jax.jit
    def fit(key, label):
        key_rows, key_transform, key_fit = jax.random.split(key, 3)
        drawn = jax.random.categorical(key_rows, jnp.where(labels == label, 0.0, -jnp.inf), shape=(rows,))
        vectors = jax.vmap(transform)(jax.random.split(key_transform, rows), x[drawn])
        return fit_gaussian_mixture(key_fit, vectors, components, 50, ridge=1e-3)

    classes = problem.num_classes or 1
    fitted = [fit(k, label) for label, k in enumerate(jax.random.split(key, classes))]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *fitted)


def affine_noised(path: AffinePath, t, key, x) -> Noised:
    """α x + σ ε at t."""
    alpha, sigma = (jnp.broadcast_to(clock, x.shape) for clock in (path.alpha(t), path.sigma(t)))
    state = path.interpolate(t, x, jax.random.normal(key, x.shape))
    return Noised(state, state / alpha, jnp.diag((sigma / alpha).ravel() ** 2), jnp.sum(jnp.log(alpha)))


def ddim(denoised, path: AffinePath, times, state, label):
    """One step."""
    return integrate(DenoiserTerm(denoised, path, times), d.DDIM(), state, label)


class Affine(Process):
    """A path, with `DenoisingLoss`."""

    path: AffinePath
    grid: Callable = uniform
    times: Callable = stratified_times
    weight: Callable = d.uniform_weight
    coupling: Callable = given_pairs
    law: Any = GaussianStart()

    def _network(self, model):
        return EDMInput(model, self.path)

    def _denoiser(self, model):
        return Denoiser(self._network(model), self.path, EDMPrediction())

    def model(self, problem, size, key):
        return problem.network(size.width, size.depth, key)

    def loss(self, model, batch, key):
        loss = d.DenoisingLoss(self.path, EDMPrediction(), self.weight, self.times, self.coupling)
        return loss(self._network(model), batch, key)

    def time(self, i, n):
        return self.grid(i, n)

    def start(self, model, key, label, shape):
        return self.law.sample(key, self.path, self.grid(jnp.zeros(()), jnp.full((), 2.0)), shape, label)

    def step(self, model, times, state, label):
        return ddim(self._denoiser(model), self.path, times, state, label)

    def flow(self, model, label, config, level, shape):
        # from where no data can be seen: σ/α = 100, or the start
        first = jnp.maximum(self.path.log_snr(self.grid(jnp.zeros(()), jnp.full((), 2.0))), -2 * math.log(100))
        times = self.path.time(jnp.linspace(first, -2 * math.log(level), config.likelihood_steps + 1))
        return Flow(
            ProbabilityFlow(self._denoiser(model), self.path),
            times,
            lambda x: self.law.log_prob(self.path, times[0], x, label),
            lambda key, x: affine_noised(self.path, times[-1], key, x),
        )


class ScaledLevels(eqx.Module):
    """EDM's scaling round a network that is told γ: ε̂ = √(1 - γ) z/m + √γ F/(2 √m), m = 1 - ¾γ the variance of z."""

    network: Callable

    def __call__(self, t, z, args):
        gamma = args[1]
        total = 1 - 0.75 * gamma
        return (jnp.sqrt(1 - gamma) * z + jnp.sqrt(gamma * total) / 2 * self.network(t, z / jnp.sqrt(total), args)) / total


class LearnedSchedule(Process):
    """CVDM: a path for each label, learned."""

    def model(self, problem, size, key):
        model = training.RECIPES["CVDM"].model(problem, size, key)
        return d.CVDM(ScaledLevels(model.network), model.schedule)

    def loss(self, model, batch, key):
        return CVDMLoss()(model, batch, key)

    def time(self, i, n):
        return uniform_inside(i, n)

    def start(self, model, key, label, shape):
        return model.schedule.path(label).prior(key, shape)

    def _denoiser(self, model, path):
        return Denoiser(LevelInput(model.network, path), path, NoisePrediction())

    def step(self, model, times, state, label):
        path = model.schedule.path(label)
        return ddim(self._denoiser(model, path), path, times, state, label)

    def flow(self, model, label, config, level, shape):
        path = model.schedule.path(label)
        end = jnp.max(path.time(-2 * math.log(level)))  # where the last entry is there
        times = jnp.maximum(quadratic_times(config.likelihood_steps, end), 1e-4)
        return Flow(
            ProbabilityFlow(self._denoiser(model, path), path),
            times.at[0].set(0.5e-4),
            lambda x: standard_normal_log_prob(x),
            lambda key, x: affine_noised(path, end, key, x),
        )


def end_time(level_at: Callable, level: float):
    """Where the noise, which falls with t, is at `level`."""

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        above = level_at(middle) > level
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    return jax.lax.fori_loop(0, 24, halve, (jnp.zeros(()), jnp.ones(())))[0]


class ScaledNoise(eqx.Module):
    """EDM's scaling on a linear SDE: ε̂ = L⁻¹ (z - φ x̂), x̂ = (w·L⁻¹z + √(4 + |w|²) F)/(4 + |w|²), w = L⁻¹φ: F = 0 is best for x ~ N(0, ¼ I)."""

    network: Callable
    process: d.LinearSDE

    def __call__(self, t, z, args):
        mean, covariance = self.process.moments(t)
        factor, size = jnp.linalg.cholesky(covariance), jnp.sqrt(mean**2 + jnp.diag(covariance))

        def whiten(rows):
            return jax.scipy.linalg.solve_triangular(factor, rows.reshape(len(mean), -1), lower=True)

        white, weights = whiten(z), whiten(mean)[:, 0]
        total = 4 + jnp.sum(weights**2)
        scaled = self.network(t, z / size.reshape(-1, *[1] * (z.ndim - 1)), args)[0].reshape(1, -1)
        return (white - weights[:, None] * (weights @ white + jnp.sqrt(total) * scaled) / total).reshape(z.shape)


class Linear(Process):
    """A linear SDE with momenta, by the loss `(NoiseScore, batch, key)`. Its likelihood is a bound: the momenta are drawn as the process has them."""

    process: d.LinearSDE
    objective: Callable

    def _score(self, model):
        return d.NoiseScore(ScaledNoise(model, self.process), self.process)

    def _variables(self):
        return self.process.drift_matrix.shape[0]

    def model(self, problem, size, key):
        shape = (self._variables(), *problem.shape)
        return nn.TimeMLP(shape, size.width, size.depth, num_classes=problem.num_classes, key=key)

    def loss(self, model, batch, key):
        return self.objective(self._score(model), batch, key)

    def time(self, i, n):
        return uniform(i, n)

    def start(self, model, key, label, shape):
        return self.process.prior(key, shape)

    def step(self, model, times, state, label):
        return integrate(d.LinearSDETerm(self._score(model), self.process), d.ConjugateIntegrator(), state, label, times=times)

    def data(self, state):
        return state[0]

    def flow(self, model, label, config, level, shape):
        def kernel(t):
            mean, covariance = self.process.moments(t)
            return mean, jnp.linalg.cholesky(covariance)

        def level_at(t):
            mean, factor = kernel(t)
            return factor[0, 0] / mean[0]

        end, prior = end_time(level_at, level), jnp.linalg.cholesky(self.process.prior_covariance)
        size = math.prod(shape)

        def log_prior(z):
            white = jax.scipy.linalg.solve_triangular(prior, z.reshape(len(prior), -1), lower=True)
            return standard_normal_log_prob(white) - size * jnp.sum(jnp.log(jnp.diag(prior)))

        def noised(key, x):
            mean, factor = kernel(end)
            noise = jax.random.normal(key, (len(mean), *x.shape))
            state = perturbed(mean, factor, x, noise)
            momenta = standard_normal_log_prob(noise[1:]) - size * jnp.sum(jnp.log(jnp.diag(factor)[1:]))
            covariance = jnp.eye(size) * (factor[0, 0] / mean[0]) ** 2
            return Noised(state, state[0] / mean[0], covariance, size * jnp.log(mean[0]) - momenta)

        times = quadratic_times(config.likelihood_steps, end)
        return Flow(d.ReverseDrift(self._score(model), self.process), times, log_prior, noised)


class LearnedLinear(Process):
    """FP diffusion with constant matrices, learned. For few dimensions."""

    def model(self, problem, size, key):
        count = math.prod(problem.shape)
        process = ConstantFP(jnp.eye(count), jnp.zeros((count, count)))
        return d.NoiseScore(problem.network(size.width, size.depth, key), process)

    def loss(self, model, batch, key):
        return FPLoss()(model, batch, key)

    def time(self, i, n):
        return uniform(i, n)

    def start(self, model, key, label, shape):
        return jax.random.normal(key, shape)

    def step(self, model, times, state, label):
        return integrate(dfx.ODETerm(FPReverse(model, model.process)), dfx.Euler(), state, label, times=times)

    def flow(self, model, label, config, level, shape):
        like = jnp.zeros(shape)

        def kernel(t):
            mean, covariance = model.process.kernel(t, like)
            inverse = jnp.linalg.inv(mean)
            return mean, inverse, inverse @ covariance @ inverse.T

        end = end_time(lambda t: jnp.sqrt(jnp.trace(kernel(t)[2]) / like.size), level)

        def noised(key, x):
            mean, inverse, covariance = kernel(end)
            state = model.process.perturb(end, x, jax.random.normal(key, x.shape))
            return Noised(state, (inverse @ state.ravel()).reshape(shape), covariance, jnp.linalg.slogdet(mean)[1])

        return Flow(FPReverse(model, model.process), quadratic_times(config.likelihood_steps, end), standard_normal_log_prob, noised)


class NeuralFlow(Process):
    """NFDM: the forward process is learned too, by two smaller networks."""

    delta: float

    def model(self, problem, size, key):
        key_mean, key_scale, key_network, key_volatility = jax.random.split(key, 4)
        mean, scale = (problem.network(max(size.width // 2, 1), 1, key) for key in (key_mean, key_scale))
        forward = d.GaussianForward(mean, scale, self.delta)
        path = FlowMatchingPath(self.delta)  # near enough for the scaling of the network
        network = Denoiser(EDMInput(problem.network(size.width, size.depth, key_network), path), path, EDMPrediction())
        return d.NFDM(forward, network, d.Volatility(key=key_volatility))

    def loss(self, model, batch, key):
        return d.NFDMLoss(self.delta)(model, batch, key)

    def time(self, i, n):
        return uniform(i, n)

    def start(self, model, key, label, shape):
        return jax.random.normal(key, shape)

    def step(self, model, times, state, label):
        return integrate(dfx.ODETerm(d.NFDMDrift(model, 0.0)), dfx.Euler(), state, label, times=times)

    def flow(self, model, label, config, level, shape):
        def noised(key, x):
            state = x + self.delta * jax.random.normal(key, x.shape)
            return Noised(state, state, jnp.eye(x.size) * self.delta**2, jnp.zeros(()))

        return Flow(d.NFDMDrift(model, 0.0), quadratic_times(config.likelihood_steps, 1.0), standard_normal_log_prob, noised)


class Cold(Process):
    """Blurring, undone; it starts from images of one colour. It has no density."""

    degradation: d.GaussianBlur
    colours: MixtureStart

    def model(self, problem, size, key):
        return problem.network(size.width, size.depth, key)

    def loss(self, model, batch, key):
        return d.RestorationLoss(self.degradation)(model, batch, key)

    def time(self, i, n):
        return uniform(i, n)

    def start(self, model, key, label, shape):
        return d.constant_image_prior(key, _One(self.colours, label), (1, *shape))[0]

    def step(self, model, times, state, label):
        return integrate(d.Restoration(model, self.degradation), dfx.Euler(), state, label, times=times)


class _One(eqx.Module):
    """The colours of a class, as a law with n draws."""

    colours: MixtureStart
    label: Array

    def sample(self, key, n):
        return self.colours._of(self.label).sample(key, n)


def short_diffusion(config: Config, problem: lab.Problem, start: float = 0.6) -> Process:
    """VP, stopped early."""
    path = VPPath()

    def diffuse(key, x):
        return path.interpolate(jnp.asarray(start), x, jax.random.normal(key, x.shape)).ravel()

    mixtures = class_mixtures(jax.random.key(config.seed), problem, diffuse, config.mixture_components)
    return Affine(path, grid=lambda i, n: start + (1 - start) * i / n, times=TimesFrom(start), law=MixtureStart(mixtures))


def kinetic_optimal(config: Config, problem: lab.Problem) -> Process:
    """Its λ is that of some of the training data, without their labels."""
    points = problem.train[0][: config.metric_points].reshape(-1, math.prod(problem.shape))
    pairs = points[:256]
    mixture = data.GaussianMixture.isotropic(jnp.ones(len(points)), points, 0.0)
    metric = d.VelocityMetric(mixture.denoiser(TRIGONOMETRIC), pairs, jax.random.normal(jax.random.key(config.seed), pairs.shape))
    return Affine(d.fit_kinetic_optimal_path(metric, config.metric_nodes))


def blurring(config: Config, problem: lab.Problem) -> Process | None:
    """For images."""
    if len(problem.shape) != 3:
        return None
    colours = class_mixtures(jax.random.key(config.seed), problem, lambda key, x: jnp.mean(x, axis=(0, 1)), config.mixture_components)
    return Cold(d.GaussianBlur(float(max(problem.shape))), MixtureStart(colours))


def pfgmpp(config: Config, problem: lab.Problem) -> Process:
    """EDM with D = 128."""
    path = EDMPath()
    return Affine(path, Karras(path), LogNormalTimes(path), coupling=d.PFGMPPNoise(128.0), law=StudentStart(128.0))


def psld_loss(model, batch, key):
    """Hybrid score matching."""
    return d.HybridScoreLoss(model.process)(model.network, batch, key)


#: Name: `(config, problem) -> Process`, or None if the process is not for such data.
PROCESSES: dict[str, Callable] = {
    "VP": lambda config, problem: Affine(VPPath()),
    "sub-VP": lambda config, problem: Affine(SubVPPath()),
    "VE": lambda config, problem: Affine(VEPath()),
    "EDM": lambda config, problem: Affine(EDMPath(), Karras(EDMPath()), LogNormalTimes(EDMPath())),
    "cosine": lambda config, problem: Affine(CosinePath()),
    "flow matching": lambda config, problem: Affine(FlowMatchingPath()),
    "kinetic optimal": kinetic_optimal,
    "short diffusion": short_diffusion,
    "PFGM++": pfgmpp,
    "BFN": lambda config, problem: Affine(d.BayesianFlowPath(0.01), lambda i, n: 1e-4 + (1 - 1e-4) * i / n, weight=d.accuracy_weight),
    "CVDM": lambda config, problem: LearnedSchedule(),
    "NFDM": lambda config, problem: NeuralFlow(config.budget(problem).level),
    "FP diffusion": lambda config, problem: LearnedLinear() if problem.shape == (2,) else None,
    "PSLD": lambda config, problem: Linear(d.PSLD(), psld_loss),
    "MALDA": lambda config, problem: Linear(d.malda(), d.LikelihoodLoss()),
    "cold diffusion": blurring,
}


# Measures


def standardised(problem: lab.Problem) -> tuple[lab.Problem, Any]:
    """The problem with data of mean 0 and variance 1 over all entries, and the exact law on the plane."""
    x, labels = problem.train
    mean, std = jnp.mean(x, axis=0), jnp.std(x - jnp.mean(x, axis=0))

    def scaled(x):
        return (x - mean) / std

    law = None
    if problem.shape == (2,):
        exact = data.eight_gaussians()
        law = data.GaussianMixture(exact.weights, scaled(exact.means), exact.covariances / std**2)
    return (
        dataclasses.replace(
            problem,
            train=(scaled(x), labels),
            reference=scaled(problem.reference),
            fresh=lambda key, n: scaled(problem.fresh(key, n)),
        ),
        law,
    )


def measures(config: Config, problem: lab.Problem, law, process: Process, model, key) -> dict[str, Array]:
    """Of one trained model."""
    key_labels, key_starts, key_likelihood = jax.random.split(key, 3)
    labels = jax.random.choice(key_labels, problem.train[1], (config.samples,))
    starts = jax.vmap(lambda k, label: process.start(model, k, label, problem.shape))(jax.random.split(key_starts, config.samples), labels)

    def advance(i, n, states, labels):
        times = jnp.stack([process.time(j.astype(float), n) for j in (i, i + 1)])
        return jax.vmap(lambda state, label: process.step(model, times, state, label))(states, labels)

    keeps = problem.shape == (2,)

    def solve(n):
        # one program for all numbers of steps
        def body(i, carry):
            before, action, kept = carry
            after = advance(i, n.astype(float), before, labels)
            moved = jax.vmap(process.data)(after) - jax.vmap(process.data)(before)
            length = process.time((i + 1).astype(float), n.astype(float)) - process.time(i.astype(float), n.astype(float))
            kept = jax.lax.dynamic_update_index_in_dim(kept, shown(after), i + 1, 0) if keeps else kept
            return after, action + jnp.sum(moved**2) / length, kept

        def shown(states):
            return jax.vmap(process.data)(states[:SHOWN])

        kept = jnp.broadcast_to(shown(starts), (config.nfe[-1] + 1 if keeps else 1, *shown(starts).shape))
        final, action, kept = jax.lax.fori_loop(0, n, body, (starts, jnp.zeros(()), kept))
        final, first = (jax.vmap(process.data)(states) for states in (final, starts))
        span = process.time(n.astype(float), n.astype(float)) - process.time(jnp.zeros(()), n.astype(float))
        curvature = span * action / jnp.sum((final - first) ** 2) - 1
        return {
            "distance": data.energy_distance(final, problem.reference),
            "curvature": curvature,
            "paths": kept if keeps else final[None, :SHOWN],
        }

    solved = jax.lax.map(solve, jnp.asarray(config.nfe))
    out = {"distance": solved["distance"], "curvature": solved["curvature"][-1], "paths": solved["paths"][-1], "labels": labels[:SHOWN]}
    level = config.budget(problem).level

    def nll(key, x, label):
        flow = process.flow(model, label, config, level, problem.shape)
        if flow is None:
            return None
        key_noise, key_probe = jax.random.split(key)
        noised = flow.noised(key_noise, x)
        divergence = ExactDivergence() if x.size == 2 else HutchinsonDivergence(key_probe)
        log_prob, _ = log_likelihood(flow.velocity, noised.state, flow.log_prior, flow.times, dfx.Heun(), label, divergence)
        exact = jnp.nan if law is None else -data.GaussianMixture(law.weights, law.means, law.covariances + noised.covariance).log_prob(noised.point)
        return -log_prob - noised.correction, exact

    points, their_labels = held_out(problem, config)
    scores = jax.vmap(nll)(jax.random.split(key_likelihood, len(points)), points, their_labels)
    if scores is not None:
        out |= {"nll": jnp.mean(scores[0]), "exact_nll": jnp.mean(scores[1])}
    return out


SHOWN = 24


def fitting(budget: Budget, loss, model, batch) -> Fit:
    """The optimiser and budget that all share."""
    rate = optax.warmup_cosine_decay_schedule(0.0, budget.learning_rate, budget.steps // 20, budget.steps)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    return Fit(loss, model, optimiser, batch, every=budget.steps, ema_decay=0.999)


def held_out(problem: lab.Problem, config: Config):
    """Points that no model was trained on, with their labels."""
    labels = data.digits().test_y if problem.num_classes else jnp.zeros(len(problem.reference), int)
    rows = np.random.default_rng(config.seed).permutation(len(problem.reference))[: config.points]
    return problem.reference[rows], jnp.asarray(labels)[rows]


def compare(config: Config, run: Run, name: str) -> dict[str, dict]:
    """All processes on one problem: `process` -> its measures for all seeds, and the `floor`."""
    problem, law = standardised(lab.PROBLEMS[name]())
    budget, out = config.budget(problem), {}

    def floor():
        scores = lab.floor(jax.random.key(config.seed), problem.fresh, config.samples, problem.reference, config.redraws)
        return {"energy_distance": scores["energy_distance"]}

    floors = run.stage(f"{name}, floor", floor)
    for label in config.processes or PROCESSES:

        def batch(key, step):
            rows = jax.random.randint(key, (budget.batch_size,), 0, len(problem.train[0]))
            return jax.tree.map(lambda leaf: leaf[rows], problem.train)

        def stage(label=label):
            process = PROCESSES[label](config, problem)
            if process is None:
                return {}

            def train(key):
                key_model, key_run, key_measures = jax.random.split(key, 3)
                model = process.model(problem, budget, key_model)
                done = fitting(budget, process.loss, model, batch).run(key_run, budget.steps)
                scores = measures(config, problem, law, process, done.average, key_measures)
                return scores | {"loss": done.metrics["loss"][-1], "failed_at": done.failed_at}

            return lab.over_seeds(run, f"{name}: {label}", train, budget.seeds)

        if scores := run.stage(f"{name}, {label}", stage):
            out[label] = scores
    return {"floor": floors, "processes": out}


# What came of it


def needed(config: Config, distances: np.ndarray, noise: float) -> np.ndarray:
    """For each seed the fewest calls from which on the distance is no more than `noise` above what it is at the most; (seeds, calls) -> (seeds,)."""
    good = distances <= distances[:, -1:] + noise
    stays = np.flip(np.logical_and.accumulate(np.flip(good, 1), axis=1), 1)
    return np.where(good[:, -1], np.asarray(config.nfe)[np.argmax(stays, axis=1)], np.nan)


def rows_of(config: Config, name: str, result: dict) -> list[dict]:
    """A row for each process."""
    floor = result["floor"]["energy_distance"]
    rows = []
    for process, scores in result["processes"].items():
        calls = needed(config, scores["distance"], 2 * floor.std(ddof=1))
        row = {"problem": name, "process": process, "failed seeds": int((scores["failed_at"] >= 0).sum())}
        for nfe, values in zip(config.nfe, scores["distance"].T):
            row |= {f"NFE {nfe}": (distance := training.mean_of(values))["mean"], f"± at {nfe}": distance["±"]}
        row |= {"calls needed": float(np.median(calls)), "fewest": float(calls.min()), "most": float(calls.max())}
        row |= {"curvature": (curvature := training.mean_of(scores["curvature"]))["mean"], "± curvature": curvature["±"]}
        nll = training.mean_of(scores["nll"]) if "nll" in scores else {"mean": None, "±": None}
        exact = float(scores["exact_nll"].mean()) if "exact_nll" in scores else np.nan
        row |= {"nats": nll["mean"], "± nats": nll["±"], "exact nats": None if np.isnan(exact) else exact}
        rows.append(row)
    return rows


def style(i: int) -> dict:
    """Of the i-th process."""
    return {"color": f"C{i % 8}", "ls": ("-", "--", ":")[i // 8 % 3], "marker": "os^"[i // 8 % 3], "ms": 3.5, "lw": 1.3}


def draw_distances(config: Config, results: dict[str, dict]):
    """Mean over seeds, and the band of them all, against network calls."""
    figure, panels = lab.axes(1, len(results), width=6.0, height=4.4)
    for axis, (name, result) in zip(panels, results.items()):
        floor = result["floor"]["energy_distance"]
        low = max(np.quantile(floor, 0.95), floor.std())
        for process, scores in result["processes"].items():
            values, line = scores["distance"], style(list(PROCESSES).index(process))
            axis.plot(config.nfe, values.mean(0), label=process, **line)
            axis.fill_between(config.nfe, np.maximum(values.min(0), low / 10), values.max(0), color=line["color"], alpha=0.15, lw=0)
        axis.axhspan(max(np.quantile(floor, 0.05), low / 3), low, color="0.85", zorder=0)
        axis.set(xscale="log", yscale="log", ylim=(low / 3, 5.0), xlabel="network calls", title=name)
        axis.set_xticks(config.nfe, [str(nfe) for nfe in config.nfe])
        axis.minorticks_off()
    panels[0].set_ylabel("energy distance")
    panels[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def draw_curvature(config: Config, rows: list[dict]):
    """Does the one foretell the other?"""
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    figure, panels = lab.axes(1, len(problems), width=6.0, height=4.4)
    for axis, problem in zip(panels, problems):
        for i, row in enumerate(sorted((row for row in rows if row["problem"] == problem), key=lambda row: row["curvature"])):
            line = style(list(PROCESSES).index(row["process"])) | {"ls": "none", "ms": 6}
            spread = [[row["calls needed"] - row["fewest"]], [row["most"] - row["calls needed"]]]
            axis.errorbar([row["curvature"]], [row["calls needed"]], yerr=spread, elinewidth=0.8, **line)
            axis.annotate(
                row["process"], (row["curvature"], row["calls needed"]), xytext=(4, (4, -10, 13)[i % 3]), textcoords="offset points", fontsize=7.5
            )
        axis.set(xscale="log", yscale="log", xlabel="curvature in its own time", title=problem)
        axis.set_yticks(config.nfe, [str(nfe) for nfe in config.nfe])
        axis.minorticks_off()
    panels[0].set_ylabel("network calls needed")
    return figure


def draw_paths(processes: dict[str, dict], columns: int = 5, reach: float = 2.6):
    """A few trajectories of the first seed."""
    columns = min(columns, len(processes))
    figure, panels = lab.axes(math.ceil(len(processes) / columns), columns, width=2.3, height=2.4)
    for axis, (process, scores) in zip(panels, processes.items()):
        path = scores["paths"][0]
        axis.plot(path[..., 0], path[..., 1], lw=0.7, color="C0", alpha=0.7)
        axis.plot(*path[0].T, "o", ms=2.5, color="0.5")
        axis.plot(*path[-1].T, "o", ms=2.5, color="C3")
        axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
        axis.set_title(process, fontsize=9)
    for axis in panels[len(processes) :]:
        axis.axis("off")
    return figure


def draw_images(processes: dict[str, dict]):
    """Samples of the first seed, by label."""
    figure, panels = lab.axes(len(processes), 1, width=9.0, height=0.5)
    real = np.asarray(data.digits().train_x)
    mean, std = real.mean(0), (real - real.mean(0)).std()
    for axis, (process, scores) in zip(panels, processes.items()):
        images = scores["paths"][0, -1][np.argsort(scores["labels"][0], kind="stable")]
        images = (images * std + mean)[..., 0]
        axis.imshow(np.concatenate(np.pad(images, [(0, 0), (1, 1), (1, 1)]), axis=1), cmap="gray", vmin=-1, vmax=1)
        axis.set_ylabel(process, rotation=0, ha="right", va="center", fontsize=9)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    config, folder = parse(Config, lab.ROOT / "configs" / "diffusion" / "processes", argv, out=lab.ROOT / "runs" / "diffusion_processes")
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    with Run(folder, config) as run:
        report(config, run, {name: compare(config, run, name) for name in config.problems})


def report(config: Config, run: Run, results: dict[str, dict]) -> None:
    """Tables, figures and the page."""
    rows = [row for name, result in results.items() for row in rows_of(config, name, result)]
    floors = {name: result["floor"]["energy_distance"] for name, result in results.items()}
    run.results({"processes": rows, "floors": floors})
    distances = {name: {process: scores["distance"] for process, scores in result["processes"].items()} for name, result in results.items()}
    page = Report(
        "Processes",
        "Each with the same network, optimiser and budget; one network call a step. Energy distances are unbiased: fresh data score about 0 on the "
        f"plane. {config.plane.seeds} seeds on the plane, {config.digits.seeds} on the digits; bands span the seeds.",
    )
    page.heading("Energy distance against network calls")
    page.figure(run.figure("distance", draw_distances(config, results), {"nfe": config.nfe, "distance": distances}), "Grey: fresh data.")
    page.heading("Does curvature foretell the calls needed?")
    caption = "Median over seeds, fewest and most. Where the noise is far larger than the data (VE, EDM, PFGM++), it hides the bend at the end."
    page.figure(run.figure("curvature", draw_curvature(config, rows), {"rows": rows}), caption)
    for name, result in results.items():
        kind = "paths" if name == "eight Gaussians" else "images"
        page.heading(name)
        draw, caption = {
            "paths": (draw_paths, "From noise (grey) to data (red), the first seed. Those of large noise start far outside."),
            "images": (draw_images, "Samples by label, the first seed."),
        }[kind]
        shown = {process: scores["paths"][0] for process, scores in result["processes"].items()}
        page.figure(run.figure(f"{kind}_{name.replace(' ', '_')}", draw(result["processes"]), shown), caption)
        page.text(
            f"Fresh data: energy distance {np.mean(floors[name]):.2g} ± {np.std(floors[name], ddof=1):.2g}. Likelihoods are of data with noise "
            f"{(config.plane if kind == 'paths' else config.digits).level:g} on them; those of PSLD and MALDA are upper bounds of the nats."
        )
        page.table([row for row in rows if row["problem"] == name], sortable=True)
    page.write(run.folder / "report.html")
    for row in rows:
        nats = "" if row["nats"] is None else f", {row['nats']:.2f} nats" + ("" if row["exact nats"] is None else f" (exact {row['exact nats']:.2f})")
        shown = " ".join(f"{row[f'NFE {nfe}']:.2g}" for nfe in config.nfe)
        line = f"{row['problem']}, {row['process']}: distance {shown}; {row['calls needed']:.0f} calls needed; curvature {row['curvature']:.2g}{nats}"
        run.console.print(line, highlight=False, soft_wrap=True)
    run.console.print(f"report: {run.folder / 'report.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
