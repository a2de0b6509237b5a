"""NFDM: the derived fields of a forward process, the bound in closed form, its limits on linear paths, and sampling through the stock drivers."""

import math

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import FlowMatchingPath, ProbabilityFlow, VPPath, integrate
from ergodax.core.likelihood import ExactDivergence, standard_normal_log_prob
from ergodax.data import GaussianMixture
from ergodax.diffusion import uniform_grid
from ergodax.diffusion.neural_flow_diffusion_models import (
    NFDM,
    GaussianForward,
    NeuralForward,
    NFDMDrift,
    NFDMLoss,
    PathForward,
    Volatility,
    acceleration,
    nfdm_integrand,
    nfdm_sde_terms,
    path_volatility,
)
from ergodax.testing import assert_mean


X, EPS = jnp.array([0.4, -1.1]), jnp.array([0.3, 0.9])
CURVED = GaussianForward(lambda t, x, args: jnp.sin(3 * x) + t, lambda t, x, args: x**2 - 2 * t)
DELTA, MEAN, VARIANCE = 0.01, 0.5, 0.3


def zero(t, x, args):
    return jnp.zeros_like(x)


class Skewed(NeuralForward):
    """A forward process that is not Gaussian: t x + (1 - 0.9 t) sinh(ε + t x)."""

    def transform(self, noise, t, data, args=None):
        return t * data + (1 - 0.9 * t) * jnp.sinh(noise + t * data)

    def inverse(self, z, t, data, args=None):
        return jnp.arcsinh((z - t * data) / (1 - 0.9 * t)) - t * data

    def log_prob(self, z, t, data, args=None):
        noise = self.inverse(z, t, data)
        return standard_normal_log_prob(noise) - jnp.sum(jnp.log((1 - 0.9 * t) * jnp.cosh(noise + t * data)))


@pytest.mark.parametrize("forward", [CURVED, Skewed()], ids=("Gaussian", "skewed"))
def test_fields_of_a_forward_process(forward):
    """F and its inverse; log q falls along the flow by the divergence of its velocity, with d/dt log q = -∇·f."""

    @jax.jit
    def run(t):
        def along(t):
            z = forward.transform(EPS, t, X)
            return forward.log_prob(z, t, X), z

        (_, z), (change, speed) = jax.jvp(along, (t,), (jnp.ones_like(t),))
        velocity, divergence = ExactDivergence()(lambda z: forward.velocity(z, t, X), z)
        drift = forward.drift(z, t, X, 0.7) - velocity
        score = jax.jacfwd(lambda z: forward.log_prob(z, t, X))(z)
        return forward.inverse(z, t, X), speed - velocity, change + divergence, drift - 0.245 * score

    noise, *zeros = run(0.35)
    np.testing.assert_allclose(noise, EPS, rtol=1e-12)
    for value in zeros:
        np.testing.assert_allclose(value, 0, atol=1e-12)


def test_default_forward_process():
    """f = μ' + (σ'/σ) (z - μ), and the ends N(0, I) and N(x, δ²) whatever the networks say."""
    t, h, z = 0.35, 1e-5, jnp.array([0.2, -0.5])

    def moments(t):
        mean, log_scale = CURVED.moments(t, X)
        return np.asarray(mean), np.asarray(log_scale)

    (mean, _), (after, log_after), (before, log_before) = moments(t), moments(t + h), moments(t - h)
    expected = (after - before) / (2 * h) + (log_after - log_before) / (2 * h) * (np.asarray(z) - mean)
    np.testing.assert_allclose(CURVED.velocity(z, t, X), expected, rtol=1e-8)
    u = 1 - t
    mean_bar, scale_bar = np.sin(3 * X) + t, np.exp(X**2 - 2 * t)
    np.testing.assert_allclose(mean, (1 - u) * X + u * (1 - u) * mean_bar, rtol=1e-12)
    np.testing.assert_allclose(np.exp(moments(t)[1]), DELTA ** (1 - u) * scale_bar ** (u * (1 - u)), rtol=1e-12)
    for end, centre, scale in ((0.0, 0 * X, 1.0), (1.0, X, DELTA)):
        np.testing.assert_allclose(moments(end)[0], centre, atol=1e-15)
        np.testing.assert_allclose(np.exp(moments(end)[1]), scale, rtol=1e-12)


@pytest.mark.parametrize("path", [VPPath(), FlowMatchingPath()], ids=("VP", "flow"))
def test_linear_paths_give_the_variational_diffusion_bound(path):
    """½ dSNR/dt |x - x̂|² with the best g; 1.125 times that for half and twice its square."""
    guess, t = X + jnp.array([0.2, 0.3]), jnp.asarray(0.6)
    slope = jax.grad(path.snr)(t)
    expected = slope / 2 * jnp.sum((X - guess) ** 2)
    for factor, ratio in ((1.0, 1.0), (0.5, 1.125), (2.0, 1.125)):
        model = NFDM(PathForward(path), lambda t, z, args: guess, lambda t, factor=factor: jnp.sqrt(factor) * path_volatility(path)(t))
        np.testing.assert_allclose(nfdm_integrand(model, t, path.interpolate(t, X, EPS), X), ratio * expected, rtol=1e-10)


def gaussian_model(volatility):
    """μ = t x, σ = δᵗ on data N(0.5, 0.3), with E[x | z]."""

    def denoised(t, z, args):
        return MEAN + t * VARIANCE / (t**2 * VARIANCE + DELTA ** (2 * t)) * (z - t * MEAN)

    return NFDM(GaussianForward(zero, zero), denoised, volatility)


def best_volatility(t):
    return DELTA**t * jnp.sqrt(-2 * math.log(DELTA) + 2 / t)


@pytest.mark.parametrize(("volatility", "expected"), [(best_volatility, 0.817119), (lambda t: jnp.full_like(t, 0.3), 13.4398)])
def test_bound_on_gaussian_data(volatility, expected):
    """By quadrature, B being linear in x; the loss agrees by z-scores. The entropy of the data is 0.816952."""
    model = gaussian_model(volatility)

    @jax.jit
    def quadrature():
        def integrand(t):
            unit = eqx.tree_at(lambda m: m.network, model, lambda t, z, args: jnp.ones(1))
            return nfdm_integrand(unit, t, jnp.zeros(1), jnp.zeros(1)) / (1 / VARIANCE + (t / DELTA**t) ** 2)

        return jnp.mean(jax.lax.map(integrand, (jnp.arange(4000, dtype=float) + 0.5) / 4000))

    total = quadrature() + math.log(2 * math.pi * math.e * DELTA**2) / 2
    entropy = math.log(2 * math.pi * math.e * VARIANCE) / 2
    assert abs(entropy - 0.816952) < 1e-6
    assert abs(total - expected) < 2e-5 * expected
    assert total > entropy

    def loss(key):
        first, second = jax.random.split(key)
        value, terms = NFDMLoss()(model, MEAN + math.sqrt(VARIANCE) * jax.random.normal(first, (256, 1)), second)
        return jnp.stack([value, terms["prior"]])

    values = jax.jit(jax.vmap(loss))(jax.random.split(jax.random.key(0), 100))
    assert_mean(values[:, :1], total, z=4)
    np.testing.assert_allclose(values[:, 1], 0, atol=1e-14)


def test_diffusion_term_is_zero_only_at_the_data():
    """For data that are one point."""
    data = jnp.broadcast_to(X, (16, 2))
    volatility = Volatility(key=jax.random.key(1))

    def diffusion(shift):
        model = NFDM(CURVED, lambda t, z, args: X + shift, volatility)
        return NFDMLoss()(model, data, jax.random.key(0))[1]["diffusion"]

    run = jax.jit(diffusion)
    assert run(0.0) == 0
    assert run(0.1) > 1e-3


def test_sampling_is_that_of_the_path():
    """With a linear F and the exact x̂: the probability flow and the reverse SDE's drift; one line under `integrate` and `diffeqsolve`."""
    mixture, path = GaussianMixture.isotropic(jnp.array([0.4, 0.6]), jnp.array([[1.0, 0.5], [-1.0, 0.3]]), 0.4), VPPath()
    exact, times = mixture.denoiser(path), uniform_grid(10, 0.02, 0.98)
    model = NFDM(PathForward(path), exact, path_volatility(path))

    @jax.jit
    def run(z, t):
        velocity = mixture.velocity_at(path, t, z)
        drift = velocity + path.diffusion(t) / 2 * mixture.score_at(path, t, z)
        sample = integrate(dfx.ODETerm(NFDMDrift(model, 0.0)), dfx.Euler(), z, times=times)
        expected = integrate(dfx.ODETerm(ProbabilityFlow(exact, path)), dfx.Euler(), z, times=times)
        controller = dfx.StepTo(times)
        term = dfx.ODETerm(NFDMDrift(model, 0.0))
        other = dfx.diffeqsolve(term, dfx.Euler(), 0.02, 0.98, None, z, stepsize_controller=controller).ys[0]
        return (NFDMDrift(model, 0.0)(t, z), NFDMDrift(model)(t, z), sample, other), (velocity, drift, expected, expected)

    for actual, expected in zip(*run(jnp.array([0.7, -0.2]), jnp.asarray(0.55)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-9)


def test_the_sde_has_the_law_of_its_scheme():
    """Euler on Gaussian data, whose drift is linear: mean and variance after all steps in closed form, near the data's."""
    model, n, times = gaussian_model(best_volatility), 3000, np.concatenate([np.geomspace(1e-3, 0.05, 20), np.linspace(0.06, 1.0, 120)])

    @jax.jit
    def run(keys):
        def one(key):
            first, second = jax.random.split(key)
            z0 = jax.random.normal(first, (1,))
            return integrate(nfdm_sde_terms(model, second, z0), dfx.Euler(), z0, times=jnp.asarray(times))

        ends = jax.vmap(lambda t: (NFDMDrift(model)(t, jnp.zeros(1))[0], NFDMDrift(model)(t, jnp.ones(1))[0], model.volatility(t)))
        return jax.vmap(one)(keys), ends(jnp.asarray(times[:-1]))

    samples, fields = run(jax.random.split(jax.random.key(0), n))
    mean, variance = 0.0, 1.0
    for h, b, end, g in zip(np.diff(times), *(np.asarray(field) for field in fields)):
        gain = 1 + h * (end - b)
        mean, variance = gain * mean + h * b, gain**2 * variance + h * g**2
    assert_mean(samples, mean, z=4)
    assert_mean((samples - mean) ** 2, variance, z=4)
    np.testing.assert_allclose([mean, variance], [MEAN, VARIANCE + DELTA**2], rtol=0.05)


def test_curvature():
    """Towards one point the flow-matching path is straight; VP's trajectories σ_t ε bend by σ''. The loss adds c times the mean square."""
    t, h, vp = 0.4, 1e-4, VPPath()
    for path, expected in ((FlowMatchingPath(), 0.0), (vp, (vp.sigma(t + h) - 2 * vp.sigma(t) + vp.sigma(t - h)) / h**2)):
        model = NFDM(PathForward(path), zero, path_volatility(path))
        bend = jax.jit(lambda t, path=path, model=model: acceleration(model, t, path.sigma(t) * EPS))
        np.testing.assert_allclose(bend(jnp.asarray(t)), expected * EPS, rtol=1e-5, atol=1e-12)
    model = NFDM(GaussianForward(lambda t, x, args: x + 1, zero), zero, lambda t: jnp.ones_like(t))

    @jax.jit
    def run(key):
        return [NFDMLoss(curvature=c, times=lambda key, n: jnp.full(n, t))(model, jnp.zeros((8, 2)), key) for c in (None, 0.5)]

    (plain, terms), (bent, more) = run(jax.random.key(0))
    np.testing.assert_allclose(bent - plain, 0.5 * more["curvature"], rtol=1e-12)
    assert more["curvature"] > 0
    assert "curvature" not in terms


def test_everything_is_trained():
    """Gradients of the loss reach F, x̂ and g; float32 stays float32; bad arguments are named."""
    gain = jnp.array([0.5, -0.2], jnp.float32)

    def build(params):
        forward = GaussianForward(lambda t, x, args: params[0] * x, lambda t, x, args: params[1] * x)
        return NFDM(forward, lambda t, z, args: params[2] * z, Volatility(key=jax.random.key(0)))

    def value(params):
        return NFDMLoss(curvature=0.1)(build(params), jnp.ones((8, 2), jnp.float32), jax.random.key(1))[0]

    result, slopes = jax.jit(jax.value_and_grad(value))((gain, gain, gain))
    assert result.dtype == jnp.float32
    for slope in slopes:
        assert bool(jnp.all(jnp.isfinite(slope) & (slope != 0)))
    with pytest.raises(ValueError, match="delta"):
        GaussianForward(zero, zero, 0.0)
    with pytest.raises(ValueError, match="decoder_std"):
        NFDMLoss(decoder_std=0.0)
    with pytest.raises(ValueError, match="batch"):
        NFDMLoss()(gaussian_model(best_volatility), jnp.zeros(3), jax.random.key(0))
