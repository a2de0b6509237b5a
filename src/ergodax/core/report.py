"""A self-contained HTML page: headings, prose, tables and figures in one file that opens anywhere."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #8884; padding-bottom: .2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; border-bottom: 1px solid #8883; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; background: #fff; } figcaption { font-size: .9rem; opacity: .8; }
.wide { overflow-x: auto; } pre { font-size: .85rem; overflow-x: auto; } .good { color: #197a3e; } .bad { color: #b3261e; }
"""


class Report:
    """Collects the parts of a page in order; `write` puts them in one file. Text is escaped."""

    def __init__(self, title: str, lead: str = ""):
        self._title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(lead)}</p>"]

    def heading(self, text: str) -> None:
        """A section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows with the same keys; numbers in four digits."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
        body = "".join("<tr>" + "".join(f"<td>{html.escape(show(value))}</td>" for value in row.values()) + "</tr>" for row in rows)
        self._parts.append(f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')

    def figure(self, path: Path, caption: str) -> None:
        """A PNG file, embedded."""
        data = base64.b64encode(path.read_bytes()).decode()
        alt = html.escape(caption, quote=True)
        self._parts.append(f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption>{html.escape(caption)}</figcaption></figure>')

    def code(self, text: str) -> None:
        """Preformatted text."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def write(self, path: Path) -> None:
        """The page."""
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(self._title)}</title>'
        path.write_text(f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{"".join(self._parts)}</body></html>\n')


def show(value: Any) -> str:
    """A table cell: floats in four significant digits, True as yes."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


__all__ = ["Report", "show"]
