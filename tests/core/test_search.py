"""A search on disk: killed at any moment and started again it ends with the same numbers to the bit; a folder that does not fit is left alone."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodax.core.config import UsageError
from ergodax.core.population import Trial
from ergodax.core.search import search
from ergodax.core.space import grid, traced
from ergodax.tuning.asynchronous_halving import AsynchronousHalving
from ergodax.tuning.population_based_training import Perturb, PopulationBasedTraining
from ergodax.tuning.successive_halving import SuccessiveHalving


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.1
    seed: int = traced(0)
    power: int = 2


RUNS = grid(rate=[0.01, 0.1, 0.3], seed=[0, 1])
RULES = {
    "halving": SuccessiveHalving(6, 2),
    "asynchronous": AsynchronousHalving(3, 6, 2),
    "population": PopulationBasedTraining(6, Perturb({"rate": (0.01, 1.0)}), 0.3),
}


def make(config, noise=0.3):
    def advance(state, num_steps):
        def step(state, _):
            key, x = state
            key, use = jax.random.split(key)
            slope = config.power * x ** (config.power - 1)
            x = x - config.rate * (slope + noise * jax.random.normal(use, x.shape))
            return (key, x), jnp.sum(x**2)

        state, losses = jax.lax.scan(step, state, None, length=num_steps)
        return state, {"loss": losses}

    return Trial(lambda: (jax.random.key(config.seed), jnp.ones(5)), advance)


def go(folder, rule, runs=RUNS, make=make, **options):
    options = {"metric": "loss", "piece_steps": 3, "batch_size": 1, "key": jax.random.key(0)} | options
    return search(make, Config(), runs, RULES[rule], folder=folder, **options)


class Stop(Exception):
    pass


def stop_after(num_pieces):
    """A `progress` that ends the search in the middle, and counts the pieces."""
    seen = []

    def progress(done, total):
        seen.append(done)
        if len(seen) == num_pieces:
            raise Stop

    return progress, seen


def assert_same(a, b):
    assert a.history.keys() == b.history.keys()
    for name, column in a.history.items():
        np.testing.assert_array_equal(b.history[name], column)
    np.testing.assert_array_equal(a.state[1], b.state[1])
    assert (jax.random.key_data(a.state[0]) == jax.random.key_data(b.state[0])).all()
    assert a.best_values() == b.best_values()


@pytest.mark.parametrize(("rule", "batch_size"), [("halving", 1), ("halving", None), ("asynchronous", 1), ("population", None)])
def test_stopped_and_started_again_is_the_same_to_the_bit(tmp_path, rule, batch_size):
    """Stopped twice; each piece is computed once."""
    whole = go(None, rule, batch_size=batch_size)
    total = whole.history["piece"].max()
    computed = 0
    for num_pieces in (2, 2, None):
        progress, seen = stop_after(num_pieces)
        try:
            found = go(tmp_path / "search", rule, batch_size=batch_size, progress=progress)
        except Stop:
            computed += len(seen)
    assert computed + len(seen) == total
    assert_same(whole, found)


def test_a_record_without_its_checkpoint_is_written_again(tmp_path):
    """What a kill between the two leaves."""
    whole = go(None, "asynchronous")
    progress, _ = stop_after(4)
    with pytest.raises(Stop):
        go(tmp_path, "asynchronous", progress=progress)
    shutil.rmtree(tmp_path / "bracket-0/checkpoints/4")
    (tmp_path / "bracket-0/pieces/5.npz.part").write_bytes(b"half")
    progress, seen = stop_after(None)
    assert_same(whole, go(tmp_path, "asynchronous", progress=progress))
    assert len(seen) == whole.history["piece"].max() - 3
    # And once it is done, all is read back.
    progress, seen = stop_after(None)
    again = go(tmp_path, "asynchronous", progress=progress)
    assert_same(whole, again)
    assert (seen, again.num_compiles) == ([], 0)


def test_brackets_resume_one_by_one(tmp_path):
    runs = grid(rate=[0.01, 0.1], power=[2, 4])
    whole = go(None, "halving", runs)
    progress, _ = stop_after(8)  # in the second bracket
    with pytest.raises(Stop):
        go(tmp_path, "halving", runs, progress=progress)
    found = go(tmp_path, "halving", runs)
    assert_same(whole, found)
    assert [bracket.compiled for bracket in found.brackets] == [(), (2,)]


def test_killed_by_the_system(tmp_path):
    """SIGKILL in another process, wherever it is."""
    environment = os.environ | {"JAX_ENABLE_X64": "1"}
    process = subprocess.Popen([sys.executable, __file__, str(tmp_path)], env=environment)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("bracket-0/pieces/*.npz"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    computed = len(list(tmp_path.glob("bracket-0/pieces/*.npz")))
    progress, seen = stop_after(None)
    found, whole = go(tmp_path, "asynchronous", progress=progress), go(None, "asynchronous")
    assert len(seen) - (whole.history["piece"].max() - computed) in (0, 1)
    for name in ("run", "age", "lane"):
        np.testing.assert_array_equal(found.history[name], whole.history[name])
    # Compiled with other optimisations than this process, so not to the bit.
    np.testing.assert_allclose(found.history["score"], whole.history["score"], rtol=1e-12)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("done") / "search"
    go(folder, "asynchronous")
    return folder


def snapshot(folder):
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.name != "lock")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "halving"}, "rule.type AsynchronousHalving -> SuccessiveHalving"),
        ({"runs": RUNS[:-1]}, "holds another search"),
        ({"runs": [*RUNS[:-1], {"rate": 0.31, "seed": 1}]}, "0.3 -> .*0.31"),
        ({"piece_steps": 4}, "piece_steps 3 -> 4"),
        ({"key": jax.random.key(1)}, "key"),
        ({"make": lambda config: make(config, noise=0.4)}, "programs.0"),
    ],
)
def test_another_search_or_other_code_is_refused_and_touches_nothing(done, change, message):
    before = snapshot(done)
    with pytest.raises(UsageError, match=message):
        go(done, **{"rule": "asynchronous"} | change)
    assert snapshot(done) == before


def test_damage(done):
    piece = done / "bracket-0/pieces/2.npz"
    content = piece.read_bytes()
    piece.write_bytes(content[: len(content) // 2])
    before = snapshot(done)
    with pytest.raises(UsageError, match=f"{piece} is damaged"):
        go(done, "asynchronous")
    assert snapshot(done) == before
    piece.write_bytes(content)


def test_folders_that_cannot_be_used(tmp_path, done):
    import filelock

    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UsageError, match="is not empty and holds no search"):
        go(tmp_path, "asynchronous")
    with pytest.raises(UsageError, match="cannot write to"):
        go(tmp_path / "mine.txt" / "search", "asynchronous")
    with filelock.FileLock(done / "lock"), pytest.raises(UsageError, match="is in use"):
        go(done, "asynchronous")


if __name__ == "__main__":
    go(sys.argv[1], "asynchronous", progress=lambda done, total: time.sleep(0.05))
