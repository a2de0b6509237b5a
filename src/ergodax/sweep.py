"""What came of a sweep, for people: `python -m ergodax.sweep show DIR`, `… page DIR`, `… tensorboard DIR LOGDIR`.

DIR is the folder of a sweep (see `ergodax.core.store`), finished, interrupted or still running: it is only read, and no device is taken. The same
functions take a `SweepResult`.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .core import figures
from .core.check import check_count, require
from .core.config import UsageError, quit_with
from .core.report import Report, show
from .core.result import SweepResult, is_curve
from .core.store import describe, read_chunks, read_description


def metrics(result: SweepResult) -> list[str]:
    """The columns of numbers that the runs returned: scalars, and what sums up a curve, but for the curve `step`."""
    numeric = [name for name, values in result.table().items() if name not in result.leaves and values.dtype.kind in "biuf"]
    return [name for name in numeric if name.rpartition(".")[0] != "step"]


def default_metric(result: SweepResult) -> str:
    """What runs are ranked by if nobody says: a loss, rather a held-out one, rather a scalar; else the first. Raises `UsageError` without any."""
    names = sorted(metrics(result), key=lambda name: name not in result.metrics)  # scalars before what sums up a curve
    for words in (("loss", "test"), ("loss", "val"), ("loss", "")):
        for name in names:
            if all(word in name.lower() for word in words):
                return name
    if not names:
        raise UsageError("the runs returned no number to rank them by.")
    return names[0]


def leaderboard(result: SweepResult, metric: str, *, largest: bool = False) -> list[dict[str, Any]]:
    """A row for each run, the best first: `rank`, `run`, the config leaves that vary, the metric. Runs without a finite value come last, unranked.

    Raises `UsageError` for an unknown metric.
    """
    if metric not in (names := metrics(result)):
        raise UsageError(f"no metric `{metric}`; there are {', '.join(names) or 'none'}.")
    values, leaves = result.numbers(metric), {name: result.leaf(name) for name in figures.varying(result)}
    failed = ~np.isfinite(values)
    order = np.lexsort((-values if largest else values, failed)).tolist()
    rows: list[dict[str, Any]] = [{"rank": None if failed[place] else rank + 1, "run": result.runs[place]} for rank, place in enumerate(order)]
    return [row | {name: leaf[place] for name, leaf in leaves.items()} | {metric: float(values[place])} for row, place in zip(rows, order)]


# The page


def write_page(source: SweepResult | Path | str, path: Path | str, *, metric: str | None = None, largest: bool = False) -> None:
    """One self-contained HTML file: a sortable table of all runs, figures, the plan with its timing, and the config.

    - `source`: a result, or the folder of a sweep.
    - `metric`: what runs are ranked by (default: see `default_metric`); `largest` if more is better.

    Raises `UsageError` for a folder without a sweep or an unknown metric.
    """
    folder = None if isinstance(source, SweepResult) else Path(source)
    result = source if isinstance(source, SweepResult) else SweepResult.load(source)
    description = {} if folder is None else read_description(folder)
    page = Report("Sweep" if folder is None else folder.absolute().name, f"{len(result)} of {len(description.get('runs', result.runs))} runs done.")
    if len(result):
        _fill(page, result, metric or default_metric(result), largest)
    page.heading("Plan and timing")
    _tell_timing(page, result, folder)
    if description:
        page.heading("Config and versions")
        page.code(json.dumps({name: description[name] for name in ("config", "versions")}, indent=2))
    page.write(Path(path))


def _fill(page, result, metric, largest):
    """The table and the figures of runs that are done."""
    table = {name: result.table()[name].tolist() for name in metrics(result) if name != metric}
    place = {run: i for i, run in enumerate(result.runs)}
    rows = leaderboard(result, metric, largest=largest)
    page.heading(f"Runs by {metric}, {'largest' if largest else 'smallest'} first")
    if lost := sum(row["rank"] is None for row in rows):
        page.text(f"{lost} of {len(rows)} runs have no finite {metric}.")
    page.text("A click on a head sorts.")
    page.table([row | {name: values[place[row["run"]]] for name, values in table.items()} for row in rows], sortable=True)

    curves = [name for name, values in result.metrics.items() if is_curve(values) and name != "step"]
    chosen = [name for name in curves if metric.startswith(f"{name}.")] or curves[:4]
    leaves = figures.varying(result)
    if chosen:
        page.heading("Learning curves")
    for name in chosen:
        page.figure(figures.png(figures.learning_curves(result, name)), f"{name}; dotted where runs of a setting are missing, a cross where all are.")
    if leaves:
        page.heading("Hyper-parameters")
        page.figure(figures.png(figures.parallel_coordinates(result, metric, largest=largest)), f"Every run; the best by {metric} is red.")
    few = sorted((name for name in leaves if len(result.grouped([name])) <= 20), key=lambda name: name.split(".")[-1] == "seed")
    if len(few) > 1:
        picture = figures.heat_map(result, metric, few[0], few[1], largest=largest)
        page.figure(figures.png(picture), f"Mean {metric} over all else; the best is framed, hatched cells hold runs that failed.")


def _tell_timing(page, result, folder):
    """What was compiled and what it took: of each session that got to an end, else of what is done."""
    if folder is not None and (folder / "timing.json").exists():
        sessions = json.loads((folder / "timing.json").read_text())
    elif folder is not None:
        chunks = read_chunks(folder)
        page.text(f"{len(chunks)} chunks took {sum(c.seconds for c in chunks):.1f} s, and {sum(c.compile_seconds for c in chunks):.1f} s to compile.")
        return
    else:
        groups = [vars(group) | {"static": describe(group.static), "runs": len(group.runs)} for group in result.groups]
        sessions = [{"seconds": None, "cache_hits": result.cache_hits, "groups": groups}]
    for number, session in enumerate(sessions, start=1):
        seconds = "" if session["seconds"] is None else f", {session['seconds']:.1f} s in all"
        name = f"Session {number}" if len(sessions) > 1 else "The sweep"
        page.text(f"{name}: {session['cache_hits']} programs from the compile cache{seconds}.")
        if session["groups"]:
            page.table([_group_row(group) for group in session["groups"]])


def _group_row(group):
    return {
        "static": ", ".join(f"{name}={value}" for name, value in group["static"].items()) or "all values traced",
        "runs": group["runs"],
        "vmapped together": group["batch_size"],
        "MB a chunk": None if group["memory"] is None else group["memory"] / 1e6,
        "compiles": group["compiles"],
        "compile seconds": group["compile_seconds"],
        "run seconds": group["run_seconds"],
    }


# TensorBoard


def write_events(source: SweepResult | Path | str, logdir: Path | str) -> None:
    """TensorBoard event files, a sub-folder for each run: its curves over the curve `step` (or the index), its scalars, its config leaves as hparams.

    Raises `UsageError` if `logdir` is not empty, since events only ever add up.
    """
    tensorboard, summary = require("tensorboardX", "tensorboard"), require("tensorboardX.summary", "tensorboard")
    Summary = require("tensorboardX.proto.summary_pb2", "tensorboard").Summary
    result, logdir = source if isinstance(source, SweepResult) else SweepResult.load(source), Path(logdir)
    if logdir.exists() and any(logdir.iterdir()):
        raise UsageError(f"{logdir} is not empty; choose another folder for the events.")
    leaves = {name: result.leaf(name) for name in result.leaves}
    for place, run in enumerate(result.runs):
        values = {name: values[place] for name, values in result.metrics.items() if values[place] is not None}
        steps = np.atleast_1d(values.pop("step", 0))
        with tensorboard.SummaryWriter(str(logdir / f"run_{run:06d}")) as writer:
            for part in summary.hparams({name: leaf[place] for name, leaf in leaves.items()}, values):
                writer.file_writer.add_summary(part)
            for name, value in values.items():
                curve = np.atleast_1d(value)
                for step, number in zip(steps if len(steps) == len(curve) else range(len(curve)), curve.tolist()):
                    # `add_scalar` would warn of every NaN, which is what a run that failed has to show
                    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, simple_value=number)]), int(step))


# The command line


def listing(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Rows with the same keys as aligned text."""
    cells = [list(rows[0]), *([show(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths)).rstrip()


def print_leaderboard(folder: Path, metric: str | None, largest: bool, top: int) -> None:
    """`show`."""
    check_count("top", top)
    result, total = SweepResult.load(folder), len(read_description(folder)["runs"])
    if not len(result):
        print(f"{folder}: 0 of {total} runs done")
        return
    chosen = metric or default_metric(result)
    rows = leaderboard(result, chosen, largest=largest)
    lost = sum(row["rank"] is None for row in rows)
    print(f"{folder}: {len(result)} of {total} runs done" + (f", {lost} of them failed ({chosen} is not finite)" if lost else ""))
    others = ", ".join(name for name in metrics(result) if name != chosen)
    hint = f" (chosen by its name; --metric takes another: {others})" if metric is None and others else ""
    print(f"by {chosen}, {'largest' if largest else 'smallest'} first{hint}")
    if sys.stdout.isatty():
        text, table = require("rich.text", "experiments"), require("rich.table", "experiments").Table(box=None)
        for name in rows[0]:
            table.add_column(text.Text(name), justify="right")
        for row in rows[:top]:
            table.add_row(*(text.Text(show(value)) for value in row.values()), style="bold" if row["rank"] == 1 else None)
        require("rich.console", "experiments").Console().print(table)
    else:
        print("\n".join(listing(rows[:top])))
    if len(rows) > top:
        print(f"and {len(rows) - top} more (--top {len(rows)})")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(prog="python -m ergodax.sweep", description="What came of a sweep: its folder is only read, while it runs too.")
    commands = main.add_subparsers(dest="command", required=True)
    ranked = argparse.ArgumentParser(add_help=False)
    ranked.add_argument("folder", type=Path, metavar="DIR", help="the sweep's folder")
    ranked.add_argument("--metric", metavar="NAME", help="what runs are ranked by (default: a loss, else the first)")
    ranked.add_argument("--largest", action="store_true", help="the largest is the best")
    one = commands.add_parser("show", parents=[ranked], help="the leaderboard")
    one.add_argument("--top", type=int, default=20, metavar="N", help="as many runs (default 20)")
    two = commands.add_parser("page", parents=[ranked], help="a self-contained HTML page with table and figures")
    two.add_argument("--out", type=Path, metavar="FILE", help="where (default DIR/page.html)")
    three = commands.add_parser("tensorboard", help="TensorBoard event files")
    three.add_argument("folder", type=Path, metavar="DIR", help="the sweep's folder")
    three.add_argument("logdir", type=Path, metavar="LOGDIR", help="an empty folder for the events")
    return main


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, and exits with 2 and one line if something is not there."""
    options = parser().parse_args(argv)
    try:
        if options.command == "show":
            print_leaderboard(options.folder, options.metric, options.largest, options.top)
            sys.stdout.flush()
        elif options.command == "page":
            path = options.out or options.folder / "page.html"
            write_page(options.folder, path, metric=options.metric, largest=options.largest)
            print(path)
        else:
            write_events(options.folder, options.logdir)
            print(options.logdir)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; leave nothing to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError) as error:
        quit_with(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
