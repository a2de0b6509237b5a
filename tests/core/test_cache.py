"""The persistent compile cache: used by the next process, counted, bounded, and no obstacle when an entry is damaged."""

import json
import os
import subprocess
import sys

import pytest

from ergodax.core.cache import cpu_fingerprint, use_compile_cache


SCRIPT = """
import dataclasses, json, sys
import jax.numpy as jnp
from ergodax.core import grid, sweep
from ergodax.core.cache import use_compile_cache

path = use_compile_cache(sys.argv[1], max_gigabytes=float(sys.argv[2]))

@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.1
    size: int = 3

result = sweep(lambda config: jnp.sum(jnp.sin(config.rate * jnp.arange(config.size))), Config(), grid(size=[3, 4, 5], rate=[0.1, 0.2]), batch_size=1)
print(json.dumps({"path": str(path), "hits": result.cache_hits, "compiles": result.num_compiles, "values": result.table()["value"].tolist()}))
"""


def process(folder, gigabytes=1.0):
    """A sweep of three programs in a process of its own."""
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(folder), str(gigabytes)], capture_output=True, text=True, check=True, env=os.environ)
    return json.loads(run.stdout.splitlines()[-1])


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_next_process_compiles_nothing_and_counts_its_hits(tmp_path):
    first, second = process(tmp_path), process(tmp_path)
    assert first["path"] == str(tmp_path / f"jax-{cpu_fingerprint()}")
    assert (first["compiles"], second["compiles"]) == (3, 3)
    assert first["hits"] == 0
    assert second["hits"] >= 3
    assert first["values"] == second["values"]
    for entry in tmp_path.rglob("*-cache"):  # what a process leaves that was killed while it wrote
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    assert process(tmp_path)["values"] == first["values"]


def test_the_cache_is_bounded(tmp_path):
    process(tmp_path / "free")
    bound = 0.6 * size(tmp_path / "free")
    process(tmp_path / "bounded", bound / 1e9)
    assert 0 < size(tmp_path / "bounded") <= bound


def test_refusals():
    with pytest.raises(ValueError, match=r"`max_gigabytes` must lie in \(0, inf\), got 0.0"):
        use_compile_cache(max_gigabytes=0.0)
