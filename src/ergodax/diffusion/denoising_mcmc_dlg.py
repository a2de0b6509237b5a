"""Denoising MCMC and denoising Langevin Gibbs (DLG). Kim and Ye 2022 (arXiv:2209.14593).

The target is on data and noise level together: p(x, k) = p_{t_k}(x)/K over K times of a path (log-uniform levels: `log_snr_grid`). DLG alternates

    x ← x + (η/2) s(x, t_k) + √η ξ,   ξ ~ N(0, I)      an unadjusted Langevin step at the current level
    k ~ p(k | x)                                       the other Gibbs block, by a classifier of the level

`DenoisingMCMC` runs such a chain and every n steps takes the least noisy of the states it saw, the one before them included, and denoises it from its
own level instead of from σ_max, with any sampler. The chain itself goes on from its noisy state. A sample costs n calls and the few of a short solve.

- The chain is as good as Langevin's step: η must be small beside σ² plus the variance of a mode, or the levels drift up.
- `most_likely` in the place of the draw is what the released code does. The chain then no longer has p as its law; most of it sits at small noise.
- Released defaults: η = 0.8 and n = 10 for images, a chain that starts from one full reverse run, 1000 levels, ρ = 7 and σ_min = 0.01.
- Written for variance exploding processes; here for any affine path, where "least noisy" is by σ/α.
"""

from collections.abc import Callable
from typing import NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..core.check import check_count, check_range, check_times
from ..core.loop import integrate
from ..core.path import AffinePath
from ..core.prediction import ScorePrediction
from ..core.term import DenoiserTerm
from ..core.types import PRNGKey, PyTree, Scalar, VectorField
from .grids import karras_grid


class LevelState(NamedTuple):
    """A point and the index of its noise level."""

    position: Float[Array, "*x"]
    level: Int[Array, ""]


class CleanSample(NamedTuple):
    """What a step of `DenoisingMCMC` gives: a sample of the data, and the state that it was denoised from."""

    sample: Float[Array, "*x"]
    start: LevelState


def most_likely(key: PRNGKey, logits: Float[Array, " levels"]) -> Int[Array, ""]:
    """The index of the largest logit: what the released code takes in the place of a draw."""
    return jnp.argmax(logits)


class DenoisingLangevinGibbs(eqx.Module):
    """DLG as a Markov kernel in blackjax's socket, for one chain (`vmap` it over more): one network call and one classifier call per step.

    - `denoised`: posterior mean `(t, x, args)` on `path`, called with `args=None`.
    - `times`: (K,), the levels; σ > 0 at all of them.
    - `predictor`: `x -> (K,)` log p(k | x) up to a number, such as a trained `ergodax.diffusion.TimePredictor`.
    - `step_size`: η, in units of x².
    - `draw`: `(key, logits) -> index`, `jax.random.categorical` (default) or `most_likely`.

    Raises `ValueError` for a negative step size or times of another shape.
    """

    denoised: VectorField
    path: AffinePath
    times: Float[Array, " levels"]
    predictor: Callable
    step_size: Scalar
    draw: Callable = jax.random.categorical

    def __check_init__(self):
        check_range("step_size", self.step_size, low=0.0)
        if self.times.shape != (1,):
            check_times("times", self.times)

    def init(self, position: Float[Array, "*x"], rng_key: PRNGKey | None = None) -> LevelState:
        """`position` at its most probable level; `rng_key` is not used."""
        return LevelState(position, jnp.argmax(self.predictor(position)))

    def step(self, rng_key: PRNGKey, state: LevelState) -> tuple[LevelState, LevelState]:
        """One Langevin step at the current level, then a new level. The info is the new state."""
        key_noise, key_level = jax.random.split(rng_key)
        x = state.position
        t = self.times[state.level].astype(x.dtype)
        score = ScorePrediction().from_denoised(self.path, t, x, self.denoised(t, x, None))
        eta = jnp.asarray(self.step_size, x.dtype)
        x = x + eta / 2 * score + jnp.sqrt(eta) * jax.random.normal(key_noise, (x.size,), x.dtype).reshape(x.shape)
        state = LevelState(x, self.draw(key_level, self.predictor(x)))
        return state, state


class KarrasDenoise(eqx.Module):
    """`(key, x, t) -> sample`: a solve from time `t` on to the data on Karras's grid, for `DenoisingMCMC`.

    - `denoised`, `path`: as of the chain; σ(1) = 0, such as on `EDMPath`, for the last step to go to clean data.
    - `solver`: any on a `DenoiserTerm`. With `Heun` there are 2 `num_levels` - 1 network calls.
    - `num_levels` (static, at least 2), `sigma_min` (default 0.01) and `rho` (default 7): of the grid, whose σ_max is the level of `t`.
    """

    denoised: VectorField
    path: AffinePath
    solver: dfx.AbstractSolver
    num_levels: int = eqx.field(static=True)
    sigma_min: Scalar = 0.01
    rho: Scalar = 7.0

    def __call__(self, key: PRNGKey, x: Float[Array, "*x"], t: Float[Array, ""]) -> Float[Array, "*x"]:
        """The end of the solve, of the shape of `x`."""
        sigma = jnp.exp(-self.path.log_snr(t) / 2)
        # From σ_min or below, all levels lie together (on some paths equal by rounding), and the last step does the work.
        sigma_min = jnp.minimum(jnp.asarray(self.sigma_min, sigma.dtype), sigma * (1 - 1e-6))
        grid = karras_grid(self.path, self.num_levels, sigma_min, sigma, self.rho).astype(t.dtype)
        return integrate(DenoiserTerm(self.denoised, self.path, grid, restarts=True), self.solver, x, key=key)


class DenoisingMCMC(eqx.Module):
    """Denoising MCMC as a Markov kernel in blackjax's socket, for one chain: a step is `num_steps` steps of `chain` and one denoised sample.

    - `chain`: a `DenoisingLangevinGibbs`.
    - `denoise`: `(key, x, t) -> sample`, such as `KarrasDenoise`.
    - `num_steps` (static): n.

    Samples are in the info: `iterate(key, kernel.step, state, count, save=lambda state, info: info.sample)`. Those of one chain are correlated.
    """

    chain: DenoisingLangevinGibbs
    denoise: Callable
    num_steps: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("num_steps", self.num_steps)

    def init(self, position: Float[Array, "*x"], rng_key: PRNGKey | None = None) -> LevelState:
        """That of the chain."""
        return self.chain.init(position, rng_key)

    def step(self, rng_key: PRNGKey, state: LevelState) -> tuple[LevelState, CleanSample]:
        """The chain's state after n steps, and a sample from the least noisy state among the n + 1."""
        key_chain, key_denoise = jax.random.split(rng_key)

        def advance(carry, key):
            state, best = carry
            state, _ = self.chain.step(key, state)
            return (state, _where(self._snr(state) > self._snr(best), state, best)), None

        (state, best), _ = jax.lax.scan(advance, (state, state), jax.random.split(key_chain, self.num_steps))
        sample = self.denoise(key_denoise, best.position, self.chain.times[best.level].astype(best.position.dtype))
        return state, CleanSample(sample, best)

    def _snr(self, state):
        return self.chain.path.log_snr(self.chain.times[state.level])


def _where(condition: Array, first: PyTree, second: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), first, second)


__all__ = ["CleanSample", "DenoisingLangevinGibbs", "DenoisingMCMC", "KarrasDenoise", "LevelState", "most_likely"]
