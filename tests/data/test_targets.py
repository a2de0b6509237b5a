"""Funnel and many-well: densities against scipy, normalisers against quadrature, draws against both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from ergodax.data import Funnel, ManyWell
from ergodax.data.targets import _well_quantile


N = 20_000


def moments_agree(draws, mean, covariance):
    offset = draws - np.asarray(mean)
    products = offset[:, :, None] * offset[:, None, :]
    return np.all(np.abs(offset.mean(0)) < 4.5 * draws.std(0) / N**0.5) and np.all(
        np.abs(products.mean(0) - np.asarray(covariance)) < 4.5 * products.std(0) / N**0.5
    )


def test_funnel_density():
    x = np.random.default_rng(0).normal(size=(20, 10)) * 3
    expected = stats.norm.logpdf(x[:, 0], scale=3) + stats.norm.logpdf(x[:, 1:], scale=np.exp(x[:, :1] / 2)).sum(1)
    np.testing.assert_allclose(jax.jit(jax.vmap(Funnel().log_prob))(jnp.asarray(x)), expected, rtol=1e-12)
    total, _ = integrate.dblquad(
        lambda u, v: np.exp(_funnel_plane(v, u * np.exp(v / 2)) + v / 2), -15, 15, -8, 8, epsabs=1e-6
    )  # u = x e^{-v/2} takes the neck out of the integral
    np.testing.assert_allclose(np.log(total), Funnel(2).log_normaliser, atol=1e-6)


def _funnel_plane(v, x):
    return -0.5 * (v / 2) ** 2 - 0.5 * x**2 * np.exp(-v) - v / 2 - np.log(4 * np.pi)


def test_funnel_plane_is_the_funnel():
    v, x = np.random.default_rng(0).normal(size=(2, 10))
    np.testing.assert_allclose(Funnel(2, 2.0).log_prob(jnp.stack([v, x], axis=1)), _funnel_plane(v, x), rtol=1e-12)


def test_funnel_draws():
    draws = np.asarray(Funnel(4, 1.0).sample(jax.random.key(0), N))  # at std 3, E[x⁴] = 3 e^18 drowns any sample
    assert moments_agree(draws, Funnel(4, 1.0).mean(), Funnel(4, 1.0).covariance())
    np.testing.assert_allclose(np.diag(Funnel(3).covariance()), [9, np.exp(4.5), np.exp(4.5)], rtol=1e-12)
    v, rest = np.split(np.asarray(Funnel(4).sample(jax.random.key(1), N)), [1], axis=1)
    assert stats.kstest(v[:, 0], stats.norm(0, 3).cdf).pvalue > 1e-3
    assert stats.kstest((rest * np.exp(-v / 2)).ravel(), stats.norm.cdf).pvalue > 1e-3


def test_many_well_normaliser():
    assert abs(ManyWell().log_normaliser - 164.69567531) < 5e-9
    well, _ = integrate.quad(lambda a: np.exp(-(a**4) + 6 * a**2 + a / 2), -5, 5, points=[-1.7, 0, 1.7], epsabs=0, epsrel=1e-13)
    np.testing.assert_allclose(well, 11784.509265, rtol=1e-10)
    np.testing.assert_allclose(ManyWell(6).log_normaliser, 3 * np.log(well * np.sqrt(2 * np.pi)), rtol=1e-13)
    # The density itself, on a plane of pairs (the trapezoidal rule is exact to rounding).
    axis = np.linspace(-8, 8, 801)
    plane = jax.jit(ManyWell(2).log_prob)(jnp.stack(jnp.meshgrid(axis, axis), axis=-1))
    np.testing.assert_allclose(np.log(np.exp(plane).sum() * 0.02**2), ManyWell(2).log_normaliser, rtol=1e-12)


def test_many_well_density():
    x = np.random.default_rng(0).normal(size=(5, 6))
    a, b = x[:, ::2], x[:, 1::2]
    energy = (a**4 - 6 * a**2 - 0.5 * a + 0.5 * b**2).sum(1)
    np.testing.assert_allclose(ManyWell(6).log_prob(jnp.asarray(x)), -energy, rtol=1e-12)


NODES = np.linspace(-4, 4, 80_001)
CDF = integrate.cumulative_simpson(np.exp(-(NODES**4) + 6 * NODES**2 + NODES / 2), x=NODES, initial=0)


def well_cdf(a):
    return np.interp(a, NODES, CDF / CDF[-1])


def test_many_well_quantiles_are_as_exact_as_stated():
    uniform = np.random.default_rng(0).uniform(size=20_000)
    quantile = jax.jit(_well_quantile)
    assert np.abs(well_cdf(quantile(jnp.asarray(uniform))) - uniform).max() < 4e-6
    single = quantile(jnp.asarray([0.0, *uniform], jnp.float32))
    assert single.dtype == jnp.float32
    assert jnp.isfinite(single).all()
    assert np.abs(well_cdf(single[1:]) - uniform).max() < 5e-6  # and the rounding of u, of a and of the table


def test_many_well_draws():
    many_well = ManyWell(8)
    draws = np.asarray(jax.jit(lambda key: many_well.sample(key, N))(jax.random.key(0)))
    assert draws.shape == (N, 8)
    assert moments_agree(draws, many_well.mean(), many_well.covariance())
    assert stats.kstest(draws[:, ::2].ravel(), well_cdf).pvalue > 1e-3
    assert stats.kstest(draws[:, 1::2].ravel(), stats.norm.cdf).pvalue > 1e-3
    right = draws[:, ::2] > 0
    share = 1 - well_cdf(0.0)
    assert abs(share - 0.844) < 5e-4
    assert abs(right.mean() - share) < 4 * np.sqrt(share * (1 - share) / right.size)
    assert np.all(np.abs(np.corrcoef(right.T)[np.triu_indices(4, 1)]) < 4 / N**0.5)  # the wells are independent


@pytest.mark.parametrize("target", [Funnel(4), ManyWell(4)], ids=["funnel", "many_well"])
def test_sockets(target):
    x = jnp.full((3, 4), 0.3, jnp.float32)
    assert jax.eval_shape(target.sample, jax.random.key(0)).shape == (4,)
    value, gradient = jax.jit(jax.value_and_grad(target.log_prob))(x[0])
    assert value.dtype == jnp.float32
    assert jnp.isfinite(gradient).all()
    np.testing.assert_allclose(target.log_prob(x)[0], value, rtol=1e-6)
    with pytest.raises(ValueError, match=r"`x` must have shape \(..., 4\), got \(5,\)"):
        target.log_prob(jnp.ones(5))


def test_arguments_are_checked():
    for make, message in (
        (lambda: Funnel(1), "`dim` must be an integer of at least 2, got 1"),
        (lambda: Funnel(3, 0.0), r"`std` must lie in \(0, inf\)"),
        (lambda: ManyWell(5), "`dim` must be even, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    stds = jnp.array([1.0, 3.0])
    swept = jax.vmap(lambda std: Funnel(3, std).log_prob(jnp.ones(3)))(stds)
    np.testing.assert_allclose(swept[1], Funnel(3).log_prob(jnp.ones(3)), rtol=1e-12)
