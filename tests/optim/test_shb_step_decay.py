"""Heavy ball with step decay: optax, the 2 × 2 matrix of each coordinate, the orders in κ, Monte Carlo, and exact excess in T and in the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ergodax.data import NoisyQuadratic
from ergodax.optim import heavy_ball, heavy_ball_momentum, heavy_ball_step_decay, step_decay


def run(transform, gradients):
    """The updates on a sequence of gradients."""

    @jax.jit
    def all_updates(gradients):
        def step(state, gradient):
            updates, state = transform.update(gradient, state)
            return state, updates

        first = jax.tree.map(lambda leaf: leaf[0], gradients)
        return jax.lax.scan(step, transform.init(first), gradients)[1]

    with jax.numpy_dtype_promotion("standard"):  # optax mixes a float with its integer count
        return all_updates(gradients)


def test_stages():
    """η_0 / C^{l-1}: n = log_2(1000 · 10) = 13.3 → 13 stages of 76.9 steps; the last is held after T and the first before 0."""
    schedule = step_decay(0.5, 1000, 100.0)
    steps = jnp.array([0, 76, 77, 153, 154, 923, 924, 999, 1000, 5000, -3])
    np.testing.assert_allclose(schedule(steps), 0.5 ** (1 + np.array([0, 0, 1, 1, 2, 11, 12, 12, 12, 12, 0])), rtol=1e-15)
    np.testing.assert_array_equal(schedule(steps), schedule(steps.astype(float)))
    # ⌊k n / T⌋ to the bit for whole numbers, also where T / n is whole.
    for total, stages in [(60, 3), (100, 7), (999, 9)]:
        values = jax.jit(step_decay(1.0, total, 10.0, num_stages=stages))(jnp.arange(total))
        np.testing.assert_array_equal(values, 0.5 ** (np.arange(total) * stages // total))
    # The last stage runs at about η_0 / (T √κ): C times it, and up to √C from rounding n.
    for total, factor in [(300, 2.0), (4000, 3.0), (10**5, 10.0)]:
        last = step_decay(1.0, total, 25.0, factor=factor)(total - 1)
        assert factor**-0.5 <= last * total * 5 / factor <= factor**0.5


def test_sweep_in_one_trace():
    traces = []

    @jax.jit
    @jax.vmap
    def value(rate, total, kappa, factor, step):
        traces.append(None)
        return step_decay(rate, total, kappa, factor=factor)(step)

    rows = jnp.array([[1.0, 1000, 100, 2, 80], [0.5, 100, 25, 3, 99], [2.0, 10, 1, 10, 0]])
    # The second row: log_3(500) = 5.66 → 6 stages.
    np.testing.assert_allclose(value(*rows.T), [0.5, 0.5 / 3**5, 2.0], rtol=1e-14)
    value(*(1.0 * rows).T)
    assert len(traces) == 1
    gradient = jax.jit(jax.vmap(jax.grad(lambda x: step_decay(x[0], x[1], x[2], factor=x[3])(x[4]))))(rows)
    assert jnp.isfinite(gradient).all()
    np.testing.assert_allclose(gradient[:, 0], [0.5, 3.0**-5, 1.0], rtol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_dtypes(dtype):
    """The schedule's is that of the rate; the updates' that of the gradients, whatever the rate's."""
    assert step_decay(jnp.asarray(0.5, dtype), 10**5, 100.0)(jnp.int32(99_999)).dtype == dtype
    updates = run(heavy_ball_step_decay(jnp.float64(0.5), 10, jnp.float64(4.0)), {"w": jnp.ones((3, 2), dtype), "none": None})
    assert updates["w"].dtype == dtype


def test_against_optax():
    """The rate enters before the buffer, so a switch does not shrink the velocity."""
    gradients = {"w": jax.random.normal(jax.random.key(0), (50, 3)), "b": jax.random.normal(jax.random.key(1), (50,), jnp.float32)}
    boundaries = {int(np.ceil(50 * stage / 6)): 1 / 3 for stage in range(1, 6)}
    piecewise = optax.piecewise_constant_schedule(0.4, boundaries)
    ours = run(heavy_ball_step_decay(0.4, 50, 16.0, factor=3.0, num_stages=6), gradients)
    chained = run(optax.chain(optax.scale_by_learning_rate(piecewise), optax.trace(0.75**2)), gradients)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(chained), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-7)
        assert a.dtype == b.dtype
    drop = optax.piecewise_constant_schedule(1.0, {2: 0.1})
    four = jnp.array([1.0, -0.5, 0.25, 2.0])
    np.testing.assert_allclose(run(heavy_ball(drop, 0.9), four), [-1, -0.4, -0.385, -0.5465], rtol=0, atol=1e-7)
    np.testing.assert_allclose(run(optax.sgd(drop, momentum=0.9), four), [-1, -0.4, -0.061, -0.2549], rtol=0, atol=1e-7)
    tied = run(heavy_ball(1.0, lambda step: jnp.where(step < 1, 0.9, 0.5)), four)  # β may follow the stage
    np.testing.assert_allclose(tied, [-1, 0, -0.25, -2.125], rtol=0, atol=1e-15)


def test_two_by_two_matrix():
    """Without noise (w_t, w_{t-1}) moves by [[1 + β - ηλ, -β], [1, 0]]."""
    eigenvalues, beta, eta = np.array([1.0, 0.3, 0.04]), float(heavy_ball_momentum(25.0)), 0.7
    transform = heavy_ball(eta, beta)
    w, state = jnp.ones(3), transform.init(jnp.ones(3))
    for _ in range(40):
        updates, state = transform.update(jnp.asarray(eigenvalues) * w, state)
        w = w + updates
    for i, curvature in enumerate(eigenvalues):
        power = np.linalg.matrix_power(np.array([[1 + beta - eta * curvature, -beta], [1, 0]]), 40)
        np.testing.assert_allclose(w[i], power[0].sum(), rtol=0, atol=1e-9)


def test_acceleration():
    """Steps until every coordinate is below 1e-6 of its start: κ^0.52 with momentum, κ^1.00 without."""
    longest = 100_000

    @jax.jit
    @jax.vmap
    def steps_needed(kappa, beta):
        eigenvalues = jnp.geomspace(1 / kappa, 1.0, 30)

        def go_on(carry):
            w, _, step = carry
            return (jnp.abs(w).max() >= 1e-6) & (step < longest)

        def step(carry):
            w, v, step = carry
            v = beta * v + eigenvalues * w
            return w - v, v, step + 1

        return jax.lax.while_loop(go_on, step, (jnp.ones(30), jnp.zeros(30), jnp.zeros((), jnp.int32)))[2]

    kappas = jnp.array([25.0, 100.0, 400.0, 1600.0, 6400.0])
    both = steps_needed(jnp.tile(kappas, 2), jnp.concatenate([jax.vmap(heavy_ball_momentum)(kappas), jnp.zeros(5)]))
    momentum, plain = (np.polyfit(np.log(kappas), np.log(steps), 1)[0] for steps in (both[:5], both[5:]))
    assert both.max() < longest
    np.testing.assert_allclose([momentum, plain], [0.518, 1.003], rtol=0, atol=0.01)


EIGENVALUES = jnp.geomspace(1.0, 0.01, 20)  # κ = 100


def test_monte_carlo():
    """The transform on 4000 noisy runs against the covariance recursion: |z| < 3.5, rates dropping on the way."""
    problem = NoisyQuadratic(EIGENVALUES[::4], 0.1 * EIGENVALUES[::4], jnp.full(5, 0.3))
    transform = heavy_ball_step_decay(0.8, 40, 100.0, num_stages=4)

    @jax.jit
    def runs(key):
        start = jnp.broadcast_to(problem.start, (4000, 5))

        def step(carry, key):
            w, state = carry
            updates, state = transform.update(problem.gradient(key, w), state)
            return (w + updates, state), None

        (w, _), _ = jax.lax.scan(step, (start, transform.init(start)), jax.random.split(key, 40))
        return problem.loss(w)

    losses = runs(jax.random.key(4))
    expected = problem.excess(step_decay(0.8, 40, 100.0, num_stages=4)(jnp.arange(40)), momentum=heavy_ball_momentum(100.0))
    assert abs(losses.mean() - expected) / (losses.std() / np.sqrt(losses.size)) < 3.5


def test_excess_in_horizon_and_batch():
    """Excess · B T / (d σ²) over T, and both methods at large and at small batches; σ² = 1, η_0 = 1, C = 2."""

    @jax.jit
    def excess(total, batch, stages):
        problem = NoisyQuadratic(EIGENVALUES, EIGENVALUES / batch, jnp.ones(20))
        steps = jnp.arange(30_000.0)
        rates = jnp.where(steps < total, step_decay(1.0, total, 100.0, num_stages=stages)(steps), 0.0)
        momentum = jnp.where(steps < total, heavy_ball_momentum(100.0), 0.0)  # stand still after T, without momentum too
        return jnp.stack([problem.excess(rates, momentum=momentum), problem.excess(rates)])

    def default(total):
        return jnp.round(jnp.log2(total * 10.0))

    for total, scaled in [(1000.0, 1.260), (30_000.0, 1.675)]:
        heavy, plain = excess(total, 1.0, default(total))
        np.testing.assert_allclose(heavy * total / 20, scaled, rtol=0, atol=2e-3)
        assert abs(heavy / plain - 1) < 0.1  # a batch of 1: momentum changes little
    heavy, plain = excess(1000.0, 1e4, default(1000.0))
    np.testing.assert_allclose([heavy, plain], [2.520e-6, 4.279e-4], rtol=1e-3)
    # Stages of ⌊T / n⌋ = 76 steps, cut off at T, as a reference implementation may take them.
    heavy, plain = excess(1000.0, 1e4, 1000 / 75.99)
    np.testing.assert_allclose([heavy, plain], [2.540e-6, 4.493e-4], rtol=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: step_decay(-1.0, 10, 4.0), "`rate` must lie in .* got -1"),
        (lambda: step_decay(1.0, 0, 4.0), "`total_steps` must lie in .* got 0"),
        (lambda: step_decay(1.0, 10, 0.5), "`condition_number` must lie in .* got 0.5"),
        (lambda: step_decay(1.0, 10, 4.0, factor=1.0), "`factor` must lie in .* got 1"),
        (lambda: step_decay(1.0, 10, 4.0, num_stages=0), "`num_stages` must lie in .* got 0"),
        (lambda: heavy_ball(1.0, 1.0), r"`momentum` must lie in \[0, 1\), got 1"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
