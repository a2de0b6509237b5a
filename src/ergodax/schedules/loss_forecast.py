"""Where a loss is going: clean its first steps of outliers, fit L(t) = a exp(bt) + c with b < 0, and read it off later.

The forecaster of AutoLRS (Jin, Zhou, Zhao, Zhu, Guo, Canini, Krishnamurthy 2021, arXiv:2105.10762). Cleaning repeats: fit a parabola to the points
that are left, take the 3 % with the largest residuals, and drop those of them that lie in the first half. The exponential is then fitted by least
squares: a and c are linear, so what is searched is b alone.

Deviations from the authors' code. There the parabola is SciPy's smoothing spline of degree 2, whose default smoothing adds a knot only if the
residuals' squares sum to more than the number of points; a series of losses does not reach that. There b is found by Nelder-Mead from -1, here as
the best of a grid that is then refined, between a window's length times 20 and a fifth of a step. And there the exponential is fitted to the
parabola's values at all steps, not to the points; a parabola has no level tail, so that forecasts come out biased (by a tenth to a quarter where the
points give 0.2 % to 2 %): `to_parabola=True` does it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..core.check import check_count, check_range
from ..core.types import Scalar


_GRID = 64  # rates of decay that are tried
_GOLDEN = 0.6180339887498949


def kept_points(losses: Float[Array, " n"], *, share: Scalar = 0.03, num_passes: int = 10) -> Bool[Array, " n"]:
    """Which points of a series are left after cleaning.

    - `share`: of the points that are left, how many are judged in each pass (rounded), default 3 %; of them, those in the first half go.
    - `num_passes`: default 10, as for training losses. The authors judge one point once for validation losses: `share=1 / n, num_passes=1`.

    Raises `ValueError` for fewer than 4 points, a share outside [0, 1], or a number of passes that is not an integer.
    """
    _check_series(losses)
    check_range("share", share, low=0.0, high=1.0)
    check_count("num_passes", num_passes, low=0)
    half = (losses.size - 1) // 2

    def one(kept, _):
        residual = jnp.where(kept, jnp.abs(losses - parabola(losses, kept)), -1)
        judged = jnp.round(jnp.asarray(share, losses.dtype) * jnp.sum(kept.astype(losses.dtype)))
        rank = jnp.argsort(jnp.argsort(-residual, stable=True), stable=True)  # 0 for the largest residual
        place = jnp.cumsum(kept) - 1  # among the points that are left, as in the authors' code
        return kept & ~((rank < judged.astype(rank.dtype)) & (place < half)), None

    return jax.lax.scan(one, jnp.isfinite(losses), length=num_passes)[0]


def parabola(losses: Float[Array, " n"], kept: Bool[Array, " n"]) -> Float[Array, " n"]:
    """The parabola that fits the kept points best, at all points."""
    u, weights = jnp.linspace(-1, 1, losses.size, dtype=losses.dtype), kept.astype(losses.dtype)
    values, fitted, basis = jnp.where(kept, losses, 0), jnp.zeros_like(losses), []
    for power in (jnp.ones_like(u), u, u**2):  # orthogonal polynomials of the kept points
        for other in basis:
            power = power - jnp.sum(weights * power * other) * other
        square = jnp.sum(weights * power**2)
        basis.append(power / jnp.sqrt(jnp.where(square > 0, square, 1)))
        fitted = fitted + jnp.sum(values * basis[-1]) * basis[-1]
    return fitted


def fit_exponential(losses: Float[Array, " n"], kept: Bool[Array, " n"]) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """a, b and c of a exp(bt) + c at t = 0, 1, …, n - 1, by least squares over the kept points."""
    dtype, n = losses.dtype, losses.size
    weights = kept.astype(dtype)
    y, t, total = jnp.where(kept, losses, 0), jnp.arange(n, dtype=dtype), jnp.sum(weights)
    mean = jnp.sum(y) / total

    def linear(log_decay):
        """a, c and the sum of squares for b = -exp(log_decay), in exp(bt) - 1, which keeps its digits for small b."""
        shape = jnp.expm1(-jnp.exp(log_decay) * t)
        middle = jnp.sum(weights * shape) / total
        spread = jnp.sum(weights * (shape - middle) ** 2)  # 0 if the exponential is over before the first kept point
        a = jnp.sum(weights * (shape - middle) * (y - mean)) / jnp.where(spread > 0, spread, 1)
        squares = jnp.sum(weights * (y - mean - a * (shape - middle)) ** 2)
        return a, mean - a * (middle + 1), squares

    def narrow(carry, _):
        low, high = carry
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        lower = linear(left)[2] < linear(right)[2]
        return (jnp.where(lower, low, left), jnp.where(lower, right, high)), None

    grid = jnp.linspace(jnp.log(0.05 / n), jnp.log(5.0), _GRID, dtype=dtype)
    best = grid[jnp.argmin(jax.vmap(linear)(grid)[2])]
    step = grid[1] - grid[0]
    (low, high), _ = jax.lax.scan(narrow, (best - step, best + step), length=30)
    log_decay = (low + high) / 2
    a, c, _ = linear(log_decay)
    return a, -jnp.exp(log_decay), c


def forecast_loss(
    losses: Float[Array, " n"],
    time: Scalar,
    *,
    share: Scalar = 0.03,
    num_passes: int = 10,
    to_parabola: bool = False,
) -> Float[Array, ""]:
    """L(`time`) from the losses at times 0, 1, …, n - 1.

    - `losses`: at least 4. A series with a value that is not finite gives NaN.
    - `time`: in units of the spacing of the losses; may be traced.
    - `share`, `num_passes`: of the cleaning, see `kept_points`.
    - `to_parabola`: fit the exponential to the values of the last parabola at all times, as the authors' code does. Default False: to the points
      left.

    Compiles, and batches over series. A window in which the loss has no curvature yet says nothing about its level: forecasts from such ones are
    wrong by half and more. Raises `ValueError` as `kept_points`.
    """
    kept = kept_points(losses, share=share, num_passes=num_passes)
    if to_parabola:
        a, b, c = fit_exponential(parabola(losses, kept), jnp.ones_like(kept))
    else:
        a, b, c = fit_exponential(losses, kept)
    return jnp.where(jnp.isfinite(losses).all(), a * jnp.exp(b * jnp.asarray(time, losses.dtype)) + c, jnp.nan)


def forecast_validation_loss(losses: Float[Array, " n"], time: Scalar) -> Float[Array, ""]:
    """`forecast_loss` as the authors clean the few values of a validation loss: the worst point goes, if it lies in the first half."""
    return forecast_loss(losses, time, share=1 / losses.size, num_passes=1)


def _check_series(losses) -> None:
    if losses.ndim != 1 or losses.size < 4:
        raise ValueError(f"`losses` must be a vector of at least 4 values, got shape {losses.shape}.")


__all__ = ["fit_exponential", "forecast_loss", "forecast_validation_loss", "kept_points", "parabola"]
