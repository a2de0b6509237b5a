"""Flexible forward SDEs: N(0, I) is stationary, the kernel of constant matrices, the bounds in closed form, and sampling by the stock drivers."""

import math

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from ergodax.core import VPPath, integrate
from ergodax.data import GaussianMixture
from ergodax.diffusion import LinearBeta, NoiseScore
from ergodax.diffusion.fp_diffusion import (
    ConstantFP,
    FPLoss,
    FPProcess,
    FPReverse,
    SimulatedFPBound,
    VariableFP,
    conditioning_penalty,
    fp_integrand,
    fp_reverse_terms,
)
from ergodax.testing import assert_covariance, assert_mean


ROOT = jnp.array([[1.2, 0.0, 0.1], [0.3, 0.8, 0.0], [-0.2, 0.4, 1.1]])
PAIRS = jnp.array([[0.0, 0.9, -0.4], [0.0, 0.0, 1.3], [0.2, 0.0, 0.0]])
BETA = LinearBeta(0.5, 3.0)
CONSTANT = ConstantFP(ROOT, PAIRS, BETA)
POINTS = jax.random.normal(jax.random.key(0), (6, 3))


def root_field(x):
    return ROOT + 0.3 * jnp.sin(x)[:, None] * jnp.cos(jnp.roll(x, 1))[None, :]


def coupling_field(x):
    return PAIRS * (1 + jnp.tanh(x)[:, None] * x[None, :])


VARIABLE = VariableFP(root_field, coupling_field, BETA)


class WithoutDivergence(FPProcess):
    """The paper's form with a variable ω: no div ω."""

    beta: LinearBeta = BETA

    def root(self, x):
        return root_field(x)

    def omega(self, x):
        return VARIABLE.omega(x)

    def divergences(self, x):
        return VARIABLE.divergences(x)[0], jnp.zeros_like(x)


def stationarity(process):
    """The Fokker–Planck right-hand side of N(0, I) over its density, at each of the points; by autodiff of the fluxes, from the SDE alone."""

    def density(x):
        return jnp.exp(-jnp.sum(x**2) / 2)

    def spread(x):
        columns = jax.vmap(lambda w: process.noise(0.4, x, w), out_axes=1)(jnp.eye(3))
        return columns @ columns.T * density(x)

    def flux(x):
        return process.forward_drift(0.4, x) * density(x) - jnp.einsum("ijj->i", jax.jacfwd(spread)(x)) / 2

    return jax.jit(jax.vmap(lambda x: jnp.trace(jax.jacfwd(flux)(x)) / density(x)))(POINTS)


@pytest.mark.parametrize(
    "process",
    [CONSTANT, VariableFP(root_field, lambda x: PAIRS, BETA), VARIABLE],
    ids=("constant", "variable R", "both variable"),
)
def test_standard_normal_is_stationary(process):
    np.testing.assert_allclose(stationarity(process), 0, atol=1e-12)


def test_variable_omega_needs_its_divergence():
    assert jnp.abs(stationarity(WithoutDivergence())).max() > 0.1


def test_kernel():
    """Φ = e^{-BM}, Σ = I - ΦΦᵀ; both solve their differential equations; R = I, ω = 0 is VP, R = I alone keeps Σ = (1 - e^{-B}) I."""
    m = np.asarray(ROOT @ ROOT.T / 2 + PAIRS - PAIRS.T)
    kernel = jax.jit(lambda process, t: process.kernel(t, jnp.zeros(3)))
    for t in (0.0, 0.6, 0.999):
        phi, sigma = kernel(CONSTANT, t)
        expected = scipy.linalg.expm(-float(BETA.integral(1 - t)) * m)
        np.testing.assert_allclose(phi, expected, atol=1e-13)
        np.testing.assert_allclose(sigma, np.eye(3) - expected @ expected.T, atol=1e-13)
    t, h = 0.6, 1e-5
    (phi, sigma), after, before = (kernel(CONSTANT, s) for s in (t, t - h, t + h))
    beta = float(BETA(1 - t))
    np.testing.assert_allclose((after[0] - before[0]) / (2 * h), -beta * m @ phi, atol=1e-8)
    np.testing.assert_allclose((after[1] - before[1]) / (2 * h), beta * (ROOT @ ROOT.T - m @ sigma - sigma @ m.T), atol=1e-8)
    path = VPPath()
    phi, sigma = kernel(ConstantFP(), t)
    np.testing.assert_allclose(phi, path.alpha(t) * np.eye(3), atol=1e-13)
    np.testing.assert_allclose(sigma, path.sigma(t) ** 2 * np.eye(3), atol=1e-13)
    np.testing.assert_allclose(kernel(ConstantFP(coupling=PAIRS), t)[1], sigma, atol=1e-13)


def test_perturbation_and_score():
    """x_t = Φ x + L ε, and -L^{-T} ε is the gradient of its log-density; data of any shape."""
    x, noise, t = POINTS[0], POINTS[1], 0.5

    @jax.jit
    def run():
        phi, sigma = CONSTANT.kernel(t, x)
        z = CONSTANT.perturb(t, x, noise)
        return z, CONSTANT.score(t, noise), jax.grad(lambda z: jax.scipy.stats.multivariate_normal.logpdf(z, phi @ x, sigma))(z)

    z, score, expected = run()
    np.testing.assert_allclose(score, expected, rtol=1e-9)
    np.testing.assert_array_equal(CONSTANT.perturb(t, x.reshape(3, 1), noise.reshape(3, 1))[:, 0], z)


DATA = GaussianMixture(
    jnp.array([0.3, 0.7]), jnp.array([[1.0, 0.0, -0.5], [-0.8, 0.4, 0.6]]), jnp.stack([0.2 * jnp.eye(3), jnp.diag(jnp.array([0.1, 0.5, 0.3]))])
)


def marginal(process, t):
    phi, sigma = process.kernel(t, jnp.zeros(3))
    return GaussianMixture(DATA.weights, DATA.means @ phi.T, phi @ DATA.covariances @ phi.T + sigma)


SPREAD = jnp.diag(jnp.array([0.2, 0.6, 1.5]))


def covariance_at(t):
    """Of the marginal, for data N(0, SPREAD)."""
    phi, sigma = CONSTANT.kernel(t, jnp.zeros(3))
    return phi @ SPREAD @ phi.T + sigma


def gaussian_score(t, x, args=None):
    return -jnp.linalg.solve(covariance_at(t), x)


@pytest.mark.parametrize("process", [CONSTANT, VARIABLE], ids=("constant", "variable"))
def test_reverse_fields_carry_the_marginals(process):
    """∂p/∂t = -∇·(v p) + ½ κ² ∇∇:(D p), divided by p: for the exact score of mixture data, and for N(0, I) where there is no kernel."""

    def log_prob(t, x):
        return marginal(process, t).log_prob(x) if process is CONSTANT else -jnp.sum(x**2) / 2

    def residual(x, kappa):
        t = 0.55
        field = FPReverse(lambda t, x, args: jax.grad(log_prob, 1)(t, x), process, kappa)

        def flux(x):
            def spread(x):
                root = process.root(x)
                return process.rate(t, x) * root @ root.T * jnp.exp(log_prob(t, x))

            return field(t, x) * jnp.exp(log_prob(t, x)) - kappa**2 / 2 * jnp.einsum("ijj->i", jax.jacfwd(spread)(x))

        return jax.grad(log_prob)(t, x) + jnp.trace(jax.jacfwd(flux)(x)) * jnp.exp(-log_prob(t, x))

    run = jax.jit(jax.vmap(residual, in_axes=(0, None)))
    for kappa in (0.0, 1.0, 0.6):
        np.testing.assert_allclose(run(POINTS[:3], kappa), 0, atol=1e-10)


def test_sampling():
    """Euler on the reverse SDE and Heun on the flow, for Gaussian data: the covariance of the first by its recursion, of the second the data's."""
    steps, n = 30, 600
    times = jnp.linspace(0.0, 1.0, steps + 1)

    @jax.jit
    def run(keys):
        def one(key):
            first, second = jax.random.split(key)
            x0 = jax.random.normal(first, (3,))
            return integrate(fp_reverse_terms(CONSTANT, gaussian_score, second, x0), dfx.Euler(), x0, times=times)

        flow = jax.vmap(lambda x: integrate(dfx.ODETerm(FPReverse(gaussian_score, CONSTANT)), dfx.Heun(), x, times=times), out_axes=1)(jnp.eye(3))
        gains = jax.vmap(lambda t: jax.vmap(lambda x: FPReverse(gaussian_score, CONSTANT, 1.0)(t, x), out_axes=1)(jnp.eye(3)))(times[:-1])
        return jax.vmap(one)(keys), flow, gains, covariance_at(0.0)

    samples, flow, gains, start = run(jax.random.split(jax.random.key(0), n))
    covariance = np.eye(3)
    for t, gain in zip(times, gains):
        gain = np.eye(3) + np.asarray(gain) / steps
        covariance = gain @ covariance @ gain.T + float(BETA(1 - t)) * np.asarray(ROOT @ ROOT.T) / steps
    assert_covariance(samples, covariance, z=4)
    np.testing.assert_allclose(flow @ start @ flow.T, SPREAD, atol=0.04)


def test_bound_on_gaussian_data():
    """With the exact ε̂: entropy + KL(p_{t=0} ‖ N(0, I)) + the decoder's E KL, by z-scores. (Below the first no bound can be.)"""
    margin = 0.05

    def network(t, x, args):
        return -jnp.linalg.cholesky(CONSTANT.kernel(t, x)[1]).T @ gaussian_score(t, x)

    def loss(key):
        first, second = jax.random.split(key)
        return 3 * FPLoss(margin, 0.3)(NoiseScore(network, CONSTANT), jax.random.normal(first, (64, 3)) @ jnp.sqrt(SPREAD), second)[0]

    values = jax.jit(lambda keys: jax.lax.map(loss, keys))(jax.random.split(jax.random.key(1), 30))
    phi, sigma = (np.asarray(a) for a in CONSTANT.kernel(1 - margin, jnp.zeros(3)))
    decoder = np.linalg.inv(phi) @ sigma @ np.linalg.inv(phi).T
    posterior = np.linalg.inv(np.linalg.inv(SPREAD) + np.linalg.inv(decoder))

    def kl(p, q):
        ratio = np.linalg.solve(q, p)
        return (np.trace(ratio) - 3 - np.linalg.slogdet(ratio)[1]) / 2

    entropy = np.linalg.slogdet(2 * math.pi * math.e * np.asarray(SPREAD))[1] / 2
    expected = entropy + kl(np.asarray(covariance_at(0.0)), np.eye(3)) + kl(posterior, decoder)
    assert_mean(values[:, None], expected + 0.3 * float(conditioning_penalty(CONSTANT, POINTS[0])), z=4)


def test_implicit_integrand():
    """At stationarity log N(x; 0, I) + ∫ integrand is a martingale: its drift, the generator of log N plus the integrand, is 0 at every x."""

    def drift(x):
        spread = jax.vmap(lambda w: VARIABLE.diffuse(0.4, x, w), out_axes=1)(jnp.eye(3))
        generator = -jnp.sum(x * VARIABLE.forward_drift(0.4, x)) - jnp.trace(spread) / 2
        return generator + fp_integrand(lambda t, x, args: -x, VARIABLE, 0.4, x)

    np.testing.assert_allclose(jax.jit(jax.vmap(drift))(POINTS), 0, atol=1e-12)


def test_simulated_bound():
    """One Euler step by hand; and with many, for data N(0, I), log p(x) to z-scores (its bias, from h = 1/20, is far below them)."""
    process, x, key = VariableFP(root_field, coupling_field, LinearBeta(0.1, 0.2)), POINTS[0], jax.random.key(3)

    def score(t, x, args):
        return -x

    @jax.jit
    def by_hand():
        w = jax.random.normal(jax.random.fold_in(key, 0), (3,))
        end = x + process.forward_drift(1.0, x) + process.noise(1.0, x, w)
        return fp_integrand(score, process, 1.0, x) - jnp.sum(end**2) / 2 - 1.5 * math.log(2 * math.pi), end

    @jax.jit
    def many(keys):
        bound = SimulatedFPBound(20)
        return jax.vmap(lambda key: bound(score, process, x, key)[0])(keys), SimulatedFPBound(1)(score, process, x, key)

    estimates, once = many(jax.random.split(key, 60))
    for actual, expected in zip(once, by_hand()):
        np.testing.assert_allclose(actual, expected, rtol=1e-12)
    assert_mean(estimates[:, None], -float(jnp.sum(x**2)) / 2 - 1.5 * math.log(2 * math.pi), z=4)


def test_gradients_float32_and_bad_arguments():
    """Gradients of the bound reach root and coupling; the penalty is 0 at R = I."""

    def value(matrices):
        model = NoiseScore(lambda t, x, args: 0.5 * x, ConstantFP(*matrices, BETA))
        return FPLoss(0.01)(model, POINTS.astype(jnp.float32), jax.random.key(0))[0]

    result, slopes = jax.jit(jax.value_and_grad(value))((ROOT.astype(jnp.float32), PAIRS.astype(jnp.float32)))
    assert result.dtype == jnp.float32
    for slope in slopes:
        assert bool(jnp.all(jnp.isfinite(slope)))
        assert jnp.abs(slope).max() > 1e-3
    assert abs(conditioning_penalty(ConstantFP(), POINTS[0])) < 1e-15
    assert conditioning_penalty(CONSTANT, POINTS[0]) > 0.01
    for call, name in (
        (lambda: ConstantFP(jnp.ones((2, 3))), "root_matrix|d"),
        (lambda: FPLoss(margin=0.0), "margin"),
        (lambda: FPLoss(regulariser=-1.0), "regulariser"),
        (lambda: SimulatedFPBound(0), "num_steps"),
        (lambda: fp_reverse_terms(CONSTANT, gaussian_score, jax.random.key(0), POINTS[0], -1.0), "noise_scale"),
    ):
        with pytest.raises((ValueError, TypeError), match=name):
            call()
