"""What a reader of a session is told while a turn goes on. Not here: sessions (``session``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rxlm.rxt.answer_row import StopReason
from rxlm.rxt.held import WrittenTurn
from rxlm.rxt.tools import ToolResult


@dataclass(frozen=True)
class TextDelta:
    """A piece of the answer: complete characters only."""

    text: str


@dataclass(frozen=True)
class ThinkDelta:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of a tool call (JSON, see :mod:`rxlm.rxt.tools`)."""

    text: str


@dataclass(frozen=True)
class TurnEnd:
    """The answer is complete: ended by the model, cut by length, or stopped.

    ``think`` and ``tool_call``: what a model that thinks said beside the answer, if it did.
    """

    reason: StopReason
    answer: str
    think: str | None = None
    tool_call: str | None = None


@dataclass(frozen=True)
class MemoryUpdated:
    """The memory holds the turn. ``write_size``: how much it changed, the norm of the difference
    over the larger of the norms before and after."""

    write_size: float


@dataclass(frozen=True)
class Stats:
    """What the turn cost. ``tokens`` were chosen in ``seconds`` of computing (waiting for the
    reader is not counted); ``memory_seconds`` is None when the update runs in the background."""

    tokens: int
    seconds: float
    tokens_per_second: float
    memory_seconds: float | None


Event = TextDelta | ThinkDelta | ToolCallDelta | TurnEnd | MemoryUpdated | Stats | ToolResult
"""What a session yields while it answers."""


DELTAS: dict[str, type[ThinkDelta] | type[TextDelta] | type[ToolCallDelta]] = {
    "think": ThinkDelta,
    "answer": TextDelta,
    "tool_call": ToolCallDelta,
}
"""The event of a piece of each part that a model says."""


def write_size(written: WrittenTurn) -> float:
    """Return how much a turn of one conversation changed its memory: 0 not at all, 1 (about)
    altogether."""
    return write_sizes(written.before.slots, written.after.slots)[0]


def write_sizes(before: Tensor, after: Tensor) -> list[float]:
    """Return how much B memories ``[L, B, S, D]`` changed, see :func:`write_size`."""
    after = after.float().transpose(0, 1).flatten(1)
    before = before.to(after.device).float().transpose(0, 1).flatten(1)
    length = torch.linalg.vector_norm
    larger = torch.maximum(length(before, dim=1), length(after, dim=1))
    changed = length(after - before, dim=1)
    return torch.where(larger > 0, changed / larger, 0.0).tolist()
