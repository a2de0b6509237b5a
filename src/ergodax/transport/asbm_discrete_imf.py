"""Adversarial Schrödinger bridge matching: discrete-time iterative Markovian fitting (D-IMF). Gushchin, Selikhanovych, Kholkin, Burnaev, Korotin 2024
(arXiv:2405.14449).

The Schrödinger bridge between p₀ and p₁, seen only at times 0 = t_0 < … < t_N = 1, is the one law that is both

    reciprocal   q(x_{t_1}, …, x_{t_{N-1}} | x₀, x₁) = the reference's bridge                  (projection: keep the ends, redraw what is between)
    Markovian    q = q(x₀) Π_k q(x_{t_{k+1}} | x_{t_k}), equally backwards                     (projection: keep the one-step transitions)

with the right ends, and D-IMF, the two projections in turn from any coupling of p₀ and p₁, converges to it; few steps do (N = 4 in the paper's
experiments), more only save rounds. N counts steps here; the paper's N inner points are N + 1 steps.

`GaussianIMF` is the whole iteration between Gaussians, in closed form. Between samples, the Markovian projection is learned. With a generator
x̂₁ = G(t_k, x_{t_k}, z) and a draw from the reference's bridge from x_{t_k} to x̂₁, which is `TerminalTransition`, either

 - `AdversarialLoss`: a conditional GAN (non-saturating, with the penalty R1 of Mescheder, Geiger, Nowozin 2018, arXiv:1801.04406) whose discriminator
   sees pairs of neighbouring states, the paper's, after DD-GAN (Xiao, Kreis, Vahdat 2022, arXiv:2112.07804); or
 - `EnergyScoreLoss`: no adversary. The energy score (Gneiting, Raftery 2007) is strictly proper, so its minimiser draws x₁ from its law
   given x_{t_k}, and then the steps are exact.

Training: first the forward chain on batches (x₀, x₁) of an independent or optimal coupling, then `Alternation` of two `Learner`s with
`SimulatedPairs`, through `core.iterate`: each chain learns from pairs with one end from the data and the other drawn by the other chain.

Deviations: both players of the GAN take one step together; the optimiser starts anew in each round. The energy score is ours.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..core.batch import given_pairs
from ..core.check import check_increasing, check_range
from ..core.types import PRNGKey, Scalar
from .discrete_bridge import TerminalTransition
from .gaussian_bridge import GaussianBridge
from .sde import draw


class GaussianIMF(eqx.Module):
    """D-IMF between two Gaussians, as a kernel for `core.iterate`; the state is the cross-covariance Cov(x₀, x₁), (d, d).

    - `bridge`: a `GaussianBridge`: the ends, the reference, and the limit.
    - `times`: (N + 1,) from 0 to 1; N = 1 never moves.

        rounds = GaussianIMF(bridge, times)
        cross = iterate(key, rounds.step, rounds.init(), 20)
    """

    bridge: GaussianBridge
    times: Float[Array, " n"]

    def __check_init__(self):
        check_increasing("times", self.times)
        check_range("times", self.times, low=0.0, high=1.0)

    def init(self, cross: Float[Array, "d d"] | None = None) -> Float[Array, "d d"]:
        """The coupling to start from (default: independent). The joint covariance must be positive definite."""
        return jnp.zeros_like(self.bridge.cov0) if cross is None else cross

    def step(self, key: PRNGKey | None, cross: Float[Array, "d d"]) -> tuple[Float[Array, "d d"], Float[Array, ""]]:
        """One round, and the KL divergence from the plan it leads to to the bridge's. `key` is not used."""
        cross = self.project(cross)
        return cross, self.kl(cross)

    def transitions(self, cross: Float[Array, "d d"]) -> tuple[Float[Array, "n d d"], Float[Array, "steps d d"]]:
        """Covariances C(t_k, t_k) at all N + 1 times, and C(t_k, t_{k+1}) over all N steps, of the reciprocal process of a coupling."""
        reference, (cov0, cov1) = self.bridge.reference, (self.bridge.cov0, self.bridge.cov1)
        zero = jnp.zeros_like(cov0[0, 0])

        def shares(t, start, end):
            # x_t = a x_start + b x_end + shift + √v z
            shift, variance = reference.bridge(t, zero, zero, start, end)
            return *(reference.bridge(t, *ends, start, end)[0] - shift for ends in ((zero + 1, zero), (zero, zero + 1))), variance

        def at(t):
            a, b, variance = shares(t, 0.0, 1.0)
            own = a**2 * cov0 + b**2 * cov1 + a * b * (cross + cross.T) + variance * jnp.eye(cov0.shape[0], dtype=cov0.dtype)
            return own, a * cov0 + b * cross  # and Cov(x₀, x_t)

        def between(s, t, own, with_source):
            a, b, _ = shares(s, 0.0, t)
            return a * with_source + b * own

        times = self.times.astype(cov0.dtype)
        own, with_source = jax.vmap(at)(times)
        return own, jax.vmap(between)(times[:-1], times[1:], own[1:], with_source[1:])

    def project(self, cross: Float[Array, "d d"]) -> Float[Array, "d d"]:
        """The cross-covariance after a reciprocal and a Markovian projection: C₀ Π_k C(t_k, t_k)⁻¹ C(t_k, t_{k+1})."""
        own, neighbours = self.transitions(cross)
        gains = jnp.linalg.solve(own[:-1], neighbours)
        return jax.lax.scan(lambda product, gain: (product @ gain, None), self.bridge.cov0 @ gains[0], gains[1:])[0]

    def kl(self, cross: Float[Array, "d d"]) -> Float[Array, ""]:
        """KL(q ‖ bridge) of the Gaussian coupling of the two ends with this cross-covariance, in nats. As processes they differ by the same."""
        joint, limit = (jnp.block([[self.bridge.cov0, c], [c.T, self.bridge.cov1]]) for c in (cross, self.bridge.cross_covariance()))
        ratio = jnp.linalg.solve(limit, joint)
        return (jnp.trace(ratio) - joint.shape[0] - jnp.linalg.slogdet(ratio)[1]) / 2


class AdversarialTransition(eqx.Module):
    """The two players of one direction.

    - `chain`: a `TerminalTransition` whose network `(t, x, z)` is the generator.
    - `discriminator`: `(t, next state, state) -> logit`, a scalar, with t and state where the step starts; large for true steps.

    In a `Learner`, `trainable=lambda m: (m.chain.network, m.discriminator)`.
    """

    chain: TerminalTransition
    discriminator: Callable

    @property
    def forward(self) -> bool:
        """The chain's direction."""
        return self.chain.forward

    def sample(self, key: PRNGKey, start: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """The chain's far end, for `SimulatedPairs`."""
        return self.chain.sample(key, start)


def reciprocal_step(
    chain: TerminalTransition, key: PRNGKey, x0: Float[Array, "*x"], x1: Float[Array, "*x"]
) -> tuple[Int[Array, ""], Float[Array, "*x"], Float[Array, "*x"]]:
    """(k, state, next state): one step of a chain's grid, k uniform, drawn from the reference's bridge between two given ends. On one example."""
    key_interval, key_state, key_next = jax.random.split(key, 3)
    k = jax.random.randint(key_interval, (), 0, chain.times.shape[0] - 1)
    start, stop = (chain.times[i].astype(x0.dtype) for i in chain.ends(k))
    first, last = chain.times[0].astype(x0.dtype), chain.times[-1].astype(x0.dtype)
    state = draw(key_state, *chain.reference.bridge(start, x0, x1, first, last))
    bounds = (state, x1, start, last) if chain.forward else (x0, state, first, start)
    return k, state, draw(key_next, *chain.reference.bridge(stop, *bounds))


def _pairs(loss, batch, key):
    """The batch's ends, coupled, and a key for each example."""
    x0, x1 = batch
    if x0.shape != x1.shape or x0.ndim < 1:
        raise ValueError(f"x₀ and x₁ must have one shape (batch, *example), got {x0.shape} and {x1.shape}.")
    key_coupling, key = jax.random.split(key)
    return loss.coupling(key_coupling, x1, x0, None), x1, jax.random.split(key, x0.shape[0])


class AdversarialLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, aux)`: both players at once, each with the other held still, so that one optimiser trains both.

    - `model`: an `AdversarialTransition`. Rates of its parts differ by `optax.multi_transform`.
    - `batch`: (x₀, x₁) of shape (B, *x) each.
    - `r1`: weight of the penalty r1/2 E‖∇ D‖² on true next states (default 0.01, the authors' in two dimensions).
    - `coupling`: `(key, x₁, x₀, args) -> x₀` (default `given_pairs`), for the first fit on unpaired batches.

    `generator` and `discriminator` are the two losses apart, for alternating steps. Raises `ValueError` for pairs of unequal shape.
    """

    r1: Scalar = 0.01
    coupling: Callable = given_pairs

    def __check_init__(self):
        check_range("r1", self.r1, low=0.0)

    def generator(self, model: AdversarialTransition, batch: tuple, key: PRNGKey) -> Float[Array, ""]:
        """E softplus(-D(false step)): non-saturating."""

        def one(key, x0, x1):
            key_true, key_false = jax.random.split(key)
            k, state, _ = reciprocal_step(model.chain, key_true, x0, x1)
            return jax.nn.softplus(-_logit(model, k, model.chain.step(key_false, k, state), state))

        x0, x1, keys = _pairs(self, batch, key)
        return jnp.mean(jax.vmap(one)(keys, x0, x1))

    def discriminator(self, model: AdversarialTransition, batch: tuple, key: PRNGKey) -> Float[Array, ""]:
        """E softplus(-D(true step)) + E softplus(D(false step)) + r1/2 E‖∇ D(true step)‖²."""

        def one(key, x0, x1):
            key_true, key_false = jax.random.split(key)
            k, state, true = reciprocal_step(model.chain, key_true, x0, x1)
            logit, slope = jax.value_and_grad(lambda x: _logit(model, k, x, state))(true)
            false = _logit(model, k, model.chain.step(key_false, k, state), state)
            return jax.nn.softplus(-logit) + jax.nn.softplus(false) + jnp.asarray(self.r1 / 2, logit.dtype) * jnp.sum(slope**2)

        x0, x1, keys = _pairs(self, batch, key)
        return jnp.mean(jax.vmap(one)(keys, x0, x1))

    def __call__(self, model: AdversarialTransition, batch: tuple, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """Their sum; `aux` has both."""
        generator = self.generator(eqx.tree_at(lambda m: m.discriminator, model, _still(model.discriminator)), batch, key)
        discriminator = self.discriminator(eqx.tree_at(lambda m: m.chain, model, _still(model.chain)), batch, key)
        return generator + discriminator, {"generator": generator, "discriminator": discriminator}


class EnergyScoreLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, {})`: E‖x̂ - x‖ - ½ E‖x̂ - x̂'‖ for two draws x̂, x̂' of the far end given one state, and its true value x.

    - `model`: a `TerminalTransition`; its network is called twice an example.
    - `batch`, `coupling`: as in `AdversarialLoss`.
    """

    coupling: Callable = given_pairs

    def __call__(self, model: TerminalTransition, batch: tuple, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""

        def one(key, x0, x1):
            key_true, key_noise = jax.random.split(key)
            k, state, _ = reciprocal_step(model, key_true, x0, x1)
            t = model.times[model.ends(k)[0]].astype(state.dtype)
            draws = jax.vmap(lambda z: model.network(t, state, z))(jax.random.normal(key_noise, (2, *state.shape), state.dtype))
            far = x1 if model.forward else x0
            return (_norm(draws[0] - far) + _norm(draws[1] - far) - _norm(draws[0] - draws[1])) / 2

        x0, x1, keys = _pairs(self, batch, key)
        return jnp.mean(jax.vmap(one)(keys, x0, x1)), {}


def _logit(model, k, after, state):
    return model.discriminator(model.chain.times[model.chain.ends(k)[0]].astype(state.dtype), after, state)


def _still(part):
    return jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_inexact_array(leaf) else leaf, part)


def _norm(x):
    # with gradient 0 at 0
    square = jnp.sum(x**2)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


__all__ = ["AdversarialLoss", "AdversarialTransition", "EnergyScoreLoss", "GaussianIMF", "reciprocal_step"]
