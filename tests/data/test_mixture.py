"""The mixture against quadrature, numpy, autodiff and the continuity equation, on every path and at its ends.

Each path compiles once per dtype (`evaluate`), so points and mixtures keep the shapes (6, 2) and k = 3 where they can.
"""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ergodax.core import CosinePath, DenoiserTerm, EDMPath, FlowMatchingPath, SubVPPath, VEPath, VPPath, integrate
from ergodax.data import GaussianMixture, eight_gaussians


PATHS = [FlowMatchingPath(), VPPath(), SubVPPath(), VEPath(), EDMPath(), CosinePath()]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)


def random_mixture(k=3, d=2, dtype=np.float64):
    """Spread means, full covariances between 0.05 I and about 2 I, uneven weights."""
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(k, d, d))
    covariances = np.einsum("kir,kjr->kij", factors, factors) / d + 0.05 * np.eye(d)
    return GaussianMixture(*(value.astype(dtype) for value in (rng.uniform(0.5, 2, k), rng.normal(size=(k, d)), covariances)))


def numbers(mixture):
    return tuple(np.asarray(value, np.float64) for value in (mixture.weights, mixture.means, mixture.covariances))


def noisy(mixture, path, t, n=6):
    """Draws of x_t, made by numpy."""
    rng = np.random.default_rng(1)
    weights, means, covariances = numbers(mixture)
    component = rng.choice(len(weights), n, p=weights / weights.sum())
    data = np.stack([rng.multivariate_normal(means[k], covariances[k], method="eigh") for k in component])
    x = float(path.alpha(t)) * data + float(path.sigma(t)) * rng.normal(size=data.shape)
    return jnp.asarray(x, mixture.means.dtype)


@eqx.filter_jit
def evaluate(mixture, path, t, x):
    functions = (mixture.denoised, mixture.score_at, mixture.velocity_at, mixture.log_prob_at, mixture.posterior_covariance)
    return [function(path, t, x) for function in functions]


@every_path
@pytest.mark.parametrize("t", [0.0, 0.3, 0.7])
def test_everything_matches_quadrature(path, t):
    mixture = random_mixture()
    x = noisy(mixture, path, t)
    results = evaluate(mixture, path, jnp.asarray(t), x)
    alpha, sigma, d_alpha, d_sigma = (float(clock(t)) for clock in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))
    x = np.asarray(x)
    # Step 0.05 against widths of at least 0.13, and five standard deviations beyond every mean: exact to 1e-9.
    axis = np.linspace(-8, 8, 321)
    data = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    density = sum(w * stats.multivariate_normal.pdf(data, m, c) for w, m, c in zip(*numbers(mixture)))
    joint = density * np.prod(stats.norm.pdf(x[:, None], alpha * data, sigma), axis=-1)
    evidence = joint.sum(1)
    mean = joint @ data / evidence[:, None]
    noise = (x - alpha * mean) / sigma
    covariance = np.einsum("ng,gi,gj->nij", joint / evidence[:, None], data, data, optimize=True) - mean[:, :, None] * mean[:, None, :]
    log_prob = np.log(evidence * (axis[1] - axis[0]) ** 2)
    for result, expected in zip(results, (mean, -noise / sigma, d_alpha * mean + d_sigma * noise, log_prob, covariance)):
        np.testing.assert_allclose(result, expected, rtol=1e-8, atol=1e-8)


def test_velocity_moves_the_density_and_score_is_its_gradient():
    path, mixture = CosinePath(), random_mixture()

    @jax.jit
    @jax.vmap
    def continuity(t, x):
        """(∂p/∂t + div(p u))/p and the size of its terms; the score's error."""
        rate, score = jax.grad(lambda t, x: mixture.log_prob_at(path, t, x), argnums=(0, 1))(t, x)
        divergence = jnp.trace(jax.jacfwd(lambda x: mixture.velocity_at(path, t, x))(x))
        transport = divergence + mixture.velocity_at(path, t, x) @ score
        return rate + transport, jnp.abs(rate) + jnp.abs(transport), mixture.score_at(path, t, x) - score

    t = jnp.array([0.2, 0.6, 0.9]).repeat(6)
    error, scale, score_error = continuity(t, jnp.concatenate([noisy(mixture, path, each) for each in (0.2, 0.6, 0.9)]))
    assert jnp.all(jnp.abs(error) < 1e-10 * (1 + scale))
    assert jnp.abs(score_error).max() < 1e-10


#: α' and σσ' at t = 1, by hand. VP: 2σσ' = -B' and B' = β_min at u = 0; cosine: α² + σ² = 1, so σσ' = -αα'.
COSINE_SLOPE = np.pi / 2 / 1.008 * np.tan(np.pi / 2 * 0.008 / 1.008)
SLOPES = [(1.0, 0.0), (0.05, -0.05), (0.05, 0.0), (0.0, 0.01**2 * np.log(0.01 / 50)), (0.0, 0.0), (COSINE_SLOPE, -COSINE_SLOPE)]
ENDS = [(path, slopes, jnp.float64) for path, slopes in zip(PATHS, SLOPES)] + [(PATHS[i], SLOPES[i], jnp.float32) for i in (0, 1)]


@pytest.mark.parametrize(("path", "slopes", "dtype"), ENDS, ids=[f"{type(path).__name__}-{dtype.__name__}" for path, _, dtype in ENDS])
def test_ends_of_the_path(path, slopes, dtype):
    # Magnified by the condition of the covariances (up to 2 / 0.05), and by a few operations.
    tolerance = 10 * 40 * float(jnp.finfo(dtype).eps)
    mixture = random_mixture(dtype=dtype)
    weights, means, covariances = numbers(mixture)
    for t in (0.0, 1.0):
        x = noisy(mixture, path, t)
        results = evaluate(mixture, path, jnp.asarray(t, dtype), x)
        for result in results:
            assert result.dtype == dtype
            assert jnp.isfinite(result).all()
        denoised, score, velocity, log_prob, covariance = results
        alpha, sigma, x = float(path.alpha(t)), float(path.sigma(t)), np.asarray(x, np.float64)
        # Density and score by numpy's solver; E[x₁ | x₀] is the mean, and x is x₁ where there is no noise.
        laws = alpha**2 * covariances + sigma**2 * np.eye(2)
        density = np.stack([w * stats.multivariate_normal.pdf(x, alpha * m, c) for w, m, c in zip(weights, means, laws)])
        pulls = np.stack([np.linalg.solve(c, (alpha * m - x).T).T for m, c in zip(means, laws)])
        expected_score = (density[..., None] * pulls).sum(0) / density.sum(0)[:, None]
        np.testing.assert_allclose(log_prob, np.log(density.sum(0)), rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(score, expected_score, rtol=tolerance, atol=tolerance)
        if alpha == 0:
            np.testing.assert_allclose(denoised, np.tile(mixture.mean(), (6, 1)), atol=tolerance)
            np.testing.assert_allclose(covariance, np.tile(mixture.covariance(), (6, 1, 1)), atol=tolerance)
        if t == 1:
            np.testing.assert_allclose(denoised, x + sigma**2 * expected_score, atol=tolerance)
            np.testing.assert_allclose(velocity, slopes[0] * x - slopes[1] * expected_score, rtol=tolerance, atol=tolerance)
        if sigma == 0:
            assert jnp.abs(covariance).max() < tolerance**2  # nothing but differences of rounded means, squared


def test_gradients_are_finite_at_the_ends():
    path, mixture = FlowMatchingPath(), random_mixture(dtype=np.float32)
    points = GaussianMixture(mixture.weights, mixture.means, jnp.zeros((3, 2, 2), jnp.float32))
    gradients = jax.jit(jax.grad(lambda arguments: jnp.sum(arguments[0].denoised(path, *arguments[1:]) ** 2)))
    for t in (0.0, 0.5, 1.0):
        x = noisy(mixture, path, t)
        for each in (mixture, points):
            assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients((each, jnp.float32(t), x))))


def test_float32_is_accurate_in_64_dimensions():
    path, mixture = VEPath(), random_mixture(10, 64)
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), mixture)
    denoised = jax.jit(lambda mixture, t, x: mixture.denoised(path, t, x))
    for t in (0.0, 0.3, 0.6, 1.0):
        x = noisy(mixture, path, t, 16).astype(jnp.float32)  # both precisions get the same numbers
        exact = np.asarray(denoised(mixture, jnp.float64(np.float32(t)), x.astype(jnp.float64)))
        result = denoised(single, jnp.float32(t), x)
        assert result.dtype == jnp.float32
        # Two rotations and a softmax over sums of 64 terms, on data of order 1: √64 eps each, at 4 standard deviations
        assert np.abs(np.asarray(result) - exact).max() < 4 * 3 * 8 * np.finfo(np.float32).eps * (1 + np.abs(exact).max())


@every_path
def test_point_masses_give_the_empirical_denoiser(path):
    rng = np.random.default_rng(0)
    points, weights = rng.normal(size=(3, 2)), rng.uniform(0.5, 1, 3)
    mixture = GaussianMixture(weights, points, np.zeros((3, 2, 2)))
    for t in (0.0, 0.5, 0.95):
        x = noisy(mixture, path, t)
        result = evaluate(mixture, path, jnp.asarray(t), x)[0]
        alpha, sigma, x = float(path.alpha(t)), float(path.sigma(t)), np.asarray(x)
        logits = np.log(weights) - ((x[:, None] - alpha * points) ** 2).sum(-1) / (2 * sigma**2)
        softmax = np.exp(logits - logits.max(1, keepdims=True))
        np.testing.assert_allclose(result, softmax @ points / softmax.sum(1, keepdims=True), rtol=1e-9, atol=1e-12)


def test_point_masses_without_noise_give_the_nearest_point():
    points = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]], jnp.float32)
    mixture = GaussianMixture(jnp.ones(3), points, jnp.zeros((3, 2, 2)))
    x = jnp.array([[0.51, 0.1], [0.49, 0.1], [30.0, 100.0], [0.0, 0.0], [2.0, 0.0], [0.0, 2.9]], jnp.float32)
    denoised, _, _, log_prob, _ = evaluate(mixture, FlowMatchingPath(), jnp.float32(1.0), x)
    np.testing.assert_array_equal(denoised, points[jnp.array([1, 0, 2, 0, 1, 2])])
    assert jnp.isnan(log_prob).all()  # there is no density


def test_diagonal_and_full_covariances_agree():
    rng, path, t = np.random.default_rng(0), VPPath(), jnp.asarray(0.7)
    weights, means, variances = rng.uniform(0.5, 1, 3), rng.normal(size=(3, 2)), rng.uniform(0.1, 1, (3, 2))
    variances[0] = 0
    diagonal, full = GaussianMixture(weights, means, variances), GaussianMixture(weights, means, variances[:, :, None] * np.eye(2))
    x = noisy(full, path, 0.7)
    for one, other in zip(evaluate(diagonal, path, t, x), evaluate(full, path, t, x)):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(diagonal.covariances, full.covariances, atol=1e-12)


def test_rank_deficient_covariance():
    rng, path, t = np.random.default_rng(0), CosinePath(), 0.95
    means, factors = rng.normal(size=(3, 2)), rng.normal(size=(3, 2, 1))
    mixture = GaussianMixture([0.0, 1.0, 0.0], means, factors @ factors.swapaxes(1, 2))
    assert jnp.all((mixture.variances == 0).sum(1) == 1)  # rounding in `eigh` is not taken for variance
    x = noisy(mixture, path, t)
    result = evaluate(mixture, path, jnp.asarray(t), x)[0]
    alpha, sigma, x = float(path.alpha(t)), float(path.sigma(t)), np.asarray(x)
    covariance = factors[1] @ factors[1].T
    gain = alpha * covariance @ np.linalg.inv(alpha**2 * covariance + sigma**2 * np.eye(2))
    np.testing.assert_allclose(result, means[1] + (x - alpha * means[1]) @ gain.T, rtol=1e-9, atol=1e-12)
    assert np.linalg.matrix_rank(mixture.sample(jax.random.key(0), 40_000) - means[1], rtol=1e-7) == 1


def test_sample_moments():
    n, mixture = 40_000, random_mixture()
    draws = np.asarray(mixture.sample(jax.random.key(0), n))
    assert draws.shape == (n, 2)
    assert jax.eval_shape(mixture.sample, jax.random.key(0)).shape == (2,)
    offset = draws - np.asarray(mixture.mean())
    assert np.all(np.abs(offset.mean(0)) < 4 * draws.std(0) / n**0.5)
    products = offset[:, :, None] * offset[:, None, :]
    assert np.all(np.abs(products.mean(0) - mixture.covariance()) < 4 * products.std(0) / n**0.5)


def test_every_component_has_its_own_weight_and_covariance():
    covariances = np.array([[[1.0, 0.8], [0.8, 1.0]], [[1.0, -0.8], [-0.8, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    mixture = GaussianMixture([1.0, 3.0, 0.0], np.array([[-50.0, 0.0], [50.0, 0.0], [0.0, 500.0]]), covariances)
    draws = np.asarray(mixture.sample(jax.random.key(0), 40_000))
    assert draws[:, 1].max() < 100
    right = draws[:, 0] > 0
    assert abs(right.mean() - 0.75) < 4 * (0.75 * 0.25 / 40_000) ** 0.5
    for side, sign in ((right, -1), (~right, 1)):
        correlation = np.corrcoef(draws[side].T)[0, 1]
        assert abs(np.arctanh(correlation) - np.arctanh(sign * 0.8)) < 4 / np.sqrt(side.sum() - 3)  # Fisher's z


def test_denoiser_fits_the_sampler_socket():
    mixture, path = GaussianMixture.isotropic([1.0], np.array([[1.0, -2.0]]), 0.5), FlowMatchingPath()
    start = jax.random.normal(jax.random.key(0), (4, 2))
    end = jax.jit(lambda x: integrate(DenoiserTerm(mixture.denoiser(path), path, jnp.linspace(0, 1, 65)), dfx.Midpoint(), x))(start)
    # The flow of one Gaussian is affine; local error h³/24 |x‴| of order 10 h³, 64 times.
    np.testing.assert_allclose(end, np.array([1.0, -2.0]) + 0.5 * np.asarray(start), atol=10 / 64**2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_points_decide_the_dtype(dtype):
    mixture, path = random_mixture(), VPPath()
    x = jnp.ones((5, 2), dtype)
    for t in (0.5, jnp.asarray(0.5, jnp.float32), jnp.asarray(0.5, jnp.float64)):
        results = eqx.filter_eval_shape(evaluate, mixture, path, t, x)
        assert {result.dtype for result in results} == {jnp.dtype(dtype)}
        assert [result.shape for result in results] == [(5, 2), (5, 2), (5, 2), (5,), (5, 2, 2)]
        assert eqx.filter_eval_shape(mixture.denoiser(path), t, x).dtype == dtype


def test_construction_in_a_sweep_and_under_jit():
    mixture, path, x = random_mixture(), VPPath(), jnp.array([0.3, 0.2])
    weights, means, covariances = mixture.weights, mixture.means, mixture.covariances

    @jax.jit
    def at_std(std):
        return GaussianMixture.isotropic(3 * weights, means, std).denoised(path, 0.6, x)

    stds = jnp.array([0.0, 0.1, 0.5])
    np.testing.assert_allclose(jax.jit(jax.vmap(at_std))(stds), jnp.stack([at_std(std) for std in stds]), rtol=1e-12)
    jax.eval_shape(lambda x: GaussianMixture(weights, means, covariances).log_prob(x), x)  # concrete numbers in a trace
    gradient = jax.jit(jax.grad(lambda arguments: GaussianMixture(*arguments).log_prob(x)))
    assert all(jnp.isfinite(leaf).all() for leaf in gradient((weights.at[0].set(0), means, covariances)))


def test_one_trace_for_two_calls():
    traces = []

    @eqx.filter_jit
    def call(mixture, t, x):
        traces.append(0)
        return mixture.denoised(VPPath(), t, x)

    for mixture in (random_mixture(), eqx.tree_at(lambda m: m.means, random_mixture(), jnp.ones((3, 2)))):
        call(mixture, jnp.asarray(0.1), jnp.ones(2))
    assert len(traces) == 1


def test_zero_weight_removes_a_component():
    mixture, x = random_mixture(), jnp.ones((6, 2))
    weights, means, covariances = numbers(mixture)
    full = GaussianMixture(weights * [1, 1, 0], means, covariances)
    twice = GaussianMixture(weights * [1, 0.5, 0.5] * [1, 1, weights[1] / weights[2]], means[[0, 1, 1]], covariances[[0, 1, 1]])
    for one, other in zip(*(evaluate(each, VPPath(), jnp.asarray(0.7), x) for each in (full, twice))):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


def test_eight_gaussians():
    for mixture, radius, std in ((eight_gaussians(radius=3.0, std=0.2), 3.0, 0.2), (eight_gaussians(), 2.0, 0.1)):
        weights, means, _ = numbers(mixture)
        distance = np.linalg.norm(means[:, None] - means, axis=-1)
        np.testing.assert_allclose(weights, 1 / 8, rtol=1e-12)
        np.testing.assert_allclose(mixture.variances, std**2, rtol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(means, axis=1), radius, rtol=1e-12)
        np.testing.assert_allclose(np.sort(distance, axis=1)[:, 1:3], 2 * radius * np.sin(np.pi / 8), rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones(2), np.ones(2), np.ones((2, 2))), r"`means` must have shape \(k, d\), got \(2,\)"),
        ((np.ones(3), np.ones((2, 2)), np.ones((2, 2))), r"`weights` must have shape \(2,\)"),
        ((np.ones(2), np.ones((2, 3)), np.ones((2, 3, 2))), r"`covariances` must have shape \(2, 3, 3\)"),
        ((-np.ones(1), np.ones((1, 2)), np.ones((1, 2))), r"`weights` must lie in \[0, inf\)"),
        ((np.zeros(1), np.ones((1, 2)), np.ones((1, 2))), "`weights` must not all be 0"),
        ((np.ones(1), np.array([[np.nan, 0]]), np.ones((1, 2))), "`means` must lie in"),
        ((np.ones(1), np.ones((1, 2)), -np.ones((1, 2))), r"`covariances` must lie in \[0, inf\)"),
        ((np.ones(1), np.ones((1, 2)), np.array([[[1.0, 0.5], [0.4, 1.0]]])), "symmetric, but number 0 differs from its transpose by 0.1"),
        ((np.ones(1), np.ones((1, 2)), np.array([[[1.0, 2.0], [2.0, 1.0]]])), "semi-definite, but number 0 has the eigenvalue -1"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(*arguments)


def test_calls_are_checked():
    mixture = random_mixture()
    with pytest.raises(ValueError, match=r"`x` must have shape \(..., 2\), got \(5, 3\)"):
        mixture.log_prob(jnp.ones((5, 3)))
    with pytest.raises(ValueError, match="one scalar time"):
        mixture.denoised(VPPath(), jnp.ones(5), jnp.ones((5, 2)))
    with pytest.raises(ValueError, match="`std` must be a scalar"):
        GaussianMixture.isotropic(np.ones(2), np.ones((2, 2)), np.ones(3))
    with pytest.raises(ValueError, match=r"`std` must lie in \[0, inf\)"):
        eight_gaussians(std=-1.0)
    with pytest.raises(ValueError, match="`n` must be an integer"):
        mixture.sample(jax.random.key(0), 0)
