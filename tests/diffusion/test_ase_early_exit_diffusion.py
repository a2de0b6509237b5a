"""Early exit: the exits of the released example, the full schedule, exact zero gradients, and blocks that are really skipped."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import Denoiser, DenoiserTerm, VPPath, VPrediction, integrate, uniform_times
from ergodax.diffusion import DDIM, DenoisingLoss
from ergodax.diffusion.ase_early_exit_diffusion import EarlyExit
from ergodax.nn import DiT, TimeMLP


DEMO = (28, 28, 24, 24, 20, 20, 16, 16, 12, 12)


def awake(network):
    """`network` with random parameters: fresh blocks are the identity."""
    leaves, structure = jax.tree.flatten(network)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(structure, [jnp.asarray(0.2 * rng.normal(size=leaf.shape)) for leaf in leaves])


MLP = awake(TimeMLP((2,), 6, 8, key=jax.random.key(0)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_exits_of_the_released_example(dtype):
    """Integer times of 1000, counted from the clean end: edges belong to the noisier bin."""
    model = EarlyExit(TimeMLP((2,), 2, 28, key=jax.random.key(0)), DEMO)
    integers = np.arange(1000)
    exits = np.asarray(model.num_blocks_at(jnp.asarray(1 - integers / 1000, dtype)))
    np.testing.assert_array_equal(exits, np.asarray(DEMO)[integers // 100])
    np.testing.assert_array_equal(exits[[99, 100, 200, 899, 999]], [28, 28, 24, 12, 12])
    assert int(model.num_blocks_at(0.0)) == 12
    assert int(model.num_blocks_at(1)) == 28
    assert abs(model.share - 20 / 28) < 1e-12


@pytest.mark.parametrize("network", [MLP, awake(DiT((2, 2, 1), 2, 4, 8, 2, key=jax.random.key(0)))], ids=["MLP", "DiT"])
def test_depth_is_that_of_the_bin(network):
    """n = L everywhere is the network, to rounding; elsewhere it is the network of the first n blocks, at one time and at many."""
    shape = network.shape
    x = jax.random.normal(jax.random.key(1), (3, *shape))
    t = jnp.array([0.9, 0.4, 0.1])

    @jax.jit
    def run(t, x):
        full = jax.vmap(EarlyExit(network, (8,) * 4))(t, x)
        many = jax.vmap(EarlyExit(network, (8, 5, 3)))(t, x)
        one = [jax.vmap(EarlyExit(network, (8, 5, 3)), in_axes=(None, 0))(t[i], x)[i] for i in range(3)]
        cut = [eqx.tree_at(lambda m: m.blocks, network, jax.tree.map(lambda leaf, n=n: leaf[:n], network.blocks)) for n in (8, 5, 3)]
        return full, jax.vmap(network)(t, x), many, jnp.stack(one), jnp.stack([cut[i](t[i], x[i]) for i in range(3)])

    full, plain, many, one, cut = run(t, x)
    np.testing.assert_allclose(full, plain, rtol=1e-14)
    np.testing.assert_allclose(many, cut, rtol=1e-12)
    np.testing.assert_allclose(one, cut, rtol=1e-12)
    assert float(jnp.abs(many - full)[1:].max()) > 1e-4


def test_gradients_beyond_the_exit_are_zero():
    """The training loss on times of one bin: no gradient at all beyond its exit, some in every block before it and in the rest."""
    data = jax.random.normal(jax.random.key(0), (16, 2))

    @jax.jit
    def gradient(low):
        loss = DenoisingLoss(VPPath(), VPrediction(), times=lambda key, n: low + 0.4 * uniform_times(key, n))
        return jax.grad(lambda model: loss(model, data, jax.random.key(1))[0])(EarlyExit(MLP, (8, 3))).network

    for low, exit_ in ((0.05, 3), (0.55, 8)):
        network = gradient(low)
        norms = np.sum([np.abs(leaf).reshape(8, -1).sum(1) for leaf in jax.tree.leaves(network.blocks)], axis=0)
        np.testing.assert_array_equal(norms[exit_:], 0.0)
        assert np.all(norms[:exit_] > 0)
        assert all(float(jnp.abs(leaf).max()) > 0 for leaf in (network.inner.weight, network.outer.weight, network.modulation.weight))


def test_blocks_are_skipped_in_sampling():
    """One time for a batch leaves a branch in the program, many times do not; a sampler runs each step at its own depth."""
    x, model, path = jax.random.normal(jax.random.key(0), (5, 2)), EarlyExit(MLP, (8, 6, 2)), VPPath()
    one = str(jax.make_jaxpr(lambda t, x: jax.vmap(model, in_axes=(None, 0))(t, x))(0.3, x))
    many = str(jax.make_jaxpr(lambda t, x: jax.vmap(model)(t, x))(jnp.full(5, 0.3), x))
    assert "cond[" in one
    assert "cond[" not in many
    grid = jnp.array([0.05, 0.5, 0.9, 1.0])  # one step in each bin

    def sampler(network):
        return Denoiser(lambda t, x, args: jax.vmap(network, in_axes=(None, 0))(t, x), path, VPrediction())

    @jax.jit
    def ends(x):
        exits = integrate(DenoiserTerm(sampler(model), path, grid), DDIM(), x)
        for i, n in enumerate((2, 6, 8)):
            cut = eqx.tree_at(lambda m: m.blocks, MLP, jax.tree.map(lambda leaf, n=n: leaf[:n], MLP.blocks))
            x = integrate(DenoiserTerm(sampler(cut), path, grid[i : i + 2]), DDIM(), x)
        return exits, x

    np.testing.assert_allclose(*ends(x), rtol=1e-9)


def test_refusals():
    for exits, message in (((), "number of `exits`"), ((9, 3), "at most the number of blocks, 8"), ((8, -1), "each of `exits`")):
        with pytest.raises(ValueError, match=message):
            EarlyExit(MLP, exits)
