"""Pieces of HTML. Text that comes from a run is escaped here and nowhere trusted."""

import html
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ldm.errors import UserError


def esc(text: Any) -> str:
    """Escape text for an element or a quoted attribute."""
    return html.escape(str(text), quote=True)


def missing(text: str) -> str:
    """Say what is not there."""
    return f'<p class="missing">{esc(text)}</p>'


def attempt(what: str, make: Callable[[], str]) -> str:
    """Make a part of the page; where that fails, say so in its place: the rest is worth having."""
    try:
        return make()
    except UserError as error:
        return missing(str(error))
    except Exception as error:  # files of a run may be damaged in any way
        return missing(f"{what} cannot be shown: {type(error).__name__}: {error}")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "", texts: int = 1) -> str:
    """Lay out a table with headings; its first column names the row.

    Args:
        head: a heading for each column.
        rows: cells, escaped here.
        caption: above the table.
        texts: columns from the left that hold text; the others hold figures.
    """

    def cell(i: int, value: Any) -> str:
        kind = "th scope='row'" if i == 0 else "td"
        return f"<{kind}{'' if i < texts else ' class=figure'}>{esc(value)}</{kind.split()[0]}>"

    top = "".join(f"<th scope='col'{'' if i < texts else ' class=figure'}>{esc(x)}</th>" for i, x in enumerate(head))
    body = "\n".join(f"<tr>{''.join(cell(i, value) for i, value in enumerate(row))}</tr>" for row in rows)
    told = f"<caption>{esc(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide" tabindex="0"><table>{told}\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>'
        "</table></div>"
    )


def facts(pairs: Iterable[tuple[str, Any]]) -> str:
    """Lay out names and what they are."""
    return f"<dl>{''.join(f'<div><dt>{esc(name)}</dt><dd>{esc(value)}</dd></div>' for name, value in pairs)}</dl>"


def folded(title: str, content: str) -> str:
    return f"<details><summary>{esc(title)}</summary>{content}</details>"


def number(value: float) -> str:
    """Write a figure with four digits that count.

    >>> number(0.01234567), number(1234.5), number(30.1)
    ('0.01235', '1,234', '30.1')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
