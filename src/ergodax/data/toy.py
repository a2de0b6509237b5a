"""Two-dimensional toy data. Unless said otherwise the definitions and scales are those of Grathwohl et al. 2019 (FFJORD, arXiv:1810.01367), in their
published `toy_data.py`, which most flow and diffusion papers copy. Draws are independent (scikit-learn's moons are evenly spaced instead).

Samplers are `(key, n, ...) -> (n, 2)` in the default float dtype; `n` is static, the shape parameters may be traced.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ergodax.core.check import check_count, check_range
from ergodax.core.types import PRNGKey, Scalar

from .mixture import GaussianMixture


def eight_gaussians(radius: Scalar = 2.0, std: Scalar = 0.1) -> GaussianMixture:
    """Eight equal modes N(c_k, `std`² I) evenly on a circle of `radius`, the first at angle 0.

    The ring of Metz et al. 2017 (Unrolled GANs, arXiv:1611.02163) with its radius 2; their std is 0.02. FFJORD's version is `radius=2.83, std=0.354`.
    """
    check_range("radius", radius, low=0.0)
    angle = np.arange(8) * (np.pi / 4)
    circle = jnp.asarray(np.stack([np.cos(angle), np.sin(angle)], axis=-1), jnp.result_type(float))
    return GaussianMixture.isotropic(jnp.ones(8), jnp.asarray(radius, circle.dtype) * circle, std)


def two_moons(key: PRNGKey, n: int, noise: Scalar = 0.1) -> Float[Array, "n 2"]:
    """Two interleaved unit half circles, (cos θ, sin θ) and (1 - cos θ, ½ - sin θ) with θ ~ U(0, π), each with probability ½, plus N(0, `noise`² I).

    The definition and scale of scikit-learn's `make_moons`; noise 0.1 as in FFJORD (which then doubles the scale).
    """
    check_count("n", n)
    check_range("noise", noise, low=0.0)
    moon_key, angle_key, noise_key = jax.random.split(key, 3)
    lower = jax.random.bernoulli(moon_key, shape=(n,))
    angle = jax.random.uniform(angle_key, (n,), maxval=np.pi)
    x, y = jnp.cos(angle), jnp.sin(angle)
    points = jnp.stack([jnp.where(lower, 1 - x, x), jnp.where(lower, 0.5 - y, y)], axis=-1)
    return points + _noise(noise_key, n, noise)


def checkerboard(key: PRNGKey, n: int) -> Float[Array, "n 2"]:
    """Uniform on the 8 cells (side 2) of a 4 x 4 board on [-4, 4)² for which ⌊x/2⌋ + ⌊y/2⌋ is even. `checkerboard_log_prob` is its density."""
    check_count("n", n)
    column_key, row_key, cell_key = jax.random.split(key, 3)
    column = jax.random.randint(column_key, (n,), -2, 2)
    row = 2 * jax.random.randint(row_key, (n,), -1, 1) + column % 2
    within = jax.random.uniform(cell_key, (n, 2))
    return 2 * (jnp.stack([column, row], axis=-1).astype(within.dtype) + within)


def checkerboard_log_prob(x: Float[Array, "*batch 2"]) -> Float[Array, "*batch"]:
    """log-density of `checkerboard` at points (..., 2): -log 32 on its cells, -inf elsewhere."""
    filled = (jnp.floor(x / 2).sum(axis=-1) % 2 == 0) & jnp.all((x >= -4) & (x < 4), axis=-1)
    return jnp.where(filled, jnp.asarray(-np.log(32), x.dtype), -jnp.inf)


def swiss_roll(key: PRNGKey, n: int, noise: Scalar = 0.2) -> Float[Array, "n 2"]:
    """The spiral (θ cos θ, θ sin θ)/5, θ ~ U(3π/2, 9π/2), plus N(0, `noise`² I): scikit-learn's `make_swiss_roll` without its depth, divided by 5.

    `noise` is in output units: FFJORD's 1.0 before the division is the default 0.2.
    """
    check_count("n", n)
    check_range("noise", noise, low=0.0)
    angle_key, noise_key = jax.random.split(key)
    angle = jax.random.uniform(angle_key, (n,), minval=1.5 * np.pi, maxval=4.5 * np.pi)
    return jnp.stack([angle * jnp.cos(angle), angle * jnp.sin(angle)], axis=-1) / 5 + _noise(noise_key, n, noise)


def pinwheel(
    key: PRNGKey,
    n: int,
    num_arms: int = 5,
    radial_std: Scalar = 0.3,
    tangential_std: Scalar = 0.1,
    rate: Scalar = 0.25,
) -> Float[Array, "n 2"]:
    """`num_arms` equal arms: z ~ N((1, 0), diag(`radial_std`², `tangential_std`²)), doubled and turned clockwise by 2πk/`num_arms` + `rate` exp(z₁).

    Johnson et al. 2016 (structured VAEs, arXiv:1603.06277), with the numbers of FFJORD.
    """
    check_count("n", n)
    check_count("num_arms", num_arms)
    check_range("radial_std", radial_std, low=0.0)
    check_range("tangential_std", tangential_std, low=0.0)
    arm_key, noise_key = jax.random.split(key)
    arm = jax.random.randint(arm_key, (n,), 0, num_arms)
    radial, tangential = jax.random.normal(noise_key, (2, n))
    radial_std, tangential_std, rate = (jnp.asarray(value, radial.dtype) for value in (radial_std, tangential_std, rate))
    radial, tangential = 1 + radial_std * radial, tangential_std * tangential
    angle = (2 * np.pi / num_arms) * arm.astype(radial.dtype) + rate * jnp.exp(radial)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return 2 * jnp.stack([cos * radial + sin * tangential, cos * tangential - sin * radial], axis=-1)


def _noise(key, n, std):
    draws = jax.random.normal(key, (n, 2))
    return jnp.asarray(std, draws.dtype) * draws


__all__ = ["checkerboard", "checkerboard_log_prob", "eight_gaussians", "pinwheel", "swiss_roll", "two_moons"]
