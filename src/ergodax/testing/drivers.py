"""A solver runs the same under both drivers."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core.loop import integrate
from ..core.term import DenoiserTerm
from ..core.types import PyTree


def check_drivers(
    terms: dfx.AbstractTerm,
    solver: dfx.AbstractSolver,
    y0: PyTree[Float[Array, "..."]],
    args: PyTree = None,
    *,
    times: Float[Array, " steps"] | None = None,
    tolerance: float = 1e-12,
) -> None:
    """`integrate` and `diffrax.diffeqsolve` over the same steps end in the same state, to an absolute `tolerance` (for float64).

    Arguments as for `integrate`. The terms of a stochastic solver hold their noise already (`core.with_noise`), so that both drivers draw the same.
    """
    model = terms.terms[0] if isinstance(terms, dfx.MultiTerm) else terms
    boundaries = jnp.arange(model.num_steps + 1.0) if isinstance(model, DenoiserTerm) else times

    @eqx.filter_jit
    def both(terms, y0, args):
        steps = dfx.StepTo(boundaries)
        solution = dfx.diffeqsolve(terms, solver, boundaries[0], boundaries[-1], None, y0, args, stepsize_controller=steps, adjoint=dfx.ForwardMode())
        return integrate(terms, solver, y0, args, times=times), jax.tree.map(lambda saved: saved[0], solution.ys)

    ours, theirs = both(terms, y0, args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), ours, theirs)


__all__ = ["check_drivers"]
