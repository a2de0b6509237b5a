"""The engine of linear diffusions: transitions against block exponentials and moment equations, exact mixture fields, both reverse dynamics."""

import itertools

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.stats

from ergodax.core import ProbabilityFlow, VPPath, integrate
from ergodax.data import GaussianMixture
from ergodax.diffusion import (
    PSLD,
    CompleteRecipe,
    LinearBeta,
    LinearMixtureScore,
    LinearSDETerm,
    ReverseDrift,
    linear_transition,
    reverse_sde_terms,
    uniform_grid,
)
from ergodax.testing import assert_covariance, assert_mean


_ANGLE = 0.4
_TURN = jnp.array([[jnp.cos(_ANGLE), -jnp.sin(_ANGLE)], [jnp.sin(_ANGLE), jnp.cos(_ANGLE)]])
MIXTURE = GaussianMixture(
    jnp.array([0.4, 0.6]),
    jnp.array([[1.0, 0.5], [-1.0, 0.2]]),
    jnp.stack([_TURN @ jnp.diag(jnp.array(v)) @ _TURN.T for v in ([0.3, 0.05], [0.1, 0.2])]),
)
DIAGONAL = GaussianMixture(jnp.array([0.4, 0.6]), jnp.array([[1.0, 0.5], [-1.0, 0.2]]), jnp.array([[0.3, 0.05], [0.1, 0.2]]))
VP = CompleteRecipe(jnp.full((1, 1), jnp.sqrt(0.5)), jnp.zeros((1, 1)), jnp.ones(1), jnp.zeros(0))
transition = jax.jit(linear_transition)


def random_process(seed, k=3):
    keys = jax.random.split(jax.random.key(seed), 2)
    root, coupling = (jax.random.normal(key, (k, k)) for key in keys)
    return CompleteRecipe(root, coupling, jnp.arange(1.0, k + 1), jnp.full(k - 1, 0.1), LinearBeta(0.5, 2.0))


def van_loan(a, q):
    k = len(a)
    block = scipy.linalg.expm(np.block([[a, q], [np.zeros_like(a), -a.T]]))
    return block[:k, :k], block[:k, k:] @ block[:k, :k].T


@pytest.mark.parametrize("seed", range(3))
def test_transition_is_the_block_exponential(seed):
    process = random_process(seed)
    a, q = np.asarray(process.drift_matrix), np.asarray(process.diffusion_matrix)
    for elapsed in (1e-3, 0.1, 1.0):
        phi, sigma = transition(a, q, elapsed)
        expected = van_loan(a * elapsed, q * elapsed)
        np.testing.assert_allclose(phi, expected[0], rtol=0, atol=1e-13)
        # the block exponential's own error grows with its norm e^{|A|τ}
        np.testing.assert_allclose(sigma, expected[1], rtol=0, atol=1e-11 * np.abs(expected[1]).max())
    # far away the law is the stationary one, where the block exponential has overflowed
    np.testing.assert_allclose(transition(a, q, 500.0)[1], process.prior_covariance, atol=1e-12)


def test_transition_solves_the_moment_equations():
    a, q = np.array([[-0.1, 4.0], [-0.5, -2.0]]), np.diag([0.0, 1.0])

    def rate(_, y):
        phi, sigma = y[:4].reshape(2, 2), y[4:].reshape(2, 2)
        return np.concatenate([(a @ phi).ravel(), (a @ sigma + sigma @ a.T + q).ravel()])

    solution = scipy.integrate.solve_ivp(rate, (0, 2.0), np.concatenate([np.eye(2).ravel(), np.zeros(4)]), rtol=1e-11, atol=1e-13).y[:, -1]
    phi, sigma = transition(a, q, 2.0)
    np.testing.assert_allclose(np.concatenate([phi.ravel(), sigma.ravel()]), solution, atol=1e-9)


def test_small_times_are_exact_in_every_entry():
    """Noise that reaches x through m alone: Σ = [[c² τ³/3, c τ²/2], [c τ²/2, τ]] to leading order, in float32 too."""
    a, q = jnp.array([[0.0, 2.0], [0.0, 0.0]]), jnp.diag(jnp.array([0.0, 1.0]))
    for dtype, rtol in ((jnp.float64, 1e-14), (jnp.float32, 1e-6)):
        h = 1e-4
        _, sigma = transition(a.astype(dtype), q.astype(dtype), jnp.asarray(h, dtype))
        np.testing.assert_allclose(sigma, [[4 * h**3 / 3, h**2], [h**2, h]], rtol=rtol)
    for t in (0.9, 1 - 1e-3, 1 - 1e-5):
        exact = jax.jit(PSLD(0.0, 4.0).moments)(jnp.float64(jnp.float32(t)))[1]
        single = jax.jit(PSLD(0.0, 4.0).moments)(jnp.float32(t))[1]
        np.testing.assert_allclose(single, exact, rtol=2e-6)
        np.testing.assert_allclose(jnp.linalg.cholesky(single), jnp.linalg.cholesky(exact), rtol=1e-3)


def test_transition_is_differentiable():
    process = random_process(3)
    a, q = process.drift_matrix, process.diffusion_matrix
    (phi, sigma), (d_phi, d_sigma) = jax.jvp(lambda s: transition(a, q, s), (0.7,), (1.0,))
    np.testing.assert_allclose(d_phi, a @ phi, atol=1e-12)
    np.testing.assert_allclose(d_sigma, a @ sigma + sigma @ a.T + q, atol=1e-12)
    total = jax.jit(jax.value_and_grad(lambda a: jnp.sum(linear_transition(a, q, 0.7)[1] ** 2)))
    gradient = total(a)[1]
    step = jnp.zeros((3, 3)).at[0, 1].set(1e-5)
    change = (total(a + step)[0] - total(a - step)[0]) / 2e-5
    np.testing.assert_allclose(gradient[0, 1], change, rtol=1e-7)


def test_lyapunov():
    """A S + S Aᵀ + GGᵀ = 0: the stated prior is stationary, for every damping and coupling."""
    for process in (*map(random_process, range(4)), PSLD(), PSLD(0.3, 1.0, 0.7), PSLD(0.0, 4.0), VP):
        a, s = process.drift_matrix, process.prior_covariance
        np.testing.assert_allclose(a @ s + s @ a.T + process.diffusion_matrix, 0 * s, atol=1e-12)


def test_noise_and_score():
    """-L^{-T} ε is -Σ⁻¹ (z - μ), the gradient of log N; the last rows need only the last rows of ε."""
    process, t = random_process(5), 0.6
    x, noise = jax.random.normal(jax.random.key(0), (4,)), jax.random.normal(jax.random.key(1), (3, 4))
    z, score, part, (phi, sigma) = jax.jit(
        lambda: (process.perturb(t, x, noise), process.score(t, noise), process.score(t, noise[1:]), process.moments(t))
    )()

    def log_normal(z):
        residual = z - phi[:, None] * x
        return -jnp.sum(residual * jnp.linalg.solve(sigma, residual)) / 2

    np.testing.assert_allclose(score, -jnp.linalg.solve(sigma, z - phi[:, None] * x), atol=1e-11)
    np.testing.assert_allclose(score, jax.grad(log_normal)(z), atol=1e-11)
    np.testing.assert_allclose(part[1:], score[1:], atol=1e-12)
    with pytest.raises(ValueError, match="1 to 3 rows"):
        process.score(t, jnp.zeros((4, 2)))


def test_perturb_has_the_stated_law():
    process, t, n = random_process(6), 0.7, 20000
    z = jax.jit(lambda e: process.perturb(t, jnp.full((n,), 0.8), e))(jax.random.normal(jax.random.key(0), (3, n))).T
    phi, sigma = process.moments(t)
    assert_mean(z, 0.8 * phi)
    assert_covariance(z, sigma)
    prior = process.prior(jax.random.key(2), (2,), n)
    assert prior.shape == (n, 3, 2)
    assert_covariance(prior[..., 1], process.prior_covariance)
    assert process.prior(jax.random.key(2), (2,)).shape == (3, 2)


@pytest.mark.parametrize("mixture", [MIXTURE, DIAGONAL], ids=("full", "diagonal"))
def test_mixture_fields(mixture):
    """Density by brute force in all K d dimensions; the score is its gradient; Tweedie returns the posterior mean."""
    process, t = random_process(7), 0.8
    exact = LinearMixtureScore(mixture, process)
    z = jax.random.normal(jax.random.key(0), (5, 3, 2))

    @jax.jit
    def fields(z):
        score = exact(t, z)
        gradient = jax.vmap(jax.grad(lambda z: exact.log_prob(t, z)))(z)
        tweedie = jax.vmap(lambda z, s: process.denoised(t, z, s))(z, score)
        return exact.log_prob(t, z), exact.denoised(t, z), score, gradient, tweedie, process.moments(t)

    log_prob, denoised, score, gradient, tweedie, (phi, sigma) = fields(z)
    density, mean = np.zeros(5), np.zeros((5, 2))
    for w, mu, c in zip(mixture.weights, mixture.means, mixture.covariances):
        total = np.kron(np.outer(phi, phi), c) + np.kron(sigma, np.eye(2))
        p = w * scipy.stats.multivariate_normal(np.kron(phi, mu), total).pdf(np.asarray(z).reshape(5, 6))
        gain = np.kron(phi[None], c) @ np.linalg.inv(total)
        density, mean = density + p, mean + p[:, None] * (mu + (np.asarray(z).reshape(5, 6) - np.kron(phi, mu)) @ gain.T)
    np.testing.assert_allclose(log_prob, np.log(density), rtol=1e-10)
    np.testing.assert_allclose(denoised, mean / density[:, None], atol=1e-10)
    np.testing.assert_allclose(score, gradient, atol=1e-9)
    np.testing.assert_allclose(tweedie, denoised, atol=1e-9)
    with pytest.raises(ValueError, match="3, 2"):
        exact(t, z[:, :2])


def test_one_variable_is_vp():
    path = VPPath()
    x = jax.random.normal(jax.random.key(0), (6, 2))
    exact = LinearMixtureScore(MIXTURE, VP)
    fields = jax.jit(lambda t: (*VP.moments(t), exact(t, x[:, None]), jax.vmap(lambda z: ReverseDrift(exact, VP)(t, z))(x[:, None])))
    for t in (0.01, 0.5, 0.97):
        phi, sigma, score, drift = fields(t)
        np.testing.assert_allclose([phi[0], sigma[0, 0]], [path.alpha(t), path.sigma(t) ** 2], rtol=1e-12)
        np.testing.assert_allclose(VP.rate(t), path.diffusion(t), rtol=1e-12)
        np.testing.assert_allclose(score[:, 0], MIXTURE.score_at(path, t, x), atol=1e-10)
        flow = ProbabilityFlow(MIXTURE.denoiser(path), path)
        np.testing.assert_allclose(drift[:, 0], flow(t, x), atol=1e-9)


def gaussian_chain(process, variance, times, noise_scale):
    """Mean and covariance of Euler–Maruyama itself on Gaussian data N(0.5, variance), whose score is linear."""
    a, q, mean, covariance = process.drift_matrix, process.diffusion_matrix, jnp.zeros(2), process.prior_covariance
    moments = jax.jit(process.moments)
    for t0, t1 in itertools.pairwise(times):
        phi, sigma = moments(t0)
        precision = jnp.linalg.inv(sigma + variance * jnp.outer(phi, phi))
        pull = (1 + noise_scale**2) / 2 * q @ precision
        h = process.rate(t0) * (t1 - t0)
        step = jnp.eye(2) - h * (a + pull)
        mean, covariance = step @ mean + h * pull @ phi * 0.5, step @ covariance @ step.T + noise_scale**2 * h * q
    return mean, covariance


@pytest.mark.parametrize("noise_scale", [1.0, 0.4])
def test_reverse_sde_is_euler_maruyama(noise_scale):
    process, n = PSLD(0.2, 2.0, beta=LinearBeta(2.0, 6.0)), 4000
    data = GaussianMixture.isotropic(jnp.ones(1), jnp.array([[0.5]]), 0.3)
    score, times = LinearMixtureScore(data, process), uniform_grid(8, 0.0, 0.9)

    @jax.jit
    @jax.vmap
    def sample(key):
        first, second = jax.random.split(key)
        z0 = process.prior(first, (1,))
        return integrate(reverse_sde_terms(process, score, second, z0, noise_scale), dfx.Euler(), z0, times=times)

    z = sample(jax.random.split(jax.random.key(0), n))[..., 0]
    mean, covariance = gaussian_chain(process, 0.09, times, noise_scale)
    assert_mean(z, mean)
    assert_covariance(z, covariance)


def test_stock_solvers_and_both_drivers():
    process, n = PSLD(), 12
    score, times = LinearMixtureScore(MIXTURE, process), uniform_grid(n, 0.0, 0.99)
    z0 = process.prior(jax.random.key(0), (2,))
    term = LinearSDETerm(score, process)

    @jax.jit
    def both(z0):
        other = dfx.diffeqsolve(term, dfx.Heun(), 0.0, 0.99, None, z0, stepsize_controller=dfx.StepTo(times), adjoint=dfx.ForwardMode())
        field = dfx.ODETerm(ReverseDrift(score, process))
        return integrate(term, dfx.Heun(), z0, times=times), other.ys[0], integrate(field, dfx.Heun(), z0, times=times)

    ours, theirs, field = both(z0)
    np.testing.assert_allclose(ours, theirs, atol=1e-12)
    np.testing.assert_allclose(ours, field, atol=1e-12)


def test_bad_arguments():
    with pytest.raises(ValueError, match="beta_min"):
        LinearBeta(-1.0, 2.0)
    with pytest.raises(ValueError, match="noise_scale"):
        reverse_sde_terms(VP, LinearMixtureScore(MIXTURE, VP), jax.random.key(0), jnp.zeros((1, 2)), -1.0)
    with pytest.raises(ValueError, match="`n`"):
        VP.prior(jax.random.key(0), (2,), 0)
