"""An mkdocs hook: makes the method index from `catalog.toml`, and lists a package's public names where a page says `<!-- api: PACKAGE -->`.

`python docs/gen_index.py` prints the index.
"""

import importlib
import inspect
import re

from mkdocs.structure.files import File

from ergodax import catalog
from ergodax.__main__ import head, signature


def index() -> str:
    """The page of all methods, by family."""
    methods = catalog.load()
    lines = [
        "# Methods",
        "",
        f"{len(methods)} papers. The same on the command line: `python -m ergodax list` and `python -m ergodax show SLUG`.",
        "",
        "| method | paper | socket |",
        "| --- | --- | --- |",
        *(f"| [`{m.slug}`](#{m.slug}) | {m.title} | {m.socket} |" for m in methods),
    ]
    for family in catalog.engines():
        chosen = [method for method in methods if method.family == family]
        if chosen:
            lines += ["", f"## {family}", *(line for method in chosen for line in entry(method))]
    return "\n".join(lines) + "\n"


def entry(method: catalog.Method) -> list[str]:
    """One method: paper, objects, what is left out, how to cite it."""
    lines = ["", f"### `{method.slug}` {{ #{method.slug} }}", "", f"{catalog.reference(method).removesuffix(f' arXiv:{method.arxiv}.')}"]
    lines[-1] += f" [arXiv:{method.arxiv}]({method.url})."
    for dotted in method.objects:
        obj = catalog.resolve(dotted)
        lines += ["", f"- [`{signature(obj, dotted)}`][{dotted}]  ", f"  {head(obj)}"]
    if method.left_out:
        lines += ["", f"Left out: {method.left_out}"]
    lines += ["", '??? quote "Cite"', "", "    ```bibtex", *(f"    {line}" for line in catalog.citation(method).splitlines()), "    ```"]
    return lines


def names(package: str) -> list[str]:
    """The public names of a package, in the order of its `__init__`."""
    return [name for name, value in vars(importlib.import_module(package)).items() if not name.startswith("_") and not inspect.ismodule(value)]


def on_files(files, config):
    """Adds the index."""
    files.append(File.generated(config, "methods.md", content=index()))
    return files


def on_page_markdown(markdown, **kwargs):
    """Puts the reference of each name in the place of `<!-- api: PACKAGE -->`."""

    def reference(match):
        return "\n\n".join(f"::: {match[1]}.{name}" for name in names(match[1]))

    return re.sub(r"<!-- api: (\S+) -->", reference, markdown)


if __name__ == "__main__":
    print(index())
