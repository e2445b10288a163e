"""Windows of token rows: the turns of a conversation, or the consecutive pieces of a document.

Joint LM training reads both in the same way. A row holds tokens of one turn or document only, so
no document sees another; short rows cost little, since batches are bucketed by length. Not here:
reading files (``rxlm.data``) and what is learned from a window.

Shapes: B windows, N rows of the longest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy

from rxlm.data.conversations import Conversation
from rxlm.data.order import sample_index
from rxlm.data.token_store import TokenStore, tokens_in_memory
from rxlm.errors import UserError
from rxlm.rxt.dialogues import DialogueBatch, Row, TurnEncoder, dialogue_batch
from rxlm.tokenization import Tokenizer
from rxlm.tokenization.template import EncodedTurn


def conversation_rows(encoder: TurnEncoder, conversation: Conversation) -> list[EncodedTurn]:
    """Return the turns of a conversation; a system prompt becomes a turn before the first."""
    rows = [encoder.encode(item) for item in conversation.interactions]
    if conversation.system:
        rows.insert(0, encoder.system(conversation.system))
    return rows


def batch_windows(
    windows: Sequence[Sequence[EncodedTurn]], *, answers: bool, num_buckets: int, pad_id: int
) -> DialogueBatch:
    """Batch windows: every row is encoded, and answered from the rows before it.

    Args:
        windows: B of them, each of at least one row.
        answers: whether anything is answered; otherwise ``answer`` of the batch is empty.
        num_buckets: length buckets.
        pad_id: filler; never read.
    """
    rows = [
        Row(turn, n * len(windows) + b, 0)
        for b, window in enumerate(windows)
        for n, turn in enumerate(window)
    ]
    answered = [row for row in rows if answers and row.turn.answer_start < len(row.turn.ids)]
    return dialogue_batch(
        rows,
        answered,
        num_dialogues=len(windows),
        num_turns=max(len(window) for window in windows),
        num_buckets=num_buckets,
        pad_id=pad_id,
    )


class RowSource(Protocol):
    """Windows of rows by position."""

    name: str
    """For logs and messages."""

    def size(self, num_rows: int) -> int:
        """Return the number of windows of at most ``num_rows`` rows in an epoch."""
        ...

    def sample(self, position: int, num_rows: int) -> list[EncodedTurn]:
        """Return the window at ``position`` (>= 0) of the endless reading."""
        ...


class TextRows:
    """Documents as rows of tokens, read in an order of seed and epoch only.

    Args:
        texts: the documents, or a store of their tokens.
        tokenizer: encodes them; the store's.
        length: tokens of a row at most, with its [BOS] and, at a document's end, [EOS].
        seed: of the order, >= 0.
        name: for logs and messages.
        documents: which documents of a store to read, in ascending order; None: all.
    """

    def __init__(
        self,
        texts: Iterable[str] | TokenStore,
        tokenizer: Tokenizer,
        length: int,
        seed: int = 0,
        name: str = "text",
        documents: numpy.ndarray | None = None,
    ) -> None:
        if length < 3:
            raise UserError(f"length={length}: a row needs [BOS], [EOS] and a token; use >= 3.")
        self.name = name
        self.seed = seed
        self.length = length
        self._bos_id, self._eos_id = tokenizer.bos_id, tokenizer.eos_id
        if not isinstance(texts, TokenStore):
            texts = tokens_in_memory(texts, tokenizer.encode_batch)
        self._tokens = texts.tokens
        begins, ends = texts.offsets[:-1], texts.offsets[1:]
        if documents is not None:
            begins, ends = begins[documents], ends[documents]
        real = ends > begins
        self._begins, self._ends = begins[real], ends[real]
        if not len(self._begins):
            raise UserError(f"{name}: holds no text; expected at least one document with a token.")
        self._windows: dict[int, numpy.ndarray] = {}

    def size(self, num_rows: int) -> int:
        """Return the number of windows of at most ``num_rows`` rows in an epoch."""
        return int(self._windows_before(num_rows)[-1])

    def sample(self, position: int, num_rows: int) -> list[EncodedTurn]:
        """Return the window at ``position``: at most ``num_rows`` consecutive rows of a document.

        Every row is in exactly one window of an epoch. All tokens after the first are targets.
        """
        return self.window(sample_index(self.seed, position, self.size(num_rows)), num_rows)

    def window(self, index: int, num_rows: int) -> list[EncodedTurn]:
        """Return window number ``index`` of the corpus, read from its beginning."""
        before = self._windows_before(num_rows)
        document = int(numpy.searchsorted(before, index, side="right")) - 1
        first = (index - int(before[document])) * num_rows
        begin, end = int(self._begins[document]), int(self._ends[document])
        step = self.length - 2
        last = min(begin + (first + num_rows) * step, end)
        return [
            self._row(start, min(start + step, end), start + step >= end)
            for start in range(begin + first * step, last, step)
        ]

    def rows(self) -> Iterator[list[int]]:
        """Yield every row once, in the order of the corpus."""
        for index in range(self.size(1)):
            yield self.window(index, 1)[0].ids

    def row_lengths(self) -> numpy.ndarray:
        """Return the number of tokens of every row, in the order of the corpus: int64."""
        step = self.length - 2
        counts = self._num_rows()
        lengths = numpy.full(int(counts.sum()), step + 1, dtype=numpy.int64)
        last = numpy.cumsum(counts) - 1
        lengths[last] = self._ends - self._begins - (counts - 1) * step + 2
        return lengths

    def _num_rows(self) -> numpy.ndarray:
        return -(-(self._ends - self._begins) // (self.length - 2))

    def _windows_before(self, num_rows: int) -> numpy.ndarray:
        """Return how many windows come before each document, and their number: one more entry."""
        if num_rows not in self._windows:
            counts = -(-self._num_rows() // num_rows)
            self._windows[num_rows] = numpy.concatenate(([0], numpy.cumsum(counts)))
        return self._windows[num_rows]

    def _row(self, start: int, end: int, is_last: bool) -> EncodedTurn:
        tokens = self._tokens[start:end].tolist()
        return EncodedTurn([self._bos_id, *tokens, *([self._eos_id] if is_last else [])], 0)
