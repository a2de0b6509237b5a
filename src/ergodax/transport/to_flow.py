"""TO-FLOW: continuous normalising flows whose evolution time is learned with the network. Du, Luo, Chen, Xu, Zeng 2022 (arXiv:2203.10335).

A flow dx/dt = u(t, x) takes the base density at t = 1 - T to the data at t = 1. Seen from a data point, in the elapsed time s = 1 - t,

    dz/ds = f(s, z) = -u(1 - s, z),   z(0) = x,   log p(x) = log p₀(z(T)) + ∫₀ᵀ ∇·f ds,

which is the paper's orientation. T is a parameter too. With an optional kinetic term of weight κ (RNODE, Finlay et al. 2020, arXiv:2002.02798)

    J(θ, T) = E[-log p(x) + κ ∫₀ᵀ |f|² ds] + α R(T),
    ∂J/∂T   = E[-∇log p₀(z(T)) · f(T, z(T)) - ∇·f(T, z(T)) + κ |f(T, z(T))|²] + α R'(T):

the speed with which the objective moves at the end, read off there without a further solve. It is minimised by coordinate descent: K steps of the
network at fixed T, one step of T, clipped in size and range.

    model = TOFlow(velocity, StandardNormal((2,)))
    optimiser = coordinate_descent(optax.adam(1e-3), optax.sgd(0.1), lambda model: model.duration)
    fitted = fit(TOFlowLoss(alpha=0.1), model, optimiser, data, key, num_steps=2000, batch_size=256)

Deviations: `core.fit` takes the gradient of all parameters in a step of T too. R(T) is a plug, T² by default, and the numbers below are ours.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ..core.check import check_count, check_range
from ..core.likelihood import ExactDivergence, HutchinsonDivergence
from ..core.loop import integrate
from ..core.types import PRNGKey, PyTree, Scalar, VectorField


class AdaptiveSolve(eqx.Module):
    """`(field, start, t0, t1) -> (end, number of steps)` with error control: what makes a simpler flow cheaper.

    - `solver`: default `Tsit5`. `rtol`, `atol`: default 1e-5. `max_steps` (static): more than that raise an error.
    - `adjoint`: of `diffrax`; default `RecursiveCheckpointAdjoint`, exact for the steps taken. `BacksolveAdjoint` is the paper's.
    """

    solver: dfx.AbstractSolver = dfx.Tsit5()
    rtol: Scalar = 1e-5
    atol: Scalar = 1e-5
    max_steps: int = eqx.field(static=True, default=1024)
    adjoint: dfx.AbstractAdjoint = dfx.RecursiveCheckpointAdjoint()

    def __check_init__(self):
        check_range("rtol", self.rtol, low=0.0)
        check_range("atol", self.atol, low=0.0)
        check_count("max_steps", self.max_steps)

    def __call__(self, field: VectorField, start: PyTree, t0: Scalar, t1: Scalar) -> tuple[PyTree, Array]:
        """The state at `t1`."""
        solution = dfx.diffeqsolve(
            dfx.ODETerm(field),
            self.solver,
            t0,
            t1,
            None,
            start,
            stepsize_controller=dfx.PIDController(self.rtol, self.atol),
            max_steps=self.max_steps,
            adjoint=self.adjoint,
        )
        return jax.tree.map(lambda leaf: leaf[-1], solution.ys), solution.stats["num_steps"]


class FixedSolve(eqx.Module):
    """`(field, start, t0, t1) -> (end, number of steps)` in `num_steps` (static) equal steps of an explicit solver (default `Heun`)."""

    num_steps: int = eqx.field(static=True)
    solver: dfx.AbstractSolver = dfx.Heun()

    def __check_init__(self):
        check_count("num_steps", self.num_steps)

    def __call__(self, field: VectorField, start: PyTree, t0: Scalar, t1: Scalar) -> tuple[PyTree, Array]:
        """The state at `t1`."""
        dtype = jnp.result_type(*jax.tree.leaves(start))
        t0, t1 = jnp.asarray(t0, dtype), jnp.asarray(t1, dtype)
        times = t0 + (t1 - t0) * jnp.linspace(0, 1, self.num_steps + 1, dtype=dtype)
        return integrate(dfx.ODETerm(field), self.solver, start, times=times), jnp.asarray(self.num_steps)


class Encoded(NamedTuple):
    """What a solve from a data point gives."""

    latent: Float[Array, "*x"]  # z(T)
    log_prob: Float[Array, ""]
    kinetic: Float[Array, ""]  # ∫ |f|² ds
    num_steps: Array


_EXACT = ExactDivergence()


class TOFlow(eqx.Module):
    """A continuous flow with its evolution time, for one example; `vmap` over keys or points for many.

    - `velocity`: u, any `(t, x, args) -> array like x`, here with `args=None`; times lie between 1 - T and 1.
    - `base`: p₀, any object with `sample(key) -> z` and `log_prob(z) -> scalar`, such as `StandardNormal`.
    - `duration`: T > 0, an array (trained), default 1.
    - `solve`: `AdaptiveSolve()` (default) or `FixedSolve(n)`.
    """

    velocity: VectorField
    base: Any
    duration: Float[Array, ""] = eqx.field(converter=jnp.asarray, default=1.0)
    solve: Callable = AdaptiveSolve()

    def __check_init__(self):
        check_range("duration", self.duration, low=0.0, open_low=True)

    def sample(self, key: PRNGKey) -> Float[Array, "*x"]:
        """One draw."""
        return self.decode(self.base.sample(key))

    def decode(self, z: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """The data point of a latent."""
        return self.solve(self.velocity, z, 1 - jnp.asarray(self.duration, z.dtype), jnp.ones((), z.dtype))[0]

    def log_prob(self, x: Float[Array, "*x"], divergence: Callable = _EXACT) -> Float[Array, ""]:
        """log p(x), with `ExactDivergence()` (default) or `HutchinsonDivergence(key)`. Its derivative in T goes through the solve."""
        return self.encode(x, divergence).log_prob

    def encode(self, x: Float[Array, "*x"], divergence: Callable = _EXACT) -> Encoded:
        """The latent of a data point, with the integrals along the way."""

        def rates(s, state, args):
            f, trace = self._field(s, state[0], divergence)
            return f, trace, jnp.sum(f**2)

        zero = jnp.sum(jnp.zeros_like(x))
        (z, change, kinetic), num_steps = self.solve(rates, (x, zero, zero), jnp.zeros((), x.dtype), jnp.asarray(self.duration, x.dtype))
        return Encoded(z, self.base.log_prob(z) + change, kinetic, num_steps)

    def moving_speed(self, z: Float[Array, "*x"], divergence: Callable = _EXACT, kinetic: Scalar = 0.0) -> Float[Array, ""]:
        """∂/∂T of -log p(x) + `kinetic` ∫ |f|² ds, by what happens at the latent z = z(T) alone."""
        f, trace = self._field(jnp.asarray(self.duration, z.dtype), z, divergence)
        return -jnp.sum(jax.grad(self.base.log_prob)(z) * f) - trace + jnp.asarray(kinetic, z.dtype) * jnp.sum(f**2)

    def _field(self, s, z, divergence):
        return divergence(lambda z: -self.velocity(1 - s, z, None), z)


class TOFlowLoss(eqx.Module):
    """`loss(model, batch, key) -> (scalar, aux)`: J(θ, T) of a `TOFlow` on data `batch` of shape (n, *x).

    The gradient in T is the formula of the module's head, at no cost; that of θ goes through the solve.

    - `alpha`, `penalty`: α >= 0 (default 0.1) and R, `T -> scalar` (default T²).
    - `kinetic`: κ >= 0, default 0.
    - `divergence`: `key -> divergence`, one key an example; default `HutchinsonDivergence`.

    aux: "nll" in nats, "duration" T, "num_steps" of the solver, the mean over the batch, and "moving_speed", the derivative in T without α R'.
    """

    alpha: Scalar = 0.1
    penalty: Callable = jnp.square
    kinetic: Scalar = 0.0
    divergence: Callable = HutchinsonDivergence

    def __check_init__(self):
        check_range("alpha", self.alpha, low=0.0)
        check_range("kinetic", self.kinetic, low=0.0)

    def __call__(self, model: TOFlow, batch: Float[Array, "n *x"], key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss."""
        duration = jnp.asarray(model.duration, batch.dtype)
        still = eqx.tree_at(lambda model: model.duration, model, jax.lax.stop_gradient(duration))
        kinetic = jnp.asarray(self.kinetic, batch.dtype)

        def one(x, key):
            divergence = self.divergence(key)
            encoded = still.encode(x, divergence)
            return encoded, still.moving_speed(encoded.latent, divergence, kinetic)

        encoded, speeds = jax.vmap(one)(batch, jax.random.split(key, batch.shape[0]))
        nll, speed = -jnp.mean(encoded.log_prob), jax.lax.stop_gradient(jnp.mean(speeds))
        # adds nothing but the derivative
        moved = speed * (duration - jax.lax.stop_gradient(duration))
        loss = nll + kinetic * jnp.mean(encoded.kinetic) + moved + jnp.asarray(self.alpha, batch.dtype) * self.penalty(duration)
        num_steps = jnp.mean(encoded.num_steps.astype(batch.dtype))
        return loss, {"nll": nll, "duration": duration, "num_steps": num_steps, "moving_speed": speed}


def coordinate_descent(
    network: optax.GradientTransformation,
    duration: optax.GradientTransformation,
    select: Callable[[PyTree], Any],
    every: int = 5,
    max_change: Scalar = 0.05,
    low: Scalar = 0.2,
    high: Scalar = 1.5,
) -> optax.GradientTransformation:
    """An optimiser that takes `every` (K) steps of all other parameters with `network`, then one of T with `duration`, and so on.

    - `select`: `params -> T`, such as `lambda model: model.duration`.
    - `max_change`: a step of T is at most this long. `low`, `high`: T stays between them.

    Each optimiser sees its own steps only: the state of the other one waits. Raises `ValueError` for counts below 1 and an empty range.
    """
    check_count("every", every)
    check_range("max_change", max_change, low=0.0, open_low=True)
    check_range("low", low, low=0.0, open_low=True)
    check_range("high - low", high - low, low=0.0)

    def clipped(updates, params):
        def clip(update, value):
            change = jnp.clip(update, -jnp.asarray(max_change, value.dtype), jnp.asarray(max_change, value.dtype))
            return jnp.clip(value + change, jnp.asarray(low, value.dtype), jnp.asarray(high, value.dtype)) - value

        return jax.tree.map(clip, updates, params)

    def labels(params):
        return eqx.tree_at(select, jax.tree.map(lambda _: "network", params), "duration")

    def at_duration(step, **_):
        return step % (every + 1) == every

    def at_network(step, **_):
        return step % (every + 1) != every

    return optax.partition(
        {
            "network": optax.conditionally_mask(network, at_network),
            "duration": optax.conditionally_mask(optax.chain(duration, optax.stateless(clipped)), at_duration),
        },
        labels,
    )


__all__ = ["AdaptiveSolve", "Encoded", "FixedSolve", "TOFlow", "TOFlowLoss", "coordinate_descent"]
