"""What a reader of a session is told while a turn goes on. Not here: sessions (``session``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rxlm.rxt.generation import StopReason
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
    """Return how much a turn changed the memory: 0 not at all, 1 (about) altogether."""
    before, after = written.before.slots.float(), written.after.slots.float()
    larger = max(float(torch.linalg.vector_norm(before)), float(torch.linalg.vector_norm(after)))
    if larger == 0.0:
        return 0.0
    return float(torch.linalg.vector_norm(after - before.to(after.device))) / larger
