"""Configs of runs: a (nested) frozen dataclass, YAML presets, and command-line overrides through tyro.

    python experiments/digits.py --preset smoke --out DIR --train.steps 500

A preset file names only what differs from the dataclass's defaults. Wrong input ends the program with exit code 2 and one line that says what came
and what was expected, before anything compiles.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import jax

from .cache import use_compile_cache
from .check import require


if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Config = TypeVar("Config", bound=DataclassInstance)
else:
    Config = TypeVar("Config")


class UsageError(ValueError):
    """Wrong input of a person at the command line: exit code 2, no traceback."""


def parse(config_type: type[Config], presets: Path, argv: list[str] | None = None, *, out: Path) -> tuple[Config, Path]:
    """The config and the run's folder that a command line asks for. Compiled programs are kept for later runs, see `use_compile_cache`, unless it
    says `--no-compile-cache` or JAX was given a cache before.

    - `config_type`: a frozen dataclass whose every field has a default; its `__post_init__` checks ranges with `ValueError`.
    - `presets`: a folder of YAML files; `--preset NAME` (default `default`) picks one.
    - `out`: the folder if `--out DIR` does not say; the preset's name is appended.

    Exits with code 2 on an unknown preset, field or value.
    """
    tyro = require("tyro", "experiments")
    names = sorted(path.stem for path in presets.glob("*.yaml"))
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="default")
    first.add_argument("--out", type=Path)
    first.add_argument("--no-compile-cache", action="store_true")
    known, rest = first.parse_known_args(argv)
    usage = f"--preset NAME ({', '.join(names)}) sets the defaults below, --out DIR is the run's folder (default {out}/PRESET), "
    usage += "--no-compile-cache compiles everything anew."
    try:
        if known.preset not in names:
            raise UsageError(f"unknown preset `{known.preset}`; there are {', '.join(names)}.")
        default = load(config_type, presets / f"{known.preset}.yaml")
        config = tyro.cli(config_type, default=default, args=rest, description=usage)
    except ValueError as error:
        quit_with(error)
    if not known.no_compile_cache and jax.config.jax_compilation_cache_dir is None:  # pyrefly: ignore[missing-attribute]
        use_compile_cache()
    return config, known.out or out / known.preset


def load(config_type: type[Config], path: Path) -> Config:
    """The config that a YAML file describes. Raises `UsageError` for a field or a type that the dataclass does not have."""
    content = require("yaml", "experiments").safe_load(path.read_text()) or {}
    return from_mapping(config_type, content, path.name)


def from_mapping(config_type: type[Config], mapping: Any, where: str = "config") -> Config:
    """A (nested) dataclass from a mapping of its fields; what is not named keeps its default. Raises `UsageError`."""
    if not isinstance(mapping, dict):
        raise UsageError(f"{where}: expected a mapping of fields, got {mapping!r}.")
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    base, values = config_type(), {}
    for name, value in mapping.items():
        if name not in fields:
            raise UsageError(f"{where}: unknown field `{name}`; there are {', '.join(fields)}.")
        values[name] = _converted(getattr(base, name), value, f"{where}: `{name}`")
    return dataclasses.replace(base, **values)


def _converted(default, value, where):
    """`value` as the type of `default`."""
    if dataclasses.is_dataclass(default):
        return from_mapping(type(default), value, where)
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(_converted(default[0], item, where) if default else item for item in value)
    if isinstance(default, float) and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as a string
        except ValueError:
            raise UsageError(f"{where} must be a number, got {value!r}.") from None
    if default is not None and type(value) is not type(default):
        raise UsageError(f"{where} must be of type {type(default).__name__}, got {value!r}.")
    return value


def quit_with(error: Exception, code: int = 2) -> NoReturn:
    """Print one line to stderr and end the program."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(code)


__all__ = ["UsageError", "from_mapping", "load", "parse", "quit_with"]
