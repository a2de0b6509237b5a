"""Bridges as Markov chains on a grid of times, learned one direction at a time: the models of `sdsb` and `asbm_discrete_imf`, and their alternation.

A `Transition` is the kernel of a chain over `times` t_0 < … < t_N, run forwards from x_{t_0} or backwards from x_{t_N}. `Alternation` trains a
forward and a backward chain in turn, each on what the other draws: iterative proportional fitting if a chain learns the other's reversed steps,
iterative Markovian fitting if it learns the steps of the reference's own bridges between the other's ends.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ..core.check import check_count, check_increasing
from ..core.fit import fit
from ..core.types import PRNGKey, PyTree, VectorField
from .reference import LinearReference
from .sde import draw


class Transition(eqx.Module):
    """The socket: one direction's kernel. All methods are on ONE example (`vmap` for batches); `k` = 0 … N-1 numbers the intervals in time order.

    - `network`: called as `(t, x, z)` with t and x where the step starts and z fresh standard noise like x; it may ignore z.
    - `times`: (N + 1,), increasing.
    - `forward` (static): whether steps go from t_k to t_{k+1} or back.
    """

    network: eqx.AbstractVar[VectorField]
    times: eqx.AbstractVar[Float[Array, " n"]]
    forward: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def moments(self, k: Int[Array, ""], x: Float[Array, "*x"], z: Float[Array, "*x"]) -> tuple[Float[Array, "*x"], Float[Array, ""]]:
        """Mean and variance (one number) of the step over interval k from `x`, given the network's noise z."""

    @abc.abstractmethod
    def target(self, k: Int[Array, ""], path: Float[Array, "n *x"]) -> Float[Array, "*x"]:
        """What the network is regressed on over interval k of a given path (in time order)."""

    def ends(self, k: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """Grid indices where the step over interval k starts and stops."""
        return (k, k + 1) if self.forward else (k + 1, k)

    def step(self, key: PRNGKey, k: Int[Array, ""], x: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """One draw of the state after interval k."""
        key_network, key_noise = jax.random.split(key)
        return draw(key_noise, *self.moments(k, x, jax.random.normal(key_network, x.shape, x.dtype)))

    def sample_path(self, key: PRNGKey, start: Float[Array, "*x"]) -> Float[Array, "n *x"]:
        """All N + 1 states in time order, `start` first for a forward chain and last for a backward one."""
        end, others = self._run(key, start, lambda x: x)
        return jnp.concatenate([others, end[None]] if self.forward else [end[None], others])

    def sample(self, key: PRNGKey, start: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """The state at the other end; nothing between is stored."""
        return self._run(key, start, lambda x: None)[0]

    def _run(self, key, start, save):
        ks = jnp.arange(self.times.shape[0] - 1)
        body = lambda x, k: (self.step(jax.random.fold_in(key, k), k, x), save(x))  # noqa: E731
        return jax.lax.scan(body, start, ks, reverse=not self.forward)


class TerminalTransition(Transition):
    """The network predicts the far end, x_{t_N} (forward) or x_{t_0} (backward), and the step is drawn from the reference's bridge to it.

    With a network that ignores z: TR-DSB of Tang et al. 2024, where x̂ is a mean. With a generator, exact if it draws from the law of the far end
    given x_t: the generator of ASBM (Gushchin et al. 2024), after DD-GAN (Xiao, Kreis, Vahdat 2022, arXiv:2112.07804).
    `reference`: a `LinearReference`, such as `Brownian(epsilon)`.
    """

    network: VectorField
    reference: LinearReference  # pyrefly: ignore[bad-class-definition]  # an AbstractVar is no field
    times: Float[Array, " n"]
    forward: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        check_increasing("times", self.times)

    def moments(self, k, x, z):
        start, stop = (self.times[i].astype(x.dtype) for i in self.ends(k))
        far = self.network(start, x, z)
        if self.forward:
            mean, variance = self.reference.bridge(stop, x, far, start, self.times[-1].astype(x.dtype))
        else:
            mean, variance = self.reference.bridge(stop, far, x, self.times[0].astype(x.dtype), start)
        return mean.astype(x.dtype), variance

    def target(self, k, path):
        return path[-1] if self.forward else path[0]


class SimulatedPaths(eqx.Module):
    """`simulate(chain) -> batch(key, step) -> paths` for `Learner`: `batch_size` fresh paths of a chain, (B, N + 1, *x) in time order.

    `law`: where the chain starts, with `sample(key, n)`: `Samples`, a `GaussianMixture`, ….
    """

    law: Any
    batch_size: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("batch_size", self.batch_size)

    def __call__(self, chain: Transition) -> Callable:
        """The batches of one chain."""

        def batch(key, step):
            key_law, key_chain = jax.random.split(key)
            keys = jax.random.split(key_chain, self.batch_size)
            return jax.vmap(chain.sample_path)(keys, self.law.sample(key_law, self.batch_size))

        return batch


class SimulatedPairs(eqx.Module):
    """`simulate(chain) -> batch(key, step) -> (x₀, x₁)`: the two ends only, of `batch_size` fresh paths. `law` as in `SimulatedPaths`."""

    law: Any
    batch_size: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("batch_size", self.batch_size)

    def __call__(self, chain: Transition) -> Callable:
        """The batches of one chain."""

        def batch(key, step):
            key_law, key_chain = jax.random.split(key)
            start = self.law.sample(key_law, self.batch_size)
            end = jax.vmap(chain.sample)(jax.random.split(key_chain, self.batch_size), start)
            return (start, end) if chain.forward else (end, start)

        return batch


class Learner(eqx.Module):
    """`learn(key, model, other) -> model`: `core.fit` of one model to what the other draws.

    - `loss`: `loss(model, batch, key) -> (scalar, aux)`.
    - `optimiser`: an optax transformation, started anew each time.
    - `simulate`: `other -> batch(key, step)`, such as `SimulatedPaths`.
    - `num_steps` (static): optimiser steps.
    - `ema_decay`: as in `core.Fit`; the averaged model is what comes back.
    - `trainable` (static): which part of the model learns, as in `equinox.tree_at`; by default its `network`, so that the times and the reference
      stay as they are under any optimiser.
    """

    loss: Callable
    optimiser: optax.GradientTransformation
    simulate: Callable
    num_steps: int = eqx.field(static=True)
    ema_decay: Any = None
    trainable: Callable = eqx.field(static=True, default=lambda model: model.network)

    def __check_init__(self):
        check_count("num_steps", self.num_steps)

    def __call__(self, key: PRNGKey, model: PyTree, other: PyTree) -> PyTree:
        """The model, trained."""
        put = lambda part: eqx.tree_at(self.trainable, model, part)  # noqa: E731
        loss = lambda part, batch, key: self.loss(put(part), batch, key)  # noqa: E731
        data = self.simulate(other)
        fitted = fit(loss, self.trainable(model), self.optimiser, data, key, num_steps=self.num_steps, ema_decay=self.ema_decay)
        return put(fitted.average)


class AlternationState(NamedTuple):
    """The arrays of both models (`None` elsewhere): what a scan carries, and what checkpoints."""

    forward: PyTree
    backward: PyTree


class Alternation(eqx.Module):
    """A kernel for `core.iterate`: each round the backward model learns from the forward one, then the forward model from the backward one.

    - `forward`, `backward`: the models to start with; only `forward` matters if learning forgets where it began. For the Schrödinger bridge,
      `forward` is the reference, or a chain trained on some coupling.
    - `learn_forward`, `learn_backward`: `(key, model, other) -> model`, such as `Learner`.

        rounds = Alternation(forward, backward, learn_forward, learn_backward)
        forward, backward = rounds.models(iterate(key, rounds.step, rounds.init(), 20))
    """

    forward: PyTree
    backward: PyTree
    learn_forward: Callable
    learn_backward: Callable

    def init(self) -> AlternationState:
        """Before the first round."""
        return AlternationState(*(eqx.filter(model, eqx.is_array) for model in (self.forward, self.backward)))

    def step(self, key: PRNGKey, state: AlternationState) -> tuple[AlternationState, AlternationState]:
        """One round; the second value is the new state again, for `save`."""
        key_backward, key_forward = jax.random.split(key)
        forward, backward = self.models(state)
        backward = self.learn_backward(key_backward, backward, forward)
        forward = self.learn_forward(key_forward, forward, backward)
        state = AlternationState(*(eqx.filter(model, eqx.is_array) for model in (forward, backward)))
        return state, state

    def models(self, state: AlternationState) -> tuple[PyTree, PyTree]:
        """The two models, whole."""
        rest = (eqx.filter(model, eqx.is_array, inverse=True) for model in (self.forward, self.backward))
        forward, backward = (eqx.combine(arrays, other) for arrays, other in zip(state, rest, strict=True))
        return forward, backward


__all__ = [
    "Alternation",
    "AlternationState",
    "Learner",
    "SimulatedPairs",
    "SimulatedPaths",
    "TerminalTransition",
    "Transition",
]
