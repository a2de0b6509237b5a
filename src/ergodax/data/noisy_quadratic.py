"""A quadratic loss with noisy gradients, whose expected loss under SGD and heavy ball is known exactly for any array of learning rates.

In the eigenbasis of the Hessian f(x) = Σ λ_i x_i² / 2 and g(x) = Λx + ξ, with E ξ = 0 and E ξ_i² = `noise`_i, independent between steps. Heavy ball
with the rate inside its buffer (SGD at β = 0),

    v' = βv + ηg,   x' = x - v' = (1 - ηλ) x - βv - ηξ,

moves A = E x², B = E xv, C = E v² of each coordinate by, with a = 1 - ηλ,

    A' = a² A - 2aβ B + β² C + η² noise,
    B' = aηλ A + (a - ηλ) β B - β² C - η² noise,
    C' = η²λ² A + 2βηλ B + β² C + η² noise,

and the expected excess loss is Σ λ_i A_i / 2: no simulation and no variance, so schedules can be compared to many digits, swept by `vmap` and tuned
by `grad`. The same quadratic ranks schedules in Zhang et al. 2019 (arXiv:1907.04164) and Wu et al. 2018 (arXiv:1803.02021).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ergodax.core.check import check_range
from ergodax.core.types import PRNGKey, Scalar


class NoisyQuadratic(eqx.Module):
    """f(x) = Σ λ_i x_i² / 2 with gradient noise, started at one point.

    - `eigenvalues`: λ, (d,), not negative; their dtype is that of the results.
    - `noise`: the variance of the gradient in each coordinate, (d,); divide it by the batch size for a mini-batch.
    - `start`: x before the first update, (d,).

    `rates` of the methods is a vector (steps,), the rate of each update, as `schedule(jnp.arange(steps))` or `peak * profile` gives it; a rate of 0
    leaves x alone in SGD. `momentum` is β, one number or one for each update; `None`, SGD, is faster than 0. All of them may be traced. A run that
    leaves the range of its dtype has excess inf. Raises `ValueError` for shapes that do not fit and negative λ or noise.
    """

    eigenvalues: Float[Array, "..."]
    noise: Float[Array, "..."]
    start: Float[Array, "..."]

    def __check_init__(self):
        shapes = tuple(x.shape for x in (self.eigenvalues, self.noise, self.start))
        if len(shapes[0]) != 1 or len(set(shapes)) != 1:
            raise ValueError("`eigenvalues`, `noise` and `start` must be vectors (d,) of one length, got shapes {}, {} and {}.".format(*shapes))
        check_range("eigenvalues", self.eigenvalues, low=0.0)
        check_range("noise", self.noise, low=0.0)

    def loss(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch"]:
        """f(x); its minimum is 0, so that it is the excess loss too."""
        return jnp.sum(self.eigenvalues * x**2, axis=-1) / 2

    def gradient(self, key: PRNGKey, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """One stochastic gradient at each x, with normal noise."""
        return self.eigenvalues * x + jnp.sqrt(self.noise) * jax.random.normal(key, x.shape, x.dtype)

    def excess(self, rates: Float[Array, "..."], *, momentum: Scalar | Float[Array, "..."] | None = None) -> Float[Array, ""]:
        """E f after the last update."""
        steps = self._steps(rates, momentum)
        (second, *_), _ = jax.lax.scan(lambda moments, step: (self._advance(moments, *step), None), self._initial(steps), steps)
        return self._excess(second)

    def excess_curve(self, rates: Float[Array, "..."], *, momentum: Scalar | Float[Array, "..."] | None = None) -> Float[Array, " steps"]:
        """E f after each update."""

        def body(moments, step):
            moments = self._advance(moments, *step)
            return moments, self._excess(moments[0])

        steps = self._steps(rates, momentum)
        return jax.lax.scan(body, self._initial(steps), steps)[1]

    def average_excess(
        self,
        rates: Float[Array, "..."],
        weights: Float[Array, "..."],
        *,
        momentum: Scalar | Float[Array, "..."] | None = None,
    ) -> Float[Array, ""]:
        """E f(Σ_k `weights`_k x_k), x_k the point after update k: the loss of averaged or merged checkpoints. Weights usually sum to 1."""
        if weights.shape != rates.shape:
            raise ValueError(f"`weights` needs one entry for each of `rates`, shape {rates.shape}, got {weights.shape}.")

        def body(carry, step):
            moments, with_x, with_v, square = carry  # E xS, E vS and E S² of the sum S so far
            rate, momentum, weight = step
            moments = self._advance(moments, rate, momentum)
            with_x, with_v = (
                (1 - rate * self.eigenvalues) * with_x - momentum * with_v,
                rate * self.eigenvalues * with_x + momentum * with_v,
            )
            square = square + weight * (2 * with_x + weight * moments[0])
            return (moments, with_x + weight * moments[0], with_v + weight * moments[1], square), None

        steps = (*self._steps(rates, 0.0 if momentum is None else momentum), weights.astype(self.eigenvalues.dtype))
        initial = self._initial(steps)
        zero = initial[1]
        (*_, square), _ = jax.lax.scan(body, (initial, zero, zero, zero), steps)
        return self._excess(square)

    def _initial(self, steps):
        """A, B and C at the start, where nothing moves yet, or A alone; made from all inputs, so that any of them may be sharded."""
        inputs = (self.eigenvalues, self.noise, self.start, *steps)
        zero = jnp.zeros_like(self.eigenvalues) + sum(jnp.sum(jnp.zeros_like(x)).astype(self.eigenvalues.dtype) for x in inputs)
        return (zero + self.start**2, zero, zero)[: 1 if len(steps) == 1 else 3]

    def _steps(self, rates, momentum):
        if rates.ndim != 1:
            raise ValueError(f"`rates` must be a vector, one rate for each update, got shape {rates.shape}.")
        dtype = self.eigenvalues.dtype
        if momentum is None:
            return (rates.astype(dtype),)
        if jnp.shape(momentum) not in ((), rates.shape):
            raise ValueError(f"`momentum` must be one number or one for each of the rates, shape {rates.shape}, got shape {jnp.shape(momentum)}.")
        return rates.astype(dtype), jnp.broadcast_to(jnp.asarray(momentum, dtype), rates.shape)

    def _advance(self, moments, rate, momentum=None) -> tuple[Array, ...]:
        pull = rate * self.eigenvalues
        keep = 1 - pull
        if momentum is None:
            return (keep**2 * moments[0] + rate**2 * self.noise,)
        second, cross, velocity = moments
        added = momentum**2 * velocity + rate**2 * self.noise
        return (
            keep**2 * second - 2 * keep * momentum * cross + added,
            keep * pull * second + (keep - pull) * momentum * cross - added,
            pull**2 * second + 2 * momentum * pull * cross + added,
        )

    def _excess(self, second_moment):
        value = jnp.sum(self.eigenvalues * second_moment) / 2
        return jnp.where(jnp.isnan(value), jnp.inf, value)  # inf - inf


__all__ = ["NoisyQuadratic"]
