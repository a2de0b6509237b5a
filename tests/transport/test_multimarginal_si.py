"""Three correlated Gaussians, whose conditional means are linear: the loss, flows along any curve, scores; the best curve between two of them."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ergodax.core import fit, integrate
from ergodax.testing import assert_mean, z_scores
from ergodax.transport import LinearInterpolant, ZeroGamma
from ergodax.transport.multimarginal_si import (
    BarycentricLoss,
    ConsistentFields,
    EdgePath,
    FourierPath,
    PathEnergyLoss,
    PathScore,
    PathVelocity,
    SpherePath,
    simplex_weights,
    sphere_weights,
)


MEANS = jnp.array([[0.0, 0.0], [1.5, -0.5], [-1.0, 2.0]])
FACTOR = jnp.eye(6) + 0.4 * jax.random.normal(jax.random.key(3), (6, 6))
COVARIANCE = (FACTOR @ FACTOR.T).reshape(3, 2, 3, 2)
CURVE = FourierPath(jnp.array([[0.3, 0.2, 0.8], [-0.2, 0.3, 0.1]]), 1, 2)


def draw(key, n):
    return tuple((jax.random.normal(key, (n, 6)) @ FACTOR.T).reshape(n, 3, 2).swapaxes(0, 1) + MEANS[:, None])


def exact(a, x, args=None):
    """E[x_k | x(a) = x] by conditioning."""
    cross = jnp.einsum("kijl,j->kil", COVARIANCE, a)
    return MEANS + cross @ jnp.linalg.solve(jnp.einsum("k,kil->il", a, cross), x - a @ MEANS)


def test_loss_is_least_at_the_conditional_means():
    """d/dθ at g + Σ θ_m φ_m is 0 for the exact g and E|g|² > 0 along φ = g for 1.1 g; on the simplex and on the sphere."""

    def model(scale, theta):
        def call(a, x, args):
            g = exact(a, x)
            return scale * g + jnp.tensordot(theta, jnp.stack([g, a[:, None] * x, jnp.sin(2 * x) * jnp.ones((3, 1))]), 1)

        return call

    @jax.jit
    @jax.vmap
    def gradients(key):
        key_data, key_loss = jax.random.split(key)
        batch = draw(key_data, 256)
        at = lambda scale, weights: jax.grad(lambda theta: BarycentricLoss(weights)(model(scale, theta), batch, key_loss)[0])(jnp.zeros(3))  # noqa: E731
        return at(1.0, simplex_weights), at(1.1, simplex_weights), at(1.0, sphere_weights)

    right, wrong, sphere = gradients(jax.random.split(jax.random.key(0), 64))
    assert np.abs(z_scores(right, 0.0)).max() < 4
    assert np.abs(z_scores(sphere, 0.0)).max() < 4
    assert z_scores(wrong, 0.0)[0] > 5


def test_learned_linear_fields():
    """At fixed weights the loss is quadratic in linear fields: Newton's step is its minimiser, within 2 % of conditioning, and Σ a_k g_k = x."""
    a, batch = jnp.array([0.2, 0.5, 0.3]), draw(jax.random.key(0), 40_000)
    loss = BarycentricLoss(lambda key, n, k: jnp.broadcast_to(a, (n, k)))
    linear = lambda theta: lambda a, x, args: theta.reshape(3, 2, 3) @ jnp.append(x, 1.0)  # noqa: E731
    value = lambda theta: loss(linear(theta), batch, jax.random.key(1))[0]  # noqa: E731
    gradient, hessian = jax.jit(lambda theta: (jax.grad(value)(theta), jax.hessian(value)(theta)))(jnp.zeros(18))
    learned = linear(-jnp.linalg.solve(hessian, gradient))
    x = jax.random.normal(jax.random.key(2), (5, 2))
    fields, truth = jax.jit(jax.vmap(lambda x: (learned(a, x, None), exact(a, x))))(x)
    assert float(jnp.abs(fields - truth).max()) < 0.02 * float(jnp.abs(truth).max())
    np.testing.assert_allclose(jnp.einsum("k,nki->ni", a, fields), x, atol=1e-9)


@jax.jit
def transported(x):
    """From density 1 to density 2: along their edge, along an interior curve, along a curve on the sphere; and halfway along the second."""
    times = jnp.linspace(0.0, 1.0, 101)
    run = lambda path, times: integrate(dfx.ODETerm(PathVelocity(exact, path)), dfx.Heun(), x, times=times)  # noqa: E731
    return jnp.stack([run(EdgePath(1, 2, 3), times), run(CURVE, times), run(SpherePath(CURVE), times), run(CURVE, times[:51])])


def test_every_curve_carries_one_density_to_the_other():
    """The flow is affine: its image of N(m₁, C₁) is N(m₂, C₂), and halfway the law of x(a(½)), up to Heun's (1/100)²."""
    centre, *moved = jax.vmap(transported, out_axes=0)(MEANS[1] + jnp.concatenate([jnp.zeros((1, 2)), jnp.eye(2)]))
    jacobian = jnp.stack(moved, -1) - centre[..., None]
    covariance = jacobian @ COVARIANCE[1, :, 1] @ jacobian.swapaxes(1, 2)
    np.testing.assert_allclose(centre[:3], jnp.broadcast_to(MEANS[2], (3, 2)), atol=2e-3)
    np.testing.assert_allclose(covariance[:3], jnp.broadcast_to(COVARIANCE[2, :, 2], (3, 2, 2)), rtol=5e-3, atol=2e-3)
    a = CURVE(0.5)
    np.testing.assert_allclose(centre[3], a @ MEANS, atol=2e-3)
    np.testing.assert_allclose(covariance[3], jnp.einsum("k,kijl,j->il", a, COVARIANCE, a), rtol=5e-3, atol=2e-3)
    # through different points on the way
    assert float(jnp.abs(jacobian[0] - jacobian[1]).max()) > 0.01


def test_two_marginals_are_the_linear_interpolant(gaussians, fields_of):
    """K = 1: the velocity along the edge is that of `LinearInterpolant` without noise; the score, with density 0 N(0, I), that of x(a)."""
    source, target = gaussians
    ends = jnp.stack([source.mean, target.mean]), jnp.stack([source.covariance, target.covariance])

    def fields(a, x, args):
        cross = a[:, None, None] * ends[1]
        return ends[0] + cross @ jnp.linalg.solve(jnp.einsum("k,kil->il", a, cross), x - a @ ends[0])

    expected = fields_of(LinearInterpolant(ZeroGamma()), gaussians).velocity
    x, t = jax.random.normal(jax.random.key(0), (7, 2)), jnp.linspace(0.05, 0.95, 7)
    both = jax.jit(jax.vmap(lambda t, x: (PathVelocity(fields, EdgePath(0, 1, 2))(t, x), expected(t, x))))(t, x)
    np.testing.assert_allclose(*both, rtol=1e-10)

    noisy = lambda a, x, args: jnp.stack([a[0] * x, 4 * a[1] * x]) / (a[0] ** 2 + 4 * a[1] ** 2)  # noqa: E731  # N(0, I) and N(0, 4 I)
    score = jax.vmap(PathScore(noisy, EdgePath(0, 1, 2)))(t, x)
    np.testing.assert_allclose(score, -x / ((1 - t) ** 2 + 4 * t**2)[:, None], rtol=1e-12)
    np.testing.assert_array_equal(PathScore(noisy, EdgePath(0, 1, 2))(1.0, x[0]), 0)


def test_consistent_fields():
    """Σ a_k g_k = x, nothing to do for the exact fields, and the least change: along a."""
    a, x = jnp.array([0.1, 0.2, 0.7]), jnp.array([0.3, -1.0])
    raw = lambda a, x, args: jnp.sin(a[:, None] + x)  # noqa: E731
    fields = ConsistentFields(raw)(a, x)
    np.testing.assert_allclose(a @ fields, x, rtol=1e-12)
    change = fields - raw(a, x, None)
    np.testing.assert_allclose(change / a[:, None], jnp.broadcast_to((x - a @ raw(a, x, None)) / (a @ a), (3, 2)), rtol=1e-12)
    np.testing.assert_allclose(ConsistentFields(exact)(a, x), exact(a, x), rtol=1e-10)


def test_weights_and_curves():
    simplex, sphere = (draw_weights(jax.random.key(0), 4000, 3) for draw_weights in (simplex_weights, sphere_weights))
    assert_mean(simplex, jnp.full(3, 1 / 3))
    assert_mean(simplex**2, jnp.full(3, 1 / 6))  # 2/(n(n + 1)) of the uniform law on the simplex
    assert_mean(sphere**2, jnp.full(3, 1 / 3))
    assert_mean(sphere**4, jnp.full(3, 1 / 5))  # 3/(n(n + 2)) on the sphere
    np.testing.assert_allclose(jnp.sum(simplex, 1), 1, rtol=1e-12)
    np.testing.assert_allclose(jnp.sum(sphere**2, 1), 1, rtol=1e-12)
    a = jax.vmap(CURVE)(jnp.linspace(0.0, 1.0, 9))
    np.testing.assert_allclose(a[jnp.array([0, -1])], jnp.eye(3)[1:], atol=1e-12)
    np.testing.assert_allclose(a.sum(1), 1, rtol=1e-12)
    assert float(a.min()) > -1e-12
    # by hand at t = ½: sin(π/2) = 1, sin(π) = 0
    raw = jnp.array([0.3**2, 0.5 + 0.2**2, 0.5 + 0.8**2])
    np.testing.assert_allclose(a[4], raw / raw.sum(), rtol=1e-12)
    np.testing.assert_allclose(FourierPath(jnp.zeros((2, 3)), 1, 2)(0.3), EdgePath(1, 2, 3)(0.3), rtol=1e-12)


def test_a_learned_curve_is_cheaper():
    """N(0, I), N(0, I), N(0, 9 I), independent: s² = a₀² + a₁² + 9 a₂² and the energy from 0 to 1 is 2 ∫ s'². The edge costs 0.8584, at constant
    speed 0.6863, and the best curve 2 (4 (1 - √0.9))² = 0.0843: towards the third density and back.
    """
    variance = jnp.array([1.0, 1.0, 9.0])
    fields = lambda a, x, args: (a * variance / jnp.sum(a**2 * variance))[:, None] * x  # noqa: E731
    loss = PathEnergyLoss(fields)
    batch = lambda key, step: tuple(jnp.sqrt(v) * jax.random.normal(k, (128, 2)) for k, v in zip(jax.random.split(key, 3), variance))  # noqa: E731

    @jax.jit
    def energy(path):
        slope = jax.grad(lambda t: jnp.sqrt(jnp.sum(path(t) ** 2 * variance)))
        return 2 * jnp.mean(jax.vmap(slope)((jnp.arange(1000.0) + 0.5) / 1000) ** 2)

    edge = EdgePath(0, 1, 3)
    np.testing.assert_allclose(energy(edge), 0.8584, atol=1e-4)
    estimates = jax.jit(jax.vmap(lambda key: loss(edge, batch(key, 0), key)[0]))(jax.random.split(jax.random.key(0), 64))
    assert_mean(estimates, energy(edge))

    start = FourierPath((0.05 * jax.random.normal(jax.random.key(1), (5, 3))).at[0].set(0.5), 0, 1)
    with jax.numpy_dtype_promotion("standard"):
        train = lambda: fit(loss, start, optax.adam(2e-2), batch, jax.random.key(0), num_steps=500, every=500, ema_decay=0.99).average  # noqa: E731
        learned = jax.jit(train)()
    assert energy(start) > energy(edge)
    assert 0.0843 < energy(learned) < 0.2


def test_float32_stays_and_bad_input_is_refused():
    batch = tuple(x.astype(jnp.float32) for x in draw(jax.random.key(0), 4))
    fields = lambda a, x, args: a[:, None] * jnp.sin(x)  # noqa: E731
    value, _ = jax.eval_shape(lambda key: BarycentricLoss()(ConsistentFields(fields), batch, key), jax.random.key(0))
    energy, _ = jax.eval_shape(lambda key: PathEnergyLoss(fields)(CURVE, batch, key), jax.random.key(0))
    assert value.dtype == energy.dtype == jnp.float32
    assert jax.eval_shape(PathScore(fields, CURVE), 0.5, batch[0][0]).dtype == jnp.float32
    with pytest.raises(ValueError, match="one shape"):
        BarycentricLoss()(fields, (batch[0], batch[1][:2]), jax.random.key(0))
    for make in (lambda: EdgePath(0, 3, 3), lambda: FourierPath(jnp.zeros((2, 3)), 1, 1)):
        with pytest.raises(ValueError, match="two of the 3 marginals"):
            make()
