"""Stochastic normalising flows: weights against known normalisers, ΔS against explicit densities, annealed importance sampling, a trained flow."""

import functools

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.scipy.stats import norm

from ergodax.core import fit, iterate
from ergodax.data import GaussianMixture, ManyWell
from ergodax.testing import assert_covariance, assert_mean, z_scores
from ergodax.transport.bijection import Coupling, StandardNormal
from ergodax.transport.path_blocks import (
    BlockSequence,
    DeterministicBlock,
    GeometricDensities,
    HMCBlock,
    KernelBlock,
    LangevinBlock,
    MetropolisBlock,
    PathBlock,
    ScannedBlocks,
    UnderdampedLangevinBlock,
)
from ergodax.transport.stochastic_normalizing_flow import (
    PathKLLoss,
    PathLikelihoodLoss,
    PathMetropolis,
    StochasticNormalizingFlow,
    WeightedSample,
    effective_sample_size,
    log_mean_weight,
    weighted_mean,
)


TARGET = GaussianMixture(jnp.ones(1), jnp.array([[0.4, -0.3]]), jnp.array([[[0.8, 0.3], [0.3, 0.5]]]))
BASE = StandardNormal((2,))
WELL = ManyWell(2)


def coupling(seed, kept):
    return DeterministicBlock(Coupling(eqx.nn.MLP(1, 2, 4, 1, activation=jnp.tanh, key=jax.random.key(seed)), (kept,)))


BLOCKS = {
    "coupling": coupling(0, 0),
    "overdamped": LangevinBlock(jnp.log(jnp.array([0.3, 0.2])), 0.2, 2),
    "other coupling": coupling(1, 1),
    "underdamped": UnderdampedLangevinBlock(np.log(0.5).item(), 0.4, 0.7, 2),
    "Metropolis": MetropolisBlock(np.log(0.7).item(), 0.6, 2),
    "HMC": HMCBlock(np.log(0.6).item(), 0.8, 2, 2),
    "blackjax": KernelBlock(lambda log_density: blackjax.hmc(log_density, 0.6, jnp.ones(2), 2), 1.0),
}


def path(key):
    """(x, log w) of one path through all blocks, and each block's ΔS."""
    key_base, key_path = jax.random.split(key)
    densities = GeometricDensities(BASE.log_prob, TARGET.log_prob)
    z = x = BASE.sample(key_base)
    changes = []
    for key_block, block in zip(jax.random.split(key_path, len(BLOCKS)), BLOCKS.values()):
        x, change = block.forward(key_block, x, densities)
        changes.append(change)
    return WeightedSample(x, TARGET.log_prob(x) - BASE.log_prob(z) + sum(changes)), jnp.stack(changes)


@functools.cache
def paths():
    return jax.jit(jax.vmap(path))(jax.random.split(jax.random.key(0), 100_000))


def test_weights_have_mean_one_and_correct_the_samples():
    samples, _ = paths()
    weights = np.exp(samples.log_weight)
    assert_mean(weights, 1.0, z=3.5)
    assert np.abs(z_scores(samples.position, TARGET.mean())).max() > 8  # the flow itself is off
    moments = jnp.concatenate([samples.position, samples.position**2], axis=1)
    expected = jnp.concatenate([TARGET.mean(), jnp.diag(TARGET.covariance()) + TARGET.mean() ** 2])
    assert_mean(weights[:, None] * (moments - expected), 0.0)
    np.testing.assert_allclose(weighted_mean(samples.log_weight, moments), expected, atol=0.03)
    np.testing.assert_allclose(log_mean_weight(samples.log_weight), np.log(weights.mean()), atol=1e-12)
    np.testing.assert_allclose(effective_sample_size(samples.log_weight), weights.sum() ** 2 / (weights**2).sum(), rtol=1e-9)


@pytest.mark.parametrize("dropped", range(len(BLOCKS)), ids=list(BLOCKS))
def test_no_log_ratio_can_be_dropped(dropped):
    samples, changes = paths()
    assert np.abs(z_scores(np.exp(samples.log_weight - changes[:, dropped]), 1.0)) > 6


def test_a_flow_goes_through_its_blocks():
    flow, key = StochasticNormalizingFlow(BlockSequence(tuple(BLOCKS.values())), BASE), jax.random.split(jax.random.key(0), 100_000)[0]
    sample = jax.jit(lambda key: flow.sample(key, TARGET.log_prob))(key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[0], rtol=1e-9), sample, paths()[0])


def test_langevin_ratio_is_that_of_two_gaussians():
    step_size, x = jnp.array([0.3, 0.1]), jnp.array([0.7, -1.1])
    force = jax.grad(TARGET.log_prob)
    y, change = LangevinBlock(jnp.log(step_size), 1.0).forward(jax.random.key(3), x, lambda share, x: share * TARGET.log_prob(x))

    def log_kernel(y, x):
        return jnp.sum(norm.logpdf(y, x + step_size * force(x), jnp.sqrt(2 * step_size)))

    np.testing.assert_allclose(change, log_kernel(x, y) - log_kernel(y, x), rtol=1e-10)


def one_step(h, friction):
    """The law of one underdamped step from x on N(0, 1): y = slope x + noise of a variance."""
    return 1 - h**2 / 2, h**2 * ((1 - friction * h / 2) ** 2 + friction * h)


@pytest.mark.parametrize(
    ("block", "slope", "variance"),
    [
        (LangevinBlock(np.log(0.4).item(), 1.0), 0.6, 0.8),
        (UnderdampedLangevinBlock(np.log(0.8).item(), 1.0, 1.5), *one_step(0.8, 1.5)),
        (UnderdampedLangevinBlock(np.log(0.8).item(), 1.0, 0.0), *one_step(0.8, 0.0)),
    ],
)
def test_paths_backwards_give_the_density_of_the_flow(block, slope, variance):
    """From a base N(1, 2²), one linear step: the marginal is Gaussian."""
    base = GaussianMixture.isotropic(jnp.ones(1), jnp.ones((1, 1)), 2.0)
    flow = StochasticNormalizingFlow(block, base)
    x, keys = jnp.array([1.7]), jax.random.split(jax.random.key(4), 20_000)
    log_probs = jax.jit(jax.vmap(lambda key: flow.path_log_prob(key, x, lambda x: -jnp.sum(x**2) / 2)))(keys)
    assert_mean(np.exp(log_probs), norm.pdf(1.7, slope, np.sqrt(4 * slope**2 + variance)), z=3.5)


class Recorded(PathBlock):
    """A block that writes down where it began and ended."""

    block: PathBlock
    record: list = eqx.field(static=True)

    def forward(self, key, x, densities):
        y, change = self.block.forward(key, x, densities)
        self.record.append((x, y))
        return y, change

    def inverse(self, key, y, densities):
        raise NotImplementedError


def test_reversible_blocks_are_annealed_importance_sampling():
    record, shares = [], (0.3, 0.7, 1.0)
    flow = StochasticNormalizingFlow(BlockSequence(tuple(Recorded(MetropolisBlock(0.0, share, 3), record) for share in shares)), BASE)
    sample = flow.sample(jax.random.key(5), WELL.log_prob)
    expected = 0.0
    for (x, _), last, share in zip(record, (0.0, *shares), shares):
        expected += (share - last) * (WELL.log_prob(x) - BASE.log_prob(x))
    np.testing.assert_allclose(sample.log_weight, expected, rtol=1e-12)
    assert not np.array_equal(sample.position, record[0][0])


class ProductOfMixtures(eqx.Module):
    """Independent pairs: a mixture on the wells in one coordinate, N(0, 1) in the other."""

    def pair(self):
        return GaussianMixture(jnp.array([0.25, 0.75]), jnp.array([[-1.7, 0.0], [1.7, 0.0]]), jnp.array([[0.06, 1.0], [0.06, 1.0]]))

    def sample(self, key):
        return self.pair().sample(key, 16).reshape(32)

    def log_prob(self, x):
        return jnp.sum(self.pair().log_prob(x.reshape(16, 2)))


def test_normaliser_of_the_many_well():
    target = ManyWell(32)
    steps = jax.vmap(lambda share: BlockSequence((LangevinBlock(np.log(0.005).item(), share), HMCBlock(np.log(0.1).item(), share, 2))))(
        jnp.linspace(0.25, 1.0, 4)
    )
    flow = StochasticNormalizingFlow(ScannedBlocks(steps), ProductOfMixtures())
    samples = jax.jit(jax.vmap(lambda key: flow.sample(key, target.log_prob)))(jax.random.split(jax.random.key(6), 4000))
    weights = np.exp(samples.log_weight - 164.69567531)
    assert weights.std() / np.sqrt(weights.size) < 0.03
    assert_mean(weights, 1.0, z=3.5)
    np.testing.assert_allclose(weighted_mean(samples.log_weight, samples.position)[::2].mean(), target.mean()[0], atol=0.05)


def well_flow(sampling):
    """Two pairs of coupling layers, each followed by Metropolis steps or not."""

    def pair(key, share):
        layers = [DeterministicBlock(Coupling(eqx.nn.MLP(1, 2, 8, 1, activation=jnp.tanh, key=k), (i,))) for i, k in enumerate(jax.random.split(key))]
        return BlockSequence((*layers, MetropolisBlock(np.log(0.5).item(), share, 10)) if sampling else tuple(layers))

    return StochasticNormalizingFlow(ScannedBlocks(eqx.filter_vmap(pair)(jax.random.split(jax.random.key(0)), jnp.array([0.5, 1.0]))), BASE)


def trained_on_well(sampling):
    """(KL of the histogram of the first coordinate, |bias| of its mean), of 4000 draws that are not reweighted."""

    @jax.jit
    def run(key):
        loss, data = PathLikelihoodLoss(WELL.log_prob), lambda key, step: WELL.sample(key, 128)
        fitted = fit(loss, well_flow(sampling), optax.adam(2e-2), data, key, num_steps=150)
        return jax.vmap(lambda key: fitted.model.sample(key, WELL.log_prob).position[0])(jax.random.split(jax.random.key(5), 4000))

    with jax.numpy_dtype_promotion("standard"):
        draws = run(jax.random.key(2))
    edges, nodes = np.linspace(-3, 3, 31), np.linspace(-3, 3, 3001)
    exact = np.histogram(nodes, edges, weights=np.exp(-(nodes**4) + 6 * nodes**2 + nodes / 2))[0]
    found = np.histogram(draws, edges)[0] + 0.5
    exact, found = exact / exact.sum(), found / found.sum()
    return np.sum(exact * np.log(np.maximum(exact, 1e-300) / found)), abs(float(jnp.mean(draws)) - float(WELL.mean()[0]))


def test_sampling_blocks_bridge_the_wells():
    """Card: KL and bias below those of as many deterministic blocks."""
    (kl, bias), (kl_deterministic, bias_deterministic) = trained_on_well(True), trained_on_well(False)
    assert kl < kl_deterministic / 5
    assert bias < bias_deterministic


def test_losses():
    flow, key, data = StochasticNormalizingFlow(BLOCKS["overdamped"], BASE), jax.random.key(7), TARGET.sample(jax.random.key(8), 5)

    @eqx.filter_jit
    def values(flow):
        keys = jax.random.split(key, 5)
        samples = jax.vmap(lambda key: flow.sample(key, TARGET.log_prob))(keys)
        backwards = jax.vmap(lambda key, x: flow.path_log_prob(key, x, TARGET.log_prob))(keys, data)
        (kl, _), gradient = eqx.filter_value_and_grad(PathKLLoss(TARGET.log_prob, 5), has_aux=True)(flow, None, key)
        return samples.log_weight, kl, gradient, backwards, PathLikelihoodLoss(TARGET.log_prob)(flow, data, key)[0]

    log_weights, kl, gradient, backwards, likelihood = values(flow)
    np.testing.assert_allclose(kl, -jnp.mean(log_weights), rtol=1e-12)
    np.testing.assert_allclose(likelihood, -jnp.mean(backwards), rtol=1e-12)
    assert (gradient.block.log_step_size != jnp.zeros(2)).all()


def test_as_a_kernel_it_keeps_the_target():
    flow = StochasticNormalizingFlow(BlockSequence((BLOCKS["coupling"], BLOCKS["overdamped"])), BASE)
    kernel = PathMetropolis(flow, TARGET.log_prob)

    def chain(key):
        first, second = jax.random.split(key)
        return iterate(second, kernel.step, kernel.init(jnp.array([2.0, -1.0]), first), 40)

    position = jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(9), 4000)).position
    assert_mean(position, TARGET.mean())
    assert_covariance(position, TARGET.covariance())


def test_mistakes():
    with pytest.raises(ValueError, match="`num_steps` must be an integer of at least 1, got 0"):
        LangevinBlock(0.0, 1.0, 0)
    with pytest.raises(ValueError, match="`num_leapfrog` must be an integer of at least 1, got -1"):
        HMCBlock(0.0, 1.0, -1)
    with pytest.raises(ValueError, match="the number of blocks` must"):
        BlockSequence(())
    with pytest.raises(ValueError, match="`num_paths` must be an integer"):
        PathKLLoss(TARGET.log_prob, 0)


@pytest.mark.parametrize("loss", [PathKLLoss(WELL.log_prob, 2), PathLikelihoodLoss(WELL.log_prob)])
def test_losses_leave_the_base_alone(loss):
    base = GaussianMixture.isotropic(jnp.array([0.4, 0.6]), jnp.array([[1.0, 0.0], [-1.0, 0.5]]), 1.0)
    flow = StochasticNormalizingFlow(LangevinBlock(jnp.asarray(-1.0), jnp.asarray(0.5)), base)
    gradient = eqx.filter_jit(eqx.filter_grad(lambda flow: loss(flow, jnp.ones((2, 2)), jax.random.key(0))[0]))(flow)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient.base))
    assert gradient.block.log_step_size != 0
