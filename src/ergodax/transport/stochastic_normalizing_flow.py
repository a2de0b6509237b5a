"""Stochastic normalising flows: a flow of deterministic maps with sampling steps in between. Wu, Köhler, Noé 2020 (arXiv:2002.06707).

A draw z of a base density p_Z goes through the blocks of `ergodax.transport.path_blocks`, each with its log-ratio ΔS. The weight of the path to x,

    log w = log p_X(x) - log p_Z(z) + Σ ΔS_t,

needs no marginal of the flow, and is exact for blocks of any quality:

    E[w] = ∫ p_X,   E[w O(x)]/E[w] = E_X[O],   J_KL = -E[log w] >= -log ∫ p_X.

Run backwards from data, the flow gives log p_Z(z) - Σ ΔS_t: J_ML is minus its mean, and its exponential has the mean p(x), the flow's own density.
Without bijections, and with reversible steps only, w is the weight of annealed importance sampling (Neal 2001).

Accept steps are differentiated pathwise, as in the paper: the gradient of J_KL lacks the part of the acceptance probability.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_count
from ..core.types import PRNGKey, PyTree
from .path_blocks import GeometricDensities, PathBlock, accept


class WeightedSample(NamedTuple):
    """A point and the logarithm of its weight."""

    position: Float[Array, "*x"]
    log_weight: Float[Array, ""]


class StochasticNormalizingFlow(eqx.Module):
    """Blocks on a base density, for one example; `vmap` over keys or points for many.

    - `block`: a `PathBlock`, mostly a `BlockSequence` or `ScannedBlocks`.
    - `base`: any object with `sample(key) -> z` and `log_prob(z) -> scalar`, normalised, such as `StandardNormal`. The losses below do not
      train it: a step on the weights of a mixture, say, would leave it unnormalised.
    - `densities`: `(base log-density, target log-density) -> ((share, x) -> log p_λ(x))`, default `GeometricDensities`.

    The target is an argument, not a field: `log_target` is `x -> log p_X(x)`, up to a number, and is not trained with the flow.
    """

    block: PathBlock
    base: Any
    densities: Callable = GeometricDensities

    def sample(self, key: PRNGKey, log_target: Callable) -> WeightedSample:
        """x and log w: one path, forwards."""
        key_base, key_path = jax.random.split(key)
        z = self.base.sample(key_base)
        x, change = self.block.forward(key_path, z, self.densities(self.base.log_prob, log_target))
        return WeightedSample(x, log_target(x) - self.base.log_prob(z) + change)

    def path_log_prob(self, key: PRNGKey, x: Float[Array, "*x"], log_target: Callable) -> Float[Array, ""]:
        """log p_Z(z) - Σ ΔS of one path, backwards from `x`: the mean of its exponential is the flow's density at `x`."""
        z, change = self.block.inverse(key, x, self.densities(self.base.log_prob, log_target))
        return self.base.log_prob(z) + change


def _with_fixed_base(model: StochasticNormalizingFlow) -> StochasticNormalizingFlow:
    fixed = jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_array(leaf) else leaf, model.base)
    return eqx.tree_at(lambda model: model.base, model, fixed)


class PathKLLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {})`: J_KL = -E[log w] over `num_paths` (static) paths of a flow. `batch` is not read."""

    log_target: Callable
    num_paths: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("num_paths", self.num_paths)

    def __call__(self, model: StochasticNormalizingFlow, batch: PyTree, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss."""
        model = _with_fixed_base(model)
        samples = jax.vmap(lambda key: model.sample(key, self.log_target))(jax.random.split(key, self.num_paths))
        return -jnp.mean(samples.log_weight), {}


class PathLikelihoodLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {})`: J_ML = -E[log p_Z(z) - Σ ΔS], one path back from each row of `batch`, (n, *x).

    The paper's mix is `share * likelihood(model, batch, key)[0] + (1 - share) * kl(model, batch, key)[0]`.
    """

    log_target: Callable

    def __call__(self, model: StochasticNormalizingFlow, batch: Float[Array, "n *x"], key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss."""
        model, keys = _with_fixed_base(model), jax.random.split(key, batch.shape[0])
        return -jnp.mean(jax.vmap(lambda key, x: model.path_log_prob(key, x, self.log_target))(keys, batch)), {}


class PathMetropolis(eqx.Module):
    """A flow as a Markov kernel in blackjax's socket that keeps the target: independent proposals x' of paths, accepted with min(1, w'/w).

    Andrieu, Doucet, Holenstein 2010 (particle Markov chain Monte Carlo), their independent sampler with one particle.
    """

    flow: StochasticNormalizingFlow
    log_target: Callable

    def init(self, position: Float[Array, "*x"], rng_key: PRNGKey) -> WeightedSample:
        """`position` with the weight of a path that is drawn backwards from it: `rng_key` is needed."""
        return WeightedSample(position, self.log_target(position) - self.flow.path_log_prob(rng_key, position, self.log_target))

    def step(self, rng_key: PRNGKey, state: WeightedSample) -> tuple[WeightedSample, WeightedSample]:
        """The new state; the info is the proposal."""
        key_path, key_accept = jax.random.split(rng_key)
        proposal = self.flow.sample(key_path, self.log_target)
        return WeightedSample(*accept(key_accept, tuple(state), tuple(proposal), 0)), proposal


def log_mean_weight(log_weights: Float[Array, " n"]) -> Float[Array, ""]:
    """log (1/n) Σ w: of paths of a flow, the estimate of log ∫ p_X."""
    return jax.nn.logsumexp(log_weights) - jnp.log(jnp.asarray(log_weights.size, log_weights.dtype))


def weighted_mean(log_weights: Float[Array, " n"], values: Float[Array, "n *value"]) -> Float[Array, "*value"]:
    """Σ w O/Σ w, an estimate of E_X[O] with a bias of order 1/n."""
    return jnp.tensordot(jax.nn.softmax(log_weights), values, axes=1)


def effective_sample_size(log_weights: Float[Array, " n"]) -> Float[Array, ""]:
    """(Σ w)²/Σ w², Kish's: between 1 and n."""
    return jnp.exp(2 * jax.nn.logsumexp(log_weights) - jax.nn.logsumexp(2 * log_weights))


__all__ = [
    "PathKLLoss",
    "PathLikelihoodLoss",
    "PathMetropolis",
    "StochasticNormalizingFlow",
    "WeightedSample",
    "effective_sample_size",
    "log_mean_weight",
    "weighted_mean",
]
