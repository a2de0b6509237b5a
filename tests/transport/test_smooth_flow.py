"""Smooth flows: the bijections by hand, flatness across the seam, the implicit gradients of the inverse, normalisation, force matching."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from jax.flatten_util import ravel_pytree

from ergodax.transport.bijection import Chain, Coupling, Flow, Inverted, StandardUniform
from ergodax.transport.smooth_flow import (
    CircularShift,
    ForceMatchingLoss,
    PeriodicInput,
    SmoothCircle,
    SmoothCircleTransformer,
    SmoothInterval,
    SmoothIntervalTransformer,
    increasing_inverse,
    smooth_sigmoid,
)


BUMPS = jnp.array([3.0, 8.0]), jnp.array([0.3, 0.8]), jnp.array([0.05, 0.1]), jnp.array([0.4, 0.6])
INTERVAL = SmoothInterval(*BUMPS, 0.7, 1.5)
CIRCLE = SmoothCircle(*BUMPS, 0.7, 1.5)
TRANSFORMER = SmoothCircleTransformer()
# a bump across the seam
SEAM = SmoothCircle(jnp.array([3.0]), jnp.array([0.05]), jnp.array([0.05]), jnp.array([1.0]))


def sigmoid_by_hand(x, alpha=0.7, beta=1.5):
    with np.errstate(divide="ignore", invalid="ignore"):
        ramp = lambda x: np.where(x > 0, np.exp(-1 / (alpha * np.abs(x) ** beta)), 0.0)  # noqa: E731
        return ramp(x) / (ramp(x) + ramp(1 - x))


def test_values_by_hand():
    x = np.linspace(0, 1, 41)
    np.testing.assert_allclose(smooth_sigmoid(jnp.asarray(3 * x - 1), 0.7, 1.5), sigmoid_by_hand(3 * x - 1), atol=1e-15)
    a, b, c, w = map(np.asarray, BUMPS)
    argument = lambda x, a=a, b=b: a * (x - b) + 0.5  # noqa: E731
    first, last = sigmoid_by_hand(argument(0.0)), sigmoid_by_hand(argument(1.0))
    bumps = (sigmoid_by_hand(argument(x[:, None])) - first) / (last - first)
    np.testing.assert_allclose(jax.vmap(INTERVAL.value)(jnp.asarray(x)), ((1 - c) * bumps + c * x[:, None]) @ w, atol=1e-14)
    wrapped = sum(sigmoid_by_hand(argument(x[:, None] - k)) - sigmoid_by_hand(argument(-float(k))) for k in range(-5, 6))
    np.testing.assert_allclose(jax.vmap(CIRCLE.value)(jnp.asarray(x)), ((1 - c) * wrapped + c * x[:, None]) @ w, atol=1e-14)


def derivatives(function, x, count):
    """function(x) and its first `count` derivatives, elementwise."""
    values = []
    for _ in range(count + 1):
        values.append(function(x))
        function = functools.partial(lambda f, x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1], function)
    return jnp.stack(values)


def test_sigmoid_is_flat_and_finite_at_the_ends():
    """Three derivatives vanish at 0 and 1 and are finite all the way, also in float32 and for steep and slow ramps."""
    run = jax.jit(lambda x, alpha, beta: derivatives(lambda x: smooth_sigmoid(x, alpha, beta), x, 3))
    for dtype in (jnp.float32, jnp.float64):
        x = jnp.array([-1.0, 0, 1e-30, 1e-9, 1e-4, 1e-2, 0.3, 0.5, 0.99, 1, 2], dtype)
        for alpha, beta in ((1.0, 1.0), (1e-3, 2.0), (100.0, 1.0), (1.0, 3.0)):
            values = run(x, jnp.asarray(alpha, dtype), jnp.asarray(beta, dtype))
            assert values.dtype == dtype
            assert np.isfinite(values).all()
            np.testing.assert_allclose(values[1:, jnp.array([0, 1, 2, 9, 10])], 0, atol=1e-10)


@pytest.mark.parametrize("bijection", [INTERVAL, CIRCLE, SEAM], ids=("interval", "circle", "seam"))
def test_bijection_of_the_interval(bijection):
    x = jnp.linspace(0, 1, 201)
    run = jax.jit(jax.vmap(lambda x: (bijection.forward(x), bijection.inverse(bijection.forward(x)[0]))))
    (y, log_det), (back, inverse_log_det) = run(x)
    np.testing.assert_allclose(y[jnp.array([0, -1])], [0, 1], atol=1e-15)
    slope = jnp.exp(log_det)
    assert (slope >= jnp.sum(bijection.weights * bijection.mix) - 1e-12).all()
    # the mean of the slope over a grid of a smooth function: y(1) - y(0)
    np.testing.assert_allclose(jnp.trapezoid(slope, x), 1, atol=2e-3)
    np.testing.assert_allclose(back, x, atol=1e-13)
    np.testing.assert_allclose(inverse_log_det, -log_det, atol=1e-10)


def test_the_seam_is_smooth():
    """Value mod 1 and three derivatives agree at 0 and 1 and are not trivial; with the bump of width 1/a = 5 they need more shifts."""
    wide = SmoothCircle(jnp.array([0.2, 0.4]), jnp.array([0.05, 0.6]), *BUMPS[2:], num_shifts=3)
    for circle, smallest in ((SEAM, 1.0), (wide, 1e-3)):
        first, last = jax.jit(lambda x, circle=circle: derivatives(jax.vmap(circle.value), x, 3).T)(jnp.array([0.0, 1.0]))
        np.testing.assert_allclose(last - first, [1, 0, 0, 0], atol=1e-8)
        assert (jnp.abs(first[1:]) > smallest).all()


def test_gradients_of_the_inverse():
    """To y and to all parameters: equal to finite differences, and to the implicit gradients of optimistix."""
    flat, unravel = ravel_pytree((INTERVAL, jnp.array(0.37)))

    def ours(flat):
        bijection, y = unravel(flat)
        x, log_det = bijection.inverse(y)
        return x + 0.3 * log_det

    def theirs(flat):
        bijection, y = unravel(flat)
        bracket = {"lower": jnp.zeros(()), "upper": jnp.ones(())}
        x = optx.root_find(lambda x, _: bijection.value(x) - y, optx.Bisection(1e-13, 1e-13), jnp.array(0.5), options=bracket).value
        return x - 0.3 * bijection.forward(x)[1]

    gradient = jax.jit(jax.grad(ours))(flat)
    np.testing.assert_allclose(gradient, jax.jit(jax.grad(theirs))(flat), rtol=1e-8, atol=1e-9)
    units = 1e-5 * jnp.eye(flat.size)
    ends = jax.jit(jax.vmap(ours))(jnp.concatenate([flat + units, flat - units]))
    np.testing.assert_allclose((ends[: flat.size] - ends[flat.size :]) / 2e-5, gradient, rtol=1e-5, atol=1e-6)


def test_second_derivatives_of_the_inverse():
    """Of x = (y/θ)^{1/3}, in closed form."""
    root = lambda v: increasing_inverse(lambda x: v[0] * x**3, v[1])  # noqa: E731
    theta, y = 2.0, 0.7
    x = (y / theta) ** (1 / 3)
    expected = x / 9 * np.array([[4 / theta**2, -1 / (theta * y)], [-1 / (theta * y), -2 / y**2]])
    np.testing.assert_allclose(jax.jit(jax.hessian(root))(jnp.array([theta, y])), expected, rtol=1e-10)


def test_inverse_in_float32_and_of_nan():
    y = jnp.array([0.0, 0.2, 0.9, 1.0], jnp.float32)
    for bins in (2, 5):
        x = jax.vmap(functools.partial(increasing_inverse, lambda x: x**3, num_bins=bins))(y)
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, np.cbrt(y), atol=3e-7)
    assert np.isnan(INTERVAL.inverse(jnp.array(jnp.nan))).all()


def torus(key, transformer=TRANSFORMER, size=9, network=PeriodicInput, scale=1.0):
    """Two coupling layers on the torus (or the square), each of two bumps."""
    layers = []
    for layer_key, kept in zip(jax.random.split(key), (0, 1)):
        mlp = eqx.nn.MLP(2 if network is PeriodicInput else 1, size, 8, 1, jnp.tanh, key=layer_key)
        layers.append(Coupling(network(jax.tree.map(lambda leaf: scale * leaf if eqx.is_array(leaf) else leaf, mlp)), (kept,), transformer))
    return Chain(tuple(layers))


def test_normalisation_and_smoothness_on_the_torus():
    """The density sums to 1, has one score on both sides of either seam, and `Inverted` is the same flow backwards."""
    chain = torus(jax.random.key(0), scale=2.0)
    flow = Flow(Inverted(chain), StandardUniform((2,)))
    run = jax.jit(jax.vmap(jax.value_and_grad(flow.log_prob)))
    grid = jnp.arange(0.5, 128) / 128
    log_prob = jax.jit(jax.vmap(flow.log_prob))(jnp.stack(jnp.meshgrid(grid, grid), -1).reshape(-1, 2))
    np.testing.assert_allclose(jnp.mean(jnp.exp(log_prob)), 1, atol=1e-4)
    assert jnp.std(log_prob) > 0.1
    for seam in (jnp.array([[0.0, 0.3], [1.0, 0.3]]), jnp.array([[0.6, 0.0], [0.6, 1.0]])):
        value, score = run(seam)
        np.testing.assert_allclose(value[0], value[1], rtol=1e-10)
        np.testing.assert_allclose(score[0], score[1], rtol=1e-8, atol=1e-8)
    x, log_prob = jax.jit(jax.vmap(flow.sample_and_log_prob))(jax.random.split(jax.random.key(1), 8))
    np.testing.assert_allclose(log_prob, run(x)[0], rtol=1e-9, atol=1e-9)


def test_normalisation_on_the_square_through_the_inverse():
    chain = torus(jax.random.key(2), SmoothIntervalTransformer(), 8, lambda mlp: mlp)
    grid = jnp.arange(0.5, 48) / 48
    points = jnp.stack(jnp.meshgrid(grid, grid), -1).reshape(-1, 2)
    log_prob = jax.jit(jax.vmap(Flow(chain, StandardUniform((2,))).log_prob))(points)
    np.testing.assert_allclose(jnp.mean(jnp.exp(log_prob)), 1, atol=1e-3)


def test_transformers_by_hand():
    raw = jnp.array([0.3, 0.0, 1.0, -1.0, 0.5, 2.0, 0.2, -0.4])
    interval = SmoothIntervalTransformer(0.5, 0.01)(raw)
    softplus, expit = (lambda v: np.log1p(np.exp(v))), (lambda v: 1 / (1 + np.exp(-v)))
    np.testing.assert_allclose(interval.slope, 0.5 + softplus(np.array([0.3, 0.0])))
    np.testing.assert_allclose(interval.centre, expit(np.array([1.0 + np.log(0.25 / 0.75), -1.0 + np.log(3)])))
    np.testing.assert_allclose(interval.mix, 0.01 + 0.99 * expit(np.array([0.5, 2.0])))
    np.testing.assert_allclose(interval.weights, [expit(0.6), 1 - expit(0.6)])
    circle, shift = SmoothCircleTransformer(0.3)(jnp.concatenate([jnp.array([0.7]), raw])).layers
    assert circle.num_shifts == 2
    assert shift.shift == 0.7
    np.testing.assert_allclose(circle.centre, [0.25, 0.75])
    np.testing.assert_allclose(CircularShift(0.7).forward(jnp.array(0.5))[0], 0.2)
    with pytest.raises(ValueError, match="4 parameters"):
        SmoothIntervalTransformer()(raw[:7])


@functools.cache
def force_problem():
    model = Flow(Inverted(torus(jax.random.key(3))), StandardUniform((2,)))
    return model, jax.random.uniform(jax.random.key(4), (6, 2))


def test_force_matching_loss():
    """Zero force error at the flow's own forces, the plain sums otherwise, and gradients of third order by finite differences."""
    model, x = force_problem()
    log_prob, score = jax.jit(jax.vmap(jax.value_and_grad(model.log_prob)))(x)
    flat, unravel = ravel_pytree(eqx.filter(model, eqx.is_inexact_array))
    rest = eqx.filter(model, eqx.is_inexact_array, inverse=True)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(flat, forces):
        return ForceMatchingLoss(2.0, 0.5, 3.0)(eqx.combine(unravel(flat), rest), (x, forces), jax.random.key(0))

    (value, aux), _ = loss(flat, 2 * score)
    np.testing.assert_allclose(aux["force"], 0, atol=1e-20)
    np.testing.assert_allclose([value, aux["nll"]], [-0.5 * log_prob.mean(), -log_prob.mean()], rtol=1e-12)
    (value, aux), gradient = loss(flat, 2 * score + 1)
    np.testing.assert_allclose([value, aux["force"]], [-0.5 * log_prob.mean() + 1.5, 0.5], rtol=1e-10)
    step = 1e-6 * jax.random.normal(jax.random.key(5), flat.shape)
    difference = loss(flat + step, 2 * score + 1)[0][0] - loss(flat - step, 2 * score + 1)[0][0]
    np.testing.assert_allclose(difference / 2, gradient @ step, rtol=1e-6)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: SmoothInterval(-BUMPS[0], *BUMPS[1:]), "slope"),
        (lambda: SmoothInterval(BUMPS[0], 1 + BUMPS[1], *BUMPS[2:]), "centre"),
        (lambda: SmoothInterval(*BUMPS, alpha=0.0), "alpha"),
        (lambda: SmoothCircle(BUMPS[0] / 10, *BUMPS[1:]), "slope"),
        (lambda: SmoothCircleTransformer(0.0), "min_slope"),
        (lambda: SmoothIntervalTransformer(1.0, 0.0), "min_density"),
        (lambda: ForceMatchingLoss(0.0), "temperature"),
        (lambda: ForceMatchingLoss()(None, (jnp.ones((2, 2)), jnp.ones((2, 3))), jax.random.key(0)), "shape"),
        (lambda: increasing_inverse(lambda x: x, jnp.array(0.5), 1), "num_bins"),
    ],
)
def test_refusals(build, match):
    with pytest.raises(ValueError, match=match):
        build()
