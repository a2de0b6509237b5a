"""Flow log-likelihoods against the exact density of an isotropic Gaussian mixture on three paths."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import FlowMatchingPath, VelocityPrediction, VEPath, VPPath, integrate
from ergodax.core.likelihood import AugmentedVelocity, ExactDivergence, HutchinsonDivergence, log_likelihood, standard_normal_log_prob


WEIGHTS = np.array([0.2, 0.5, 0.3])
MEANS = np.array([[-1.5, 0.5], [1.0, 1.2], [0.3, -1.4]])
STDS = np.array([0.4, 0.6, 0.5])
POINTS = np.array([[0.2, -0.7], [-1.3, 0.1], [1.9, 2.0], [0.0, 0.4]])
PATHS = [VPPath(), VEPath(sigma_min=0.02, sigma_max=10.0), FlowMatchingPath()]


def log_density(path, t, x):
    """log Σ w N(x; α m, α² s² + σ²), the law of x_t."""
    weights, means, stds = (jnp.asarray(a, x.dtype) for a in (WEIGHTS, MEANS, STDS))
    alpha, variance = path.alpha(t), path.alpha(t) ** 2 * stds**2 + path.sigma(t) ** 2
    square = jnp.sum((x - alpha * means) ** 2, -1)
    return jax.nn.logsumexp(jnp.log(weights) - square / (2 * variance) - jnp.log(2 * jnp.pi * variance))


def velocity_of(path):
    def velocity(t, x, args):
        alpha, sigma = path.alpha(t), path.sigma(t)
        denoised = (x + sigma**2 * jax.grad(log_density, 2)(path, t, x)) / alpha  # Tweedie
        return VelocityPrediction().from_denoised(path, t, x, denoised)

    return velocity


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_log_likelihood_is_the_exact_density(path):
    times = jnp.linspace(0.01, 0.99, 251)

    @jax.jit
    @jax.vmap
    def both(x):
        log_prob, latent = log_likelihood(velocity_of(path), x, lambda z: log_density(path, times[0], z), times)
        decoded = integrate(dfx.ODETerm(velocity_of(path)), dfx.Tsit5(), latent, times=times)
        return log_prob, decoded, log_density(path, times[-1], x)

    log_prob, decoded, exact = both(jnp.asarray(POINTS))
    np.testing.assert_allclose(log_prob, exact, rtol=0, atol=1e-9)
    np.testing.assert_allclose(decoded, POINTS, rtol=0, atol=1e-9)


def test_standard_normal_prior_of_the_variance_preserving_path():
    # α(0) = exp(-5.025) = 0.0066: KL(p₀ ‖ N(0, I)) is about α² |mean|²/2 < 1e-4, and pointwise the difference is α m·z < 1e-2.
    path, times = VPPath(), jnp.linspace(0.0, 1 - 1e-3, 201)
    flow = jax.jit(jax.vmap(lambda x: log_likelihood(velocity_of(path), x, standard_normal_log_prob, times)))
    log_prob, latent = flow(jnp.asarray(POINTS))
    exact = jax.vmap(lambda x: log_density(path, times[-1], x))(jnp.asarray(POINTS))
    mean, alpha = WEIGHTS @ MEANS, path.alpha(0.0)
    np.testing.assert_allclose(log_prob + alpha * latent @ mean, exact, rtol=0, atol=3e-4)


@pytest.mark.parametrize(("solver", "order", "steps"), [(dfx.Heun(), 2, 64), (dfx.Tsit5(), 5, 16)], ids=["heun", "tsit5"])
def test_the_order_is_the_solvers(solver, order, steps):
    path, x = FlowMatchingPath(), jnp.asarray(POINTS[0])

    @jax.jit
    def error(times):
        log_prob, _ = log_likelihood(velocity_of(path), x, lambda z: log_density(path, times[0], z), times, solver)
        return abs(log_prob - log_density(path, times[-1], x))

    coarse, fine = (error(jnp.linspace(0.1, 0.9, n + 1)) for n in (steps, 2 * steps))
    assert jnp.log2(coarse / fine) == pytest.approx(order, abs=0.4)


def test_divergence_of_a_linear_field_of_any_shape():
    matrix = jax.random.normal(jax.random.key(0), (6, 6))
    x = jax.random.normal(jax.random.key(1), (2, 3))

    def field(x):
        return (matrix @ x.ravel()).reshape(x.shape)

    for batch_size in (None, 4):
        value, divergence = jax.jit(lambda x, batch_size=batch_size: ExactDivergence(batch_size)(field, x))(x)
        np.testing.assert_allclose(value, field(x), rtol=1e-12)
        np.testing.assert_allclose(divergence, jnp.trace(matrix), rtol=1e-12)


@pytest.mark.parametrize(("distribution", "diagonal"), [(jax.random.rademacher, 0.0), (jax.random.normal, 1.0)], ids=["rademacher", "gaussian"])
def test_hutchinson_mean_and_variance(distribution, diagonal):
    # Var[eᵀ J e] = 2‖S‖² for Gaussian probes, less 2 Σ S_ii² for signs, with S the symmetric part; divided by the number of probes.
    matrix, n = jax.random.normal(jax.random.key(0), (4, 4)), 20_000

    def estimate(key):
        return HutchinsonDivergence(key, 3, distribution)(lambda x: matrix @ x, jnp.ones(4))[1]

    values = jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(1), n))
    symmetric = (matrix + matrix.T) / 2
    variance = 2 / 3 * (jnp.sum(symmetric**2) - (1 - diagonal) * jnp.sum(jnp.diag(symmetric) ** 2))
    assert abs(jnp.mean(values) - jnp.trace(matrix)) < 4 * jnp.sqrt(variance / n)
    squares = (values - jnp.trace(matrix)) ** 2
    assert abs(jnp.mean(squares) - variance) < 4 * jnp.std(squares) / jnp.sqrt(n)


def test_hutchinson_log_likelihood_is_unbiased():
    # On one grid the latent is the same and the log-density is linear in the divergence, so the mean over keys is the exact-trace value.
    path, x, times = FlowMatchingPath(), jnp.asarray(POINTS[0]), jnp.linspace(0.05, 0.95, 21)

    def run(divergence):
        return log_likelihood(velocity_of(path), x, standard_normal_log_prob, times, dfx.Heun(), divergence=divergence)

    exact, latent = jax.jit(run)(ExactDivergence())
    estimates, latents = jax.jit(jax.vmap(lambda key: run(HutchinsonDivergence(key, 1))))(jax.random.split(jax.random.key(2), 2000))
    error = jnp.std(estimates) / jnp.sqrt(2000)
    assert error > 1e-4
    assert abs(jnp.mean(estimates) - exact) < 4 * error
    np.testing.assert_allclose(latents, jnp.broadcast_to(latent, latents.shape), rtol=1e-12)


def test_gradient_is_the_score():
    path, times = FlowMatchingPath(), jnp.linspace(0.05, 0.95, 201)

    @jax.jit
    @jax.grad
    def gradient(x):
        return log_likelihood(velocity_of(path), x, lambda z: log_density(path, times[0], z), times, dfx.Heun())[0]

    x = jnp.asarray(POINTS[0])
    np.testing.assert_allclose(gradient(x), jax.grad(log_density, 2)(path, times[-1], x), rtol=1e-3)


def test_adaptive_route_agrees():
    path, x, t0, t1 = FlowMatchingPath(), jnp.asarray(POINTS[1]), 0.05, 0.95
    field, controller = AugmentedVelocity(velocity_of(path)), dfx.PIDController(rtol=1e-9, atol=1e-9)
    solve = jax.jit(lambda x: dfx.diffeqsolve(dfx.ODETerm(field), dfx.Tsit5(), t1, t0, None, (x, jnp.zeros(())), stepsize_controller=controller))
    solution = solve(x)
    log_prob = log_density(path, t0, solution.ys[0][0]) + solution.ys[1][0]
    np.testing.assert_allclose(log_prob, log_density(path, t1, x), rtol=0, atol=1e-7)


def test_float32_stays_float32_and_bad_times_are_refused():
    path, x = FlowMatchingPath(), jnp.asarray(POINTS[0], jnp.float32)
    times = jnp.linspace(0.1, 0.9, 5, dtype=jnp.float32)
    log_prob, latent = jax.jit(lambda x: log_likelihood(velocity_of(path), x, standard_normal_log_prob, times, dfx.Heun()))(x)
    assert log_prob.dtype == latent.dtype == jnp.float32
    with pytest.raises(ValueError, match="increase strictly"):
        log_likelihood(velocity_of(path), x, standard_normal_log_prob, jnp.linspace(0.9, 0.1, 5))
