"""Records of a file, one after the other, each with its place; bad ones are named, never lost.

A record is a line of .jsonl, a paragraph of .txt, a row of .parquet. Reading can begin behind any
record, and never holds more than one record (of parquet: one batch) in memory. Not here: what a
record means (``sources``), the order of reading (``streaming``).
"""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from rxlm.errors import UserError

logger = logging.getLogger(__name__)

OnBadRecord = Literal["fail", "skip"]
"""What a bad record does: end the run, or be left out, counted and named in the summary."""

EXAMPLE = '{"id": "1", "interactions": [{"query": "Hi!", "answer": "Hello!"}]}'
MAX_RECORD_BYTES = 64 * 2**20
"""A longer record is bad: it is rarely meant, and it would have to be held in memory."""
_PARQUET_ROWS = 256
_NAMED = 10


class Place(NamedTuple):
    """Where reading goes on in a file."""

    offset: int = 0
    """Bytes before it (of a .gz file: unpacked), or rows of a parquet file."""
    line: int = 0
    """Lines or rows before it."""


BEGINNING = Place()


class Record(NamedTuple):
    """One record: a decoded object or a paragraph, or the problem with it."""

    where: str
    """``file:line``, or ``file: row n`` of a parquet file; for messages."""
    value: Any
    """None if there is a problem."""
    problem: str | None
    """One complete message that begins with ``where``."""
    after: Place | None
    """Where the next record begins; None: nothing of this file can be read any more."""


@dataclass
class DataSummary:
    """How many records were read, and which of them could not be used. A collector: readers that
    are given one add to it."""

    num_records: int = 0
    num_bad: int = 0
    problems: list[str] = field(default_factory=list)
    """The first few, as complete messages."""

    def add(self, num_records: int, num_bad: int, problems: list[str]) -> None:
        """Count records; ``problems`` are messages of (some of) the bad ones."""
        self.num_records += num_records
        self.num_bad += num_bad
        self.problems += problems[: _NAMED - len(self.problems)]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, for ``run.json``."""
        return {
            "records": self.num_records,
            "bad_records": self.num_bad,
            "problems": list(self.problems),
        }


def read_records(
    file: Path, place: Place = BEGINNING, *, max_bytes: int = MAX_RECORD_BYTES
) -> Iterator[Record]:
    """Yield the records of a file from ``place`` on.

    Args:
        file: its name says what it is.
        place: ``after`` of an earlier record of the same file. In a .gz file, getting there means
            unpacking what comes before.
        max_bytes: longest record of .jsonl and .txt.

    Raises:
        UserError: if the file cannot be opened, or is .parquet and pyarrow is missing. What is
            wrong *inside* the file is a record with a problem.
    """
    if file.name.endswith(".parquet"):
        yield from _parquet_rows(file, place)
    elif file.name.endswith((".txt", ".txt.gz")):
        yield from _paragraphs(file, place, max_bytes)
    else:
        yield from _objects(file, place, max_bytes)


class _Line(NamedTuple):
    number: int
    text: str | None
    problem: str | None
    after: Place | None


def _lines(file: Path, place: Place, max_bytes: int) -> Iterator[_Line]:
    """Yield the lines of a plain or gzipped UTF-8 file; a bad one has a problem, and no text."""
    offset, number = place
    try:
        with _open(file) as stream:
            stream.seek(offset)
            while line := stream.readline(max_bytes + 1):
                number += 1
                offset += len(line)
                if len(line) > max_bytes and not line.endswith(b"\n"):
                    size = len(line)
                    for rest in iter(lambda: stream.readline(2**20), b""):
                        size += len(rest)
                        offset += len(rest)
                        if rest.endswith(b"\n"):
                            break
                    problem = f"{file}:{number}: {_too_long('line', size, max_bytes)}"
                    yield _Line(number, None, problem, Place(offset, number))
                    continue
                yield _decoded(file, number, line, Place(offset, number))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problem = f"{file}: damaged gzip file after line {number} ({error}). Copy it again."
        yield _Line(number + 1, None, problem, None)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}).") from error


def _decoded(file: Path, number: int, line: bytes, after: Place) -> _Line:
    try:
        # utf-8-sig: files saved by Windows editors begin with a byte-order mark.
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        problem = f"{file}:{number}: not UTF-8 ({error}). Save the file as UTF-8."
        return _Line(number, None, problem, after)
    return _Line(number, text, None, after)


def _open(file: Path) -> IO[bytes] | gzip.GzipFile:
    if file.name.endswith(".gz"):
        # No buffer around it: one would lose what comes before the place of a damage.
        return gzip.open(file, "rb")
    return file.open("rb", buffering=2**18)


def _too_long(what: str, size: int, max_bytes: int) -> str:
    return (
        f"the {what} has {size:,} bytes, more than data.max_record_bytes={max_bytes:,}. Cut it "
        "into documents, or raise the limit."
    )


def _objects(file: Path, place: Place, max_bytes: int) -> Iterator[Record]:
    for line in _lines(file, place, max_bytes):
        where = f"{file}:{line.number}"
        if line.problem is not None:
            yield Record(where, None, line.problem, line.after)
        elif line.text is not None and line.text.strip():
            try:
                value = decode_json(line.text)
            except (ValueError, RecursionError) as error:
                problem = f"{where}: not JSON ({error}). Expected one object a line, such as "
                yield Record(where, None, problem + EXAMPLE, line.after)
            else:
                yield Record(where, value, None, line.after)


def decode_json(line: str) -> Any:
    """Return the value of a line of JSON.

    Raises:
        ValueError: for anything else, a key written twice, and text that is no Unicode.
    """
    value = json.loads(line, object_pairs_hook=_without_duplicates)
    if "\\u" in line:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"half of a surrogate pair, {error.object[error.start]!r}") from None
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is written twice, so one value would be lost")
    return value


def _paragraphs(file: Path, place: Place, max_bytes: int) -> Iterator[Record]:
    lines: list[str] = []
    first, size, after = 0, 0, place
    problem: str | None = None
    for line in _lines(file, place, max_bytes):
        if line.text is not None and not line.text.strip():
            if lines or problem:
                yield _paragraph(file, first, lines, problem, line.after)
            lines, size, problem = [], 0, None
            continue
        if not lines and problem is None:
            first = line.number
        if line.after is None:
            if lines or problem:
                yield _paragraph(file, first, lines, problem, after)
            yield Record(f"{file}:{line.number}", None, line.problem, None)
            return
        after = line.after
        if line.text is None:
            problem = problem or line.problem
        elif problem is None:
            size += len(line.text.encode())
            lines.append(line.text.rstrip())
            if size > max_bytes:
                problem = (
                    f"{file}:{first}: the paragraph has more than "
                    f"data.max_record_bytes={max_bytes:,} bytes. Separate documents by blank "
                    "lines, or raise the limit."
                )
        if problem is not None:
            lines = []
    if lines or problem:
        yield _paragraph(file, first, lines, problem, after)


def _paragraph(
    file: Path, first: int, lines: list[str], problem: str | None, after: Place | None
) -> Record:
    value = None if problem else "\n".join(lines)
    return Record(f"{file}:{first}", value, problem, after)


def _parquet_rows(file: Path, place: Place) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{file}: reading parquet needs pyarrow. Install it: pip install 'reactive-lm[data]'"
        ) from error
    row = end = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for group in range(table.num_row_groups):
                begin, end = end, end + table.metadata.row_group(group).num_rows
                if end <= place.offset:
                    continue
                row = begin
                try:
                    for batch in table.iter_batches(_PARQUET_ROWS, row_groups=[group]):
                        if row + batch.num_rows > place.offset:
                            yield from _batch_rows(file, batch, row, place.offset)
                        row += batch.num_rows
                except (pyarrow.ArrowException, OSError) as error:
                    yield Record(
                        f"{file}: row {row + 1}",
                        None,
                        f"{file}: rows {row + 1} to {end} cannot be read ({error}). Copy the file "
                        "again.",
                        Place(end, end),
                    )
    except (pyarrow.ArrowException, OSError) as error:
        problem = f"{file}: not a readable parquet file ({error}). Copy it again."
        yield Record(str(file), None, problem, None)


def _batch_rows(file: Path, batch: Any, first: int, start: int) -> Iterator[Record]:
    """Yield the rows of a batch that begins with row ``first``, from row ``start`` on."""
    try:
        rows: list[Any] | None = batch.to_pylist()
    except UnicodeDecodeError:
        rows = None
    for index in range(max(0, start - first), batch.num_rows):
        number = first + index + 1
        where = f"{file}: row {number}"
        try:
            value = batch.slice(index, 1).to_pylist()[0] if rows is None else rows[index]
        except UnicodeDecodeError as error:
            problem = f"{where}: not UTF-8 ({error})."
            yield Record(where, None, problem, Place(number, number))
        else:
            yield Record(where, value, None, Place(number, number))
