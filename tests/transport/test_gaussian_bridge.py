"""The closed-form bridge and its references: identities that hold to rounding, and simulation of the SDE."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import integrate
from ergodax.transport import Brownian, GaussianBridge, OrnsteinUhlenbeck, ParametricReference, sample_bridge


REFERENCES = (Brownian(0.7), OrnsteinUhlenbeck(1.3, jnp.array([0.4, -0.2]), 0.6), OrnsteinUhlenbeck(-0.5, 0.3, 0.6))


def bridge_between(reference, d=2):
    a, b = jax.random.normal(jax.random.key(3), (2, d, d))
    mean0, mean1 = jax.random.normal(jax.random.key(4), (2, d))
    return GaussianBridge(mean0, a @ a.T + 0.2 * jnp.eye(d), mean1, b @ b.T + 0.1 * jnp.eye(d), reference)


@pytest.mark.parametrize("reference", REFERENCES)
def test_plan_is_the_reference_kernel_between_two_potentials(reference):
    """A plan is a bridge's exactly if log π(x0, x1) - log p(x1 | x0) splits: the joint precision's off-diagonal block is that of p, -a/q I."""
    bridge = bridge_between(reference)
    cross = bridge.cross_covariance()
    joint = jnp.block([[bridge.cov0, cross], [cross.T, bridge.cov1]])
    a, _, q = reference.transition(0.0, 1.0)
    np.testing.assert_allclose(jnp.linalg.inv(joint)[:2, 2:], -a / q * np.eye(2), atol=1e-10)


@pytest.mark.parametrize("d", [5, 20, 50])
def test_plan_in_many_dimensions(d):
    bridge = bridge_between(Brownian(1.0), d)
    cross = bridge.cross_covariance()
    precision = jnp.linalg.inv(jnp.block([[bridge.cov0, cross], [cross.T, bridge.cov1]]))
    np.testing.assert_allclose(precision[:d, d:], -np.eye(d), atol=1e-8)


def test_transport_is_the_limit_of_small_noise():
    """λ → 0: the cross-covariance of Monge's map between Gaussians, C₀^{½} (C₀^{½} C₁ C₀^{½})^{½} C₀^{-½}; in one dimension σ₀ σ₁."""
    bridge = GaussianBridge(jnp.zeros(1), 4 * jnp.eye(1), jnp.zeros(1), 9 * jnp.eye(1), Brownian(1e-9))
    np.testing.assert_allclose(bridge.cross_covariance(), [[6.0]], rtol=1e-8)


@pytest.mark.parametrize("reference", REFERENCES)
def test_drift_carries_the_marginals(reference):
    """The drift A x + k is affine: m' = A m + k and C' = A C + C Aᵀ + ε I; Cov(x_t, x_0)' = A Cov(x_t, x_0) ends in the plan."""
    bridge = bridge_between(reference)
    for t in (0.0, 0.3, 0.8):
        t = jnp.asarray(t)
        (mean, covariance), (d_mean, d_covariance) = jax.jvp(bridge.marginal, (t,), (jnp.ones_like(t),))
        matrix = jax.jacfwd(lambda x, t=t: bridge(t, x))(mean)
        np.testing.assert_allclose(d_mean, bridge(t, mean), atol=1e-10)
        np.testing.assert_allclose(d_covariance, matrix @ covariance + covariance @ matrix.T + reference.epsilon * np.eye(2), atol=1e-9)
    mean, covariance = bridge.marginal(0.0)
    np.testing.assert_allclose(mean, bridge.mean0, atol=1e-12)
    np.testing.assert_allclose(covariance, bridge.cov0, atol=1e-12)
    np.testing.assert_allclose(bridge.target(jnp.asarray(0.0), bridge.mean0 + 1), bridge.conditional(bridge.mean0 + 1)[0], atol=1e-10)


@pytest.mark.parametrize("reference", REFERENCES)
def test_transitions_compose_and_agree_with_the_drift(reference):
    """Two legs of time make one, and d/dt of the mean and variance at the start is the process's own drift and noise."""
    x = jnp.array([0.7, -1.1])
    (a, c, q), (b, e, r), (whole, shift, variance) = (reference.transition(*times) for times in ((0.2, 0.5), (0.5, 0.9), (0.2, 0.9)))
    np.testing.assert_allclose(b * a, whole, rtol=1e-12)
    np.testing.assert_allclose(b * c + e, shift, rtol=1e-12)
    np.testing.assert_allclose(b**2 * q + r, variance, rtol=1e-12)
    slope = jax.jacfwd(lambda t: reference.transition(0.2, t)[0] * x + reference.transition(0.2, t)[1])(0.2)
    np.testing.assert_allclose(slope, reference(0.2, x), rtol=1e-12)
    np.testing.assert_allclose(jax.jacfwd(lambda t: reference.transition(0.2, t)[2])(0.2), reference.epsilon, rtol=1e-12)


def test_bridge_is_the_conditional_of_the_joint():
    """x_t | x_0, x_1 by Gaussian conditioning of (x_t, x_1) given x_0, on an interval that is not [0, 1]."""
    reference, x0, x1 = REFERENCES[1], jnp.array([0.7, -1.1]), jnp.array([0.1, 0.5])
    start, t, end = 0.2, 0.5, 0.9
    (a, c, q), (b, e, r) = reference.transition(start, t), reference.transition(t, end)
    gain = b * q / (b**2 * q + r)
    mean, variance = reference.bridge(t, x0, x1, start, end)
    np.testing.assert_allclose(mean, a * x0 + c + gain * (x1 - e - b * (a * x0 + c)), rtol=1e-12)
    np.testing.assert_allclose(variance, q - gain * b * q, rtol=1e-12)
    draws = jax.vmap(lambda key: sample_bridge(reference, key, t, x0, x1, start, end))(jax.random.split(jax.random.key(0), 4000))
    assert np.all(np.abs(draws.mean(0) - mean) < 4 * np.sqrt(variance / 4000))
    assert np.all(np.abs(draws.var(0) / variance - 1) < 4 * np.sqrt(2 / 4000))


def test_simulated_ends_have_the_target_law():
    """200 Euler steps of the bridge's SDE up to 0.99, 2000 paths: mean and covariance within 4 standard errors plus the O(h) bias of 1e-2."""
    bridge = bridge_between(REFERENCES[1])
    times = jnp.linspace(0, 0.99, 200)

    @jax.jit
    @jax.vmap
    def run(key):
        key_start, key_path = jax.random.split(key)
        x0 = bridge.mean0 + jnp.linalg.cholesky(bridge.cov0) @ jax.random.normal(key_start, (2,))
        field = ParametricReference(lambda parameters, t, x: bridge(t, x), None, bridge.reference.epsilon)
        return integrate(field.terms(key_path, x0), dfx.Euler(), x0, times=times)

    ends = run(jax.random.split(jax.random.key(1), 2000))
    mean, covariance = bridge.marginal(0.99)
    scale = np.sqrt(np.diag(covariance))
    assert np.all(np.abs(ends.mean(0) - mean) < (4 / np.sqrt(2000) + 1e-2) * scale)
    assert np.all(np.abs(np.cov(ends.T) - covariance) < (4 * np.sqrt(2 / 2000) + 1e-2) * np.outer(scale, scale))


def test_bad_input():
    with pytest.raises(ValueError, match="one d"):
        GaussianBridge(jnp.zeros(2), jnp.eye(3), jnp.zeros(2), jnp.eye(2), Brownian(1.0))
    with pytest.raises(ValueError, match="epsilon"):
        Brownian(0.0)
