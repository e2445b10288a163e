"""Text that is never held as a whole: read record by record, endlessly, from any position.

A position is a value: given one, a stream returns what comes next and the position behind it, so a
run that resumes goes on at the exact record. Records come in blocks, and the records of a block in
an order that depends on seed, epoch and block only; that is a shuffle buffer that never has to be
saved. Only a block is in memory. Shards (of processes, of workers) share out the records, each
belongs to one of them.

Not here: files that are tokenised once and then read in any order (``token_store``; better wherever
there is the disk for it), rows of tokens (``rxlm.training``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rxlm.data.order import block_order, epoch_order
from rxlm.data.records import (
    BEGINNING,
    MAX_RECORD_BYTES,
    OnBadRecord,
    Place,
    Record,
    read_records,
)
from rxlm.data.sources import HOW_TO_SKIP, check_on_bad_record, parse_record, text_parser
from rxlm.errors import UserError

BLOCK_RECORDS = 1024


class RecordSource(Protocol):
    """Records in parts (files), each readable from any place in it."""

    name: str
    """For messages."""
    num_parts: int
    """How many parts there are, at least one."""
    contents: list[str]
    """What is read, line by line: other lines mean that a position is that of other records."""

    def read(self, part: int, place: Place) -> Iterator[Record]:
        """Yield the records of a part from ``place`` on; ``value`` of a good one is its text."""
        ...


class FileRecords:
    """Documents of .txt, .jsonl and .parquet files, gzipped or not.

    Args:
        files: at least one.
        max_bytes: longest record; a longer one is bad.

    Raises:
        UserError: for a file that cannot be looked at.
    """

    def __init__(self, files: Sequence[Path], max_bytes: int = MAX_RECORD_BYTES) -> None:
        self.files, self.max_bytes = list(files), max_bytes
        self.name = ", ".join(map(str, self.files[:3])) + (", ..." if len(self.files) > 3 else "")
        self.num_parts = len(self.files)
        # Without their folders: data that was moved is the same.
        self.contents = [f"{file.name} ({_size(file)} bytes)" for file in self.files]

    def read(self, part: int, place: Place) -> Iterator[Record]:
        """Yield the documents of a file from ``place`` on."""
        file = self.files[part]
        parse = text_parser(file)
        for record in read_records(file, place, max_bytes=self.max_bytes):
            text, problem = parse_record(record, parse)
            yield record._replace(value=text, problem=problem)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}).") from error


class BlockPosition(NamedTuple):
    """Where a block begins in the endless reading."""

    epoch: int = 0
    part: int = 0
    """Place in the epoch's order of parts."""
    place: Place = BEGINNING
    number: int = 0
    """Records of the epoch before it, of all shards."""
    num_records: int = 0
    """Records of this shard before it, over all epochs."""
    num_bad: int = 0
    """Those of them that could not be used."""


class StreamPosition(NamedTuple):
    """Where a record is: its block, and how many records of the block come before it."""

    block: BlockPosition = BlockPosition()
    taken: int = 0

    def to_json(self) -> list[Any]:
        """Return JSON values."""
        return [*self.block[:2], *self.block.place, *self.block[3:], self.taken]

    @classmethod
    def from_json(cls, values: Sequence[int]) -> StreamPosition:
        """Return what :meth:`to_json` wrote."""
        epoch, part, offset, line, number, num_records, num_bad, taken = map(int, values)
        place = Place(offset, line)
        return cls(BlockPosition(epoch, part, place, number, num_records, num_bad), taken)


START = StreamPosition()


class StreamBlock(NamedTuple):
    """Records that are in memory together.

    ``texts`` in the order in which they are read, ``places`` where each came from, ``problems`` of
    the records that were skipped, ``after`` the position of the next block.
    """

    texts: list[str]
    places: list[str]
    problems: list[str]
    after: BlockPosition


_Read = tuple[Record, int, BlockPosition]


class TextStream:
    """An endless reading of the texts of a source. To be used by one thread at a time.

    Args:
        source: where records come from.
        seed: of the order, >= 0.
        block_records: records that are shuffled together; 1 keeps the order of the source (of
            records and of parts).
        shard: which records to read: every ``num_shards``-th, beginning with this.
        num_shards: how many readers share the records.
        on_bad_record: ``fail`` raises, ``skip`` counts.
        rank: from a record's number in the epoch to its number among those that are to be read at
            all, or None if it is not; shards share out the latter. None: all are read.
    """

    def __init__(
        self,
        source: RecordSource,
        *,
        seed: int = 0,
        block_records: int = BLOCK_RECORDS,
        shard: int = 0,
        num_shards: int = 1,
        on_bad_record: OnBadRecord = "fail",
        rank: Callable[[int], int | None] | None = None,
    ) -> None:
        check_on_bad_record(on_bad_record)
        if not 0 <= shard < num_shards or block_records < 1 or seed < 0:
            raise UserError(
                f"shard={shard}, num_shards={num_shards}, block_records={block_records}, "
                f"seed={seed}: expected 0 <= shard < num_shards, block_records >= 1, seed >= 0."
            )
        self.source, self.seed, self.block_records = source, seed, block_records
        self.shard, self.num_shards = shard, num_shards
        self.on_bad_record, self._rank = on_bad_record, rank
        # Not a state: going on with an open file only spares looking for the place again.
        self._open: tuple[BlockPosition, Iterator[_Read | None], _Read | None] | None = None

    def records(self, position: StreamPosition = START) -> Iterator[tuple[str, StreamPosition]]:
        """Yield (text, position behind it) endlessly, from ``position`` on.

        Raises:
            UserError: for a bad record (``fail``), or a whole epoch without a usable one.
        """
        start, taken = position
        while True:
            block = self.block(start)
            for index in range(taken, len(block.texts)):
                last = index + 1 == len(block.texts)
                after = StreamPosition(block.after) if last else StreamPosition(start, index + 1)
                yield block.texts[index], after
            start, taken = block.after, 0

    def block(self, start: BlockPosition) -> StreamBlock:
        """Return the block that begins at ``start``; it has at least one text.

        Raises:
            UserError: as :meth:`records`.
        """
        found: list[tuple[str, str]] = []
        problems: list[str] = []
        position, empty_epochs = start, 0
        iterator, pending = self._take_open(start)
        while True:
            item = next(iterator) if pending is None else pending
            pending = None
            if item is None:
                position = self._next_epoch(position)
                if found:
                    break
                empty_epochs += 1
                if empty_epochs == 2:
                    problem = f" The last problem: {problems[-1]}" if problems else ""
                    raise UserError(
                        f"{self.source.name}: no usable record for reader {self.shard} of "
                        f"{self.num_shards}.{problem}"
                    )
                continue
            record, number, after = item
            behind = after._replace(num_records=position.num_records, num_bad=position.num_bad)
            rank = number if self._rank is None else self._rank(number)
            if rank is None or rank % self.num_shards != self.shard:
                position = behind
                continue
            if len(found) == self.block_records:
                # Looked at only to see whether the epoch goes on: a block never begins at its end.
                pending = item
                break
            position = behind
            position = position._replace(num_records=position.num_records + 1)
            if record.problem is None:
                found.append((record.value, record.where))
            elif self.on_bad_record == "fail":
                raise UserError(f"{record.problem}{HOW_TO_SKIP}")
            else:
                problems.append(record.problem)
                position = position._replace(num_bad=position.num_bad + 1)
        self._open = (position, iterator, pending)
        if self.block_records > 1:
            order = block_order(self.seed, start.epoch, start.number, len(found))
            found = [found[index] for index in order]
        return StreamBlock([text for text, _ in found], [at for _, at in found], problems, position)

    def _take_open(self, start: BlockPosition) -> tuple[Iterator[_Read | None], _Read | None]:
        opened, self._open = self._open, None
        if opened is not None and opened[0] == start:
            return opened[1], opened[2]
        return self._read(start), None

    @staticmethod
    def _next_epoch(position: BlockPosition) -> BlockPosition:
        return position._replace(epoch=position.epoch + 1, part=0, place=BEGINNING, number=0)

    def _read(self, start: BlockPosition) -> Iterator[_Read | None]:
        """Yield (record, its number, position behind it), and None where an epoch ends."""
        epoch, first, place, number = start[:4]
        while True:
            parts = list(range(self.source.num_parts))
            if self.block_records > 1:
                parts = epoch_order(self.seed, epoch, self.source.num_parts)
            for index in range(first, len(parts)):
                for record in self.source.read(parts[index], place):
                    # What cannot be read on from here is left: the next part begins.
                    part, behind = index, record.after
                    if behind is None:
                        part, behind = index + 1, BEGINNING
                    yield record, number, BlockPosition(epoch, part, behind, number + 1)
                    number += 1
                place = BEGINNING
            yield None
            epoch, first, number = epoch + 1, 0, 0
