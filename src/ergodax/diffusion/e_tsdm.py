"""E-TSDM: networks that share their time condition in stretches near the data, where they would vary infinitely fast.

Yang, Feng, Zhang, Shen, Zhu, Huang, Zhang, Liu, Zhao, Zhou, Cheng 2023 (arXiv:2306.11251). With the usual schedules dσ/du is infinite at noise time
u = 1 - t = 0, and so is the rate at which the ideal noise prediction changes, d ε/du ~ u^(-1/2). E-TSDM divides [0, ũ) into n equal parts and shows
the network the left end of the part that u falls in,

    ε(x, u) -> ε(x, f(u)),   f(u) = max{ iũ/n : iũ/n ≤ u } for u < ũ,   f(u) = u from there on,

in training and in sampling. Only the network's condition changes: noise schedule, loss and solver keep the true time.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core.check import check_range
from ..core.types import PyTree, Scalar, Time, VectorField


def shared_time(t: Time, threshold: Scalar = 0.1, num_intervals: Scalar = 5) -> Float[Array, "..."]:
    """f, in our time: 1 - f(1 - t), of the shape and dtype of `t`. Idempotent; equal to `t` below 1 - `threshold`."""
    t = jnp.asarray(t)
    width = jnp.asarray(threshold, t.dtype) / jnp.asarray(num_intervals, t.dtype)
    # A left end may come back from 1 - (1 - u) as a number just below itself: it still belongs to the part that it opens.
    part = jnp.floor((1 - t + 4 * float(jnp.finfo(t.dtype).eps)) / width)
    return jnp.where(part < num_intervals, 1 - part * width, t)


class EarlyTimestepSharing(eqx.Module):
    """`network` under the time condition `shared_time(t)`: itself a network `(t, x, args)`. Train and sample with it in the place of `network`.

    - `threshold`: ũ in (0, 1], default 0.1, the paper's 100 of 1000 steps.
    - `num_intervals`: n, default 5, the paper's.

    Both may be swept. Raises `ValueError` for values out of range.
    """

    network: VectorField
    threshold: Scalar = 0.1
    num_intervals: Scalar = 5

    def __check_init__(self):
        check_range("threshold", self.threshold, low=0.0, high=1.0, open_low=True)
        check_range("num_intervals", self.num_intervals, low=1)

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """The network's value, of its shape and dtype."""
        return self.network(shared_time(t, self.threshold, self.num_intervals), x, args)


__all__ = ["EarlyTimestepSharing", "shared_time"]
