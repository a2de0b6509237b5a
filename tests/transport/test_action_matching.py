"""Gaussian paths with known actions: by quadrature the loss is exact, so that what it exceeds its minimum by can be compared with the action gap."""

import itertools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import HutchinsonDivergence, integrate
from ergodax.transport.action_matching import (
    ActionBatch,
    ActionFlow,
    ActionMatchingLoss,
    ActionVelocity,
    InterpolatedSnapshots,
    PotentialAction,
    SampledPath,
)
from ergodax.transport.snapshots import Snapshots


# q_t = M(t) N(m(t), diag V(t)) in the plane
def mean(t):
    return jnp.array([t - 0.5 * t**2, 0.3 - 0.8 * t])


def std(t):
    return jnp.array([1 + 0.5 * t, 0.9 - 0.4 * t])


def mass(t):
    return jnp.exp(0.7 * t - 0.4 * t**2)


def rate(f, t):
    return jax.jvp(f, (t,), (jnp.ones_like(t),))[1]


def one(t):
    return jnp.ones_like(t)


def gaussian_batch(mass=one, std=std):
    """A batch whose weighted means are integrals over q_t, exact for polynomials in x of degree below 14 and smooth functions of t."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(7)
    points = jnp.array(list(itertools.product(nodes, nodes)))
    shares = jnp.array([a * b for a, b in itertools.product(weights, weights)]) / np.sum(weights) ** 2
    times, lengths = np.polynomial.legendre.leggauss(12)
    times, lengths = jnp.array(times + 1) / 2, jnp.array(lengths) / 2

    def at(t):
        return mean(t) + std(t) * points, len(shares) * mass(t) * shares

    (x0, weights0), (x1, weights1), (x, inner) = at(jnp.zeros(())), at(jnp.ones(())), jax.vmap(at)(times)
    weights = (12 * lengths[:, None] * inner).ravel()
    return ActionBatch(x0, x1, jnp.repeat(times, len(shares)), x.reshape(-1, 2), weights0, weights1, weights)


def plain(t, x, args):
    y = x - mean(t)
    return jnp.sum(rate(mean, t) * x) + jnp.sum(rate(std, t) / (2 * std(t)) * y**2)


SIGMA, GROWTH = 0.8, 0.6


def entropic(t, x, args):
    return plain(t, x, args) - jnp.sum(SIGMA**2 / (4 * std(t) ** 2) * (x - mean(t)) ** 2)


def unbalanced(t, x, args):
    """a + b·y + ½ c y²: what solves ∂ log q = -Δs - ∇s·∇log q + λ s, power by power of y = x - m."""
    v, y = std(t) ** 2, x - mean(t)
    dv = rate(lambda t: std(t) ** 2, t)
    b, c = rate(mean, t) / (1 + GROWTH * v), dv / (v * (2 + GROWTH * v))
    a = (rate(lambda t: jnp.log(mass(t)), t) + jnp.sum(c - dv / (2 * v))) / GROWTH
    return a + jnp.sum(b * y + c * y**2 / 2)


def translating(t, x, args):
    """∇c*(∇s) = (∇s)³ moves N(m, V) with V constant."""
    return jnp.sum(jnp.cbrt(rate(mean, t)) * x)


def quartic(p):
    return jnp.sum(p**4) / 4


def bump(t, x, args):
    return 0.3 * x[0] * x[1] + t * x[0] ** 3 / 4 - (1 - t) ** 2 * x[1]


CASES = {
    "plain": (ActionMatchingLoss(), plain, gaussian_batch()),
    "entropic": (ActionMatchingLoss(sigma=SIGMA), entropic, gaussian_batch()),
    "unbalanced": (ActionMatchingLoss(growth=GROWTH), unbalanced, gaussian_batch(mass)),
    "convex": (ActionMatchingLoss(conjugate_cost=quartic), translating, gaussian_batch(std=lambda t: jnp.array([0.7, 1.2]))),
    "weighted": (ActionMatchingLoss(weight=lambda t: 0.2 + t * (1 - t) + t**3), plain, gaussian_batch()),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_exceeds_its_minimum_by_the_action_gap(case):
    """∫ ω E[c*(∇s) - c*(∇s*) - ∇c*(∇s*)·∇δ + λ/2 δ²] for s = s* + δ, which is ½ ∫ E|∇δ|² for kinetic energy."""
    loss, best, batch = CASES[case]

    @jax.jit
    def compare(batch):
        def shifted(t, x, args):
            return best(t, x, args) + bump(t, x, args)

        def gap(t, x, weight):
            p, d = (jax.grad(f, argnums=1)(t, x, None) for f in (best, bump))
            bregman = loss.conjugate_cost(p + d) - loss.conjugate_cost(p) - jax.grad(loss.conjugate_cost)(p) @ d
            return weight * loss.weight(t) * (bregman + loss.growth / 2 * bump(t, x, None) ** 2)

        (high, _), (low, _) = (loss(action, batch, jax.random.key(0)) for action in (shifted, best))
        return high - low, jnp.mean(jax.vmap(gap)(batch.t, batch.x, batch.weights))

    excess, expected = compare(batch)
    assert expected > 0.1
    np.testing.assert_allclose(excess, expected, rtol=1e-8)


@eqx.filter_jit
def value_of(loss, action, batch, key):
    return loss(action, batch, key)[0]


def test_what_depends_on_time_alone_changes_nothing():
    batch, loss = gaussian_batch(), ActionMatchingLoss(sigma=SIGMA)
    shifted = value_of(loss, lambda t, x, args: bump(t, x, args) + 5 * jnp.exp(2 * t), batch, jax.random.key(0))
    np.testing.assert_allclose(shifted, value_of(loss, bump, batch, jax.random.key(0)), atol=1e-9)


def test_limits_are_plain_action_matching():
    batch = gaussian_batch()
    value = value_of(ActionMatchingLoss(), bump, batch, jax.random.key(0))
    for sigma, growth in ((0.0, 0.0), (1e-5, 1e-10)):
        np.testing.assert_allclose(
            value_of(ActionMatchingLoss(jnp.array(sigma), jnp.array(growth)), bump, batch, jax.random.key(0)), value, atol=1e-8
        )


def test_laplacian_by_random_probes():
    """Hutchinson's estimate is unbiased; on a diagonal Hessian, random signs make it exact."""
    batch = gaussian_batch()
    exact, probed = (ActionMatchingLoss(SIGMA), ActionMatchingLoss(SIGMA, divergence=HutchinsonDivergence))
    np.testing.assert_allclose(*(value_of(loss, plain, batch, jax.random.key(0)) for loss in (exact, probed)), rtol=1e-10)
    values = jax.jit(jax.vmap(lambda key: probed(bump, batch, key)[0]))(jax.random.split(jax.random.key(1), 100))
    assert np.std(values) > 0
    assert abs(np.mean(values) - value_of(exact, bump, batch, jax.random.key(0))) < 4 * np.std(values) / 10


def test_minimum_is_the_velocity():
    """Over polynomial actions the loss is quadratic in the coefficients, so that one Newton step from 0 is its minimum; powers of t up to the 4th."""
    powers = [(i, j, k) for i in range(5) for j in range(3) for k in range(3 - j) if j + k]

    def action(theta):
        return lambda t, x, args: theta @ jnp.stack([t**i * x[0] ** j * x[1] ** k for i, j, k in powers])

    @jax.jit
    def compare(batch):
        gradient = jax.grad(lambda theta: ActionMatchingLoss()(action(theta), batch, jax.random.key(0))[0])
        zero = jnp.zeros(len(powers))
        theta = jnp.linalg.solve(jax.vmap(jax.linearize(gradient, zero)[1])(jnp.eye(len(powers))), -gradient(zero))
        learned, exact = (jax.vmap(lambda t, x, f=f: ActionVelocity(f)(t, x))(batch.t, batch.x) for f in (action(theta), plain))
        square_error, square = (jnp.mean(batch.weights * jnp.sum(v**2, axis=1)) for v in (learned - exact, exact))
        return jnp.sqrt(square_error / square)

    assert compare(gaussian_batch()) < 1e-3


def test_draws_of_a_path():
    """The loss on draws has the loss itself as its mean."""
    path = SampledPath(lambda key, t: mean(t) + std(t) * jax.random.normal(key, (2,)), 100)
    keys = jax.random.split(jax.random.key(2), 100)
    values = jax.jit(jax.vmap(lambda key: ActionMatchingLoss()(bump, path(key, 0), key)[0]))(keys)
    exact = value_of(ActionMatchingLoss(), bump, gaussian_batch(), keys[0])
    assert abs(np.mean(values) - exact) < 4 * np.std(values) / 10


def test_weights_carry_the_mass():
    """The unbalanced flow from q₀ has mass, mean and variance of q₁; x₁ is affine and log w quadratic in x₀, so 40 nodes integrate exp well."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    x = jnp.stack([mean(0.0)[0] + std(0.0)[0] * nodes, jnp.full(40, mean(0.0)[1])], axis=1)
    flow = ActionFlow(lambda t, x, args: unbalanced(t, x, args), GROWTH)

    def run(x):
        return integrate(dfx.ODETerm(flow), dfx.Tsit5(), (x, jnp.zeros(())), times=jnp.linspace(0.0, 1.0, 33))

    def log_weight(nodes, axis):
        # x₀ on one axis, the other at its mean: log w is a sum over axes less what both share.
        x = mean(jnp.zeros(())) + std(jnp.zeros(())) * nodes[:, None] * jnp.eye(2)[axis]
        return jax.jit(jax.vmap(run))(x)

    (first, log_first), (second, log_second) = log_weight(jnp.array(nodes), 0), log_weight(jnp.array(nodes), 1)
    centre = log_weight(jnp.zeros(1), 0)[1][0]
    share = jnp.array(weights / weights.sum())
    w0, w1 = share * jnp.exp(log_first - centre), share * jnp.exp(log_second - centre)
    total = jnp.exp(centre) * jnp.sum(w0) * jnp.sum(w1)
    np.testing.assert_allclose(total, mass(1.0), rtol=1e-6)
    for axis, (w, x) in enumerate(((w0, first), (w1, second))):
        w, x = w / jnp.sum(w), x[:, axis]
        np.testing.assert_allclose(w @ x, mean(1.0)[axis], rtol=1e-6)
        np.testing.assert_allclose(jnp.sqrt(w @ x**2 - (w @ x) ** 2), std(1.0)[axis], rtol=1e-6)


def test_snapshots_are_interpolated():
    """Linear in between, bridges' noise, equal weight to equal time, geometric masses."""
    rows = [jnp.full((3, 1), 1.0), jnp.full((5, 1), 2.0), jnp.full((2, 1), 6.0)]
    snapshots = Snapshots([0.0, 0.25, 1.0], rows)
    batch = InterpolatedSnapshots(snapshots, 64, masses=jnp.array([1.0, 4.0, 2.0]))(jax.random.key(0), 0)
    np.testing.assert_allclose(batch.x[:, 0], jnp.interp(batch.t, snapshots.times, jnp.array([1.0, 2.0, 6.0])))
    np.testing.assert_allclose((batch.weights0, batch.weights1), (jnp.full(64, 1.0), jnp.full(64, 2.0)))
    masses = jnp.exp(jnp.interp(batch.t, snapshots.times, jnp.log(jnp.array([1.0, 4.0, 2.0]))))
    np.testing.assert_allclose(batch.weights, masses * jnp.where(batch.t < 0.25, 0.5, 1.5))
    noisy = InterpolatedSnapshots(snapshots, 64, noise=0.5)(jax.random.key(0), 0)
    u = jnp.where(noisy.t < 0.25, 4 * noisy.t, (noisy.t - 0.25) / 0.75)
    spread = 0.5 * jnp.sqrt(u * (1 - u) * jnp.where(noisy.t < 0.25, 0.25, 0.75))
    z = (noisy.x[:, 0] - batch.x[:, 0]) / spread
    assert abs(jnp.mean(z)) < 4 / np.sqrt(128)
    assert abs(jnp.mean(z**2) - 1) < 4 * np.sqrt(2 / 128)
    swapped = InterpolatedSnapshots(Snapshots([0.0, 1.0], [jnp.arange(4.0)[:, None]] * 2), 4, lambda key, x1, x0, args: x1)(jax.random.key(0), 0)
    assert jnp.all(jnp.abs(swapped.x - swapped.x1) < 1e-12)


def test_potential_action_and_mistakes():
    field = PotentialAction(lambda t, x, args: t + x)
    np.testing.assert_allclose(field(0.5, jnp.array([1.0, 2.0])), 0.5 * 3 + 5)
    batch = gaussian_batch()
    with pytest.raises(ValueError, match="t as many entries as x has rows"):
        ActionMatchingLoss()(plain, batch._replace(t=batch.t[:-1]), jax.random.key(0))
    with pytest.raises(ValueError, match="`sigma` must lie in"):
        ActionMatchingLoss(sigma=-1.0)
    with pytest.raises(ValueError, match=r"`times\[-1\]` must lie in"):
        InterpolatedSnapshots(Snapshots([0.0, 2.0], [jnp.ones((2, 1))] * 2), 4)
