"""What the suite can test: anything that reads conversations and answers questions about them.

The suite knows models through this protocol only, so that its scores can be checked with things
whose scores are known: an oracle, a dice, a parrot. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from rxlm.data.conversations import Conversation, Interaction
from rxlm.evaluation.conditions import Condition

Turns = Sequence[Interaction]
Control = Literal["M", "Z", "X", "F", "N"]
"""M: the memory of the conversation; Z: slots of zeros; X: the memory of another conversation;
F: a language model of equal size that reads the whole history again; N: the same without it."""

CONTROLS: tuple[Control, ...] = ("M", "Z", "X", "F", "N")
CONTROL_NAMES: dict[str, str] = {
    "M": "memory",
    "Z": "memory zeroed",
    "X": "memory of another conversation",
    "F": "language model, full history",
    "N": "language model, no history",
}
CONDITION_OF: dict[Control, Condition] = {"M": "memory", "Z": "zeroed", "X": "swapped"}
"""What the decoder of a reactive model is given to read (see ``rxlm.evaluation.conditions``)."""

TokenLosses = list[list[list[float]]]
"""By conversation, turn and token: all tokens that a model says after [A], [EOS] included."""


class Contestant(Protocol):
    """Something that reads conversations and answers. It keeps nothing between calls."""

    @property
    def controls(self) -> tuple[Control, ...]:
        """What it can be measured as."""
        ...

    def fits(self, turns: Turns) -> bool:
        """Return whether it can read every one of these turns."""
        ...

    def read(self, histories: Sequence[Turns]) -> Any:
        """Return what it holds of B conversations after these turns (also none): a value."""
        ...

    def answer(self, held: Any, queries: Sequence[str], control: Control) -> list[str]:
        """Answer B queries, each after its conversation.

        Args:
            held: from :meth:`read`; unchanged.
            queries: B texts.
            control: what to answer from, one of :attr:`controls`.
        """
        ...

    def losses(self, conversations: Sequence[Conversation]) -> dict[Control, TokenLosses]:
        """Return the loss in nats of every token of every answer, by control."""
        ...
