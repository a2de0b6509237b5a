"""Checks at the door: a `ValueError` that says what came and what was expected.

Values that are traced cannot be looked at, so they pass: a sweep never pays for a check, and a check never breaks a sweep.
"""

import importlib
from types import ModuleType
from typing import Any

import jax
import numpy as np


def is_concrete(value: Any) -> bool:
    """Whether the numbers in `value` can be read now (no leaf is being traced)."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))


def check_range(
    name: str,
    value: Any,
    *,
    low: float = -np.inf,
    high: float = np.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise unless every number of `value` lies between `low` and `high`; `open_low`/`open_high` exclude the end itself."""
    if value is None or not is_concrete(value):
        return
    numbers = np.asarray(value)
    above = numbers > low if open_low else numbers >= low
    below = numbers < high if open_high else numbers <= high
    if not (above & below).all():
        interval = f"{'(' if open_low or low == -np.inf else '['}{low:g}, {high:g}{')' if open_high or high == np.inf else ']'}"
        raise ValueError(f"`{name}` must lie in {interval}, got {value}.")


def check_count(name: str, value: Any, *, low: int = 1) -> None:
    """Raise unless `value` is a Python integer of at least `low`: counts fix shapes, so they can be neither traced nor floats."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
        raise ValueError(f"`{name}` must be an integer of at least {low}, got {value!r}.")


def check_times(name: str, values: Any) -> None:
    """Raise unless `values` has shape (N + 1,), N >= 1, and (where it can be read) is finite."""
    shape = np.shape(values)
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(f"`{name}` must be a vector of at least two times, got shape {shape}.")
    if is_concrete(values) and not np.isfinite(np.asarray(values)).all():
        raise ValueError(f"`{name}` must be finite, got {np.asarray(values)}.")


def check_increasing(name: str, values: Any) -> None:
    """`check_times`, and raise unless (where they can be read) the values increase strictly."""
    check_times(name, values)
    if is_concrete(values):
        numbers = np.asarray(values)
        bad = np.flatnonzero(np.diff(numbers) <= 0)
        if bad.size:
            i = int(bad[0])
            raise ValueError(
                f"`{name}` must increase strictly (time runs from 0 = noise to 1 = data), "
                f"but entries {i} and {i + 1} are {numbers[i]:g} and {numbers[i + 1]:g}."
            )


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"`{module}` is needed here: pip install 'ergodax[{extra}]'.") from error


__all__ = ["check_count", "check_increasing", "check_range", "check_times", "is_concrete", "require"]
