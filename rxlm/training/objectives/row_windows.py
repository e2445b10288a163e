"""Windows of token rows: the turns of a conversation, or the consecutive pieces of a document.

Joint LM training reads both in the same way. A row holds tokens of one turn or document only, so
no document sees another; short rows cost little, since batches are bucketed by length. Not here:
reading files (``rxlm.data``) and what is learned from a window.

Shapes: B windows, N rows of the longest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from rxlm.data.conversations import Conversation
from rxlm.data.order import sample_index
from rxlm.errors import UserError
from rxlm.rxt.dialogues import DialogueBatch, Row, TurnEncoder, dialogue_batch
from rxlm.tokenization import Tokenizer
from rxlm.tokenization.template import EncodedTurn

_TEXTS_AT_ONCE = 1000


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


class _Piece(NamedTuple):
    """One row: where its tokens are, and whether its document ends with it."""

    start: int
    end: int
    is_last: bool


class TextRows:
    """A corpus in memory, four bytes a token, read in an order of seed and epoch only.

    Args:
        texts: the documents.
        tokenizer: encodes them.
        length: tokens of a row at most, with its [BOS] and, at a document's end, [EOS].
        seed: of the order, >= 0.
        name: for logs and messages.
    """

    def __init__(
        self,
        texts: Iterable[str],
        tokenizer: Tokenizer,
        length: int,
        seed: int = 0,
        name: str = "text",
    ) -> None:
        if length < 3:
            raise UserError(f"length={length}: a row needs [BOS], [EOS] and a token; use >= 3.")
        self.name = name
        self.seed = seed
        self._bos_id, self._eos_id = tokenizer.bos_id, tokenizer.eos_id
        self._tokens, self._documents = _cut(texts, tokenizer, length - 2)
        if not self._documents:
            raise UserError(f"{name}: holds no text; expected at least one document with a token.")
        self._windows: dict[int, list[list[_Piece]]] = {}

    def size(self, num_rows: int) -> int:
        """Return the number of windows of at most ``num_rows`` rows in an epoch."""
        return len(self._cut_windows(num_rows))

    def sample(self, position: int, num_rows: int) -> list[EncodedTurn]:
        """Return the window at ``position``: at most ``num_rows`` consecutive rows of a document.

        Every row is in exactly one window of an epoch. All tokens after the first are targets.
        """
        windows = self._cut_windows(num_rows)
        window = windows[sample_index(self.seed, position, len(windows))]
        return [self._row(piece) for piece in window]

    def rows(self) -> Iterator[list[int]]:
        """Yield every row once, in the order of the corpus."""
        for pieces in self._documents:
            for piece in pieces:
                yield self._row(piece).ids

    def _cut_windows(self, num_rows: int) -> list[list[_Piece]]:
        if num_rows not in self._windows:
            self._windows[num_rows] = [
                pieces[start : start + num_rows]
                for pieces in self._documents
                for start in range(0, len(pieces), num_rows)
            ]
        return self._windows[num_rows]

    def _row(self, piece: _Piece) -> EncodedTurn:
        tokens = self._tokens[piece.start : piece.end].tolist()
        return EncodedTurn([self._bos_id, *tokens, *([self._eos_id] if piece.is_last else [])], 0)


def _cut(
    texts: Iterable[str], tokenizer: Tokenizer, length: int
) -> tuple[torch.Tensor, list[list[_Piece]]]:
    """Return all tokens end to end, and the pieces of ``length`` tokens of each document."""
    parts: list[torch.Tensor] = []
    documents: list[list[_Piece]] = []
    offset = 0
    for encoded in _encoded(texts, tokenizer):
        if not encoded:
            continue
        end = offset + len(encoded)
        documents.append(
            [
                _Piece(start, min(start + length, end), start + length >= end)
                for start in range(offset, end, length)
            ]
        )
        parts.append(torch.tensor(encoded, dtype=torch.int32))
        offset = end
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32), documents


def _encoded(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _TEXTS_AT_ONCE:
            yield from tokenizer.encode_batch(batch)
            batch = []
    yield from tokenizer.encode_batch(batch)
