"""Whole conversations as rows of a language model: the interactions of a Reactive Transformer, one
after the other, of which only what the model says is learned.

    [BOS] [Q] query [A] answer [EOS] [BOS] [Q] query [A] answer [EOS] ...

So a language model without a memory learns from the very tokens that one with a memory learns from,
and is its baseline (``rxlm eval suite --baseline``).
"""

from __future__ import annotations

import logging

from rxlm.data.conversation_source import ConversationSource
from rxlm.errors import UserError
from rxlm.rxt.dialogues import TurnEncoder
from rxlm.tokenization import Tokenizer
from rxlm.tokenization.template import EncodedTurn
from rxlm.training.objectives.row_windows import conversation_rows

logger = logging.getLogger(__name__)


class DialogueRows:
    """Conversations by position, each the turns that fit into a row.

    Args:
        source: of conversations.
        tokenizer: encodes them.
        length: tokens of a row at most; turns at the end that do not fit are left out.
        num_turns: turns of a conversation at most.
        count: conversations of an epoch where there are endlessly many.
    """

    def __init__(
        self,
        source: ConversationSource,
        tokenizer: Tokenizer,
        length: int,
        num_turns: int,
        count: int,
    ) -> None:
        self.source, self.name = source, source.name
        self.length, self.num_turns = length, num_turns
        self._count = count if source.size is None else source.size
        self._turns = TurnEncoder(tokenizer, length)

    def size(self, num_rows: int) -> int:
        """Return the number of conversations of an epoch; ``num_rows`` is 1."""
        if num_rows != 1:
            raise UserError(f"num_rows={num_rows}: conversations are read one by one.")
        return self._count

    def sample(self, position: int, num_rows: int = 1) -> list[EncodedTurn]:
        """Return the turns of the conversation at ``position``, together one row.

        Raises:
            UserError: if its first turn does not fit.
        """
        turns = conversation_rows(self._turns, self.source.sample(position, self.num_turns))
        total, kept = 0, []
        for turn in turns:
            total += len(turn.ids)
            if total > self.length:
                break
            kept.append(turn)
        return kept
