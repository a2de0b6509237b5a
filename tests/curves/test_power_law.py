"""Power laws and loss surfaces: formulas, compute-optimal sizes against a numeric minimum, recovery from data, noise, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from ergodax.laws import AdditiveSurface, CompoundSurface, OffsetPowerLaw, PowerLaw, batch_size_of_loss, fit_law, squared_log


ADDITIVE = (1.69, 406.4, 0.34, 410.7, 0.28)  # of the order of Hoffmann et al.
COMPOUND = (1.5, 2e8, 0.35, 6e9, 0.42)
SURFACES = {"additive": AdditiveSurface.of(*ADDITIVE), "compound": CompoundSurface.of(*COMPOUND)}


def numpy_loss(surface, n, d):
    if isinstance(surface, AdditiveSurface):
        e, a, alpha, b, beta = ADDITIVE
        return e + a / n**alpha + b / d**beta
    e, a, alpha, b, beta = COMPOUND
    return e + ((a / n) ** (alpha / beta) + b / d) ** beta


def test_formulas():
    x = np.array([1.0, 3.0, 50.0])
    np.testing.assert_allclose(PowerLaw.of(2.5, -0.4)(x), 2.5 * x**-0.4, rtol=1e-14)
    law = OffsetPowerLaw.of(3.1, 0.4, 0.7)
    np.testing.assert_allclose(law(x), 3.1 + 0.4 / x**0.7, rtol=1e-14)
    np.testing.assert_allclose([law.floor, law.coefficient, law.exponent, law(jnp.inf)], [3.1, 0.4, 0.7, 3.1], rtol=1e-14)
    np.testing.assert_allclose(law.inverse(law(x)), x, rtol=1e-12)
    assert np.isinf(law.inverse(jnp.array([3.1, 3.0]))).all()
    np.testing.assert_array_equal(law(np.array([1, 3, 50])), law(x))  # whole numbers too
    np.testing.assert_allclose(batch_size_of_loss(jnp.array([2.0, 3.0])), 1.21e9 / np.array([2.0, 3.0]) ** 6.24, rtol=1e-14)
    for surface in SURFACES.values():
        n, d = np.array([1e8, 1e9, 3e10]), np.array([2e9, 5e10, 1e12])
        np.testing.assert_allclose(surface((n, d)), numpy_loss(surface, n, d), rtol=1e-13)
        assert surface((n[:, None], d)).shape == (3, 3)
    compound = SURFACES["compound"]
    np.testing.assert_allclose(compound((1e9, jnp.inf)), 1.5 + 0.2**0.35, rtol=1e-13)
    np.testing.assert_allclose(compound((jnp.inf, 6e10)), 1.5 + 0.1**0.42, rtol=1e-13)


@pytest.mark.parametrize("name", SURFACES)
def test_optimal_sizes_are_the_numeric_argmin_and_lie_on_the_frontier(name):
    surface, compute = SURFACES[name], np.array([1e18, 3e21, 1e25])
    for cost in (6.0, 2.5):
        n, d = surface.optimal_sizes(compute, cost=cost)
        np.testing.assert_allclose(cost * n * d, compute, rtol=1e-12)
        for c, best in zip(compute, n):
            found = minimize_scalar(
                lambda log_n, c=c, cost=cost: numpy_loss(surface, np.exp(log_n), c / (cost * np.exp(log_n))) - numpy_loss(surface, np.inf, np.inf),
                bracket=(10.0, 40.0),
                tol=1e-12,
            )
            np.testing.assert_allclose(np.log(best), found.x, rtol=0, atol=1e-6)
        np.testing.assert_allclose(surface.frontier(cost=cost)(compute), numpy_loss(surface, np.asarray(n), np.asarray(d)), rtol=1e-13)


def test_minicpm_allocation():
    """The formula of the paper, written out: N = K (C/6)^{b/(a+b)}, K = (a C_N / (b C_D))^{1/(a+b)}."""
    _, size, a, data, b = ADDITIVE
    compute = 1e22
    expected = (a * size / (b * data)) ** (1 / (a + b)) * (compute / 6) ** (b / (a + b))
    np.testing.assert_allclose(SURFACES["additive"].optimal_sizes(compute)[0], expected, rtol=1e-12)


def test_starts_are_finite_and_exact_where_the_rest_is_linear():
    x = jnp.geomspace(10.0, 1e6, 7)
    line = PowerLaw.starts(x, PowerLaw.of(0.03, 0.46)(x))
    np.testing.assert_allclose([line.coefficient[0], line.exponent[0]], [0.03, 0.46], rtol=1e-11)
    n, d = (axis.ravel() for axis in jnp.meshgrid(jnp.geomspace(1e7, 1e10, 4), jnp.geomspace(1e9, 1e12, 4)))
    law = AdditiveSurface.of(1.7, 400.0, 0.4, 900.0, 0.2)
    starts = AdditiveSurface.starts((n, d), law((n, d)))
    errors = jnp.max(jnp.abs(jax.vmap(lambda start: start((n, d)))(starts) - law((n, d))), 1)
    assert errors.min() < 1e-9
    for each in (starts, OffsetPowerLaw.starts(x, 2 + 1 / x), CompoundSurface.starts((n, d), law((n, d)))):
        assert all(np.isfinite(leaf).all() and leaf.ndim == 1 for leaf in jax.tree.leaves(each))


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0))
def fit_surfaces(sizes, losses):
    fit = fit_law(AdditiveSurface.starts(sizes, losses), sizes, losses, objective=squared_log())
    return fit, fit.standard_error(lambda law: jnp.log(law.optimal_sizes(1e24)[0]))


def test_surface_from_runs():
    """Exact losses give the surface back; errors of 0.1 % give the optimal size within the error that the fit reports."""
    sizes = tuple(axis.ravel() for axis in jnp.meshgrid(jnp.geomspace(3e7, 3e9, 5), jnp.geomspace(1e9, 1e11, 5)))
    truth = SURFACES["additive"]
    noise = 1e-3 * jax.random.normal(jax.random.key(0), (20, 25)).at[0].set(0)
    fits, errors = fit_surfaces(sizes, truth(sizes) * jnp.exp(noise))
    jax.tree.map(lambda found, true: np.testing.assert_allclose(found[0], true, rtol=1e-6), fits.law, truth)
    sizes_found = np.log([law.optimal_sizes(1e24)[0] for law in (jax.tree.map(lambda leaf, i=i: leaf[i], fits.law) for i in range(1, 20))])
    z = (sizes_found - np.log(truth.optimal_sizes(1e24)[0])) / errors[1:]
    assert 0.3 < np.mean(np.asarray(z) ** 2) < 3  # 1, of 19 draws with sandwich errors
    with pytest.raises(ValueError, match="4 points cannot determine 5 parameters"):
        fit_surfaces(tuple(size[:4] for size in sizes), jnp.full((1, 4), 3.0))
    with pytest.raises(ValueError, match="must be positive"):
        fit_law(AdditiveSurface.starts(sizes, truth(sizes)), sizes, truth(sizes) - 3, objective=squared_log())


def test_dtype_is_the_parameters():
    law = OffsetPowerLaw.of(*(jnp.asarray(p, jnp.float32) for p in (3.1, 0.4, 0.7)))
    assert law(np.arange(1, 4)).dtype == law.inverse(law(2.0)).dtype == jnp.float32
    surface = AdditiveSurface.of(*(jnp.asarray(p, jnp.float32) for p in ADDITIVE))
    outputs = (surface((1e9, 2e10)), surface.optimal_sizes(1e21), surface.frontier())
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(surface.frontier()(1e21), SURFACES["additive"].frontier()(1e21), rtol=1e-5)
    assert batch_size_of_loss(jnp.float32(2)).dtype == jnp.float32


def test_refusals():
    with pytest.raises(ValueError, match=r"`coefficient` must lie in \(0, inf\), got 0.0"):
        PowerLaw.of(0.0, 1.0)
    with pytest.raises(ValueError, match=r"`floor` .* got -1.0"):
        OffsetPowerLaw.of(-1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="`data_exponent`"):
        AdditiveSurface.of(1.0, 1.0, 1.0, 1.0, 0.0)
