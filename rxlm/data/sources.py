"""Reads conversations and texts from files: .jsonl, .jsonl.gz, .parquet, .txt, .txt.gz.

A row that cannot be used is an error that names the file, the line, the field and the remedy.
Lines and rows are read in ``records``; how they become training samples: ``conversation_source``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rxlm.data.conversations import Conversation
from rxlm.data.files import CONVERSATION_SUFFIXES, TEXT_SUFFIXES, resolve_files
from rxlm.data.interaction_rows import PART_NAMES, REJECTED, parse_interaction, shown
from rxlm.data.records import (
    EXAMPLE,
    MAX_RECORD_BYTES,
    DataSummary,
    OnBadRecord,
    Record,
    read_records,
)
from rxlm.errors import UserError

logger = logging.getLogger(__name__)

RowType = TypeVar("RowType")

HOW_TO_SKIP = " (on_bad_record='skip' leaves such records out; `rxlm data check` names them all.)"


def load_conversations(
    path: str | os.PathLike[str],
    on_bad_record: OnBadRecord = "fail",
    *,
    max_bytes: int = MAX_RECORD_BYTES,
    summary: DataSummary | None = None,
) -> list[Conversation]:
    """Read all conversations of a file, of the files in a folder, or of those a glob matches.

    Each row is ``{"id", "source", "system"?, "interactions": [{"query", "answer", ...}, ...]}``.
    Metadata that :class:`~rxlm.data.conversations.Interaction` knows is kept where it has the
    meaning it has there (a ``kind`` of ours, a ``distance`` that is a number); the rest is other
    people's and left out.

    Args:
        path: file, folder (not its sub-folders) or glob; ``~`` and ``$VARIABLES`` are expanded.
        on_bad_record: ``'fail'``, or ``'skip'`` to leave unusable rows out, count and log them.
        max_bytes: longest record; a longer one is a bad one.
        summary: counts what is read and skipped, if given.

    Raises:
        UserError: nothing to read, no usable row, or (``'fail'``) an unusable row.
    """
    conversations: list[Conversation] = []
    for file in resolve_files(path, CONVERSATION_SUFFIXES):
        conversations += _load_rows(file, parse_conversation, on_bad_record, max_bytes, summary)
    return conversations


def load_texts(
    path: str | os.PathLike[str],
    on_bad_record: OnBadRecord = "fail",
    *,
    max_bytes: int = MAX_RECORD_BYTES,
    summary: DataSummary | None = None,
) -> list[str]:
    """Read documents of plain text.

    Args:
        path: file, folder or glob. ``.txt`` and ``.txt.gz``: one document a paragraph, paragraphs
            are separated by blank lines and keep their line breaks. ``.jsonl``, ``.parquet``: the
            field ``text`` of each row, or, if it has ``interactions`` instead, the conversation
            as lines of query and answer in turn.
        on_bad_record: as in :func:`load_conversations`.
        max_bytes: as there.
        summary: as there.

    Raises:
        UserError: nothing to read, no usable row, or (``'fail'``) an unusable row.
    """
    texts: list[str] = []
    for file in resolve_files(path, TEXT_SUFFIXES):
        texts += _load_rows(file, text_parser(file), on_bad_record, max_bytes, summary)
    return texts


def text_parser(file: Path) -> Callable[[Any, str], str]:
    """Return what makes a document of a record of ``file``: a paragraph is one as it is."""
    return _as_it_is if _is_text(file) else parse_text


def _as_it_is(paragraph: Any, where: str) -> str:
    assert isinstance(paragraph, str), where
    return paragraph


def parse_conversation(row: Any, where: str) -> Conversation:
    """Return the conversation in ``row`` (decoded JSON).

    A row that has ``query`` and ``answer`` of its own begins with that turn; ``interactions``, if
    there are any, follow. Published data sets have both forms.

    Raises:
        UserError: beginning with ``where`` and naming field, expectation and remedy.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected an object such as {EXAMPLE}, got {shown(row)}.")
    turns = turns_of_row(row)
    if not turns:
        interactions = row.get("interactions")
        found = ", ".join(map(str, row)) or "none"
        raise UserError(
            f"{where}: field 'interactions': expected a non-empty list of objects with 'query' and "
            f"'answer', got {shown(interactions)} (fields of the row: {found}). Write rows such "
            f"as {EXAMPLE}"
        )
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise UserError(
            f"{where}: field 'system': expected text or nothing, got {shown(system)}. "
            f"Make it a string or leave it out."
        )
    return Conversation(
        interactions=tuple(
            parse_interaction(item, f"{where}: field '{name}") for name, item in turns
        ),
        system=system,
        id=str(row["id"]) if isinstance(row.get("id"), (str, int)) else "",
        source=row["source"] if isinstance(row.get("source"), str) else "",
    )


def turns_of_row(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the turns of a row, each with the field that holds it: 'row', 'interactions[0]', ...

    A field that is null is one that is absent, which is how parquet has it. Empty for a row whose
    ``interactions`` are no list.
    """
    first = {name: row[name] for name in row if name in PART_NAMES and row[name] is not None}
    if first and row.get(REJECTED) is not None:
        first[REJECTED] = row[REJECTED]
    rest = row.get("interactions")
    if not isinstance(rest, list) and rest is not None:
        return []
    listed = [(f"interactions[{turn}]", item) for turn, item in enumerate(rest or [])]
    return [("row", first), *listed] if first else listed


def parse_text(row: Any, where: str) -> str:
    """Return the text in ``row``: its field ``text``, or its conversation line by line.

    Raises:
        UserError: beginning with ``where`` and naming field, expectation and remedy.
    """
    if (
        isinstance(row, Mapping)
        and "text" not in row
        and ("interactions" in row or "answer" in row)
    ):
        return render(parse_conversation(row, where))
    text = row.get("text") if isinstance(row, Mapping) else None
    if not isinstance(text, str) or not text.strip():
        raise UserError(
            f"{where}: field 'text': expected non-empty text, got {shown(text)}. Write rows such "
            f'as {{"text": "Once upon a time ..."}}'
        )
    return text


def render(conversation: Conversation) -> str:
    """Return a conversation as plain text: the system text, then the parts of each turn."""
    lines = [] if conversation.system is None else [conversation.system]
    for interaction in conversation.interactions:
        lines += interaction.parts().values()
    return "\n".join(lines)


def read_parsed(
    file: Path,
    parse: Callable[[Any, str], RowType],
    *,
    max_bytes: int = MAX_RECORD_BYTES,
) -> Iterator[tuple[Record, RowType | None, str | None]]:
    """Yield (record, what it means, problem) for each record; one of the latter two is None."""
    for record in read_records(file, max_bytes=max_bytes):
        parsed, problem = parse_record(record, parse)
        yield record, parsed, problem


def parse_record(
    record: Record, parse: Callable[[Any, str], RowType]
) -> tuple[RowType | None, str | None]:
    """Return what a record means, or the problem with it."""
    if record.problem is not None:
        return None, record.problem
    try:
        return parse(record.value, record.where), None
    except UserError as error:
        return None, str(error)


def _load_rows(
    file: Path,
    parse: Callable[[Any, str], RowType],
    on_bad_record: OnBadRecord,
    max_bytes: int,
    summary: DataSummary | None,
) -> list[RowType]:
    """Return the parsed records of ``file``; see :func:`load_conversations`."""
    check_on_bad_record(on_bad_record)
    rows: list[RowType] = []
    num_read, problems = 0, []
    for _, parsed, problem in read_parsed(file, parse, max_bytes=max_bytes):
        num_read += 1
        if problem is None:
            assert parsed is not None, "one of the two is there"
            rows.append(parsed)
        elif on_bad_record == "fail":
            raise UserError(f"{problem}{HOW_TO_SKIP}")
        else:
            problems.append(problem)
    if not num_read:
        what = (
            "text; expected at least one paragraph."
            if _is_text(file)
            else (f"row; expected lines such as {EXAMPLE}")
        )
        raise UserError(f"{file}: the file holds no {what}")
    if not rows:
        raise UserError(f"{file}: none of {num_read} rows can be used. The first: {problems[0]}")
    if problems:
        logger.warning(
            "%s: skipped %d of %d rows. The first: %s", file, len(problems), num_read, problems[0]
        )
    if summary is not None:
        summary.add(num_read, len(problems), problems)
    return rows


def check_on_bad_record(value: str) -> None:
    """Raise ``UserError`` unless ``value`` is one of :data:`~rxlm.data.records.OnBadRecord`."""
    if value not in ("fail", "skip"):
        raise UserError(f"on_bad_record={value!r}: expected 'fail' or 'skip'.")


def _is_text(file: Path) -> bool:
    return file.name.endswith((".txt", ".txt.gz"))
