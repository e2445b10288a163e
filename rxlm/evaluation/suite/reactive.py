"""A reactive model as a contestant: with its memory (M), without (Z), with another's (X).

Shapes: L layers, B conversations, S slots, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from rxlm.data.conversations import Conversation, Interaction
from rxlm.evaluation.answering import greedy_answers, memory_of_references, start_of
from rxlm.evaluation.conditions import state_to_read
from rxlm.evaluation.perplexity import token_losses
from rxlm.evaluation.suite.contestant import CONDITION_OF, Control, TokenLosses, Turns
from rxlm.nn.evaluation_mode import evaluation_mode
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.dialogues import TurnEncoder
from rxlm.rxt.generation import turn_limit
from rxlm.rxt.reactive import ReactiveModel
from rxlm.tokenization.template import render_parts

Item = TypeVar("Item")


class ReactiveContestant:
    """A reactive model that answers by greedy decoding.

    Args:
        model: with its tokenizer.
        batch_size: conversations computed at once; changes no result.
        max_answer_tokens: longer answers are cut.
    """

    controls: tuple[Control, ...] = ("M", "Z", "X")

    def __init__(
        self, model: ReactiveModel, batch_size: int = 100, max_answer_tokens: int = 24
    ) -> None:
        self.model = model
        self.turns = TurnEncoder(model.require_tokenizer(), turn_limit(model))
        self.batch_size, self.max_answer_tokens = batch_size, max_answer_tokens

    def fits(self, turns: Turns) -> bool:
        """Return whether no turn is longer than the model's ``seq_len``."""
        return all(self._length(turn) <= self.turns.seq_len for turn in turns)

    def read(self, histories: Sequence[Turns]) -> ConversationState:
        """Write the turns into fresh memories; an answer that does not fit is cut.

        (Only what a model itself says can be too long here, when it is not valid text.)
        """
        fitting = [[self._fitted(turn) for turn in turns] for turns in histories]
        with evaluation_mode(self.model), torch.no_grad():
            return ConversationState.stack(
                [
                    memory_of_references(self.model, self.turns, part, start)
                    for start, part in _parts(fitting, self.batch_size)
                ]
            )

    def answer(
        self, held: ConversationState, queries: Sequence[str], control: Control
    ) -> list[str]:
        """Answer from the memory that ``control`` names; X: that of the next conversation."""
        count = len(queries)
        with evaluation_mode(self.model), torch.no_grad():
            other = held.select([*range(1, count), 0])
            initial = start_of(self.model, count)
            state = state_to_read(CONDITION_OF[control], held, other, initial)
            texts: list[str] = []
            for start, part in _parts(queries, self.batch_size):
                rows = state.select(range(start, start + len(part)))
                answers = greedy_answers(self.model, rows, part, self.max_answer_tokens)
                texts += [self.turns.tokenizer.decode(answer.ids) for answer in answers]
        return texts

    def losses(self, conversations: Sequence[Conversation]) -> dict[Control, TokenLosses]:
        """Return the losses under each control; see :func:`~rxlm.evaluation.perplexity`."""
        conditions = [CONDITION_OF[control] for control in self.controls]
        found = token_losses(self.model, conversations, conditions)
        return {control: found[CONDITION_OF[control]] for control in self.controls}

    def _length(self, turn: Interaction) -> int:
        parts = turn.parts()
        # A token covers at least one byte, so short turns need no tokenizer.
        num_bytes = sum(len(text.encode()) for text in parts.values()) + 2 * len(parts) + 4
        if num_bytes <= self.turns.seq_len:
            return num_bytes
        return len(render_parts(self.turns.tokenizer, parts).ids)

    def _fitted(self, turn: Interaction) -> Interaction:
        while self._length(turn) > self.turns.seq_len and turn.answer:
            turn = replace(turn, answer=turn.answer[: len(turn.answer) // 2])
        return turn


def _parts(items: Sequence[Item], size: int) -> list[tuple[int, Sequence[Item]]]:
    """Return pieces of ``items`` with the places where they begin."""
    return [(start, items[start : start + size]) for start in range(0, len(items), size)]
