"""Texts of Hugging Face data sets: by name on the Hub, or a folder that `save_to_disk` wrote.

`hf://allenai/c4/en` is the data set `allenai/c4`, configuration `en`. It is streamed: only what is
read is downloaded. Needs the package `datasets` (`pip install 'reactive-lm[data]'`). A row without
text ('' or spaces) is left out and not counted; one whose field holds anything else (null, a
number) is a bad record. Not here: plain files (``sources``).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rxlm.data.interaction_rows import shown
from rxlm.data.records import DataSummary, OnBadRecord, Place, Record
from rxlm.data.sources import check_on_bad_record
from rxlm.errors import UserError

logger = logging.getLogger(__name__)

HUB_PREFIX = "hf://"
_MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")


def is_dataset(path: str) -> bool:
    """Return whether ``path`` names a data set of the Hub or is a folder that holds one."""
    return path.startswith(HUB_PREFIX) or any(Path(path, mark).is_file() for mark in _MARKS)


def load_dataset_texts(
    path: str,
    on_bad_record: OnBadRecord = "fail",
    *,
    split: str = "train",
    field: str = "text",
    limit: int | None = None,
    summary: DataSummary | None = None,
) -> list[str]:
    """Return the texts of a split, those without any text left out.

    Args:
        path: see :func:`is_dataset`.
        on_bad_record: ``'fail'``, or ``'skip'`` to leave rows out whose field holds no text but
            null or something else, count and log them.
        split: such as ``train``.
        field: the column that holds the text.
        limit: at most so many texts, the first ones; None: all.
        summary: counts what is read and skipped, if given.

    Raises:
        UserError: if `datasets` is missing, the data set cannot be had (no network, no such name,
            split or column), holds no text, or (``'fail'``) a bad row.
    """
    counted = DataSummary()
    found = iter_dataset_texts(path, on_bad_record, counted, split=split, field=field, limit=limit)
    texts = list(found)
    logger.info("%s (split %s): %d texts", path, split, len(texts))
    if counted.num_bad:
        logger.warning(
            "%s (split %s): skipped %d of %d rows. The first: %s",
            path,
            split,
            counted.num_bad,
            counted.num_records,
            counted.problems[0],
        )
    if summary is not None:
        summary.add(counted.num_records, counted.num_bad, counted.problems)
    return texts


def iter_dataset_texts(
    path: str,
    on_bad_record: OnBadRecord = "fail",
    summary: DataSummary | None = None,
    *,
    split: str = "train",
    field: str = "text",
    limit: int | None = None,
) -> Iterator[str]:
    """Yield what :func:`load_dataset_texts` returns, without holding it."""
    check_on_bad_record(on_bad_record)
    # Cut only here: what is left out never counts.
    return itertools.islice(_texts(path, on_bad_record, summary, split, field), limit)


def _texts(
    path: str, on_bad_record: OnBadRecord, summary: DataSummary | None, split: str, field: str
) -> Iterator[str]:
    found, problem = False, None
    for record in _records(path, split, field):
        if record.problem is not None and on_bad_record == "fail":
            raise UserError(f"{record.problem} (data.on_bad_record=skip leaves such records out.)")
        if summary is not None:
            problems = [] if record.problem is None else [record.problem]
            summary.add(1, len(problems), problems)
        if record.problem is None:
            found = True
            yield record.value
        else:
            problem = problem or record.problem
    if not found:
        first = "" if problem is None else f" The first problem: {problem}"
        raise UserError(f"{path} (split {split}): holds no text in field '{field}'.{first}")


class DatasetRecords:
    """A data set as a source of a stream: see :class:`~rxlm.data.streaming.RecordSource`.

    A data set of the Hub is skipped forward to a place, which reads (but does not decode) what
    comes before; a saved one is memory-mapped, and any row is found at once.
    """

    def __init__(self, path: str, *, split: str = "train", field: str = "text") -> None:
        self.path, self.split, self.field = path, split, field
        self.name = f"{path} (split {split})"
        self.num_parts = 1
        self.contents = [self.name]

    def read(self, part: int, place: Place) -> Iterator[Record]:
        """Yield the texts from row ``place.offset`` on."""
        yield from _records(self.path, self.split, self.field, place.offset)


def saved_files(path: str) -> list[Path]:
    """Return all files of a data set that was saved into a folder, sorted by name."""
    return sorted(item for item in Path(path).rglob("*") if item.is_file())


def _records(path: str, split: str, field: str, start: int = 0) -> Iterator[Record]:
    """Yield a record for every row that has a text, or has something else in its place."""
    for number, row in enumerate(_rows(path, split, start), start + 1):
        if field not in row:
            raise UserError(
                f"{path}: rows have no field '{field}', but {', '.join(map(str, row))}: set "
                "data.text_field to one of them."
            )
        value, where = row[field], f"{path}: row {number}"
        after = Place(number, number)
        if not isinstance(value, str):
            problem = f"{where}: field '{field}': expected text, got {shown(value)}."
            yield Record(where, None, problem, after)
        elif value.strip():
            yield Record(where, value, None, after)


def _rows(path: str, split: str, start: int = 0) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{path}: reading it needs the package datasets. Install it: "
            "pip install 'reactive-lm[data]'"
        ) from error
    try:
        rows: Any
        if path.startswith(HUB_PREFIX):
            owner, name, *config = path.removeprefix(HUB_PREFIX).split("/")
            rows = datasets.load_dataset(f"{owner}/{name}", *config, split=split, streaming=True)
            rows = rows.skip(start) if start else rows
        else:
            loaded = datasets.load_from_disk(path)
            table = loaded[split] if isinstance(loaded, dict) else loaded
            rows = (table[number] for number in range(start, len(table))) if start else table
        yield from rows
    except KeyError as error:
        raise UserError(f"{path}: has no split {error}. Set data.text_split.") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} (split {split}) could not be read: {type(error).__name__}: {error}. A data "
            "set of the Hub needs the network; without it, give a local file or a folder "
            "(data.text=my.jsonl, or what datasets' save_to_disk wrote)."
        ) from error
