"""The exact fields against quadrature, against each other, and against the transport equations."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.transport import (
    BrownianBridgeGamma,
    EncoderDecoderInterpolant,
    LinearInterpolant,
    MixtureInterpolantFields,
    ScoreFromLatent,
    SineSquaredGamma,
    TrigonometricInterpolant,
    VariancePreservingInterpolant,
    VelocityFromScore,
)


INTERPOLANTS = [
    LinearInterpolant(BrownianBridgeGamma(2.0)),
    TrigonometricInterpolant(SineSquaredGamma(0.7)),
    VariancePreservingInterpolant(),
    EncoderDecoderInterpolant(),
]
POINTS = jnp.array([[0.3, -0.5], [-1.2, 0.8], [1.7, 1.4]])
name = lambda module: type(module).__name__  # noqa: E731


@pytest.mark.parametrize("interpolant", INTERPOLANTS, ids=name)
def test_fields_are_conditional_means(interpolant):
    """In one dimension: E[f | x_t = x] = ∫∫ f ρ₀ ρ₁ N(x; I, γ²) / ∫∫ ρ₀ ρ₁ N(x; I, γ²), by the trapezium rule."""
    source = np.array([0.4, 0.6]), np.array([-0.9, 0.5]), np.array([0.2, 0.3])
    target = np.array([0.7, 0.3]), np.array([1.0, -1.1]), np.array([0.25, 0.15])
    end = lambda mixture: (jnp.asarray(mixture[0]), jnp.asarray(mixture[1])[:, None], jnp.asarray(mixture[2]))  # noqa: E731
    fields = MixtureInterpolantFields(interpolant, *end(source), *end(target))
    grid = np.linspace(-5, 5, 401)
    density = lambda mixture: sum(w * np.exp(-((grid - m) ** 2) / (2 * c)) / np.sqrt(2 * np.pi * c) for w, m, c in zip(*mixture))  # noqa: E731
    pair = density(source)[:, None] * density(target) * (grid[1] - grid[0]) ** 2
    for t, x in [(0.25, 0.4), (0.7, -0.8)]:
        a, b, gamma = (float(clock(t)) for clock in (interpolant.source_share, interpolant.target_share, interpolant.gamma))
        da, db, d_gamma = (float(clock(t)) for clock in (interpolant.d_source_share, interpolant.d_target_share, interpolant.gamma.derivative))
        z = (x - a * grid[:, None] - b * grid) / gamma
        weight = pair * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi * gamma**2)
        rate = da * grid[:, None] + db * grid
        mean = lambda f, weight=weight: np.sum(f * weight) / np.sum(weight)  # noqa: E731
        expected = [np.log(np.sum(weight)), mean(rate + d_gamma * z), mean(rate), mean(z), -mean(z) / gamma]
        point = jnp.array([x])
        exact = [f(t, point) for f in (fields.log_prob, fields.velocity, fields.interpolant_velocity, fields.latent, fields.score)]
        np.testing.assert_allclose([np.squeeze(v) for v in exact], expected, rtol=1e-9)


@pytest.mark.parametrize("interpolant", INTERPOLANTS[::2], ids=name)
def test_identities_and_transport_equations(interpolant, mixtures, fields_of):
    """b = v - γγ's, s = ∇ log ρ = -η/γ, and ∂ρ/∂t = -∇·(bρ) = -∇·((b + εs)ρ) + εΔρ, divided by ρ."""
    fields, epsilon = fields_of(interpolant, mixtures), 0.7
    composed = VelocityFromScore(fields.interpolant_velocity, fields.score, interpolant.gamma)

    @jax.jit
    @jax.vmap
    def residuals(t, x):
        b, s = fields.velocity(t, x), fields.score(t, x)
        divergence = lambda field: jnp.trace(jax.jacfwd(lambda x: field(t, x))(x))  # noqa: E731
        log_rate, gradient = jax.grad(fields.log_prob, (0, 1))(t, x)
        drift = lambda t, x: fields.velocity(t, x) + epsilon * fields.score(t, x)  # noqa: E731
        laplacian = jnp.trace(jax.hessian(lambda x: fields.log_prob(t, x))(x)) + gradient @ gradient
        return (
            composed(t, x) - b,
            gradient - s,
            ScoreFromLatent(fields.latent, interpolant.gamma)(t, x) - s,
            log_rate + divergence(fields.velocity) + b @ gradient,
            log_rate + divergence(drift) + drift(t, x) @ gradient - epsilon * laplacian,
        )

    for residual in residuals(jnp.array([0.13, 0.45, 0.88]), POINTS):
        np.testing.assert_allclose(residual, 0, atol=1e-10)


def test_ends_are_the_two_densities(mixtures, fields_of):
    fields = fields_of(LinearInterpolant(), mixtures)
    for t, mixture in zip((0.0, 1.0), mixtures, strict=True):
        log_density = jax.scipy.stats.multivariate_normal.logpdf
        exact = jnp.log(sum(w * jnp.exp(log_density(POINTS[0], m, c)) for w, m, c in zip(*mixture)))
        np.testing.assert_allclose(fields.log_prob(t, POINTS[0]), exact, rtol=1e-12)
        assert all(jnp.isfinite(f(t, POINTS[0])).all() for f in (fields.velocity, fields.score, fields.latent, fields.interpolant_velocity))


def test_isotropic_variances_are_full_covariances(mixtures):
    (weights0, means0, _), (weights1, means1, _) = mixtures
    variances0, variances1 = jnp.array([0.3, 0.5]), jnp.array([0.2, 0.4, 0.6])
    build = lambda c0, c1: MixtureInterpolantFields(LinearInterpolant(), weights0, means0, c0, weights1, means1, c1)  # noqa: E731
    short, full = build(variances0, variances1), build(variances0[:, None, None] * jnp.eye(2), variances1[:, None, None] * jnp.eye(2))
    np.testing.assert_allclose(short.velocity(0.3, POINTS[0]), full.velocity(0.3, POINTS[0]), rtol=1e-13)


def test_sweep_of_gamma_and_float32(mixtures, fields_of):
    at = jax.jit(lambda scale: fields_of(LinearInterpolant(BrownianBridgeGamma(scale)), mixtures).velocity(0.3, POINTS[0]))
    scales = jnp.array([0.5, 2.0])
    np.testing.assert_allclose(jax.vmap(at)(scales), jnp.stack([at(s) for s in scales]), rtol=1e-12)
    fields = jax.tree.map(lambda a: a.astype(jnp.float32) if eqx.is_array(a) else a, fields_of(LinearInterpolant(), mixtures))
    single = eqx.filter_jit(fields.velocity)(jnp.float32(0.3), POINTS[0].astype(jnp.float32))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, at(1.0), rtol=1e-5)


def test_shapes_that_do_not_fit_are_refused(mixtures):
    (weights0, means0, covariances0), target = mixtures
    with pytest.raises(ValueError, match="end 0 must have"):
        MixtureInterpolantFields(LinearInterpolant(), weights0, means0, covariances0[:1], *target)
