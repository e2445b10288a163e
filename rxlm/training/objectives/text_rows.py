"""Plain text as rows of tokens for joint LM training: documents cut into consecutive rows.

A row holds tokens of one document only, so no document sees another; short rows cost little,
since batches are bucketed by length. A window of consecutive rows of a document plays the part of
a conversation. Not here: reading files (``rxlm.data``), batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from rxlm.data.order import sample_index
from rxlm.errors import UserError
from rxlm.tokenization import Tokenizer
from rxlm.tokenization.template import EncodedTurn

_TEXTS_AT_ONCE = 1000


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
        return [self._row(piece) for piece in windows[sample_index(self.seed, position, len(windows))]]

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


def _encoded(texts: Iterable[str], tokenizer: Tokenizer) -> Iterable[list[int]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _TEXTS_AT_ONCE:
            yield from tokenizer.encode_batch(batch)
            batch = []
    yield from tokenizer.encode_batch(batch)
