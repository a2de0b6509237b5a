"""What a flow's trajectories cost, and how far they are from straight lines at constant speed.

Of one trajectory dx/dt = v(t, x) from x₀ at t = 0 to x₁ at t = 1,

    energy     ∫ ‖v(t, x_t)‖² dt               whose mean over x₀ is at least W₂², the least cost of any transport
    curvature  ∫ ‖v(t, x_t) - (x₁ - x₀)‖² dt   = energy - ‖x₁ - x₀‖² >= 0, 0 only for straight lines at constant speed, where one Euler step is exact

For an interpolant x_t = (1 - t) x₀ + t x₁ of any coupling and its velocity v(t, x) = E[x₁ - x₀ | x_t = x], with x₀ → X₁ the flow of v,

    E‖x₁ - x₀‖² - E‖X₁ - x₀‖² = ∫ E‖x₁ - x₀ - v(t, x_t)‖² dt + E[curvature]:

what regression leaves over and what the trajectories bend make up what transport gains. Liu, Gong, Liu 2023 (arXiv:2209.03003), section 3.
"""

from typing import NamedTuple

import diffrax as dfx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.loop import integrate
from ..core.types import PyTree, VectorField


class PathCost(NamedTuple):
    """One trajectory's end and costs."""

    end: Float[Array, "*x"]
    energy: Float[Array, ""]
    curvature: Float[Array, ""]


def path_cost(
    velocity: VectorField,
    x0: Float[Array, "*x"],
    args: PyTree = None,
    *,
    times: Float[Array, " steps"],
    solver: dfx.AbstractSolver | None = None,
) -> PathCost:
    """Solve dx/dt = v from one x₀ over `times`, with its energy and curvature beside it; `vmap` for many.

    - `velocity`: a field `(t, x, args) -> array like x`.
    - `times`: (N + 1,), strictly increasing; where they do not span 1, curvature is against the mean velocity (x₁ - x₀)/(t_N - t₀).
    - `solver`: any of diffrax for ODEs (default `diffrax.Heun()`); it integrates the energy too, so both are of its order.
    """

    def field(t, state, args):
        v = velocity(t, state[0], args)
        return v, jnp.sum(v**2)

    start = (x0, jnp.zeros_like(x0, shape=()))
    end, energy = integrate(dfx.ODETerm(field), dfx.Heun() if solver is None else solver, start, args, times=times)
    return PathCost(end, energy, energy - jnp.sum((end - x0) ** 2) / (times[-1] - times[0]).astype(x0.dtype))


__all__ = ["PathCost", "path_cost"]
