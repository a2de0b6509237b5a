"""Bayesian flow networks: their flows and updates against the paper's formulas, the losses in nats against an entropy, sampling of both kinds."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ergodax.core import DataPrediction, DenoiserTerm, NoisePrediction, integrate
from ergodax.data import GaussianMixture, sliced_wasserstein
from ergodax.diffusion import Ancestral, DenoisingLoss, uniform_grid
from ergodax.diffusion.bayesian_flow_networks import (
    BayesianFlowPath,
    BayesianUpdate,
    CategoricalFlowPath,
    CategoricalOutput,
    CategoricalReconstructionLoss,
    CategoricalStepLoss,
    ClippedOutput,
    DiscretisedOutput,
    StepTimes,
    StepWeight,
    accuracy_weight,
    categorical_draw,
    centred_one_hot,
    mean_output,
)


K = 3
PATH = BayesianFlowPath(0.05)
JOINT = jnp.array([[0.30, 0.02, 0.05], [0.03, 0.25, 0.02], [0.08, 0.05, 0.20]])
ENTROPY = float(-jnp.sum(JOINT * jnp.log(JOINT)))


def exact_logits(t, theta, args):
    """log p(x_d = k | y) up to a constant, of two variables with the law `JOINT`: θ is the likelihood of each alone."""
    posterior = JOINT.astype(theta.dtype) * theta[0][:, None] * theta[1][None, :]
    return jnp.log(jnp.stack([posterior.sum(1), posterior.sum(0)]))


MODEL = CategoricalOutput(exact_logits)


class GivenNoise(dfx.AbstractTerm):
    """A noise term whose unit noise is always `value`."""

    value: jax.Array

    def vf(self, t, y, args):
        return None

    def contr(self, t0, t1, **kwargs):
        return self.value * jnp.sqrt(t1 - t0)

    def prod(self, vf, control):
        return control


def update(path, data, noise, solver, grid, y0):
    """One run with a constant model and constant noise."""
    terms = dfx.MultiTerm(DenoiserTerm(lambda t, x, args: data + 0 * x, path, grid), GivenNoise(noise))
    return integrate(terms, solver, y0)


def test_flow_of_the_continuous_belief():
    """γ = 1 - σ₁^{2t}, mean γ x, variance γ (1 - γ); t inverts the snr; snr is β = σ₁^{-2t} - 1."""
    t = jnp.array([0.01, 0.3, 1.0])
    gamma = 1 - 0.05 ** (2 * t)
    np.testing.assert_allclose(PATH.alpha(t), gamma, rtol=1e-13)
    np.testing.assert_allclose(PATH.sigma(t) ** 2, gamma * (1 - gamma), rtol=1e-13)
    np.testing.assert_allclose(PATH.snr(t), 0.05 ** (-2 * t) - 1, rtol=1e-12)
    np.testing.assert_allclose(PATH.time(PATH.log_snr(t)), t, rtol=1e-12)
    path = CategoricalFlowPath(K, 2.5)
    np.testing.assert_allclose([path.alpha(0.3), path.sigma(0.3) ** 2], [2.5 * 0.09, K * 2.5 * 0.09], rtol=1e-13)
    np.testing.assert_allclose(path.time(path.log_snr(t)), t, rtol=1e-12)


def test_continuous_update_is_bayes_rule_and_ancestral_sampling():
    """μ₁ = (ρ₀ μ₀ + a m + √a z)/ρ₁ with ρ = σ₁^{-2t}, from t = 0 too; `Ancestral` is the same step."""
    mu, m, z = jnp.array([0.3, -0.7]), jnp.array([1.2, 0.1]), jnp.array([0.4, -2.0])
    for start, end in ((0.2, 0.5), (0.0, 0.1), (0.5, 1.0)):
        rho = 0.05 ** (-2 * np.array([start, end]))
        a, mu0 = rho[1] - rho[0], mu * float(start > 0)
        expected = (rho[0] * mu0 + a * m + np.sqrt(a) * z) / rho[1]
        for solver in (BayesianUpdate(), Ancestral()):
            np.testing.assert_allclose(update(PATH, m, z, solver, jnp.array([start, end]), mu0), expected, rtol=1e-11)


def test_categorical_update_multiplies_the_beliefs():
    """θ₁ ∝ e^y θ₀ with y = a m + √(a K) z, a = β(t₁) - β(t₀)."""
    path, y0, m, z = CategoricalFlowPath(K, 2.5), jnp.array([[0.1, -0.4, 0.2]]), centred_one_hot(jnp.array([1]), K), jnp.array([[0.3, 1.0, -2.0]])
    a = 2.5 * (0.6**2 - 0.4**2)
    expected = jax.nn.softmax(y0) * jnp.exp(a * m + np.sqrt(a * K) * z)
    y1 = update(path, m, z, BayesianUpdate(), jnp.array([0.4, 0.6]), y0)
    np.testing.assert_allclose(jax.nn.softmax(y1), expected / expected.sum(), rtol=1e-12)


@pytest.mark.parametrize("path", [PATH, CategoricalFlowPath(K)], ids=repr)
def test_accuracies_add(path):
    """Mean and variance of a belief do not depend on how its accuracy was cut; from the prior they are the flow's."""

    def moments(grid):
        mean = update(path, 1.0, jnp.zeros(1), BayesianUpdate(), grid, jnp.zeros(1))
        # with independent noises the squares of their shares add up: one at a time
        kept, variance = jnp.ones(1), 0.0
        for i in reversed(range(len(grid) - 1)):
            step = grid[i : i + 2]
            variance += (kept * (update(path, 0.0, jnp.ones(1), BayesianUpdate(), step, jnp.zeros(1)))) ** 2
            kept = kept * update(path, 0.0, jnp.zeros(1), BayesianUpdate(), step, jnp.ones(1))
        return float(mean[0]), float(variance[0])

    t = 0.7
    for grid in (jnp.array([0.0, t]), jnp.array([0.0, 0.1, 0.45, t])):
        np.testing.assert_allclose(moments(grid), [path.alpha(t), path.sigma(t) ** 2], rtol=1e-11)


def test_losses_are_the_paper_s():
    """L^∞ and L^n of continuous data and of classes, written out, on the draws that the loss makes."""
    data, key = jnp.array([[0.4, -0.3, 0.9, 0.0]]), jax.random.key(3)
    t, n = 0.6, 5

    def network(t, x, args):
        return jnp.sin(2 * x) + t

    at = {"times": lambda key, n: jnp.full(n, t)}
    noise = DenoisingLoss(PATH, NoisePrediction(), weight=accuracy_weight, **at)(network, data, key)[0]
    gamma = 1 - 0.05 ** (2 * t)
    x0 = jax.random.normal(jax.random.split(key, 4)[0], (4,))
    mu = gamma * data[0] + jnp.sqrt(gamma * (1 - gamma)) * x0
    estimate = mu / gamma - jnp.sqrt((1 - gamma) / gamma) * network(t, mu, None)
    square = jnp.sum((data[0] - estimate) ** 2)
    np.testing.assert_allclose(4 * noise, -np.log(0.05) * 0.05 ** (-2 * t) * square, rtol=1e-10)
    step = DenoisingLoss(PATH, NoisePrediction(), weight=StepWeight(n), **at)(network, data, key)[0]
    i = round(t * n) + 1
    np.testing.assert_allclose(4 * step, n / 2 * (1 - 0.05 ** (2 / n)) * 0.05 ** (-2 * i / n) * square, rtol=1e-10)

    path, labels = CategoricalFlowPath(K, 2.5), jnp.array([[0, 2]])
    one_hot = jax.nn.one_hot(labels[0], K)
    value = DenoisingLoss(path, DataPrediction(), weight=accuracy_weight, **at)(MODEL, centred_one_hot(labels, K), key)[0]
    x0 = jax.random.normal(jax.random.split(key, 4)[0], (6,)).reshape(2, K)
    y = path.alpha(t) * (K * one_hot - 1) + path.sigma(t) * x0
    output = jax.nn.softmax(exact_logits(t, jax.nn.softmax(y), None))
    np.testing.assert_allclose(6 * value, K * 2.5 * t * jnp.sum((one_hot - output) ** 2), rtol=1e-10)


def test_step_times():
    times = StepTimes(4)(jax.random.key(0), 400)
    values, counts = np.unique(np.asarray(times), return_counts=True)
    np.testing.assert_array_equal(values, [0, 0.25, 0.5, 0.75])
    assert np.all(np.abs(counts - 100) <= 1)


def test_step_loss_of_one_step_is_mutual_information():
    """One variable, uniform, told to the model as such: KL of the sender to the mixture, by quadrature over K = 2 classes."""
    path, accuracy = CategoricalFlowPath(2, 1.5), 1.5
    loss = CategoricalStepLoss(path, 1)
    uniform = CategoricalOutput(lambda t, theta, args: jnp.zeros_like(theta))
    data = jnp.broadcast_to(centred_one_hot(jnp.array([0]), 2), (40000, 1, 2))
    value, n = jax.jit(lambda key: loss(uniform, data, key)[0])(jax.random.key(0)), 40000
    # only y₁ - y₂ ~ N(2a, 4a) differs between the classes: (ln of sender over receiver) = -ln((1 + e^{-(y₁ - y₂)})/2)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    ratio = -np.log((1 + np.exp(-(2 * accuracy + np.sqrt(4 * accuracy) * nodes))) / 2)
    weights = weights / weights.sum()
    mean = weights @ ratio
    assert abs(float(value) - mean) < 4 * np.sqrt(weights @ (ratio - mean) ** 2 / n)


@pytest.fixture(scope="module")
def samples():
    cells = jax.random.choice(jax.random.key(1), 9, (20000,), p=JOINT.reshape(-1))
    return centred_one_hot(jnp.stack([cells // 3, cells % 3], 1), K)


def nats(loss, data):
    """Mean and standard error over 100 parts of the data."""
    parts = data.reshape(100, 200, 2, K)
    values = jax.jit(jax.vmap(lambda x, key: loss(MODEL, x, key)[0]))(parts, jax.random.split(jax.random.key(2), 100))
    return float(values.mean()), float(values.std() / 10)


def test_loss_bounds_the_entropy(samples):
    """With the exact output, L^∞ and the reconstruction are at least the entropy; nearly it at a large accuracy; L^n falls to L^∞."""
    gaps = []
    for accuracy in (1.0, 6.0):
        path = CategoricalFlowPath(K, accuracy)
        transmission, error = nats(DenoisingLoss(path, DataPrediction(), weight=accuracy_weight), samples)
        rest, rest_error = nats(CategoricalReconstructionLoss(path), samples)
        gaps.append(((6 * transmission + rest) - ENTROPY, np.hypot(6 * error, rest_error)))
    assert gaps[0][0] > 4 * gaps[0][1], gaps  # at a small accuracy the factorised output costs
    assert abs(gaps[1][0]) < 4 * gaps[1][1], gaps

    path = CategoricalFlowPath(K, 1.0)
    limit, error = nats(DenoisingLoss(path, DataPrediction(), weight=accuracy_weight), samples)
    steps = [nats(CategoricalStepLoss(path, n), samples) for n in (1, 3, 100)]
    means, errors = np.array(steps).T
    assert means[0] > means[1] + 4 * np.hypot(*errors[:2]), steps
    assert means[1] > 6 * limit + 3 * np.hypot(errors[1], 6 * error), (steps, 6 * limit)
    assert abs(means[2] - 6 * limit) < 4 * np.hypot(errors[2], 6 * error), (steps, 6 * limit)


def test_categorical_samples():
    """100 steps reproduce the joint; the mean output in the place of a draw does not."""
    n, path = 10000, CategoricalFlowPath(K, 4.0)

    def sample(output, key):
        term = DenoiserTerm(MODEL, path, uniform_grid(100))
        y = integrate(term, BayesianUpdate(output), path.prior(key, (2, K)), key=key)
        k = jnp.argmax(categorical_draw(MODEL(jnp.ones(()), y), jax.random.normal(jax.random.fold_in(key, 1), (2, K))), axis=-1)
        return 3 * k[0] + k[1]

    keys = jax.random.split(jax.random.key(5), n)
    draws = [np.bincount(jax.jit(jax.vmap(lambda key, o=o: sample(o, key)))(keys), minlength=9) / n for o in (categorical_draw, mean_output)]
    distances = [np.abs(share - np.asarray(JOINT).reshape(-1)).sum() / 2 for share in draws]
    assert distances[0] < 0.03, distances


def test_continuous_samples():
    """From t = 0, where the belief is a point, to the data; by the paper's update and by a solver of diffusion models."""
    mixture = GaussianMixture.isotropic(jnp.array([0.4, 0.6]), jnp.array([[0.7, 0.0], [-0.5, 0.3]]), jnp.array([0.1, 0.2]))
    path, n = BayesianFlowPath(0.02), 1000

    @jax.jit
    def run(key):
        fresh = jax.vmap(lambda k: mixture.marginal(path, 1.0).sample(k, n))(jax.random.split(key, 6))
        term = DenoiserTerm(ClippedOutput(mixture.denoiser(path), -2.0, 2.0), path, uniform_grid(40))
        x = integrate(term, BayesianUpdate(), path.prior(key, (n, 2)), key=key)
        return jax.vmap(lambda y: sliced_wasserstein(key, y, fresh[0], 32))(jnp.concatenate([x[None], fresh[1:]]))

    distances = run(jax.random.key(0))
    assert distances[0] < 1.5 * distances[1:].max(), distances


def test_outputs():
    """Bins by scipy's normal with the tails in the outer bins; 0 before `min_time` and clipped after."""
    x, t = jnp.array([0.2, -0.6]), 0.4

    def network(t, x, args):
        return jnp.stack([0.3 * x, jnp.full_like(x, -0.5)])

    output, gamma = DiscretisedOutput(network, PATH, 8), 1 - 0.05 ** (2 * t)
    scale = np.sqrt((1 - gamma) / gamma)
    mean, std = x / gamma - scale * 0.3 * x, scale * np.exp(-0.5)
    edges = np.concatenate([[-np.inf], np.linspace(-1, 1, 9)[1:-1], [np.inf]])
    expected = np.diff(scipy.stats.norm.cdf(edges, np.asarray(mean)[:, None], std), axis=1)
    np.testing.assert_allclose(output.probabilities(t, x), expected, atol=1e-12)
    np.testing.assert_allclose(output(t, x), expected @ (np.arange(8) * 0.25 - 0.875), atol=1e-12)
    start = np.diff(scipy.stats.norm.cdf(edges))
    np.testing.assert_allclose(output.probabilities(0.0, x), np.broadcast_to(start, (2, 8)), atol=1e-12)

    clipped = ClippedOutput(lambda t, x, args: 3 * x, -1.0, 0.5)
    np.testing.assert_allclose(clipped(0.5, x), [0.5, -1.0])
    np.testing.assert_allclose(clipped(0.0, x), 0.0)


def test_categorical_draw_follows_the_probabilities():
    share = jnp.array([0.1, 0.0, 0.6, 0.3])
    noise = jax.random.normal(jax.random.key(0), (20000, 4))
    m = categorical_draw(jnp.broadcast_to(4 * share - 1, noise.shape), noise)
    assert set(np.unique(m)) == {-1.0, 3.0}
    counts = np.asarray((m == 3).sum(0))
    assert counts[1] == 0
    assert scipy.stats.chisquare(counts[[0, 2, 3]], 20000 * np.asarray(share)[[0, 2, 3]]).pvalue > 1e-3


def test_dtype_and_bad_arguments():
    for path in (BayesianFlowPath(), CategoricalFlowPath(K)):
        y = path.prior(jax.random.key(0), (2, K), jnp.float32)
        term = DenoiserTerm(CategoricalOutput(exact_logits), path, uniform_grid(3).astype(jnp.float32))
        y = integrate(term, BayesianUpdate(categorical_draw), y, key=jax.random.key(1))
        assert y.dtype == jnp.float32
        assert jnp.isfinite(y).all()
    for make, match in (
        (lambda: BayesianFlowPath(1.0), "final_std"),
        (lambda: CategoricalFlowPath(1), "num_classes"),
        (lambda: StepTimes(0), "num_steps"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
