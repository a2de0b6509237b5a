"""The host shell round a pure run: one folder with config, checkpoints, metrics, figures and results; progress; resume.

    DIR/config.json      what was run                    DIR/metrics.jsonl   one line per logged training step
    DIR/checkpoints/     orbax, the last two             DIR/stages/*.npz    what each finished stage returned
    DIR/figures/*.png    with the numbers as .json       DIR/results.json    config, metrics, timing, environment
    DIR/report.html      one self-contained page

A run that was interrupted, even killed, goes on when it is started again with the same folder, and ends with the same numbers: training is restored
from its last checkpoint and replays the same steps, finished stages are read back.

A run may be a job of several processes (`ergodax.core.mesh.initialise` first): all of them call the same methods in the same order, the first one
alone prints and writes, and what hangs on the disk is decided by it. The folder must be on a disk that all of them see. Checkpoints load on any
number of processes.
"""

import contextlib
import dataclasses
import json
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .cache import CompileCount
from .check import check_count, require
from .config import UsageError, quit_with
from .files import flat, jsonable, replacing, write_json
from .fit import Fit, FitState, Fitted
from .mesh import any_process, end_job, from_primary, is_primary, leave, to_host
from .types import PRNGKey


class TrainingFailed(RuntimeError):
    """A loss or gradient was not finite. The last good checkpoint is kept."""


class Run:
    """One run in one folder. Use it as a context manager: it ends progress bars and turns failures of the run into exit codes.

    - `folder`: made if absent; the same in all processes. If it holds a run of another config, `UsageError` says which fields differ, and nothing is
      touched.
    - `config`: a dataclass of JSON-able leaves.
    - `save_seconds`: seconds between checkpoints of `train` (default 15; 0 saves at every logged step).
    """

    def __init__(self, folder: Path | str, config: Any, *, save_seconds: float = 15.0):
        self.folder, self.config, self.save_seconds = Path(folder), config, save_seconds
        self.timing: dict[str, dict[str, float]] = {}
        self._compiled = CompileCount()
        from_primary(self._claim)
        self.console = require("rich.console", "experiments").Console(stderr=True, quiet=not is_primary())
        self._progress = _progress_bars(self.console)

    def __enter__(self) -> "Run":
        self._progress.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._progress.stop()
        if kind is KeyboardInterrupt:
            self._quit(f"interrupted; the same command with `--out {self.folder}` goes on from here.", 130)
        if kind is TrainingFailed:
            self._quit(str(error), 1)
        if jax.process_count() > 1 and isinstance(error, Exception) and kind is not UsageError:
            end_job(error)

    def _quit(self, message, code):
        if jax.process_count() > 1:
            leave(message, code)
        quit_with(RuntimeError(message), code)

    def _claim(self):
        path, config = self.folder / "config.json", jsonable(dataclasses.asdict(self.config))
        if path.exists():
            old = json.loads(path.read_text())
            differing = sorted(name for name in flat(old) | flat(config) if flat(old).get(name) != flat(config).get(name))
            if differing:
                changes = ", ".join(f"{name} {flat(old).get(name)} -> {flat(config).get(name)}" for name in differing)
                raise UsageError(f"{self.folder} holds a run with another config ({changes}); choose another --out, or delete it.")
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, config)
        except OSError as error:
            raise UsageError(f"cannot write to {self.folder}: {error.strerror}.") from error

    # Stages

    def stage(self, name: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """`compute()` as a dict of numpy arrays, kept in the folder: computed once, read back ever after."""
        path = self.folder / "stages" / f"{name}.npz"
        if not from_primary(path.exists):
            started = time.perf_counter()
            computed = {key: to_host(value) for key, value in compute().items()}
            timing = self.timing.get(name, {}) | {"seconds": time.perf_counter() - started}
            from_primary(lambda: _write_stage(path, computed, timing))
        arrays, self.timing[name] = from_primary(lambda: _read_stage(path))
        return arrays

    def compiled(self, stage: str, fn: Callable, *args: Any) -> Callable:
        """`fn` compiled for arguments like `args`; the seconds are counted as compile time of `stage`."""
        return self._counted(stage, lambda: eqx.filter_jit(fn).lower(*args).compile())  # pyrefly: ignore[missing-attribute]

    def _counted(self, stage, compile):
        started = time.perf_counter()
        compiled = compile()
        timing = self.timing.setdefault(stage, {})
        timing["compile_seconds"] = timing.get("compile_seconds", 0.0) + time.perf_counter() - started
        return compiled

    @contextlib.contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[..., None]]:
        """A progress bar; call the function it gives as `update(done, note="")`."""
        task = self._progress.add_task(label, total=total, note="")
        last = time.monotonic()

        def update(done: int, note: str = "") -> None:
            nonlocal last
            self._progress.update(task, completed=done, note=note)
            if not self.console.is_terminal and time.monotonic() - last > 10:
                last = time.monotonic()
                self.console.print(f"{label}: {done}/{total} {note}", highlight=False)

        yield update
        if not self.console.is_terminal:
            self.console.print(f"{label}: done", highlight=False)

    # Training

    def train(self, fitting: Fit, key: PRNGKey, num_steps: int, *, name: str = "train") -> tuple[Fitted, list[dict[str, Any]]]:
        """Train with progress, metrics, checkpoints and resume. Returns the trained models and the rows of `metrics.jsonl`.

        With `fitting.parallel`, arrays of the trained models stay on its mesh (`ergodax.core.mesh.to_host` brings them to each process), and a
        checkpoint is restored onto it, whatever mesh it came from. Raises `TrainingFailed`, naming the step, if a loss or gradient is not finite;
        `ValueError` if `num_steps` is not a multiple of `fitting.every`, or for several processes without `fitting.parallel`.
        """
        check_count("num_steps", num_steps)
        if num_steps % fitting.every:
            raise ValueError(f"`num_steps` must be a multiple of `every`, got {num_steps} and {fitting.every}.")
        if jax.process_count() > 1 and fitting.parallel is None:
            raise ValueError(f"training in {jax.process_count()} processes needs `Fit(..., parallel=DataParallel(mesh))`.")
        state = fitting.place(fitting.init(key))
        with _Checkpoints(self.folder / "checkpoints" / name) as checkpoints:
            state = checkpoints.restore(state)
            done = int(state.step)
            rows = from_primary(lambda: self._rows(name, done))
            advance = self._counted(name, lambda: fitting.compiled(state, fitting.every)) if done < num_steps else None
            before = rows[-1]["seconds"] if rows else 0.0
            started = saved = time.perf_counter()
            log_path = self.folder / "metrics.jsonl" if is_primary() else Path(os.devnull)
            with self.bar(name, num_steps) as update, log_path.open("a") as log, _interruptible() as interrupted:
                while advance is not None and done < num_steps:
                    state, metrics = advance(state)
                    metrics = {key: float(value[0]) for key, value in jax.device_get(metrics).items()}
                    done = int(state.step)
                    if (step := int(state.failed_at)) >= 0:
                        kept = f"the checkpoint of step {last}" if (last := checkpoints.latest()) is not None else "no checkpoint yet"
                        raise TrainingFailed(f"loss or gradient not finite at step {step}; {kept} is in {checkpoints.folder}.")
                    rows.append({"run": name, "step": done, "seconds": before + time.perf_counter() - started} | metrics)
                    log.write(json.dumps(jsonable(rows[-1])) + "\n")
                    update(done, f"loss {metrics['loss']:.4f}")
                    due = is_primary() and time.perf_counter() - saved >= self.save_seconds
                    stop, due = any_process(interrupted(), due)  # a signal may reach one process only
                    if stop or due or done == num_steps:
                        log.flush()
                        checkpoints.save(done, state)
                        saved = time.perf_counter()
                    if stop:
                        raise KeyboardInterrupt
        self.timing.setdefault(name, {})["seconds"] = rows[-1]["seconds"]
        metrics = {key: jnp.array([row[key] for row in rows]) for key in rows[-1] if key not in ("run", "step", "seconds")}
        return fitting.result(state, metrics), rows

    def _rows(self, name, step):
        """The logged rows up to `step`; later ones, which the resumed run writes again, and a half-written last line are dropped from the file."""
        path, kept = self.folder / "metrics.jsonl", []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                if row["run"] != name or row["step"] <= step:
                    kept.append(row)
        with replacing(path) as file:
            file.write("".join(json.dumps(row) + "\n" for row in kept).encode())
        return [row for row in kept if row["run"] == name]

    # Results

    def figure(self, name: str, figure: Any, numbers: Mapping[str, Any]) -> Path:
        """Save a matplotlib figure as `figures/NAME.png` and the numbers it shows as `figures/NAME.json`."""
        path = self.folder / "figures" / f"{name}.png"
        if is_primary():
            path.parent.mkdir(exist_ok=True)
            figure.savefig(path, dpi=130, bbox_inches="tight")
            write_json(path.with_suffix(".json"), numbers)
        return path

    def results(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Write `results.json`: config, metrics, timing with compile time apart, programs this session read from the compile cache or put there,
        environment.
        """
        folder = jax.config.jax_compilation_cache_dir  # pyrefly: ignore[missing-attribute]
        cache = {"folder": folder, "hits": self._compiled.hits, "misses": self._compiled.misses}
        content = {"config": dataclasses.asdict(self.config), "metrics": metrics, "timing": self.timing, "compile_cache": cache}
        content = jsonable(content | {"environment": environment()})
        from_primary(lambda: write_json(self.folder / "results.json", content))
        return content


class _Checkpoints:
    """The last two states of a training run, in orbax; a checkpoint is there whole or not at all."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        self._orbax = require("orbax.checkpoint", "experiments")
        options = self._orbax.CheckpointManagerOptions(max_to_keep=2, create=True, enable_async_checkpointing=False)
        self._manager = self._orbax.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "_Checkpoints":
        return self

    def __exit__(self, *error) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: FitState) -> None:
        if step != self.latest():
            self._manager.save(step, args=self._orbax.args.StandardSave(_named(state)))

    def restore(self, state: FitState) -> FitState:
        """The last state saved, or `state` if there is none."""
        if (step := from_primary(self.latest)) is None:
            return state
        names = list(_named(state))
        saved = self._manager.restore(step, args=self._orbax.args.StandardRestore(_named(state)))
        leaves, structure = jax.tree.flatten(state)
        return jax.tree.unflatten(structure, [_like(old, saved[name]) for name, old in zip(names, leaves, strict=True)])


def _named(state):
    """Every leaf by the name of its place, random keys as their data: independent of the containers' types."""
    leaves, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): jax.random.key_data(leaf) if _is_key(leaf) else leaf for path, leaf in leaves}


def _is_key(leaf):
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _like(old, new):
    return jax.random.wrap_key_data(new, impl=jax.random.key_impl(old)) if _is_key(old) else new


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C and SIGTERM only set a flag, so that the step at hand ends and is saved. A second one ends the program at once."""
    seen: list[int] = []

    def note(number, frame):
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _write_stage(path, arrays, timing):
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as file:
        np.savez(file, __timing__=json.dumps(timing), **arrays)


def _read_stage(path):
    with np.load(path) as content:
        arrays = dict(content)
    return arrays, json.loads(str(arrays.pop("__timing__")))


def _progress_bars(console):
    progress = require("rich.progress", "experiments")
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("ETA"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}"),
        console=console,
        disable=console.quiet or not console.is_terminal,
    )


def environment() -> dict[str, Any]:
    """What a number was measured on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), cpu)
    packages = ("ergodax", "jax", "jaxlib", "equinox", "diffrax", "optax", "numpy")
    return {
        "python": platform.python_version(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "processes": jax.process_count(),
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "packages": {name: metadata.version(name) for name in packages},
    }


__all__ = ["Run", "TrainingFailed", "environment"]
