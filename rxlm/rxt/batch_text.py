"""Rows of text to padded ids, and rows of ids back to text.

Answering them is in :mod:`rxlm.rxt.batched`; one query or one token at a time, in
:mod:`rxlm.rxt.alpha`.

Shapes: B rows, T tokens of the longest query, A tokens of the longest answer, N turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from rxlm.errors import UserError
from rxlm.ops.padding import padded
from rxlm.rxt.reactive import ReactiveModel
from rxlm.tokenization import encode_query

MEMORY_UPDATE_BEGINS = -1
"""What ``interact`` yields after the answer: the memory update begins."""
MEMORY_UPDATED = -2
"""What ``interact`` yields last: the memory holds the turn."""
MEMORY_NOTES = {
    MEMORY_UPDATE_BEGINS: "\n[memory update begins]\n",
    MEMORY_UPDATED: "[memory updated]\n",
}


class BatchTextModel(ReactiveModel):
    """A model whose tokenizer takes and gives rows of text."""

    turn_length: ClassVar[int] = 256
    """Tokens of a turn at which answers are cut and queries refused, unless a call says another."""

    def tokenize_batch(
        self,
        texts: Sequence[str | None],
        max_seq_len: int = 256,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        """Return queries ``[BOS] [Q] text`` as right-padded ids and mask ``[B, T]``.

        Args:
            texts: a query a row; None: the row has no query (its mask is False everywhere).
            max_seq_len: the longest query that is accepted, in tokens.
            device: where the tensors go.

        Raises:
            UserError: if there are no rows, or one is too long.
        """
        tokenizer = self.require_tokenizer()
        rows = [[] if text is None else encode_query(tokenizer, text) for text in texts]
        return self._as_tensors(rows, max_seq_len, device)

    def tokenize_dialogues(
        self,
        dialogues: Sequence[Sequence[str | None]],
        max_seq_len: int | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        """Return the queries of B dialogues, turn by turn, as ids and mask ``[N, B, T]``.

        N is the longest dialogue's number of turns; the others have no query after their last.
        Otherwise as :meth:`tokenize_batch`.
        """
        if not dialogues or not any(dialogues):
            raise UserError("no dialogues: give at least one with a query.")
        num_turns = max(len(dialogue) for dialogue in dialogues)
        texts = [
            dialogue[turn] if turn < len(dialogue) else None
            for turn in range(num_turns)
            for dialogue in dialogues
        ]
        limit = self.turn_length if max_seq_len is None else max_seq_len
        flat = self.tokenize_batch(texts, limit, device)
        shape = (num_turns, len(dialogues), -1)
        return {name: tensor.view(shape) for name, tensor in flat.items()}

    def stringify_tokens(
        self,
        ids: Tensor | Sequence[int],
        skip_special_tokens: bool = True,
        show_memory_update: bool = False,
    ) -> str:
        """Return the text of one answer's ids, ``[A]``; -1 and -2 give '' or a note."""
        given = [int(token) for token in (ids.tolist() if isinstance(ids, Tensor) else ids)]
        text = self.require_tokenizer().decode(
            [token for token in given if token not in MEMORY_NOTES], skip_special_tokens
        )
        if not show_memory_update:
            return text
        return text + "".join(MEMORY_NOTES.get(token, "") for token in given)

    def stringify_batch(
        self,
        ids: Tensor | Sequence[Sequence[int]],
        attention_mask: Tensor | None = None,
        skip_special_tokens: bool = True,
        show_memory_update: bool = False,
    ) -> list[str]:
        """Return the text of each row of ``ids`` ``[B, A]``.

        Args:
            ids: answers; rows may differ in length if they are lists.
            attention_mask: which ids are real, ``[B, A]``; None = all ([PAD] is a special token).
            skip_special_tokens: whether special tokens give ''.
            show_memory_update: whether -1 and -2 give a note.
        """
        rows = [list(row) for row in (ids.tolist() if isinstance(ids, Tensor) else ids)]
        if attention_mask is not None:
            kept = attention_mask.bool().tolist()
            rows = [
                [token for token, real in zip(row, mask, strict=True) if real]
                for row, mask in zip(rows, kept, strict=True)
            ]
        return [self.stringify_tokens(row, skip_special_tokens, show_memory_update) for row in rows]

    def _as_tensors(
        self, rows: list[list[int]], max_seq_len: int, device: torch.device | str
    ) -> dict[str, Tensor]:
        longest = max((len(row) for row in rows), default=0)
        if longest > max_seq_len:
            raise UserError(
                f"the text has {longest} tokens but max_seq_len={max_seq_len}: shorten it or "
                "raise max_seq_len."
            )
        if not rows:
            raise UserError("no texts: give at least one.")
        ids, mask = padded(rows, self.config.tokenizer.pad_token_id)
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
