"""Random steps with log-ratios: the blocks of stochastic normalising flows. Wu, Köhler, Noé 2020 (arXiv:2002.06707).

A block takes y_t to y_{t+1} ~ q_t(· | y_t), has a reverse kernel q̃_t(y_t | y_{t+1}), and says for each step

    ΔS_t = log q̃_t(y_t | y_{t+1}) - log q_t(y_{t+1} | y_t).

Sampling steps are made for densities p_λ on the way from a base (share λ = 0) to a target (λ = 1), usually p_λ ∝ p_Z^{1-λ} p_X^λ:

    a bijection             ΔS = log |det ∂y'/∂y|
    reversible (MH, HMC)    ΔS = log p_λ(y) - log p_λ(y')
    overdamped Langevin     y' = y + ε ∇log p_λ(y) + √(2ε) η,  η̃ = -√(ε/2) (∇log p_λ(y) + ∇log p_λ(y')) - η,  ΔS = (|η|² - |η̃|²)/2
    underdamped Langevin    likewise, see `UnderdampedLangevinBlock`

Reference code: noegroup/stochastic_normalizing_flows. There velocities pass from one underdamped block to the next; here each block draws its own
and integrates them out, so that all blocks act on x. `core.fit` trains step sizes and shares that are arrays; Python numbers stay as they are.
"""

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_count
from ..core.types import PRNGKey, Scalar
from .bijection import Bijection


class GeometricDensities(eqx.Module):
    """log p_λ = (1 - λ) `base`(x) + λ `target`(x), of two log-densities `x -> scalar`, as `(share, x) -> scalar`."""

    base: Callable
    target: Callable

    def __call__(self, share: Scalar, x: Float[Array, "*x"]) -> Float[Array, ""]:
        """log p_λ(x), not normalised."""
        share = jnp.asarray(share, x.dtype)
        return (1 - share) * self.base(x) + share * self.target(x)


class PathBlock(eqx.Module):
    """The socket: one random step of one example, and the step back, with their log-ratios. `densities` is `(share, x) -> log p_λ(x)`."""

    @abc.abstractmethod
    def forward(self, key: PRNGKey, x: Float[Array, "*x"], densities: Callable) -> tuple[Float[Array, "*x"], Float[Array, ""]]:
        """(y ~ q(· | x), ΔS)."""

    @abc.abstractmethod
    def inverse(self, key: PRNGKey, y: Float[Array, "*x"], densities: Callable) -> tuple[Float[Array, "*x"], Float[Array, ""]]:
        """(x ~ q̃(· | y), -ΔS)."""


class DeterministicBlock(PathBlock):
    """A `Bijection`, such as a `Chain` of `Coupling` layers."""

    bijection: Bijection

    def forward(self, key, x, densities):
        return self.bijection.forward(x)

    def inverse(self, key, y, densities):
        return self.bijection.inverse(y)


class BlockSequence(PathBlock):
    """Blocks one after the other: `forward` goes through `blocks` (one or more) in the order in which they are given."""

    blocks: tuple[PathBlock, ...]

    def __check_init__(self):
        check_count("the number of blocks", len(self.blocks))

    def forward(self, key, x, densities):
        return _in_turn([block.forward for block in self.blocks], key, x, densities)

    def inverse(self, key, y, densities):
        return _in_turn([block.inverse for block in self.blocks[::-1]], key, y, densities)


def _in_turn(moves, key, x, densities):
    total = _zero(x)
    for move, key_move in zip(moves, jax.random.split(key, len(moves))):
        x, change = move(key_move, x, densities)
        total = total + change
    return x, total


class ScannedBlocks(PathBlock):
    """Many blocks of one kind, compiled once: `blocks` is one block whose arrays have a leading axis, one entry for each step.

    For instance `ScannedBlocks(jax.vmap(lambda share: LangevinBlock(jnp.log(0.01), share))(jnp.linspace(0, 1, 100)))`.
    """

    blocks: PathBlock

    def forward(self, key, x, densities):
        return self._scan(key, x, densities, False)

    def inverse(self, key, y, densities):
        return self._scan(key, y, densities, True)

    def _scan(self, key, x, densities, backwards):
        arrays, rest = eqx.partition(self.blocks, eqx.is_array)

        def step(carry, inputs):
            x, total = carry
            key, arrays = inputs
            block = eqx.combine(arrays, rest)
            x, change = (block.inverse if backwards else block.forward)(key, x, densities)
            return (x, total + change), None

        count = jax.tree.leaves(arrays)[0].shape[0]
        return jax.lax.scan(step, (x, _zero(x)), (jax.random.split(key, count), arrays), reverse=backwards)[0]


class SamplingBlock(PathBlock):
    """Sampling steps for p_λ, λ = `share`. The reverse kernel is the kernel itself, so that both directions are one computation."""

    share: eqx.AbstractVar[Scalar]

    @abc.abstractmethod
    def move(self, key: PRNGKey, x: Float[Array, "*x"], log_density: Callable) -> tuple[Float[Array, "*x"], Float[Array, ""]]:
        """(y, log q(x | y) - log q(y | x)) for the density exp(`log_density`)."""

    def forward(self, key, x, densities):
        return self.move(key, x, lambda x: densities(self.share, x))

    def inverse(self, key, y, densities):
        return self.forward(key, y, densities)


class KernelBlock(SamplingBlock):
    """`num_steps` (static) steps of a Markov kernel in blackjax's socket that is reversible for its density, such as its HMC and NUTS.

    - `kernel`: `log_density -> kernel`, for instance `lambda log_density: blackjax.hmc(log_density, 0.1, jnp.ones(2), 5)`. Its states have the field
      `position`.
    - `share`: λ.
    """

    kernel: Callable
    share: Scalar
    num_steps: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        check_count("num_steps", self.num_steps)

    def move(self, key, x, log_density):
        kernel = self.kernel(log_density)
        keys = jax.random.split(key, self.num_steps)
        state, _ = jax.lax.scan(lambda state, key: (kernel.step(key, state)[0], None), kernel.init(x), keys)
        return state.position, log_density(x) - log_density(state.position)


class MetropolisBlock(SamplingBlock):
    """`num_steps` (static) steps of random walk Metropolis with proposals N(x, s² I), s = exp(`log_step_size`), a scalar or of the shape of x."""

    log_step_size: Scalar | Float[Array, "*x"]
    share: Scalar
    num_steps: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        check_count("num_steps", self.num_steps)

    def move(self, key, x, log_density):
        scale = _step_size(self.log_step_size, x)

        def step(state, key):
            key_noise, key_accept = jax.random.split(key)
            proposal = state[0] + scale * jax.random.normal(key_noise, x.shape, x.dtype)
            return accept(key_accept, state, (proposal, log_density(proposal)), 0), None

        start = log_density(x)
        (y, end), _ = jax.lax.scan(step, (x, start), jax.random.split(key, self.num_steps))
        return y, start - end


class HMCBlock(SamplingBlock):
    """`num_steps` (static) steps of Hamiltonian Monte Carlo, each of `num_leapfrog` (static) leapfrog steps of size exp(`log_step_size`)."""

    log_step_size: Scalar | Float[Array, "*x"]
    share: Scalar
    num_leapfrog: int = eqx.field(static=True, default=10)
    num_steps: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        check_count("num_leapfrog", self.num_leapfrog)
        check_count("num_steps", self.num_steps)

    def move(self, key, x, log_density):
        scale, value_and_grad = _step_size(self.log_step_size, x), jax.value_and_grad(log_density)

        def leapfrog(state, _):
            y, velocity, _, force = state
            velocity = velocity + scale / 2 * force
            y = y + scale * velocity
            value, force = value_and_grad(y)
            return (y, velocity + scale / 2 * force, value, force), None

        def step(state, key):
            key_velocity, key_accept = jax.random.split(key)
            x, value, force = state
            velocity = jax.random.normal(key_velocity, x.shape, x.dtype)
            (y, end, *there), _ = jax.lax.scan(leapfrog, (x, velocity, value, force), length=self.num_leapfrog)
            return accept(key_accept, state, (y, *there), (jnp.sum(velocity**2) - jnp.sum(end**2)) / 2), None

        start, force = value_and_grad(x)
        (y, end, _), _ = jax.lax.scan(step, (x, start, force), jax.random.split(key, self.num_steps))
        return y, start - end


class LangevinBlock(SamplingBlock):
    """`num_steps` (static) steps of overdamped Langevin dynamics, none rejected; ε = exp(`log_step_size`), a scalar or of the shape of x."""

    log_step_size: Scalar | Float[Array, "*x"]
    share: Scalar
    num_steps: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        check_count("num_steps", self.num_steps)

    def move(self, key, x, log_density):
        epsilon, gradient = _step_size(self.log_step_size, x), jax.grad(log_density)

        def step(state, key):
            x, force, total = state
            noise = jax.random.normal(key, x.shape, x.dtype)
            y = x + epsilon * force + jnp.sqrt(2 * epsilon) * noise
            new_force = gradient(y)
            reverse = -jnp.sqrt(epsilon / 2) * (force + new_force) - noise
            return (y, new_force, total + (jnp.sum(noise**2) - jnp.sum(reverse**2)) / 2), None

        (y, _, total), _ = jax.lax.scan(step, (x, gradient(x), _zero(x)), jax.random.split(key, self.num_steps))
        return y, total


class UnderdampedLangevinBlock(SamplingBlock):
    """`num_steps` (static) steps of Langevin dynamics with unit mass, h = exp(`log_step_size`) and friction γ, in the scheme of Brünger et al. 1984:

        v' = v + (h/2) (∇log p_λ(x) - γ v) + √(γh) η₁,    y = x + h v',    w = (v' + (h/2) ∇log p_λ(y) + √(γh) η₂)/(1 + γh/2)

    from v ~ N(0, I). Backwards, with velocities reversed, the noises are η₂ - √(γh) w and η₁ - √(γh) v, so a step has

        ΔS = (|η₁|² + |η₂|² - |η₂ - √(γh) w|² - |η₁ - √(γh) v|²)/2,

    to which the block adds log N(w; 0, I) - log N(v; 0, I) of its last and first velocity. `friction` is γ >= 0, default 1.
    """

    log_step_size: Scalar | Float[Array, "*x"]
    share: Scalar
    friction: Scalar = 1.0
    num_steps: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        check_count("num_steps", self.num_steps)

    def move(self, key, x, log_density):
        h, gradient = _step_size(self.log_step_size, x), jax.grad(log_density)
        friction = jnp.asarray(self.friction, x.dtype)
        kick = jnp.sqrt(friction * h)
        key_velocity, key = jax.random.split(key)
        velocity = jax.random.normal(key_velocity, x.shape, x.dtype)

        def step(state, key):
            x, v, force, total = state
            first, second = jax.random.normal(key, (2, *x.shape), x.dtype)
            half = v + h / 2 * (force - friction * v) + kick * first
            y = x + h * half
            new_force = gradient(y)
            w = (half + h / 2 * new_force + kick * second) / (1 + friction * h / 2)
            change = first**2 + second**2 - (second - kick * w) ** 2 - (first - kick * v) ** 2
            return (y, w, new_force, total + jnp.sum(change) / 2), None

        start = (x, velocity, gradient(x), _zero(x))
        (y, end, _, total), _ = jax.lax.scan(step, start, jax.random.split(key, self.num_steps))
        return y, total + jnp.sum(velocity**2 - end**2) / 2


def _zero(x):
    return jnp.sum(jnp.zeros_like(x))


def _step_size(log_step_size, x):
    return jnp.exp(jnp.asarray(log_step_size, x.dtype))


def accept(key, state, proposal, correction):
    """`proposal` or `state`, two tuples (position, log-density, …), by the Metropolis rule; `correction` is added to the log-ratio of densities."""
    accepted = -jax.random.exponential(key, (), state[1].dtype) < proposal[1] - state[1] + correction
    return jax.tree.map(lambda new, old: jnp.where(accepted, new, old), proposal, state)


__all__ = [
    "BlockSequence",
    "DeterministicBlock",
    "GeometricDensities",
    "HMCBlock",
    "KernelBlock",
    "LangevinBlock",
    "MetropolisBlock",
    "PathBlock",
    "SamplingBlock",
    "ScannedBlocks",
    "UnderdampedLangevinBlock",
    "accept",
]
