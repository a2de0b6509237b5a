"""TO-FLOW: densities of a linear flow, the derivative in the evolution time by its formula and through the solve, coordinate descent, saved steps."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.scipy.linalg import expm

from ergodax.core import ExactDivergence, fit, standard_normal_log_prob
from ergodax.data import two_moons
from ergodax.transport.bijection import StandardNormal
from ergodax.transport.to_flow import AdaptiveSolve, FixedSolve, TOFlow, TOFlowLoss, coordinate_descent


MATRIX = jnp.array([[0.4, -0.9], [0.7, -0.2]])
BASE = StandardNormal((2,))
POINTS = jax.random.normal(jax.random.key(0), (5, 2))
TIGHT = AdaptiveSolve(rtol=1e-9, atol=1e-9)


class Linear(eqx.Module):
    matrix: jax.Array

    def __call__(self, t, x, args):
        return self.matrix @ x


class Network(eqx.Module):
    mlp: eqx.nn.MLP

    def __init__(self, key, width):
        self.mlp = eqx.nn.MLP(3, 2, width, 2, activation=jnp.tanh, key=key)

    def __call__(self, t, x, args):
        return self.mlp(jnp.append(x, t))


NETWORK = TOFlow(Network(jax.random.key(1), 6), BASE, 0.8, TIGHT)


def exact(key):
    return ExactDivergence()


def test_linear_flow():
    model = TOFlow(Linear(MATRIX), BASE, 0.8, FixedSolve(40))
    encoded = eqx.filter_jit(model.encode)(POINTS[0])
    latent = expm(-0.8 * MATRIX) @ POINTS[0]
    np.testing.assert_allclose(encoded.latent, latent, rtol=1e-4)
    np.testing.assert_allclose(encoded.log_prob, standard_normal_log_prob(latent) - 0.8 * jnp.trace(MATRIX), rtol=1e-4)
    along = [expm(-s * MATRIX) @ POINTS[0] for s in np.linspace(0, 0.8, 81)]
    np.testing.assert_allclose(encoded.kinetic, np.trapezoid([jnp.sum((MATRIX @ z) ** 2) for z in along], dx=0.01), rtol=1e-3)
    np.testing.assert_allclose(eqx.filter_jit(model.decode)(latent), POINTS[0], rtol=1e-4)


def test_the_flow_ends_at_time_one():
    """u = t: a path from 1 - T to 1 is (1 - (1 - T)²)/2 long."""
    model = TOFlow(lambda t, x, args: jnp.full_like(x, 1) * t, BASE, 0.5, FixedSolve(3))
    key = jax.random.key(2)
    x, latent = eqx.filter_jit(lambda model: (model.sample(key), model.encode(model.sample(key)).latent))(model)
    np.testing.assert_allclose(x - BASE.sample(key), (1 - 0.25) / 2, rtol=1e-9)
    np.testing.assert_allclose(latent, BASE.sample(key), rtol=1e-9)


def test_moving_speed_is_the_derivative_through_an_adaptive_solve():
    def speeds(model):
        derivative = jax.grad(lambda duration: -eqx.tree_at(lambda m: m.duration, model, duration).log_prob(POINTS[0]))(model.duration)
        return derivative, model.moving_speed(model.encode(POINTS[0]).latent)

    derivative, speed = eqx.filter_jit(speeds)(NETWORK)
    np.testing.assert_allclose(speed, derivative, rtol=1e-4)
    assert abs(speed) > 0.01


def test_gradients_of_the_loss():
    """Those of the same objective through a fine solve: T by its formula, the network exactly."""
    loss, model = TOFlowLoss(alpha=0.3, kinetic=0.2, divergence=exact), eqx.tree_at(lambda m: m.solve, NETWORK, FixedSolve(50), is_leaf=_is_solve)

    def through_the_solve(model):
        encoded = jax.vmap(model.encode)(POINTS)
        return jnp.mean(0.2 * encoded.kinetic - encoded.log_prob) + 0.3 * model.duration**2

    @eqx.filter_jit
    def both(model):
        return eqx.filter_value_and_grad(loss, has_aux=True)(model, POINTS, jax.random.key(3)), eqx.filter_value_and_grad(through_the_solve)(model)

    ((value, aux), gradient), (expected, expected_gradient) = both(model)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient.duration, expected_gradient.duration, rtol=1e-4)
    np.testing.assert_allclose(aux["moving_speed"] + 0.6 * aux["duration"], gradient.duration, rtol=1e-12)
    for a, b in zip(jax.tree.leaves(gradient.velocity), jax.tree.leaves(expected_gradient.velocity), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def _is_solve(node):
    return isinstance(node, AdaptiveSolve)


def test_hutchinson_is_unbiased():
    """Under a linear flow the estimate is exact in z, and e·(A e) has the mean tr A."""
    model = TOFlow(Linear(MATRIX), BASE, 0.8, FixedSolve(4))
    loss = jax.jit(jax.vmap(lambda key: TOFlowLoss()(model, POINTS[:1], key)[1]["moving_speed"]))(jax.random.split(jax.random.key(4), 4000))
    speed = jax.jit(lambda x: model.moving_speed(model.encode(x).latent))(POINTS[0])
    assert loss.std() > 0
    assert abs(loss.mean() - speed) < 4 * loss.std() / np.sqrt(4000)


def test_coordinate_descent_takes_turns():
    optimiser = coordinate_descent(optax.adam(0.1), optax.sgd(1.0), lambda p: p["T"], every=2, max_change=0.3, low=0.25, high=1.2)
    start = {"T": jnp.array(1.0), "w": jnp.array([1.0, 2.0])}

    def step(carry, slope):
        params, state = carry
        updates, state = optimiser.update({"T": slope, "w": jnp.sin(params["w"])}, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    def alone(carry, _):
        w, state = carry
        update, state = optax.adam(0.1).update(jnp.sin(w), state, w)
        return (w + update, state), w + update

    @jax.jit
    def run(slopes):
        _, path = jax.lax.scan(step, (start, optimiser.init(start)), slopes)
        return path, jax.lax.scan(alone, (start["w"], optax.adam(0.1).init(start["w"])), length=8)[1]

    with jax.numpy_dtype_promotion("standard"):
        path, expected = run(jnp.array([0.5] * 9 + [-5.0] * 3))
    np.testing.assert_allclose(path["w"][np.arange(12) % 3 != 2], expected, rtol=1e-12)
    np.testing.assert_allclose(path["w"][2::3], path["w"][1::3], rtol=0)
    # steps of T last in each three: 0.3 at most, and not below 0.25
    np.testing.assert_allclose(path["T"], [1.0, 1.0, 0.7, 0.7, 0.7, 0.4, 0.4, 0.4, 0.25, 0.25, 0.25, 0.55], rtol=1e-12)


def test_learned_duration_saves_steps():
    """Card: on two moons within 0.05 nats of a fixed T, in at least 15 % fewer adaptive steps."""
    data = two_moons(jax.random.key(5), 2300)
    data = (data - data.mean(axis=0)) / data.std(axis=0)

    def run(alpha, rate):
        model = TOFlow(Network(jax.random.key(6), 16), BASE, 1.0, FixedSolve(5))
        optimiser = coordinate_descent(optax.adam(0.02), optax.sgd(rate), lambda model: model.duration)
        fitted = fit(TOFlowLoss(alpha, divergence=exact), model, optimiser, data[:2000], jax.random.key(7), num_steps=600, batch_size=64)
        trained = fitted.model
        encoded = jax.vmap(TOFlow(trained.velocity, BASE, trained.duration, AdaptiveSolve(rtol=1e-4, atol=1e-4)).encode)(data[2000:])
        return trained.duration, -jnp.mean(encoded.log_prob), jnp.mean(encoded.num_steps.astype(float))

    with jax.numpy_dtype_promotion("standard"):
        duration, nll, num_steps = jax.jit(jax.vmap(run))(jnp.array([0.0, 0.1]), jnp.array([0.0, 0.5]))
    assert duration[0] == 1
    assert 0.2 < duration[1] < 0.8
    assert nll[1] < nll[0] + 0.05
    assert num_steps[1] < 0.85 * num_steps[0]


def test_mistakes():
    with pytest.raises(ValueError, match="`duration` must lie in"):
        TOFlow(Linear(MATRIX), BASE, 0.0)
    with pytest.raises(ValueError, match="`every` must be an integer of at least 1, got 0"):
        coordinate_descent(optax.sgd(1.0), optax.sgd(1.0), lambda p: p, every=0)
    with pytest.raises(ValueError, match="`high - low` must lie in"):
        coordinate_descent(optax.sgd(1.0), optax.sgd(1.0), lambda p: p, low=1.0, high=0.5)
    with pytest.raises(ValueError, match="`alpha` must lie in"):
        TOFlowLoss(alpha=-1.0)
    with pytest.raises(ValueError, match="`num_steps` must be an integer of at least 1, got 0"):
        FixedSolve(0)
