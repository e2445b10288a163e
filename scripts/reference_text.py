"""Google-style docstrings to Markdown, for the API reference."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Sequence
from typing import Any

_SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Attributes|Examples?|Notes?):$")
_TITLES = {"Args": "Arguments", "Attributes": "Attributes"}


def own_doc(value: Any) -> str:
    """Return the docstring of a thing itself: not an inherited one, nor one that was made up."""
    text = value.__doc__ or ""
    if inspect.isclass(value):
        text = vars(value).get("__doc__") or ""
        if dataclasses.is_dataclass(value) and text.startswith(f"{value.__name__}("):
            return ""
    return inspect.cleandoc(text)


def markdown(docstring: str) -> str:
    """Return a Google-style docstring as Markdown."""
    lines = inspect.cleandoc(docstring).splitlines()
    output: list[str] = []
    place = 0
    while place < len(lines):
        line = lines[place]
        section = _SECTION.match(line)
        if section or line.rstrip().endswith("::"):
            block, place = indented(lines, place + 1)
            if section:
                output += section_lines(section[1], block)
            else:
                output += [inline(line.rstrip()[:-1]), "", *fence("\n".join(block).strip("\n"))]
            continue
        output.append(inline(line) if not line.startswith("    ") else line)
        place += 1
    return "\n".join(output)


def indented(lines: Sequence[str], place: int) -> tuple[list[str], int]:
    """Return the indented lines from ``place`` on, dedented, and where they end."""
    end = place
    while end < len(lines) and (not lines[end].strip() or lines[end].startswith(" ")):
        end += 1
    block = inspect.cleandoc("\n" + "\n".join(lines[place:end])).splitlines()
    return block, end


def section_lines(title: str, block: Sequence[str]) -> list[str]:
    """Return one section of a docstring: a list of names, or a paragraph."""
    if title in ("Returns", "Yields", "Note", "Notes"):
        return ["", inline(f"**{title}:** " + " ".join(block)), ""]
    if title.startswith("Example"):
        return ["", f"**{title}:**", "", *fence("\n".join(block)), ""]
    items: list[str] = []
    for line in block:
        if line.startswith(" ") or not line.strip() or not re.match(r"[*\w., ]+: ", line):
            items[-1:] = [f"{items[-1]} {line.strip()}".rstrip()] if items else [line]
        else:
            name, _, text = line.partition(": ")
            items.append(f"- `{name}`: {text}")
    return ["", f"**{_TITLES.get(title, title)}:**", "", *map(inline, items), ""]


def inline(text: str) -> str:
    """Return a line with roles and double backticks as Markdown code."""
    text = re.sub(r":\w+:`~([^`]+)`", lambda found: f"`{found[1].rpartition('.')[2]}`", text)
    text = re.sub(r":\w+:`([^`]+)`", r"`\1`", text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def cell(text: str) -> str:
    """Return text that does not end a cell of a table."""
    return re.sub(r"(?<!\\)\|", r"\\|", text)


def fence(code: str) -> list[str]:
    """Return code in a fence."""
    return ["```py", *code.splitlines(), "```", ""]
