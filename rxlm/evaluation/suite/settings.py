"""How much the suite asks. No torch."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, PositiveInt, field_validator

from rxlm.configuration import Config
from rxlm.data.generator import GeneratorConfig

TestName = Literal["facts", "babi", "dialogues", "cost", "reward", "slots"]
TEST_NAMES: tuple[TestName, ...] = get_args(TestName)
TEST_TITLES: dict[str, str] = {
    "facts": "T1 Facts over turns",
    "babi": "T2 bAbI over turns",
    "dialogues": "T3 Perplexity of real dialogues",
    "cost": "T4 Cost per turn",
    "reward": "T5 Reward score",
    "slots": "T6 Use of the slots",
}


class FactsSettings(Config):
    """T1: what is asked of the built-in dialogues."""

    distances: tuple[PositiveInt, ...] = (1, 2, 4, 8, 16)
    """Turns between telling a fact and asking for it; 1 = the previous turn."""
    facts: tuple[PositiveInt, ...] = (1, 2, 4, 8)
    """Facts held when the question comes; together with ``distances`` the main test."""
    long_distances: tuple[PositiveInt, ...] = (24, 36, 64)
    """Distances beyond what was trained (the recipes train on at most 12 turns)."""
    long_facts: tuple[PositiveInt, ...] = (1, 4)
    """Facts held there."""
    side_distances: tuple[PositiveInt, ...] = (1, 4, 8)
    """Distances of all other tests: changed facts, facts never told, other novelty."""
    side_facts: PositiveInt = 4
    """Facts held in those."""
    together: tuple[PositiveInt, ...] = (2, 4)
    """Facts told in the one sentence that tells the one asked for."""
    capacity_facts: tuple[PositiveInt, ...] = (12,)
    """More numbers of facts, at ``capacity_distance`` only: where does it break down?"""
    capacity_distance: PositiveInt = 8
    """A distance of ``distances``."""
    dialogues: int = Field(default=100, ge=2)
    """Dialogues of a cell and seed."""
    generator: GeneratorConfig = GeneratorConfig()
    """The built-in dialogues; ``held_out_values`` must be that of the training."""


class BabiSettings(Config):
    """T2: questions of bAbI, their facts told turns before."""

    tasks: tuple[str, ...] = ("qa1", "qa2", "qa3", "qa6", "qa7", "qa8", "qa9", "qa11", "qa15")
    """Which of the twenty tasks."""
    questions: PositiveInt = 60
    """Questions of a task and seed, no conversation asked twice (fewer where a task has fewer)."""


class DialogueSettings(Config):
    """T3: perplexity of the answers in real dialogues."""

    sources: tuple[str, ...] = ("sgd", "synthetic_persona_chat", "topical_chat")
    """Files ``NAME.valid.jsonl.gz`` of the data folder."""
    conversations: PositiveInt = 50
    """Conversations of a source and seed."""
    max_turns: PositiveInt = 12
    """At most so many turns of each, the first ones."""
    min_tokens: PositiveInt = 200
    """Turns with fewer tokens are shown and not judged."""


class CostSettings(Config):
    """T4: time and state of a turn."""

    turns: tuple[PositiveInt, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Which turns are measured; all before them are held, too."""
    query_tokens: PositiveInt = 16
    """Tokens of every query."""
    answer_tokens: PositiveInt = 16
    """Tokens of every answer."""
    rounds: PositiveInt = 15
    """Repetitions, turn by turn and model by model in each; medians are reported."""


class RewardTestSettings(Config):
    """T5: the reward of answers in conversations that a model holds by itself."""

    steps: PositiveInt = 8
    """Interactions after the first one, which is given."""
    conversations: int = Field(default=24, ge=2)
    """Conversations of a source and seed."""
    sources: tuple[str, ...] = ("builtin", "synthetic_persona_chat")
    """``builtin``, or files of the data folder."""


class SlotsSettings(Config):
    """T6: are the slots used?"""

    facts: PositiveInt = 4
    """Facts held when the question comes."""
    distance: PositiveInt = 4
    """Turns since the fact was told."""
    dialogues: int = Field(default=60, ge=2)
    """Dialogues of a seed that are answered with slots deleted."""
    probe_kind: str = "colour"
    """Kind of fact whose value a linear probe reads from the slots."""
    probe_train: PositiveInt = 600
    """Dialogues that the probe learns from, for each seed."""
    probe_test: PositiveInt = 100
    """Dialogues that probe and decoder are asked about, for each seed."""


class SuiteSettings(Config):
    """What to ask, how often, and of whom."""

    tests: tuple[TestName, ...] = TEST_NAMES
    """Which tests."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each is another set of test questions."""
    max_answer_tokens: PositiveInt = 24
    """Longer answers are cut."""
    batch_size: PositiveInt = 100
    """Conversations computed at once; changes no result."""
    facts: FactsSettings = FactsSettings()
    """T1."""
    babi: BabiSettings = BabiSettings()
    """T2."""
    dialogues: DialogueSettings = DialogueSettings()
    """T3."""
    cost: CostSettings = CostSettings()
    """T4."""
    reward: RewardTestSettings = RewardTestSettings()
    """T5."""
    slots: SlotsSettings = SlotsSettings()
    """T6."""

    @field_validator("tests", "seeds")
    @classmethod
    def _each_once(cls, value: tuple[object, ...]) -> tuple[object, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError(f"{list(value)}: give at least one, each once")
        return value

    @classmethod
    def quick(cls) -> SuiteSettings:
        """Return settings for a look in under a minute; nothing to be quoted."""
        return cls(
            seeds=(0,),
            facts=FactsSettings(
                distances=(1, 4, 8),
                facts=(1, 4, 8),
                long_distances=(24,),
                long_facts=(1,),
                side_distances=(4,),
                together=(2,),
                capacity_facts=(),
                dialogues=24,
            ),
            babi=BabiSettings(questions=12),
            dialogues=DialogueSettings(conversations=12),
            cost=CostSettings(turns=(1, 4, 16, 64), rounds=5),
            reward=RewardTestSettings(conversations=6),
            slots=SlotsSettings(dialogues=16, probe_train=200, probe_test=40),
        )
