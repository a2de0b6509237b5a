"""Stochastic heavy ball with step decay: momentum that speeds up the bias by √κ while the noise stays near its statistical minimum.

Pan, Liu, Wang, Zhang 2023, "Accelerated Convergence of Stochastic Heavy Ball Method under Anisotropic Gradient Noise" (arXiv:2312.14567):

    v_{t+1} = β v_t + η_t g_t,    w_{t+1} = w_t - v_{t+1},    β = (1 - 1/√κ)²,
    η_t = η_0 / C^{l-1} in stage l = 1, …, n of T/n steps each,    n = log_C(T √κ),

so that the last stage runs at about η_0 / (T √κ). The rate enters before the buffer: after a switch the velocity of the stage before dies out at its
own size, where `optax.sgd(schedule, momentum=β)` shrinks it at once. On a quadratic with condition number κ and gradient noise of covariance at most
σ²H (anisotropic, as in regression), mini-batches of B, and η_0 of order 1/L, the excess risk after T steps is at most, up to powers of logarithms,

    E_0 exp(-c T / (√κ log T)) + d σ² / (B T);

SGD has κ for √κ in the first term. So momentum pays where the batch is large, and costs nothing where it is small. These are the paper's orders; what
a given quadratic does is known exactly, with no constant left open, from the second moments in `ergodax.data.NoisyQuadratic.excess`.

Deviation: n must be whole for equal stages; it is rounded (the paper writes the logarithm alone).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from ..core.check import check_range
from ..core.schedule import as_schedule
from ..core.types import PyTree, Scalar, Schedule


def step_decay(
    rate: Scalar,
    total_steps: Scalar,
    condition_number: Scalar,
    *,
    factor: Scalar = 2.0,
    num_stages: Scalar | None = None,
) -> optax.Schedule:
    """The step decay, `step -> value`: η_0 / C^⌊k n / T⌋ at step k, held at its last value from T on.

    - `rate`: η_0, of order 1/L with L the largest curvature.
    - `total_steps`: T, the length of the run.
    - `condition_number`: κ, the largest over the smallest curvature.
    - `factor`: C, by which each stage divides the rate, default 2 (ours; the paper keeps C > 1 open).
    - `num_stages`: n, default log_C(T √κ) rounded, and at least 1.

    All may be traced and swept, and so may the step, of any shape. The result has the dtype of `rate` (the default float for a Python number). Raises
    `ValueError` for values out of range.
    """
    check_range("rate", rate, low=0.0)
    check_range("total_steps", total_steps, low=0.0, open_low=True)
    check_range("condition_number", condition_number, low=1.0)
    check_range("factor", factor, low=1.0, open_low=True)
    check_range("num_stages", num_stages, low=1.0)

    def formula(step, top, total, kappa, divisor, *given):
        stages = given[0] if given else jnp.maximum(jnp.round(jnp.log(total * jnp.sqrt(kappa)) / jnp.log(divisor)), 1)
        stage = jnp.floor(step * stages / total)
        # A quotient may miss a whole number by its rounding; products of whole numbers do not.
        stage = stage + ((stage + 1) * total <= step * stages).astype(step.dtype) - (stage * total > step * stages).astype(step.dtype)
        return top / divisor ** jnp.clip(stage, 0, jnp.ceil(stages) - 1)

    given = () if num_stages is None else (num_stages,)
    return as_schedule(rate, formula, rate, total_steps, condition_number, factor, *given)


def heavy_ball_momentum(condition_number: Scalar) -> Scalar:
    """β = (1 - 1/√κ)². Raises `ValueError` for κ below 1."""
    check_range("condition_number", condition_number, low=1.0)
    return (1 - condition_number**-0.5) ** 2


class HeavyBallState(NamedTuple):
    """The number of updates, and the velocity v in the structure of the parameters."""

    count: Int[Array, ""]
    velocity: PyTree


def heavy_ball(rate: Scalar | Schedule, momentum: Scalar | Schedule) -> optax.GradientTransformation:
    """Updates -v with v ← β v + η g, in the dtype of the gradients.

    - `rate`: η, a number or a schedule.
    - `momentum`: β in [0, 1), a number, or a schedule where it is tied to the stage.

    Equal to `optax.chain(optax.scale_by_learning_rate(rate), optax.trace(momentum))` for a constant β. Raises `ValueError` for a β out of range.
    """
    if not callable(momentum):
        check_range("momentum", momentum, low=0.0, high=1.0, open_high=True)

    def init(params):
        return HeavyBallState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        del params
        eta, beta = (value(state.count) if callable(value) else value for value in (rate, momentum))

        def one(gradient, velocity):
            kept, new = (jnp.asarray(value).astype(gradient.dtype) for value in (beta, eta))
            return kept * velocity + new * gradient

        velocity = jax.tree.map(one, updates, state.velocity)
        return jax.tree.map(jnp.negative, velocity), HeavyBallState(jnp.asarray(optax.safe_increment(state.count)), velocity)

    return optax.GradientTransformation(init, update)


def heavy_ball_step_decay(
    rate: Scalar,
    total_steps: Scalar,
    condition_number: Scalar,
    *,
    factor: Scalar = 2.0,
    num_stages: Scalar | None = None,
) -> optax.GradientTransformation:
    """The paper's method: `heavy_ball` with `step_decay` and β = (1 - 1/√κ)². Arguments as in `step_decay`."""
    schedule = step_decay(rate, total_steps, condition_number, factor=factor, num_stages=num_stages)
    return heavy_ball(schedule, heavy_ball_momentum(condition_number))


__all__ = ["HeavyBallState", "heavy_ball", "heavy_ball_momentum", "heavy_ball_step_decay", "step_decay"]
