"""Answers that are written together, joining and leaving at any step (continuous batching).

Each answer is token for token what it would be alone (:class:`rxlm.rxt.generation.AnswerStream`),
whatever its neighbours do; one whose scores are not finite fails alone. Not here: who may join when
(the server's business), memory updates, text.

Shapes: N answers that join, B answers under way, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rxlm.errors import RunError
from rxlm.nn.evaluation_mode import evaluation_mode
from rxlm.ops.padding import padded
from rxlm.rxt.answer_row import AnswerRow, choose_tokens, rows_by_settings
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.decode_batch import DecodeBatch
from rxlm.rxt.model import RxTNetwork


class AnswerBatch:
    """The answers that are being written by one model. For one thread."""

    def __init__(self, network: RxTNetwork) -> None:
        """Begin without answers."""
        self._network = network
        self._parts = tuple(network.modules())
        self._decoding = DecodeBatch(network.decoder)
        self._rows: list[AnswerRow] = []
        self._groups = rows_by_settings((), 0)
        self.errors: dict[AnswerRow, RunError] = {}
        """What went wrong with single answers; they count as 'stopped'."""

    @property
    def rows(self) -> tuple[AnswerRow, ...]:
        """The answers under way, those included that have ended since :meth:`leave`."""
        return tuple(self._rows)

    @torch.inference_mode()
    def join(self, state: ConversationState, rows: Sequence[AnswerRow]) -> list[int | None]:
        """Read the prompts of N answers and choose their first tokens.

        Args:
            state: their N conversations; left unchanged.
            rows: answers that have not begun, see :func:`rxlm.rxt.generation.answer_row`.

        Returns:
            one token a row, None where there is none (see :attr:`errors`).
        """
        assert len(rows) == state.batch_size, "one conversation for each answer"
        network, decoder = self._network, self._network.decoder
        device = network.device
        with evaluation_mode(network, self._parts):
            slots = state.slots.to(device=device, dtype=network.memory_dtype)
            memory = decoder.read_memory(slots)
            ids, mask = padded([row.prompt for row in rows], network.config.tokenizer.pad_token_id)
            hidden, cache = decoder(
                ids.to(device),
                mask.to(device),
                memory=memory,
                carried=None if state.carried is None else state.carried.to(device),
            )
            last = mask.sum(dim=1).to(device) - 1
            logits = decoder.logits(hidden[torch.arange(len(rows), device=device), last])
            self._decoding.join(memory, cache)
        self._rows += rows
        self._regroup()
        return self._choose(logits, rows)

    @torch.inference_mode()
    def step(self) -> list[int | None]:
        """Choose the next token of every answer; None for those that have ended."""
        if not self._rows:
            return []
        with evaluation_mode(self._network, self._parts):
            logits = self._decoding.step([row.ids[-1] if row.ids else 0 for row in self._rows])
        return self._choose(logits, self._rows)

    @torch.inference_mode()
    def leave(self) -> list[AnswerRow]:
        """Remove the answers that have ended, and return them."""
        ended = {index for index, row in enumerate(self._rows) if row.reason is not None}
        if not ended:
            return []
        gone = [self._rows[index] for index in sorted(ended)]
        self._rows = [self._rows[index] for index in self._decoding.leave(ended)]
        self._regroup()
        return gone

    def _regroup(self) -> None:
        self._groups = rows_by_settings([row.settings for row in self._rows], len(self._rows))

    def _choose(self, logits: Tensor, rows: Sequence[AnswerRow]) -> list[int | None]:
        groups = self._groups
        if len(rows) < len(self._rows):
            groups = rows_by_settings([row.settings for row in rows], len(rows))
        try:
            chosen = choose_tokens(logits, rows, groups)
        except RunError:
            # Of one answer, at least: the others go on.
            chosen = [
                self._choose_alone(logits[index : index + 1], row) for index, row in enumerate(rows)
            ]
        return [
            row.take(token) if row.reason is None else None
            for row, token in zip(rows, chosen, strict=True)
        ]

    def _choose_alone(self, logits: Tensor, row: AnswerRow) -> int:
        if row.reason is not None:
            return 0
        try:
            return choose_tokens(logits, [row], {row.settings: [0]})[0]
        except RunError as error:
            self.errors[row] = error
            row.reason = "stopped"
            return 0
