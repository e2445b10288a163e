"""Which records of some files cannot be used, and what is odd about the others.

Reads record by record, so files of any size can be checked. Not here: how they are printed
(``rxlm.cli.data``), what is counted over usable records (``counting``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rxlm.data.conversations import Conversation
from rxlm.data.files import TEXT_SUFFIXES, resolve_files
from rxlm.data.records import MAX_RECORD_BYTES, read_records
from rxlm.data.sources import parse_conversation, parse_record, text_parser, turns_of_row

DataKind = Literal["dialogues", "text"]

_LOOKED_AT = 20


class Checked(NamedTuple):
    """A record that was read: what it means, or the problem with it."""

    file: Path
    where: str
    value: Conversation | str | None
    problem: str | None
    turns: tuple[str, ...] = ()
    """Which field each turn of a conversation was read from."""


@dataclass
class CheckReport:
    """What a check found.

    Attributes:
        kinds: per file, what its records were read as.
        num_records: all of them.
        problems: of records that cannot be used, as complete messages; each begins with the place.
        notes: what is odd, but can be used: ids that occur again, turns without a query.
        unusable_files: messages of files without any usable record, which training refuses.
    """

    kinds: dict[str, DataKind] = field(default_factory=dict)
    num_records: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unusable_files: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether every record can be used, and there is one in each file."""
        return not self.problems and not self.unusable_files and self.num_records > 0


def data_kind(file: Path) -> DataKind:
    """Return what the records of a file are: conversations if one of the first says so."""
    if file.name.endswith((".txt", ".txt.gz")):
        return "text"
    for number, record in enumerate(read_records(file)):
        if isinstance(record.value, dict) and "text" in record.value:
            return "text"
        if isinstance(record.value, dict) and "interactions" in record.value:
            return "dialogues"
        if number == _LOOKED_AT:
            break
    return "dialogues"


def read_checked(
    path: str | os.PathLike[str],
    kind: DataKind | None = None,
    *,
    max_bytes: int = MAX_RECORD_BYTES,
    kinds: dict[str, DataKind] | None = None,
) -> Iterator[Checked]:
    """Yield every record of the files that a path stands for, usable or not.

    Args:
        path: file, folder or glob.
        kind: what the records are; None: found out for each file.
        max_bytes: longest record.
        kinds: told what was found out, by file, if given.

    Raises:
        UserError: when there is no file, or one cannot be opened.
    """
    for file in resolve_files(path, TEXT_SUFFIXES):
        known = kind or data_kind(file)
        if kinds is not None:
            kinds[str(file)] = known
        parse: Callable[[Any, str], Conversation | str]
        parse = parse_conversation if known == "dialogues" else text_parser(file)
        for record in read_records(file, max_bytes=max_bytes):
            value: Conversation | str | None
            value, problem = parse_record(record, parse)
            turns: tuple[str, ...] = ()
            if isinstance(value, Conversation):
                turns = tuple(name for name, _ in turns_of_row(record.value))
            yield Checked(file, record.where, value, problem, turns)


def check_files(
    path: str | os.PathLike[str],
    kind: DataKind | None = None,
    *,
    max_bytes: int = MAX_RECORD_BYTES,
) -> CheckReport:
    """Read all files and return what cannot be used; see :func:`read_checked`."""
    report = CheckReport()
    seen: dict[int, str] = {}
    usable: set[str] = set()
    for item in read_checked(path, kind, max_bytes=max_bytes, kinds=report.kinds):
        report.num_records += 1
        if item.problem is not None:
            report.problems.append(item.problem)
            continue
        usable.add(str(item.file))
        if isinstance(item.value, Conversation):
            report.notes += _notes(item.value, item, seen)
    report.unusable_files += [
        f"{file}: holds no usable record, which training refuses. Remove the file, or fill it."
        for file in report.kinds
        if file not in usable
    ]
    return report


def _notes(conversation: Conversation, item: Checked, seen: dict[int, str]) -> Iterator[str]:
    where = item.where
    if conversation.id:
        # Hashes instead of ids: a file may hold millions.
        key = hash(conversation.id)
        if key in seen:
            yield f"{where}: the id {conversation.id!r} was used before, at {seen[key]}"
        seen.setdefault(key, where)
    for name, interaction in zip(item.turns, conversation.interactions, strict=True):
        # A tool's result stands in place of the query.
        if interaction.tool_use is None and not interaction.query.strip():
            yield f"{where}: field '{name}.query' is empty (read as silence)"
