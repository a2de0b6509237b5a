"""float64, two CPU devices and strict promotion for every test; compiled programs are kept between runs and shared by the workers of one."""

import hashlib
import os
from pathlib import Path

from .child import xla_flags


os.environ["XLA_FLAGS"] = xla_flags(os.environ.get("XLA_FLAGS", ""))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ERGODAX_CACHE", str(Path(__file__).parent.parent / ".pytest_cache" / "ergodax"))  # of experiments that tests start

import jax


def cpu_model() -> str:
    """Code compiled for one CPU may crash on another, so each has its own cache."""
    info = Path("/proc/cpuinfo")
    lines = [line for line in info.read_text().splitlines() if line.startswith(("model name", "flags"))][:2] if info.exists() else []
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Tiny programs, compiled once: most of the suite's time is XLA's optimiser.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".pytest_cache" / f"jax-{cpu_model()}"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_runtest_teardown() -> None:
    """Forget compiled programs before they fill the process's memory maps (65530 by default on Linux; XLA's JIT takes some three per program)."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
