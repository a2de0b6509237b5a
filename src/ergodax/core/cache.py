"""JAX's persistent compile cache, set up so that it is safe and bounded: a program that was compiled once is read back by later processes."""

import hashlib
import os
import platform
from collections.abc import Callable
from pathlib import Path

import jax
import jax.monitoring

from .check import check_range


def use_compile_cache(folder: Path | str | None = None, *, max_gigabytes: float = 4.0) -> Path:
    """Keep compiled programs in `folder`, the least recently used leaving when it grows past `max_gigabytes` (1e9 bytes; needs `filelock`).

    The default folder is `$ERGODAX_CACHE`, or `~/.cache/ergodax`. Within it each CPU model has its own folder, since code that was compiled for one
    may crash on another. Returns that folder. Call it before anything compiles.
    """
    check_range("max_gigabytes", max_gigabytes, low=0.0, open_low=True)
    root = Path(folder or os.environ.get("ERGODAX_CACHE") or Path.home() / ".cache" / "ergodax").expanduser()
    path = root / f"jax-{cpu_fingerprint()}"
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", int(max_gigabytes * 1e9))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


def cpu_fingerprint() -> str:
    """A short name for this CPU's model and instruction set."""
    info = Path("/proc/cpuinfo")
    lines = [line for line in info.read_text().splitlines() if line.startswith(("model name", "flags", "Features"))][:2] if info.exists() else []
    return hashlib.sha256("".join(lines or [platform.machine(), platform.processor()]).encode()).hexdigest()[:12]


class CompileCount:
    """Programs asked of XLA since it was made: `hits` came from the persistent cache, `misses` were compiled and put there."""

    def __init__(self):
        self._start = dict(_seen)

    @property
    def hits(self) -> int:
        """Programs read back."""
        return _seen["hits"] - self._start["hits"]

    @property
    def misses(self) -> int:
        """Programs compiled; 0 while no cache is in use."""
        return _seen["misses"] - self._start["misses"]


# JAX's events are the process's, and a listener cannot be taken off: one for all, which only counts.
_seen = {"hits": 0, "misses": 0}


def _listener() -> Callable[..., None]:
    names = {"/jax/compilation_cache/cache_hits": "hits", "/jax/compilation_cache/cache_misses": "misses"}

    def listen(event: str, **_) -> None:
        if event in names:
            _seen[names[event]] += 1

    return listen


jax.monitoring.register_event_listener(_listener())


__all__ = ["CompileCount", "cpu_fingerprint", "use_compile_cache"]
