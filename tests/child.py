"""XLA's flags for tests, and the environment of the processes that they start."""

import os
import subprocess
import sys


# The older CPU code generator compiles our small programs in half the time.
OLD_EMITTERS = "--xla_cpu_use_fusion_emitters=false"


def known(flag: str) -> bool:
    """Whether this jaxlib knows an XLA flag. It aborts on one that it does not know (0.12 has lost the one above), so another process asks."""
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(command, env=os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}, capture_output=True).returncode == 0


def xla_flags(given: str) -> str:
    """`given`, two CPU devices, and what compiles quickly. xdist's workers inherit the flags of the process that started them."""
    if "--xla_force_host_platform_device_count" in given:
        return given
    return " ".join([given, "--xla_force_host_platform_device_count=2", *([OLD_EMITTERS] if known(OLD_EMITTERS) else [])]).strip()


def environment(**changes: str) -> dict[str, str]:
    """That of this process, on the CPU and quick to compile, but with the machine's devices rather than the two of tests."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    quick = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": " ".join(flags)}
    return {name: value for name, value in os.environ.items() if name != "JAX_NUM_PROCESSES"} | quick | changes
