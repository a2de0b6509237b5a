"""MixFlow: the exact law of a rotation, a map with a Jacobian by quadrature, and the Hamiltonian map's inverse, Jacobian, law and ELBO."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from ergodax.testing import assert_mean
from ergodax.transport.bijection import Affine, Bijection, Flow, StandardNormal
from ergodax.transport.mixflow import (
    ExtendedDensity,
    HamiltonianFlow,
    HamiltonianState,
    LaplaceMomentum,
    MixFlow,
    MixFlowLoss,
    NormalMomentum,
)


GOLDEN = (5**0.5 - 1) / 2


class Rotation(Bijection):
    angle: float

    def forward(self, x):
        return jnp.mod(x + self.angle, 1), jnp.zeros_like(x)

    def inverse(self, y):
        return jnp.mod(y - self.angle, 1), jnp.zeros_like(y)


class LinearRotation(Bijection):
    """x -> F⁻¹(F(x) + a mod 1) with F = (x² + x)/2: ergodic on [0, 1], keeps the density p = x + ½, Jacobian p(x)/p(T(x))."""

    angle: float

    def _turn(self, x, angle):
        y = (jnp.sqrt(1 + 8 * jnp.mod((x**2 + x) / 2 + angle, 1)) - 1) / 2
        return y, jnp.log(x + 0.5) - jnp.log(y + 0.5)

    def forward(self, x):
        return self._turn(x, self.angle)

    def inverse(self, y):
        return self._turn(y, -self.angle)


class Wave:
    """1 + 0.9 cos 2πx on the circle."""

    def log_prob(self, x):
        return jnp.log1p(0.9 * jnp.cos(2 * jnp.pi * x))


class Uniform:
    def sample(self, key):
        return jax.random.uniform(key)

    def log_prob(self, x):
        return jnp.zeros_like(x)


def test_rotation_is_the_exact_sum():
    """q_N = 1 + 0.9 mean_n cos 2π(x - na), and its distance to the uniform law falls as 1/N."""
    midpoints = (np.arange(4096) + 0.5) / 4096
    for n in (1, 2, 7, 30):
        log_q = jax.jit(jax.vmap(MixFlow(Rotation(GOLDEN), Wave(), n).log_prob))(jnp.asarray(midpoints))
        expected = 1 + 0.9 * np.cos(2 * np.pi * (midpoints[:, None] - GOLDEN * np.arange(n))).mean(1)
        np.testing.assert_allclose(jnp.exp(log_q), expected, rtol=1e-11)
        distance = np.mean(np.abs(np.exp(log_q) - 1)) / 2
        exact = 0.9 / np.pi * abs(np.sin(np.pi * n * GOLDEN) / (n * np.sin(np.pi * GOLDEN)))
        np.testing.assert_allclose(distance, exact, rtol=1e-5, atol=1e-7)


def test_jacobian_of_a_map_by_quadrature():
    """With J ≠ 1: q_N integrates to 1, is the law of the draws and of the orbits, and the ELBO is unbiased and rises."""
    # the midpoint rule errs by at most the sum of the jumps (below 5 × 3) per cell
    cells = 40000
    x = (np.arange(cells) + 0.5) / cells
    keys = jax.random.split(jax.random.key(0), 20000)
    log_target = lambda x: jnp.log(x + 0.5)  # noqa: E731
    bounds = [np.mean(log_target(x))]
    for n in (2, 5):
        model = MixFlow(LinearRotation(GOLDEN), Uniform(), n)
        log_q = np.asarray(jax.jit(jax.vmap(model.log_prob))(jnp.asarray(x)))
        weights = np.exp(log_q) / cells
        assert abs(weights.sum() - 1) < 4e-4
        draws = jax.jit(jax.vmap(lambda key, model=model: (model.sample(key), jnp.mean(model.orbit(key) ** 2), model.elbo(key, log_target))))(keys)
        assert_mean(draws[0], weights @ x)
        assert_mean(draws[1], weights @ x**2)
        bounds.append(weights @ (log_target(x) - log_q))
        assert_mean(draws[2], bounds[-1])
    assert bounds[0] < bounds[1] < bounds[2] < 0


class TwoModes:
    """½ N(-1.5, ½) + ½ N(1.5, ½)."""

    def log_prob(self, x):
        return jnp.sum(jnp.logaddexp(-((x - 1.5) ** 2), -((x + 1.5) ** 2)) - jnp.log(2 * jnp.sqrt(jnp.pi)))


MIXTURE = TwoModes()


def hamiltonian(num_steps):
    return MixFlow(HamiltonianFlow(MIXTURE.log_prob, 0.1, 10), ExtendedDensity(StandardNormal((1,))), num_steps)


@pytest.mark.parametrize(("momentum", "num_maps"), [(LaplaceMomentum(), 100), (NormalMomentum(), 10)], ids=("laplace", "normal"))
def test_inverse_and_jacobian(momentum, num_maps):
    """Positions move by ± ε under Laplace momenta, so 100 maps come back; with normal ones each map doubles the rounding error."""
    precision = jnp.array([[1.5, 0.5], [0.5, 2.0]])
    flow = HamiltonianFlow(lambda x: -x @ precision @ x / 2, jnp.array([0.1, 0.07]), 3, momentum=momentum)
    start = ExtendedDensity(StandardNormal((2,)), momentum).sample(jax.random.key(3))

    @functools.partial(jax.jit, static_argnums=0)
    def compose(inverse, state):
        def move(carry, _):
            state, log_det = (flow.inverse if inverse else flow.forward)(carry[0])
            return (state, carry[1] + log_det), None

        return jax.lax.scan(move, (state, jnp.zeros(())), length=num_maps)[0]

    end, log_det = compose(False, start)
    back, inverse_log_det = compose(True, end)
    np.testing.assert_allclose(ravel_pytree(back)[0], ravel_pytree(start)[0], atol=1e-8)
    np.testing.assert_allclose(log_det + inverse_log_det, 0, atol=1e-8)

    flat, unravel = ravel_pytree(start)
    for move in (flow.forward, flow.inverse):
        (_, log_det), jacobian = jax.jit(lambda x, move=move: (move(unravel(x)), jax.jacfwd(lambda x: ravel_pytree(move(unravel(x))[0])[0])(x)))(flat)
        np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobian)[1], atol=1e-10)
        assert abs(log_det) > 1e-3


def test_one_map_by_hand():
    """Two leapfrog steps, the shift by π/16 and the refreshment of one state, in numpy."""
    x, rho, u, eps = 0.4, -0.7, 0.9, 0.1
    flow = HamiltonianFlow(lambda x: -jnp.sum(x**2) / 2, eps, 2)
    position = x
    for _ in range(2):
        rho -= eps / 2 * position
        position += eps * np.sign(rho)
        rho -= eps / 2 * position
    time = (u + np.pi / 16) % 1
    cdf = lambda r: 0.5 * np.exp(r) if r < 0 else 1 - 0.5 * np.exp(-r)  # noqa: E731
    p = (cdf(rho) + (np.sin(2 * position + time) + 1) / 2) % 1
    expected = np.log(2 * p) if p < 0.5 else -np.log(2 * (1 - p))
    end, _ = flow.forward(HamiltonianState(jnp.array([x]), jnp.array([-0.7]), jnp.array(u)))
    np.testing.assert_allclose([end.position[0], end.momentum[0], end.pseudotime], [position, expected, time], rtol=1e-12)


def test_law_on_the_extended_space():
    """By importance sampling from a wider law: q_N integrates to 1, is the law of the draws, and the ELBO is unbiased."""
    count, scale = 20000, 2.5
    key_x, key_rho, key_u, key_draws = jax.random.split(jax.random.key(1), 4)
    x, rho = scale * jax.random.normal(key_x, (count, 1)), 2 * jax.random.laplace(key_rho, (count, 1))
    wide = HamiltonianState(x, rho, jax.random.uniform(key_u, (count,)))
    log_wide = (jax.scipy.stats.norm.logpdf(x / scale) - jnp.log(scale) - jnp.abs(rho) / 2 - jnp.log(4.0))[:, 0]
    model, log_target = hamiltonian(4), ExtendedDensity(MIXTURE).log_prob
    log_q = jax.jit(jax.vmap(model.log_prob))(wide)
    draws, elbo = jax.jit(jax.vmap(lambda key: (model.sample(key), model.elbo(key, log_target))))(jax.random.split(key_draws, 4000))
    ratio = np.exp(log_q - log_wide)
    assert_mean(ratio, 1.0)
    for value in (lambda s: s.position[:, 0] ** 2, lambda s: np.cos(s.position + s.momentum)[:, 0] * (1 + s.pseudotime)):
        _two_means(value(draws), ratio * value(wide))
    _two_means(elbo, ratio * (jax.vmap(log_target)(wide) - log_q))


def test_divergence_falls():
    """KL(q_N ‖ p) for N = 1, 5, 20, beside means and standard errors of the paper's single-draw estimator in numpy (60000 draws)."""
    log_target, keys = ExtendedDensity(MIXTURE).log_prob, jax.random.split(jax.random.key(2), 4900)
    for n, mean, error in ((1, 0.5966, 0.0043), (5, 0.1830, 0.0023), (20, 0.0647, 0.0014)):
        divergence = -np.asarray(jax.jit(jax.vmap(lambda key, n=n: hamiltonian(n).elbo(key, log_target)))(keys))
        assert abs(divergence.mean() - mean) < 4.5 * np.hypot(error, divergence.std() / 70)


def _two_means(a, b):
    difference = np.mean(a) - np.mean(b)
    error = np.hypot(np.std(a) / np.sqrt(np.size(a)), np.std(b) / np.sqrt(np.size(b)))
    assert abs(difference) < 4.5 * error, f"{difference} is {difference / error:.1f} standard errors"


def test_orbit_average_is_the_single_draw_estimator():
    """The ELBO of an orbit by hand: log p - log q_N at each of its N states, each with its own backward pass."""
    model, key = hamiltonian(4), jax.random.key(5)
    log_target = ExtendedDensity(MIXTURE).log_prob
    orbit, elbo = jax.jit(lambda key: (model.orbit(key), model.elbo(key, log_target)))(key)
    np.testing.assert_allclose(elbo, jnp.mean(jax.vmap(log_target)(orbit) - jax.jit(jax.vmap(model.log_prob))(orbit)), rtol=1e-10)


def test_gradient_of_the_loss():
    """Pathwise gradients to the map and the reference equal finite differences."""

    def build(model):
        return MixFlow(Affine(*model["map"]), Flow(Affine(jnp.zeros(()), model["mean"]), StandardNormal((1,))), 3)

    loss = MixFlowLoss(MIXTURE.log_prob, build, 8)
    model, key = {"map": jnp.array([0.3, -0.2]), "mean": jnp.array([0.8])}, jax.random.key(0)
    flat, unravel = ravel_pytree(model)
    value_and_grad = jax.jit(jax.value_and_grad(lambda flat: loss(unravel(flat), None, key)[0]))
    _, gradient = value_and_grad(flat)
    for i, unit in enumerate(np.eye(3)):
        ends = [value_and_grad(flat + sign * 1e-5 * unit)[0] for sign in (1, -1)]
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-5, gradient[i], rtol=1e-6)
        assert abs(gradient[i]) > 1e-2


def test_refusals():
    with pytest.raises(ValueError, match="num_steps"):
        hamiltonian(0)
    with pytest.raises(ValueError, match="num_leapfrog"):
        HamiltonianFlow(MIXTURE.log_prob, 0.1, 0)
    with pytest.raises(ValueError, match="num_orbits"):
        MixFlowLoss(MIXTURE.log_prob, lambda model: model, 0)
