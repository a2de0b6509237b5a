"""Power laws, straight and with an offset, and the loss surfaces over model size and data that are built of them.

    PowerLaw            y(x) = A x^m
    OffsetPowerLaw      L(x) = E + A / x^α
    AdditiveSurface     L(N, D) = E + A / N^α + B / D^β                          (Hoffmann et al. 2022, arXiv:2203.15556; Hu et al. 2024, eq. of §4.5)
    CompoundSurface     L(N, D) = E + ((A / N)^{α/β} + B / D)^β                  (Kaplan et al. 2020, arXiv:2001.08361; Brandfonbrener et al. 2024)

N counts parameters, D tokens. With C = 6 N D operations to spend, dL/dN = 0 along D = C / (6 N) gives the compute-optimal sizes

    N* = (a A' / (b B'))^{1/(a+b)} (C/6)^{b/(a+b)},   D* = C / (6 N*),   L* = E + G / C^g,   g = α β / (α + β),

where (A', a, B', b) = (A, α, B, β) for the additive surface and (A^{α/β}, α/β, B, 1) for the other, whose outer power leaves the minimum where it
is. `optimal_sizes` gives N* and D*, `frontier` L* as an `OffsetPowerLaw` of C.

Every law is a Module whose leaves are its free parameters, for `fit_law`. What must be positive (A, B, E, α, β) is stored as its logarithm, so no
fit can leave the range; `of` takes, and properties give, the parameters themselves. `starts` stacks points from which `fit_law` may set out: given α
and β (or E) the rest of a law is linear, so all but `CompoundSurface` solve for the rest on a small grid. Predictions have the parameters' dtype.

`batch_size_of_loss`: the batch of Hu, Tu, Han et al. 2024 (MiniCPM, arXiv:2404.06395), 1.21e9 / L^6.24 tokens.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from ..core.check import check_range
from ..core.types import Scalar


#: A number, or any array that broadcasts with what else is given.
Amount = Scalar | Real[Array, "..."] | Real[np.ndarray, "..."]

#: (N, D): parameters and tokens.
Sizes = tuple[Amount, Amount]


def logarithms(**values: Scalar) -> dict[str, Array]:
    """{"log_" + name: log(value)} of positive values, in one dtype."""
    for name, value in values.items():
        check_range(name, value, low=0.0, open_low=True)
    dtype = jnp.result_type(float, *values.values())
    return {f"log_{name}": jnp.log(jnp.asarray(value, dtype)) for name, value in values.items()}


def _line(log_x: Float[Array, " n"], log_y: Float[Array, " n"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Intercept and slope of the least-squares line."""
    x = log_x - jnp.mean(log_x)
    slope = jnp.sum(x * log_y) / jnp.sum(x**2)
    return jnp.mean(log_y) - slope * jnp.mean(log_x), slope


def _log_optimum(log_a, a, log_b, b, log_product):
    """log N and log D that minimise A' N^-a + B' D^-b where N D = exp(log_product)."""
    log_n = (jnp.log(a / b) + log_a - log_b + b * log_product) / (a + b)
    return log_n, log_product - log_n


class PowerLaw(eqx.Module):
    """y = A x^m: a straight line on logarithmic axes. The exponent may have either sign.

    `law(x)`: x > 0 of any shape.
    """

    log_coefficient: Float[Array, "..."]
    exponent: Float[Array, "..."]

    @classmethod
    def of(cls, coefficient: Scalar, exponent: Scalar) -> "PowerLaw":
        """From A > 0 and m."""
        check_range("coefficient", coefficient, low=0.0, open_low=True)
        dtype = jnp.result_type(float, coefficient, exponent)
        return cls(jnp.log(jnp.asarray(coefficient, dtype)), jnp.asarray(exponent, dtype))

    @classmethod
    def starts(cls, x: Float[Array, " n"], y: Float[Array, " n"]) -> "PowerLaw":
        """The least-squares line through the logarithms: one start, and the answer already if the errors of log y are alike."""
        intercept, slope = _line(jnp.log(x), jnp.log(y))
        return cls(intercept[None], slope[None])

    @property
    def coefficient(self) -> Float[Array, "..."]:
        """A."""
        return jnp.exp(self.log_coefficient)

    def __call__(self, x: Amount) -> Float[Array, "..."]:
        return jnp.exp(self.log_coefficient + self.exponent * jnp.log(jnp.asarray(x, self.exponent.dtype)))


class OffsetPowerLaw(eqx.Module):
    """L = E + A / x^α, falling from above towards its asymptote E.

    `law(x)`: x > 0 of any shape; x = ∞ gives E.
    """

    log_floor: Float[Array, "..."]
    log_coefficient: Float[Array, "..."]
    log_exponent: Float[Array, "..."]

    @classmethod
    def of(cls, floor: Scalar, coefficient: Scalar, exponent: Scalar) -> "OffsetPowerLaw":
        """From E, A and α, all positive."""
        return cls(**logarithms(floor=floor, coefficient=coefficient, exponent=exponent))

    @classmethod
    def starts(cls, x: Float[Array, " n"], y: Float[Array, " n"]) -> "OffsetPowerLaw":
        """Five starts: E at a tenth to 0.995 of the smallest loss, A and α from the line through log(y - E)."""
        floors = jnp.asarray([0.1, 0.6, 0.9, 0.97, 0.995], y.dtype) * jnp.min(y)
        intercepts, slopes = jax.vmap(lambda floor: _line(jnp.log(x), jnp.log(y - floor)))(floors)
        return cls(jnp.log(floors), intercepts, jnp.log(jnp.maximum(-slopes, 0.01)))

    @property
    def floor(self) -> Float[Array, "..."]:
        """E."""
        return jnp.exp(self.log_floor)

    @property
    def coefficient(self) -> Float[Array, "..."]:
        """A."""
        return jnp.exp(self.log_coefficient)

    @property
    def exponent(self) -> Float[Array, "..."]:
        """α."""
        return jnp.exp(self.log_exponent)

    def __call__(self, x: Amount) -> Float[Array, "..."]:
        return self.floor + jnp.exp(self.log_coefficient - self.exponent * jnp.log(jnp.asarray(x, self.log_floor.dtype)))

    def inverse(self, loss: Amount) -> Float[Array, "..."]:
        """The x that reaches `loss`; ∞ at the asymptote and below it."""
        loss = jnp.asarray(loss, self.log_floor.dtype)
        above = loss > self.floor
        excess = jnp.where(above, loss - self.floor, 1)
        return jnp.where(above, jnp.exp((self.log_coefficient - jnp.log(excess)) / self.exponent), jnp.inf)


class _Surface(eqx.Module):
    """What loss surfaces share. Subclasses say where the optimum lies."""

    log_floor: eqx.AbstractVar[Float[Array, "..."]]
    log_size_exponent: eqx.AbstractVar[Float[Array, "..."]]
    log_data_exponent: eqx.AbstractVar[Float[Array, "..."]]

    @abc.abstractmethod
    def _log_optimum(self, log_product: Array) -> tuple[Array, Array]:
        """log N* and log D* where N D = exp(log_product)."""

    @property
    def floor(self) -> Float[Array, "..."]:
        """E."""
        return jnp.exp(self.log_floor)

    @property
    def size_exponent(self) -> Float[Array, "..."]:
        """α."""
        return jnp.exp(self.log_size_exponent)

    @property
    def data_exponent(self) -> Float[Array, "..."]:
        """β."""
        return jnp.exp(self.log_data_exponent)

    def optimal_sizes(self, compute: Amount, *, cost: Scalar = 6.0) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """(N*, D*) with the smallest loss where `cost` N D = `compute`; `cost` (default 6) is the operations per parameter and token."""
        return jax.tree.map(jnp.exp, self._log_optimum(jnp.log(jnp.asarray(compute, self.log_floor.dtype) / cost)))


class AdditiveSurface(_Surface):
    """L(N, D) = E + A / N^α + B / D^β.

    `law((N, D))`: parameters and tokens, positive, of shapes that broadcast.
    """

    log_floor: Float[Array, "..."]
    log_size_coefficient: Float[Array, "..."]
    log_size_exponent: Float[Array, "..."]
    log_data_coefficient: Float[Array, "..."]
    log_data_exponent: Float[Array, "..."]

    @classmethod
    def of(cls, floor: Scalar, size_coefficient: Scalar, size_exponent: Scalar, data_coefficient: Scalar, data_exponent: Scalar) -> "AdditiveSurface":
        """From E, A, α, B and β, all positive."""
        size = {"size_coefficient": size_coefficient, "size_exponent": size_exponent}
        return cls(**logarithms(floor=floor, **size, data_coefficient=data_coefficient, data_exponent=data_exponent))

    @classmethod
    def starts(cls, sizes: Sizes, y: Float[Array, " n"]) -> "AdditiveSurface":
        """Sixteen starts: α and β from 0.2 to 1, then E, A and B by linear least squares (and at least a thousandth of the mean loss)."""
        log_n, log_d = (jnp.log(jnp.asarray(size, y.dtype)) for size in sizes)
        centre_n, centre_d = jnp.mean(log_n), jnp.mean(log_d)  # 1 / N^α is tiny beside 1: scaled columns keep the solve well conditioned
        grid = jnp.asarray([0.2, 0.4, 0.7, 1.0], y.dtype)
        a, b = (axis.ravel() for axis in jnp.meshgrid(grid, grid))

        def solve(a, b):
            columns = jnp.stack([jnp.ones_like(y), jnp.exp(a * (centre_n - log_n)), jnp.exp(b * (centre_d - log_d))], -1)
            gram = columns.T @ columns
            ridge = jnp.finfo(y.dtype).eps * jnp.trace(gram) * jnp.eye(3, dtype=y.dtype)
            return jnp.maximum(jnp.linalg.solve(gram + ridge, columns.T @ y), 1e-3 * jnp.mean(y))

        floor, size, data = jnp.log(jax.vmap(solve)(a, b)).T
        return cls(floor, size + a * centre_n, jnp.log(a), data + b * centre_d, jnp.log(b))

    def __call__(self, sizes: Sizes) -> Float[Array, "..."]:
        log_n, log_d = (jnp.log(jnp.asarray(size, self.log_floor.dtype)) for size in sizes)
        size = jnp.exp(self.log_size_coefficient - self.size_exponent * log_n)
        return self.floor + size + jnp.exp(self.log_data_coefficient - self.data_exponent * log_d)

    def _log_optimum(self, log_product):
        return _log_optimum(self.log_size_coefficient, self.size_exponent, self.log_data_coefficient, self.data_exponent, log_product)

    def frontier(self, *, cost: Scalar = 6.0) -> OffsetPowerLaw:
        """The loss at the optimal sizes as a law of compute, E + G / C^g."""
        a, b = self.size_exponent, self.data_exponent
        log_n, log_d = self._log_optimum(-jnp.log(jnp.asarray(cost, a.dtype)))
        coefficient = jnp.logaddexp(self.log_size_coefficient - a * log_n, self.log_data_coefficient - b * log_d)
        return OffsetPowerLaw(self.log_floor, coefficient, jnp.log(a * b / (a + b)))


class CompoundSurface(_Surface):
    """L(N, D) = E + ((A / N)^{α/β} + B / D)^β, which tends to E + (A/N)^α for D → ∞ and to E + (B/D)^β for N → ∞. A counts parameters, B tokens.

    `law((N, D))`: parameters and tokens, positive, of shapes that broadcast.
    """

    log_floor: Float[Array, "..."]
    log_size_scale: Float[Array, "..."]
    log_size_exponent: Float[Array, "..."]
    log_data_scale: Float[Array, "..."]
    log_data_exponent: Float[Array, "..."]

    @classmethod
    def of(cls, floor: Scalar, size_scale: Scalar, size_exponent: Scalar, data_scale: Scalar, data_exponent: Scalar) -> "CompoundSurface":
        """From E, A, α, B and β, all positive."""
        size = {"size_scale": size_scale, "size_exponent": size_exponent}
        return cls(**logarithms(floor=floor, **size, data_scale=data_scale, data_exponent=data_exponent))

    @classmethod
    def starts(cls, sizes: Sizes, y: Float[Array, " n"]) -> "CompoundSurface":
        """Sixteen starts, the same for all data, whose sizes are counted one by one: log A and log B in {5, 10, 15, 20}, log E = 0.5, α = β = 0.4.

        The grid of Brandfonbrener et al. 2024.
        """
        grid = jnp.asarray([5.0, 10.0, 15.0, 20.0], y.dtype)
        log_a, log_b = (axis.ravel() for axis in jnp.meshgrid(grid, grid))
        exponent = jnp.full_like(log_a, jnp.log(0.4))
        return cls(jnp.full_like(log_a, 0.5), log_a, exponent, log_b, exponent)

    def _log_excess(self, log_n, log_d):
        ratio = jnp.exp(self.log_size_exponent - self.log_data_exponent)
        return self.data_exponent * jnp.logaddexp(ratio * (self.log_size_scale - log_n), self.log_data_scale - log_d)

    def _log_optimum(self, log_product):
        ratio = jnp.exp(self.log_size_exponent - self.log_data_exponent)
        return _log_optimum(ratio * self.log_size_scale, ratio, self.log_data_scale, 1, log_product)

    def __call__(self, sizes: Sizes) -> Float[Array, "..."]:
        return self.floor + jnp.exp(self._log_excess(*(jnp.log(jnp.asarray(size, self.log_floor.dtype)) for size in sizes)))

    def frontier(self, *, cost: Scalar = 6.0) -> OffsetPowerLaw:
        """The loss at the optimal sizes as a law of compute, E + G / C^g."""
        a, b = self.size_exponent, self.data_exponent
        coefficient = self._log_excess(*self._log_optimum(-jnp.log(jnp.asarray(cost, a.dtype))))
        return OffsetPowerLaw(self.log_floor, coefficient, jnp.log(a * b / (a + b)))


def batch_size_of_loss(loss: Amount, coefficient: Scalar = 1.21e9, exponent: Scalar = 6.24) -> Float[Array, "..."]:
    """The batch that MiniCPM trains with to reach `loss` (in nats per token), coefficient / L^exponent tokens."""
    loss = jnp.asarray(loss)
    return jnp.asarray(coefficient, loss.dtype) * loss ** -jnp.asarray(exponent, loss.dtype)


__all__ = ["AdditiveSurface", "CompoundSurface", "OffsetPowerLaw", "PowerLaw", "batch_size_of_loss", "logarithms"]
