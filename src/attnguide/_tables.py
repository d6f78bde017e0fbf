"""Tables as HTML, for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["GOOD", "POOR", "bar", "table"]

#: Colours of what is right and wrong, which the colour-blind tell apart, on light and dark pages.
GOOD, POOR = "#2a9d8f", "#d1495b"


def bar(share: float, text: str, color: str = GOOD) -> str:
    """Return a cell with a bar as long as a share in [0, 1], and a text after it."""
    width = round(120 * min(max(share, 0.0), 1.0))
    return (
        f'<span style="display:inline-block;width:{width}px;height:0.8em;background:{color};'
        f'margin-right:0.5em"></span>{escape(text)}'
    )


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> str:
    """Return a table.

    Args:
        title: Line above it; text.
        header: Heading of each column; text.
        rows: Cells, which are HTML: escape what comes from elsewhere.
        note: Line below it; HTML.
    """
    left = 'style="text-align:left"'
    head = "".join(f"<th {left}>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td {left}>{cell}</td>" for cell in cells) + "</tr>" for cells in rows)
    below = f"<p>{note}</p>" if note else ""
    return f"<p>{escape(title)}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"
