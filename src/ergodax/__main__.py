"""The catalogue on the command line: `python -m ergodax list` and `python -m ergodax show SLUG`."""

import argparse
import inspect
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from . import catalog


def signature(obj: Any, name: str) -> str:
    """`name(arguments)` with defaults and without annotations, which are in the documentation."""
    try:
        parameters = inspect.signature(obj).parameters.values()
    except (TypeError, ValueError):
        return name
    return name + str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters]))


def head(obj: object) -> str:
    """The first paragraph of a docstring, as one line."""
    return " ".join((inspect.getdoc(obj) or "").split("\n\n")[0].split())


def listing(methods: Sequence[catalog.Method], width: int) -> Iterator[str]:
    """One method a line, titles wrapped in their column."""
    columns = [[getattr(method, key) for method in methods] for key in ("slug", "family", "socket")]
    widths = [max(map(len, column), default=0) for column in columns]
    for *cells, method in zip(*columns, methods, strict=True):
        start = "  ".join(cell.ljust(size) for cell, size in zip(cells, widths, strict=True)) + f"  {method.year}  "
        room = max(width - len(start), 20)
        yield from textwrap.wrap(method.title, room + len(start), initial_indent=start, subsequent_indent=" " * len(start))
    yield f"{len(methods)} method{'' if len(methods) == 1 else 's'}"


def page(method: catalog.Method, width: int) -> Iterator[str]:
    """All that the catalogue and the docstrings say about a method."""

    def paragraph(text: str, indent: int) -> list[str]:
        return textwrap.wrap(text, max(width, indent + 20), initial_indent=" " * indent, subsequent_indent=" " * indent)

    yield from paragraph(f"{method.slug}: {method.title}", 0)
    yield from paragraph(f"{', '.join(method.authors)}, {method.year}", 0)
    yield f"{method.url}"
    yield f"family {method.family}, socket {method.socket}"
    for dotted in method.objects:
        yield ""
        try:
            obj = catalog.resolve(dotted)
        except ImportError as error:  # an extra that is not installed
            yield f"{dotted}: {error}"
        else:
            yield from textwrap.wrap(signature(obj, dotted), width, subsequent_indent="    ", break_long_words=False)
            yield from paragraph(head(obj), 4)
    yield ""
    yield f"test        {method.test}"
    yield f"experiment  {method.experiment or 'none yet'}"
    yield from textwrap.wrap(f"left out    {method.left_out or 'nothing'}", width, subsequent_indent=" " * 12)
    yield ""
    yield "To cite it:"
    yield ""
    yield catalog.citation(method)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(prog="python -m ergodax", description="The methods of ergodax and the papers they come from.")
    commands = main.add_subparsers(dest="command", required=True)
    one = commands.add_parser("list", help="methods, one a line")
    one.add_argument("--family", help="only this family")
    one.add_argument(
        "--search", metavar="TEXT", default="", help="only methods with every word of TEXT in their slug, title, authors, arXiv id or objects"
    )
    two = commands.add_parser("show", help="one method: paper, objects, tests, what is left out, how to cite it")
    two.add_argument("slug")
    return main


def matches(method: catalog.Method, text: str) -> bool:
    """Whether every word of `text` is in the method's entry."""
    entry = " ".join([method.slug, method.title, *method.authors, method.arxiv, *method.objects]).lower()
    return all(word in entry for word in text.lower().split())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, and exits with 2 on a name that there is none of."""
    command_line = parser()
    options = command_line.parse_args(argv)
    width = shutil.get_terminal_size((160, 24)).columns
    if options.command == "show":
        try:
            lines = page(catalog.find(options.slug), width)
        except ValueError as error:
            command_line.error(str(error))
    else:
        families = catalog.engines()
        if options.family not in (None, *families):
            command_line.error(f"{catalog.no_such('family', options.family, families)} (families: {', '.join(families)})")
        chosen = [m for m in catalog.load() if options.family in (None, m.family) and matches(m, options.search)]
        lines = listing(chosen, width)
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; leave nothing to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
