"""A self-contained HTML page: headings, prose, tables and figures in one file that opens anywhere."""

import base64
import html
import math
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
.tall { max-height: 36rem; overflow-y: auto; } .tall th { position: sticky; top: 0; background: Canvas; }
th button { font: inherit; font-weight: bold; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
"""

# Numbers in their order, then texts in theirs; what is missing (NaN, nothing) stays last whichever way the rest is sorted.
_SCRIPT = """
function sortKey(cell) {
  if ("number" in cell.dataset) return [0, Number(cell.dataset.number)];
  return ["", "nan"].includes(cell.textContent) ? [2, 0] : [1, cell.textContent];
}
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const rows = [...body.rows].map(row => [row, ...sortKey(row.cells[column])]);
    rows.sort((a, b) => a[1] - b[1] || sign * ((a[2] > b[2]) - (a[2] < b[2])));
    body.append(...rows.map(row => row[0]));
  }));
}
"""


class Report:
    """Collects the parts of a page in order; `write` puts them in one file. Text is escaped."""

    def __init__(self, title: str, lead: str = ""):
        self._title, self._sortable = title, False
        self._parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(lead)}</p>"]

    def heading(self, text: str) -> None:
        """A section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def table(self, rows: Sequence[Mapping[str, Any]], *, sortable: bool = False) -> None:
        """Rows with the same keys; numbers in four digits. `sortable`: a click on a head sorts by its column, by the whole digits."""
        self._sortable |= sortable
        heads = (f'<button type="button">{html.escape(name)}</button>' if sortable else html.escape(name) for name in rows[0])
        head = "".join(f"<th>{text}</th>" for text in heads)
        body = "".join("<tr>" + "".join(_cell(value, sortable) for value in row.values()) + "</tr>" for row in rows)
        kind = ' class="sortable"' if sortable else ""
        self._parts.append(
            f'<div class="wide{" tall" if sortable else ""}"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def figure(self, source: Path | bytes, caption: str) -> None:
        """A PNG file, or the content of one, embedded."""
        data = base64.b64encode(source if isinstance(source, bytes) else source.read_bytes()).decode()
        alt = html.escape(caption, quote=True)
        self._parts.append(f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption>{html.escape(caption)}</figcaption></figure>')

    def code(self, text: str) -> None:
        """Preformatted text."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def write(self, path: Path) -> None:
        """The page."""
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(self._title)}</title>'
        script = f"<script>{_SCRIPT}</script>" if self._sortable else ""
        body = "".join(self._parts) + script
        path.write_text(f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{body}</body></html>\n', encoding="utf-8")


def show(value: Any) -> str:
    """A table cell: floats in four significant digits, True as yes."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _cell(value, sortable):
    """A cell; a number that sorts does so by all its digits."""
    number = sortable and isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    exact = f' data-number="{str(value).replace("inf", "Infinity")}"' if number else ""
    return f"<td{exact}>{html.escape(show(value))}</td>"


__all__ = ["Report", "show"]
