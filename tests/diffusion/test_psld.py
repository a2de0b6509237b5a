"""PSLD: its closed forms, its instances CLD and VP, training by hybrid score matching, and sampling with the exact score."""

import itertools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import VPPath, integrate, with_noise
from ergodax.data import GaussianMixture, sliced_wasserstein
from ergodax.diffusion import (
    PSLD,
    CompleteRecipe,
    HybridScoreLoss,
    LinearBeta,
    LinearMixtureScore,
    LinearSDETerm,
    NoiseScore,
    SymmetricSplitting,
    diffusion_weight,
    linear_transition,
    uniform_grid,
)
from ergodax.testing import assert_covariance, assert_mean


MIXTURE = GaussianMixture.isotropic(jnp.array([0.3, 0.5, 0.2]), jnp.array([[1.0, 0.5], [-1.0, 0.2], [0.3, -1.2]]), jnp.array([0.2, 0.3, 0.15]))
CASES = [(0.01, 4.01), (0.0, 4.0), (0.25, 3.0), (2.0, 0.5)]


@pytest.mark.parametrize(("gamma", "nu"), CASES)
def test_closed_form_at_critical_damping(gamma, nu):
    """The paper's mean matrix, and Σ_t = S + C (Σ₀ - S) Cᵀ; β constant and linear."""
    mass = 4 / (gamma - nu) ** 2
    stationary, start = np.diag([1, mass]), np.diag([0, 0.04 * mass])
    for beta in (LinearBeta(8.0, 8.0), LinearBeta(0.1, 20.0)):
        process = PSLD(gamma, nu, beta=beta)
        moments = jax.jit(process.moments)
        for t in (0.0, 0.3, 0.9, 0.999):
            b = float(beta.integral(1 - t))
            matrix = np.array([[1 + (nu - gamma) * b / 4, (gamma - nu) ** 2 * b / 8], [-b / 2, 1 + (gamma - nu) * b / 4]])
            matrix = np.exp(-(nu + gamma) * b / 4) * matrix
            phi, sigma = moments(t)
            np.testing.assert_allclose(phi, matrix[:, 0], atol=1e-13)
            np.testing.assert_allclose(sigma, stationary + matrix @ (start - stationary) @ matrix.T, atol=1e-13)
        phi, sigma = jax.jit(PSLD(gamma, nu, beta=LinearBeta(400.0, 400.0)).moments)(0.0)
        np.testing.assert_allclose(phi, 0, atol=1e-12)
        np.testing.assert_allclose(sigma, stationary, atol=1e-12)


def test_instances():
    """Γ = 0 is CLD; without the coupling the data row is VP; the recipe with D = ½ diag(Γ, Mν), Q = ½ [[0, -1], [1, 0]] is PSLD."""
    beta, nu, mass = 8.0, 4.0, 0.25
    cld, beta_c, gamma_c = PSLD(0.0, nu, mass), beta / 2, nu * mass
    np.testing.assert_allclose(beta * cld.drift_matrix, [[0, beta_c / mass], [-beta_c, -gamma_c * beta_c / mass]], atol=1e-12)
    np.testing.assert_allclose(beta * cld.diffusion_matrix, [[0, 0], [0, 2 * gamma_c * beta_c]], atol=1e-12)
    np.testing.assert_allclose(PSLD(0.0, 4.0).drift_matrix, cld.drift_matrix, atol=1e-14)

    gamma = 0.3
    psld = PSLD(gamma, nu, mass)
    root = jnp.diag(jnp.sqrt(jnp.array([gamma, mass * nu]) / 2))
    recipe = CompleteRecipe(root, jnp.array([[0.0, -0.5], [0.0, 0.0]]), jnp.array([1.0, mass]), jnp.array([0.04 * mass]), LinearBeta(8.0, 8.0))
    for name in ("drift_matrix", "diffusion_matrix", "initial_covariance", "prior_covariance"):
        np.testing.assert_allclose(getattr(recipe, name), getattr(psld, name), atol=1e-14)

    path = VPPath()
    uncoupled = CompleteRecipe(jnp.diag(jnp.sqrt(jnp.array([0.5, 1.0]))), jnp.zeros((2, 2)), jnp.array([1.0, mass]), jnp.array([0.01]))
    moments = jax.jit(lambda t: uncoupled.moments(t))
    for t in (0.1, 0.9):
        phi, sigma = moments(t)
        np.testing.assert_allclose([phi[0], phi[1], sigma[0, 0], sigma[0, 1]], [path.alpha(t), 0, path.sigma(t) ** 2, 0], atol=1e-13)


class Constant(eqx.Module):
    value: jax.Array

    def __call__(self, t, z, args):
        return self.value


def test_loss_is_the_error_of_the_noise():
    """E|ε - c|²/(K d) = 1 + |c|²/(K d) for a network that says c; only the last rows where it gives fewer."""
    process, data, key = PSLD(), jnp.zeros((20000, 2)), jax.random.key(0)
    loss = eqx.filter_jit(HybridScoreLoss(process))
    full = loss(Constant(jnp.full((2, 2), 0.5)), data, key)[0]
    # var of the mean of (ε - c)² over 4 entries: (2 + 4c²)/4 = 0.75
    assert abs(float(full) - 1.25) < 4 * np.sqrt(0.75 / 20000)
    part = loss(Constant(jnp.full((1, 2), 0.5)), data, key)[0]
    assert abs(float(part) - 1.25) < 4 * np.sqrt(1.5 / 20000)
    with pytest.raises(ValueError, match="batch"):
        HybridScoreLoss(process)(Constant(jnp.zeros((2, 2))), jnp.zeros(3), key)


@pytest.mark.parametrize(("process", "rows"), [(PSLD(), 2), (PSLD(0.0, 4.0), 1)], ids=("PSLD", "CLD"))
def test_loss_is_minimised_by_the_exact_score(process, rows):
    """At ε* = -Lᵀ s, of which CLD's network gives the last row, the loss has slope 0 (z-score); at 0.9 ε* it does not."""
    n = 4000
    exact = LinearMixtureScore(MIXTURE, process)

    def noise(scale):
        def network(t, z, args):
            factor = jnp.linalg.cholesky(process.moments(t)[1])
            return -scale * (factor.T @ exact(t, z))[2 - rows :]

        return network

    def slope(scale, key):
        x = MIXTURE.sample(key, 8)
        return jax.grad(lambda s: HybridScoreLoss(process)(noise(s), x, key)[0])(scale)

    slopes = jax.jit(jax.vmap(slope, in_axes=(None, 0)))
    keys = jax.random.split(jax.random.key(0), n // 8)
    assert_mean(slopes(1.0, keys)[:, None], 0.0, z=4.0)
    with pytest.raises(AssertionError):
        assert_mean(slopes(0.9, keys)[:, None], 0.0, z=4.0)


@pytest.mark.parametrize("gamma", [0.1, 0.0])
def test_diffusion_weight_is_the_error_of_the_score(gamma):
    """Δᵀ W Δ = β |L^{-T} Δ|² in the metric GGᵀ, also where the last row says it all."""
    process, t, delta = PSLD(gamma, 3.0), 0.4, jax.random.normal(jax.random.key(0), (2, 3))
    error = process.score(t, delta)
    expected = process.rate(t) * jnp.sum(error * (process.diffusion_matrix @ error))
    weight = diffusion_weight(process, jnp.asarray(t))
    np.testing.assert_allclose(jnp.sum(delta * (weight @ delta)), expected, rtol=1e-11)
    if gamma == 0:
        np.testing.assert_allclose(weight[1, 1] * jnp.sum(delta[1] ** 2), expected, rtol=1e-11)


def distance_and_floor(samples, n, mixture=MIXTURE):
    """Sliced W2 to fresh data, and the largest of 10 values between two fresh sets at the same n."""
    distance = jax.jit(lambda a, b: sliced_wasserstein(jax.random.key(0), a, b, 64))
    fresh = jax.vmap(lambda k: mixture.sample(k, n))(jax.random.split(jax.random.key(9), 11))
    return float(distance(samples, fresh[10])), max(float(distance(fresh[i], fresh[10])) for i in range(10))


@pytest.mark.parametrize("process", [PSLD(), PSLD(0.0, 4.0)], ids=("PSLD", "CLD"))
def test_exact_score_recovers_the_data(process):
    """Through ε, as a network would give it; for CLD from the momentum row alone."""
    n = 1000
    exact = LinearMixtureScore(MIXTURE, process)
    rows = 1 if process.gamma == 0 else 2

    def network(t, z, args):
        return -(jnp.linalg.cholesky(process.moments(t)[1]).T @ exact(t, z))[2 - rows :]

    term, times = LinearSDETerm(NoiseScore(network, process), process), 1 - (1 - uniform_grid(50, 0.0, 1.0)) ** 2 * (1 - 1e-4) - 1e-4
    flow = jax.jit(jax.vmap(lambda z: integrate(term, dfx.Heun(), z, times=times)))
    distance, floor = distance_and_floor(flow(process.prior(jax.random.key(0), (2,), n))[:, 0], n)
    assert distance < 1.5 * floor, (distance, floor)


def test_symmetric_splitting():
    """Exact where the data are N(0, S) themselves, whatever the step; its covariance on other Gaussian data by the scheme's own recursion."""
    n, times = 4000, uniform_grid(5, 0.0, 0.9)

    @eqx.filter_jit
    def sample(exact, keys):
        def one(key):
            first, second = jax.random.split(key)
            z0 = exact.process.prior(first, (1,))
            return integrate(with_noise(LinearSDETerm(exact, exact.process), second, z0), SymmetricSplitting(), z0, times=times)

        return jax.vmap(one)(keys)

    moments, transition = eqx.filter_jit(lambda process, t: process.moments(t)), jax.jit(linear_transition)
    for std, scale in ((1.0, 1.0), (0.4, 0.04)):
        process = PSLD(0.2, 2.0, initial_scale=jnp.asarray(scale), beta=LinearBeta(2.0, 6.0))
        a, q, s = process.drift_matrix, process.diffusion_matrix, process.prior_covariance
        pull = q @ jnp.linalg.inv(s)
        exact = LinearMixtureScore(GaussianMixture.isotropic(jnp.ones(1), jnp.zeros((1, 1)), std), process)

        z, covariance = sample(exact, jax.random.split(jax.random.key(0), n))[..., 0], s
        for t0, t1 in itertools.pairwise(times):
            middle = (t0 + t1) / 2
            phi, sigma = moments(process, t0)
            precision = jnp.linalg.inv(sigma + std**2 * jnp.outer(phi, phi))
            first, second = (transition(-a - pull, q, process.elapsed(u) - process.elapsed(v)) for u, v in ((t0, middle), (middle, t1)))
            kick = jnp.eye(2) + (process.elapsed(t0) - process.elapsed(t1)) * (pull - q @ precision)
            covariance = kick @ (first[0] @ covariance @ first[0].T + first[1]) @ kick.T
            covariance = second[0] @ covariance @ second[0].T + second[1]
        assert_covariance(z, covariance)
        if std == 1.0:
            np.testing.assert_allclose(covariance, s, atol=1e-12)


def test_float32_and_bad_arguments():
    loss = HybridScoreLoss(PSLD(), weight=diffusion_weight)
    value, _ = loss(Constant(jnp.zeros((2, 2), jnp.float32)), jnp.ones((64, 2), jnp.float32), jax.random.key(0))
    assert value.dtype == jnp.float32
    assert bool(jnp.isfinite(value))
    for bad in (dict(gamma=-1.0), dict(nu=-1.0), dict(mass=0.0), dict(initial_scale=-0.1)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            PSLD(**bad)
    with pytest.raises(ValueError, match="coupling"):
        CompleteRecipe(jnp.eye(2), jnp.eye(3), jnp.ones(2), jnp.ones(1))
