"""Schrödinger bridges between two samples, relative to a reference of any drift f and constant noise ε, on a grid of Euler steps.

The bridge has drifts f + u forwards and, in reversed time, -f + w. A solver is a plug, `solver(key, reference, times, x0, x1) -> Bridge`:

`RegressionBridgeSolver`: iterative proportional fitting by drift regression (Vargas, Thodoroff, Lamacraft, Lawrence 2021, arXiv:2106.02081; with
    networks De Bortoli, Thornton, Heng, Doucet 2021, arXiv:2106.01357). Paths that start at the one sample teach the drift of the other direction,
    with which paths start at the other sample, and so on, from paths of the reference itself.
`GaussianBridgeSolver`: both samples as Gaussians with their means and covariances, and f affine (else linearised), where all is in closed form.
"""

import abc
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_count, check_range
from ..core.types import PRNGKey, Scalar
from .gaussian_bridge import GaussianBridge
from .reference import Brownian, ReferenceProcess


class Regression(eqx.Module):
    """y = Σ_j φ_j(z) a_j of z = (x - `centre`)/`scale`, with the features 1, z and exp(-|z - z_m|²/(2 `bandwidth`²)) at each of `inducing`."""

    centre: Float[Array, "*batch d"]
    scale: Float[Array, "*batch d"]
    inducing: Float[Array, "*batch m d"]
    coefficients: Float[Array, "*batch features d"]
    bandwidth: Float[Array, "*batch"]

    def __call__(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """y at one x."""
        z = (x - self.centre) / self.scale
        return _features(z, self.inducing, self.bandwidth) @ self.coefficients


def _features(z, inducing, bandwidth):
    return jnp.concatenate([jnp.ones_like(z[:1]), z, _kernel(z, inducing, bandwidth)])


def _kernel(z, inducing, bandwidth):
    return jnp.exp(-jnp.sum((z - inducing) ** 2, axis=-1) / (2 * jnp.asarray(bandwidth, z.dtype) ** 2))


class KernelRegressor(eqx.Module):
    """`regressor(x, y) -> Regression` of y (n, d) on x (n, d): the mean of a Gaussian process, an affine function plus one of Gaussian kernel.

    - `num_inducing` (static, default 32): the kernel part is spanned by that many of the x ("subset of regressors"; Quiñonero-Candela and Rasmussen
      2005); at most n. 0: affine functions alone, ordinary least squares.
    - `bandwidth`: in standard deviations of x (default 1).
    - `ridge`: the variance of the noise in y over that of the kernel part (default 1). The affine part is not shrunk.
    """

    num_inducing: int = eqx.field(static=True, default=32)
    bandwidth: Scalar = 1.0
    ridge: Scalar = 1.0

    def __check_init__(self):
        check_count("num_inducing", self.num_inducing, low=0)
        check_range("bandwidth", self.bandwidth, low=0.0, open_low=True)
        check_range("ridge", self.ridge, low=0.0, open_low=True)

    def __call__(self, x: Float[Array, "n d"], y: Float[Array, "n d"]) -> Regression:
        """The fit."""
        n, d = x.shape
        tiny = jnp.finfo(x.dtype).eps
        centre, scale = jnp.mean(x, axis=0), jnp.std(x, axis=0) + jnp.finfo(x.dtype).tiny ** 0.25
        z, bandwidth = (x - centre) / scale, jnp.asarray(self.bandwidth, x.dtype)
        # The rows come in random order.
        inducing = z[: self.num_inducing]
        features = jax.vmap(lambda z: _features(z, inducing, bandwidth))(z)
        gram = jax.vmap(lambda z: _kernel(z, inducing, bandwidth))(inducing)
        penalty = jnp.pad(jnp.asarray(self.ridge, x.dtype) * gram, (1 + d, 0)) + n * jnp.diag(
            jnp.concatenate([jnp.full(1 + d, 10 * tiny), jnp.full(len(inducing), tiny**0.5)])
        )
        factor = jax.scipy.linalg.cho_factor(features.T @ features + penalty)
        return Regression(centre, scale, inducing, jax.scipy.linalg.cho_solve(factor, features.T @ y), bandwidth)


class Bridge(NamedTuple):
    """Between two snapshots, on S steps of a grid. Drifts have a leading axis S; step i is from times[i] to times[i + 1]."""

    forward: Regression  # u at times[i]
    backward: Regression  # w at times[i + 1]
    paths: Float[Array, "boundaries n d"]  # at all S + 1 times: particles, or other points with the same means and covariances
    drifts: Float[Array, "steps n d"]  # f + u at `paths[:-1]`


class BridgeSolver(eqx.Module):
    """The socket."""

    @abc.abstractmethod
    def __call__(
        self,
        key: PRNGKey,
        reference: ReferenceProcess,
        times: Float[Array, " boundaries"],
        x0: Float[Array, "n d"],
        x1: Float[Array, "n d"],
    ) -> Bridge:
        """The bridge from the rows of `x0` at times[0] to those of `x1` at times[-1]."""


def forward_paths(key, reference: ReferenceProcess, forward: Regression | None, times, x):
    """(paths, drifts) of x (n, d) by Euler steps from times[0] to times[-1]; without `forward`, of the reference itself."""

    def step(x, parts):
        key, t, dt, u = parts
        drift = jax.vmap(lambda x: reference(t, x))(x) + (0 if u is None else jax.vmap(u)(x))
        return _noisy(key, x + dt * drift, reference.epsilon * dt), (x, drift)

    last, (paths, drifts) = jax.lax.scan(step, x, (_keys(key, times), times[:-1], jnp.diff(times), forward))
    return jnp.concatenate([paths, last[None]]), drifts


def backward_paths(key, reference: ReferenceProcess, backward: Regression, times, x):
    """Paths, in the order of the times, that start from x at times[-1] and run back to times[0]."""

    def step(x, parts):
        key, t, dt, w = parts
        drift = jax.vmap(lambda x: w(x) - reference(t, x))(x)
        return _noisy(key, x + dt * drift, reference.epsilon * dt), x

    first, paths = jax.lax.scan(step, x, (_keys(key, times), times[:-1], jnp.diff(times), backward), reverse=True)
    return jnp.concatenate([first[None], paths])


def _keys(key, times):
    return jax.random.split(key, len(times) - 1)


def _noisy(key, mean, variance):
    return mean + jnp.sqrt(variance).astype(mean.dtype) * jax.random.normal(key, mean.shape, mean.dtype)


class GaussianBridgeSolver(BridgeSolver):
    """The exact bridge of the Euler chain x_{i+1} = A_i x_i + c_i + √(ε dt) z between the Gaussians of both samples' means and covariances.

    The plan is `GaussianBridge`'s in coordinates that make the chain's transition Brownian; with it the end is weighted by a ψ = exp(-½ xᵀP x + pᵀx),
    whose conditional expectations give the drift step by step. Where f is not affine it is linearised on the reference's own path from the
    mean of `x0`, bent to end in that of `x1`. `paths` are 2d
    points with the chain's means and covariances at each time. No randomness.
    """

    def __call__(self, key, reference, times, x0, x1):
        dt, identity = jnp.diff(times), jnp.eye(x0.shape[1], dtype=x0.dtype)
        (mean0, cov0), (mean1, cov1) = _moments(x0), _moments(x1)
        share = ((times - times[0]) / (times[-1] - times[0]))[:-1, None]
        arrived, flow = jax.lax.scan(lambda x, step: (x + step[1] * reference(step[0], x), x), mean0, (times[:-1], dt))
        line = flow + share * (mean1 - arrived)
        slopes = jax.vmap(jax.jacfwd(lambda t, x: reference(t, x), argnums=1))(times[:-1], line)
        offsets = jax.vmap(lambda t, x: reference(t, x))(times[:-1], line) - jnp.einsum("sij,sj->si", slopes, line)
        steps = identity + dt[:, None, None] * slopes, dt[:, None] * offsets, (reference.epsilon * dt).astype(x0.dtype)

        def compose(whole, step):
            (a, c, q), (matrix, shift, cov) = step, whole
            return (a @ matrix, a @ shift + c, a @ cov @ a.T + q * identity), None

        zero = jnp.zeros_like(cov0)
        (matrix, shift, noise), _ = jax.lax.scan(compose, (identity + zero, jnp.zeros_like(mean0), zero), steps)
        factor = jnp.linalg.cholesky(noise)

        def white(rows):
            return jax.scipy.linalg.solve_triangular(factor, rows, lower=True)

        onward = matrix @ mean0 + shift
        half = white(matrix @ cov0 @ matrix.T), white(cov1)
        plan = GaussianBridge(white(onward), white(half[0].T).T, white(mean1), white(half[1].T).T, Brownian(1.0))
        # p(x₁ | x₀) ∝ N(x₁; A x₀ + c, noise) ψ(x₁): precisions and information vectors add.
        precision = jnp.linalg.inv(factor @ plan.conditional(plan.mean0)[1] @ factor.T)
        potential = precision - jnp.linalg.inv(noise), precision @ mean1 - jnp.linalg.solve(noise, onward)

        def look_ahead(potential, step):
            (a, c, q), (quadratic, linear) = step, potential
            cov = jnp.linalg.inv(identity / q + quadratic)
            rest = (identity - cov / q) / q
            before = a.T @ rest @ a, a.T @ (cov @ linear / q - rest @ c)
            return before, (cov @ a / q, cov @ (c / q + linear), cov)

        _, moves = jax.lax.scan(look_ahead, potential, steps, reverse=True)

        def advance(state, move):
            (mean, cov), (a, c, rest) = state, move
            after = a @ mean + c, a @ cov @ a.T + rest
            return after, (*state, *after, cov @ jnp.linalg.solve(after[1], a).T)

        last, (means, covs, next_means, _, gains) = jax.lax.scan(advance, (mean0, cov0), moves)

        def affine(centre, value, slope):
            coefficients = jnp.concatenate([value[:, None], jnp.swapaxes(slope, 1, 2)], axis=1)
            return Regression(centre, jnp.ones_like(centre), centre[:, None][:, :0], coefficients, jnp.ones_like(dt))

        column = dt[:, None]
        at_means, at_next = (jnp.einsum("sij,sj->si", slopes, x) + offsets for x in (means, next_means))
        forward = affine(means, (next_means - means) / column - at_means, (moves[0] - identity) / column[..., None] - slopes)
        backward = affine(next_means, (means - next_means) / column + at_next, (gains - identity) / column[..., None] + slopes)
        paths = jax.vmap(_points)(jnp.concatenate([means, last[0][None]]), jnp.concatenate([covs, last[1][None]]))
        drifts = (jnp.einsum("sij,snj->sni", moves[0], paths[:-1]) + moves[1][:, None] - paths[:-1]) / column[..., None]
        return Bridge(forward, backward, paths, drifts)


def _moments(x):
    mean = jnp.mean(x, axis=0)
    covariance = (x - mean).T @ (x - mean) / len(x)
    # Fewer rows than dimensions, or columns without spread, leave it singular.
    floor = jnp.finfo(x.dtype).eps ** 0.5 * jnp.trace(covariance) / len(mean)
    return mean, covariance + floor * jnp.eye(len(mean), dtype=x.dtype)


def _points(mean, covariance):
    """mean ± √d times the columns of a root: 2d points of this mean and covariance."""
    root = jnp.sqrt(jnp.asarray(len(mean), mean.dtype)) * jnp.linalg.cholesky(covariance).T
    return mean + jnp.concatenate([root, -root])


class RegressionBridgeSolver(BridgeSolver):
    """Iterative proportional fitting.

    - `regressor`: `(x, y) -> Regression`, used at each step anew (default `KernelRegressor()`): it learns u and w, so that f stands for what the data
      do not say.
    - `sweeps` (static, default 3): there and back, so many times.
    - `start`: what the first paths are drawn from (default `GaussianBridgeSolver()`); None for the reference itself, as in the papers, where fitting
      takes very many sweeps if the noise is small beside the spread of the samples. Where f is not affine, the Gaussian start is not quite of the
      family of processes that fitting stays in: the bridge is then relative to an f with an error of second order in what the start must correct.
    """

    regressor: KernelRegressor = KernelRegressor()
    sweeps: int = eqx.field(static=True, default=3)
    start: BridgeSolver | None = GaussianBridgeSolver()

    def __check_init__(self):
        check_count("sweeps", self.sweeps)

    def __call__(self, key, reference, times, x0, x1):
        dt = jnp.diff(times)[:, None, None]

        def drifts_at(x):
            return jax.vmap(lambda t, rows: jax.vmap(lambda x: reference(t, x))(rows))(times[:-1], x)

        def forward_of(paths):
            return jax.vmap(self.regressor)(paths[:-1], (paths[1:] - paths[:-1]) / dt - drifts_at(paths[:-1]))

        def backward_of(paths):
            return jax.vmap(self.regressor)(paths[1:], (paths[:-1] - paths[1:]) / dt + drifts_at(paths[1:]))

        def sweep(bridge, key):
            key_back, key_there = jax.random.split(key)
            forward = forward_of(backward_paths(key_back, reference, bridge.backward, times, x1))
            paths, drifts = forward_paths(key_there, reference, forward, times, x0)
            return Bridge(forward, backward_of(paths), paths, drifts), None

        key_first, key_sweeps = jax.random.split(key)
        guess = None if self.start is None else self.start(key_first, reference, times, x0, x1).forward
        paths, drifts = forward_paths(key_first, reference, guess, times, x0)
        backward = backward_of(paths)
        start = Bridge(jax.tree.map(jnp.zeros_like, backward), backward, paths, drifts)
        return jax.lax.scan(sweep, start, jax.random.split(key_sweeps, self.sweeps))[0]


__all__ = [
    "Bridge",
    "BridgeSolver",
    "GaussianBridgeSolver",
    "KernelRegressor",
    "Regression",
    "RegressionBridgeSolver",
    "backward_paths",
    "forward_paths",
]
