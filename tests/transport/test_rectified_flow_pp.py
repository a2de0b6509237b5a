"""Times and metric against their closed forms; one round of reflow on three modes from the exact velocity; the teacher's conversion; the sampler."""

import itertools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.stats import kstest

from ergodax.core import EDMPath, FlowMatchingPath, VPPath, fit, integrate, uniform_times
from ergodax.data import GaussianMixture
from ergodax.testing import assert_mean
from ergodax.transport.rectified_flow_pp import (
    FixedNoiseEuler,
    MatchedVelocity,
    PseudoHuber,
    ReflowLoss,
    UShapedTimes,
    inverted_pairs,
    reflow_pairs,
)


MODES = GaussianMixture.isotropic(jnp.ones(3) / 3, 2 * jnp.array([[1.0, 0.0], [-0.5, 0.866], [-0.5, -0.866]]), 0.25)
STRAIGHT = FlowMatchingPath()


def teacher(t, x, args=None):
    return MODES.velocity_at(STRAIGHT, t, x)


@pytest.mark.parametrize("a", [4.0, 0.5])
def test_u_shaped_times(a):
    """F(t) = (e^{at} - 1 + e^a - e^{a(1 - t)})/(2(e^a - 1)), of mean ½ and with 0.17 of the mass below 0.1 at a = 4."""
    t = UShapedTimes(a)(jax.random.key(0), 4000)
    law = lambda t: (np.exp(a * t) - 1 + np.exp(a) - np.exp(a * (1 - t))) / (2 * (np.exp(a) - 1))  # noqa: E731
    assert kstest(np.asarray(t), law).pvalue > 0.01
    assert_mean(t, 0.5)
    assert_mean(t < 0.1, law(0.1))
    assert a != 4 or abs(law(0.1) - 0.17) < 0.005
    assert 1e-5 <= t.min() < t.max() <= 1 - 1e-5


def test_pseudo_huber():
    """√(‖e‖² + c²) - c over d with c = 0.00054 d; ‖e‖²/(2cd) for small errors, ‖e‖/d for large ones; finite gradient at 0; no cancellation."""
    e = jax.random.normal(jax.random.key(0), (3, 4))
    c, norm = 0.00054 * 12, np.linalg.norm(e)
    for scale in (1e-2, 1.0):
        np.testing.assert_allclose(PseudoHuber()(scale * e), (np.sqrt((scale * norm) ** 2 + c**2) - c) / 12, rtol=1e-9)
    np.testing.assert_allclose(PseudoHuber()(1e-9 * e), (1e-9 * norm) ** 2 / (2 * c * 12), rtol=1e-6)
    np.testing.assert_allclose(PseudoHuber()(1e6 * e), 1e6 * norm / 12, rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(PseudoHuber())(0 * e), 0)


def test_reflow_loss_by_hand():
    """t Huber(e) + ℓ(x̂, x₁)/(1 - t), or Huber(e) alone; 0 with gradient 0 for the true velocity of straight pairs."""
    x0, x1 = jax.random.normal(jax.random.key(0), (2, 5, 3))
    t, labels = jnp.linspace(0.1, 0.9, 5), jnp.arange(5.0)
    times = lambda key, n: t  # noqa: E731
    model = lambda t, x, args: jnp.sin(3 * t) * x + args  # noqa: E731
    distance = lambda a, b: jnp.sum(jnp.abs(a - b))  # noqa: E731
    x = (1 - t[:, None]) * x0 + t[:, None] * x1
    v = jnp.sin(3 * t[:, None]) * x + labels[:, None]
    huber = jax.vmap(PseudoHuber(0.1))(x1 - x0 - v)
    plain, _ = ReflowLoss(times, PseudoHuber(0.1))(model, (x0, x1, labels), jax.random.key(1))
    np.testing.assert_allclose(plain, huber.mean(), rtol=1e-12)
    both, _ = ReflowLoss(times, PseudoHuber(0.1), distance)(model, (x0, x1, labels), jax.random.key(1))
    predicted = x + (1 - t[:, None]) * v
    np.testing.assert_allclose(both, jnp.mean(t * huber + jnp.abs(predicted - x1).sum(1) / (1 - t)), rtol=1e-12)
    with pytest.raises(ValueError, match="one shape"):
        ReflowLoss()(model, (x0, x1[:, :2]), jax.random.key(0))


class Network(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, t, x, args=None):
        return self.mlp(jnp.concatenate([x, jnp.asarray(t, x.dtype)[None]]))


def test_one_round_of_reflow():
    """From the exact velocity, Heun in 100 steps: S = E‖x₁ - x₀ - v‖² falls 5 times or more, W₂ of one step twice or more; U-shaped times with the
    pseudo-Huber metric do no worse than 1.1 times uniform times with squared errors (the same loss at a → 0, c → ∞)."""
    t = uniform_times(jax.random.key(3), 400)

    @jax.jit
    def drawn(key):
        key_noise, key_data = jax.random.split(key)
        x0 = jax.random.normal(key_noise, (2048 + 400, 2))
        pairs = jax.vmap(lambda x: reflow_pairs(teacher, x, times=jnp.linspace(0.0, 1 - 1e-6, 101)))(x0)
        independent = MODES.sample(key_data, 400)
        x = (1 - t[:, None]) * x0[2048:] + t[:, None] * independent
        before = jnp.mean(jnp.sum((independent - x0[2048:] - jax.vmap(teacher)(t, x)) ** 2, -1))
        return pairs, before, x0[2048:] + jax.vmap(teacher, in_axes=(None, 0))(0.0, x0[2048:])

    pairs, before, teacher_step = drawn(jax.random.key(0))
    train, (x0, x1) = jax.tree.map(lambda a: a[:2048].astype(jnp.float32), pairs), jax.tree.map(lambda a: a[2048:], pairs)

    @jax.jit
    @jax.vmap
    def first_velocity(concentration, scale):
        network = Network(eqx.nn.MLP(3, 2, 32, 2, jax.nn.silu, key=jax.random.key(1), dtype=jnp.float32))
        loss = ReflowLoss(UShapedTimes(concentration), PseudoHuber(scale))
        optimiser = optax.adam(optax.cosine_decay_schedule(1e-2, 600))
        batch = lambda key, step: jax.tree.map(lambda a: a[jax.random.randint(key, (256,), 0, 2048)], train)  # noqa: E731
        student = fit(loss, network, optimiser, batch, jax.random.key(2), num_steps=600, every=600, ema_decay=0.99).average
        apply = lambda t, x: student(t.astype(jnp.float32), x.astype(jnp.float32)).astype(x.dtype)  # noqa: E731
        return jax.vmap(apply)(jnp.zeros(400), x0), jax.vmap(apply)(t, (1 - t[:, None]) * x0 + t[:, None] * x1)

    with jax.numpy_dtype_promotion("standard"):
        first, along = first_velocity(jnp.array([4.0, 1e-3]), jnp.array([0.00054, 10.0]))

    def w2(x):
        cost = np.sum((np.asarray(x)[:, None] - np.asarray(x1)) ** 2, -1)
        return np.sqrt(cost[linear_sum_assignment(cost)].mean())

    straightness = jnp.sum((x1 - x0 - along) ** 2, -1).mean(1)
    assert np.all(straightness < before / 5)
    one_step = [w2(x0 + v) for v in first]
    assert max(one_step) < w2(teacher_step) / 2
    assert one_step[0] < 1.1 * one_step[1]


def test_pairs_there_and_back():
    x = jax.random.normal(jax.random.key(0), (8, 2))
    times = jnp.linspace(0.0, 1 - 1e-6, 101)
    x0, x1 = jax.jit(jax.vmap(lambda x: reflow_pairs(teacher, x, times=times)))(x)
    np.testing.assert_array_equal(x0, x)
    back, same = jax.jit(jax.vmap(lambda x: inverted_pairs(teacher, x, times=times)))(x1)
    np.testing.assert_array_equal(same, x1)
    np.testing.assert_allclose(back, x, atol=0.02)
    assert float(jnp.abs(x1 - x).max()) > 0.5


@pytest.mark.parametrize("path", [EDMPath(), VPPath()], ids=lambda path: type(path).__name__)
def test_teacher_of_another_path_has_the_straight_velocity(path):
    """The exact denoiser on each path, converted, is the exact velocity of the straight one, wherever the path's ratios reach."""
    t, x = jnp.linspace(0.02, 0.98, 13), jax.random.normal(jax.random.key(0), (13, 2))
    denoised = lambda t, x, args: MODES.denoised(path, t, x)  # noqa: E731
    converted = jax.jit(jax.vmap(lambda t, x: MatchedVelocity(denoised, path)(t, x)))(t, x)
    np.testing.assert_allclose(converted, jax.vmap(teacher)(t, x), rtol=1e-7, atol=1e-7)
    # at t = 0 the largest noise of the path stands for infinite noise
    np.testing.assert_allclose(MatchedVelocity(denoised, path)(0.0, x[0]), teacher(0.0, x[0]), atol=0.05)


def test_fixed_noise_euler():
    """Euler in the first step and in two of equal size; from three on x_{t'} = (1 - t') x₀ + t' x̂ by hand; exact on straight lines."""
    x = jnp.array([0.7, -1.2])
    solve = lambda solver, times: integrate(dfx.ODETerm(teacher), solver, x, times=times)  # noqa: E731
    for count in (1, 2):
        times = jnp.linspace(0.0, 1.0, count + 1)
        np.testing.assert_allclose(solve(FixedNoiseEuler(), times), solve(dfx.Euler(), times), rtol=1e-12)
    y, times = x, jnp.linspace(0.0, 1.0, 5)
    for t, s in itertools.pairwise(times):
        y = (1 - s) * x + s * (y + (1 - t) * teacher(t, y))
    np.testing.assert_allclose(solve(FixedNoiseEuler(), times), y, rtol=1e-12)
    assert float(jnp.abs(y - solve(dfx.Euler(), times)).max()) > 1e-3
    step = integrate(dfx.ODETerm(lambda t, y, args: jnp.array([2.0, 3.0])), FixedNoiseEuler(), x, times=times)
    np.testing.assert_allclose(step, x + jnp.array([2.0, 3.0]), rtol=1e-12)


def test_float32_stays_and_bad_values_are_refused():
    pairs = tuple(jax.random.normal(jax.random.key(0), (2, 4, 3), jnp.float32))
    value, _ = jax.eval_shape(lambda key: ReflowLoss()(lambda t, x, args: t * x, pairs, key), jax.random.key(0))
    assert value.dtype == jnp.float32
    denoised = lambda t, x, args: x / (1 + t)  # noqa: E731
    assert jax.eval_shape(MatchedVelocity(denoised, EDMPath()), 0.3, pairs[0]).dtype == jnp.float32
    times = jnp.linspace(0, 1, 4, dtype=jnp.float32)
    assert integrate(dfx.ODETerm(lambda t, x, args: t * x), FixedNoiseEuler(), pairs[0], times=times).dtype == jnp.float32
    for make in (lambda: UShapedTimes(0.0), lambda: PseudoHuber(-1.0)):
        with pytest.raises(ValueError, match="must lie in"):
            make()
