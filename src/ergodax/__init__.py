"""ergodax: research methods as plugs for the sockets JAX already has.

Families load on first use (PEP 562), so `import ergodax` costs next to nothing: `ergodax.diffusion.DDIM` imports the diffusion family then.
"""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ergodax import (
        core as core,
        data as data,
        diffusion as diffusion,
        distributed as distributed,
        laws as laws,
        nn as nn,
        optim as optim,
        schedules as schedules,
        testing as testing,
        transport as transport,
        tuning as tuning,
        weights as weights,
    )

__version__ = "0.1.0"

__all__ = ["core", "data", "diffusion", "distributed", "laws", "nn", "optim", "schedules", "testing", "transport", "tuning", "weights"]


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f"ergodax.{name}")
    raise AttributeError(f"module 'ergodax' has no attribute {name!r}; its families are {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
