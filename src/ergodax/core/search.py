"""Early stopping inside the compiled sweep: give every run a little training, and only the promising ones all of it.

    rule = SuccessiveHalving(num_pieces=9, eta=3)
    found = search(make, Config(), grid(learning_rate=[1e-3, 3e-3], seed=range(8)), rule, metric="test_loss", piece_steps=50)

`make(config)` returns a `Trial`, a run that can be taken in pieces: `fit_trial(fitting, key)`. What the rules do inside the program is in
`ergodax.core.population`; this is the host's side, which compiles, keeps the history, saves, and resumes.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from . import space
from .check import check_count
from .mesh import to_host
from .population import AbstractRule, Programs, Trial
from .search_folder import BracketFolder, claimed
from .store import versions
from .types import PRNGKey, PyTree


@dataclasses.dataclass(frozen=True)
class Bracket:
    """Runs that share their static leaves, and so their programs: they compete with each other alone."""

    static: dict[str, Any]  # the overrides they have in common
    runs: tuple[int, ...]  # their places in the list of overrides
    compiled: tuple[int, ...]  # the numbers of lanes that there is a program for; a resumed search compiles only what it still needs
    compile_seconds: float
    run_seconds: float


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What came of a search.

    - `history`: columns, one row for each piece of each run: `bracket`, `piece` (from 1), `lane`, `parent` (the lane of the piece before whose
      state it continues, -1 for a start), `run`, `age` (pieces that the run then has), `score`, and the hyper-parameters at work under their names.
    - `state`: the state of the best run at its last piece, for `Fit` a `FitState`; None if no score is finite.
    """

    overrides: list[dict[str, Any]]
    history: dict[str, np.ndarray]
    state: PyTree
    brackets: list[Bracket]
    piece_steps: int
    num_pieces: int
    largest: bool

    @property
    def num_compiles(self) -> int:
        """Training programs compiled: in each bracket one, and one more whenever fewer lanes allow a smaller batch."""
        return sum(len(bracket.compiled) for bracket in self.brackets)

    @property
    def steps_used(self) -> int:
        """Training steps of all runs together."""
        return self.piece_steps * len(self.history["run"])

    def best(self) -> int:
        """The place of the best run: the best score of those that got furthest. Raises `ValueError` if no score is finite."""
        return int(self.history["run"][self._best_row()])

    def best_values(self) -> dict[str, Any]:
        """The hyper-parameters that the best run ended with: its overrides, where the rule has not changed them."""
        row, override = self._best_row(), self.overrides[self.best()]
        return {name: self.history[name][row] if name in self.history else value for name, value in override.items()}

    def _best_row(self):
        if (row := _best_row(self.history, self.largest)) is None:
            raise ValueError("no run has a finite score.")
        return row

    def table(self) -> dict[str, np.ndarray]:
        """One row a run: its overrides, the `pieces` and `steps` it was given, its last `score`, and whether it `finished`, that is, was not stopped.

        A run that never came to a lane has 0 pieces and score NaN.
        """
        names = dict.fromkeys(itertools.chain.from_iterable(self.overrides))
        pieces, score = np.zeros(len(self.overrides), int), np.full(len(self.overrides), np.nan)
        pieces[self.history["run"]] = self.history["age"]  # rows are in the order of time, so the last one stays
        score[self.history["run"]] = self.history["score"]
        columns = {name: np.array([override.get(name) for override in self.overrides]) for name in names}
        return columns | {"pieces": pieces, "steps": pieces * self.piece_steps, "score": score, "finished": pieces == self.num_pieces}


def search(
    make: Callable[[Any], Trial],
    base: Any,
    overrides: Sequence[Mapping[str, Any]],
    rule: AbstractRule,
    *,
    metric: str,
    piece_steps: int,
    largest: bool = False,
    key: PRNGKey | None = None,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    folder: Path | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """Train the overrides of `base`, each as far as `rule` lets it.

    - `make`: pure; takes the config, returns the `Trial`. Traced leaves arrive as tracers; `ergodax.core.space` says which those are. Runs that
      differ in static leaves form brackets, one after the other, each with its own programs and its own competition.
    - `metric`: the trial's metric to rank by, smallest first (`largest`: largest first). NaN ranks last.
    - `piece_steps`: steps between two calls of the rule.
    - `key`: for rules that draw.
    - `batch_size`: lanes vmapped together on one device (default: all that fall to it). 1 takes them in turn, without `vmap`: on a CPU often the
      fastest. A batch whose lanes are all idle is skipped; when so few lanes are left that a batch can be smaller, that is another compile.
    - `mesh`: lanes are dealt out over its axis `sweep` (default: all devices of all processes).
    - `folder`: keep every piece there. The same call, after a kill at any moment, goes on from there: only the piece in flight is computed again, and
      all numbers are the same.
    - `progress`: called as `progress(runs that have ended, runs in all)` after each piece.

    Raises `ValueError` for unknown fields, an unknown metric, or no runs, before compiling anything; `UsageError` if `folder` cannot be used.
    """
    runs = [dict(override) for override in overrides]
    if not runs:
        raise ValueError("a search needs at least one run, got no overrides.")
    check_count("piece_steps", piece_steps)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    mesh = Mesh(np.array(jax.devices()), ("sweep",)) if mesh is None else mesh
    if "sweep" not in mesh.axis_names:
        raise ValueError(f"the mesh of a search needs an axis `sweep`, got axes {mesh.axis_names}.")
    groups: dict[Any, list[int]] = {}
    for place, override in enumerate(runs):
        groups.setdefault(space.signature(base, override), []).append(place)
    options = {"metric": metric, "piece_steps": piece_steps, "largest": largest}
    statics, programs = [], []
    for places in groups.values():
        static, names = space.split(base, runs[places[0]])
        table = {name: np.stack([space.leaf(base, name, runs[place][name]) for place in places]) for name in names}
        config = space.replace(base, static)
        programs.append(Programs(make, config, table, len(places), rule, batch_size=batch_size, mesh=mesh, **options))
        statics.append(static)
    what = {"config": base, "runs": runs, "rule": rule, "key": key, **options, "versions": versions()}
    what["programs"] = [program.fingerprint for program in programs]

    brackets, champions, rows, ended = [], [], [], 0
    with claimed(None if folder is None else Path(folder), what):
        for number, (static, places, program) in enumerate(zip(statics, groups.values(), programs)):
            report = None if progress is None else lambda done, ended=ended: progress(ended + done, len(runs))
            started = time.perf_counter()
            own_key = None if key is None else jax.random.fold_in(key, number)
            with BracketFolder(None if folder is None else Path(folder) / f"bracket-{number}") as saved:
                records, champion = _run(program, own_key, saved, report)
            seconds = time.perf_counter() - started - program.compile_seconds
            brackets.append(Bracket(static, tuple(places), program.compiled, program.compile_seconds, seconds))
            champions.append(champion.state)
            rows += _rows(number, places, records)
            ended += len(places)
    history = {name: np.array([row.get(name) for row in rows]) for name in dict.fromkeys(itertools.chain.from_iterable(rows))}
    row = _best_row(history, largest)
    state = None if row is None else champions[history["bracket"][row]]
    return SearchResult(runs, history, state, brackets, piece_steps, rule.num_pieces, largest)


def _best_row(history, largest):
    """The row whose state is the champion: the furthest, then the best, then the first."""
    age, score = history["age"], history["score"]
    finite = np.isfinite(score)
    if not finite.any():
        return None
    return int(np.argmin(np.where(finite & (age == age[finite].max()), -score if largest else score, np.inf)))


def _run(programs, key, folder, progress):
    """All pieces of one bracket; what is on disk is not computed again."""
    records = folder.records()
    done, active, num_lanes = len(records), programs.sizes[0], programs.sizes[0]
    for record in records:
        active = _active(record)
        num_lanes = programs.lanes_for(active, num_lanes) if active else num_lanes
    carry = folder.restored(programs.start(num_lanes))
    while active:
        *carry, record = programs.step(num_lanes, *carry, done, key)
        done, record = done + 1, to_host(record)
        records.append(record)
        active = _active(record)
        if active and (following := programs.lanes_for(active, num_lanes)) < num_lanes:
            carry[0] = programs.shrink(carry[0], num_lanes, following)
            num_lanes = following
        folder.save(done, record, tuple(carry))
        if progress is not None:
            progress(len(set(np.concatenate([record["run"] for record in records]).tolist()) - {-1}) - active)
    return records, carry[1]


def _active(record):
    """Lanes at work in the piece that follows."""
    return int((record["next_run"] >= 0).sum())


def _rows(bracket, places, records):
    """The history of one bracket: a row for every lane at work in every piece."""
    for piece, record in enumerate(records, start=1):
        for lane in np.flatnonzero(record["run"] >= 0):
            yield {
                "bracket": bracket,
                "piece": piece,
                "lane": int(lane),
                "parent": int(record["parent"][lane]),
                "run": places[record["run"][lane]],
                "age": int(record["age"][lane]),
                "score": float(record["score"][lane]),
            } | {name: column[lane] for name, column in record["values"].items()}


__all__ = ["Bracket", "SearchResult", "search"]
