"""Time-dependent reweighting: its pointwise minimiser in closed form, in both forms; its limits; and the discriminator it needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import CosinePath, DataPrediction, EDMPath, NoisePrediction, ScorePrediction, VelocityPrediction, VPPath
from ergodax.data import GaussianMixture
from ergodax.diffusion import DenoisingLoss, MinSNR
from ergodax.diffusion.tiw_dsm import DensityRatioLoss, ImportanceWeightedLoss, MixtureRatio, ReweightedLoss
from ergodax.testing import assert_mean, z_scores


MEANS, STD = [[-1.5], [1.5]], 0.5
BIASED, REFERENCE, HALF = (GaussianMixture.isotropic([w, 1 - w], MEANS, STD) for w in (0.9, 0.5, 0.7))


def log_ratio_on(path):
    def log_ratio(t, x, args):
        return REFERENCE.log_prob_at(path, t, x) - BIASED.log_prob_at(path, t, x)

    return log_ratio


def minimiser(loss, law, t, x):
    """argmin over c of E[loss of a network that returns c | x_t = x], through the loss's own code.

    Given x, x₁ is a mixture again; the loss is quadratic in it, so three Gauss-Hermite nodes per component are exact.
    """
    path = loss.base.path
    alpha, sigma = path.alpha(t), path.sigma(t)
    variance = alpha**2 * law.variances[:, 0] + sigma**2
    weight = law.weights * jnp.exp(-((x - alpha * law.means[:, 0]) ** 2) / (2 * variance)) / jnp.sqrt(variance)
    mean = law.means[:, 0] + alpha * law.variances[:, 0] / variance * (x - alpha * law.means[:, 0])
    std = jnp.sqrt(law.variances[:, 0] / variance) * sigma
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(3)
    data = (mean[:, None] + std[:, None] * nodes).reshape(-1, 1, 1)
    weight = (weight[:, None] * node_weights).reshape(-1)

    def value(c, x1):
        def pair(key, data, noise, args):
            return (x - alpha * data) / sigma

        base = DenoisingLoss(path, loss.base.prediction, times=lambda key, n: jnp.full(n, t), coupling=pair)
        return type(loss)(base, loss.log_ratio)(lambda t, x, args: jnp.full_like(x, c), x1, jax.random.key(0))[0]

    total = lambda c: weight @ jax.vmap(lambda x1: value(c, x1))(data)  # noqa: E731
    return -jax.grad(total)(0.0) / jax.hessian(total)(0.0)


PATHS_AND_PREDICTIONS = [
    (VPPath(), ScorePrediction()),
    (CosinePath(), NoisePrediction()),
    (EDMPath(5.0), DataPrediction()),
    (CosinePath(), VelocityPrediction()),
]


@pytest.mark.parametrize(("path", "prediction"), PATHS_AND_PREDICTIONS, ids=repr)
def test_pointwise_minimiser(path, prediction):
    """Biased data with w, and half/half data with 2d: both minimisers are the reference's model. Without a ratio, the biased one."""
    base = DenoisingLoss(path, prediction)
    ratio = log_ratio_on(path)
    find = jax.jit(jax.vmap(lambda x: (
        minimiser(ReweightedLoss(base, ratio), BIASED, t, x),
        minimiser(ReweightedLoss(base, MixtureRatio(ratio)), HALF, t, x),
        minimiser(ReweightedLoss(base, lambda t, x, args: jnp.zeros(())), BIASED, t, x),
    )))  # fmt: skip
    t, xs = 0.55, jnp.linspace(-2.0, 2.0, 9)

    def exact(law):
        return prediction.from_denoised(path, t, xs[:, None], law.denoised(path, t, xs[:, None]))[:, 0]

    weighted, bounded, plain = find(xs)
    np.testing.assert_allclose(weighted, exact(REFERENCE), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(bounded, exact(REFERENCE), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(plain, exact(BIASED), rtol=1e-10, atol=1e-10)
    assert np.abs(exact(BIASED) - exact(REFERENCE)).max() > 0.1


def test_half_and_half_needs_its_own_ratio():
    """With w for 2d the minimiser misses the reference's score by d ∇ log w, up to 0.38 here."""
    path, t, xs = VPPath(), 0.55, jnp.linspace(-2.0, 2.0, 9)
    ratio = log_ratio_on(path)
    loss = ReweightedLoss(DenoisingLoss(path, ScorePrediction()), ratio)
    wrong = jax.jit(jax.vmap(lambda x: minimiser(loss, HALF, t, x)))(xs) - REFERENCE.score_at(path, t, xs[:, None])[:, 0]
    slope = jax.vmap(jax.grad(lambda x: ratio(t, x[None], None)))(xs)
    np.testing.assert_allclose(wrong, jax.nn.sigmoid(ratio(t, xs[:, None], None)) * slope, rtol=1e-10)
    assert wrong.max() > 0.37


def test_bounded_weights():
    """0 < 2d < 2, and its gradient is (1 - d) ∇ log w."""
    ratio = MixtureRatio(lambda t, x, args: jnp.sum(x))
    for value in (-50.0, -1.0, 0.0, 2.0, 50.0):
        x = jnp.array([value, 0.0])
        d = jax.nn.sigmoid(value)
        np.testing.assert_allclose(jnp.exp(ratio(0.3, x)), 2 * d, rtol=1e-10)
        np.testing.assert_allclose(jax.grad(ratio, argnums=1)(0.3, x), jnp.full(2, jax.nn.sigmoid(-value)), rtol=1e-10)


def test_unit_ratio_is_the_loss_itself():
    """With every plug in use; labels reach the ratio."""
    data, labels, key = BIASED.sample(jax.random.key(0), 32), jnp.arange(32.0) % 3, jax.random.key(1)
    base = DenoisingLoss(CosinePath(), NoisePrediction(), weight=MinSNR(), label_dropout=0.4, coupling=lambda key, x, noise, args: noise[::-1])
    network = lambda t, x, label: jnp.sin(x + t) * label  # noqa: E731
    expected = base(network, (data, labels), key)[0]
    one = lambda t, x, label: jnp.zeros(())  # noqa: E731
    np.testing.assert_allclose(ReweightedLoss(base, one)(network, (data, labels), key)[0], expected, rtol=1e-12)
    np.testing.assert_allclose(ImportanceWeightedLoss(base, lambda x, label: jnp.zeros(()))(network, (data, labels), key)[0], expected, rtol=1e-12)
    doubled = ReweightedLoss(base, lambda t, x, label: jnp.where(label < 3, jnp.log(2.0), 0.0))
    np.testing.assert_allclose(doubled(network, (data, labels), key)[0], 2 * expected, rtol=1e-12)


def test_unbiased_beside_importance_weighting():
    """On drawn batches the reference's model is stationary under both, and the plain loss is far off; the weights of w_t spread less."""
    path, prediction = CosinePath(), NoisePrediction()
    data = BIASED.sample(jax.random.key(0), 20000)
    base = DenoisingLoss(path, prediction, times=lambda key, n: jax.random.uniform(key, (n,), minval=0.3, maxval=0.7))

    def clean_ratio(x, args):
        return REFERENCE.log_prob(x) - BIASED.log_prob(x)

    def slope(loss):
        def value(shift, x1, key):
            def model(t, x, args):
                return prediction.from_denoised(path, t, x, REFERENCE.denoised(path, t, x)) + shift

            return loss(model, x1[None], key)[0]

        return jax.jit(jax.vmap(jax.grad(value), in_axes=(None, 0, 0)))(0.0, data, jax.random.split(jax.random.key(1), len(data)))

    assert_mean(slope(ReweightedLoss(base, log_ratio_on(path))), 0.0)
    assert_mean(slope(ImportanceWeightedLoss(base, clean_ratio)), 0.0)
    assert np.abs(z_scores(slope(base), 0.0)) > 20

    def effective(log_weights):
        weights = np.exp(np.asarray(log_weights))
        return weights.sum() ** 2 / (len(weights) * (weights**2).sum())

    noisy = path.interpolate(0.3, data, jax.random.normal(jax.random.key(2), data.shape))
    shares = effective(clean_ratio(data, None)), effective(log_ratio_on(path)(0.3, noisy, None))
    # 1/Σ r²/p at separate modes, r = 0.5 and p = 0.9, 0.1.
    assert abs(shares[0] - 0.36) < 0.02
    assert shares[1] > 1.4 * shares[0]


def test_no_gradient_through_the_ratio():
    loss = DenoisingLoss(CosinePath(), NoisePrediction())

    def value(scale, data):
        ratio = lambda t, x, args: scale * jnp.sum(x)  # noqa: E731
        return ReweightedLoss(loss, ratio)(lambda t, x, args: jnp.zeros_like(x), data, jax.random.key(0))[0]

    data = jnp.ones((4, 2))
    assert jax.grad(value)(0.3, data) == 0
    assert value(0.3, data) != value(0.4, data)


def test_discriminator_loss():
    """Stationary at the exact log-ratio in every direction, log 2 per unit weight at logit 0, and not moved by the sizes of the two sets."""
    path = CosinePath()
    exact = log_ratio_on(path)
    biased, reference = BIASED.sample(jax.random.key(0), 8000), REFERENCE.sample(jax.random.key(1), 8000)
    loss = DensityRatioLoss(path, weight=lambda path, t: 1 + path.sigma(t), times=lambda key, n: jax.random.uniform(key, (n,)))

    def slope(x, y, key):
        def value(shift):
            return loss(lambda t, x, args: exact(t, x, args) + shift * jnp.tanh(x[0] + t), (x, y), key)[0]

        return jax.grad(value)(0.0)

    keys = jax.random.split(jax.random.key(2), 4000)
    slopes = jax.jit(jax.vmap(slope))(biased[:, None].reshape(4000, 2, 1), reference[:4000, None], keys)
    assert np.std(slopes) > 0.05
    assert_mean(slopes, 0.0)
    zero = lambda t, x, label: jnp.zeros(())  # noqa: E731
    value = DensityRatioLoss(path)(zero, ((biased[:6], jnp.arange(6)), (reference[:2], jnp.arange(2))), jax.random.key(0))[0]
    np.testing.assert_allclose(value, np.log(2), rtol=1e-12)
