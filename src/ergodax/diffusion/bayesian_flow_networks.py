"""Bayesian flow networks: a network reads the parameters of a belief that noisy observations update. Graves, Srivastava, Atkinson, Gomez 2023.

arXiv:2308.07037. For every variable of the data a sender gives observations of growing total accuracy β(t), and Bayes' rule updates a factorised
belief about it. The network sees the belief and says what the data may be, all variables jointly; a receiver that draws from what the network says
replaces the sender when sampling. The state of the belief is an affine path in our sense, with β its signal-to-noise ratio:

- Continuous data, belief N(μ, 1/ρ) from N(0, 1): ρ = 1 + β = σ₁^{-2t}, γ = 1 - 1/ρ,
      μ ~ N(γ x, γ (1 - γ) I)   (`BayesianFlowPath`: α = γ, σ² = γ (1 - γ), snr = β).
- Classes 1 … K, belief θ = softmax(y): with m = K e_x - 1 and β = β₁ t²,
      y ~ N(β m, β K I)   (`CategoricalFlowPath`: α = β, σ² = β K, snr = β/K).

So the loss, the paper's L^∞ in nats (E_t ½ snr'(t) ‖x - x̂‖², that is -ln σ₁ E σ₁^{-2t} ‖x - x̂‖² and K β₁ E t ‖e_x - ê‖²), is `DenoisingLoss` with
`accuracy_weight`; times the number of entries of an example, for it takes their mean. An update over a step of accuracy a is the posterior of
diffusion models: `Ancestral()` for continuous data, and `BayesianUpdate` where the receiver draws before it sends. In one line each:

    loss = DenoisingLoss(BayesianFlowPath(), NoisePrediction(), weight=accuracy_weight)                # loss(network, batch, key)
    loss = DenoisingLoss(path, DataPrediction(), weight=accuracy_weight)    # loss(CategoricalOutput(network), centred_one_hot(labels, K), key)
    term = DenoiserTerm(CategoricalOutput(network), path, uniform_grid(100))
    y = integrate(term, BayesianUpdate(categorical_draw), path.prior(key, shape), key=key)                # y: logits of the last belief

and so every other solver and grid. `StepTimes` and `StepWeight` make L^∞ the n-step loss L^n of continuous data; that of classes is
`CategoricalStepLoss`. At t = 0 the belief holds nothing, γ = 0: the clocks are kept at the smallest number above it, which makes every formula
finite.

Left out: the n-step loss of discretised data, whose receiver is a mixture over the bins."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..core.batch import stratified_times
from ..core.check import check_count, check_range
from ..core.path import AffinePath
from ..core.prediction import Prediction
from ..core.types import PRNGKey, PyTree, Scalar, Time, VectorField
from .draw import draw
from .solver import NoisyDenoiserSolver, clocks, finish, unit_noise


def _above_zero(value):
    return jnp.maximum(value, jnp.finfo(value.dtype).tiny)


class BayesianFlowPath(AffinePath):
    """The mean of a Gaussian belief: α = γ, σ² = γ (1 - γ), 1 - γ = `final_std`^{2t}.

    `final_std` is σ₁ in (0, 1), what is left of the belief's N(0, 1) at t = 1; default 1e-3, theirs for data in [-1, 1] with 256 levels.
    """

    final_std: Scalar = 1e-3

    def __check_init__(self):
        check_range("final_std", self.final_std, low=0.0, high=1.0, open_low=True, open_high=True)

    def _log_variance(self, t):
        t = jnp.asarray(t)
        return 2 * t * jnp.log(jnp.asarray(self.final_std, t.dtype))

    def alpha(self, t):
        return _above_zero(-jnp.expm1(self._log_variance(t)))

    def sigma(self, t):
        return jnp.exp(self.log_sigma(t))

    def log_alpha(self, t):
        return jnp.log(self.alpha(t))

    def log_sigma(self, t):
        return (self.log_alpha(t) + self._log_variance(t)) / 2

    def time(self, log_snr):
        # 1 - γ = 1/(1 + snr)
        return -jax.nn.softplus(jnp.asarray(log_snr)) / (2 * jnp.log(self.final_std))


class CategoricalFlowPath(AffinePath):
    """The logits y of a belief over K classes, with data m = K e_x - 1: α = β, σ² = K β, β = `accuracy` t².

    - `num_classes` (static): K >= 2.
    - `accuracy`: β₁ > 0, the total accuracy; default 3, theirs for binary images (0.75 for their 27 characters).
    """

    num_classes: int = eqx.field(static=True)
    accuracy: Scalar = 3.0

    def __check_init__(self):
        check_count("num_classes", self.num_classes, low=2)
        check_range("accuracy", self.accuracy, low=0.0, open_low=True)

    def alpha(self, t):
        t = jnp.asarray(t)
        return _above_zero(jnp.asarray(self.accuracy, t.dtype) * t**2)

    def sigma(self, t):
        return jnp.sqrt(self.num_classes * self.alpha(t))

    def log_alpha(self, t):
        return jnp.log(self.alpha(t))

    def log_sigma(self, t):
        return jnp.log(self.num_classes * self.alpha(t)) / 2

    def time(self, log_snr):
        return jnp.sqrt(self.num_classes * jnp.exp(jnp.asarray(log_snr)) / self.accuracy)


def accuracy_weight(path: AffinePath, prediction: Prediction, t: Float[Array, "..."]) -> Float[Array, "..."]:
    """½ snr'(t) of the squared error of the data, for a network of any parametrisation: nats per entry, on any path."""
    return path.snr(t) * (path.d_log_alpha(t) - path.d_log_sigma(t)) * _data_error(path, prediction, t)


def _data_error(path, prediction, t):
    """What a squared error of the network is as one of the data, (b/d)²."""
    _, b, d = prediction.coefficients(path, t)
    return (b / d) ** 2


class StepTimes(eqx.Module):
    """`(key, n) -> (n,)`: the starts (i - 1)/N of `num_steps` = N steps, equally often."""

    num_steps: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("num_steps", self.num_steps)

    def __call__(self, key: PRNGKey, n: int) -> Float[Array, " n"]:
        """The stratified times of [0, 1], each at the start of its step."""
        return jnp.clip(jnp.floor(stratified_times(key, n) * self.num_steps), 0, self.num_steps - 1) / self.num_steps


class StepWeight(eqx.Module):
    """N/2 (snr(t + 1/N) - snr(t)) of the squared error of the data: with `StepTimes(N)`, L^N of continuous data in nats per entry."""

    num_steps: int = eqx.field(static=True)

    def __call__(self, path: AffinePath, prediction: Prediction, t: Float[Array, "..."]) -> Float[Array, "..."]:
        """As `accuracy_weight`, which is its limit."""
        return self.num_steps / 2 * (path.snr(t + 1 / self.num_steps) - path.snr(t)) * _data_error(path, prediction, t)


def centred_one_hot(labels: Int[Array, "*x"], num_classes: int, dtype=None) -> Float[Array, "*x classes"]:
    """K e_x - 1, what `CategoricalFlowPath` takes for data."""
    dtype = jnp.result_type(float) if dtype is None else dtype
    return num_classes * jax.nn.one_hot(labels, num_classes, dtype=dtype) - 1


class ClippedOutput(eqx.Module):
    """A denoiser of continuous data within [`low`, `high`], and 0 before `min_time`, where a noise prediction says nothing of the data.

    Defaults -1, 1 and 1e-6, theirs.
    """

    denoised: VectorField
    low: Scalar = -1.0
    high: Scalar = 1.0
    min_time: Scalar = 1e-6

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """x̂, of the shape of `x`."""
        t, low, high, start = (jnp.asarray(value, x.dtype) for value in (t, self.low, self.high, self.min_time))
        return jnp.where(t < start, jnp.zeros_like(x), jnp.clip(self.denoised(jnp.maximum(t, start), x, args), low, high))


class DiscretisedOutput(eqx.Module):
    """A denoiser for continuous data of `num_bins` equally spaced levels in [-1, 1]: the mean of the bins' centres under the network's normal.

    - `network`: `(t, x, args) -> (2, *x)`, mean m and log standard deviation l of the noise. They stand for the data's mean x/γ - s m and
      standard deviation s e^l, s = √((1 - γ)/γ); before `min_time`, for 0 and 1.
    - `path`: any affine path; the paper's is `BayesianFlowPath`.
    - `min_std`: of the data, at least; default 1e-3, theirs.
    """

    network: VectorField
    path: AffinePath
    num_bins: int = eqx.field(static=True)
    min_std: Scalar = 1e-3
    min_time: Scalar = 1e-6

    def __check_init__(self):
        check_count("num_bins", self.num_bins, low=2)
        check_range("min_std", self.min_std, low=0.0, open_low=True)

    def probabilities(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x bins"]:
        """The mass of every bin; the tails belong to the outer ones."""
        t, start = jnp.asarray(t, x.dtype), jnp.asarray(self.min_time, x.dtype)
        later = jnp.maximum(t, start)
        noise, log_std = self.network(later, x, args)
        alpha, sigma = self.path.alpha(later), self.path.sigma(later)
        mean = jnp.where(t < start, 0, (x - sigma * noise) / alpha)
        std = jnp.maximum(jnp.where(t < start, 1, sigma / alpha * jnp.exp(log_std)), jnp.asarray(self.min_std, x.dtype))
        edges = -1 + 2 * jnp.arange(1, self.num_bins, dtype=x.dtype) / self.num_bins
        below = jax.scipy.stats.norm.cdf((edges - mean[..., None]) / std[..., None])
        return jnp.diff(below, axis=-1, prepend=jnp.zeros_like(x)[..., None], append=jnp.ones_like(x)[..., None])

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """x̂, of the shape of `x`."""
        centres = -1 + (2 * jnp.arange(self.num_bins, dtype=x.dtype) + 1) / self.num_bins
        return jnp.sum(self.probabilities(t, x, args) * centres, axis=-1)


class CategoricalOutput(eqx.Module):
    """A denoiser for classes: `network(t, θ, args)` gives logits of shape (*x, K) from the belief θ = softmax(y)."""

    network: VectorField

    def log_probabilities(self, t: Time, y: Float[Array, "*x classes"], args: PyTree = None) -> Float[Array, "*x classes"]:
        """log ê."""
        return jax.nn.log_softmax(self.network(t, jax.nn.softmax(y, axis=-1), args), axis=-1)

    def __call__(self, t: Time, y: Float[Array, "*x classes"], args: PyTree = None) -> Float[Array, "*x classes"]:
        """E[m] = K ê - 1."""
        return y.shape[-1] * jnp.exp(self.log_probabilities(t, y, args)) - 1


def mean_output(denoised: Float[Array, "*x"], noise: Float[Array, "*x"]) -> Float[Array, "*x"]:
    """The mean itself: the receiver of continuous data."""
    return denoised


def categorical_draw(denoised: Float[Array, "*x classes"], noise: Float[Array, "*x classes"]) -> Float[Array, "*x classes"]:
    """m = K e_k - 1 with k drawn from ê = (D + 1)/K, by Gumbel noise made of N(0, 1)."""
    k = denoised.shape[-1]
    gumbel = -jnp.log(-jax.scipy.stats.norm.logcdf(noise))
    probabilities = jnp.maximum((denoised + 1) / k, 0)
    return k * jax.nn.one_hot(jnp.argmax(jnp.log(probabilities) + gumbel, axis=-1), k, dtype=denoised.dtype) - 1


class BayesianUpdate(NoisyDenoiserSolver):
    """The receiver draws data m, sends them with the accuracy a = snr₁ - snr₀ of the step, and the belief is updated; one network call per step.

        x₁ α₁/σ₁² = x₀ α₀/σ₀² + a m + √a z,   that is   μ₁ = (ρ₀ μ₀ + a m + √a z)/ρ₁   and   y₁ = y₀ + K a m + K √a z.

    `output` is `(denoised, noise) -> m` with noise from N(0, I): `mean_output` (default; then this is `Ancestral()`) or `categorical_draw`.
    """

    output: Callable = mean_output

    def order(self, terms):
        """1, in law."""
        return 1

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step from index `t0` to `t1`. Two independent noises: the increments over the halves of the step."""
        model, noise = terms.terms
        step, middle = clocks(model, t0, t1, y0), (t0 + t1) / 2
        data = self.output(model.vf(t0, y0, args).denoised, unit_noise(noise, t0, middle))
        share = -jnp.expm1(-2 * step.h)  # a/snr₁
        kept = jnp.exp(step.log_alpha0 - step.log_alpha1 + 2 * (step.log_sigma1 - step.log_sigma0))
        sent = jnp.exp(step.log_alpha1) * share * data + jnp.exp(step.log_sigma1) * jnp.sqrt(share) * unit_noise(noise, middle, t1)
        return finish(y0, kept * y0 + sent)


class CategoricalStepLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {})`: the N-step loss L^N for classes, in nats per example; from above it falls to L^∞ as N grows.

        L^N = N E_i KL(sender of x ‖ Σ_k ê_k sender of k),   belief at t = (i - 1)/N, accuracy β(i/N) - β((i - 1)/N),

    with the divergence estimated from one observation. Summed over the variables.

    - `model`: a `CategoricalOutput`, or anything with its `log_probabilities`.
    - `batch`: `centred_one_hot` data of shape (B, *x, K), or a pair (data, args).

    Raises `ValueError` for a count below 1.
    """

    path: CategoricalFlowPath
    num_steps: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("num_steps", self.num_steps)

    def __call__(self, model: CategoricalOutput, batch: PyTree, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        key_belief, key_sender = jax.random.split(key)
        times, data, noise, args = draw(batch, key_belief, StepTimes(self.num_steps))
        k = data.shape[-1]
        observed = jax.random.normal(key_sender, (data.size,), data.dtype).reshape(data.shape)

        def one(t, m, x0, z, condition):
            log_probs = model.log_probabilities(t, self.path.interpolate(t, m, x0), condition)
            accuracy = k * (self.path.snr(t + 1 / self.num_steps) - self.path.snr(t))
            truth = (m + 1) / k
            # log of sender over receiver: |δ_k|² and δ_k·z of the distance to class k, in units of the sender's noise
            gap = jnp.sqrt(accuracy * k) * (jnp.sum(truth * z, axis=-1, keepdims=True) - z)
            return -jnp.sum(jax.nn.logsumexp(log_probs - accuracy * k * (1 - truth) - gap, axis=-1))

        return self.num_steps * jnp.mean(jax.vmap(one)(times, data, noise, observed, args)), {}


class CategoricalReconstructionLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {})`: -E log ê_x at t = 1, the nats per example that the last belief leaves. Arguments as above."""

    path: CategoricalFlowPath

    def __call__(self, model: CategoricalOutput, batch: PyTree, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        times, data, noise, args = draw(batch, key, lambda key, n: jnp.ones(n))

        def one(t, m, x0, condition):
            return -jnp.sum((m + 1) / m.shape[-1] * model.log_probabilities(t, self.path.interpolate(t, m, x0), condition))

        return jnp.mean(jax.vmap(one)(times, data, noise, args)), {}


__all__ = [
    "BayesianFlowPath",
    "BayesianUpdate",
    "CategoricalFlowPath",
    "CategoricalOutput",
    "CategoricalReconstructionLoss",
    "CategoricalStepLoss",
    "ClippedOutput",
    "DiscretisedOutput",
    "StepTimes",
    "StepWeight",
    "accuracy_weight",
    "categorical_draw",
    "centred_one_hot",
    "mean_output",
]
