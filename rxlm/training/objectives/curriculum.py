"""Phases of a training on dialogues: how many turns, what the decoder reads, when to go on.

A decision takes effect at the next step; batches that were built ahead for the old phase are built
again by the Trainer, because the starts are part of the objective's ``batch_state``. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Generic, Literal, TypeVar

from pydantic import Field, model_validator

from rxlm.configuration import Config

Part = Literal["encoder", "decoder", "memory_attention"]
"""A part of the model that a phase can train."""


class TurnsPhase(Config):
    """How long dialogues are, and when the next phase begins."""

    turns: int = Field(default=8, gt=0)
    """Turns of a dialogue window (at most)."""
    dialogues: int = Field(default=8, gt=0)
    """Dialogues in a batch."""
    steps: int | None = Field(default=None, gt=0)
    """Steps after which the next phase begins; None = until the end of training."""
    min_steps: int = Field(default=0, ge=0)
    """Steps before accuracy may end the phase."""
    advance_accuracy: float | None = Field(default=None, gt=0, le=1)
    """Share of exactly right answers (running mean over training batches) that ends the phase."""


class Phase(TurnsPhase):
    """One phase of memory-aware training."""

    reads: Literal["memory", "history"] = "memory"
    """What answers are read from: the memory, or the raw encoder states of all earlier turns
    (oracle warm-up: learns to encode, look up and copy before learning to write)."""
    trains: tuple[Part, ...] = ("encoder", "decoder", "memory_attention")
    """The parts that change in this phase (an order of unfreezing); the others stay as they are,
    bit for bit. The token embedding changes if encoder or decoder does."""

    @model_validator(mode="after")
    def _check_trains(self) -> Phase:
        if not self.trains or len(set(self.trains)) < len(self.trains):
            raise ValueError(f"trains={list(self.trains)}: name at least one part, each once")
        if self.reads == "history" and self.trains == ("memory_attention",):
            raise ValueError(
                "reads=history with trains=[memory_attention]: what reads the history does not "
                "use the memory, so nothing would change; use reads=memory, or train other parts"
            )
        return self


PhaseType = TypeVar("PhaseType", bound=TurnsPhase)


class Curriculum(Generic[PhaseType]):
    """Which phase each step is in. Its state is three JSON values."""

    def __init__(self, phases: tuple[PhaseType, ...]) -> None:
        self.phases = phases
        self._starts = [0]
        self._accuracy: float | None = None

    def phase(self, step: int) -> tuple[int, PhaseType]:
        """Return the index of the phase of ``step``, and the phase."""
        index = max(i for i, start in enumerate(self._starts) if start <= step)
        return index, self.phases[index]

    def observe(self, step: int, accuracy: float | None) -> bool:
        """Take note of a finished step; return whether the next step begins the next phase.

        Args:
            step: the step that was just taken.
            accuracy: share of the questions of its batch that were answered exactly; ``None``
                or NaN if there were none.
        """
        index, phase = self.phase(step)
        if accuracy is not None and not math.isnan(accuracy):
            previous = accuracy if self._accuracy is None else self._accuracy
            self._accuracy = 0.97 * previous + 0.03 * accuracy
        if index == len(self.phases) - 1:
            return False
        spent = step + 1 - self._starts[index]
        out_of_budget = phase.steps is not None and spent >= phase.steps
        good_enough = (
            phase.advance_accuracy is not None
            and spent >= phase.min_steps
            and self._accuracy is not None
            and self._accuracy >= phase.advance_accuracy
        )
        if not (out_of_budget or good_enough):
            return False
        self._starts.append(step + 1)
        self._accuracy = None
        return True

    def enter(self, index: int) -> None:
        """Begin phase ``index`` at step 0, as if those before it were over."""
        self._starts, self._accuracy = [0] * (index + 1), None

    def each_phase(self, num_steps: int) -> Iterator[int]:
        """Enter each phase in turn; yield the most steps of ``num_steps`` that it may last."""
        left = num_steps
        last = len(self.phases) - 1
        for index, phase in enumerate(self.phases):
            steps = left if index == last or phase.steps is None else min(left, phase.steps)
            if steps:
                self.enter(index)
                yield steps
            left -= steps

    @property
    def starts(self) -> list[int]:
        """First step of every phase entered so far: all that batches depend on."""
        return list(self._starts)

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` needs."""
        return {"starts": list(self._starts), "accuracy": self._accuracy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._starts = list(state["starts"])
        self._accuracy = state["accuracy"]
