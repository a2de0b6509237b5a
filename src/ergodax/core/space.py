"""Search spaces: which leaves of a config vary, and over what. A space is a plain list with one mapping of overrides per run.

    space.grid(rate=[1e-3, 3e-3], seed=range(8))                       # 16 runs, the last axis fastest
    space.zip({"optim.rate": [1e-3, 3e-3], "optim.steps": [200, 100]})  # 2 runs; a nested leaf is named with dots
    space.random(64, rate=space.LogUniform(1e-5, 1e-1), width=space.Choice([64, 128]))
    space.product(space.random(64, rate=...), space.grid(seed=range(4)))  # 256 runs: four seeds of each

Spaces of the same config add up as lists do. A float or array leaf is TRACED: runs that differ only there share one compiled program. Any other leaf
(a width, a flag, a solver) is STATIC: each of its values is a program of its own. An integer or bool that a program may trace, such as a seed, is
declared in its dataclass: `seed: int = traced(0)`.
"""

import builtins
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .check import check_count


Space = list[dict[str, Any]]


def traced(default: Any) -> Any:
    """A dataclass field whose value a sweep may trace although it is an integer or a bool."""
    return dataclasses.field(default=default, metadata={"traced": True})


# Spaces


def grid(axes: Mapping[str, Iterable] | None = None, /, **more: Iterable) -> Space:
    """All combinations of the axes' values, the last axis fastest. Raises `ValueError` for an axis without values."""
    values = _axes(axes, more)
    return [dict(builtins.zip(values, chosen)) for chosen in itertools.product(*values.values())]


def zip(axes: Mapping[str, Iterable] | None = None, /, **more: Iterable) -> Space:
    """The n-th value of every axis together. Raises `ValueError` if the axes differ in length."""
    values = _axes(axes, more)
    if len(lengths := {name: len(value) for name, value in values.items()}) and len(set(lengths.values())) > 1:
        raise ValueError(f"the axes of `zip` must have the same length, got {lengths}.")
    return [dict(builtins.zip(values, chosen)) for chosen in builtins.zip(*values.values())]


def product(*spaces: Sequence[Mapping[str, Any]]) -> Space:
    """Every run of one space with every run of the others, the last fastest. Raises `ValueError` if two spaces set the same leaf."""
    runs = []
    for parts in itertools.product(*spaces):
        names = [name for part in parts for name in part]
        if len(set(names)) < len(names):
            raise ValueError(f"the spaces of a product must set different leaves, got {sorted(names)}.")
        runs.append({name: value for part in parts for name, value in part.items()})
    return runs


Axis = Callable[[float], Any]  # the value at a quantile in [0, 1): the inverse of a distribution function


def random(num_runs: int, axes: Mapping[str, Axis] | None = None, /, *, random_seed: int = 0, **more: Axis) -> Space:
    """`num_runs` independent draws of every axis (Bergstra and Bengio, 2012), the same for the same `random_seed`."""
    check_count("num_runs", num_runs)
    return _at(np.random.default_rng(random_seed).random((num_runs, len(axes or {}) + len(more))), axes, more)


def sobol(num_runs: int, axes: Mapping[str, Axis] | None = None, /, *, random_seed: int = 0, **more: Axis) -> Space:
    """Like `random`, from a scrambled Sobol sequence, which covers the space more evenly; a power of two of runs covers it best."""
    from scipy.stats import qmc

    check_count("num_runs", num_runs)
    points = qmc.Sobol(len(axes or {}) + len(more), rng=np.random.default_rng(random_seed)).random_base2(math.ceil(math.log2(num_runs)))
    return _at(points[:num_runs], axes, more)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """A float, uniform on [`low`, `high`)."""

    low: float
    high: float

    def __post_init__(self):
        _check_bounds(self)

    def __call__(self, quantile: float) -> float:
        """The value at a quantile."""
        return self.low + (self.high - self.low) * float(quantile)


@dataclasses.dataclass(frozen=True)
class LogUniform:
    """A positive float whose logarithm is uniform on [log `low`, log `high`)."""

    low: float
    high: float

    def __post_init__(self):
        _check_bounds(self)
        if self.low <= 0:
            raise ValueError(f"the bounds of LogUniform must be positive, got {self.low} and {self.high}.")

    def __call__(self, quantile: float) -> float:
        """The value at a quantile."""
        return math.exp(Uniform(math.log(self.low), math.log(self.high))(quantile))


@dataclasses.dataclass(frozen=True)
class Integers:
    """An integer, uniform on `low` … `high` - 1: a seed, a count."""

    low: int
    high: int

    def __post_init__(self):
        _check_bounds(self)

    def __call__(self, quantile: float) -> int:
        """The value at a quantile."""
        return self.low + int(quantile * (self.high - self.low))


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of `values`, each as likely."""

    values: Sequence[Any]

    def __post_init__(self):
        if not len(self.values):
            raise ValueError("Choice needs at least one value, got none.")

    def __call__(self, quantile: float) -> Any:
        """The value at a quantile."""
        return self.values[int(quantile * len(self.values))]


def _axes(axes, more):
    values = {name: list(axis) for name, axis in ({} if axes is None else dict(axes)).items()} | {name: list(axis) for name, axis in more.items()}
    if empty := [name for name, axis in values.items() if not axis]:
        raise ValueError(f"every axis needs at least one value, got none for {', '.join(f'`{name}`' for name in empty)}.")
    return values


def _at(points, axes, more):
    axes = dict(axes or {}) | more
    return [{name: axis(quantile) for (name, axis), quantile in builtins.zip(axes.items(), point)} for point in points]


def _check_bounds(axis):
    if not axis.low < axis.high:
        raise ValueError(f"{type(axis).__name__} needs low < high, got {axis.low} and {axis.high}.")


# Configs


def replace(config: Any, overrides: Mapping[str, Any]) -> Any:
    """`config` with some leaves replaced, named with dots. Raises `ValueError` for a name that is not there."""
    for name, value in overrides.items():
        config = _replace(config, name.split("."), value, name)
    return config


def value(config: Any, name: str) -> Any:
    """The leaf of `config` that `name`, with dots, stands for. Raises `ValueError` if there is none."""
    return _find(config, name)[1]


def split(base: Any, override: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The static part of an override, and the names of the leaves that are traced."""
    names = [name for name, value in override.items() if _is_traced(base, name, value)]
    return {name: value for name, value in override.items() if name not in names}, names


def leaf(base: Any, name: str, value: Any) -> np.ndarray:
    """A traced value as the array that enters the program: an int for a float field is a float."""
    return np.asarray(float(value) if isinstance(_find(base, name)[1], float) and isinstance(value, int) else value)


def signature(base: Any, override: Mapping[str, Any]) -> Any:
    """What two runs must share to share a program: static values, names and shapes of traced ones. Hashable, or `ValueError`."""
    static, names = split(base, override)
    try:
        hash(
            key := (
                tuple((name, type(value), value) for name, value in static.items()),
                tuple((name, leaf(base, name, override[name]).shape) for name in names),
            )
        )
    except TypeError as error:
        raise ValueError(f"static values must be hashable, got {static}.") from error
    return key


def _replace(config, path, value, name):
    head, *rest = path
    _field(config, head, name)
    return dataclasses.replace(config, **{head: _replace(getattr(config, head), rest, value, name) if rest else value})


def _field(config, head, name):
    fields = {f.name: f for f in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else {}
    if head not in fields:
        raise ValueError(f"`{name}` is not a field of {type(config).__name__}; it has {', '.join(fields) or 'none'}.")
    return fields[head]


def _find(base, name):
    """The field and the value that `name` stands for."""
    *parents, last = name.split(".")
    for head in parents:
        _field(base, head, name)
        base = getattr(base, head)
    return _field(base, last, name), getattr(base, last)


def _is_traced(base, name, value):
    field, old = _find(base, name)
    if isinstance(value, np.ndarray | jax.Array | float | np.floating):
        return True
    number = isinstance(value, int | np.integer)
    return number and (field.metadata.get("traced", False) or (isinstance(old, float) and not isinstance(value, bool)))


__all__ = [
    "Axis",
    "Choice",
    "Integers",
    "LogUniform",
    "Space",
    "Uniform",
    "grid",
    "leaf",
    "product",
    "random",
    "replace",
    "signature",
    "sobol",
    "split",
    "traced",
    "value",
    "zip",
]
