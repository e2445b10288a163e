"""Streams: exact positions, shards, bounded shuffling, flat memory."""

from __future__ import annotations

import gzip
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rxlm.data.records import BEGINNING, Place, Record
from rxlm.data.streaming import START, FileRecords, StreamPosition, TextStream
from rxlm.errors import UserError

TEXTS = [f"record {number}\nof some" for number in range(23)]


def write(folder: Path, kind: str) -> list[Path]:
    """Write TEXTS into two files of a kind."""
    files = []
    for index, texts in enumerate((TEXTS[:10], TEXTS[10:])):
        path = folder / f"{index}.{kind}"
        files.append(path)
        if kind == "parquet":
            pyarrow = pytest.importorskip("pyarrow")
            parquet = pytest.importorskip("pyarrow.parquet")
            parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=4)
            continue
        if kind.startswith("txt"):
            content = "\n\n".join(texts)
        else:
            content = "".join(json.dumps({"text": text}) + "\n\n" for text in texts)
        path.write_bytes(
            gzip.compress(content.encode()) if kind.endswith("gz") else content.encode()
        )
    return files


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("block", [1, 4])
def test_reading_goes_on_at_the_exact_record(tmp_path: Path, kind: str, block: int) -> None:
    """Catches a record read twice or left out after resuming, at any place of any kind of file,
    across blocks, files and epochs, and a position that does not survive JSON."""
    source = FileRecords(write(tmp_path, kind))
    reading = TextStream(source, seed=3, block_records=block).records()
    whole = list(itertools.islice(reading, 60))
    for place in range(0, 50, 1 if block == 4 else 7):
        position = StreamPosition.from_json(json.loads(json.dumps(whole[place][1].to_json())))
        fresh = TextStream(source, seed=3, block_records=block)
        assert list(itertools.islice(fresh.records(position), 9)) == whole[place + 1 : place + 10]
    for epoch in (0, 1):
        texts = [text for text, _ in whole[epoch * 23 : epoch * 23 + 23]]
        assert sorted(texts) == sorted(TEXTS)
        assert (texts == TEXTS) == (block == 1)


@given(num_shards=st.integers(1, 5), block=st.integers(1, 9), seed=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_shards_share_out_every_record(num_shards: int, block: int, seed: int) -> None:
    """Catches records that two workers read, or none; and a shard whose part depends on how it
    shuffles."""
    seen: list[str] = []
    for shard in range(num_shards):
        stream = TextStream(
            Generated(23), seed=seed, block_records=block, shard=shard, num_shards=num_shards
        )
        own = len(range(shard, 23, num_shards))
        reading = list(itertools.islice(stream.records(), own))
        assert [position.block.epoch for _, position in reading] == [0] * (own - 1) + [1]
        seen += [text for text, _ in reading]
    assert sorted(seen) == sorted(f"text {number}" for number in range(23))


class Generated:
    """Records that are made up when they are read."""

    def __init__(self, count: int, text: str = "") -> None:
        self.name, self.num_parts = "made up", 1
        self._count, self._text = count, text

    def read(self, part: int, place: Place) -> Iterator[Record]:
        for number in range(place.offset, self._count):
            after = Place(number + 1, number + 1)
            yield Record(f"made up:{number + 1}", f"text {number}{self._text}", None, after)


def test_shuffling_stays_within_blocks() -> None:
    """Catches a shuffle that needs more memory than a block, that repeats the order of the block
    before, or that is none."""
    stream = TextStream(Generated(40), seed=1, block_records=10)
    numbers = [int(text.split()[1]) for text, _ in itertools.islice(stream.records(), 40)]
    blocks = [numbers[start : start + 10] for start in range(0, 40, 10)]
    for index, block in enumerate(blocks):
        assert sorted(block) == list(range(index * 10, index * 10 + 10))
    assert len({tuple(item % 10 for item in block) for block in blocks}) == 4
    other = TextStream(Generated(40), seed=2, block_records=10)
    assert [text for text, _ in itertools.islice(other.records(), 40)] != [
        f"text {number}" for number in numbers
    ]


def test_bad_records_in_a_stream(tmp_path: Path) -> None:
    """Catches a count that starts anew when a run resumes, an error without its place, and an
    endless search through a file without a usable record."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "{n}"}}\n' if n % 3 else "{\n" for n in range(12)))
    source = FileRecords([path])
    with pytest.raises(UserError, match=r"a\.jsonl:1: not JSON"):
        next(TextStream(source).records())
    stream = TextStream(source, on_bad_record="skip", block_records=2)
    reading = list(itertools.islice(stream.records(), 20))
    assert len({text for text, _ in reading[:8]}) == 8
    resumed = TextStream(source, on_bad_record="skip", block_records=2).records(reading[9][1])
    assert list(itertools.islice(resumed, 10)) == reading[10:]
    block = reading[-1][1].block
    assert (block.num_records, block.num_bad) == (30, 10)
    path.write_text("{\n" * 5)
    with pytest.raises(UserError, match=r"no usable record.*a\.jsonl:5"):
        next(TextStream(source, on_bad_record="skip").records())


def test_memory_stays_flat() -> None:
    """Catches a stream that keeps what it has read: 200 MB pass, and memory does not grow."""
    stream = TextStream(Generated(10**9, " filler" * 600), block_records=256)
    position, num_bytes, sizes = START.block, 0, []
    while num_bytes < 200_000_000:
        block = stream.block(position)
        position = block.after
        num_bytes += sum(map(len, block.texts))
        sizes.append(resident_bytes())
    warm = sizes[len(sizes) // 10]
    assert len(sizes) > 100 and max(sizes) - warm < 20_000_000
    assert position.place != BEGINNING


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
