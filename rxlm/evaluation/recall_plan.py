"""What the recall test asks: its settings, its cells, and the dialogues of a cell. No torch.

A cell is one kind of question at one distance with one number of facts; ``recall`` runs it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field, PositiveInt, model_validator

from rxlm.configuration import Config
from rxlm.data.conversations import Conversation
from rxlm.data.generator import DialogueGenerator, GeneratorConfig
from rxlm.evaluation.conditions import Condition

Test = Literal["recall", "update", "unknown"]
Unseen = Literal["none", "pairs", "templates", "words"]
History = Literal["reference", "own"]
SEED_STRIDE = 1_200_000
"""Dialogues of seed s are numbers ``s * SEED_STRIDE ...``. A multiple of the number of fact kinds,
which take turns over the numbers, so every seed asks for the same kinds equally often."""


class RecallSettings(Config):
    """What to ask, how often, and under which controls."""

    distances: tuple[PositiveInt, ...] = (1, 2, 4, 8, 16)
    """Turns between telling a fact and asking for it; 1 = the previous turn."""
    facts: tuple[PositiveInt, ...] = (1, 2, 4)
    """Facts held when the question comes. The tests beside the main one use the largest."""
    unseen: tuple[Unseen, ...] = ("pairs", "none", "templates", "words")
    """What is new to the model: ``pairs``: it never met this value for this kind of fact (the main
    test); ``none``: nothing but the dialogue; ``templates``: the wording of fact and question;
    ``words``: the value is a made-up word."""
    update_distances: tuple[PositiveInt, ...] = (1, 4, 8)
    """Turns since a fact was changed; ``()`` leaves the test of updates out."""
    unknown_distances: tuple[PositiveInt, ...] = (1, 4, 8)
    """Turns since the last fact was told, when another one is asked for that never was."""
    dialogues: int = Field(default=100, ge=2, le=SEED_STRIDE)
    """Dialogues of a cell and seed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each is another set of test dialogues."""
    conditions: tuple[Condition, ...] = ("memory", "zeroed", "swapped")
    """What the decoder reads when it answers: see ``conditions``."""
    history: History = "reference"
    """What was written to memory as the answers before the question: the reference answers, or
    the model's ``own`` (a real conversation)."""
    free_running: bool = True
    """Also run the main test with the largest number of facts on the model's own answers."""
    batch_size: PositiveInt = 100
    """Dialogues computed at once; changes no result."""
    max_answer_tokens: PositiveInt = 24
    """Longer answers are cut."""
    mistakes_per_cell: int = Field(default=1, ge=0)
    """How many wrong answers of a cell and seed to keep for people to look at."""
    generator: GeneratorConfig = GeneratorConfig()
    """The built-in dialogues; ``held_out_values`` must be that of the training."""

    @model_validator(mode="after")
    def _check(self) -> RecallSettings:
        for name in ("distances", "facts", "unseen", "seeds", "conditions"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name} is empty: give at least one")
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)} holds a value twice: leave one out")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds={list(self.seeds)}: expected numbers >= 0")
        return self


class Cell(NamedTuple):
    """One set of questions of the same form."""

    test: Test
    unseen: Unseen
    distance: int
    facts: int
    history: History
    conditions: tuple[Condition, ...]

    @property
    def name(self) -> str:
        """For progress lines."""
        return f"{self.test}, distance {self.distance}, {self.facts} facts, unseen {self.unseen}"


def plan_cells(settings: RecallSettings) -> list[Cell]:
    """Return every cell that ``settings`` ask for, the main test first."""
    most, history, conditions = max(settings.facts), settings.history, settings.conditions
    cells = []
    for unseen in settings.unseen:
        is_main = unseen == settings.unseen[0]
        for facts in settings.facts if is_main else (most,):
            for distance in settings.distances:
                cells.append(Cell("recall", unseen, distance, facts, history, conditions))
    for unseen in settings.unseen:
        if unseen in ("pairs", "none"):
            for distance in settings.update_distances:
                cells.append(Cell("update", unseen, distance, most, history, conditions))
    # Of a fact never told no memory knows anything, so the controls would say nothing.
    for distance in settings.unknown_distances:
        cells.append(Cell("unknown", "none", distance, min(most, 11), history, ("memory",)))
    if settings.free_running and history != "own":
        for distance in settings.distances:
            cells.append(Cell("recall", settings.unseen[0], distance, most, "own", ("memory",)))
    return cells


def cell_dialogues(
    generator: DialogueGenerator, cell: Cell, seed: int, count: int
) -> list[Conversation]:
    """Return the dialogues of a cell; the last interaction of each is the question."""
    return [
        generator.probe(
            seed * SEED_STRIDE + number,
            kind=cell.test,
            distance=cell.distance,
            num_facts=cell.facts,
            unseen=cell.unseen,
        )
        for number in range(count)
    ]
