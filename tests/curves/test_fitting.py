"""Fits of laws: minima that scipy cannot improve, errors that have their nominal size, derivatives, refusals."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.sharding import Mesh, PartitionSpec

from ergodax.laws import bands, bootstrap, fit_law, huber, huber_log, squared, squared_log, stack_laws


class Decay(eqx.Module):
    """y = exp(a) + exp(b - c log x)."""

    a: jax.Array
    b: jax.Array
    c: jax.Array

    def __call__(self, x):
        return jnp.exp(self.a) + jnp.exp(self.b - self.c * jnp.log(x))


class Line(eqx.Module):
    slope: jax.Array
    offset: jax.Array

    def __call__(self, x):
        return self.offset + self.slope * x


X = jnp.geomspace(1e2, 1e6, 40)
TRUE = Decay(jnp.log(2.0), jnp.log(30.0), jnp.asarray(0.5))
NOISE = jnp.asarray(0.01 * np.random.default_rng(0).standard_t(3, 40))
OBSERVED = TRUE(X) * jnp.exp(NOISE)
STARTS = Decay(jnp.array([0.0, 1.0, -2.0]), jnp.array([0.0, 5.0, 2.0]), jnp.array([0.2, 1.0, 0.1]))


def fit(observed, delta=1e-3, weights=None, starts=STARTS):
    return fit_law(starts, X, observed, objective=huber_log(delta), weights=weights)


FITTED = jax.jit(fit)


def parameters(law):
    return np.array(jax.tree.leaves(law))


def huber_loss(r, delta):
    return np.where(np.abs(r) <= delta, r**2 / 2, delta * np.abs(r) - delta**2 / 2)


def test_recovery():
    found = FITTED(TRUE(X))
    np.testing.assert_allclose(parameters(found.law), parameters(TRUE), rtol=0, atol=1e-9)
    assert np.all(found.converged)


@pytest.mark.parametrize("delta", [1e-3, 0.02])
def test_minimum(delta):
    found = FITTED(OBSERVED, delta)

    def value(v):
        return huber_loss(np.log(np.exp(v[0]) + np.exp(v[1]) * np.asarray(X) ** -v[2]) - np.log(np.asarray(OBSERVED)), delta).sum()

    v = parameters(found.law)
    np.testing.assert_allclose(np.min(found.objective), value(v), rtol=1e-12)
    np.testing.assert_allclose(found.objective, value(v), rtol=1e-10)  # every start
    assert np.all(found.converged)
    assert np.all(found.gradient < 1e-6)
    best = scipy.optimize.minimize(value, v, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-16, "maxiter": 2000})
    assert best.fun > value(v) * (1 - 1e-10)


def test_units():
    """Parameters of very different scale do not matter."""
    x = X / 1e4
    y = 3 + 1e-7 * x
    found = fit_law(Line(jnp.ones(1), jnp.zeros(1)), 1e12 * x, y, objective=squared())
    np.testing.assert_allclose(found.law.slope, 1e-19, rtol=1e-6)
    assert np.all(found.converged)


def test_unfinished():
    """A start that cannot be evaluated or does not get there in time is marked, and does not win."""
    starts = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), STARTS)
    found = fit(OBSERVED, starts=starts)
    assert np.isinf(found.objective[0])
    assert not found.converged[0]
    assert found.best != 0
    assert not np.any(fit_law(STARTS, X, OBSERVED, max_steps=2).converged)


def test_standard_errors():
    """Over data drawn again and again: errors in units of their standard errors have variance one; least squares and Huber's loss."""
    draws, x = 400, jnp.linspace(-1.0, 2.0, 60)
    errors = 0.3 * jax.random.normal(jax.random.key(0), (draws, 60)) * (1 + x**2) / 2  # not alike: the usual formula would be wrong
    for objective in (squared(), huber(0.2)):

        def score(error, objective=objective):
            found = fit_law(Line(jnp.zeros(1), jnp.zeros(1)), x, 1 + 2 * x + error, objective=objective)
            errors = found.standard_errors()
            at = found.law.offset + 1.5 * found.law.slope - 4.0
            return jnp.stack([(found.law.slope - 2) / errors.slope, at / found.standard_error(lambda law: law(jnp.asarray(1.5)))])

        z = jax.jit(jax.vmap(score))(errors)
        spread = np.sqrt(2 / draws)  # of a variance of `draws` normals
        assert np.all(np.abs(np.mean(z, 0)) < 4 / np.sqrt(draws))
        assert np.all(np.abs(np.var(z, 0) - 1) < 4 * spread + 0.08)  # 5/60 and less: the bias of squares of residuals at the ends


def test_bootstrap():
    x = jnp.linspace(0.0, 1.0, 100)
    error = 0.1 * jax.random.normal(jax.random.key(1), (100,))
    found = fit_law(Line(jnp.zeros(1), jnp.zeros(1)), x, 1 + x + error, objective=squared())
    options = {"samples": 400, "objective": squared()}
    laws = bootstrap(jax.random.key(2), found, x, 1 + x + error, **options)
    ratio = np.std(laws.slope) / found.standard_errors().slope
    assert abs(ratio - 1) < 4 * np.sqrt(0.5 / 400) + 0.05
    low, high = bands(laws, lambda law: law(x), 0.9)
    width = 2 * 1.645 * found.standard_error(lambda law: law(x))
    np.testing.assert_allclose(high - low, width, rtol=0.25)
    # every error ten times over: only blocks know that these are not a thousand
    many, blocks = jnp.repeat(x, 10), jnp.repeat(jnp.arange(100), 10)
    y = jnp.repeat(1 + x + error, 10)
    again = bootstrap(jax.random.key(2), found, many, y, blocks=blocks, **options)
    assert abs(np.std(again.slope) / np.std(laws.slope) - 1) < 8 * np.sqrt(0.5 / 400)


def test_derivatives():
    """Of the minimum, by the implicit function theorem, to data, weights and δ: central differences."""
    direction = jnp.asarray(np.random.default_rng(1).normal(size=40))

    def slope(e):
        found = fit(OBSERVED * jnp.exp(0.01 * e * direction), 0.02 * jnp.exp(e), 1 + e * jnp.sin(direction))
        return found.law.c

    slope = jax.jit(slope)
    expected = (slope(1e-4) - slope(-1e-4)) / 2e-4
    np.testing.assert_allclose(jax.jit(jax.grad(slope))(0.0), expected, rtol=1e-4)


def test_free():
    starts = Line(jnp.zeros(1), jnp.full(1, 0.5))
    free = Line(True, False)
    found = fit_law(starts, X, 0.5 + 3 * X, free=free, objective=squared())
    np.testing.assert_allclose(found.law.slope, 3, rtol=1e-9)
    assert found.law.offset == 0.5
    assert found.covariance.shape == (1, 1)
    assert found.standard_errors().offset == 0
    assert bootstrap(jax.random.key(0), found, X, 0.5 + 3 * X, samples=2, objective=squared()).offset.tolist() == [0.5, 0.5]


def test_transforms():
    """vmap, two devices and float32 give what one fit gives."""
    many = jnp.stack([OBSERVED, TRUE(X)])
    mapped = jax.jit(jax.vmap(lambda y: parameters_of(fit(y).law)))
    singles = np.stack([parameters(FITTED(y).law) for y in many])
    np.testing.assert_allclose(mapped(many), singles, rtol=1e-8)
    mesh = Mesh(np.array(jax.devices()[:2]), ("devices",))
    spec = PartitionSpec("devices")
    np.testing.assert_allclose(jax.jit(jax.shard_map(mapped, mesh=mesh, in_specs=spec, out_specs=spec))(many), singles, rtol=1e-8)
    single = fit_law(STARTS, X.astype(jnp.float32), OBSERVED.astype(jnp.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves((single.law, single.objective, single.covariance))} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(parameters(single.law), singles[0], rtol=0.01)


def parameters_of(law):
    return jnp.stack(jax.tree.leaves(law))


def test_extrapolation(recwarn):
    found = FITTED(TRUE(X))
    found(X * 1e3)  # three decades beyond four
    jax.jit(lambda x: found(x))(X * 1e9)  # traced inputs cannot be looked at
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"fitted on inputs from 100 to 1e\+06 and is asked at 1e\+06 to 1e\+12, 1.5 widths beyond"):
        found(jnp.array([1e6, 1e12]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observed": OBSERVED[:2], "inputs": X[:2]}, "2 points cannot determine 3 parameters"),
        ({"observed": OBSERVED.at[3].set(-1.0)}, r"must be positive, as its logarithm is fitted, but number 3 is -1"),
        ({"observed": OBSERVED.at[3].set(jnp.nan)}, "`observed` must be finite, but 1 of 40 numbers are not, the first is number 3"),
        ({"inputs": X.at[0].set(jnp.inf)}, "`inputs` must be finite"),
        ({"inputs": X[:5]}, r"the law predicts shape \(5,\) from `inputs`, but `observed` has \(40,\)"),
        ({"weights": jnp.ones(3)}, r"`weights` must have the shape of `observed`, \(40,\), got \(3,\)"),
        ({"weights": -jnp.ones(40)}, r"`weights` must lie in"),
        ({"starts": TRUE}, "`starts` must have floating leaves that are free, all stacked"),
        ({"inputs": -X}, "is not finite .* at any of `starts`"),
    ],
)
def test_refusals(change, message):
    arguments = {"starts": STARTS, "inputs": X, "observed": OBSERVED} | change
    with pytest.raises(ValueError, match=message):
        fit_law(**arguments)


def test_delta():
    with pytest.raises(ValueError, match=r"`delta` must lie in \(0"):
        huber_log(0.0)


def test_stack_laws():
    assert stack_laws(TRUE, TRUE).a.shape == (2,)
    np.testing.assert_allclose(fit_law(stack_laws(TRUE, TRUE), X, OBSERVED, objective=squared_log()).objective[0] > 0, True)
