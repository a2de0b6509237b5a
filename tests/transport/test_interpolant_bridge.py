"""The max-min objective: its value and both gradients against quadrature between Gaussians, the saddle at the bridge, and a learned bridge."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ergodax.core import fit
from ergodax.transport import BrownianBridgeGamma, GaussianBridge, LinearInterpolant
from ergodax.transport.interpolant_bridge import InterpolantBridge, InterpolantBridgeLoss, LearnedInterpolant
from ergodax.transport.reference import Brownian


EPSILON, MEANS, VARIANCES = 0.9, (0.3, -0.5), (0.8, 1.5)
BRIDGE = GaussianBridge(jnp.array(MEANS[:1]), jnp.array([[0.8]]), jnp.array(MEANS[1:]), jnp.array([[1.5]]), Brownian(EPSILON))


def polynomials(weights, t):
    """One for each row, highest power first."""
    return jax.vmap(lambda row: jnp.polyval(row, t))(weights)


class Correction(eqx.Module):
    """Polynomials in t, times x₀, x₁ and 1."""

    weights: jax.Array  # (3, degree + 1)

    def __call__(self, t, x0, x1):
        p = polynomials(self.weights, t)
        return p[0] * x0 + p[1] * x1 + p[2]


class AffineDrift(eqx.Module):
    weights: jax.Array  # (2, degree + 1)

    def __call__(self, t, x, args):
        p = polynomials(self.weights, t)
        return p[0] * x + p[1]


def moments(scale, weights, t):
    """Mean and variance of x_t, from independent ends."""
    p = polynomials(weights, t)
    a, b = 1 - t + t * (1 - t) * p[0], t + t * (1 - t) * p[1]
    return a * MEANS[0] + b * MEANS[1] + t * (1 - t) * p[2], a**2 * VARIANCES[0] + b**2 * VARIANCES[1] + scale * t * (1 - t)


def exact_drift(scale, weights):
    """u = m' + (σσ' - ε/2)/σ² (x - m)."""

    def drift(t, x, args=None):
        (mean, variance), (d_mean, d_variance) = jax.jvp(lambda t: moments(scale, weights, t), (t,), (jnp.ones_like(t),))
        return d_mean + (d_variance - EPSILON) / 2 / variance * (x - mean)

    return drift


def exact_value(scale, weights):
    """-½ ∫ E|u|² dt by the midpoint rule."""

    def integrand(t):
        (_, variance), (d_mean, d_variance) = jax.jvp(lambda t: moments(scale, weights, t), (t,), (jnp.ones_like(t),))
        return d_mean**2 + ((d_variance - EPSILON) / 2) ** 2 / variance

    return -jnp.mean(jax.vmap(integrand)((jnp.arange(2000.0) + 0.5) / 2000)) / 2


def draw(key, n):
    key0, key1 = jax.random.split(key)
    return tuple(m + np.sqrt(v) * jax.random.normal(k, (n, 1)) for m, v, k in zip(MEANS, VARIANCES, (key0, key1), strict=True))


def test_value_and_gradients():
    """With û = u of any Î, the value is -½ ∫ E|u|², û's gradient 0, and Î's the negative of the value's own; at the bridge it is 0 too."""
    cross = BRIDGE.cross_covariance()[0, 0]
    bridge_scale = 2 * cross + EPSILON  # linear Î of independent ends then has the bridge's marginals
    cases = (
        jnp.array([bridge_scale, 1.6 * bridge_scale, 0.5]),
        jnp.stack([jnp.zeros((3, 2)), jnp.zeros((3, 2)), jnp.array([[0.5, -0.3], [0.2, 0.4], [0.3, 0.0]])]),
    )

    @jax.jit
    @jax.vmap
    def run(scale, weights):
        exact = exact_drift(scale, weights)

        def model(parts):
            correction, theta = parts
            drift = lambda t, x, args: exact(t, x) + theta @ jnp.stack([exact(t, x), x, jnp.sin(2 * x) * t])  # noqa: E731
            return InterpolantBridge(LearnedInterpolant(LinearInterpolant(BrownianBridgeGamma(scale)), Correction(correction)), drift, EPSILON)

        def one(key):
            key_draw, key_loss = jax.random.split(key)
            loss = lambda parts: InterpolantBridgeLoss()(model(parts), draw(key_draw, 512), key_loss)[0]  # noqa: E731
            return jax.value_and_grad(loss)((weights, jnp.zeros(3)))

        return jax.vmap(one)(jax.random.split(jax.random.key(0), 64)), jax.value_and_grad(exact_value, 1)(scale, weights)

    (value, (interpolant, drift)), (expected, slope) = run(*cases)
    z_score = lambda draws, truth: (jnp.mean(draws, 1) - truth) / (jnp.std(draws, 1) / 8)  # noqa: E731
    assert jnp.abs(z_score(value, expected)).max() < 4
    assert jnp.abs(z_score(drift, 0.0)).max() < 4
    assert jnp.abs(z_score(interpolant, -slope)).max() < 4.5  # of 18
    assert jnp.abs(slope[0]).max() < 1e-6  # the bridge is stationary
    assert jnp.abs(z_score(interpolant, 0.0))[1].max() > 20  # another γ is not
    assert expected[0] > expected[1:].max()


def test_gaussian_saddle_is_the_bridge():
    scale = 2 * BRIDGE.cross_covariance()[0, 0] + EPSILON
    drift = exact_drift(scale, jnp.zeros((3, 1)))
    for t in (0.0, 0.3, 0.9):
        np.testing.assert_allclose(drift(jnp.array(t), jnp.array([0.7])), BRIDGE(jnp.array(t), jnp.array([0.7])), rtol=1e-12)


def test_learned_bridge():
    """One optimiser on both players from û = 0 and the linear Î: the drift comes nearer to the bridge's than that of the linear Î by far."""
    interpolant = LearnedInterpolant(LinearInterpolant(BrownianBridgeGamma(EPSILON)), Correction(jnp.zeros((3, 3))))
    model = InterpolantBridge(interpolant, AffineDrift(jnp.zeros((2, 5))), EPSILON)
    with jax.numpy_dtype_promotion("standard"):
        labels = lambda model: jax.tree_util.tree_map_with_path(lambda path, _: path[0].name, model)  # noqa: E731
        rates = {name: optax.adam(optax.cosine_decay_schedule(rate, 1500)) for name, rate in (("interpolant", 0.01), ("drift", 0.05))}
        optimiser = optax.multi_transform(rates, labels)
        fitted = jax.jit(
            lambda key: eqx.filter(
                fit(InterpolantBridgeLoss(), model, optimiser, lambda key, step: draw(key, 256), key, num_steps=1500).model, eqx.is_array
            )
        )(jax.random.key(0))

    @jax.jit
    def errors(drift_weights):
        def at(t):
            mean, covariance = BRIDGE.marginal(t)
            x = mean + jnp.sqrt(covariance[0]) * jnp.array([-1.0, 1.0])[:, None]
            each = lambda drift: jax.vmap(lambda x: drift(t, x, None))(x)  # noqa: E731
            truth, own = each(BRIDGE), each(exact_drift(EPSILON, jnp.zeros((3, 1))))
            return jnp.mean((each(AffineDrift(drift_weights)) - truth) ** 2), jnp.mean((own - truth) ** 2), jnp.mean(truth**2)

        return [jnp.mean(v) for v in jax.vmap(at)(jnp.linspace(0.05, 0.95, 19))]

    learned, linear, size = errors(fitted.drift.weights)
    assert learned < 0.02 * linear
    assert learned < 0.01 * size


def test_gamma_and_epsilon_are_held_and_float32_stays():
    x = jnp.ones((4, 2), jnp.float32)
    interpolant = LearnedInterpolant(LinearInterpolant(BrownianBridgeGamma(jnp.float32(1.0))), lambda t, x0, x1: t * x0 * x1)
    model = InterpolantBridge(interpolant, lambda t, x, args: -x, jnp.float32(0.5))
    value, gradient = eqx.filter_jit(eqx.filter_value_and_grad(lambda model: InterpolantBridgeLoss()(model, (x, 2 * x), jax.random.key(0))[0]))(model)
    assert value.dtype == jnp.float32
    assert gradient.epsilon == 0
    assert gradient.interpolant.gamma.scale == 0
    ends = interpolant.mean(jnp.array([0.0, 1.0], jnp.float32)[:, None], x[:2], 2 * x[:2])
    np.testing.assert_array_equal(ends, [[1, 1], [2, 2]])
    with pytest.raises(ValueError, match="one shape"):
        InterpolantBridgeLoss()(model, (x, x[:2]), jax.random.key(0))
    with pytest.raises(ValueError, match="epsilon"):
        InterpolantBridge(interpolant, lambda t, x, args: -x, 0.0)
