"""Kinetic optimal probability paths: the Gaussian path whose marginal velocity moves the data's mass with the least energy.

Shaul, Chen, Nickel, Le, Lipman 2023 (arXiv:2306.06626). For data of mean 0 and E|x₁|² = d on x_t = α x₁ + σ x₀, the marginal velocity is
u = E[α' x₁ + σ' x₀ | x_t]. With the data separation λ = E|E[x₁ | x_t]|²/d, which is a function of α/σ alone,

    KE = ½ ∫ E|u|²/d dt = ½ ∫ α'² + σ'² - (1 - λ) (α' - α σ'/σ)² dt.

In α = r sin θ, σ = r cos θ it is ½ ∫ r'² + m(θ) r² θ'² dt with m = 1 - (1 - λ)/cos² θ in [0, 1]: the metric of a cone. Unrolled by the angle
φ(θ) = ∫₀^θ √m, its shortest paths at constant speed are straight lines: from 0 to Φ = φ(π/2) the chord

    r² = 1 - 4 t (1 - t) sin²(Φ/2),   tan φ = t sin Φ/(1 - t + t cos Φ),   KE = 2 sin²(Φ/2),   θ = φ⁻¹(φ(t)).

Where data are few for their dimension, λ → 1 and the chord is the straight line of `FlowMatchingPath`, KE = 1; for Gaussian data KE = 0.

    metric = VelocityMetric(denoised, data, noise)                                # m, of a data set, a mixture or a trained model
    path = fit_kinetic_optimal_path(metric)                                       # an `AffinePath`, for any objective, solver and grid

The paper solves an ODE for θ; here √m is linear between the nodes of a table, so that φ, its inverse and all clocks have closed forms (error h²).
√m >= `floor`: where m = 0 (at θ = 0 for all data of mean 0, everywhere for Gaussian data) the best path has an infinite or no definite velocity. And
m is measured as a mean square of its own, of the velocity in θ of x = sin θ x₁ + cos θ x₀: no difference of two large numbers, never negative.
"""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_count, check_range
from ..core.path import AffinePath, CosinePath
from ..core.types import Scalar, Time, VectorField


#: x = sin θ x₁ + cos θ x₀ at t = 2θ/π: the path on which m is measured.
TRIGONOMETRIC = CosinePath(0.0)


class KineticOptimalPath(AffinePath):
    """The optimal path of a table of √m. Made by `fit_kinetic_optimal_path`.

    - `slopes`: dφ/dθ = √m > 0 at equally spaced θ from 0 (noise) to π/2 (data), at least two.
    """

    slopes: Float[Array, " nodes"]

    def __check_init__(self):
        check_count("the number of `slopes`", self.slopes.shape[0], low=2)
        check_range("slopes", self.slopes, low=0.0, open_low=True)

    @property
    def cone_angle(self) -> Float[Array, ""]:
        """Φ."""
        return _starts(self.slopes)[-1]

    @property
    def kinetic_energy(self) -> Float[Array, ""]:
        """2 sin²(Φ/2), per dimension."""
        return 2 * jnp.sin(self.cone_angle / 2) ** 2

    def _polar(self, t):
        """(r, θ, π/2 - θ), each angle measured from its own end: nothing cancels where a clock is small."""
        t = jnp.asarray(t)
        slopes = self.slopes.astype(t.dtype)
        cone = _starts(slopes)[-1]
        sine, cosine = jnp.sin(cone), jnp.cos(cone)
        from_noise = jnp.arctan2(t * sine, (1 - t) + t * cosine)
        from_data = jnp.arctan2((1 - t) * sine, t + (1 - t) * cosine)
        radius = jnp.sqrt(1 - 4 * t * (1 - t) * jnp.sin(cone / 2) ** 2)
        return radius, _angle(from_noise, slopes), _angle(from_data, slopes[::-1])

    def alpha(self, t):
        radius, theta, _ = self._polar(t)
        return radius * jnp.sin(theta)

    def sigma(self, t):
        radius, _, complement = self._polar(t)
        return radius * jnp.sin(complement)

    def log_alpha(self, t):
        return jnp.log(self.alpha(t))

    def log_sigma(self, t):
        return jnp.log(self.sigma(t))

    def time(self, log_snr):
        half = jnp.asarray(log_snr) / 2
        slopes = self.slopes.astype(half.dtype)
        from_noise = jnp.sin(_distance(jnp.arctan(jnp.exp(half)), slopes))
        from_data = jnp.sin(_distance(jnp.arctan(jnp.exp(-half)), slopes[::-1]))
        # the law of sines in the triangle that φ cuts off
        return from_noise / (from_noise + from_data)


def _spacing(slopes):
    return math.pi / 2 / (slopes.shape[0] - 1)


def _starts(slopes):
    """φ at the nodes."""
    steps = (slopes[:-1] + slopes[1:]) / 2 * _spacing(slopes)
    return jnp.concatenate([jnp.zeros_like(slopes[:1]), jnp.cumsum(steps)])


def _segment(position, nodes):
    return jnp.clip(jnp.sum(position[..., None] >= nodes, axis=-1) - 1, 0, nodes.shape[0] - 2)


def _angle(distance, slopes):
    """θ with φ(θ) = `distance`: the root of a quadratic, in its form without cancellation."""
    starts = _starts(slopes)
    i = _segment(distance, starts)
    rest, bend = distance - starts[i], (slopes[i + 1] - slopes[i]) / _spacing(slopes)
    return i.astype(slopes.dtype) * _spacing(slopes) + 2 * rest / (slopes[i] + jnp.sqrt(slopes[i] ** 2 + 2 * bend * rest))


def _distance(angle, slopes):
    """φ(θ) at θ = `angle`."""
    nodes = jnp.arange(slopes.shape[0], dtype=slopes.dtype) * _spacing(slopes)
    i = _segment(angle, nodes)
    rest, bend = angle - nodes[i], (slopes[i + 1] - slopes[i]) / _spacing(slopes)
    return _starts(slopes)[i] + rest * (slopes[i] + bend * rest / 2)


def fit_kinetic_optimal_path(metric: Callable, num_nodes: int = 257, floor: Scalar = 1e-3) -> KineticOptimalPath:
    """The kinetic optimal path of data with mean 0 and E|x₁|² = d.

    - `metric`: θ -> m, a scalar to a scalar: `VelocityMetric`, `SeparationMetric`, or a formula.
    - `num_nodes`: of the table, default 257. `floor`: the least √m, default 1e-3; it adds at most (π floor)²/8 to the energy.
    """
    check_count("num_nodes", num_nodes, low=2)
    check_range("floor", floor, low=0.0, high=1.0, open_low=True)
    values = jax.lax.map(metric, math.pi / 2 * jnp.linspace(0, 1, num_nodes))
    return KineticOptimalPath(jnp.sqrt(jnp.clip(values, jnp.asarray(floor, values.dtype) ** 2, 1)))


def _before_the_end(angle):
    """At θ = π/2 m is a limit 0/0: it is read where the limit's error is as large as that of rounding."""
    return jnp.minimum(angle, math.pi / 2 - float(jnp.finfo(angle.dtype).eps) ** 0.25)


class SeparationMetric(eqx.Module):
    """m of a data separation in closed form: `separation` is s = α/σ -> λ, in [s²/(1 + s²), 1]."""

    separation: Callable

    def __call__(self, angle: Scalar) -> Float[Array, ""]:
        """1 - (1 - λ)/cos² θ."""
        angle = _before_the_end(jnp.asarray(angle))
        return 1 - (1 - self.separation(jnp.tan(angle))) / jnp.cos(angle) ** 2


class VelocityMetric(eqx.Module):
    """m = E|E[dx/dθ | x]|²/d at x = sin θ x₁ + cos θ x₀, by its mean over given pairs; E[dx/dθ | x] = (D - sin θ x)/cos θ.

    - `denoised`: D = E[x₁ | x] on `TRIGONOMETRIC`, `(t, x, args)` with t = 2θ/π, on ONE example: a trained `Denoiser`, the exact
      `mixture.denoiser(TRIGONOMETRIC)`, or for a data set `GaussianMixture.isotropic(jnp.ones(n), points, 0.0).denoiser(TRIGONOMETRIC)`.
    - `data`, `noise`: (n, *x), draws of x₁ and of N(0, I). The relative error of m is about √(2/(n d)).
    """

    denoised: VectorField
    data: Float[Array, "n *x"]
    noise: Float[Array, "n *x"]

    def __call__(self, angle: Scalar) -> Float[Array, ""]:
        """The mean over the pairs."""
        angle = _before_the_end(jnp.asarray(angle, self.data.dtype))
        x = jnp.sin(angle) * self.data + jnp.cos(angle) * self.noise
        denoised = jax.vmap(lambda x: self.denoised(2 / math.pi * angle, x, None))(x)
        return jnp.mean(((denoised - jnp.sin(angle) * x) / jnp.cos(angle)) ** 2)


def kinetic_energy_density(path: AffinePath, metric: Callable, t: Time) -> Float[Array, ""]:
    """½ E|u|²/d of any path at one scalar `t`; its integral over t is KE."""
    alpha, sigma, d_alpha, d_sigma = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)
    radial, angular = alpha * d_alpha + sigma * d_sigma, sigma * d_alpha - alpha * d_sigma
    return (radial**2 + metric(jnp.arctan2(alpha, sigma)) * angular**2) / (2 * (alpha**2 + sigma**2))


__all__ = ["TRIGONOMETRIC", "KineticOptimalPath", "SeparationMetric", "VelocityMetric", "fit_kinetic_optimal_path", "kinetic_energy_density"]
