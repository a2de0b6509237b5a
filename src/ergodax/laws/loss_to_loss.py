"""Loss-to-loss prediction: a loss on one data set from the loss on another.

Brandfonbrener, Anand, Vyas, Malach, Kakade 2024 (arXiv:2411.12925). Between losses of models paired by size and compute runs a shifted power law,

    L₁ = K (L₀ - E₀)^κ + E₁,

with E₀ and E₁ the irreducible losses. One form, three uses:

    train to train   L₀, L₁ of models f₀, f₁ of one size and compute, trained on two data sets;
    train to test    L₀ and L₁ of one model, on its training data and on another set;
    test to test     L₀ and L₁ on one test set, of f₀ and f₁.

Such maps form a group: `inverse`, and `then`, by which test to test follows from the other two. E₀ and E₁ of training losses come from fits of
L(N, D) on each data set: `fit_surface`, the authors' recipe. K and κ are then the line through log(L₁ - E₁) against log(L₀ - E₀)
(`fit_loss_to_loss` with `target_floor`), or E₁ is the third parameter of a least-squares fit of L₁ itself, from E₁ > 0 on (without).

If the losses are E₀ + a₀ C^-g₀ and E₁ + a₁ C^-g₁ of the compute, the relation is exact with κ = g₁/g₀ and K = a₁ a₀^-κ; `translate` turns one such
curve into the other.

What is gained: with E₁ known, a few small runs on the new data predict large ones better than a curve of their own. With E₁ fitted there are as many
parameters as in a curve of its own, and nothing is gained.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from ..core.check import check_range
from ..core.types import Scalar
from .fitting import LawFit, fit_law, huber_log, squared
from .power_law import Amount, CompoundSurface, OffsetPowerLaw, PowerLaw, Sizes


class LossToLoss(eqx.Module):
    """L₁ = K (L₀ - E₀)^κ + E₁ with positive K, κ and E₁, stored as logarithms; E₀ is given, never fitted.

    `law(L₀)`: losses of any shape; E₁ for a loss at or below E₀.
    """

    log_scale: Float[Array, "..."]
    log_exponent: Float[Array, "..."]
    source_floor: Float[Array, "..."]
    log_target_floor: Float[Array, "..."]

    @classmethod
    def of(cls, scale: Scalar, exponent: Scalar, source_floor: Scalar, target_floor: Scalar) -> "LossToLoss":
        """From K, κ > 0 and E₀, E₁ ≥ 0."""
        check_range("source_floor", source_floor, low=0.0)
        check_range("target_floor", target_floor, low=0.0)
        check_range("scale", scale, low=0.0, open_low=True)
        check_range("exponent", exponent, low=0.0, open_low=True)
        dtype = jnp.result_type(float, scale, exponent, source_floor, target_floor)
        scale, exponent, source_floor, target_floor = (jnp.asarray(x, dtype) for x in (scale, exponent, source_floor, target_floor))
        return cls(jnp.log(scale), jnp.log(exponent), source_floor, jnp.log(target_floor))

    @property
    def scale(self) -> Float[Array, "..."]:
        """K."""
        return jnp.exp(self.log_scale)

    @property
    def exponent(self) -> Float[Array, "..."]:
        """κ."""
        return jnp.exp(self.log_exponent)

    @property
    def target_floor(self) -> Float[Array, "..."]:
        """E₁."""
        return jnp.exp(self.log_target_floor)

    def log_excess(self, loss: Amount) -> Float[Array, "..."]:
        """log(L₁ - E₁); -∞ at or below E₀."""
        excess = jnp.asarray(loss, self.log_scale.dtype) - self.source_floor
        above = excess > 0
        return jnp.where(above, self.log_scale + self.exponent * jnp.log(jnp.where(above, excess, 1)), -jnp.inf)

    def __call__(self, loss: Amount) -> Float[Array, "..."]:
        return self.target_floor + jnp.exp(self.log_excess(loss))

    def inverse(self) -> "LossToLoss":
        """The map back, L₁ -> L₀."""
        back = -self.log_scale / self.exponent
        return LossToLoss(back, -self.log_exponent, self.target_floor, jnp.log(self.source_floor))

    def then(self, second: "LossToLoss") -> "LossToLoss":
        """`second` after this, L₀ -> L₂. The floor in between, E₁, must be one: `second.source_floor` is taken to be it."""
        log_scale = second.log_scale + second.exponent * self.log_scale
        return LossToLoss(log_scale, self.log_exponent + second.log_exponent, self.source_floor, second.log_target_floor)

    def translate(self, curve: OffsetPowerLaw) -> OffsetPowerLaw:
        """The curve of L₁ from the curve of L₀ (of compute, size or data), whose floor is taken to be E₀."""
        coefficient = self.log_scale + self.exponent * curve.log_coefficient
        return OffsetPowerLaw(self.log_target_floor, coefficient, self.log_exponent + curve.log_exponent)


class LossToLossFit(eqx.Module):
    """A fitted map with what its errors say: `fit.interval(L₀)` bounds the loss of a new run.

    - `law`: the map.
    - `covariance`: of (log K, log κ), and of log E₁ if it was fitted; as of least squares with errors of one size.
    - `deviation`: the standard deviation of these errors, of log(L₁ - E₁) with a known E₁ and of L₁ otherwise.
    - `degrees` (static): points less parameters.
    - `known_floor` (static): whether E₁ was given.
    """

    law: LossToLoss
    covariance: Float[Array, "p p"]
    deviation: Float[Array, ""]
    degrees: int = eqx.field(static=True)
    known_floor: bool = eqx.field(static=True)

    def interval(self, loss: Amount, *, level: float = 0.9, source_error: Amount = 0.0) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """(low, high) between which L₁ of one new run lies with probability `level` (static), where the run's L₀ is `loss`.

        Student's t interval, exact for a known E₁ and normal errors of log(L₁ - E₁). It takes E₀, and E₁ where it was given, as exact.

        - `source_error`: standard error of `loss` where it is itself predicted, such as `curve_fit.standard_error(lambda law: law(x))`; its normal
          interval is added in squares, which is a little too wide.

        Raises `ValueError` for a level outside (0, 1), and where there were no more points than parameters.
        """
        from scipy.special import ndtri, stdtrit

        check_range("level", level, low=0.0, high=1.0, open_low=True, open_high=True)
        if self.degrees < 1:
            raise ValueError("an interval needs more points than parameters, and the fit had as many.")
        scaled = _scaled(self.law, self.known_floor)
        vector, _ = ravel_pytree(_free(self.law, self.known_floor))
        loss = jnp.asarray(loss, vector.dtype)
        middle, slope = jax.jvp(lambda loss: scaled(vector, loss), (loss,), (jnp.ones_like(loss),))
        gradient = jax.jacfwd(lambda vector: scaled(vector, loss))(vector)
        variance = self.deviation**2 + jnp.einsum("...i,ij,...j->...", gradient, self.covariance, gradient)
        t, z = (jnp.asarray(quantile, vector.dtype) for quantile in (stdtrit(self.degrees, (1 + level) / 2), ndtri((1 + level) / 2)))
        half = jnp.sqrt(t**2 * variance + (z * slope * jnp.asarray(source_error, vector.dtype)) ** 2)
        low, high = middle - half, middle + half
        return (self.law.target_floor + jnp.exp(low), self.law.target_floor + jnp.exp(high)) if self.known_floor else (low, high)


def _free(law, known_floor):
    return (law.log_scale, law.log_exponent) if known_floor else (law.log_scale, law.log_exponent, law.log_target_floor)


def _scaled(law, known_floor):
    """(free parameters, L₀) -> what has errors of one size: log(L₁ - E₁), or L₁."""

    def with_parameters(vector):
        return eqx.tree_at(lambda law: _free(law, known_floor), law, tuple(vector))

    if known_floor:
        return lambda vector, loss: with_parameters(vector).log_excess(loss)
    return lambda vector, loss: with_parameters(vector)(loss)


def fit_loss_to_loss(
    source: Float[Array, " n"],
    target: Float[Array, " n"],
    source_floor: Scalar,
    target_floor: Scalar | None = None,
) -> LossToLossFit:
    """The map from paired losses.

    - `source`, `target`: L₀ and L₁ of the same n runs, or of runs of one size and compute.
    - `source_floor`: E₀, from a fit of its own (`fit_surface`, or an `OffsetPowerLaw`).
    - `target_floor`: E₁, likewise: K and κ are then a straight line, n ≥ 2. Default: fitted too, between 0 and the losses, n ≥ 3.

    Raises `ValueError` for too few runs, shapes that differ, and losses that are not finite or not above their floor.
    """
    source, target = jnp.asarray(source), jnp.asarray(target)
    if source.ndim != 1 or source.shape != target.shape:
        raise ValueError(f"`source` and `target` must be vectors of one length, got {source.shape} and {target.shape}.")
    known = target_floor is not None
    p = 2 if known else 3
    if source.size < p:
        raise ValueError(f"{source.size} runs cannot determine {p} parameters: at least {p} are needed.")
    check_range("source - source_floor", source - source_floor, low=0.0, open_low=True, open_high=True)
    check_range("target - target_floor", target - (target_floor if known else 0.0), low=0.0, open_low=True, open_high=True)
    source_floor, excess = jnp.asarray(source_floor, source.dtype), source - source_floor
    if known:
        floors = jnp.asarray(target_floor, source.dtype)[None]
    else:
        floors = jnp.asarray([0.05, 0.5, 0.8, 0.95, 0.99], source.dtype) * jnp.min(target)
    lines = jax.vmap(lambda floor: PowerLaw.starts(excess, target - floor))(floors)
    exponents = jnp.log(jnp.maximum(lines.exponent[:, 0], 1e-3))
    starts = LossToLoss(lines.log_coefficient[:, 0], exponents, jnp.broadcast_to(source_floor, floors.shape), jnp.log(floors))
    if known:
        law = jax.tree.map(lambda leaf: leaf[0], starts)
    else:
        free = eqx.tree_at(lambda law: law.source_floor, jax.tree.map(lambda _: True, starts), False)
        law = fit_law(starts, source, target, objective=squared(), free=free).law

    scaled = _scaled(law, known)
    vector, _ = ravel_pytree(_free(law, known))
    jacobian = jax.jacfwd(lambda vector: scaled(vector, source))(vector)
    errors = (jnp.log(target - law.target_floor) if known else target) - scaled(vector, source)
    degrees = source.size - p
    variance = jnp.sum(errors**2) / max(degrees, 1)
    return LossToLossFit(law, variance * jnp.linalg.inv(jacobian.T @ jacobian), jnp.sqrt(variance), degrees, known)


def fit_surface(sizes: Sizes, losses: Float[Array, " n"], *, max_steps: int = 500) -> LawFit[CompoundSurface]:
    """L(N, D) = E + ((A/N)^{α/β} + B/D)^β of one data set by the authors' objective (Huber's, 1e-3, of log residuals) and sixteen starts.

    `sizes`: (parameters, tokens), counted one by one; their minimiser is L-BFGS, ours that of `fit_law`, which goes to the minimum.
    """
    return fit_law(CompoundSurface.starts(sizes, losses), sizes, losses, objective=huber_log(1e-3), max_steps=max_steps)


__all__ = ["LossToLoss", "LossToLossFit", "fit_loss_to_loss", "fit_surface"]
