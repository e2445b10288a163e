"""Stage 3, SFT on interactions: joint LM training in which only answers are predicted.

The answer begins with [A] and ends with [EOS], and the model learns both: that an answer begins,
and that it ends. Everything else is :mod:`rxlm.training.objectives.joint_lm`; the encoder still
restores hidden tokens of the whole turn.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rxlm.training.objectives.joint_lm import JointLMObjective, JointLMSettings


class SFTSettings(JointLMSettings):
    """Settings of SFT; as joint LM, with a context that cannot leak the answer."""

    turns: int = Field(default=8, gt=0)
    """Turns of a dialogue window (at most)."""
    dialogues: int = Field(default=8, gt=0)
    """Dialogues in a batch."""
    context: Literal["same", "previous"] = "previous"
    """What the decoder reads: the encoder's states of all earlier turns of the window (and its
    system prompt), as later from memory; or, as in the RxLM reference, of the same turn, which
    contains the answer, so that accuracies near one mean nothing."""


class SFTObjective(JointLMObjective):
    """Masked LM of turns plus LM of their answers ([A] up to and including [EOS])."""

    name = "sft"
    answers_only = True
