"""Bijections: log-Jacobians against autodiff, a coupling layer by hand, and the density of a flow."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.data import GaussianMixture
from ergodax.testing import assert_covariance, assert_mean
from ergodax.transport.bijection import Affine, AffineTransformer, Bijection, Chain, Coupling, Flow, Inverted, StandardNormal, StandardUniform


X = jnp.array([0.3, -1.2, 0.7])


def couplings():
    keys = jax.random.split(jax.random.key(0), 2)
    first = Coupling(eqx.nn.MLP(2, 2, 4, 1, jnp.tanh, key=keys[0]), (2, 0))
    return Chain((first, Affine(jnp.array([0.1, -0.2, 0.3]), jnp.array(0.5)), Coupling(eqx.nn.MLP(1, 4, 4, 1, jnp.tanh, key=keys[1]), [1])))


def test_coupling_by_hand():
    """RealNVP with the weights in sight; kept coordinates are handed on in the order given."""
    layer = Coupling(lambda kept: jnp.concatenate([kept[:1], 2 * kept[1:]]), (2, 0), AffineTransformer(1.5))
    y, log_det = layer.forward(X)
    log_scale = 1.5 * np.tanh(0.7 / 1.5)
    np.testing.assert_allclose(y, [0.3, np.exp(log_scale) * -1.2 + 0.6, 0.7], rtol=1e-14)
    np.testing.assert_allclose(log_det, log_scale, rtol=1e-14)
    # the raw numbers of one coordinate stand side by side
    two = Coupling(lambda kept: jnp.array([0.0, 1.0, 0.0, 2.0]), (0,))
    np.testing.assert_allclose(two.forward(X)[0], [0.3, -0.2, 2.7], rtol=1e-14)


@pytest.mark.parametrize("bijection", [couplings(), Inverted(couplings())], ids=("chain", "inverted"))
def test_log_determinant_and_inverse(bijection: Bijection):
    (y, log_det), jacobian = jax.jit(lambda x: (bijection.forward(x), jax.jacfwd(lambda x: bijection.forward(x)[0])(x)))(X)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobian)[1], rtol=1e-12)
    x, inverse_log_det = jax.jit(lambda y: bijection.inverse(y))(y)
    np.testing.assert_allclose(x, X, rtol=1e-13)
    np.testing.assert_allclose(inverse_log_det, -log_det, rtol=1e-13)
    assert abs(log_det) > 0.1


def test_flow_of_a_normal_is_a_normal():
    scale, shift = jnp.array([0.5, 2.0]), jnp.array([1.0, -1.0])
    flow = Flow(Affine(jnp.log(scale), shift), StandardNormal((2,)))
    truth = GaussianMixture(jnp.ones(1), shift[None], scale[None] ** 2)
    keys = jax.random.split(jax.random.key(0), 4000)
    x, log_prob = jax.vmap(flow.sample_and_log_prob)(keys)
    np.testing.assert_array_equal(x[0], flow.sample(keys[0]))
    np.testing.assert_allclose(log_prob, truth.log_prob(x), rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(flow.log_prob)(x), truth.log_prob(x), rtol=1e-12)
    assert_mean(x, shift)
    assert_covariance(x, jnp.diag(scale**2))
    mixture = Flow(Affine(jnp.log(scale), shift), truth)
    np.testing.assert_allclose(mixture.log_prob(shift), truth.log_prob(jnp.zeros(2)) - jnp.log(scale).sum(), rtol=1e-12)


def test_uniform_and_dtypes():
    draws = jax.vmap(StandardUniform((2,), jnp.float32).sample)(jax.random.split(jax.random.key(0), 4000))
    assert draws.dtype == jnp.float32
    assert draws.min() >= 0
    assert draws.max() < 1
    assert_mean(draws, 0.5)
    flow = Flow(Affine(jnp.array(0.3), jnp.array(0.1)), StandardNormal((2,), jnp.float32))
    assert {leaf.dtype for leaf in jax.eval_shape(flow.sample_and_log_prob, jax.random.key(0))} == {jnp.dtype(jnp.float32)}
    assert StandardUniform((2,)).log_prob(draws[0]).dtype == jnp.float32


@pytest.mark.parametrize("kept", [(), (0, 1, 2), (0, 0), (3,), (-1,)])
def test_kept_must_fit(kept):
    with pytest.raises(ValueError, match="kept"):
        Coupling(lambda kept: kept, kept).forward(X)


def test_refusals():
    with pytest.raises(ValueError, match="layers"):
        Chain(())
    with pytest.raises(ValueError, match="bound"):
        AffineTransformer(0.0)
