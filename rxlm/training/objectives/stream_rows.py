"""Rows of a stream, by micro-batch, such that any micro-batch can be asked for again.

Every micro-step of an update reads a lane of its own: lane ``m`` of A reads every A-th record. So
processes that share an update read different records, each only its own, and what is read does not
depend on their number. A lane goes forward; its position behind each micro-batch that is not yet
trained on is kept, so what is saved is where *training* is, not how far batches were built ahead.

Not here: reading records (``rxlm.data.streaming``), rows of a store (``row_windows``).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rxlm.data.order import block_order
from rxlm.data.records import DataSummary
from rxlm.data.streaming import BlockPosition, StreamPosition, TextStream
from rxlm.errors import UserError
from rxlm.tokenization import Tokenizer
from rxlm.tokenization.template import EncodedTurn
from rxlm.training.objectives.packed_rows import pack_lengths
from rxlm.training.objectives.row_windows import TextRows

logger = logging.getLogger(__name__)

_NAMED = 5

Row = list[EncodedTurn]
"""The pieces of one row; one piece without packing."""


class _Block(NamedTuple):
    start: BlockPosition
    rows: list[Row]
    after: BlockPosition


class _Lane:
    """One reader. ``behind[n]`` is the position behind ``n`` micro-batches."""

    def __init__(self, stream: TextStream) -> None:
        self.stream = stream
        self.behind: dict[int, StreamPosition] = {0: StreamPosition()}
        self.lock = threading.Lock()
        self.block: _Block | None = None
        self.problems: list[str] = []


class StreamRows:
    """The rows of micro-batches, read from streams.

    Args:
        lanes: one stream for each micro-step of an update.
        tokenizer: encodes texts.
        length: tokens of a row at most.
        packing: whether a row holds several documents.
    """

    def __init__(
        self, lanes: Sequence[TextStream], tokenizer: Tokenizer, length: int, *, packing: bool
    ) -> None:
        self.name = lanes[0].source.name
        self._lanes = [_Lane(stream) for stream in lanes]
        self._tokenizer, self._length, self._packing = tokenizer, length, packing

    def micro_batch(self, step: int, micro_step: int, size: int) -> list[Row]:
        """Return the ``size`` rows of a micro-batch: a function of data, seed and position only.

        Raises:
            UserError: for a bad record that is not to be skipped.
        """
        lane = self._lanes[micro_step]
        with lane.lock:
            known = [number for number in lane.behind if number <= step]
            number = max(known, default=0)
            position = lane.behind.get(number, StreamPosition())
            for now in range(number, step + 1):
                rows, position = self._read(lane, position, size)
                lane.behind[now + 1] = position
        return rows

    def trained(self, step: int) -> None:
        """Forget the positions before those that begin ``step``: they are trained on."""
        for lane in self._lanes:
            with lane.lock:
                newest = max((number for number in lane.behind if number <= step), default=0)
                lane.behind = {n: at for n, at in lane.behind.items() if n >= newest}

    def state_dict(self) -> dict[str, Any]:
        """Return where training is, and in what, as JSON values: of each lane (micro-batches,
        position)."""
        state = {}
        for index, lane in enumerate(self._lanes):
            with lane.lock:
                number = min(lane.behind)
                state[str(index)] = [number, *lane.behind[number].to_json()]
        return {"num_lanes": len(self._lanes), **self._read_from(), "lanes": state}

    def _read_from(self) -> dict[str, Any]:
        source = self._lanes[0].stream.source
        return {"num_parts": source.num_parts, "contents": list(source.contents)}

    @staticmethod
    def merged(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the state of all processes: of each lane, that of whoever read it farthest."""
        lanes: dict[str, list[int]] = {}
        for state in states:
            for index, values in state["lanes"].items():
                lanes[index] = max(values, lanes.get(index, values))
        return {**states[0], "lanes": lanes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was.

        Raises:
            UserError: for a state of another number of lanes, or of other files.
        """
        if state.get("num_lanes") != len(self._lanes):
            raise UserError(
                f"train.accumulation={len(self._lanes)}, but the run has read its stream with "
                f"accumulation={state.get('num_lanes')}, and each micro-batch reads its own part. "
                "Resume with that, or begin a new run."
            )
        self._check_contents(state)
        for index, (number, *values) in state["lanes"].items():
            lane = self._lanes[int(index)]
            lane.behind = {int(number): StreamPosition.from_json(values)}

    def _check_contents(self, state: Mapping[str, Any]) -> None:
        now = self._read_from()
        if "contents" not in state:
            logger.warning(
                "%s: the checkpoint does not say which files it was reading (an older version "
                "wrote it), so it is not checked that they are the same",
                self.name,
            )
            return
        before = {"num_parts": state["num_parts"], "contents": list(state["contents"])}
        if before == now:
            return
        old, new = before["contents"], now["contents"]
        gone = [line for line in old if line not in new]
        added = [line for line in new if line not in old]
        changes = [
            f"{title}: {', '.join(lines[:_NAMED])}{', ...' if len(lines) > _NAMED else ''}"
            for title, lines in (("not there any more", gone), ("new", added))
            if lines
        ] or ["the same, in another order or number"]
        raise UserError(
            f"{self.name}: this is not what the run has read ({'; '.join(changes)}), so where it "
            "was means other records now. Resume with the same files, or begin a new run."
        )

    def summary(self) -> DataSummary:
        """Return how many records training has read; problems only of this start of the run."""
        summary = DataSummary()
        for lane in self._lanes:
            with lane.lock:
                block = lane.behind[min(lane.behind)].block
                summary.add(block.num_records, block.num_bad, lane.problems)
        return summary

    def _read(
        self, lane: _Lane, position: StreamPosition, size: int
    ) -> tuple[list[Row], StreamPosition]:
        rows: list[Row] = []
        start, taken = position
        while len(rows) < size:
            block = lane.block
            if block is None or block.start != start:
                block = lane.block = self._open_block(lane, start)
            part = block.rows[taken : taken + size - len(rows)]
            rows += part
            taken += len(part)
            if taken == len(block.rows):
                start, taken = block.after, 0
        return rows, StreamPosition(start, taken)

    def _open_block(self, lane: _Lane, start: BlockPosition) -> _Block:
        block = lane.stream.block(start)
        lane.problems += block.problems[: 10 - len(lane.problems)]
        rows = self._rows(block.texts)
        order = block_order(lane.stream.seed, start.epoch, start.number, len(rows))
        if lane.stream.block_records == 1:
            order = list(range(len(rows)))
        return _Block(start, [rows[index] for index in order], block.after)

    def _rows(self, texts: Iterable[str]) -> list[Row]:
        pieces = TextRows(texts, self._tokenizer, self._length, name=self.name)
        if not self._packing:
            return [pieces.window(index, 1) for index in range(pieces.size(1))]
        packed = pack_lengths(pieces.row_lengths().tolist(), self._length)
        return [[pieces.window(index, 1)[0] for index in row] for row in packed]
