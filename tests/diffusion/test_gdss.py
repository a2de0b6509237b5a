"""GDSS: one vector for a graph, its solver against a formula and on a Gaussian graph in closed form, and networks that respect the graph."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import Denoiser, DenoiserTerm, EDMPath, NoisePrediction, VPPath, integrate
from ergodax.diffusion import DDIM, DenoisingLoss, uniform_grid
from ergodax.diffusion.gdss import EdgeNetwork, GraphNoise, GraphPath, NodeNetwork, S4Splitting
from ergodax.testing import assert_covariance, assert_mean


NODE_PATH, EDGE_PATH = VPPath(0.1, 5.0), VPPath(0.1, 8.0)
PATH = GraphPath(NODE_PATH, EDGE_PATH, 2, 1)
MEAN = jnp.array([0.5, -0.3, 0.8])
COVARIANCE = jnp.array([[1.0, 0.3, 0.5], [0.3, 0.8, -0.4], [0.5, -0.4, 0.7]])  # of (x₁, x₂, a₁₂)
MARGINAL = COVARIANCE * jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


def denoiser(covariance):
    """E[graph | noisy graph] of a Gaussian graph, packed."""

    def denoised(t, y, args):
        alpha, sigma = PATH.alpha(t), PATH.sigma(t)
        gain = jnp.linalg.solve(jnp.outer(alpha, alpha) * covariance + jnp.diag(sigma**2), alpha[:, None] * covariance).T
        return MEAN + (y - alpha * MEAN) @ gain.T

    return denoised


def graph(key, n=4, f=3):
    edges = jnp.triu(jax.random.uniform(key, (n, n)), 1)
    return jax.random.normal(key, (n, f)), edges + edges.T


def test_packing_and_clocks():
    path = GraphPath(NODE_PATH, EDMPath(3.0), 4, 3)
    nodes, edges = graph(jax.random.key(0))
    vector = path.pack(nodes, edges)
    assert vector.shape == (path.size,) == (4 * 3 + 6,)
    for actual, expected in zip(path.unpack(vector), (nodes, edges)):
        np.testing.assert_array_equal(actual, expected)
    t = jnp.asarray(0.3)
    for name in ("alpha", "sigma", "log_alpha", "log_sigma", "diffusion", "d_alpha"):
        parts = [jnp.broadcast_to(getattr(p, name)(t), (n,)) for p, n in ((path.node_path, 12), (path.edge_path, 6))]
        np.testing.assert_allclose(getattr(path, name)(t), jnp.concatenate(parts), rtol=1e-12)
    mask = jnp.array([1.0, 0.0, 1.0, 1.0])
    for actual, expected in zip(path.unpack(path.masked(vector, mask)), (nodes * mask[:, None], edges * jnp.outer(mask, mask))):
        np.testing.assert_array_equal(actual, expected)


class ThreeNoises(dfx.AbstractTerm):
    """A noise term with given unit noises in the thirds of the step."""

    values: jax.Array

    def vf(self, t, y, args):
        return None

    def contr(self, t0, t1, **kwargs):
        return self.values[jnp.rint(3 * t0).astype(int)] * jnp.sqrt(t1 - t0)

    def prod(self, vf, control):
        return control


def test_one_step():
    """The paper's step on VP in its own time, written with β."""
    y, z = jnp.array([0.4, -1.0, 0.7]), jax.random.normal(jax.random.key(0), (3, 3))
    grid, snr, scale = jnp.array([0.5, 0.6]), 0.15, 0.7
    terms = dfx.MultiTerm(DenoiserTerm(denoiser(COVARIANCE), PATH, grid), ThreeNoises(z))
    actual = integrate(terms, S4Splitting(PATH, snr, scale), y)

    u, dt = 0.5, 0.1
    slope = np.array([4.9, 4.9, 7.9])
    beta = 0.1 + slope * u

    def integral(start, end):
        return 0.1 * (end - start) + slope / 2 * (end**2 - start**2)

    total = integral(0, u)
    alpha, variance = np.exp(-total / 2), 1 - np.exp(-total)
    y, z = np.asarray(y), np.asarray(z)
    marginal = np.outer(alpha, alpha) * np.asarray(COVARIANCE) + np.diag(variance)
    score = -np.linalg.solve(marginal, y - alpha * np.asarray(MEAN))
    x, groups = y.copy(), (slice(0, 2), slice(2, 3))
    for part in groups:
        kept = np.exp(-integral(u - dt, u)[part][0])
        size = 2 * kept * (snr * np.linalg.norm(z[0][part]) / np.linalg.norm(score[part])) ** 2
        x[part] += size * score[part] + scale * np.sqrt(2 * size) * z[0][part]
    for end, start, noise, push in ((u, u - dt / 2, z[1], dt * beta * score), (u - dt / 2, u - dt, z[2], 0)):
        b = integral(start, end)
        x = np.exp(b / 2) * x + np.sqrt(np.expm1(b)) * noise + push
    np.testing.assert_allclose(actual, x, rtol=1e-10)


@jax.jit
def sample(covariance, noise_scale):
    """3000 draws, from the law at t = 0 of the true graph, through the model with `covariance`."""
    n, (first, second) = 3000, jax.random.split(jax.random.key(0))
    alpha, sigma = PATH.alpha(0.0), PATH.sigma(0.0)
    factor = jnp.linalg.cholesky(jnp.outer(alpha, alpha) * COVARIANCE + jnp.diag(sigma**2))
    start = alpha * MEAN + jax.random.normal(first, (n * 3,)).reshape(n, 3) @ factor.T
    term = DenoiserTerm(denoiser(covariance), PATH, uniform_grid(250, 0.0, 0.9999))
    return integrate(term, S4Splitting(PATH, noise_scale=noise_scale), start, key=second)


def test_s4_recovers_the_joint_law():
    """Mean and covariance within z-scores; with the scores of the marginals no coupling of X and A is left."""
    x = sample(COVARIANCE, 1.0)
    assert_mean(x, MEAN, z=4)
    assert_covariance(x, COVARIANCE, z=4)
    # a covariance of 0 has a standard error of √(v w/n), at most 0.02 here
    cross = np.cov(np.asarray(sample(MARGINAL, 1.0)).T)[:2, 2]
    assert np.abs(cross).max() < 4 * 0.02, cross


def test_less_noise_narrows_the_law():
    """κ = 0.8 leaves about two thirds of the variance: the card's number."""
    share = np.var(sample(COVARIANCE, 0.8), axis=0) / np.diag(COVARIANCE)
    assert abs(share.mean() - 0.67) < 0.08, share


@pytest.fixture(scope="module")
def networks():
    path = GraphPath(VPPath(), VPPath(0.1, 1.0), 4, 3)
    return eqx.filter_jit(make_networks)(path, jax.random.split(jax.random.key(3)))


def make_networks(path, keys):
    return GraphNoise(NodeNetwork(3, 4, key=keys[0]), EdgeNetwork(3, 4, channels=2, heads=2, key=keys[1]), path)


def test_networks_commute_with_renumbering(networks):
    nodes, edges = graph(jax.random.key(1))
    order, ones = jnp.array([2, 0, 3, 1]), jnp.ones(4)
    for network, pick in ((networks.node_network, lambda x: x[order]), (networks.edge_network, lambda x: x[order][:, order])):
        run = jax.jit(lambda *graph, network=network: network(*graph))
        value = run(nodes, edges, ones)
        np.testing.assert_allclose(run(nodes[order], edges[order][:, order], ones), pick(value), atol=1e-12)
        assert jnp.abs(value - pick(value)).max() > 1e-3
    np.testing.assert_allclose(value, value.T, atol=1e-12)


def test_absent_nodes_change_nothing(networks):
    """Whatever stands at an absent node, the others are told the same, and it is told 0: the network of the smaller graph."""
    path, mask = networks.path, jnp.array([1.0, 1.0, 0.0, 1.0])
    x, y = (path.pack(*graph(jax.random.key(seed))) for seed in (1, 2))
    mixed = path.masked(x, mask) + y - path.masked(y, mask)
    run = jax.jit(lambda x, mask: networks(0.5, x, mask))
    np.testing.assert_allclose(run(mixed, mask), run(x, mask), atol=1e-12)
    np.testing.assert_array_equal(run(x, mask), path.masked(run(x, mask), mask))
    assert jnp.abs(run(mixed, jnp.ones(4)) - run(x, jnp.ones(4))).max() > 1e-3
    small, keep = GraphNoise(networks.node_network, networks.edge_network, GraphPath(VPPath(), VPPath(), 3, 3)), jnp.array([0, 1, 3])
    nodes, edges = path.unpack(x)
    of_large = [value[keep] for value in path.unpack(run(x, mask))]
    of_small = small.path.unpack(jax.jit(lambda x: small(0.5, x))(small.path.pack(nodes[keep], edges[keep][:, keep])))
    np.testing.assert_allclose(of_large[0], of_small[0], atol=1e-12)
    np.testing.assert_allclose(of_large[1][:, keep], of_small[1], atol=1e-12)


def test_loss_and_sampling_in_one_line(networks):
    """The plain objective and solvers, with masks: absent entries cost nothing and stay 0; a solver of ODEs runs too."""
    path, masks = networks.path, jnp.array([[1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    data = path.masked(jnp.stack([path.pack(*graph(jax.random.key(seed))) for seed in (1, 2)]), masks)
    loss = DenoisingLoss(path, NoisePrediction(), coupling=path.masked_noise)
    noise = jax.random.normal(jax.random.split(jax.random.key(0), 4)[0], (data.size,)).reshape(data.shape)
    # a network that says 0 is left with the noise of the nodes that exist
    np.testing.assert_allclose(loss(lambda t, x, m: 0 * x, (data, masks), jax.random.key(0))[0], jnp.mean(path.masked(noise, masks) ** 2), rtol=1e-12)
    term = DenoiserTerm(Denoiser(networks, path, NoisePrediction()), path, uniform_grid(4, 0.0, 0.99))
    key = jax.random.key(5)
    start = path.masked(path.prior(key, (path.size,)), masks[0])
    for solver in (S4Splitting(path), DDIM()):
        x = jax.jit(lambda solver=solver: integrate(term, solver, start, masks[0], key=key))()
        np.testing.assert_array_equal(x, path.masked(x, masks[0]))
        assert jnp.isfinite(x).all()


def test_dtype_and_bad_arguments():
    term = DenoiserTerm(lambda t, x, args: jnp.tanh(x), PATH, uniform_grid(3, 0.0, 0.9).astype(jnp.float32))
    x = integrate(term, S4Splitting(PATH), jnp.ones(3, jnp.float32), key=jax.random.key(0))
    assert x.dtype == jnp.float32
    for make, match in (
        (lambda: GraphPath(NODE_PATH, EDGE_PATH, 1, 1), "num_nodes"),
        (lambda: S4Splitting(PATH, -0.1), "snr"),
        (lambda: EdgeNetwork(3, 8, heads=3, key=jax.random.key(0)), "heads"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
