"""Which documents are for training and which for validation. No torch.

Not here: reading files (``rxlm.data.sources``), rows of tokens (``objectives/row_windows.py``).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from rxlm.data.conversation_source import ConversationList, open_conversations
from rxlm.data.data_config import DataConfig
from rxlm.data.dataset_texts import (
    HUB_PREFIX,
    is_dataset,
    iter_dataset_texts,
    load_dataset_texts,
    saved_files,
)
from rxlm.data.files import TEXT_SUFFIXES, resolve_files
from rxlm.data.records import DataSummary
from rxlm.data.sources import HOW_TO_SKIP, load_texts, read_parsed, render, text_parser
from rxlm.errors import UserError

if TYPE_CHECKING:
    import numpy

logger = logging.getLogger(__name__)


Split = Literal["train", "valid"]

LARGE = 256 * 2**20
"""Bytes of files from which on ``token_cache='auto'`` maps tokens instead of holding text."""


class SplitFiles(NamedTuple):
    """The files of a split, and whether only a part of their documents belongs to it."""

    files: list[Path]
    is_shared: bool


def open_texts(
    data: DataConfig, split: Split = "train", summary: DataSummary | None = None
) -> list[str]:
    """Return the documents of a split of ``data.text``, or of all sources of ``data.mixture``.

    Files with ``.train.`` in their name are validated on the ``.valid.`` files beside them, if
    there are any; otherwise every ``1 / valid_fraction``-th document is held out.

    Raises:
        UserError: for data that is missing, empty or malformed, or a single document.
    """
    if data.mixture:
        parts = [data.of_item(item) for item in data.mixture]
        return [text for part in parts for text in open_documents(part, split, 1, 1, summary)]
    text = require_text(data)
    if is_dataset(text):
        documents = load_dataset_texts(
            text,
            data.on_bad_record,
            split=data.text_split,
            field=data.text_field,
            limit=data.max_texts,
            summary=summary,
        )
        is_shared = True
    else:
        files, is_shared = split_files(data, split)
        documents = [
            text
            for file in files
            for text in load_texts(
                file, data.on_bad_record, max_bytes=data.max_record_bytes, summary=summary
            )
        ][: data.max_texts]
    if not is_shared:
        return documents
    return [documents[index] for index in split_documents(len(documents), data, split).tolist()]


def require_text(data: DataConfig) -> str:
    """Return ``data.text``.

    Raises:
        UserError: when it is not set.
    """
    if data.text is None:
        raise UserError("data.text is not set: give a file, a folder or a glob of plain text.")
    return data.text


def split_files(data: DataConfig, split: Split) -> SplitFiles:
    """Return the files of a split of ``data.text``, which is no data set.

    Raises:
        UserError: for files that are missing.
    """
    files = resolve_files(require_text(data), TEXT_SUFFIXES)
    training = [file for file in files if ".train." in file.name] or files
    beside = [file.with_name(file.name.replace(".train.", ".valid.")) for file in training]
    validation = [file for file in beside if file not in training and file.is_file()]
    chosen = validation if split == "valid" and validation else training
    return SplitFiles(chosen, not validation)


def hold_out_every(data: DataConfig) -> int:
    """Return of how many documents one is held out for validation."""
    return max(2, round(1 / data.valid_fraction))


def split_documents(count: int, data: DataConfig, split: Split) -> numpy.ndarray:
    """Return which of ``count`` documents belong to a split, int64 in ascending order.

    Raises:
        UserError: for a single document, which cannot be shared out.
    """
    import numpy

    if count < 2:
        raise UserError(
            f"{data.text}: holds one document, so none can be held out for validation. Separate "
            "documents by blank lines, or put a '.valid.' file beside the '.train.' file."
        )
    held_out = numpy.zeros(count, dtype=bool)
    # From the end, so that there is one even if there are fewer documents than that.
    held_out[:: -hold_out_every(data)] = True
    wanted = split == "valid"
    if wanted:
        logger.info("%s: %d of %d documents are held out", data.text, held_out.sum(), count)
    return numpy.flatnonzero(held_out == wanted)


def iter_documents(files: list[Path], data: DataConfig, summary: DataSummary) -> Iterator[str]:
    """Yield the documents of files one by one, counting them in ``summary``.

    Raises:
        UserError: for a bad record that is not to be skipped, or a file without a usable one.
    """
    for file in files:
        usable = 0
        for _, text, problem in read_parsed(
            file, text_parser(file), max_bytes=data.max_record_bytes
        ):
            if problem is not None and data.on_bad_record == "fail":
                raise UserError(f"{problem}{HOW_TO_SKIP}")
            summary.add(1, int(problem is not None), [] if problem is None else [problem])
            if text is not None:
                usable += 1
                yield text
        if not usable:
            raise UserError(f"{file}: holds no usable record. See: rxlm data check {file}")


def iter_texts(data: DataConfig, split: Split, summary: DataSummary) -> Iterator[str]:
    """Yield what :func:`open_texts` returns; a large text is not held, but read twice.

    Raises:
        UserError: as :func:`open_texts`; of a large text when the bad record is met.
    """
    if data.mixture:
        for item in data.mixture:
            part = data.of_item(item)
            if part.text is None:
                yield from open_documents(part, split, 1, 1, summary)
            else:
                yield from iter_texts(part, split, summary)
    elif is_large(data, split) and not is_dataset(require_text(data)):
        yield from _large_texts(data, split, summary)
    else:
        yield from open_texts(data, split, summary)


def _large_texts(data: DataConfig, split: Split, summary: DataSummary) -> Iterator[str]:
    files, is_shared = split_files(data, split)
    documents = itertools.islice(iter_documents(files, data, summary), data.max_texts)
    if not is_shared:
        yield from documents
        return
    counted = itertools.islice(iter_documents(files, data, DataSummary()), data.max_texts)
    chosen = iter(split_documents(sum(1 for _ in counted), data, split).tolist())
    wanted = next(chosen, None)
    for number, document in enumerate(documents):
        if number == wanted:
            yield document
            wanted = next(chosen, None)


def text_files(data: DataConfig, split: Split) -> list[Path]:
    """Return the files that hold the text of a split; all those of a saved data set."""
    text = require_text(data)
    return saved_files(text) if is_dataset(text) else split_files(data, split).files


def is_large(data: DataConfig, split: Split) -> bool:
    """Return whether the files of a text are too large to be held in memory lightly."""
    if require_text(data).startswith(HUB_PREFIX):
        return False
    return sum(file.stat().st_size for file in text_files(data, split)) >= LARGE


def stream_texts(data: DataConfig, limit: int, summary: DataSummary) -> Iterator[str]:
    """Yield the first ``limit`` training documents of a text that is too large to hold.

    Raises:
        UserError: as :func:`iter_documents`.
    """
    text = require_text(data)
    is_shared = True
    if is_dataset(text):
        documents = iter_dataset_texts(
            text, data.on_bad_record, summary, split=data.text_split, field=data.text_field
        )
    else:
        files, is_shared = split_files(data, "train")
        documents = iter_documents(files, data, summary)
    every = hold_out_every(data)
    kept = (
        document
        for number, document in enumerate(documents)
        if not is_shared or number % every != every - 1
    )
    return itertools.islice(kept, limit)


def open_documents(
    data: DataConfig,
    split: Split,
    dialogues: int,
    turns: int,
    summary: DataSummary | None = None,
) -> list[str]:
    """Return the documents that a language model reads: ``data.text``, or dialogues as text.

    Args:
        data: what to read.
        split: which part.
        dialogues: how many built-in dialogues; files are read as a whole.
        turns: of each built-in dialogue.
        summary: counts what is read and skipped, if given.

    Raises:
        UserError: as :func:`open_texts`.
    """
    if data.text is not None or data.mixture:
        return open_texts(data, split, summary)
    source = open_conversations(data, split, summary)
    if isinstance(source, ConversationList):
        return [render(conversation) for conversation in source.conversations]
    return [render(source.sample(position, turns)) for position in range(dialogues)]
