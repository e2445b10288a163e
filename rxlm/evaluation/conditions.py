"""The controls: what a decoder is given to read in place of its conversation's memory.

What a model still gets right under a control, it did not remember. No torch at import.

Shapes: B conversations, S slots, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from rxlm.rxt.conversation import ConversationState

Condition = Literal["memory", "zeroed", "reset", "swapped"]
"""``memory``: that of the conversation; ``zeroed``: slots of zeros; ``reset``: the initial memory,
as if the conversation had just begun; ``swapped``: the memory of the next conversation. A state
that the decoder carries is the conversation's, none, none, and that of the next conversation."""


def memory_to_read(condition: Condition, own: Tensor, other: Tensor, initial: Tensor) -> Tensor:
    """Return what the decoder reads under ``condition``.

    Args:
        condition: which of the three, or zeros.
        own: memories of B conversations, ``[..., B, S, D]``.
        other: for each of them, the memory of another conversation at the same turn; as ``own``.
        initial: their initial memories, broadcastable to ``own``.
    """
    if condition == "memory":
        return own
    if condition == "swapped":
        return other
    return own.new_zeros(own.shape) if condition == "zeroed" else initial.expand_as(own)


def state_to_read(
    condition: Condition,
    own: ConversationState,
    other: ConversationState,
    initial: ConversationState,
) -> ConversationState:
    """Return the conversations that are answered from under ``condition``.

    Args:
        condition: as for :func:`memory_to_read`.
        own: B conversations.
        other: for each of them another one.
        initial: B conversations before their first turn.
    """
    slots = memory_to_read(condition, own.slots, other.slots, initial.slots)
    carrying = {"memory": own, "swapped": other}.get(condition, initial)
    return own.replaced(slots=slots, carried=carrying.carried)
