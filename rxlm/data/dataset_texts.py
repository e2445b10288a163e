"""Texts of Hugging Face data sets: by name on the Hub, or a folder that `save_to_disk` wrote.

`hf://allenai/c4/en` is the data set `allenai/c4`, configuration `en`. It is streamed: only what is
read is downloaded. Needs the package `datasets` (`pip install 'reactive-lm[data]'`). Not here:
plain files (``sources``).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rxlm.data.records import Place, Record
from rxlm.errors import UserError

logger = logging.getLogger(__name__)

HUB_PREFIX = "hf://"
_MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")


def is_dataset(path: str) -> bool:
    """Return whether ``path`` names a data set of the Hub or is a folder that holds one."""
    return path.startswith(HUB_PREFIX) or any(Path(path, mark).is_file() for mark in _MARKS)


def load_dataset_texts(
    path: str, *, split: str = "train", field: str = "text", limit: int | None = None
) -> list[str]:
    """Return the texts of a split, those without any text left out.

    Args:
        path: see :func:`is_dataset`.
        split: such as ``train``.
        field: the column that holds the text.
        limit: at most so many texts, the first ones; None: all.

    Raises:
        UserError: if `datasets` is missing, the data set cannot be had (no network, no such name,
            split or column), or holds no text.
    """
    texts = list(iter_dataset_texts(path, split=split, field=field, limit=limit))
    logger.info("%s (split %s): %d texts", path, split, len(texts))
    return texts


def iter_dataset_texts(
    path: str, *, split: str = "train", field: str = "text", limit: int | None = None
) -> Iterator[str]:
    """Yield what :func:`load_dataset_texts` returns, without holding it."""
    found = False
    for row in itertools.islice(_rows(path, split), limit):
        text = _text_of(row, path, field)
        if text.strip():
            found = True
            yield text
    if not found:
        raise UserError(f"{path} (split {split}): holds no text in field '{field}'.")


class DatasetRecords:
    """A data set as a source of a stream: see :class:`~rxlm.data.streaming.RecordSource`.

    A data set of the Hub is skipped forward to a place, which reads (but does not decode) what
    comes before; a saved one is memory-mapped, and any row is found at once.
    """

    def __init__(self, path: str, *, split: str = "train", field: str = "text") -> None:
        self.path, self.split, self.field = path, split, field
        self.name = f"{path} (split {split})"
        self.num_parts = 1

    def read(self, part: int, place: Place) -> Iterator[Record]:
        """Yield the texts from row ``place.offset`` on; an empty one is a bad record."""
        for number, row in enumerate(_rows(self.path, self.split, place.offset), place.offset + 1):
            where = f"{self.path}: row {number}"
            text = _text_of(row, self.path, self.field)
            problem = None if text.strip() else f"{where}: field '{self.field}' holds no text."
            yield Record(where, text, problem, Place(number, number))


def saved_files(path: str) -> list[Path]:
    """Return all files of a data set that was saved into a folder, sorted by name."""
    return sorted(item for item in Path(path).rglob("*") if item.is_file())


def _text_of(row: dict[str, Any], path: str, field: str) -> str:
    if field not in row:
        raise UserError(
            f"{path}: rows have no field '{field}', but {', '.join(map(str, row))}: set "
            "data.text_field to one of them."
        )
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"{path}: field '{field}' holds a {type(text).__name__}, not text.")
    return text


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
            rows = loaded[split] if isinstance(loaded, dict) else loaded
            rows = (rows[number] for number in range(start, len(rows))) if start else rows
        yield from rows
    except KeyError as error:
        raise UserError(f"{path}: has no split {error}. Set data.text_split.") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} (split {split}) could not be read: {type(error).__name__}: {error}. A data "
            "set of the Hub needs the network; without it, give a local file or a folder "
            "(data.text=my.jsonl, or what datasets' save_to_disk wrote)."
        ) from error
