"""Energy-guided entropic neural optimal transport. Mokrov, Korotin, Kolesov, Gushchin, Burnaev 2024 (arXiv:2304.06094).

Entropic OT with any cost c and the entropy of the conditional plans, min_π E_π c(x, y) - ε E_x H(π(· | x)), has the dual

    max_f F(f) = -ε E_{x ~ p₀} log Z(f, x) + E_{y ~ p₁} f(y),   Z(f, x) = ∫ exp((f(y) - c(x, y))/ε) dy,

and f gives the plan μ_x(y) = exp((f(y) - c(x, y))/ε)/Z(f, x), with F(f*) - F(f) = ε KL(π* ‖ π_f). The gradient of F is that of an energy-based
model whose energy the cost tilts, E_{p₁} ∂f(y) - E_{p₀} E_{μ_x} ∂f(y), with draws of μ_x by Langevin's algorithm:

    y ← y + (η/2ε) ∇_y (f(y) - c(x, y)) + √η ξ,   ξ ~ N(0, I).

`EnergyGuidedLoss` starts its chains anew for each batch (short runs). `ReplayTraining` keeps them, beside the x each belongs to, and goes on from
there; on each visit a chain is replaced by a new one with probability 5 %. With cost ½|x - y|² the plan is the Schrödinger bridge's of √ε W.

- Authors' values: η = 0.01, 100 steps in training and 700 in use, a buffer of 10⁴, starts from N(0, I). Their network is η f/ε; here it is f itself.
- The authors' buffer drops its oldest entries for copies of drawn ones, so the x in it resample themselves and drift from p₀; here a chain goes on in
  its own place.
- The chain has no Metropolis correction: for a quadratic f - c of curvature P its variance is ε/P (1 - η P/4ε)⁻¹.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ..core.check import check_count, check_range
from ..core.types import PRNGKey, PyTree, Scalar


def half_squared_distance(x: Float[Array, "*x"], y: Float[Array, "*x"]) -> Float[Array, ""]:
    """½|x - y|²."""
    return jnp.sum((x - y) ** 2) / 2


def standard_normal_start(key: PRNGKey, x: Float[Array, "*x"]) -> Float[Array, "*x"]:
    """A draw of N(0, I)."""
    return jax.random.normal(key, (x.size,), x.dtype).reshape(x.shape)


class EnergyGuidedPlan(eqx.Module):
    """The plan of a potential f, on ONE example (`vmap` it over more).

    - `potential`: f, `y -> scalar`.
    - `epsilon`: ε > 0, in units of the cost.
    - `step_size`: η > 0, in units of y²; stable below 4 ε over the largest curvature of c - f.
    - `num_steps` (static): of a chain, default 100.
    - `cost`: `(x, y) -> scalar`, default ½|x - y|².
    - `start`: `(key, x) -> y`, where chains start; default N(0, I).

    Raises `ValueError` for ε or η that are not positive.
    """

    potential: Callable
    epsilon: Scalar
    step_size: Scalar = 0.01
    num_steps: int = eqx.field(static=True, default=100)
    cost: Callable = half_squared_distance
    start: Callable = standard_normal_start

    def __check_init__(self):
        check_range("epsilon", self.epsilon, low=0.0, open_low=True)
        check_range("step_size", self.step_size, low=0.0, open_low=True)
        check_count("num_steps", self.num_steps)

    def log_density(self, x: Float[Array, "*x"], y: Float[Array, "*y"]) -> Float[Array, ""]:
        """log μ_x(y) + log Z(f, x) = (f(y) - c(x, y))/ε."""
        return (self.potential(y) - self.cost(x, y)) / jnp.asarray(self.epsilon, y.dtype)

    def advance(self, key: PRNGKey, x: Float[Array, "*x"], y: Float[Array, "*y"]) -> Float[Array, "*y"]:
        """`num_steps` Langevin steps from y."""
        eta = jnp.asarray(self.step_size, y.dtype)

        def step(y, key):
            noise = jax.random.normal(key, (y.size,), y.dtype).reshape(y.shape)
            return y + eta / 2 * jax.grad(self.log_density, argnums=1)(x, y) + jnp.sqrt(eta) * noise, None

        return jax.lax.scan(step, y, jax.random.split(key, self.num_steps))[0]

    def sample(self, key: PRNGKey, x: Float[Array, "*x"]) -> Float[Array, "*y"]:
        """The end of a chain from `start`: y given x."""
        key_start, key_chain = jax.random.split(key)
        return self.advance(key_chain, x, self.start(key_start, x))


class EnergyGuidedLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, aux)`: mean f at the ends of fresh chains less mean f on the target. Its gradient is -∂F.

    - `model`: f, a network `y -> scalar` on ONE example.
    - `batch`: (x₀, x₁) of shapes (B, *x) and (B', *y), not paired.
    - Other fields: as in `EnergyGuidedPlan`.

    The value is not F, whose log Z nobody knows; aux has both means, "drawn" and "target". No gradient flows through the chains.
    """

    epsilon: Scalar
    step_size: Scalar = 0.01
    num_steps: int = eqx.field(static=True, default=100)
    cost: Callable = half_squared_distance
    start: Callable = standard_normal_start

    def plan(self, model: Callable) -> EnergyGuidedPlan:
        """The plan of a trained `model`."""
        return EnergyGuidedPlan(model, self.epsilon, self.step_size, self.num_steps, self.cost, self.start)

    def __call__(self, model: Callable, batch: tuple, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        x0, x1 = batch
        frozen = jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_array(leaf) else leaf, model)
        drawn = jax.vmap(self.plan(frozen).sample)(jax.random.split(key, x0.shape[0]), x0)
        return contrast(model, drawn, x1)


def contrast(model: Callable, drawn: Float[Array, "n *y"], target: Float[Array, "m *y"]) -> tuple[Float[Array, ""], dict]:
    """Mean f of what the plan drew less mean f of the target, and both."""
    drawn, target = (jnp.mean(jax.vmap(model)(jax.lax.stop_gradient(points))) for points in (drawn, target))
    return drawn - target, {"drawn": drawn, "target": target}


class ReplayState(NamedTuple):
    """What replayed training carries."""

    model: PyTree
    optimiser: PyTree
    x: Float[Array, "buffer *x"]
    y: Float[Array, "buffer *y"]
    step: Int[Array, ""]


class ReplayTraining(eqx.Module):
    """Training with kept chains, as a kernel for `core.iterate`: `init(model, rng_key)`, `step(rng_key, state) -> (state, aux)`.

    - `loss`: an `EnergyGuidedLoss`, for the plan; its `num_steps` are those between two visits of a chain.
    - `optimiser`: an optax transformation.
    - `data`: `batch(key, step) -> (x₀, x₁)`, such as `Minibatches`.
    - `buffer_size` (static): chains kept, default 10⁴, visited in turn, as many in a step as the batch has x₀.
    - `replay`: the probability that a chain goes on, default 0.95; else it starts anew, at the batch's x₀.

    Raises `ValueError` for a `replay` outside [0, 1], or a batch larger than the buffer.
    """

    loss: EnergyGuidedLoss
    optimiser: optax.GradientTransformation
    data: Callable
    buffer_size: int = eqx.field(static=True, default=10000)
    replay: Scalar = 0.95

    def __check_init__(self):
        check_count("buffer_size", self.buffer_size)
        check_range("replay", self.replay, low=0.0, high=1.0)

    def init(self, position: PyTree, rng_key: PRNGKey) -> ReplayState:
        """The state before the first step, with chains at their starts; `position` is the untrained model."""
        key_data, key_start = jax.random.split(rng_key)
        zero = jnp.zeros((), jnp.int32)
        size = jax.eval_shape(self.data, key_data, zero)[0].shape[0]
        if size > self.buffer_size:
            raise ValueError(f"`buffer_size` {self.buffer_size} is smaller than the batch, {size}.")
        x = jax.vmap(lambda key: self.data(key, zero)[0])(jax.random.split(key_data, -(-self.buffer_size // size)))
        x = x.reshape(-1, *x.shape[2:])[: self.buffer_size]
        y = jax.vmap(self.loss.start)(jax.random.split(key_start, self.buffer_size), x)
        return ReplayState(position, self.optimiser.init(eqx.filter(position, eqx.is_inexact_array)), x, y, zero)

    def step(self, rng_key: PRNGKey, state: ReplayState) -> tuple[ReplayState, dict[str, Array]]:
        """One update of the model, and the aux of its loss."""
        key_data, key_choice, key_start, key_chain = jax.random.split(rng_key, 4)
        x, target = self.data(key_data, state.step)
        size = x.shape[0]
        y = jax.vmap(self.loss.start)(jax.random.split(key_start, size), x)
        rows = (state.step * size + jnp.arange(size, dtype=state.step.dtype)) % self.buffer_size
        goes_on = jax.random.uniform(key_choice, (size,)) < self.replay
        x, y = (jnp.where(jnp.expand_dims(goes_on, range(1, new.ndim)), old[rows], new) for old, new in ((state.x, x), (state.y, y)))
        y = jax.vmap(self.loss.plan(state.model).advance)(jax.random.split(key_chain, size), x, y)
        (_, aux), gradient = eqx.filter_value_and_grad(contrast, has_aux=True)(state.model, y, target)
        params = eqx.filter(state.model, eqx.is_inexact_array)
        updates, optimiser = self.optimiser.update(gradient, state.optimiser, params)
        model = eqx.apply_updates(state.model, updates)
        return ReplayState(model, optimiser, state.x.at[rows].set(x), state.y.at[rows].set(y), state.step + 1), aux


__all__ = ["EnergyGuidedLoss", "EnergyGuidedPlan", "ReplayState", "ReplayTraining", "contrast", "half_squared_distance", "standard_normal_start"]
