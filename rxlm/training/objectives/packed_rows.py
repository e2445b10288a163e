"""Pieces of documents put together into rows that are almost full.

Which pieces share a row is decided once, by their lengths only: blocks of consecutive pieces are
packed best fit first, longest piece first. The rows are then read in an order of seed and epoch, as
unpacked ones are. Not here: how a model keeps the pieces of a row apart (``rxlm.nn.packing``).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy

from rxlm.data.order import sample_index
from rxlm.errors import UserError
from rxlm.tokenization.template import EncodedTurn
from rxlm.training.objectives.row_windows import TextRows

BLOCK = 1024
"""Pieces that are packed together; more fill rows better, and spread documents farther."""


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return rows of indices whose lengths sum to at most ``capacity`` (best fit, decreasing).

    Args:
        lengths: of the pieces, each at most ``capacity``.
        capacity: tokens of a row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        length = lengths[index]
        place = bisect.bisect_left(room, (length, -1))
        if place == len(room):
            row, left = len(rows), capacity
            rows.append([])
        else:
            left, row = room.pop(place)
        rows[row].append(index)
        if left > length:
            bisect.insort(room, (left - length, row))
    return [sorted(row) for row in rows]


class PackedRows:
    """Rows of several pieces each, in an order of seed and epoch only.

    Args:
        rows: the pieces.
    """

    def __init__(self, rows: TextRows) -> None:
        self.rows, self.name = rows, rows.name
        lengths = rows.row_lengths()
        pieces: list[numpy.ndarray] = []
        counts: list[int] = [0]
        for start in range(0, len(lengths), BLOCK):
            for row in pack_lengths(lengths[start : start + BLOCK].tolist(), rows.length):
                pieces.append(numpy.asarray(row, numpy.int64) + start)
                counts.append(len(row))
        self._pieces = numpy.concatenate(pieces)
        self._begins = numpy.cumsum(counts)
        self.fill = float(lengths.sum()) / (self.size(1) * rows.length)
        """Share of the places of all rows that hold a token."""

    def size(self, num_rows: int) -> int:
        """Return the number of rows in an epoch; ``num_rows`` is 1."""
        if num_rows != 1:
            raise UserError(f"num_rows={num_rows}: packed rows are read one by one.")
        return len(self._begins) - 1

    def sample(self, position: int, num_rows: int = 1) -> list[EncodedTurn]:
        """Return the pieces of the row at ``position``."""
        row = sample_index(self.rows.seed, position, self.size(num_rows))
        chosen = self._pieces[self._begins[row] : self._begins[row + 1]]
        return [self.rows.window(int(piece), 1)[0] for piece in chosen]
