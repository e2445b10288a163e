"""A conversation as a value: its memory, its randomness, how long it is.

Nothing here computes with a model. Whoever keeps an old value has undone everything since.

Shapes: L layers, B conversations, S slots, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rxlm.errors import UserError


@dataclass(frozen=True, eq=False)
class ConversationState:
    """All that B conversations carry from one turn to the next.

    Attributes:
        slots: short-term memory ``[L, B, S, D]``.
        seeds: of each row's random draws.
        draws: tokens each row has chosen so far, i.e. the index of its next draw.
        num_turns: turns that each row's memory holds (a system prompt is not a turn).
    """

    slots: Tensor
    seeds: tuple[int, ...]
    draws: tuple[int, ...]
    num_turns: tuple[int, ...]

    def __post_init__(self) -> None:
        rows = {self.slots.shape[1], len(self.seeds), len(self.draws), len(self.num_turns)}
        assert len(rows) == 1, "slots, seeds, draws and num_turns describe the same conversations"

    @classmethod
    def start(cls, slots: Tensor, seed: int) -> ConversationState:
        """Return conversations before their first turn; row b draws from stream ``seed + b``."""
        batch_size = slots.shape[1]
        zeros = (0,) * batch_size
        return cls(slots, tuple(seed + row for row in range(batch_size)), zeros, zeros)

    @classmethod
    def stack(cls, states: Sequence[ConversationState]) -> ConversationState:
        """Join conversations of the same model into one batch, in order."""
        if not states:
            raise UserError("no conversations to stack: give at least one state.")
        return cls(
            torch.cat([state.slots for state in states], dim=1),
            tuple(seed for state in states for seed in state.seeds),
            tuple(draws for state in states for draws in state.draws),
            tuple(turns for state in states for turns in state.num_turns),
        )

    @property
    def batch_size(self) -> int:
        """Number of conversations B."""
        return len(self.seeds)

    def select(self, rows: Sequence[int]) -> ConversationState:
        """Return the conversations ``rows``, in that order; a row may be repeated."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self.slots.device)
        return ConversationState(
            self.slots.index_select(1, index),
            tuple(self.seeds[row] for row in rows),
            tuple(self.draws[row] for row in rows),
            tuple(self.num_turns[row] for row in rows),
        )

    def repeat(self, times: int) -> ConversationState:
        """Return every conversation ``times`` times, copies beside each other."""
        return self.select([row for row in range(self.batch_size) for _ in range(times)])

    def replaced(
        self,
        *,
        slots: Tensor | None = None,
        seeds: tuple[int, ...] | None = None,
        draws: tuple[int, ...] | None = None,
        num_turns: tuple[int, ...] | None = None,
    ) -> ConversationState:
        """Return this value with the given parts exchanged."""
        return replace(
            self,
            slots=self.slots if slots is None else slots,
            seeds=self.seeds if seeds is None else seeds,
            draws=self.draws if draws is None else draws,
            num_turns=self.num_turns if num_turns is None else num_turns,
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ConversationState:
        """Return the value on ``device`` (and in ``dtype``, if given)."""
        return self.replaced(slots=self.slots.to(device=device, dtype=dtype))

    def detach(self) -> ConversationState:
        """Return the value outside of every autograd graph."""
        return self.replaced(slots=self.slots.detach())


def check_slots(slots: Tensor, shape: tuple[int, int, int], what: str = "memory") -> None:
    """Raise ``UserError`` unless ``slots`` is a finite ``[L, B, S, D]`` for a model.

    Args:
        slots: what was given.
        shape: (L, S, D) of the model.
        what: what the message calls it (a file, an argument).
    """
    num_layers, num_slots, dim = shape
    if not isinstance(slots, Tensor):
        raise UserError(
            f"{what}: expected a tensor [{num_layers}, B, {num_slots}, {dim}], got "
            f"{type(slots).__name__}."
        )
    given = tuple(slots.shape)
    if len(given) != 4 or (given[0], *given[2:]) != shape or given[1] < 1:
        raise UserError(
            f"{what} has shape {list(given)}, but this model's is [{num_layers} layers, "
            f"conversations, {num_slots} slots, {dim} wide]: it was made by another model."
        )
    if not slots.is_floating_point():
        raise UserError(f"{what} has dtype {slots.dtype}; expected a floating-point tensor.")
    if not bool(torch.isfinite(slots).all()):
        count = int((~torch.isfinite(slots)).sum())
        raise UserError(
            f"{what} has {count} values that are not finite: it is damaged; use an earlier state."
        )
