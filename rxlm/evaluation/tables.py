"""A table of text and its three forms: terminal, Markdown, HTML. No torch."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table as RichTable

PASSED, FAILED = "passed", "FAILED"
MET, NOT_MET = "met", "not met"
"""Cells that are coloured."""
SHORT = 20
"""Characters of a cell that stays on one line of a page."""

_STYLES = {PASSED: "green", FAILED: "bold red", MET: "green", NOT_MET: "bold red"}
_CLASSES = {PASSED: "passed", FAILED: "failed", MET: "passed", NOT_MET: "failed"}


class Table(NamedTuple):
    """Text in rows and columns. Columns after the first are right-aligned, unless ``prose``."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    prose: bool = False


def rich_table(table: Table) -> RichTable:
    """Return the table for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(
        title=Text(table.title),
        caption=Text(table.note) if table.note else None,
        box=SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    for number, name in enumerate(table.header):
        drawn.add_column(Text(name), justify="left" if table.prose or number == 0 else "right")
    for row in table.rows:
        # Text, because answers may hold what rich would take for markup.
        drawn.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    return drawn


def markdown_table(table: Table) -> str:
    """Return the table in GitHub's Markdown, its note below it."""
    align = ["---"] + ["---" if table.prose else "---:"] * (len(table.header) - 1)
    lines = [table.header, align, *table.rows]
    text = "\n".join("| " + " | ".join(map(escape_markdown, line)) + " |" for line in lines)
    return f"{text}\n\n{table.note}\n" if table.note else text + "\n"


def escape_markdown(text: str) -> str:
    """Return ``text`` so that it stays in its cell and reads as it is written."""
    for character in "\\|`*_<[":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())


def html_table(table: Table) -> str:
    """Return the table as HTML, its note below it."""
    kind = ' class="prose"' if table.prose else ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.header)
    body = "".join(
        "<tr>" + "".join(_html_cell(cell) for cell in row) + "</tr>\n" for row in table.rows
    )
    note = f'<p class="note">{html.escape(table.note)}</p>\n' if table.note else ""
    return (
        f'<div class="wide"><table{kind}>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>\n{note}"
    )


def _html_cell(cell: str) -> str:
    kinds = [_CLASSES[cell]] if cell in _CLASSES else []
    if len(cell) <= SHORT:
        kinds.append("short")
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    return f"<td{kind}>{html.escape(cell)}</td>"
