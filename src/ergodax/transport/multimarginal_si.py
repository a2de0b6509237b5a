"""Transport between many densities at once. Albergo, Boffi, Lindsey, Vanden-Eijnden 2023 (arXiv:2310.03695).

Given draws (x₀, …, x_K) of a coupling of K + 1 densities, the barycentric interpolant and its conditional means at weights a are

    x(a) = Σ_k a_k x_k,   g_k(a, x) = E[x_k | x(a) = x],   a >= 0, Σ_k a_k = 1 (or Σ_k a_k² = 1),

the minimisers of E[½|g_k(a, x(a))|² - x_k · g_k(a, x(a))], with a drawn too. Learned once, they give the velocity of EVERY curve a(t) of weights,

    b(t, x) = Σ_k a_k'(t) g_k(a(t), x),   whose flow carries the law of x(a(0)) to that of x(a(1)):

from any of the densities to any other, along the edge between them or through the others, where it may be cheaper; the flow also says which points
correspond. The conditional means obey Σ_k a_k g_k(a, x) = x, which `ConsistentFields` makes exact. If x₀ ~ N(0, I) apart from the others, the score
of x(a) is -g₀(a, x)/a₀, and with b it drives the diffusions of `stochastic_interpolants`.

A curve between two vertices may be chosen to be cheap (`PathEnergyLoss`): the mean kinetic energy ∫ E|b(t, x(a(t)))|² dt is at least W₂².
`FourierPath` is ã_k = (1 - t) [k = i] + t [k = j] + (Σ_m c_{m,k} sin(π m t))², a = ã/Σ ã: inside the simplex, from vertex i to j whatever c is.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core.batch import uniform_times
from ..core.check import check_count
from ..core.types import PRNGKey, PyTree, Time, VectorField


def simplex_weights(key: PRNGKey, n: int, num_marginals: int) -> Float[Array, "n k"]:
    """n draws of weights, uniform on the simplex: Dirichlet(1, …, 1)."""
    return jax.random.dirichlet(key, jnp.ones(num_marginals), (n,))


def sphere_weights(key: PRNGKey, n: int, num_marginals: int) -> Float[Array, "n k"]:
    """n draws of weights, uniform on the part of the unit sphere where none is negative."""
    direction = jnp.abs(jax.random.normal(key, (n, num_marginals)))
    return direction / jnp.linalg.norm(direction, axis=1, keepdims=True)


class BarycentricLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {})`: Σ_k of ½|g_k|² - x_k · g_k, summed over dimensions and averaged over the batch.

    - `batch`: (x₀, …, x_K), arrays of one shape (B, *x), row b of each a draw of the coupling; such as `Minibatches` draws, independent.
    - `model`: a network on one example, `(a, x, args) -> (K + 1, *x)`, the g_k, with a of shape (K + 1,); called with `args` None.
    - `weights`: `(key, n, K + 1) -> (n, K + 1)` (default `simplex_weights`).

    The value lacks Σ E|x_k|²/2, so it is negative where the model is good. Raises `ValueError` for arrays of unequal shape.
    """

    weights: Callable = simplex_weights

    def __call__(self, model: VectorField, batch: tuple, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        x = _stacked(batch)
        a = self.weights(key, x.shape[0], x.shape[1]).astype(x.dtype)

        @jax.vmap
        def losses(a, x):
            g = model(a, jnp.tensordot(a, x, 1), None)
            return jnp.sum(g**2) / 2 - jnp.sum(x * g)

        return jnp.mean(losses(a, x)), {}


def _stacked(batch):
    """(B, K + 1, *x)."""
    if len(batch) < 2 or any(x.shape != batch[0].shape for x in batch):
        raise ValueError(f"a batch must hold two or more arrays of one shape (batch, *example), got {[x.shape for x in batch]}.")
    return jnp.stack(batch, 1)


class ConsistentFields(eqx.Module):
    """The g_k of a network moved as little as needed for Σ_k a_k g_k = x: g_k + a_k (x - Σ_j a_j g_j)/|a|². Train and sample with it."""

    fields: VectorField

    def __call__(self, a: Float[Array, " k"], x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "k *x"]:
        """g_k, of shape (K + 1, *x)."""
        g = self.fields(a, x, args)
        return g + jnp.tensordot(a / jnp.sum(a**2), x - jnp.tensordot(a, g, 1), 0)


class EdgePath(eqx.Module):
    """a(t) = (1 - t) e_i + t e_j: from density i = `source` straight to density j = `target`, of `num_marginals` (all static)."""

    source: int = eqx.field(static=True)
    target: int = eqx.field(static=True)
    num_marginals: int = eqx.field(static=True)

    def __check_init__(self):
        _check_ends(self.source, self.target, self.num_marginals)

    def __call__(self, t: Time) -> Float[Array, " k"]:
        """The weights at one scalar `t`."""
        t, ends = jnp.asarray(t), np.eye(self.num_marginals)
        return (1 - t) * ends[self.source].astype(t.dtype) + t * ends[self.target].astype(t.dtype)


class FourierPath(eqx.Module):
    """A curve in the simplex from density i = `source` to density j = `target` (both static), to be learned by `PathEnergyLoss`.

    `coefficients`: c of shape (M, K + 1), row m - 1 for sin(π m t). All 0 is `EdgePath`, whence no gradient leads away, and near it curves stay on
    the edge: start with a first row of about ½, which passes through the middle of the simplex.
    """

    coefficients: Float[Array, "m k"]
    source: int = eqx.field(static=True)
    target: int = eqx.field(static=True)

    def __check_init__(self):
        _check_ends(self.source, self.target, self.coefficients.shape[1])

    def __call__(self, t: Time) -> Float[Array, " k"]:
        """The weights at one scalar `t`."""
        t = jnp.asarray(t)
        edge = EdgePath(self.source, self.target, self.coefficients.shape[1])(t)
        orders = np.arange(1, len(self.coefficients) + 1).astype(t.dtype)
        weights = edge + (jnp.sin(jnp.pi * orders * t) @ self.coefficients.astype(t.dtype)) ** 2
        return weights / jnp.sum(weights)


class SpherePath(eqx.Module):
    """A curve of weights pushed out to the unit sphere, a/|a|: for fields learned with `sphere_weights`."""

    path: Callable

    def __call__(self, t: Time) -> Float[Array, " k"]:
        """The weights at one scalar `t`."""
        a = self.path(t)
        return a / jnp.linalg.norm(a)


def _check_ends(source, target, num_marginals):
    check_count("the number of marginals", num_marginals, low=2)
    if not (0 <= source < num_marginals and 0 <= target < num_marginals) or source == target:
        raise ValueError(f"`source` and `target` must be two of the {num_marginals} marginals, counted from 0; got {source} and {target}.")


class PathVelocity(eqx.Module):
    """b(t, x) = Σ_k a_k'(t) g_k(a(t), x) as a vector field, for `ode_term`, `forward_sde_terms` and likelihoods.

    - `fields`: `(a, x, args) -> (K + 1, *x)`, trained by `BarycentricLoss`.
    - `path`: `t -> a`, of shape (K + 1,), differentiable.
    """

    fields: VectorField
    path: Callable

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """b at one scalar `t`, of the shape of `x`."""
        t = jnp.asarray(t, x.dtype)
        a, d_a = jax.jvp(self.path, (t,), (jnp.ones_like(t),))
        return jnp.tensordot(d_a, self.fields(a, x, args), 1)


class PathScore(eqx.Module):
    """s(t, x) = -g_n(a(t), x)/a_n(t) where density n = `noise` (static, default 0) is N(0, I) and independent of the others; 0 where a_n = 0."""

    fields: VectorField
    path: Callable
    noise: int = eqx.field(static=True, default=0)

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """s at one scalar `t`, of the shape of `x`."""
        a = self.path(jnp.asarray(t, x.dtype))
        share = a[self.noise]
        return -self.fields(a, x, args)[self.noise] / jnp.where(share > 0, share, jnp.inf)


class PathEnergyLoss(eqx.Module):
    """`loss(path, batch, key) -> (scalar, {})`: the kinetic energy ∫ E|b(t, x(a(t)))|² dt of a curve of weights, to choose one by.

    - `fields`: the g_k, trained; they are not trained further.
    - `times`: `(key, n) -> (n,)` (default `uniform_times`): fresh ones in every batch, so that no jump can hide between them.
    - `path`: the model, `t -> a`, such as `FourierPath`; `batch` as in `BarycentricLoss`.
    """

    fields: VectorField
    times: Callable = uniform_times

    def __call__(self, path: Callable, batch: tuple, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The energy over one batch, one time a row."""
        x, velocity = _stacked(batch), PathVelocity(self.fields, path)
        t = self.times(key, x.shape[0]).astype(x.dtype)
        energies = jax.vmap(lambda t, x: jnp.sum(velocity(t, jnp.tensordot(path(t), x, 1)) ** 2))
        return jnp.mean(energies(t, x)), {}


__all__ = [
    "BarycentricLoss",
    "ConsistentFields",
    "EdgePath",
    "FourierPath",
    "PathEnergyLoss",
    "PathScore",
    "PathVelocity",
    "SpherePath",
    "simplex_weights",
    "sphere_weights",
]
