"""D-IMF between Gaussians in closed form, and its projections learned from samples: by the energy score, and the two players of the GAN."""

from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ergodax.core import iterate
from ergodax.transport.asbm_discrete_imf import (
    AdversarialLoss,
    AdversarialTransition,
    EnergyScoreLoss,
    GaussianIMF,
    reciprocal_step,
)
from ergodax.transport.discrete_bridge import Alternation, Learner, SimulatedPairs, TerminalTransition
from ergodax.transport.gaussian_bridge import GaussianBridge
from ergodax.transport.reference import Brownian, OrnsteinUhlenbeck
from ergodax.transport.samples import Samples


def one_dimension(epsilon, points):
    ends = jnp.array([[1.0]]), jnp.array([[2.25]])
    bridge = GaussianBridge(jnp.zeros(1), ends[0], jnp.ones(1), ends[1], Brownian(epsilon))
    return GaussianIMF(bridge, jnp.linspace(0.0, 1.0, points + 2))


def two_dimensions(reference):
    covs = jnp.array([[1.0, 0.4], [0.4, 0.6]]), jnp.array([[0.5, -0.6], [-0.6, 1.8]])
    return GaussianBridge(jnp.zeros(2), covs[0], jnp.ones(2), covs[1], reference)


def test_geometric_convergence_at_the_known_rate():
    """Contraction per round, with 1, 3 and 7 inner points, at ε = 1 and 10."""
    rates = {1: (0.507, 0.237), 3: (0.282, 0.113), 7: (0.177, 0.073)}

    @jax.jit
    @jax.vmap
    def run(epsilon):
        rounds = {points: one_dimension(epsilon, points) for points in rates}
        crosses = {
            points: jax.lax.scan(lambda cross, _, r=r: (r.project(cross),) * 2, r.init(), None, length=60)[1][:, 0, 0] for points, r in rounds.items()
        }
        return crosses, rounds[1].bridge.cross_covariance()[:, 0]

    crosses, limit = run(jnp.array([1.0, 10.0]))
    for points, cross in crosses.items():
        np.testing.assert_allclose(cross[:, -1:], limit, rtol=1e-12)
        for error, rate in zip(np.log(np.abs(cross - limit)[:, 2:8]), rates[points], strict=True):
            np.testing.assert_allclose(np.exp(np.diff(error)), rate, atol=1e-3)
            assert np.corrcoef(error, np.arange(6))[0, 1] ** 2 > 0.9999


def test_one_step_never_moves():
    rounds = one_dimension(1.0, 0)
    np.testing.assert_allclose(rounds.project(jnp.array([[0.3]])), 0.3, rtol=1e-12)


@jax.jit
def run_in_the_plane(rounds):
    start = 0.3 * jnp.array([[1.0, 0.5], [-0.5, 0.4]])
    own, neighbours = rounds.transitions(start)
    forward, backward = own[0], own[-1]
    for k in range(3):
        gain = jnp.linalg.solve(own[k], neighbours[k])
        forward = gain.T @ forward @ gain + own[k + 1] - neighbours[k].T @ gain
        back = jnp.linalg.solve(own[3 - k], neighbours[2 - k].T)
        backward = back.T @ backward @ back + own[2 - k] - neighbours[2 - k] @ back
    kls = iterate(jax.random.key(0), rounds.step, rounds.init(start), 40, save=lambda cross, kl: kl)[1]
    limit = rounds.bridge.cross_covariance()
    return forward, backward, kls, rounds.kl(start), limit, rounds.project(limit)


REFERENCES = {
    "slow": Brownian(jnp.array(0.1)),
    "brownian": Brownian(jnp.array(2.0)),
    "ornstein_uhlenbeck": OrnsteinUhlenbeck(jnp.array(0.8), jnp.array(0.5), jnp.array(1.0)),
}


@pytest.mark.parametrize("reference", REFERENCES)
def test_rounds_in_the_plane(reference):
    """Ends kept by the product of transitions in both directions; KL falls; the bridge is the fixed point."""
    bridge = two_dimensions(REFERENCES[reference])
    forward, backward, kls, first, limit, fixed = run_in_the_plane(GaussianIMF(bridge, jnp.array([0.0, 0.3, 0.55, 1.0])))
    np.testing.assert_allclose(forward, bridge.cov1, rtol=1e-10)
    np.testing.assert_allclose(backward, bridge.cov0, rtol=1e-10)
    np.testing.assert_allclose(fixed, limit, rtol=1e-9, atol=1e-12)
    assert kls[0] < first
    assert np.all(np.diff(kls)[kls[1:] > 1e-12] < 0)
    if reference == "brownian":
        assert kls[-1] < 1e-12


def test_reciprocal_joint_is_the_reference_bridge():
    """Cov(x_s, x_t) of Brownian bridges between coupled ends: (1-s)(1-t)C₀ + stC₁ + (1-s)tC₀₁ + s(1-t)C₀₁ᵀ + εs(1-t)I."""
    bridge, cross, epsilon = two_dimensions(Brownian(0.7)), jnp.array([[0.2, 0.1], [-0.3, 0.25]]), 0.7
    times = jnp.array([0.0, 0.2, 0.7, 1.0])
    own, neighbours = GaussianIMF(bridge, times).transitions(cross)

    def covariance(s, t):
        ends = (1 - s) * (1 - t) * bridge.cov0 + s * t * bridge.cov1 + (1 - s) * t * cross + s * (1 - t) * cross.T
        return ends + epsilon * s * (1 - t) * jnp.eye(2)

    np.testing.assert_allclose(own, jnp.stack([covariance(t, t) for t in times]), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(neighbours, jnp.stack([covariance(*pair) for pair in pairwise(times)]), rtol=1e-12, atol=1e-14)


def test_kl_of_couplings():
    rounds = one_dimension(1.0, 3)
    limit = rounds.bridge.cross_covariance()[0, 0]
    old, new = 0.3 / 1.5, limit / 1.5  # correlations
    expected = (jnp.log((1 - new**2) / (1 - old**2)) + 2 * (1 - old * new) / (1 - new**2) - 2) / 2
    np.testing.assert_allclose(rounds.kl(jnp.array([[0.3]])), expected, rtol=1e-12)


class Generator(eqx.Module):
    """gain[k] x + shift[k] + spread[k] z on a grid: draws from any Gaussian law of the far end."""

    gain: jax.Array
    shift: jax.Array
    spread: jax.Array

    def __call__(self, t, x, z):
        k = jnp.round(t * (self.gain.size - 1)).astype(int)
        return self.gain[k] * x + self.shift[k] + self.spread[k] * z


def generators(steps):
    times, ones = jnp.linspace(0.0, 1.0, steps + 1), jnp.ones(steps + 1)
    return [TerminalTransition(Generator(ones, 0 * ones, 0.5 * ones), Brownian(1.0), times, forward) for forward in (True, False)]


@pytest.mark.parametrize("forward", [True, False])
def test_reciprocal_steps(forward):
    """State and next state are two points of one bridge: means, variances and covariance by z-score, each of the 3 steps as often."""
    chain = eqx.tree_at(lambda c: c.times, generators(3)[0 if forward else 1], jnp.array([0.0, 0.25, 0.6, 1.0]))
    x0, x1, n = jnp.array([0.5]), jnp.array([2.0]), 30_000
    keys = jax.random.split(jax.random.key(0), n)
    k, state, after = map(np.asarray, jax.jit(jax.vmap(lambda key: reciprocal_step(chain, key, x0, x1)))(keys))
    times = np.array([0.0, 0.25, 0.6, 1.0])
    for i in range(3):
        rows = k == i
        count = int(rows.sum())
        assert abs(count - n / 3) < 4 * np.sqrt(n * 2 / 9)
        pair = np.stack([state[rows, 0], after[rows, 0]] if forward else [after[rows, 0], state[rows, 0]])
        s, t = times[i : i + 2]
        offset = pair - 0.5 - 1.5 * np.stack([s, t])[:, None]
        exact = np.array([[s * (1 - s), s * (1 - t)], [s * (1 - t), t * (1 - t)]])
        assert np.all(np.abs(np.mean(offset, 1)) <= 4 * np.sqrt(np.diag(exact) / count) + 1e-12)
        products = offset[:, None] * offset
        assert np.all(np.abs(np.mean(products, 2) - exact) <= 4 * np.std(products, 2) / np.sqrt(count) + 1e-12)


def players(scale):
    """A chain that draws exactly, or too widely, and a discriminator that is any logistic function of the next state's square."""
    chain = generators(2)[0]
    network = Generator(
        jnp.array([0.0, 9 / 8.5, 0.0]), jnp.array([1.0, 1 - 4.5 / 8.5, 0.0]), scale * jnp.sqrt(jnp.array([2.25, 2.25 - 81 / 68, 0.0]))
    )
    return eqx.tree_at(lambda c: c.network, chain, network)


class Logit(eqx.Module):
    weights: jax.Array

    def __call__(self, t, after, state):
        return self.weights[0] + self.weights[1] * jnp.sum(after**2) + self.weights[2] * jnp.sum(after * state) + self.weights[3] * t


def test_rounds_learned_by_the_energy_score():
    """From the exact first chain of the independent coupling, one learned round, as a scan, gives both chains of two further exact projections."""
    _, backward = generators(2)
    keys = jax.random.split(jax.random.key(0), 3)
    laws = [jax.random.normal(key, (4000, 1)) for key in keys[:2]]
    source, target = (Samples(std * (x - x.mean()) / x.std() + mean) for x, std, mean in zip(laws, (1.0, 1.5), (0.0, 1.0), strict=True))
    with jax.numpy_dtype_promotion("standard"):
        optimiser = optax.adam(optax.cosine_decay_schedule(0.1, 100))
        learn_backward, learn_forward = (Learner(EnergyScoreLoss(), optimiser, SimulatedPairs(law, 512), 100) for law in (source, target))
        rounds = Alternation(players(1.0), backward, learn_forward, learn_backward)
        forward, backward = rounds.models(jax.jit(lambda key: iterate(key, rounds.step, rounds.init(), 1))(keys[2]))
    exact = one_dimension(1.0, 1)
    first = exact.project(exact.init())
    second = exact.project(first)
    # the law of the far end given x_t, of the reciprocal processes of the two couplings; means 0, ½, 1
    for chain, cross, near in ((backward, first[0, 0], 2.25), (forward, second[0, 0], 1.0)):
        far = 3.25 - near
        own = jnp.array([near, (1.0 + 2.25 + 2 * cross + 1.0) / 4])
        shared = jnp.array([cross, (far + cross) / 2])
        gain, shift = shared / own, jnp.array([1.0, 0.5]) if near == 2.25 else jnp.array([0.0, 0.5])
        mean = 0.0 if near == 2.25 else 1.0
        rows = np.array([2, 1]) if near == 2.25 else np.array([0, 1])
        network = chain.network
        # 512 pairs a step, averaged by the decaying rate
        np.testing.assert_allclose(network.gain[rows], gain, atol=0.08)
        np.testing.assert_allclose(network.shift[rows], mean - gain * shift, atol=0.12)
        np.testing.assert_allclose(jnp.abs(network.spread[rows]), jnp.sqrt(far - gain * shared), atol=0.08)


@pytest.fixture(scope="module")
def pairs():
    key0, key1 = jax.random.split(jax.random.key(3))
    return jax.random.normal(key0, (20_000, 1)), 1 + 1.5 * jax.random.normal(key1, (20_000, 1))


def test_an_exact_chain_is_an_equilibrium(pairs):
    """With true and false steps of one law, D = 0 has no gradient, its loss is 2 log 2 and the generator's log 2; with wider draws D tells them."""
    loss = AdversarialLoss(r1=0.0)

    @jax.jit
    @jax.vmap
    def run(scale):
        def discriminator(weights, key, batch):
            return loss.discriminator(AdversarialTransition(players(scale), Logit(weights)), batch, key)

        batches = jax.tree.map(lambda x: x.reshape(40, 500, 1), pairs)
        keys = jax.random.split(jax.random.key(0), 40)
        return jax.vmap(jax.value_and_grad(discriminator), (None, 0, 0))(jnp.zeros(4), keys, batches)

    value, gradient = run(jnp.array([1.0, 1.3]))
    np.testing.assert_allclose(value, 2 * np.log(2), rtol=1e-12)
    z_scores = jnp.mean(gradient, 1) / jnp.maximum(jnp.std(gradient, 1) / np.sqrt(40), 1e-12)
    assert jnp.abs(z_scores[0]).max() < 4
    assert z_scores[1, 1] > 5  # a smaller weight of the square lowers the loss: false steps are wider


def test_losses_by_hand_and_who_learns(pairs):
    """Values of both losses, the penalty among them, and their gradients: each player moves by its own loss alone."""
    batch, key = jax.tree.map(lambda x: x[:64], pairs), jax.random.key(0)
    model = AdversarialTransition(players(1.2), Logit(jnp.array([0.1, -0.2, 0.3, 0.5])))

    def by_hand(model):
        def one(key, x0, x1):
            true, false = jax.random.split(key)
            k, state, after = reciprocal_step(model.chain, true, x0, x1)
            t, fake = model.chain.times[k], model.chain.step(false, k, state)
            slope = 2 * model.discriminator.weights[1] * after + model.discriminator.weights[2] * state
            real, fake = (model.discriminator(t, x, state) for x in (after, fake))
            return jnp.log1p(jnp.exp(-fake)), jnp.log1p(jnp.exp(-real)) + jnp.log1p(jnp.exp(fake)) + jnp.sum(slope**2) / 4

        return jax.tree.map(jnp.mean, jax.vmap(one)(jax.random.split(jax.random.split(key)[1], 64), *batch))

    @jax.jit
    def run(model):
        (total, aux), gradient = eqx.filter_value_and_grad(lambda m: AdversarialLoss(0.5)(m, batch, key), has_aux=True)(model)
        return total, aux, gradient, by_hand(model), eqx.filter_jacrev(by_hand)(model)

    total, aux, gradient, (generator, discriminator), (of_generator, of_discriminator) = run(model)
    np.testing.assert_allclose([aux["generator"], aux["discriminator"], total], [generator, discriminator, generator + discriminator], rtol=1e-10)
    np.testing.assert_allclose(gradient.chain.network.spread, of_generator.chain.network.spread, rtol=1e-10)
    np.testing.assert_allclose(gradient.discriminator.weights, of_discriminator.discriminator.weights, rtol=1e-10)
    assert jnp.abs(gradient.chain.network.spread[:2]).min() > 1e-3


def test_adversarial_learning_widens_a_narrow_chain(pairs):
    """Half the spread to start with; both players together bring it up to the true one (to the game's own swing)."""
    model = AdversarialTransition(players(0.5), Logit(jnp.zeros(4)))
    loss = AdversarialLoss(r1=0.1)
    sample = lambda other: lambda key, step: jax.tree.map(lambda x: x[jax.random.randint(key, (256,), 0, 20_000)], pairs)  # noqa: E731
    learner = Learner(loss, optax.adam(0.02, b1=0.5), sample, 400, ema_decay=0.98, trainable=lambda m: (m.chain.network, m.discriminator))
    with jax.numpy_dtype_promotion("standard"):
        fitted = jax.jit(lambda key: eqx.filter(learner(key, model, None), eqx.is_array))(jax.random.key(1))
    exact, narrow = players(1.0).network.spread[:2], players(0.5).network.spread[:2]
    assert jnp.all(jnp.abs(jnp.abs(fitted.chain.network.spread[:2]) - exact) < 0.5 * jnp.abs(narrow - exact))
    np.testing.assert_array_equal(fitted.chain.times, model.chain.times)


def test_dtype_and_what_is_refused():
    chain = generators(2)[0]
    chain = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if eqx.is_array(leaf) else leaf, chain)
    batch, key = (jnp.ones((4, 2), jnp.float32), jnp.zeros((4, 2), jnp.float32)), jax.random.key(0)
    assert eqx.filter_eval_shape(EnergyScoreLoss(), chain, batch, key)[0].dtype == jnp.float32
    model = AdversarialTransition(chain, Logit(jnp.zeros(4, jnp.float32)))
    assert eqx.filter_eval_shape(AdversarialLoss(jnp.float64(0.1)), model, batch, key)[0].dtype == jnp.float32
    with pytest.raises(ValueError, match="one shape"):
        EnergyScoreLoss()(chain, (batch[0], batch[1][:3]), key)
    with pytest.raises(ValueError, match="r1"):
        AdversarialLoss(-0.1)
    with pytest.raises(ValueError, match="times"):
        GaussianIMF(two_dimensions(Brownian(1.0)), jnp.array([0.0, 0.5, 1.5]))
