"""Smooth normalising flows: C^∞ bijections of [0, 1] and of the circle, with black-box inverses. Köhler, Krämer, Noé 2021 (arXiv:2110.00351).

From a ramp that is flat to all orders at 0 comes a sigmoid that is flat to all orders at 0 and 1, and from it an increasing map of [0, 1]:

    ρ(x) = exp(-1/(α x^β)) for x > 0, else 0;       σ(x) = ρ(x)/(ρ(x) + ρ(1 - x));
    g(x) = [σ(a(x - b) + ½) - σ(-ab + ½)] / [σ(a(1 - b) + ½) - σ(-ab + ½)];        f(x) = Σ_i w_i ((1 - c_i) g_i(x) + c_i x),    f' >= min c > 0.

On the circle g sums the sigmoid over the shifts x - k by integers, which meets itself at 0 = 1 with all derivatives; f keeps 0, and a `CircularShift`
moves it. In `Coupling` layers, a, b, c, w come from a conditioner; it should be smooth (tanh, SiLU) and see circles as `PeriodicInput`. The flow's
density then is smooth, so that forces can be matched as well as samples: `ForceMatchingLoss`.

f has no closed inverse. `increasing_inverse` finds x by multi-bin bisection and differentiates y = f(x; θ) instead of the search: dx/dy = 1/f',
dx/dθ = -f_θ/f', to any order. A flow needs it in one direction only: `Flow(Chain(layers), base)` searches for `log_prob`,
`Flow(Inverted(Chain(layers)), base)` for `sample`, which makes training cheap.

The reference code is noegroup/bgflow, whose α stands for our 1/α. The shift after f is ours: without it all layers keep the point 0 of a circle.
"""

import abc
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_count, check_range
from ..core.types import PRNGKey, Scalar
from .bijection import Bijection, Chain


def smooth_sigmoid(x: Float[Array, "*x"], alpha: Scalar | Array = 1.0, beta: Scalar | Array = 1.0) -> Float[Array, "*x"]:
    """σ(x), from 0 at x <= 0 to 1 at x >= 1, elementwise. `alpha` and `beta` (default 1) broadcast; a small `alpha` makes it steep in the middle."""
    alpha, beta = jnp.asarray(alpha, x.dtype), jnp.asarray(beta, x.dtype)
    # Where ρ falls below e^-90, σ is 0 or 1 to all digits, but its derivatives would be 0 · ∞.
    low = jax.lax.stop_gradient(jnp.clip((90 * alpha) ** (-1 / beta), jnp.finfo(x.dtype).eps, 0.25))
    x = jnp.clip(x, low, 1 - low)
    return jax.nn.sigmoid(((1 - x) ** -beta - x**-beta) / alpha)


def increasing_inverse(function: Callable[[Array], Array], y: Float[Array, ""], num_bins: int = 4) -> Float[Array, ""]:
    """x in [0, 1] with function(x) = y, for a scalar function that increases from at most y at 0 to at least y at 1.

    Each round cuts the bracket into `num_bins` (static, default 4) and keeps one, until it is one rounding error wide; a y out of range gives the
    nearer end, NaN gives NaN. Differentiable to any order in y and in all that `function` closes over, if its derivative is not 0. (The root finders
    of optimistix have the same gradients, but do not run inside `shard_map`.)
    """
    check_count("num_bins", num_bins, low=2)
    rounds = math.ceil(-math.log(float(jnp.finfo(y.dtype).eps)) / math.log(num_bins))

    def search(residual, start):
        def narrow(low, width):
            inner = low + width * jnp.arange(1, num_bins, dtype=low.dtype)
            return low + width * jnp.sum(jax.vmap(residual)(inner) <= 0, dtype=low.dtype), None

        return jax.lax.scan(narrow, start, float(num_bins) ** -jnp.arange(1, rounds + 1, dtype=start.dtype))[0]

    return jax.lax.custom_root(lambda x: function(x) - y, 0 * y, search, lambda linear, value: value / linear(jnp.ones_like(value)))


class IncreasingBijection(Bijection):
    """The socket for an increasing map of [0, 1] onto itself, on one scalar: what `value` says, with a black-box inverse.

    Neither direction looks whether its argument lies in [0, 1].
    """

    @abc.abstractmethod
    def value(self, x: Float[Array, ""]) -> Float[Array, ""]:
        """f(x), with f(0) = 0, f(1) = 1 and f' > 0."""

    def forward(self, x):
        y, slope = jax.jvp(self.value, (x,), (jnp.ones_like(x),))
        return y, jnp.log(slope)

    def inverse(self, y):
        x = increasing_inverse(self.value, y)
        return x, -self.forward(x)[1]


class SmoothInterval(IncreasingBijection):
    """f on [0, 1], of K bumps; `slope`, `centre`, `mix` and `weights` are a, b, c and w, each (K,).

    Needs a > 0, b in [0, 1], c in (0, 1], and w >= 0 of sum 1. `alpha` and `beta` (default 1) are positive. Raises `ValueError` otherwise.
    """

    slope: Float[Array, " k"]
    centre: Float[Array, " k"]
    mix: Float[Array, " k"]
    weights: Float[Array, " k"]
    alpha: Scalar = 1.0
    beta: Scalar = 1.0

    def __check_init__(self):
        _check(self)
        check_range("slope", self.slope, low=0.0, open_low=True)

    def value(self, x):
        slope, centre, mix, weights = (v.astype(x.dtype) for v in (self.slope, self.centre, self.mix, self.weights))
        bump, first, last = (smooth_sigmoid(slope * (at - centre) + 0.5, self.alpha, self.beta) for at in (x, 0, 1))
        return jnp.sum(weights * ((1 - mix) * (bump - first) / (last - first) + mix * x))


class SmoothCircle(IncreasingBijection):
    """f on the circle [0, 1) with 0 = 1, which it keeps; fields as of `SmoothInterval`.

    `num_shifts` (static): the bump is summed over |k| <= `num_shifts`, which must be at least 1/(2a), half its width. Default 1: a >= ½.
    """

    slope: Float[Array, " k"]
    centre: Float[Array, " k"]
    mix: Float[Array, " k"]
    weights: Float[Array, " k"]
    alpha: Scalar = 1.0
    beta: Scalar = 1.0
    num_shifts: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        _check(self)
        check_count("num_shifts", self.num_shifts)
        check_range("slope", self.slope, low=1 / (2 * self.num_shifts))

    def value(self, x):
        slope, centre, mix, weights = (v.astype(x.dtype) for v in (self.slope, self.centre, self.mix, self.weights))
        shifts = jnp.arange(-self.num_shifts, self.num_shifts + 1, dtype=x.dtype)[:, None]
        bump, first = (smooth_sigmoid(slope * (at - centre - shifts) + 0.5, self.alpha, self.beta) for at in (x, 0))
        # The sums telescope: Σ_k σ(… 1 - k) - σ(… 0 - k) = 1, so that there is nothing to divide by.
        return jnp.sum(weights * ((1 - mix) * jnp.sum(bump - first, 0) + mix * x))


def _check(bijection):
    shapes = [jnp.shape(v) for v in (bijection.slope, bijection.centre, bijection.mix, bijection.weights)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise ValueError(f"`slope`, `centre`, `mix` and `weights` must all have one shape (K,), got {shapes}.")
    check_range("centre", bijection.centre, low=0.0, high=1.0)
    check_range("mix", bijection.mix, low=0.0, high=1.0, open_low=True)
    check_range("weights", bijection.weights, low=0.0)
    check_range("alpha", bijection.alpha, low=0.0, open_low=True)
    check_range("beta", bijection.beta, low=0.0, open_low=True)


class CircularShift(Bijection):
    """x + `shift` mod 1, elementwise."""

    shift: Scalar | Float[Array, "..."]

    def forward(self, x):
        return jnp.mod(x + jnp.asarray(self.shift, x.dtype), 1), jnp.sum(jnp.zeros_like(x))

    def inverse(self, y):
        return jnp.mod(y - jnp.asarray(self.shift, y.dtype), 1), jnp.sum(jnp.zeros_like(y))


class SmoothIntervalTransformer(eqx.Module):
    """4K raw numbers, any real ones, -> `SmoothInterval` of K bumps, for `Coupling`.

    a = `min_slope` + softplus, b = sigmoid (equispaced for raw zeros), c = `min_density` + (1 - `min_density`) sigmoid, w = softmax.

    `min_slope` > 0 (default 1), `min_density` in (0, 1] (default 1e-3); `alpha`, `beta` > 0 (default 1). All may be swept.
    """

    min_slope: Scalar = 1.0
    min_density: Scalar = 1e-3
    alpha: Scalar = 1.0
    beta: Scalar = 1.0

    def __check_init__(self):
        check_range("min_slope", self.min_slope, low=0.0, open_low=True)
        check_range("min_density", self.min_density, low=0.0, high=1.0, open_low=True)

    def __call__(self, parameters: Float[Array, " p"]) -> SmoothInterval:
        """The map of one coordinate. Raises `ValueError` unless there are 4K parameters, K >= 1."""
        slope, centre, mix, weights = _components(parameters, self.min_slope, self.min_density)
        spread = (jnp.arange(centre.size, dtype=centre.dtype) + 0.5) / centre.size
        centre = jax.nn.sigmoid(centre + jnp.log(spread) - jnp.log1p(-spread))
        return SmoothInterval(slope, centre, mix, weights, self.alpha, self.beta)


class SmoothCircleTransformer(eqx.Module):
    """4K + 1 raw numbers -> `SmoothCircle` of K bumps, then `CircularShift`: the first is the shift, the rest as of `SmoothIntervalTransformer`.

    b is taken mod 1. `min_slope` (static, default 1) says how many shifts are summed.
    """

    min_slope: float = eqx.field(static=True, default=1.0)
    min_density: Scalar = 1e-3
    alpha: Scalar = 1.0
    beta: Scalar = 1.0

    def __check_init__(self):
        check_range("min_slope", self.min_slope, low=0.0, open_low=True)
        check_range("min_density", self.min_density, low=0.0, high=1.0, open_low=True)

    def __call__(self, parameters: Float[Array, " p"]) -> Chain:
        """The map of one coordinate. Raises `ValueError` unless there are 4K + 1 parameters, K >= 1."""
        slope, centre, mix, weights = _components(parameters[1:], self.min_slope, self.min_density)
        spread = (jnp.arange(centre.size, dtype=centre.dtype) + 0.5) / centre.size
        num_shifts = math.ceil(1 / (2 * self.min_slope))
        circle = SmoothCircle(slope, jnp.mod(centre + spread, 1), mix, weights, self.alpha, self.beta, num_shifts)
        return Chain((circle, CircularShift(parameters[0])))


def _components(parameters, min_slope, min_density):
    if parameters.size % 4 or not parameters.size:
        raise ValueError(f"Each bump takes 4 parameters (slope, centre, mix, weight), got {parameters.size} in all.")
    slope, centre, mix, weights = jnp.split(parameters, 4)
    min_slope, min_density = (jnp.asarray(v, parameters.dtype) for v in (min_slope, min_density))
    return min_slope + jax.nn.softplus(slope), centre, min_density + (1 - min_density) * jax.nn.sigmoid(mix), jax.nn.softmax(weights)


class PeriodicInput(eqx.Module):
    """`network` of (cos 2πx, sin 2πx): a conditioner that sees circles as circles. Takes (k,), hands on (2k,)."""

    network: Callable

    def __call__(self, x: Float[Array, " k"]) -> Array:
        """What the network says."""
        return self.network(jnp.concatenate([jnp.cos(2 * jnp.pi * x), jnp.sin(2 * jnp.pi * x)]))


class ForceMatchingLoss(eqx.Module):
    """`loss(model, batch, key)`: `likelihood_weight` E[-log p(x)] + `force_weight` E‖∇ log p(x) - F(x)/kT‖², with both means as "nll" and "force".

    - `model`: anything with a `log_prob(x)` on one example that can be differentiated twice, such as a `Flow`.
    - `batch`: (x, F), each (B, *x); F = -∇ energy in units of `temperature` (kT, default 1) over those of x. `key` is not used.

    Both weights are 1 by default. Raises `ValueError` for shapes that differ.
    """

    temperature: Scalar = 1.0
    likelihood_weight: Scalar = 1.0
    force_weight: Scalar = 1.0

    def __check_init__(self):
        check_range("temperature", self.temperature, low=0.0, open_low=True)
        check_range("likelihood_weight", self.likelihood_weight, low=0.0)
        check_range("force_weight", self.force_weight, low=0.0)

    def __call__(self, model: Any, batch: tuple, key: PRNGKey) -> tuple[Float[Array, ""], dict]:
        """The loss of one batch."""
        x, forces = batch
        if x.shape != forces.shape or x.ndim < 1:
            raise ValueError(f"x and F must have one shape (batch, *example), got {x.shape} and {forces.shape}.")
        log_prob, score = jax.vmap(jax.value_and_grad(model.log_prob))(x)
        squares = (score - forces / jnp.asarray(self.temperature, x.dtype)) ** 2
        nll, force = -jnp.mean(log_prob), jnp.sum(squares) / x.shape[0]
        weights = (jnp.asarray(weight, x.dtype) for weight in (self.likelihood_weight, self.force_weight))
        return next(weights) * nll + next(weights) * force, {"nll": nll, "force": force}


__all__ = [
    "CircularShift",
    "ForceMatchingLoss",
    "IncreasingBijection",
    "PeriodicInput",
    "SmoothCircle",
    "SmoothCircleTransformer",
    "SmoothInterval",
    "SmoothIntervalTransformer",
    "increasing_inverse",
    "smooth_sigmoid",
]
