"""Exact log-densities of a flow dx/dt = u(t, x) by the instantaneous change of variables, d log p_t(x_t)/dt = -∇·u(t, x_t).

    log p₁(x) = log p₀(z) - ∫ ∇·u(t, x_t) dt,   x_t solved from x at the last time back to z at the first.

Chen, Rubanova, Bettencourt, Duvenaud 2018 (arXiv:1806.07366), theorem 1; with Hutchinson's trace estimate, Grathwohl et al. 2019 (arXiv:1810.01367);
for the probability flow of a diffusion, Song et al. 2021 (arXiv:2011.13456), appendix D.2. Their noise stands at the last time, ours at the first.

A divergence is a plug, `divergence(field, x) -> (field(x), ∇·field(x))`: `ExactDivergence` or `HutchinsonDivergence`.
"""

from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .check import check_count, check_increasing, check_range
from .loop import integrate
from .types import PRNGKey, PyTree, Scalar, VectorField


class ExactDivergence(eqx.Module):
    """The trace of the Jacobian, one forward derivative per dimension of x: exact, d times the cost of the field.

    `batch_size` (static) is how many dimensions go at once; None (default) takes all d together, whose memory is d times the field's.
    """

    batch_size: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)

    def __call__(self, field: Callable, x: Float[Array, "*x"]) -> tuple[Float[Array, "*x"], Float[Array, ""]]:
        """(field(x), ∇·field(x))."""
        value, derivative = jax.linearize(field, x)

        def diagonal(i):
            unit = jnp.zeros_like(x).ravel().at[i].set(1).reshape(x.shape)
            return derivative(unit).ravel()[i]

        dimensions = jnp.arange(x.size)
        entries = jax.vmap(diagonal)(dimensions) if self.batch_size is None else jax.lax.map(diagonal, dimensions, batch_size=self.batch_size)
        return value, jnp.sum(entries)


class HutchinsonDivergence(eqx.Module):
    """Hutchinson's unbiased estimate, the mean of e·(J e) over `num_probes` random e with E[e eᵀ] = I.

    - `key`: one key, one set of probes: they stay the same along a solve, so that the solver sees a smooth field and the log-density is unbiased.
      For independent estimates build this inside `vmap` from a batch of keys.
    - `num_probes` (static, default 1): the variance falls as 1/num_probes.
    - `distribution`: `(key, shape, dtype) -> probes`; `jax.random.rademacher` (default, the smaller variance) or `jax.random.normal`.
    """

    key: PRNGKey
    num_probes: int = eqx.field(static=True, default=1)
    distribution: Callable = jax.random.rademacher

    def __check_init__(self):
        check_count("num_probes", self.num_probes)

    def __call__(self, field: Callable, x: Float[Array, "*x"]) -> tuple[Float[Array, "*x"], Float[Array, ""]]:
        """(field(x), an estimate of ∇·field(x))."""
        value, derivative = jax.linearize(field, x)
        # adding zeros of x: inside shard_map one key for all shards is fine too
        probes = self.distribution(self.key, (self.num_probes, *x.shape), x.dtype) + jnp.zeros_like(x)
        return value, jnp.mean(jax.vmap(lambda e: jnp.sum(e * derivative(e)))(probes))


class AugmentedVelocity(eqx.Module):
    """The field of the pair (x, ℓ): d(x, ℓ)/dt = (u, ∇·u), as a vector field `(t, (x, ℓ), args)` for one example."""

    velocity: VectorField
    divergence: Callable = ExactDivergence()

    def __call__(self, t, state, args=None):
        """`state` = (x, ℓ) with ℓ a scalar."""
        return self.divergence(lambda x: self.velocity(t, x, args), state[0])


class TimeReversed(eqx.Module):
    """A field run backwards: with τ = -t, dy/dτ = -field(-τ, y). Times t₀ < … < t_N become `-times[::-1]`, exactly."""

    field: VectorField

    def __call__(self, t, state, args=None):
        """`t` is τ; `state` may be any pytree."""
        return jax.tree.map(jnp.negative, self.field(-t, state, args))


def standard_normal_log_prob(x: Float[Array, "*x"], std: Scalar = 1.0) -> Float[Array, ""]:
    """log N(x; 0, std² I) of one example, summed over all its dimensions. Raises `ValueError` unless `std` > 0."""
    check_range("std", std, low=0.0, open_low=True)
    return -jnp.sum((x / std) ** 2) / 2 - x.size * (jnp.log(2 * jnp.pi) / 2 + jnp.log(std))


_TSIT5 = dfx.Tsit5()
_EXACT = ExactDivergence()


def log_likelihood(
    velocity: VectorField,
    x: Float[Array, "*x"],
    log_prior: Callable[[Array], Array],
    times: Float[Array, " steps"],
    solver: dfx.AbstractSolver = _TSIT5,
    args: PyTree = None,
    divergence: Callable = _EXACT,
) -> tuple[Float[Array, ""], Float[Array, "*x"]]:
    """log-density in nats of ONE example `x` at `times[-1]` under the flow dx/dt = velocity(t, x, args) that starts from the prior at `times[0]`.

    - `log_prior`: latent -> scalar, the log-density at `times[0]`, e.g. `standard_normal_log_prob`.
    - `times`: step boundaries of shape (N + 1,), increasing from prior to data. They need not reach 0 and 1: leave out an end where the velocity is
      infinite, and the result is the density of that slightly noisy x.
    - `solver`: any explicit diffrax solver; its order is that of the result. Default `Tsit5` (order 5, six evaluations a step; `Heun`: order 2, two).
      Inside `shard_map`, diffrax 0.7's solvers of three and more stages need `check_vma=False`; `Euler` and `Heun` do not.
    - `divergence`: `ExactDivergence()` (default), `HutchinsonDivergence(key)`, or any `(field, x) -> (value, divergence)`.

    Returns (log-density, latent at `times[0]`). `integrate(ODETerm(velocity), solver, latent, args, times=times)` decodes it. Batches: `vmap`.
    Differentiable in x, args, times and the velocity's parameters. Raises `ValueError` for times that do not increase.

    With adaptive steps, diffrax's own driver solves the same pair backwards:

        field = AugmentedVelocity(velocity, divergence)
        controller = diffrax.PIDController(rtol=1e-5, atol=1e-5)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field), diffrax.Tsit5(), t1, t0, None, (x, jnp.zeros(())), args, stepsize_controller=controller
        )
        latent, change = solution.ys[0][0], solution.ys[1][0]
        log_prob = log_prior(latent) + change
    """
    check_increasing("times", times)
    times = jnp.asarray(times, x.dtype)
    backwards = dfx.ODETerm(TimeReversed(AugmentedVelocity(velocity, divergence)))
    start = (x, jnp.sum(jnp.zeros_like(x)))
    latent, change = integrate(backwards, solver, start, args, times=-times[::-1])
    return log_prior(latent) + change, latent


__all__ = [
    "AugmentedVelocity",
    "ExactDivergence",
    "HutchinsonDivergence",
    "TimeReversed",
    "log_likelihood",
    "standard_normal_log_prob",
]
