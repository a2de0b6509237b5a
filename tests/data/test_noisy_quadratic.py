"""The noisy quadratic: its second moments against Monte Carlo, closed forms and a matrix power."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ergodax.data import NoisyQuadratic


PROBLEM = NoisyQuadratic(jnp.array([1.0, 0.3, 0.05]), noise=jnp.array([0.2, 0.5, 0.1]), start=jnp.array([1.0, -2.0, 0.5]))
RATES = 0.8 * jnp.linspace(1, 0.1, 12) ** 2
MOMENTUM = jnp.linspace(0.2, 0.9, 12)
WEIGHTS = jnp.arange(12.0) / 66


def test_constant_rate_closed_form():
    """E x² → ρᵗ x₀² + η² s (1 - ρᵗ)/(1 - ρ), ρ = (1 - ηλ)², after every update; noise-free gradient descent is a power."""
    rate, t = 0.4, np.arange(1, 31)[:, None]
    eigenvalues, noise, start = (np.asarray(x) for x in (PROBLEM.eigenvalues, PROBLEM.noise, PROBLEM.start))
    rho = (1 - rate * eigenvalues) ** 2
    second = rho**t * start**2 + rate**2 * noise * (1 - rho**t) / (1 - rho)
    curve = PROBLEM.excess_curve(jnp.full(30, rate))
    np.testing.assert_allclose(curve, (eigenvalues * second).sum(1) / 2, rtol=1e-13)
    np.testing.assert_array_equal(PROBLEM.excess(jnp.full(30, rate)), curve[-1])
    np.testing.assert_allclose(PROBLEM.loss(PROBLEM.start), (eigenvalues * start**2).sum() / 2, rtol=1e-15)


def test_monte_carlo():
    """Heavy ball with its own rate and momentum in each update: the last loss and that of a weighted average, |z| < 3.5; wrong ones are far off."""
    runs = 20_000

    def body(carry, step):
        x, v, total = carry
        key, rate, momentum, weight = step
        v = momentum * v + rate * PROBLEM.gradient(key, x)
        return (x - v, v, total + weight * (x - v)), None

    @jax.jit
    def simulate(momentum):
        x = jnp.broadcast_to(PROBLEM.start, (runs, 3))
        steps = (jax.random.split(jax.random.key(0), 12), RATES, jnp.broadcast_to(momentum, (12,)), WEIGHTS)
        (x, _, average), _ = jax.lax.scan(body, (x, jnp.zeros_like(x), jnp.zeros_like(x)), steps)
        return PROBLEM.loss(jnp.stack([x, average]))

    np.testing.assert_allclose(PROBLEM.excess(RATES), PROBLEM.excess(RATES, momentum=0.0), rtol=1e-14)
    for momentum in (None, MOMENTUM):
        losses = np.asarray(simulate(0.0 if momentum is None else momentum))
        exact = np.array([PROBLEM.excess(RATES, momentum=momentum), PROBLEM.average_excess(RATES, WEIGHTS, momentum=momentum)])
        standard_error = losses.std(1) / np.sqrt(runs)
        assert (np.abs(losses.mean(1) - exact) < 3.5 * standard_error).all()
        assert (standard_error < 0.01 * exact).all()


def test_heavy_ball_is_a_matrix_power():
    """Without noise (x_t, x_{t-1}) is a power of [[1 + β - ηλ, -β], [1, 0]] applied to (x₀, x₀)."""
    rate, beta, steps = 0.7, 0.6, 25
    quiet = NoisyQuadratic(PROBLEM.eigenvalues, jnp.zeros(3), PROBLEM.start)
    end = [np.linalg.matrix_power([[1 + beta - rate * h, -beta], [1, 0]], steps)[0].sum() * x for h, x in zip(quiet.eigenvalues, quiet.start)]
    expected = float(quiet.loss(jnp.array(end)))
    np.testing.assert_allclose(quiet.excess(jnp.full(steps, rate), momentum=beta), expected, rtol=1e-10)


def test_average_by_hand():
    """All the weight on one point is that point; two halves of one coordinate by hand."""
    last = jnp.zeros(12).at[-1].set(1)
    np.testing.assert_allclose(PROBLEM.average_excess(RATES, last, momentum=0.5), PROBLEM.excess(RATES, momentum=0.5), rtol=1e-14)
    one = NoisyQuadratic(jnp.array([2.0]), jnp.array([0.3]), jnp.array([1.0]))
    # x₁ = 0.8 - 0.1 ξ₁, x₂ = 0.8 x₁ - 0.1 ξ₂: the mean is 0.72 - 0.09 ξ₁ - 0.05 ξ₂.
    np.testing.assert_allclose(one.average_excess(jnp.full(2, 0.1), jnp.full(2, 0.5)), 0.72**2 + 0.3 * (0.09**2 + 0.05**2), rtol=1e-14)


def test_sweep_and_gradient():
    """One program for a sweep over peaks; the gradient in the rates is a finite difference; a run that blows up is inf, not NaN."""
    traces = []

    @jax.jit
    @jax.vmap
    def excess(peak):
        traces.append(None)
        return PROBLEM.excess(peak * RATES), PROBLEM.average_excess(peak * RATES, WEIGHTS, momentum=0.5)

    last, average = excess(jnp.array([0.5, 1.0, 1e60]))
    np.testing.assert_allclose(last[1], PROBLEM.excess(RATES), rtol=1e-14)
    assert jnp.isinf(last[2])
    assert jnp.isinf(average[2])
    assert len(traces) == 1
    mesh = jax.make_mesh((2,), ("peaks",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(jax.vmap(lambda peak: PROBLEM.excess(peak * RATES)), mesh=mesh, in_specs=P("peaks"), out_specs=P("peaks"))
    np.testing.assert_allclose(sharded(jnp.array([0.5, 1.0])), last[:2], rtol=1e-14)
    gradient = jax.jit(jax.grad(PROBLEM.excess))(RATES)
    shift = jnp.zeros(12).at[4].set(1e-5)
    np.testing.assert_allclose(gradient[4], (PROBLEM.excess(RATES + shift) - PROBLEM.excess(RATES - shift)) / 2e-5, rtol=1e-7)


def test_dtype_follows_eigenvalues():
    single = jax.tree.map(lambda x: x.astype(jnp.float32), PROBLEM)
    assert single.excess(RATES, momentum=0.5).dtype == jnp.float32
    assert single.average_excess(RATES, WEIGHTS).dtype == jnp.float32
    np.testing.assert_allclose(single.excess(RATES), PROBLEM.excess(RATES), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NoisyQuadratic(jnp.ones(3), jnp.ones(2), jnp.ones(3)), r"of one length, got shapes \(3,\), \(2,\) and \(3,\)"),
        (lambda: NoisyQuadratic(-jnp.ones(3), jnp.ones(3), jnp.ones(3)), r"`eigenvalues` must lie in \[0, inf\)"),
        (lambda: NoisyQuadratic(jnp.ones(3), -jnp.ones(3), jnp.ones(3)), r"`noise` must lie in \[0, inf\)"),
        (lambda: PROBLEM.excess(RATES, momentum=MOMENTUM[:4]), r"shape \(12,\), got shape \(4,\)"),
        (lambda: PROBLEM.excess(RATES[:, None]), r"must be a vector, one rate for each update, got shape \(12, 1\)"),
        (lambda: PROBLEM.average_excess(RATES, WEIGHTS[:4]), r"shape \(12,\), got \(4,\)"),
    ],
)
def test_bad_shapes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
