"""The catalogue: which paper is where. Reads `catalog.toml`; standard library only, and imports a family only to `resolve` one of its objects."""

import difflib
import pkgutil
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


PATH = Path(__file__).with_name("catalog.toml")


@dataclass(frozen=True)
class Method:
    """One paper's method. `objects` are dotted paths; `test` and `experiment` are paths in the repository, "" for none."""

    slug: str
    title: str
    authors: tuple[str, ...]
    year: int
    arxiv: str
    family: str
    socket: str
    objects: tuple[str, ...]
    test: str
    experiment: str
    left_out: str

    @property
    def url(self) -> str:
        """The paper's page."""
        return f"https://arxiv.org/abs/{self.arxiv}"


def load() -> tuple[Method, ...]:
    """All methods, in the order of their slugs."""
    return tuple(Method(**row | {key: tuple(row[key]) for key in ("authors", "objects")}) for row in _read()["method"])


def engines() -> dict[str, tuple[str, ...]]:
    """For each family, the public names that are engines and not one paper's method. Its keys are all the families."""
    return {family: tuple(names) for family, names in _read()["engines"].items()}


def _read() -> dict[str, Any]:
    return tomllib.loads(PATH.read_text(encoding="utf-8"))


def no_such(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for an unknown name, with the nearest known ones."""
    near = difflib.get_close_matches(name, known, cutoff=0.5) or [other for other in known if name.lower() in other]
    return f"there is no {kind} {name!r}" + (f"; did you mean {' or '.join(near[:3])}?" if near else "")


def find(slug: str) -> Method:
    """The method named `slug`. Raises `ValueError`, with the nearest slugs, if there is none."""
    methods = {method.slug: method for method in load()}
    if slug not in methods:
        raise ValueError(no_such("method", slug, methods))
    return methods[slug]


def resolve(dotted: str) -> Any:
    """The object at a dotted path such as "ergodax.diffusion.MinSNR"; imports its family."""
    return pkgutil.resolve_name(dotted)


def reference(method: Method) -> str:
    """One line: authors, year, title, arXiv id."""
    names = [author.split()[-1] for author in method.authors]
    who = " and ".join(names) if len(names) < 3 else f"{names[0]} et al."
    return f"{who} ({method.year}). {method.title}. arXiv:{method.arxiv}."


def citation(method: Method) -> str:
    """A BibTeX entry."""
    fields = {
        "title": f"{{{method.title}}}",  # the inner braces keep its capitals
        "author": " and ".join(method.authors),
        "year": method.year,
        "eprint": method.arxiv,
        "archivePrefix": "arXiv",
        "url": method.url,
    }
    body = "".join(f"  {key} = {{{value}}},\n" for key, value in fields.items())
    return f"@misc{{{method.slug},\n{body}}}"


__all__ = ["PATH", "Method", "citation", "engines", "find", "load", "no_such", "reference", "resolve"]
