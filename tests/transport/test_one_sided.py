"""One-sided and mirror interpolants: exact fields for data on a few atoms, and with Gaussian mixtures; identities and transport equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import FlowMatchingPath, VPPath
from ergodax.transport import AffineInterpolant, MixtureInterpolantFields, SineSquaredGamma, VelocityFromScore
from ergodax.transport.interpolants import MirrorInterpolant
from ergodax.transport.one_sided import OneSidedInterpolant, ScoreFromSource, SourceLoss, VelocityFromSource


@pytest.mark.parametrize("path", [FlowMatchingPath(), VPPath()], ids=lambda path: type(path).__name__)
def test_everything_follows_from_the_source(path, mixtures):
    """From η₀ = -a s: the score, and the velocity in the module's three forms, at t = 0 by the mean of the data."""
    interpolant, target = AffineInterpolant(path), mixtures[1]
    fields = MixtureInterpolantFields(interpolant, jnp.ones(1), jnp.zeros((1, 2)), jnp.ones(1), *target)
    source = lambda t, x, args=None: -interpolant.source_share(t) * fields.score(t, x)  # noqa: E731
    x = jnp.array([0.3, -0.5])

    @jax.jit
    @jax.vmap
    def run(t):
        a, b, da, db = (f(t) for f in (interpolant.source_share, interpolant.target_share, interpolant.d_source_share, interpolant.d_target_share))
        score, velocity = ScoreFromSource(source, interpolant)(t, x), VelocityFromSource(source, interpolant, target.mean)(t, x)
        return score, fields.score(t, x), velocity, fields.velocity(t, x), db / b * x + (a**2 * db / b - a * da) * fields.score(t, x)

    score, exact_score, velocity, exact_velocity, by_score = run(jnp.array([0.2, 0.5, 0.9]))
    np.testing.assert_allclose(score, exact_score, rtol=1e-12)
    np.testing.assert_allclose(velocity, exact_velocity, rtol=1e-9)
    np.testing.assert_allclose(by_score, exact_velocity, rtol=1e-9)
    score, exact_score, velocity, exact_velocity, _ = run(jnp.array([0.0]))
    np.testing.assert_allclose(score, exact_score, rtol=1e-12)
    if isinstance(path, FlowMatchingPath):
        np.testing.assert_allclose(score[0], -x, rtol=1e-12)
        np.testing.assert_allclose(velocity[0], target.mean - x, rtol=1e-12)
        np.testing.assert_allclose(velocity, exact_velocity, rtol=1e-9)
        np.testing.assert_array_equal(ScoreFromSource(lambda t, x, args: x, interpolant)(1.0, x), jnp.zeros(2))


# Data on four atoms: the density of x_t is a mixture of Gaussians around J(t, atom), whatever J is.
ATOMS, WEIGHTS = jnp.array([-1.3, -0.2, 0.6, 1.9]), jnp.array([0.1, 0.4, 0.3, 0.2])
CASES = {
    "one_sided": OneSidedInterpolant(
        lambda t: jnp.cos(jnp.pi / 2 * t) ** 2, lambda t, x1: jnp.sin(jnp.pi / 2 * t) * x1 + t * (1 - t) * jnp.sin(3 * x1)
    ),
    "mirror": MirrorInterpolant(SineSquaredGamma(0.8)),
    "wandering_mirror": MirrorInterpolant(SineSquaredGamma(0.8), lambda t, x1: x1 + t * (1 - t) * jnp.sin(3 * x1)),
}


@pytest.mark.parametrize("case", CASES)
def test_fields_on_atoms(case):
    """ρ obeys ∂ log ρ/∂t = -∂b/∂x - b s with b = E[dx_t/dt | x_t]; s = -η₀/a, or b = v - γγ's."""
    interpolant, zero = CASES[case], jnp.zeros(())
    noise = interpolant.source_share if case == "one_sided" else interpolant.gamma

    def at(t, x):
        """Posterior weights of the atoms, the noise that each implies, and log ρ."""
        centre = jax.vmap(lambda atom: interpolant.interpolate(t, zero, atom, zero))(ATOMS)
        z = (x - centre) / noise(t)
        logits = jnp.log(WEIGHTS) - z**2 / 2 - jnp.log(noise(t))
        return jax.nn.softmax(logits), z, jax.nn.logsumexp(logits)

    def mean(t, x, rate):
        share, z, _ = at(t, x)
        return share @ jax.vmap(rate)(ATOMS, z)

    ends = (lambda atom, z: (z, atom, zero)) if case == "one_sided" else (lambda atom, z: (atom, atom, z))
    velocity = lambda t, x: mean(t, x, lambda atom, z: interpolant.d_interpolate(t, *ends(atom, z)))  # noqa: E731
    latent = lambda t, x, args=None: mean(t, x, lambda atom, z: z)  # noqa: E731

    @jax.jit
    @jax.vmap
    def run(t, x):
        log_rho = lambda t, x: at(t, x)[2]  # noqa: E731
        score = jax.grad(log_rho, 1)(t, x)
        b, slope = jax.value_and_grad(velocity, 1)(t, x)
        if case == "one_sided":
            identity = ScoreFromSource(latent, interpolant)(t, x) - score
        else:
            drift = lambda t, x, args: mean(t, x, lambda atom, z: interpolant.d_mean(t, atom, atom))  # noqa: E731
            identity = VelocityFromScore(drift, lambda t, x, args: score, interpolant.gamma)(t, x) - b
        return jax.grad(log_rho)(t, x), -slope - b * score, identity

    change, flux, identity = run(jnp.array([0.2, 0.45, 0.7]), jnp.array([0.4, -0.8, 1.1]))
    np.testing.assert_allclose(change, flux, rtol=1e-9)
    np.testing.assert_allclose(identity, 0, atol=1e-10)
    np.testing.assert_array_less(0.01, jnp.abs(change))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_ends_and_dtype(dtype):
    x0, x1, z = jnp.array([0.5, -2.0], dtype), jnp.array([1.5, 0.25], dtype), jnp.ones(2, dtype)
    for case, interpolant in CASES.items():
        for t, expected in ((0.0, x0 if case == "one_sided" else x1), (1.0, x1)):
            value = interpolant.interpolate(jnp.asarray(t, dtype), x0, x1, z)
            assert value.dtype == dtype
            np.testing.assert_allclose(value, expected, atol=1e-6 if dtype == jnp.float32 else 1e-14)


def test_source_loss_is_least_at_the_conditional_mean(mixtures):
    """Its gradient along f is E[(f - x₀)·f]: 0 at η₀, and 0.1 E|η₀|² > 0 at 1.1 η₀."""
    interpolant = AffineInterpolant(FlowMatchingPath())
    fields, loss = MixtureInterpolantFields(interpolant, jnp.ones(1), jnp.zeros((1, 2)), jnp.ones(1), *mixtures[1]), SourceLoss(interpolant)

    @jax.jit
    @jax.vmap
    def gradients(key):
        key0, key1, key_loss = jax.random.split(key, 3)
        batch = jax.random.normal(key0, (256, 2)), mixtures[1].sample(key1, 256)
        model = lambda scale: lambda t, x, args: -scale * interpolant.source_share(t) * fields.score(t, x)  # noqa: E731
        return jax.vmap(jax.grad(lambda scale: loss(model(scale), batch, key_loss)[0]))(jnp.array([1.0, 1.1]))

    draws = gradients(jax.random.split(jax.random.key(0), 64))
    z_scores = jnp.mean(draws, 0) / (jnp.std(draws, 0) / 8)
    assert abs(z_scores[0]) < 4
    assert z_scores[1] > 5
