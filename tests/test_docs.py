"""Every ```python block of the documentation and the README runs: those of a page in order, in one namespace, with JAX as users have it."""

import re
from pathlib import Path

import jax
import pytest


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[tuple[int, str]]:
    """First line and text of each block."""
    text = page.read_text()
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(page):
    namespace = {"__name__": "__docs__"}
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        for line, text in blocks(page):
            exec(compile("\n" * line + text, str(page), "exec"), namespace)  # a traceback names the page's own line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_has_an_example(page):
    assert blocks(page)
