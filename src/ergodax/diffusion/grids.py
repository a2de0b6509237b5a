"""Time grids: arrays of shape (N + 1,) from noise to data, for `DenoiserTerm`. Their shape parameters may be traced and swept; N is static.

`start` and `end` are times on [0, 1]. Leave a little room at an end where the path's clocks are infinite and the solver needs them.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_count, check_range, is_concrete
from ..core.path import AffinePath
from ..core.types import Scalar


def _check(num_steps, start, end):
    check_count("num_steps", num_steps)
    check_range("start", start, low=0.0, high=1.0)
    check_range("end", end, low=0.0, high=1.0)


def uniform_grid(num_steps: int, start: Scalar = 0.0, end: Scalar = 1.0) -> Float[Array, " steps"]:
    """Equal steps of t."""
    _check(num_steps, start, end)
    return jnp.linspace(start, end, num_steps + 1)


def quadratic_grid(num_steps: int, start: Scalar = 0.0, end: Scalar = 1.0) -> Float[Array, " steps"]:
    """Equal steps of √(1 - t): finer towards the data. Song, Meng, Ermon 2021 (arXiv:2010.02502), appendix D.2."""
    _check(num_steps, start, end)
    root = jnp.linspace(jnp.sqrt(1.0 - start), jnp.sqrt(1.0 - end), num_steps + 1)
    return (1 - root**2).at[-1].set(end).at[0].set(start)


def log_snr_grid(path: AffinePath, num_steps: int, start: Scalar = 1e-3, end: Scalar = 1 - 1e-3) -> Float[Array, " steps"]:
    """Equal steps of log(α²/σ²), which must be finite at both ends. Lu et al. 2022 (arXiv:2206.00927), section 3.4."""
    _check(num_steps, start, end)
    ends = path.log_snr(jnp.asarray(start)), path.log_snr(jnp.asarray(end))
    # The ends are what was asked for, to the bit: an inverse only rounds.
    return path.time(jnp.linspace(*ends, num_steps + 1)).at[0].set(start).at[-1].set(end)


def karras_grid(path: AffinePath, num_steps: int, sigma_min: Scalar = 0.002, sigma_max: Scalar = 80.0, rho: Scalar = 7.0) -> Float[Array, " steps"]:
    """`num_steps` noise levels σ/α with equal steps of their ρ-th root, and t = 1 after them.

    Karras, Aittala, Aila, Laine 2022 (arXiv:2206.00364) eq. 5; defaults theirs, for data of standard deviation 0.5. On `EDMPath` and other paths with
    σ(1) = 0 the last step goes to σ = 0, as theirs does. The levels must lie on the path.
    """
    check_count("num_steps", num_steps, low=2)
    check_range("sigma_min", sigma_min, low=0.0, open_low=True)
    check_range("sigma_max", sigma_max, low=float(sigma_min) if is_concrete(sigma_min) else 0.0, open_low=True)
    check_range("rho", rho, low=0.0, open_low=True)
    levels = jnp.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps) ** rho
    # Rounding must not leave [0, 1]; levels off the path end up equal there, which `DenoiserTerm` refuses.
    return jnp.append(jnp.clip(path.time(-2 * jnp.log(levels)), 0.0, 1.0), 1.0)


__all__ = ["karras_grid", "log_snr_grid", "quadratic_grid", "uniform_grid"]
