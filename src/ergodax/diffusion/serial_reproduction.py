"""Diffusion as serial reproduction. Marjieh, Sucholutsky, Langlois, Jacoby, Griffiths 2023 (arXiv:2209.14821).

In serial reproduction a person sees a noisy stimulus, reproduces what they believe it was, and the next person sees that:

    y_n ~ N(y | x_n)              noise
    x_{n+1} ~ p₀(x) N(y_n | x)/Z  reproduction, the exact posterior under the prior p₀

This is a two-block Gibbs sampler of p₀(x) N(y | x). So for ANY noise the chain is reversible with respect to p₀, which is why a diffusion model with
exact denoisers does not care for the noise family; with a learned prior the chain's law is that prior. The noise level only sets how fast: the
spectral gap of K = (noise, then reproduction) grows with it. Levels may change from step to step, in any order, since every K keeps p₀; a fixed and
small level mixes slowly.

`SerialReproduction` is the chain for any pair of callables, and `DiscreteReproduction` the pair for a finite set of points, with the matrices that
say everything about it. A noise kernel on a finite set must be normalised for each source point, with the same numbers in the posterior: else p₀ is
lost.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..core.types import PRNGKey, PyTree, Scalar


class ReproductionState(NamedTuple):
    """What was reproduced last, and the number of steps so far."""

    position: PyTree
    count: Int[Array, ""]


class SerialReproduction(eqx.Module):
    """The chain as a Markov kernel in blackjax's socket, for one chain (`vmap` it over more). The info of a step is the noisy stimulus y.

    - `corrupt`: `(key, x, level) -> y`, a draw from N(y | x) at this noise level.
    - `reproduce`: `(key, y, level) -> x`, a draw from the posterior, such as a diffusion model's sampler started at y.
    - `levels`: noise levels of shape (L,); step n uses `levels[n]`, and the last one once they are used up.

    Raises `ValueError` for levels of another shape.
    """

    corrupt: Callable
    reproduce: Callable
    levels: Float[Array, " levels"]

    def __check_init__(self):
        if jnp.ndim(self.levels) != 1 or jnp.size(self.levels) < 1:
            raise ValueError(f"`levels` must be a vector of at least one noise level, got shape {jnp.shape(self.levels)}.")

    def init(self, position: PyTree, rng_key: PRNGKey | None = None) -> ReproductionState:
        """The chain at `position`; `rng_key` is not used."""
        return ReproductionState(position, jnp.zeros((), int))

    def step(self, rng_key: PRNGKey, state: ReproductionState) -> tuple[ReproductionState, PyTree]:
        """One noisy stimulus and its reproduction."""
        key_noise, key_reproduce = jax.random.split(rng_key)
        level = self.levels[jnp.minimum(state.count, self.levels.shape[0] - 1)]
        stimulus = self.corrupt(key_noise, state.position, level)
        return ReproductionState(self.reproduce(key_reproduce, stimulus, level), state.count + 1), stimulus


class DiscreteReproduction(eqx.Module):
    """Noise and exact reproduction on a finite set of n points; states and stimuli are indices 0 … n - 1.

    - `log_prior`: log p₀ up to a number, (n,). -inf for points that never occur.
    - `points`: the set, of shape (n,).
    - `log_noise`: the log-density of the noise in units of its level, up to a number: `standardised difference -> log density`, elementwise. Such as
      `jax.scipy.stats.norm.logpdf`, `jax.scipy.stats.laplace.logpdf`, or any of one's own.

    `corrupt` and `reproduce` are draws, for `SerialReproduction`; `noise`, `posterior` and `transition` their matrices.
    """

    log_prior: Float[Array, " n"]
    points: Float[Array, " m"]
    log_noise: Callable

    def __check_init__(self):
        if self.points.ndim != 1 or self.log_prior.shape != self.points.shape:
            raise ValueError(f"`points` and `log_prior` must be vectors of one length, got {self.points.shape} and {self.log_prior.shape}.")

    def log_noise_matrix(self, level: Scalar) -> Float[Array, "n n"]:
        """log N[x, y], normalised over y."""
        return self._log_noise_from(self.points, level)

    def _log_noise_from(self, start, level):
        """log N(y | x) for starts x of shape (...), (..., n)."""
        return jax.nn.log_softmax(self.log_noise((self.points - start[..., None]) / jnp.asarray(level, self.points.dtype)), axis=-1)

    def log_posterior_matrix(self, level: Scalar) -> Float[Array, "n n"]:
        """log p(x | y) as [y, x], from the prior and the same normalised noise."""
        return jax.nn.log_softmax((self.log_prior[:, None] + self.log_noise_matrix(level)).T, axis=1)

    def transition(self, level: Scalar) -> Float[Array, "n n"]:
        """K[x, x'], the law of the next reproduction: rows sum to 1, p₀ K = p₀, and p₀[x] K[x, x'] is symmetric."""
        noise, posterior = jnp.exp(self.log_noise_matrix(level)), jnp.exp(self.log_posterior_matrix(level))
        return jnp.dot(noise, posterior, precision=jax.lax.Precision.HIGHEST)

    def corrupt(self, key: PRNGKey, x: Int[Array, ""], level: Scalar) -> Int[Array, ""]:
        """y ~ N(y | x)."""
        return jax.random.categorical(key, self._log_noise_from(self.points[x], level))

    def reproduce(self, key: PRNGKey, y: Int[Array, ""], level: Scalar) -> Int[Array, ""]:
        """x ~ p(x | y)."""
        return jax.random.categorical(key, self.log_posterior_matrix(level)[y])


def spectral_gap(prior: Float[Array, " n"], transition: Float[Array, "n n"]) -> Float[Array, ""]:
    """1 - the second largest eigenvalue of a transition matrix that is reversible with respect to `prior` > 0.

    The distance to p₀ shrinks by (1 - gap) per step in the end. The eigenvalues of this chain are not negative.
    """
    root = jnp.sqrt(prior)
    symmetric = root[:, None] * transition / root
    return 1 - jnp.linalg.eigvalsh((symmetric + symmetric.T) / 2)[-2]


def law_after(start: Float[Array, " n"], transitions: Float[Array, "steps n n"]) -> Float[Array, " n"]:
    """The law of the chain after the given transitions, from the law `start`."""
    law = start + jnp.zeros_like(transitions[0, 0])
    return jax.lax.scan(lambda law, matrix: (jnp.dot(law, matrix, precision=jax.lax.Precision.HIGHEST), None), law, transitions)[0]


__all__ = ["DiscreteReproduction", "ReproductionState", "SerialReproduction", "law_after", "spectral_gap"]
