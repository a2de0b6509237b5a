"""How long to diffuse: a short diffusion, and a simple density where it ends. Franzese, Rossi, Yang, Finamore, Rossi, Filippone, Michiardi 2022.

arXiv:2206.05173. With noise time u = 1 - t and diffusion stopped at u = T, the evidence lower bound of a score model s that starts from π is

    ELBO(T) = E[log π(x_T)] - ∫₀ᵀ E[½ g² |s|² + g² ∇·s - ∇·f] du = -H(data) - G(T) - KL(p_T ‖ π),   G' = ½ g² E|s - ∇log p|².

The score's error G grows with T and the mismatch KL falls. For π stationary under the diffusion (VP and N(0, I)), KL' = -½ g² E|∇log p - ∇log π|²,
and both unknown scores can be had by denoising: c = -ε/σ is the score of x_t given the data, so

    ELBO'(T) = ½ g² E[|c - ∇log π|² - |c - s|²]:

the best T is where the network's denoising loss has risen to that of the prior's own score. (The paper states the balance; that it can be read off
losses is derived here.) `optimal_start` finds it; `diffusion_elbo` and `elbo_slope` are the two sides above.

Shorter still, the paper bridges what is left at T by an auxiliary density ν fitted to diffused data, KL(p_T ‖ ν) ≤ KL(p_T ‖ π). With start = 1 - T:

    loss = DenoisingLoss(path, prediction, times=TimesFrom(start))
    nu = fit_gaussian_mixture(key, jax.vmap(path.interpolate, (None, 0, 0))(start, data, noise), num_components=8)
    x1 = integrate(DenoiserTerm(denoised, path, uniform_grid(num_steps, start)), solver, nu.sample(key, n))
    log_prob, _ = log_likelihood(ProbabilityFlow(denoised, path), x, nu.log_prob, uniform_grid(num_steps, start, 1 - 1e-5))

ν may be anything with `sample` and `log_prob`. The paper's are a Dirichlet-process mixture and Glow; here it is a mixture by maximum likelihood (EM).
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core.batch import stratified_times
from ..core.check import check_count, check_increasing, check_range
from ..core.likelihood import ExactDivergence
from ..core.path import AffinePath
from ..core.types import PRNGKey, Scalar, Time, VectorField
from ..data.mixture import GaussianMixture


class TimesFrom(eqx.Module):
    """Training times `(key, n) -> (n,)` on [start, 1] for a diffusion that stops at T = 1 - `start`; `times` are on [0, 1]."""

    start: Scalar
    times: Callable = stratified_times

    def __check_init__(self):
        check_range("start", self.start, low=0.0, high=1.0, open_high=True)

    def __call__(self, key: PRNGKey, n: int) -> Float[Array, " n"]:
        """n times."""
        times = self.times(key, n)
        start = jnp.asarray(self.start, times.dtype)
        return start + (1 - start) * times


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(4)
_EXACT = ExactDivergence()


def diffusion_elbo(
    score: VectorField,
    path: AffinePath,
    data: Float[Array, "n *x"],
    noise: Float[Array, "n *x"],
    log_prior: Callable[[Array], Array],
    times: Float[Array, " steps"],
    divergence: Callable = _EXACT,
) -> Float[Array, " n"]:
    """The ELBO of each example, in nats: its mean over data and noise is ELBO(T), T = 1 - `times[0]`.

    - `score`: ∇log p_t as a vector field `(t, x, args)` on one example; `log_prior`: x_T -> log π(x_T) of one example.
    - `noise`: independent N(0, I); one draw serves all times.
    - `times`: boundaries of a Gauss-Legendre rule of 4 nodes each, increasing; they stop short of 1 where g² / σ² is infinite, and what the bound
      then speaks of is the slightly noisy data at `times[-1]`.
    - `divergence`: as in `ergodax.core.log_likelihood`.

    Raises `ValueError` for times that do not increase.
    """
    check_increasing("times", times)
    times = jnp.asarray(times, data.dtype)
    half, centre = jnp.diff(times) / 2, (times[1:] + times[:-1]) / 2
    nodes = (centre[:, None] + half[:, None] * _NODES.astype(times.dtype)).ravel()
    weights = (half[:, None] * _WEIGHTS.astype(times.dtype)).ravel()
    size = data[0].size

    def one(x1, x0):
        def accumulate(total, node):
            t, weight = node
            value, trace = divergence(lambda x: score(t, x, None), path.interpolate(t, x1, x0))
            rate = path.diffusion(t) * (jnp.sum(value**2) / 2 + trace) + size * path.d_log_alpha(t)
            return total - weight * rate, None

        start = log_prior(path.interpolate(times[0], x1, x0))
        return jax.lax.scan(accumulate, start, (nodes, weights))[0]

    return jax.vmap(one)(data, noise)


def standard_normal_score(t: Time, x: Float[Array, "*x"], args=None) -> Float[Array, "*x"]:
    """∇log N(x; 0, I): where a VP path tends to."""
    return -x


def elbo_slope(
    score: VectorField,
    path: AffinePath,
    t: Time,
    data: Float[Array, "n *x"],
    noise: Float[Array, "n *x"],
    prior_score: VectorField = standard_normal_score,
) -> Float[Array, " n"]:
    """Each example's term of dELBO/dT at T = 1 - `t`, for one scalar `t`. `prior_score`: ∇log π of a law that the diffusion leaves unchanged."""
    t = jnp.asarray(t, data.dtype)

    def one(x1, x0):
        x, target = path.interpolate(t, x1, x0), -x0 / path.sigma(t)
        gap = jnp.sum((target - prior_score(t, x, None)) ** 2) - jnp.sum((target - score(t, x, None)) ** 2)
        return path.diffusion(t) / 2 * gap

    return jax.vmap(one)(data, noise)


def optimal_start(times: Float[Array, " steps"], slopes: Float[Array, " steps"]) -> Float[Array, ""]:
    """The t = 1 - T of the largest ELBO(T), from dELBO/dT (means of `elbo_slope`) at increasing `times`.

    The grid's best time by the trapezoidal rule, then the zero of the slope between it and the neighbour where ELBO still rises or no longer does; an
    end of the grid if there is none. Raises `ValueError` for times that do not increase.
    """
    check_increasing("times", times)
    u, slopes = 1 - times[::-1], slopes[::-1]  # T increases
    gain = jnp.concatenate([jnp.zeros_like(u[:1]), jnp.cumsum(jnp.diff(u) * (slopes[1:] + slopes[:-1]) / 2)])
    best = jnp.argmax(gain)
    low = jnp.clip(jnp.where(slopes[best] > 0, best, best - 1), 0, len(u) - 2)
    rise, fall = slopes[low], slopes[low + 1]
    crosses = (rise > 0) & (fall <= 0)
    share = jnp.where(crosses, rise / jnp.where(crosses, rise - fall, 1), 0)
    return 1 - jnp.where(crosses, u[low] + share * (u[low + 1] - u[low]), u[best])


def fit_gaussian_mixture(
    key: PRNGKey,
    x: Float[Array, "n dim"],
    num_components: int,
    num_steps: int = 100,
    *,
    ridge: Scalar = 1e-6,
) -> GaussianMixture:
    """A mixture of full Gaussians fitted to `x` by `num_steps` of expectation maximisation (Dempster, Laird, Rubin 1977).

    Means start at points drawn far from each other (k-means++: Arthur, Vassilvitskii 2007), covariances at that of all points. `ridge` times the
    mean variance is added to every covariance, so that no component collapses onto a point. Raises `ValueError` for counts that do not fit.
    """
    check_count("num_components", num_components)
    check_count("num_steps", num_steps, low=0)
    check_range("ridge", ridge, low=0.0)
    n, dim = x.shape
    check_count("the number of rows of `x`", n, low=num_components)
    key_first, key_rest = jax.random.split(key)
    first = x[jax.random.randint(key_first, (), 0, n)]

    def farther(nearest, key):
        chosen = x[jax.random.categorical(key, jnp.log(nearest))]
        return jnp.minimum(nearest, jnp.sum((x - chosen) ** 2, axis=1)), chosen

    _, others = jax.lax.scan(farther, jnp.sum((x - first) ** 2, axis=1), jax.random.split(key_rest, num_components - 1))
    offset = x - jnp.mean(x, axis=0)
    spread = offset.T @ offset / n
    floor = jnp.asarray(ridge, x.dtype) * jnp.trace(spread) / dim * jnp.eye(dim, dtype=x.dtype)
    means = jnp.concatenate([first[None], others])
    weights = jnp.ones_like(means[:, 0]) / num_components
    covariances = jnp.broadcast_to(spread + floor, (num_components, dim, dim))

    def step(state, _):
        weights, means, covariances = state
        factor = jnp.linalg.cholesky(covariances)
        solved = jax.vmap(lambda low, mean: jax.scipy.linalg.solve_triangular(low, (x - mean).T, lower=True))(factor, means)
        log_det = jnp.sum(jnp.log(jnp.diagonal(factor, axis1=1, axis2=2)), axis=1)
        share = jax.nn.softmax(jnp.log(weights) - log_det - jnp.sum(solved**2, axis=1).T / 2, axis=1)  # (n, k)
        mass = jnp.maximum(jnp.sum(share, axis=0), jnp.finfo(x.dtype).tiny)
        means = share.T @ x / mass[:, None]

        def covariance(share, mean, mass):
            return (share[:, None] * (x - mean)).T @ (x - mean) / mass + floor

        return (mass / jnp.sum(mass), means, jax.vmap(covariance)(share.T, means, mass)), None

    (weights, means, covariances), _ = jax.lax.scan(step, (weights, means, covariances), length=num_steps)
    return GaussianMixture(weights, means, (covariances + covariances.swapaxes(1, 2)) / 2)


__all__ = [
    "TimesFrom",
    "diffusion_elbo",
    "elbo_slope",
    "fit_gaussian_mixture",
    "optimal_start",
    "standard_normal_score",
]
