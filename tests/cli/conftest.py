"""A pipeline of all five nano stages, two steps each, that the tests of the verbs share."""

from __future__ import annotations

from pathlib import Path

import pytest

from rxlm.cli.main import main

NANO = Path(__file__).parents[2] / "stages" / "nano"
MICRO = (
    "train.steps=2",
    "train.validate_every=2",
    "train.tensorboard=false",
    "model.decoder.embed_dim=16",
    "model.decoder.ff_dim=16",
    "model.decoder.stm_size=4",
    "model.decoder.seq_len=96",
    "tokenizer.vocab_size=400",
    "tokenizer.objective.dialogues=40",
    "joint_lm.objective.dialogues=2",
    "joint_lm.objective.validation_dialogues=2",
    "sft.objective.dialogues=2",
    "sft.objective.validation_dialogues=2",
    "memory_pretraining.objective.dialogues=2",
    "memory_pretraining.objective.validation_dialogues=2",
    "memory_aware.objective.validation_dialogues=2",
    "memory_aware.objective.phases=[{turns: 2, dialogues: 2, reads: history, steps: 1}, "
    "{turns: 3, dialogues: 2}]",
    "evaluation.recall={dialogues: 2, seeds: [0], distances: [1], facts: [1], unseen: [pairs], "
    "update_distances: [], unknown_distances: [], max_answer_tokens: 4}",
    "evaluation.perplexity={max_dialogues: 2, max_turns: 3}",
)


@pytest.fixture(scope="session")
def micro_overrides() -> tuple[str, ...]:
    """Overrides that make every nano stage a matter of milliseconds."""
    return MICRO


@pytest.fixture(scope="session")
def nano() -> Path:
    """The folder of the nano recipes."""
    return NANO


@pytest.fixture(scope="session")
def micro_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pipeline with its report; not to be changed by tests."""
    out = tmp_path_factory.mktemp("micro") / "runs"
    assert main(["pipeline", "run", str(NANO), *MICRO, "--out", str(out)]) == 0
    return out
