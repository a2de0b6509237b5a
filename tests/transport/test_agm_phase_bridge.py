"""Phase bridges: closed-form moments against their differential equations, both targets, and sampling with the exact field."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from ergodax.core import integrate
from ergodax.data import GaussianMixture, sliced_wasserstein
from ergodax.testing import assert_covariance, assert_mean, convergence_order
from ergodax.transport.agm_phase_bridge import PhaseBridge, PhaseBridgeLoss, PhaseEstimate, PhaseFlow, phase_sde_terms
from ergodax.transport.phase_solvers import PhaseExponential, PhaseSplitting


WEIGHTS, MEANS, STDS = jnp.array([0.3, 0.5, 0.2]), jnp.array([[1.0, 0.5], [-1.0, 0.2], [0.3, -1.2]]), jnp.array([0.2, 0.3, 0.15])
BRIDGES = [PhaseBridge(), PhaseBridge(2.0, 0.3, 0.7, 1.5)]
moments = jax.jit(lambda bridge, t: bridge.moments(t))


class Exact(eqx.Module):
    """F/z at E[x₁ | m] of the mixture: m says of x₁ what one Gaussian draw of precision cᵀΣ⁻¹c would."""

    bridge: PhaseBridge
    factor: float = 1.0

    def posterior_mean(self, t, m):
        c, ((xx, xv), (_, vv)) = self.bridge.moments(t)
        load = jnp.stack([vv * c[0] - xv * c[1], xx * c[1] - xv * c[0]]) / (xx * vv - xv**2)
        precision, evidence = c @ load, load[0] * m[0] + load[1] * m[1]
        k = 1 + precision * STDS**2
        logits = jnp.log(WEIGHTS / k) + (MEANS @ evidence + STDS**2 * (evidence @ evidence) / 2 - precision * jnp.sum(MEANS**2, 1) / 2) / k
        return jax.nn.softmax(logits) @ ((MEANS + STDS[:, None] ** 2 * evidence) / k[:, None])

    def __call__(self, t, m, args=None):
        return self.factor * self.bridge.acceleration(t, m, self.posterior_mean(t, m)) / self.bridge.scale(t)


@pytest.mark.parametrize("bridge", BRIDGES)
def test_moments_solve_their_equation(bridge):
    """dx = v dt, dv = (4/τ) [(x₁ - x)/τ - v] dt + pτ dW, from the given start, by a solver of order 8 with x₁ = 1."""

    def rate(t, state):
        tau, mean, covariance = 1 - t, state[:2], state[2:].reshape(2, 2)
        a = np.array([[0, 1], [-4 / tau**2, -4 / tau]])
        noise = np.diag([0, (bridge.noise_scale * tau) ** 2])
        return np.concatenate([a @ mean + [0, 4 / tau**2], (a @ covariance + covariance @ a.T + noise).ravel()])

    cross = bridge.correlation * np.sqrt(bridge.position_variance * bridge.velocity_variance)
    start = [0, 0, bridge.position_variance, cross, cross, bridge.velocity_variance]
    times = np.array([0.0, 0.1, 0.5, 0.9])
    truth = scipy.integrate.solve_ivp(rate, (0, 0.9), start, method="DOP853", t_eval=times, rtol=1e-11, atol=1e-13).y.T
    for t, row in zip(times, truth):
        mean, covariance = moments(bridge, t)
        np.testing.assert_allclose(mean, row[:2], atol=1e-9)
        np.testing.assert_allclose(covariance.ravel(), row[2:], atol=1e-9)


def test_moments_at_known_times():
    """The polynomials of the paper, its numbers at t = ½, and the end, where x is x₁."""
    for t in (0.2, 0.5, 0.8):
        np.testing.assert_allclose(moments(PhaseBridge(), t)[0], [t**2 * (t**2 - 4 * t + 6) / 3, 4 / 3 * t * (t**2 - 3 * t + 3)], rtol=1e-13)
    np.testing.assert_allclose(moments(PhaseBridge(), 0.5)[1], [[0.439404, -0.724364], [-0.724364, 1.492964]], atol=1e-6)
    np.testing.assert_allclose(moments(PhaseBridge(correlation=0.2), 0.5)[1], [[0.514751, -0.835475], [-0.835475, 1.648519]], atol=1e-6)
    mean, covariance = moments(PhaseBridge(), 1.0)
    assert mean[0] == 1
    np.testing.assert_array_equal(covariance[0], 0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_target_and_estimate_as_in_the_paper(eta):
    """Their Cholesky factors, targets, normaliser and estimates; the estimate is x₁ itself where x₁ is known."""
    bridge, x1, e = PhaseBridge(noise_share=eta), jnp.array([1.3, -0.4]), jax.random.normal(jax.random.key(0), (2, 2))
    parts = jax.jit(lambda t: (m := bridge.perturb(t, x1, e), bridge.target(t, x1, e), bridge.scale(t), bridge.acceleration(t, m, x1)))
    for t in (0.1, 0.5, 0.95):
        (cx, cv), covariance = (np.asarray(part) for part in moments(bridge, t))
        ((lxx, _), (lxv, lvv)), tau = np.linalg.cholesky(covariance), 1 - t
        g, gain, ell = 3 * tau, 4 / tau, -np.sqrt(covariance[0, 0] / np.linalg.det(covariance))
        m, target, scale, acceleration = parts(t)
        np.testing.assert_allclose(m, [cx * x1 + lxx * e[0], cv * x1 + lxv * e[0] + lvv * e[1]], rtol=1e-11)
        expected = 4 * x1 * tau**2 - gain * ((lxx / tau + lxv) * e[0] + lvv * e[1]) - (1 - eta) / 2 * g**2 * ell * e[1]
        np.testing.assert_allclose(target, expected, rtol=1e-10)
        np.testing.assert_allclose(acceleration, expected, rtol=1e-10)
        b = gain * lvv - (1 - eta) * g**2 * ell / 2
        np.testing.assert_allclose(scale, np.sqrt((gain * (lxx / tau + lxv)) ** 2 + b**2) / tau, rtol=1e-10)
        share = 1 + (1 - eta) * g**2 * ell / (2 * gain * lvv)
        a = (lxx / tau + lxv - share * lxv) / lxx
        theirs = (target + gain * (a * m[0] + share * m[1])) / (4 * tau**2 + gain * (a * cx + share * cv))
        np.testing.assert_allclose(theirs, x1, atol=1e-10)
        np.testing.assert_allclose(bridge.estimate(t, m, target), x1, atol=1e-12)
        if eta == 1:
            np.testing.assert_allclose(x1, tau * (target / gain + m[1]) + m[0], atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_every_noise_share_has_the_same_marginals(eta):
    """Data N(μ, s²): the mean field is affine, and carries mean and covariance of m_t: m' = f(m), C' = A C + C Aᵀ + diag(0, η g²)."""
    bridge, mu, variance = PhaseBridge(noise_share=eta), jnp.array([0.7]), 0.4

    def law(t):
        c, covariance = bridge.moments(t)
        return c[:, None] * mu, covariance + variance * jnp.outer(c, c)

    def field(t, m):
        c, covariance = bridge.moments(t)
        load = jnp.linalg.solve(covariance, c)
        mean = (mu / variance + load @ m) / (1 / variance + c @ load)
        return jnp.stack([m[1], bridge.acceleration(t, m, mean)])

    @jax.jit
    def sides(t):
        (mean, covariance), (d_mean, d_covariance) = jax.jvp(law, (t,), (jnp.ones_like(t),))
        a = jax.jacfwd(lambda m: field(t, m[:, None])[:, 0])(mean[:, 0])
        noise = jnp.diag(jnp.array([0.0, 1.0])) * bridge.variance(t)
        return (d_mean, d_covariance), (field(t, mean), a @ covariance + covariance @ a.T + noise)

    for t in (0.05, 0.5, 0.95):
        for found, expected in zip(*sides(jnp.asarray(t))):
            np.testing.assert_allclose(found, expected, atol=1e-9)


def test_loss_is_minimised_by_the_exact_field():
    """Slope 0 in a factor of the exact field (z-score), and not at 0.9 of it."""
    bridge, mixture = PhaseBridge(), GaussianMixture.isotropic(WEIGHTS, MEANS, STDS)

    @jax.jit
    @jax.vmap
    def slope(key, factor):
        return jax.grad(lambda f: PhaseBridgeLoss(bridge)(Exact(bridge, f), mixture.sample(key, 32), key)[0])(factor)

    keys = jax.random.split(jax.random.key(0), 500)
    assert_mean(slope(keys, jnp.full(500, 1.0))[:, None], 0.0, z=4.0)
    with pytest.raises(AssertionError):
        assert_mean(slope(keys, jnp.full(500, 0.9))[:, None], 0.0, z=4.0)


def test_loss_of_a_network_that_says_nothing():
    """Data 0, η = 1: F/z is N(0, τ²) at every t, so the weighted loss is τ. And m₀ has the start's covariance."""
    bridge = PhaseBridge(noise_share=1.0)

    @jax.jit
    @jax.vmap
    def loss(key):
        at = PhaseBridgeLoss(bridge, times=lambda key, n: jnp.full(n, 0.6))
        return at(lambda t, m, args: jnp.zeros_like(m[0]), jnp.zeros((1, 1)), key)[0]

    assert_mean(loss(jax.random.split(jax.random.key(0), 4000))[:, None], 0.4)
    draws = PhaseBridge(2.0, 0.3, 0.7, 1.5).prior(jax.random.key(1), (1,), 4000)
    assert draws.shape == (4000, 2, 1)
    cross = 0.3 * np.sqrt(0.7 * 1.5)
    assert_covariance(draws[..., 0], [[0.7, cross], [cross, 1.5]])


@eqx.filter_jit
def flow(solver, m, times):
    bridge = PhaseBridge()
    ends = jax.vmap(lambda m: integrate(dfx.ODETerm(PhaseFlow(Exact(bridge), bridge)), solver, m, times=times))(m)
    return ends, jax.vmap(lambda m: PhaseEstimate(Exact(bridge), bridge)(times[-1], m))(ends)


def start(n):
    return PhaseBridge().prior(jax.random.key(0), (2,), n)


def refined(n, end=0.999):
    """n steps from 0 to `end`, shorter towards 1."""
    return 1 - (1 - jnp.linspace(0, 1, n + 1) * (1 - np.sqrt(1 - end))) ** 2


def test_orders():
    """Before t = ½; nearer to 1 the stiffness 1/τ hides them."""
    m, counts = start(8), (40, 160)
    reference = flow(dfx.Midpoint(), m, jnp.linspace(0, 0.5, 641))[0]
    for solver, order in ((dfx.Euler(), 1), (PhaseExponential(PhaseBridge()), 2)):
        errors = [float(np.sqrt(np.mean((flow(solver, m, jnp.linspace(0, 0.5, n + 1))[0] - reference) ** 2))) for n in counts]
        assert abs(convergence_order(counts, errors) - order) < 0.1, solver


def test_exponential_integrator_is_exact_for_a_polynomial():
    """A network that is quadratic in t: x'' = z(t) (1 + t + t²) by quadrature, whatever the unequal steps, once three outputs are there."""
    bridge = PhaseBridge()

    def network(t, m, args):
        return jnp.full_like(m[0], 1 + t + t**2)

    times = jnp.array([0.1, 0.15, 0.3, 0.5, 0.9])
    term, m = dfx.ODETerm(PhaseFlow(network, bridge)), jnp.array([[0.3], [-1.2]])
    _, states = jax.jit(lambda m: integrate(term, PhaseExponential(bridge, 3), m, times=times, save=lambda t, m: m))(m)
    scale = jax.jit(bridge.scale)
    s, w = np.polynomial.legendre.leggauss(40)
    for i in (2, 3):
        t0, t1 = np.asarray(times[i : i + 2])
        nodes = (t0 + t1) / 2 + (t1 - t0) / 2 * s
        push = w * (t1 - t0) / 2 * jax.vmap(scale)(nodes) * (1 + nodes + nodes**2)
        (x, v), (x1, v1) = states[i - 1], states[i]
        np.testing.assert_allclose(v1, v + push.sum(), rtol=1e-9)
        np.testing.assert_allclose(x1, x + (t1 - t0) * v + (push * (t1 - nodes)).sum(), rtol=1e-9)


def test_samples_in_twenty_calls():
    """2-D mixture, sliced W2 below 0.1; a second set of data is at 0.07."""
    data = GaussianMixture.isotropic(WEIGHTS, MEANS, STDS).sample(jax.random.key(1), 2000)
    distance = jax.jit(lambda a: sliced_wasserstein(jax.random.key(5), a, data, 64))
    m, estimate = flow(PhaseExponential(PhaseBridge()), start(2000), refined(20))
    assert distance(m[:, 0]) < 0.1
    assert distance(estimate) < 0.1

    bridge = PhaseBridge(noise_share=1.0)
    solver = PhaseSplitting(bridge)
    sde = jax.jit(jax.vmap(lambda key, m: integrate(phase_sde_terms(Exact(bridge), bridge, key, m), solver, m, times=refined(20))))
    assert distance(sde(jax.random.split(jax.random.key(2), 2000), start(2000))[:, 0]) < 0.1


def test_noise_of_one_step():
    """Euler: h η g² on v alone. Splitting: the exact law of free flight, and v + hF, x + hv + h²F/2 without noise."""
    bridge, t0, h, m, n = PhaseBridge(noise_share=0.5), 0.2, 0.3, jnp.array([[0.4], [-0.7]]), 4000

    def network(t, m, args):
        return jnp.zeros_like(m[0])

    def step(solver):
        times = jnp.array([t0, t0 + h])
        run = jax.vmap(lambda key: integrate(phase_sde_terms(network, bridge, key, m), solver, m, times=times)[:, 0])
        return jax.jit(run)(jax.random.split(jax.random.key(0), n))

    euler = step(dfx.Euler())
    np.testing.assert_allclose(euler[:, 0], 0.4 - 0.7 * h, rtol=1e-12)
    assert_covariance(euler[:, 1:], [[h * 0.5 * (3 * 0.8) ** 2]])
    u = np.linspace(0, h, 20001)
    g2 = 0.5 * (3 * (0.5 + u)) ** 2
    expected = [[np.trapezoid(u ** (i + j) * g2, u) for j in (1, 0)] for i in (1, 0)]
    split = step(PhaseSplitting(bridge))
    assert_mean(split, [0.4 - 0.7 * h, -0.7])
    assert_covariance(split, expected)

    quiet = PhaseBridge()
    terms = phase_sde_terms(lambda t, m, args: jnp.full_like(m[0], 2.0), quiet, jax.random.key(0), m)
    end = jax.jit(lambda m: integrate(terms, PhaseSplitting(quiet), m, times=jnp.array([t0, t0 + h])))(m)
    force = 2 * quiet.scale(t0 + h / 2)
    np.testing.assert_allclose(end[:, 0], [0.4 - 0.7 * h + h**2 / 2 * force, -0.7 + h * force], rtol=1e-12)


def test_float32_and_bad_arguments():
    bridge, x1 = PhaseBridge(), jnp.ones(2, jnp.float32)
    loss = jax.eval_shape(lambda x: PhaseBridgeLoss(bridge)(lambda t, m, args: m[0] * t, x, jax.random.key(0))[0], jnp.ones((4, 2), jnp.float32))
    assert loss.dtype == jnp.float32
    # w is 1e-7 of x here: a target computed from x - x₁ would have no digit left
    t, e = 0.999, jax.random.normal(jax.random.key(1), (2, 2), jnp.float32)
    target = jax.jit(bridge.target)
    low, high = target(jnp.asarray(t, jnp.float32), x1, e), target(t, x1.astype(float), e.astype(float))
    np.testing.assert_allclose(low, high, rtol=1e-3)
    for bad in (dict(noise_scale=0.0), dict(correlation=1.0), dict(position_variance=0.0), dict(velocity_variance=-1.0), dict(noise_share=1.5)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            PhaseBridge(**bad)
    with pytest.raises(ValueError, match="max_order"):
        PhaseExponential(bridge, 4)
    with pytest.raises(ValueError, match="batch"):
        PhaseBridgeLoss(bridge)(lambda t, m, args: m[0], jnp.ones(2), jax.random.key(0))
