"""Feature inheritance: the plain sampler when every step is a key step, the size of its error, what is computed, both drivers; mixed kernels."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core import Denoiser, DenoiserTerm, FlowMatchingPath, VelocityPrediction, integrate, with_noise
from ergodax.diffusion import DDIM, Ancestral, DPMSolverPP2M, Heun, uniform_grid
from ergodax.diffusion.a_sdm_feature_inheritance import BlockStack, ConditionalConv, FeatureInheritance, SwitchedNetwork, key_steps
from ergodax.testing import check_drivers, convergence_order


class Block(eqx.Module):
    weight: jax.Array

    def __call__(self, h, c):
        return h + jnp.tanh(h @ self.weight + c)


def embed(t, x, args):
    return jnp.sin(x) + t, jnp.asarray(t)


PATH = FlowMatchingPath()
Y0 = jax.random.normal(jax.random.key(0), (16, 3))
NETWORK = BlockStack(
    embed, Block(0.7 * jax.random.normal(jax.random.key(1), (3, 3, 3))), lambda t, x, h, c: h - 0.3 * x, np.array([True, False, True])
)


@eqx.filter_jit
def solve(n, mask=None, solver=None, key=None, network=NETWORK, y0=Y0):
    """A flow with the network as its velocity: DDIM is Euler's method here."""
    solver = solver or DDIM()
    term = DenoiserTerm(Denoiser(network, PATH, VelocityPrediction()), PATH, uniform_grid(n, 0.05, 0.95))
    return integrate(term, solver if mask is None else FeatureInheritance(solver, network, mask), y0, key=key)


@pytest.mark.parametrize("solver", [DDIM(), DPMSolverPP2M(), Ancestral()], ids=repr)
def test_all_steps_key(solver):
    key = jax.random.key(2)
    plain, all_key, none = (solve(8, mask, solver, key) for mask in (None, np.ones(8, bool), np.zeros(8, bool)))
    np.testing.assert_allclose(all_key, plain, rtol=1e-12)
    assert float(jnp.abs(none - plain).max()) > 1e-2


def test_error_against_the_plain_sampler():
    """Slope 1 in the step at a fixed interval; proportional to m - 1, not to m, at a fixed step."""

    @functools.cache
    def error(n, m):
        return float(jnp.sqrt(jnp.mean((solve(n, jnp.asarray(key_steps(n, m))) - solve(n)) ** 2)))

    for m in (2, 3):
        assert abs(convergence_order((48, 96, 192), [error(n, m) for n in (48, 96, 192)]) - 1) < 0.1
    intervals = np.array([2, 3, 4])
    errors = [error(192, int(m)) for m in intervals]
    assert abs(np.polyfit(np.log(intervals - 1), np.log(errors), 1)[0] - 1) < 0.1
    assert np.polyfit(np.log(intervals), np.log(errors), 1)[0] > 1.3


def test_it_beats_fewer_steps():
    """Every second step inheriting, against half as many steps: both compute the branches 10 times."""
    fine = solve(2048)
    inheriting, halved = solve(20, jnp.asarray(key_steps(20, 2))), solve(10)
    errors = [float(jnp.sqrt(jnp.mean((x - fine) ** 2))) for x in (inheriting, halved)]
    assert errors[0] < 0.75 * errors[1], errors


def test_what_is_computed():
    """⌈N/m⌉ evaluations of an inherited branch, and N + ⌈N/m⌉ of another, one more for each visit to the features."""
    counts = {}

    class Counting(eqx.Module):
        index: jax.Array

        def __call__(self, h, c):
            jax.debug.callback(lambda i: counts.__setitem__(int(i), counts.get(int(i), 0) + 1), self.index)
            return h * 0.9

    network = BlockStack(embed, Counting(jnp.arange(2)), lambda t, x, h, c: h, np.array([True, False]))
    jax.block_until_ready(solve(7, jnp.asarray(key_steps(7, 3)), network=network))
    jax.effects_barrier()
    assert counts == {0: 3, 1: 7 + 3}


def test_masks():
    np.testing.assert_array_equal(np.flatnonzero(key_steps(10, 3)), [0, 3, 6, 9])
    np.testing.assert_array_equal(np.flatnonzero(key_steps(10, 4, dense_start=3, dense_end=2)), [0, 1, 2, 4, 8, 9])
    np.testing.assert_array_equal(np.flatnonzero(key_steps(10, 100)), [0])


@pytest.mark.parametrize("solver", [Heun(), Ancestral()], ids=repr)
def test_both_drivers_agree(solver):
    n = 6
    inheriting = FeatureInheritance(solver, NETWORK, key_steps(n, 2))
    model = DenoiserTerm(Denoiser(NETWORK, PATH, VelocityPrediction()), PATH, uniform_grid(n, 0.05, 0.95))
    terms = with_noise(model, jax.random.key(2), Y0) if isinstance(solver, Ancestral) else model
    check_drivers(terms, inheriting, Y0)


@pytest.mark.parametrize("routing", [jax.nn.softmax, jax.nn.sigmoid])
def test_mixing_kernels_is_mixing_outputs(routing):
    conv = ConditionalConv(2, 3, 4, routing=routing, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    arrays = (jnp.asarray(rng.normal(size=shape)) for shape in (conv.biases.shape, conv.route.shape, conv.route_bias.shape))
    conv = eqx.tree_at(lambda c: (c.biases, c.route, c.route_bias), conv, tuple(arrays))
    x = jax.random.normal(jax.random.key(1), (6, 5, 2))

    @jax.jit
    def outputs(conv, x):
        def plain(kernel, bias):
            return jax.lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))[0] + bias

        equal = eqx.tree_at(lambda c: (c.kernels, c.biases), conv, (conv.kernels[:1].repeat(4, 0), conv.biases[:1].repeat(4, 0)))
        share = routing(x.mean((0, 1)) @ conv.route + conv.route_bias)
        return conv(x), jnp.tensordot(share, jax.vmap(plain)(conv.kernels, conv.biases), 1), equal(x), plain(conv.kernels[0], conv.biases[0])

    mixed, expected, equal, plain = outputs(conv, x)
    np.testing.assert_allclose(mixed, expected, rtol=0, atol=1e-12)
    if routing is jax.nn.softmax:
        np.testing.assert_allclose(equal, plain, rtol=0, atol=1e-12)


def test_switched_network():
    network = SwitchedNetwork(lambda t, x, args: 2 * x, lambda t, x, args: 3 * x, 0.4)
    np.testing.assert_array_equal([network(t, jnp.ones(2))[0] for t in (0.0, 0.39, 0.4, 1.0)], [2, 2, 3, 3])


def test_refusals():
    with pytest.raises(ValueError, match="one entry for each of 5 steps, got 4"):
        solve(5, np.ones(4, bool))
    with pytest.raises(ValueError, match="`interval`"):
        key_steps(5, 0)
    with pytest.raises(ValueError, match="`num_experts`"):
        ConditionalConv(2, 2, 0, key=jax.random.key(0))
