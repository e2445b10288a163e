"""What a run measures of itself beside its loss: the settings and the values. No torch.

How it is measured is in :mod:`rxlm.training.watching`.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

from pydantic import Field

from rxlm.configuration import Config


class WatchSettings(Config):
    """Measurements beside the loss. None of them changes a trained weight by a bit."""

    mfu: bool = True
    """Log ``mfu``, the share of the device's measured peak that the model's operations make up."""
    memory_dialogues: int = Field(default=8, ge=0)
    """Validation dialogues on which the loss by turn and the use of the memory are measured;
    0 = none. Stage ``lm`` has neither turns nor a memory and does not read it."""
    sample_dialogues: int = Field(default=2, ge=0)
    """Validation dialogues that the model holds itself (beginnings of rows that a language model
    goes on with), written to ``samples.jsonl``; 0 = none."""
    sample_turns: int = Field(default=4, gt=0)
    """Turns of such a dialogue (at most)."""
    sample_tokens: int = Field(default=32, gt=0)
    """Tokens of an answer in such a dialogue (at most)."""


class SampleTurn(TypedDict):
    """A turn: the question, the reference answer, and what the model said."""

    query: str
    expected: str
    answer: str


Sample = list[SampleTurn]
"""A conversation that the model held."""


class Watched(NamedTuple):
    """What is measured at a validation beside its metrics, and what the model said."""

    metrics: dict[str, float]
    samples: list[Sample]
