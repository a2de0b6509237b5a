"""Reference processes of Schrödinger bridges: dX = b(t, X) dt + √ε dW, of which a bridge is the nearest process, in relative entropy, with given
marginals. `Brownian` and `OrnsteinUhlenbeck` have Gaussian transitions in closed form; `ParametricReference` is any family of drifts.
"""

import abc
from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_range
from ..core.types import PRNGKey, PyTree, Scalar, Time
from .sde import draw, sde_terms


class ReferenceProcess(eqx.Module):
    """The socket. A vector field `(t, x, args)` on one example, which is its drift, and `epsilon`, the variance of its noise per unit of time."""

    epsilon: eqx.AbstractVar[Scalar]

    @abc.abstractmethod
    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """The drift b."""

    def terms(self, key: PRNGKey, y0: Float[Array, "*x"]) -> dfx.MultiTerm:
        """For `integrate(process.terms(key, x0), diffrax.Euler(), x0, times=times)`."""
        return sde_terms(self, self.epsilon, key, y0)


class LinearReference(ReferenceProcess):
    """A process with x_t | x_s ~ N(a x_s + c, q I), (a, c, q) = `transition(s, t)`. Bridges of it are Gaussian in closed form."""

    @abc.abstractmethod
    def transition(self, start: Time, end: Time) -> tuple[Array, Array, Array]:
        """(a, c, q): a scalar factor, a shift that broadcasts with x, and a scalar variance."""

    def bridge(self, t: Time, x0: Float[Array, "*x"], x1: Float[Array, "*x"], start: Time = 0.0, end: Time = 1.0) -> tuple[Array, Array]:
        """Mean and variance (one number) of x_t given x_start = x0 and x_end = x1.

        With (a, c, q) from `start` to t and (a', c', q') on to `end`: mean m + a' q (x1 - a' m - c') / Q and variance q q' / Q, m = a x0 + c and
        Q = a'² q + q', the variance of x_end given x_start.
        """
        (a, c, q), (onward, shift, later) = self.transition(start, t), self.transition(t, end)
        mean, total = a * x0 + c, onward**2 * q + later
        return mean + onward * q / total * (x1 - onward * mean - shift), q * later / total

    def steering(self, t: Time, x: Float[Array, "*x"], x1: Float[Array, "*x"], end: Time = 1.0) -> Float[Array, "*x"]:
        """What the drift of the process gains when it is conditioned on x_end = x1: ε ∇_x log p(x1 | x) = ε a' (x1 - a' x - c') / q'.

        It is affine in x1: with E[x1 | x] for x1 it is that of a bridge. Infinite at t = `end`.
        """
        a, c, q = self.transition(t, end)
        return jnp.asarray(self.epsilon * a / q) * (x1 - a * x - c)


class Brownian(LinearReference):
    """√ε W: no drift. `epsilon` is ε > 0; entropic optimal transport of cost ½|x₀ - x₁|² with weight ε on the entropy is its bridge."""

    epsilon: Scalar

    def __check_init__(self):
        check_range("epsilon", self.epsilon, low=0.0, open_low=True)

    def __call__(self, t, x, args=None):
        return jnp.zeros_like(x)

    def transition(self, start, end):
        variance = self.epsilon * (jnp.asarray(end) - start)
        return jnp.ones_like(variance), jnp.zeros_like(variance), variance


class OrnsteinUhlenbeck(LinearReference):
    """dX = θ (μ - X) dt + √ε dW.

    - `rate`: θ > 0, one number. May be negative (then the process runs away from μ), but not 0: that is `Brownian`.
    - `mean`: μ, a number or an array that broadcasts with x.
    - `epsilon`: ε > 0.
    """

    rate: Scalar
    mean: Scalar | Float[Array, "..."]
    epsilon: Scalar

    def __check_init__(self):
        check_range("epsilon", self.epsilon, low=0.0, open_low=True)

    def __call__(self, t, x, args=None):
        return (self.rate * (self.mean - x)).astype(x.dtype)

    def transition(self, start, end):
        duration = jnp.asarray(end) - start
        factor = jnp.exp(-self.rate * duration)
        shift, variance = -jnp.expm1(-self.rate * duration) * self.mean, self.epsilon * -jnp.expm1(-2 * self.rate * duration) / (2 * self.rate)
        return factor, jnp.asarray(shift), jnp.asarray(variance)


class ParametricReference(ReferenceProcess):
    """dX = f(parameters, t, X) dt + √ε dW, for a family of drifts of which the best is to be found (`sbirr`).

    - `family`: f, `(parameters, t, x) -> array like x`, on one example.
    - `parameters`: a pytree of floating arrays.
    - `epsilon`: ε > 0.
    """

    family: Callable
    parameters: PyTree
    epsilon: Scalar

    def __check_init__(self):
        check_range("epsilon", self.epsilon, low=0.0, open_low=True)

    def __call__(self, t, x, args=None):
        return self.family(self.parameters, t, x)


def sample_bridge(
    process: LinearReference, key: PRNGKey, t: Time, x0: Float[Array, "*x"], x1: Float[Array, "*x"], start: Time = 0.0, end: Time = 1.0
) -> Float[Array, "*x"]:
    """One draw of x_t given both ends, at one scalar time."""
    return draw(key, *process.bridge(t, x0, x1, start, end))


__all__ = ["Brownian", "LinearReference", "OrnsteinUhlenbeck", "ParametricReference", "ReferenceProcess", "sample_bridge"]
