"""Reads conversations and texts from files: .jsonl, .jsonl.gz, .parquet, .txt, .txt.gz.

A row that cannot be used is an error that names the file, the line, the field and the remedy.
Which files to open, and how rows become training samples: ``conversation_source``.
"""

from __future__ import annotations

import difflib
import glob
import gzip
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from rxlm.data.conversations import Conversation
from rxlm.data.interaction_rows import parse_interaction, shown
from rxlm.errors import UserError

logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
RowType = TypeVar("RowType")

CONVERSATION_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
TEXT_SUFFIXES = (".txt", ".txt.gz", *CONVERSATION_SUFFIXES)
EXAMPLE = '{"id": "1", "interactions": [{"query": "Hi!", "answer": "Hello!"}]}'


def load_conversations(
    path: str | os.PathLike[str], on_error: OnError = "raise"
) -> list[Conversation]:
    """Read all conversations of a file, of the files in a folder, or of those a glob matches.

    Each row is ``{"id", "source", "system"?, "interactions": [{"query", "answer", ...}, ...]}``.
    Metadata that :class:`~rxlm.data.conversations.Interaction` knows is kept where it has the
    meaning it has there (a ``kind`` of ours, a ``distance`` that is a number); the rest is other
    people's and left out.

    Args:
        path: file, folder (not its sub-folders) or glob; ``~`` and ``$VARIABLES`` are expanded.
        on_error: ``'raise'``, or ``'skip'`` to leave unusable rows out, count and log them.

    Raises:
        UserError: nothing to read, no usable row, or (``'raise'``) an unusable row.
    """
    conversations: list[Conversation] = []
    for file in resolve_files(path, CONVERSATION_SUFFIXES):
        conversations += _load_rows(file, parse_conversation, on_error)
    return conversations


def load_texts(path: str | os.PathLike[str], on_error: OnError = "raise") -> list[str]:
    """Read documents of plain text.

    Args:
        path: file, folder or glob. ``.txt`` and ``.txt.gz``: one document a paragraph, paragraphs
            are separated by blank lines and keep their line breaks. ``.jsonl``, ``.parquet``: the
            field ``text`` of each row, or, if it has ``interactions`` instead, the conversation
            as lines of query and answer in turn.
        on_error: as in :func:`load_conversations`.

    Raises:
        UserError: nothing to read, no usable row, or (``'raise'``) an unusable row.
    """
    texts: list[str] = []
    for file in resolve_files(path, TEXT_SUFFIXES):
        if file.name.endswith((".txt", ".txt.gz")):
            paragraphs = list(_paragraphs(line for _, line in _read_lines(file)))
            if not paragraphs:
                raise UserError(f"{file}: the file holds no text; expected at least one paragraph.")
            texts += paragraphs
        else:
            texts += _load_rows(file, parse_text, on_error)
    return texts


def parse_conversation(row: Any, where: str) -> Conversation:
    """Return the conversation in ``row`` (decoded JSON).

    Raises:
        UserError: beginning with ``where`` and naming field, expectation and remedy.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected an object such as {EXAMPLE}, got {shown(row)}.")
    interactions = row.get("interactions")
    if not isinstance(interactions, list) or not interactions:
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
            parse_interaction(item, f"{where}: field 'interactions[{turn}]")
            for turn, item in enumerate(interactions)
        ),
        system=system,
        id=str(row["id"]) if isinstance(row.get("id"), (str, int)) else "",
        source=row["source"] if isinstance(row.get("source"), str) else "",
    )


def parse_text(row: Any, where: str) -> str:
    """Return the text in ``row``: its field ``text``, or its conversation line by line.

    Raises:
        UserError: beginning with ``where`` and naming field, expectation and remedy.
    """
    if isinstance(row, Mapping) and "text" not in row and "interactions" in row:
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


def resolve_files(path: str | os.PathLike[str], suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files that ``path`` (file, folder or glob) stands for, sorted by name.

    Raises:
        UserError: if there is none, with the nearest names, or one is of an unknown type.
    """
    text = os.path.expandvars(os.path.expanduser(os.fspath(path)))
    given = Path(text)
    known = ", ".join(suffixes)
    if given.is_dir():
        files = sorted(item for item in given.iterdir() if item.name.endswith(suffixes))
        if not files:
            raise UserError(f"{given}: the folder holds no file of type {known}.")
        return files
    if given.is_file():
        files = [given]
    elif glob.has_magic(text):
        files = sorted(Path(item) for item in glob.glob(text) if os.path.isfile(item))
    else:
        files = []
    if not files:
        raise UserError(_missing_message(given, text))
    for file in files:
        if not file.name.endswith(suffixes):
            raise UserError(f"{file}: unknown type of file; expected one of {known}.")
    return files


def _missing_message(given: Path, text: str) -> str:
    if glob.has_magic(text):
        return f"{text}: no file matches; check the folder and the pattern."
    if "$" in text:
        return f"{text}: no such file; is the environment variable in its name set?"
    folder = given.parent
    if not folder.is_dir():
        return f"{text}: no such file; the folder {folder} does not exist either."
    near = difflib.get_close_matches(given.name, sorted(os.listdir(folder)), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"look into {folder}."
    return f"{text}: no such file; {hint}"


def _load_rows(
    file: Path, parse: Callable[[Any, str], RowType], on_error: OnError
) -> list[RowType]:
    """Return the parsed rows of ``file``; see :func:`load_conversations` for ``on_error``."""
    if on_error not in ("raise", "skip"):
        raise UserError(f"on_error={on_error!r}: expected 'raise' or 'skip'.")
    rows: list[RowType] = []
    num_read, problems = 0, []
    for where, row in _rows(file):
        num_read += 1
        try:
            rows.append(parse(_decode(row, where) if isinstance(row, str) else row, where))
        except UserError as error:
            if on_error == "raise":
                raise
            problems.append(str(error))
    if not num_read:
        raise UserError(f"{file}: the file holds no row; expected lines such as {EXAMPLE}")
    if not rows:
        raise UserError(f"{file}: none of {num_read} rows can be used. The first: {problems[0]}")
    if problems:
        logger.warning(
            "%s: skipped %d of %d rows. The first: %s", file, len(problems), num_read, problems[0]
        )
    return rows


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) for each row of ``file``; a row of .jsonl is its line, undecoded."""
    if file.name.endswith(".parquet"):
        for number, row in enumerate(_read_parquet(file), start=1):
            yield f"{file}: row {number}", row
        return
    for number, line in _read_lines(file):
        if line.strip():
            yield f"{file}:{number}", line


def _decode(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(
            f"{where}: not JSON ({error}). Expected one object a line, such as {EXAMPLE}"
        ) from error


def _read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line) of a plain or gzipped UTF-8 file."""
    number = 0
    try:
        with gzip.open(file, "rb") if file.name.endswith(".gz") else file.open("rb") as lines:
            for line in lines:
                number += 1
                # utf-8-sig: files saved by Windows editors begin with a byte-order mark.
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}:{number}: not UTF-8 ({error}). Save the file as UTF-8.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{file}: damaged gzip file after line {number} ({error}). Copy it again."
        ) from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}).") from error


def _read_parquet(file: Path) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{file}: reading parquet needs pyarrow. Install it: pip install 'reactive-lm[data]'"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file ({error}).") from error


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line.rstrip())
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield "\n".join(paragraph)
