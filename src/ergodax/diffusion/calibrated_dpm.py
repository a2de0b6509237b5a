"""Calibration of a trained model by its mean. Pang, Lu, Du, Lin, Yan, Deng 2023 (arXiv:2302.10688).

Along the noising process α_t ∇ log p_t(x_t) is a martingale, E[α_s ∇ log p_s(x_s) | x_t] = α_t ∇ log p_t(x_t) for s nearer the data, so the true
score has mean 0 at every time. A trained one has not; taking its mean away,

    p(t, x) - m_t,   m_t = E p(t, x_t) - E p*_t,

lowers the squared error by exactly ‖m_t‖² at every t (their score-matching loss, with a factor 1/2, by half of it) and raises the bound on the
likelihood by the g²-weighted integral. p* is the target of the parametrisation, whose mean is that of its linear formula at the data's mean and no
noise: 0 for score and noise, E x₁ for the data. Conditional models are calibrated within each condition.

`calibrate` measures m_t once, over data and noise at given times, into a table that is read by linear interpolation. Each datum is noised by z and
by -z: the mean target is then exact on the draws, and what is odd in z cancels. (The paper draws one noise per datum.) Where times or conditions are
too many for a table, train a small network as `shift`: any loss on `Calibrated(network, shift)` with `network` frozen has these means as its
minimiser."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..core.check import check_increasing
from ..core.path import AffinePath
from ..core.prediction import Prediction
from ..core.types import PRNGKey, PyTree, Time, VectorField


class ShiftTable(eqx.Module):
    """m_t as `shift(t, args)`: linear in t between `times` (k,), increasing, and constant outside. `values` has shape (k, *x).

    Raises `ValueError` for times that do not increase or do not go with the values.
    """

    times: Float[Array, " k"]
    values: Float[Array, "rows *x"]

    def __check_init__(self):
        check_increasing("times", self.times)
        if self.values.shape[0] != self.times.shape[0]:
            raise ValueError(f"`values` must have {self.times.shape[0]} rows, one per time, got shape {self.values.shape}.")

    def __call__(self, t: Time, args: PyTree = None) -> Float[Array, "*x"]:
        """The shift at one scalar time."""
        t = jnp.clip(jnp.asarray(t, self.times.dtype), self.times[0], self.times[-1])
        i = jnp.clip(jnp.searchsorted(self.times, t, side="right") - 1, 0, self.times.shape[0] - 2)
        w = ((t - self.times[i]) / (self.times[i + 1] - self.times[i])).astype(self.values.dtype)
        return (1 - w) * self.values[i] + w * self.values[i + 1]


class ClassShiftTable(eqx.Module):
    """One `ShiftTable` per class: `table` has values (k, classes, *x), and `args` is the class, an integer."""

    table: ShiftTable

    def __call__(self, t: Time, args: Int[Array, ""]) -> Float[Array, "*x"]:
        """The shift at one scalar time for one class."""
        return self.table(t)[args]


class Calibrated(eqx.Module):
    """`network` less its shift: a network `(t, x, args)` of the same parametrisation. `shift`: `(t, args) -> array` that broadcasts to the value."""

    network: VectorField
    shift: Callable

    def __call__(self, t: Time, x: Float[Array, "*x"], args: PyTree = None) -> Float[Array, "*x"]:
        """The calibrated value, of the shape and dtype of the network's."""
        value = self.network(t, x, args)
        return value - self.shift(t, args).astype(value.dtype)


def calibrate(
    network: VectorField,
    path: AffinePath,
    prediction: Prediction,
    data: Float[Array, "n *x"],
    times: Float[Array, " k"],
    key: PRNGKey,
    *,
    args: PyTree = None,
    labels: Int[Array, " n"] | None = None,
    num_classes: int | None = None,
) -> Calibrated:
    """`network` with the table of its mean errors over `data` at `times`.

    - `network`: on ONE example, `(t, x, args)`; `args` a pytree of leading axis n, or None (default). One shift serves all its values.
    - `times`: (k,), increasing, such as a sampler's grid. Two network calls per datum and time, one time after the other.
    - `labels` with `num_classes`: a shift for every class, where the network's `args` are these labels; a class without data gets 0.

    The error of the table has the standard deviation of the network's even part over √n; means of tables from several calls may be averaged.
    Raises `ValueError` for `labels` with `args` or without `num_classes`, and data without a batch axis.
    """
    if (labels is None) != (num_classes is None) or (labels is not None and args is not None):
        raise ValueError("give both `labels` and `num_classes`, and then no `args`: the labels are the network's args.")
    if data.ndim < 2:
        raise ValueError(f"`data` must have shape (n, *example), got {data.shape}.")
    condition = args if labels is None else labels

    def errors(t, key):
        noise = jax.random.normal(key, (data.size,), data.dtype).reshape(data.shape)

        def one(x1, z, c):
            value = (network(t, path.interpolate(t, x1, z), c) + network(t, path.interpolate(t, x1, -z), c)) / 2
            return value - prediction.target(path, t, x1, jnp.zeros_like(x1))

        return jax.vmap(one)(data, noise, condition)

    def row(inputs):
        error = errors(*inputs)
        if labels is None:
            return jnp.mean(error, axis=0)
        sums = jax.ops.segment_sum(error, labels, num_classes)
        counts = jax.ops.segment_sum(jnp.ones(len(labels), data.dtype), labels, num_classes)
        return sums / jnp.maximum(counts, 1).reshape(-1, *[1] * (data.ndim - 1))

    times = times.astype(data.dtype)
    table = ShiftTable(times, jax.lax.map(row, (times, jax.random.split(key, times.shape[0]))))
    return Calibrated(network, table if labels is None else ClassShiftTable(table))


__all__ = ["Calibrated", "ClassShiftTable", "ShiftTable", "calibrate"]
