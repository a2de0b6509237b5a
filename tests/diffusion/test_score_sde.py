"""Score SDE: the corrector's formula and what it leaves alone, predictor-corrector samples, conditional denoisers, inpainting, weights, sub-VP."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import (
    DataPrediction,
    DenoiserTerm,
    FlowMatchingPath,
    NoisePrediction,
    ProbabilityFlow,
    ScorePrediction,
    SubVPPath,
    VEPath,
    VPPath,
    VPrediction,
    integrate,
    log_likelihood,
    with_noise,
)
from ergodax.data import GaussianMixture
from ergodax.diffusion import DDIM, DenoisingLoss, log_snr_grid, uniform_grid
from ergodax.diffusion.score_sde import (
    ConditionedDenoiser,
    Inpainting,
    PredictorCorrector,
    ReverseDiffusion,
    _NoisePart,
    likelihood_weight,
    score_weight,
)
from ergodax.diffusion.solver import clocks
from ergodax.testing import assert_covariance, assert_mean, z_scores


MIXTURE = GaussianMixture.isotropic([0.3, 0.5, 0.2], [[1.0, 0.5], [-1.0, 0.2], [0.3, -1.2]], [0.4, 0.5, 0.3])
PATHS = [VPPath(), VEPath(0.02, 8.0), SubVPPath()]
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)


def term(path, grid, mixture=MIXTURE):
    return DenoiserTerm(mixture.denoiser(path), path, grid)


@eqx.filter_jit
def solve(path, solver, grid, y0, key, mixture=MIXTURE):
    return integrate(term(path, grid, mixture), solver, y0, key=key)


@each_path
def test_one_corrector_step(path):
    """x + e s + √(2e) z, e = 2 α (snr |z|/|s|)² with α = 1 - β for VP and 1 for VE."""
    t0, t1, snr = 0.5, 0.52, 0.16
    x, z = jax.random.normal(jax.random.key(0), (2, 5, 2))
    model = term(path, jnp.array([t0, t1]))
    actual = jax.jit(lambda x, z: PredictorCorrector(DDIM(), snr).correct(clocks(model, 0.0, 1.0, x), x, model.vf(0.0, x, None), z))(x, z)
    score = np.asarray(MIXTURE.score_at(path, t0, x))
    if isinstance(path, VEPath):
        alpha = 1.0
    else:  # 1 - β of the step: exp(-∫β)
        alpha = np.exp(-sum(sign * (0.1 * u + 19.9 * u**2 / 2) for sign, u in ((1, 1 - t0), (-1, 1 - t1))))
    size = 2 * alpha * (snr * np.linalg.norm(z) / np.linalg.norm(score)) ** 2
    np.testing.assert_allclose(actual, x + size * score + np.sqrt(2 * size) * z, rtol=0, atol=1e-8)


@pytest.mark.parametrize("path", PATHS[:2], ids=lambda path: type(path).__name__)
def test_corrector_leaves_the_marginal_unchanged(path):
    """20 corrections at snr = 0.05 from the exact law at t = 0.7: log p changes by no more than chance."""
    x = MIXTURE.marginal(path, 0.7).sample(jax.random.key(1), 4000)
    solver, model = PredictorCorrector(DDIM(), 0.05), term(path, jnp.array([0.7, 0.71]))

    @jax.jit
    def run(x):
        step = clocks(model, 0.0, 1.0, x)

        def correct(x, key):
            return solver.correct(step, x, model.vf(0.0, x, None), jax.random.normal(key, x.shape)), None

        y = jax.lax.scan(correct, x, jax.random.split(jax.random.key(2), 20))[0]
        return y, MIXTURE.log_prob_at(path, 0.7, y) - MIXTURE.log_prob_at(path, 0.7, x)

    moved, change = run(x)
    assert abs(float(z_scores(change, 0.0))) < 4
    assert float(jnp.mean((moved - x) ** 2)) > 0.02 * float(jnp.var(x))


@each_path
def test_samples(path):
    """Mean and covariance of predictor-corrector samples, from the exact law at the grid's start, by a noisy and by a deterministic predictor."""
    grid = log_snr_grid(path, 100, 0.1, 0.97)
    keys = jax.random.split(jax.random.key(3), 2)
    y0 = MIXTURE.marginal(path, grid[0]).sample(keys[0], 3000)
    law = MIXTURE.marginal(path, grid[-1])
    for solver in (PredictorCorrector(ReverseDiffusion()), PredictorCorrector(DDIM(), 0.1, 2))[: 2 if path is PATHS[0] else 1]:
        y1 = solve(path, solver, grid, y0, keys[1])
        assert_mean(y1, law.mean())
        assert_covariance(y1, law.covariance())


def test_predictor_alone_and_both_drivers():
    path, n = VPPath(), 8
    grid, y0, key = uniform_grid(n, 0.05, 0.95), jax.random.normal(jax.random.key(1), (16, 2)), jax.random.key(2)
    alone = solve(path, PredictorCorrector(ReverseDiffusion(), num_corrections=0), grid, y0, key)
    np.testing.assert_array_equal(alone, solve(path, ReverseDiffusion(), grid, y0, key))
    terms, solver = with_noise(term(path, grid), key, y0), Inpainting(PredictorCorrector(DDIM()), jnp.ones(2), np.array([1, 0]))

    @eqx.filter_jit
    def both(terms, y0):
        steps = dfx.StepTo(jnp.arange(n + 1.0))
        other = dfx.diffeqsolve(terms, solver, 0.0, float(n), None, y0, stepsize_controller=steps, adjoint=dfx.ForwardMode())
        return integrate(terms, solver, y0), other.ys[0]

    np.testing.assert_allclose(*both(terms, y0), rtol=0, atol=1e-12)


def test_parts_of_the_noise_are_independent():
    """Also parts of parts, and all of unit variance."""
    noise = with_noise(term(VPPath(), uniform_grid(4)), jax.random.key(0), jnp.zeros(20000)).terms[1]
    first, second = (_NoisePart(noise, k, 2) for k in range(2))
    parts = [second, *(_NoisePart(first, k, 3) for k in range(3))]
    draws = jnp.stack([part.contr(1.0, 2.0) for part in parts], axis=1)
    assert_mean(draws, 0.0)
    assert_covariance(draws, np.eye(4))


@pytest.mark.parametrize("path", PATHS[:2], ids=lambda path: type(path).__name__)
def test_conditioned_denoiser(path):
    """Given the component that the data came from, the exact law of the component."""
    stds = jnp.array([0.4, 0.5, 0.3])
    component = GaussianMixture.isotropic([1.0], MIXTURE.means[1:2], 0.5)

    def log_label(t, x, args):
        variance = path.alpha(t) ** 2 * stds**2 + path.sigma(t) ** 2
        square = jnp.sum((x[..., None, :] - path.alpha(t) * MIXTURE.means) ** 2, -1)
        return jax.nn.log_softmax(MIXTURE.log_weights - square / (2 * variance) - jnp.log(variance))[..., 1]

    @jax.jit
    def both(t, x):
        given, none = (ConditionedDenoiser(MIXTURE.denoiser(path), path, log_label, scale)(t, x) for scale in (1.0, 0.0))
        return given - component.denoised(path, t, x), none - MIXTURE.denoised(path, t, x)

    for t in (0.3, 0.8):
        np.testing.assert_allclose(both(t, jax.random.normal(jax.random.key(0), (6, 2))), 0.0, rtol=0, atol=1e-9)


def test_inpainting():
    """The known part is exact at the end; where the rest is independent of it, the rest keeps its law; in a rotated basis likewise."""
    law = GaussianMixture([0.4, 0.6], [[0.5, 1.0], [0.5, -1.0]], [[0.3, 0.1], [0.3, 0.2]])
    path, grid = FlowMatchingPath(), uniform_grid(60, 0.02, 1.0)
    y0 = law.marginal(path, grid[0]).sample(jax.random.key(0), 3000)
    known, mask = jnp.array([1.2, 7.0]), np.array([1, 0])
    y1 = solve(path, Inpainting(PredictorCorrector(DDIM(), 0.1), known, mask), grid, y0, jax.random.key(1), law)
    np.testing.assert_allclose(y1[:, 0], 1.2, rtol=0, atol=1e-12)
    assert_mean(y1[:, 1:], law.mean()[1:])
    assert_covariance(y1[:, 1:], law.covariance()[1:, 1:])
    turn = jnp.array([[0.6, -0.8], [0.8, 0.6]])
    turned = GaussianMixture(law.weights, law.means @ turn.T, turn @ law.covariances @ turn.T)
    y1 = solve(path, Inpainting(DDIM(), known @ turn.T, mask, turn), grid, y0 @ turn.T, jax.random.key(1), turned) @ turn
    np.testing.assert_allclose(y1[:, 0], 1.2, rtol=0, atol=1e-12)
    assert_mean(y1[:, 1:], law.mean()[1:])
    assert_covariance(y1[:, 1:], law.covariance()[1:, 1:])


def test_weights():
    """λ |s - s*|² with λ = σ² and g²: one loss for every parametrisation; for noise the first weight is 1."""
    path, t = VPPath(), jnp.linspace(0.1, 0.9, 5)
    np.testing.assert_allclose(score_weight(path, NoisePrediction(), t), 1.0, rtol=1e-10)
    np.testing.assert_allclose(score_weight(path, ScorePrediction(), t), path.sigma(t) ** 2, rtol=1e-10)
    np.testing.assert_allclose(likelihood_weight(path, ScorePrediction(), t), path.diffusion(t), rtol=1e-10)
    data = jax.random.normal(jax.random.key(0), (32, 2))

    def value(weight, prediction):
        def network(t, x, args):
            return prediction.from_denoised(path, t, x, jnp.tanh(x) + 0.1 * t)

        loss = DenoisingLoss(path, prediction, weight=weight, times=lambda key, n: 0.05 + 0.9 * jax.random.uniform(key, (n,)))
        return loss(network, data, jax.random.key(1))[0]

    predictions = (ScorePrediction(), NoisePrediction(), DataPrediction(), VPrediction())
    table = jax.jit(
        lambda: jnp.asarray([[value(weight, prediction) for prediction in predictions] for weight in (score_weight, likelihood_weight)])
    )()
    np.testing.assert_allclose(table, np.broadcast_to(table[:, :1], table.shape), rtol=1e-8)


def test_likelihood_and_round_trip_on_sub_vp():
    path, times = SubVPPath(), jnp.linspace(0.02, 0.99, 60)
    x = MIXTURE.sample(jax.random.key(0), 4)
    flow = ProbabilityFlow(MIXTURE.denoiser(path), path)
    prior = MIXTURE.marginal(path, times[0])

    @jax.jit
    @jax.vmap
    def both(x):
        log_prob, latent = log_likelihood(flow, x, prior.log_prob, times)
        return log_prob, integrate(dfx.ODETerm(flow), dfx.Tsit5(), latent, times=times)

    log_prob, decoded = both(x)
    np.testing.assert_allclose(log_prob, MIXTURE.log_prob_at(path, times[-1], x), rtol=0, atol=1e-4)
    np.testing.assert_allclose(decoded, x, rtol=0, atol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match="`snr`"):
        PredictorCorrector(DDIM(), -0.1)
    with pytest.raises(ValueError, match="`num_corrections`"):
        PredictorCorrector(DDIM(), num_corrections=-1)
