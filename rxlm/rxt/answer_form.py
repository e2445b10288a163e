"""How an answer begins and which special tokens it may hold: thinking, answer, tool call, in order.

A model that thinks opens what it says with [T] or [A]; [A] ends its thinking, [C] opens a tool
call, [EOS] ends all. Other special tokens, and these in another order, cannot be chosen, so what
was said can always be told apart again. Models without thinking have no form: they answer after
[A], whatever they say. Not here: how tokens are drawn (``rxlm.ops.sampling``).

Shapes: B conversations, V vocabulary, C special tokens.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from rxlm.errors import UserError
from rxlm.rxt.tokenizer_config import TokenizerConfig

ThinkingMode = Literal["fast", "extended", "auto"]
"""'fast': answer at once; 'extended': think first; 'auto': the model chooses, once, with its first
token."""


class AnswerForm:
    """The order of special tokens in what a model says. Immutable."""

    def __init__(
        self, ids: TokenizerConfig, mode: ThinkingMode = "fast", tool_calls: bool = True
    ) -> None:
        """Take the ids of a model that thinks.

        Args:
            ids: of the special tokens.
            mode: how answers begin.
            tool_calls: whether an answer may end in a tool call.

        Raises:
            UserError: for an unknown mode, or if the model has no [T], [C] or [U].
        """
        check_thinking_mode(mode)
        missing = [
            name
            for name in ("think_token_id", "tool_call_token_id", "tool_use_token_id")
            if getattr(ids, name) is None
        ]
        if missing or ids.think_token_id is None or ids.tool_call_token_id is None:
            raise UserError(
                f"tokenizer_config has no {', '.join(missing)}: a model that thinks and calls "
                "tools needs these special tokens; give their ids, or use RxTAlpha."
            )
        self.mode = mode
        self.answer_id, self.think_id = ids.answer_token_id, ids.think_token_id
        self.tool_call_id = ids.tool_call_token_id
        # What may come next, by the special token that came last; text may always come.
        calls = {self.tool_call_id} if tool_calls else set()
        self._next: dict[int, set[int]] = {
            self.think_id: {self.answer_id},
            self.answer_id: {*calls, ids.eos_token_id},
            self.tool_call_id: {ids.eos_token_id},
        }
        self._special = sorted(ids.ids().values())

    def opened(self, prompt: Sequence[int]) -> list[int]:
        """Return ``prompt`` with the token that opens what is said, unless the model chooses it."""
        ids = list(prompt)
        if self.mode == "auto" or self.opening_of(ids) is not None:
            return ids
        return [*ids, self.answer_id if self.mode == "fast" else self.think_id]

    def opening_of(self, prompt: Sequence[int]) -> int | None:
        """Return the [A] or [T] that ``prompt`` ends in; None if the model has yet to choose."""
        last = prompt[-1] if prompt else None
        return last if last in (self.answer_id, self.think_id) else None

    def part_of(self, token: int | None) -> str | None:
        """Return the part that an [A] or [T] opens; None for None."""
        if token is None:
            return None
        return "answer" if token == self.answer_id else "think"

    def after(self, last: int | None, token: int) -> int | None:
        """Return the special token that came last, once ``token`` has come after ``last``."""
        return token if token in self._next else last

    def restrict(self, logits: Tensor, last: Sequence[int | None]) -> Tensor:
        """Return the scores with -inf where a token may not come.

        A row that has not begun gets the likelier of [A] and [T]: a decision, not a draw.

        Args:
            logits: ``[B, V]``; left unchanged.
            last: the special token that came last, a row; None: nothing was said yet.
        """
        forbidden = torch.tensor(
            [
                [token not in self._next.get(row, ()) for token in self._special]
                if row is not None
                else [False] * len(self._special)
                for row in last
            ]
        )
        special = torch.tensor(self._special, device=logits.device)
        scores = logits.clone()
        scores[:, special] = scores[:, special].masked_fill(
            forbidden.to(logits.device), float("-inf")
        )
        for row, opened in enumerate(last):
            if opened is None:
                ask, think = logits[row, self.answer_id], logits[row, self.think_id]
                best = self.think_id if bool(think > ask) else self.answer_id
                scores[row] = float("-inf")
                scores[row, best] = logits[row, best]
        return scores


def check_thinking_mode(mode: str) -> None:
    """Raise ``UserError`` unless ``mode`` is one, naming the one that was probably meant."""
    modes = get_args(ThinkingMode)
    if mode not in modes:
        near = difflib.get_close_matches(str(mode), modes, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(modes)}."
        raise UserError(f"thinking_mode={mode!r}: {hint}")
