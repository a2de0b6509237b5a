"""The closed-form minimiser against the risk itself, the flow against its ODE, the limit against the scalar recursions and against simulation."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ergodax.core import FlowMatchingPath, fit, integrate
from ergodax.data import GaussianMixture
from ergodax.transport import (
    AffineInterpolant,
    AutoencoderRisk,
    LinearInterpolant,
    TiedAutoencoder,
    TrigonometricInterpolant,
    ZeroGamma,
    asymptotic_error,
    asymptotic_flow,
    bayes_error,
    fit_autoencoder_flow,
)


TRIGONOMETRIC = TrigonometricInterpolant(ZeroGamma())


def draw(key, n, d, s):
    """x₀, x₁ and the clusters, with μ = (1, …, 1)."""
    key_sign, key_source, key_target = jax.random.split(key, 3)
    signs = jnp.where(jax.random.bernoulli(key_sign, 0.5, (n,)), 1.0, -1.0)
    source, noise = (jax.random.normal(k, (n * d,)).reshape(n, d) for k in (key_source, key_target))
    return source, signs[:, None] + s * noise, signs


@pytest.mark.parametrize("interpolant", [None, TRIGONOMETRIC])
def test_minimiser_of_the_risk(interpolant):
    """Its gradient is 0, at every t, with the clusters found from the data; the velocity is the one that the denoiser implies."""
    source, target, signs = draw(jax.random.key(0), 6, 1000, 0.7)
    flow = fit_autoencoder_flow(source, target, interpolant=interpolant, ridge=0.3)
    path = flow.interpolant
    x = jax.random.normal(jax.random.key(1), (1000,))

    @jax.jit
    def at(t):
        alpha, beta, slope, rise = path.source_share(t), path.target_share(t), path.d_source_share(t), path.d_target_share(t)
        model = flow.autoencoder(t)
        gradient = jax.grad(lambda model: AutoencoderRisk(0.3)(model, (alpha * source + beta * target, target))[0])(model)
        implied = slope / alpha * x + (rise - slope * beta / alpha) * model(x)
        return gradient.weight, gradient.skip, flow(t, x) - implied

    for t in (0.1, 0.5, 0.95):
        for residual in at(t):
            np.testing.assert_allclose(residual, 0.0, atol=1e-12)
    labelled = fit_autoencoder_flow(source, target, signs, interpolant=interpolant, ridge=0.3)
    np.testing.assert_allclose(jnp.abs(labelled.target_mean), jnp.abs(flow.target_mean), rtol=1e-12)


def test_descent_finds_no_better():
    """Adam from a random start ends where the closed form is."""
    n, d, t = 4, 100, 0.5
    source, target, _ = draw(jax.random.key(2), n, d, 0.7)
    noisy = (1 - t) * source + t * target
    exact = fit_autoencoder_flow(source, target).autoencoder(t)
    start = TiedAutoencoder(jax.random.normal(jax.random.key(3), (d,)), jnp.ones(()))
    with jax.numpy_dtype_promotion("standard"):
        fitted = fit(AutoencoderRisk(), start, optax.adam(0.04), lambda key, step: (noisy, target), jax.random.key(4), num_steps=400, every=400)
    risk = lambda model: float(AutoencoderRisk()(model, (noisy, target))[0])  # noqa: E731
    assert risk(fitted.model) == pytest.approx(risk(exact), rel=1e-4)
    assert fitted.model.skip == pytest.approx(float(exact.skip), abs=1e-3)


@pytest.mark.parametrize("interpolant", [None, TRIGONOMETRIC])
def test_flow_in_closed_form(interpolant):
    """`transport` is the solution of dx/dt = b at every time: the error of Heun's steps falls fourfold when they are halved."""
    source, target, _ = draw(jax.random.key(5), 4, 2000, 0.7)
    flow = fit_autoencoder_flow(source, target, interpolant=interpolant)
    points = jax.random.normal(jax.random.key(6), (8, 2000))

    @jax.jit
    def error(times):
        ends = jax.vmap(lambda x: integrate(dfx.ODETerm(flow), dfx.Heun(), x, times=times))(points)
        return jnp.abs(ends - jax.vmap(lambda x: flow.transport(times[-1], x))(points)).max()

    for end in (0.6, 1.0):
        coarse, fine = error(jnp.linspace(0, end, 41)), error(jnp.linspace(0, end, 81))
        assert fine < 5e-4
        assert coarse / fine == pytest.approx(4, rel=0.1)


def test_recursions_of_the_limit():
    """dM/dt of the overlaps with μ and with both mean noises, integrated; c at one time from the ridge regression's own formula."""
    n, ridge, s, rho = 8.0, 0.1, 1.5, 1.44
    flow = asymptotic_flow(n, s, rho, ridge=ridge)

    def velocity(t, overlaps, args):
        alpha, beta = 1 - t, t
        a, b = ridge * (rho + s**2) + (n - 1) * s**2, n - 1 + ridge
        c = beta * a / (beta**2 * a + alpha**2 * b)
        weight = n / (n + ridge) * jnp.stack([1 - c * beta, (1 - c * beta), -c * alpha])
        return -overlaps / alpha + (1 + beta / alpha) * (c * overlaps + weight)

    end = 0.9
    overlaps = integrate(dfx.ODETerm(velocity), dfx.Heun(), jnp.zeros(3), times=jnp.linspace(0, end, 2001))
    np.testing.assert_allclose(flow.class_mean(end), overlaps * jnp.array([rho**0.5, s / n**0.5, n**-0.5]), rtol=1e-6)
    c = 0.4 * (7 * 2.25 + 0.1 * 3.69) / (0.16 * (7 * 2.25 + 0.1 * 3.69) + 0.36 * 7.1)
    assert flow.autoencoder(0.4).skip == pytest.approx(c)


def test_error_against_simulation():
    """100 Euler steps of the velocity from 0 (a push of 1e-9 picks the cluster): 2 s²/n, slope -1, twice what the labelled mean does, and c_t."""
    d, runs, s, sizes = 1000, 3, 1.0, np.array([4, 16, 64])
    times, points = jnp.linspace(0.0, 1.0, 101), jnp.array([0.2, 0.5, 0.8])
    source, target, signs = jax.jit(jax.vmap(lambda key: draw(key, 64, d, s)))(jax.random.split(jax.random.key(10), runs))
    learn = jax.jit(jax.vmap(lambda *rows: fit_autoencoder_flow(*rows, ridge=0.0)))

    @jax.jit
    @jax.vmap
    def simulate(flow):
        mean = integrate(dfx.ODETerm(flow), dfx.Euler(), 1e-9 * flow.target_mean, times=times)
        return jnp.mean((mean - 1) ** 2), jax.vmap(lambda t: flow.autoencoder(t).skip)(points)

    results = [simulate(learn(source[:, :n], target[:, :n], signs[:, :n])) for n in sizes]
    errors, skips = (np.mean(part, axis=1) for part in zip(*results))
    # |x̄₁ - μ - s x̄₀|²/d is 2 s²/n times a mean of runs × d squared normals; the bias of 100 Euler steps is below 1%.
    assert np.abs(errors * sizes / (2 * s**2) - 1).max() < 0.01 + 4 * (2 / (runs * d)) ** 0.5
    assert np.polyfit(np.log(sizes), np.log(errors), 1)[0] == pytest.approx(-1, abs=0.05)
    np.testing.assert_allclose([asymptotic_error(float(n), s, ridge=0.0) for n in sizes], 2 * s**2 / sizes, rtol=1e-12)
    against_bayes = errors[1:] / [bayes_error(float(n), s) for n in sizes[1:]]
    assert ((against_bayes > 1.8) & (against_bayes < 2.3)).all()
    np.testing.assert_allclose(skips, np.broadcast_to(points / (points**2 + (1 - points) ** 2), (3, 3)), rtol=0.05)


def test_oracle():
    """E[x₁ | x_t] of the model in closed form: residuals are orthogonal to functions of x_t, its flow returns the mixture."""
    s, mean, path, n = 0.6, jnp.array([0.8, -0.5]), FlowMatchingPath(), 20_000
    mixture = GaussianMixture.isotropic([0.5, 0.5], jnp.stack([mean, -mean]), s)

    def oracle(t, x):
        total = (1 - t) ** 2 + t**2 * s**2
        return (t * s**2 * x + (1 - t) ** 2 * mean * jnp.tanh(t * (x @ mean) / total)) / total

    @jax.jit
    def compare(key):
        key_data, key_source = jax.random.split(key)
        x1, x0 = mixture.sample(key_data, n), jax.random.normal(key_source, (n, 2))

        def residuals(t):
            xt = t * x1 + (1 - t) * x0
            own = jax.vmap(lambda x: oracle(t, x))(xt)
            tests = (x1 - own)[:, :, None] * jnp.stack([jnp.ones(n), xt @ mean, jnp.tanh(2 * xt @ mean), xt[:, 0] ** 2], 1)[:, None]
            return own - mixture.denoiser(path)(t, xt, None), jnp.mean(tests, 0) / (jnp.std(tests, 0) / n**0.5)

        # The flow is singular at t = 1 only in form: b = (E[x₁ | x] - x)/(1 - t), so the last step is Euler's.
        velocity = jax.vmap(lambda t, x, args: (oracle(t, x) - x) / (1 - t), (None, 0, None))
        end = integrate(dfx.ODETerm(velocity), dfx.Heun(), x0, times=jnp.linspace(0, 0.98, 50))
        end = end + 0.02 * velocity(0.98, end, None)
        waves = jnp.array([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0], [1.5, -1.0]])
        moments, exact = jnp.cos(end @ waves.T), jnp.cos(waves @ mean) * jnp.exp(-(s**2) * jnp.sum(waves**2, 1) / 2)
        return jax.vmap(residuals)(jnp.array([0.2, 0.6])), (jnp.mean(moments, 0) - exact) / (jnp.std(moments, 0) / n**0.5)

    (difference, z_scores), flow_z_scores = compare(jax.random.key(8))
    np.testing.assert_allclose(difference, 0.0, atol=1e-12)
    assert jnp.abs(z_scores).max() < 4
    assert jnp.abs(flow_z_scores).max() < 4


def test_many_samples_give_the_oracle():
    """n → ∞: f is E[x₁ | x_t] of the mixture, whose tanh is a sign in this dimension."""
    d, s, t, mean = 1000, 0.6, 0.6, 1.0
    model = asymptotic_flow(1e12, s, interpolant=AffineInterpolant(FlowMatchingPath())).autoencoder(t)
    total = (1 - t) ** 2 + t**2 * s**2
    x = t * mean + total**0.5 * np.random.default_rng(7).standard_normal(d)
    oracle = (t * s**2 * x + (1 - t) ** 2 * mean * np.tanh(t * mean * x.sum() / total)) / total
    np.testing.assert_allclose(model.skip * x + model.weight[0] * mean, oracle, atol=1e-9)


def test_refusals():
    x = jnp.ones((3, 2))
    for arguments, message in [
        ((x, x[:2]), "one shape"),
        ((x, x.at[1, 0].set(jnp.nan)), "`target`"),
        ((x, x, jnp.ones(2)), "`signs` must have shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit_autoencoder_flow(*arguments)
    with pytest.raises(ValueError, match="`ridge`"):
        fit_autoencoder_flow(x[:1], x[:1], ridge=0.0)
    with pytest.raises(ValueError, match="no latent noise"):
        fit_autoencoder_flow(x, x, interpolant=LinearInterpolant())
    with pytest.raises(ValueError, match="`cluster_std`"):
        asymptotic_flow(4, 0.0)
