"""Names for the types that several modules share."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, Real


#: A real number that a user may sweep: a Python number or a traced scalar.
Scalar = float | int | np.floating | np.integer | Real[Array, ""] | Real[np.ndarray, ""]

#: Times on [0, 1] (0 = source, 1 = data): a scalar, or any array that broadcasts.
Time = float | int | np.floating | np.integer | Real[Array, "..."] | Real[np.ndarray, "..."]

#: A typed random key, `jax.random.key(seed)`.
PRNGKey = Key[Array, ""]

#: A schedule, `step -> value`: the optax socket.
Schedule = Callable[[Any], Any]


@runtime_checkable
class VectorField(Protocol):
    """Anything called as `(t, x, args)` that returns an array like `x`: networks, denoisers, guidance, control."""

    def __call__(self, t: Any, x: Any, args: Any, /) -> Any: ...


__all__ = ["Array", "Float", "Int", "PRNGKey", "PyTree", "Scalar", "Schedule", "Time", "VectorField"]
