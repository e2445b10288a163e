"""Streams many gigabytes of text that is made up on the fly, and prints the memory in use.

    python benchmarks/streaming.py --gigabytes 10

Every record is a line of JSON that is written and decoded again, so the path is that of a .jsonl
file without the disk. Its text becomes rows of bytes. Halfway the position is written down; at the
end a new stream begins there, and what it reads is compared with what the first one read.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import platform
import random
import time
from collections.abc import Iterator

import numpy

from rxlm.data.records import Place, Record, decode_json
from rxlm.data.streaming import BlockPosition, StreamPosition, TextStream

ROW = 1024
COMPARED = 2000


class MadeUpLines:
    """Record ``i`` is a function of ``i``: 1 to 16 kB of words."""

    name = "made up"
    num_parts = 1

    def __init__(self) -> None:
        words = random.Random(0)
        self._text = " ".join(
            "".join(words.choices("abcdefghijklmnopqrstuvwxyz", k=words.randint(1, 9)))
            for _ in range(200_000)
        )

    def read(self, part: int, place: Place) -> Iterator[Record]:
        """Yield the records from number ``place.offset`` on, without end."""
        for number in itertools.count(place.offset):
            digest = int.from_bytes(hashlib.blake2b(str(number).encode()).digest()[:8], "big")
            size = 1000 + digest % 15_000
            start = (digest >> 20) % (len(self._text) - size)
            line = json.dumps({"id": number, "text": self._text[start : start + size]})
            value = decode_json(line)["text"]
            yield Record(f"made up:{number + 1}", value, None, Place(number + 1, number + 1))


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Stream, print a line for every half gigabyte, then the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    goal = int(options.gigabytes * 1e9)
    stream = TextStream(MadeUpLines(), seed=1)
    position = BlockPosition()
    num_bytes = num_rows = 0
    curve: list[tuple[float, float]] = []
    middle: StreamPosition | None = None
    expected: list[str] = []
    begin = time.perf_counter()
    while num_bytes < goal:
        start, block = position, stream.block(position)
        position = block.after
        for text in block.texts:
            ids = numpy.frombuffer(text.encode(), numpy.uint8)
            num_bytes += len(ids)
            num_rows += -(-len(ids) // ROW)
        if num_bytes > goal / 2 and len(expected) < COMPARED:
            # Not at a block's beginning: that would be the easy place.
            taken = len(block.texts) // 3 if middle is None else 0
            middle = StreamPosition(start, taken) if middle is None else middle
            expected += [hashlib.sha256(text.encode()).hexdigest() for text in block.texts[taken:]]
        if num_bytes >= (len(curve) + 1) * min(5e8, goal / 20):
            curve.append((num_bytes / 1e9, resident_bytes() / 1e6))
            seconds = time.perf_counter() - begin
            size, memory = curve[-1]
            print(f"{size:6.2f} GB  RSS {memory:7.1f} MB  {seconds:6.1f} s", flush=True)
    seconds = time.perf_counter() - begin
    assert middle is not None
    saved = json.dumps(middle.to_json())
    again = TextStream(MadeUpLines(), seed=1).records(StreamPosition.from_json(json.loads(saved)))
    found = [
        hashlib.sha256(text.encode()).hexdigest()
        for text, _ in itertools.islice(again, len(expected))
    ]
    report = {
        "gigabytes": num_bytes / 1e9,
        "records": position.num_records,
        "rows": num_rows,
        "seconds": seconds,
        "megabytes_per_second": num_bytes / 1e6 / seconds,
        "rss_first_megabytes": curve[0][1],
        "rss_last_megabytes": curve[-1][1],
        "rss_growth_megabytes": max(size for _, size in curve) - curve[0][1],
        "resumed_at": middle.to_json(),
        "records_compared": len(expected),
        "resumed_exactly": found == expected,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared with other work",
        "python": platform.python_version(),
    }
    print(json.dumps(report, indent=2))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({**report, "curve": curve}, file, indent=2)


if __name__ == "__main__":
    main()
