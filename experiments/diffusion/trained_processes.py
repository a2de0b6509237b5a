"""The processes that `processes.py` compares, each behind one socket, `Process`: what is trained, how, and how one samples with what came of it.

`PROCESSES` names them. An affine path, a linear SDE, a learned one, a flow and a degradation each have their class; the rest are arguments.
"""

import abc
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lab
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
    FlowMatchingPath,
    NoisePrediction,
    ProbabilityFlow,
    SubVPPath,
    VEPath,
    VPPath,
    given_pairs,
    integrate,
    standard_normal_log_prob,
    stratified_times,
)
from ergodax.diffusion.cvdm import CVDMLoss, LevelInput
from ergodax.diffusion.diffusion_time import TimesFrom, fit_gaussian_mixture
from ergodax.diffusion.fp_diffusion import ConstantFP, FPLoss, FPReverse
from ergodax.diffusion.kinetic_optimal_path import TRIGONOMETRIC
from ergodax.diffusion.linear_sde import perturbed


if TYPE_CHECKING:
    from processes import Budget, Config


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
    def model(self, problem: lab.Problem, size: "Budget", key) -> Any:
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

    def flow(self, model, label, config: "Config", level: float, shape) -> Flow | None:
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


def short_diffusion(config: "Config", problem: lab.Problem, start: float = 0.6) -> Process:
    """VP, stopped early."""
    path = VPPath()

    def diffuse(key, x):
        return path.interpolate(jnp.asarray(start), x, jax.random.normal(key, x.shape)).ravel()

    mixtures = class_mixtures(jax.random.key(config.seed), problem, diffuse, config.mixture_components)
    return Affine(path, grid=lambda i, n: start + (1 - start) * i / n, times=TimesFrom(start), law=MixtureStart(mixtures))


def kinetic_optimal(config: "Config", problem: lab.Problem) -> Process:
    """Its λ is that of some of the training data, without their labels."""
    points = problem.train[0][: config.metric_points].reshape(-1, math.prod(problem.shape))
    pairs = points[:256]
    mixture = data.GaussianMixture.isotropic(jnp.ones(len(points)), points, 0.0)
    metric = d.VelocityMetric(mixture.denoiser(TRIGONOMETRIC), pairs, jax.random.normal(jax.random.key(config.seed), pairs.shape))
    return Affine(d.fit_kinetic_optimal_path(metric, config.metric_nodes))


def blurring(config: "Config", problem: lab.Problem) -> Process | None:
    """For images."""
    if len(problem.shape) != 3:
        return None
    colours = class_mixtures(jax.random.key(config.seed), problem, lambda key, x: jnp.mean(x, axis=(0, 1)), config.mixture_components)
    return Cold(d.GaussianBlur(float(max(problem.shape))), MixtureStart(colours))


def pfgmpp(config: "Config", problem: lab.Problem) -> Process:
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
