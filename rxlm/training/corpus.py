"""From ``data`` of a recipe to rows of tokens: in memory, memory-mapped, mixed, or streamed.

Where the tokens are never changes which row is read when. Not here: which documents belong to a
split (``texts``), how rows are cut (``objectives/row_windows``) and packed
(``objectives/packed_rows``).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from rxlm.data.data_config import AUTO, DataConfig
from rxlm.data.dataset_texts import (
    HUB_PREFIX,
    DatasetRecords,
    is_dataset,
    iter_dataset_texts,
)
from rxlm.data.mixture import Mixture
from rxlm.data.records import BEGINNING, DataSummary
from rxlm.data.streaming import FileRecords, RecordSource, TextStream
from rxlm.data.token_store import (
    TokenStore,
    content_fingerprint,
    default_cache,
    open_store,
    store_key,
)
from rxlm.errors import RunError, UserError
from rxlm.tokenization import Tokenizer
from rxlm.tokenization.template import EncodedTurn
from rxlm.training.objectives.packed_rows import PackedRows
from rxlm.training.objectives.row_windows import RowSource, TextRows
from rxlm.training.objectives.stream_rows import StreamRows
from rxlm.training.texts import (
    Split,
    hold_out_every,
    is_large,
    iter_documents,
    open_documents,
    require_text,
    split_documents,
    split_files,
    text_files,
)

logger = logging.getLogger(__name__)


class RowSettings(NamedTuple):
    """How documents become rows."""

    tokenizer: Tokenizer
    length: int
    """Tokens of a row at most."""
    packing: bool = False
    dialogues: int = 1
    """Built-in dialogues to read, if there is no text."""
    turns: int = 1
    """Turns of each."""


class MixedRows:
    """Rows of several sources in given ratios, see :class:`~rxlm.data.mixture.Mixture`."""

    def __init__(self, rows: list[RowSource], data: DataConfig) -> None:
        self.rows, self.rule = rows, data.mixture_stop
        self.mixture = Mixture([item.weight for item in data.mixture], data.seed)
        self.name = " + ".join(
            f"{count / 10:g}% {source.name}"
            for count, source in zip(self.mixture.counts, rows, strict=True)
        )

    def size(self, num_rows: int) -> int:
        """Return the number of windows until each source was read through once."""
        size = self.mixture.size(self._sizes(num_rows), "all_exhausted")
        assert size is not None, "this rule ends"
        return size

    def end(self, num_rows: int) -> int | None:
        """Return the number of windows until the mixture ends by its rule; None: never."""
        return self.mixture.size(self._sizes(num_rows), self.rule)

    def sample(self, position: int, num_rows: int) -> list[EncodedTurn]:
        """Return the window at ``position``."""
        source, number = self.mixture.locate(position)
        return self.rows[source].sample(number, num_rows)

    def _sizes(self, num_rows: int) -> list[int]:
        return [rows.size(num_rows) for rows in self.rows]


def open_rows(
    data: DataConfig, split: Split, settings: RowSettings, summary: DataSummary | None = None
) -> RowSource:
    """Return the rows of a split, readable at any position.

    Raises:
        UserError: for data that cannot be used.
        RunError: for files that change while their tokens are kept.
    """
    if data.mixture:
        parts = [data.of_item(item) for item in data.mixture]
        return MixedRows([open_rows(part, split, settings, summary) for part in parts], data)
    tokenizer, length = settings.tokenizer, settings.length
    name = f"{data.text or data.dialogues} ({split})"
    cache = token_cache(data, split)
    if cache is None:
        documents = open_documents(data, split, settings.dialogues, settings.turns, summary)
        rows = TextRows(documents, tokenizer, length, data.seed, name)
    else:
        store, chosen = _open_store(data, split, tokenizer, cache, summary)
        rows = TextRows(store, tokenizer, length, data.seed, name, chosen)
    if not settings.packing:
        return rows
    packed = PackedRows(rows)
    logger.info("%s: packed rows are %.1f %% full", name, 100 * packed.fill)
    return packed


def check_long_enough(rows: RowSource, num_rows: int, per_step: int, steps: int) -> None:
    """Raise ``UserError`` if a mixture ends before the run does.

    Args:
        rows: what is trained on.
        num_rows: rows of a window.
        per_step: windows of an update.
        steps: updates.
    """
    if not isinstance(rows, MixedRows):
        return
    end = rows.end(num_rows)
    if end is not None and end < per_step * steps:
        raise UserError(
            f"train.steps={steps} with {per_step} rows an update reads {per_step * steps} rows, "
            f"but the mixture ends after {end} (data.mixture_stop={rows.rule}). "
            f"Set train.steps to at most {end // per_step}, or data.mixture_stop=steps to begin "
            "sources anew."
        )


def token_cache(data: DataConfig, split: Split) -> Path | None:
    """Return the cache that a text is read from; None: it is held in memory.

    Raises:
        UserError: when a cache is asked for and the text has no files to be known by.
    """
    if data.text is None or data.token_cache is None:
        return None
    on_the_hub = data.text.startswith(HUB_PREFIX)
    if data.token_cache != AUTO:
        if on_the_hub:
            raise UserError(
                f"data.text={data.text} with data.token_cache={data.token_cache}: a data set of "
                "the Hub cannot be known by its content before it is downloaded. Save it into a "
                "folder (save_to_disk), set data.streaming=true, or leave token_cache out."
            )
        return Path(data.token_cache).expanduser()
    return default_cache() if is_large(data, split) else None


def _open_store(
    data: DataConfig,
    split: Split,
    tokenizer: Tokenizer,
    cache: Path,
    summary: DataSummary | None,
) -> tuple[TokenStore, numpy.ndarray | None]:
    """Return the store of the files of a split, and which of its documents belong to it."""
    text = require_text(data)
    files = text_files(data, split)
    options: dict[str, Any] = {
        "on_bad_record": data.on_bad_record,
        "max_record_bytes": data.max_record_bytes,
    }
    documents: Callable[[DataSummary], Iterable[str]]
    if is_dataset(text):
        if cache.resolve().is_relative_to(Path(text).resolve()):
            raise UserError(
                f"data.token_cache={cache} lies in the data set {text}, all of whose files tell "
                "its content. Give a folder outside."
            )
        is_shared = True
        options |= {"split": data.text_split, "field": data.text_field}
        documents = partial(
            iter_dataset_texts,
            text,
            data.on_bad_record,
            split=data.text_split,
            field=data.text_field,
        )
    else:
        is_shared = split_files(data, split).is_shared
        documents = partial(iter_documents, files, data)
    content = content_fingerprint(files, cache)
    key = store_key(content, tokenizer.fingerprint, options)

    def build() -> tuple[Iterable[str], Callable[[], Mapping[str, Any]]]:
        counted = DataSummary()
        return documents(counted), counted.to_dict

    def verify() -> None:
        # They are read after they are hashed, perhaps long after: another process may have held
        # the lock. A store of other content under this key would be used forever.
        if content_fingerprint(files, cache) != content:
            raise RunError(
                f"{text}: the files changed while they were read, so their tokens were not kept. "
                "Start again when nothing writes to them any more."
            )

    store = open_store(cache, key, build, tokenizer.encode_batch, tokenizer.vocab_size, verify)
    if summary is not None:
        info = store.info
        summary.add(info["records"], info["bad_records"], info["problems"])
    count = store.num_documents
    if data.max_texts is not None:
        count = min(count, data.max_texts)
    if is_shared:
        return store, split_documents(count, data, split)
    return store, None if count == store.num_documents else numpy.arange(count)


def open_stream(
    data: DataConfig, settings: RowSettings, num_lanes: int, num_valid_documents: int
) -> tuple[StreamRows, TextRows | PackedRows]:
    """Return the endless training rows of ``data.text``, and the rows to validate on.

    Validation reads the ``.valid.`` files, or else every ``1 / valid_fraction``-th record, which
    training then leaves out; in both cases the first documents only.

    Args:
        data: what to read.
        settings: how documents become rows.
        num_lanes: micro-batches of an update; each reads its own records.
        num_valid_documents: how many documents to validate on, at most.

    Raises:
        UserError: for data that cannot be used.
    """
    if data.max_texts is not None:
        raise UserError("data.max_texts with data.streaming: a stream is endless; leave it out.")
    lanes = [_stream(data, "train", lane, num_lanes) for lane in range(num_lanes)]
    tokenizer, length = settings.tokenizer, settings.length
    found = stream_validation_texts(data, num_valid_documents)
    rows = TextRows(found, tokenizer, length, data.seed, f"{data.text} (valid)")
    return (
        StreamRows(lanes, tokenizer, length, packing=settings.packing),
        PackedRows(rows) if settings.packing else rows,
    )


def stream_validation_texts(data: DataConfig, limit: int) -> list[str]:
    """Return the first ``limit`` validation documents of a stream."""
    _check_held_out(data)
    texts = []
    for text, behind in itertools.islice(_stream(data, "valid", 0, 1).records(), limit):
        texts.append(text)
        if behind.block.epoch > 0:
            break
    return texts


def _check_held_out(data: DataConfig) -> None:
    """Raise ``UserError`` if a stream is too short for one of its records to be held out."""
    every = hold_out_every(data)
    source, is_shared = _record_source(data, "valid")
    records = (item for part in range(source.num_parts) for item in source.read(part, BEGINNING))
    if is_shared and (count := sum(1 for _ in itertools.islice(records, every))) < every:
        raise UserError(
            f"data.text={data.text} has {count} record(s), and of a stream one in {every} is held "
            f"out for validation (data.valid_fraction={data.valid_fraction}), so that there is "
            "nothing to validate on. Raise data.valid_fraction, add a file with '.valid.' in its "
            "name, or set data.streaming=false."
        )


def _stream(data: DataConfig, split: Split, lane: int, num_lanes: int) -> TextStream:
    every = hold_out_every(data)
    source, is_shared = _record_source(data, split)

    def trained(number: int) -> int | None:
        return None if number % every == every - 1 else number - number // every

    def held_out(number: int) -> int | None:
        return number // every if number % every == every - 1 else None

    return TextStream(
        source,
        seed=data.seed,
        block_records=1 if split == "valid" else data.stream_block,
        shard=lane,
        num_shards=num_lanes,
        on_bad_record=data.on_bad_record,
        rank=(held_out if split == "valid" else trained) if is_shared else None,
    )


def _record_source(data: DataConfig, split: Split) -> tuple[RecordSource, bool]:
    text = require_text(data)
    if is_dataset(text):
        return DatasetRecords(text, split=data.text_split, field=data.text_field), True
    files, is_shared = split_files(data, split)
    return FileRecords(files, data.max_record_bytes), is_shared
