"""T5: the reward, its floors and its ceiling, with contestants whose scores are known."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from rxlm.data import DialogueGenerator
from rxlm.evaluation.reward import RewardSettings, mean_embeddings, rewards, update_running
from rxlm.evaluation.suite.rewards import (
    Scored,
    fixed_answers,
    hold,
    reward_conversations,
    reward_rows,
    run_rewards,
    summarise_rewards,
)
from rxlm.evaluation.suite.settings import RewardTestSettings
from rxlm.tokenization import Tokenizer

SETTINGS = RewardTestSettings(steps=4, conversations=6, sources=("builtin", "files"))
SOURCES = reward_conversations(None, SETTINGS, (0, 1), lambda turns: True)


def embedding(tokenizer: Tokenizer) -> torch.Tensor:
    """Return embeddings that are almost at right angles."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokenizer.vocab_size, 64, generator=generator)


def mean(items: list[Scored], actor: str) -> float:
    """Return the mean reward of an actor."""
    values = [value for item in items if item.actor == actor for value in item.rewards]
    return sum(values) / len(values)


def test_parts_of_the_reward_by_hand() -> None:
    """Catches factors that are mixed up, and a cosine with the wrong text."""
    table = torch.eye(8)
    only = {"bleu_factor": 0.0, "cos_factor": 0.0, "len_factor": 0.0}

    def of(**factor: float) -> float:
        settings = RewardSettings(**{**only, **factor}, scale=10)
        return float(rewards([[1, 2]], [[1, 2, 3, 4]], [[1, 2]], None, table, settings)[0])

    assert of(len_factor=1.0) == pytest.approx(5.0)
    # With the reference 1/2 (two of four directions) over sqrt(2)/2, with the turn before 1.
    assert of(cos_factor=1.0) == pytest.approx(10 * (0.5 * 2**-0.5 + 0.5), rel=1e-5)
    # BLEU-2: all n-grams match both; against the longer reference the brevity penalty is 1/e.
    assert of(bleu_factor=1.0) == pytest.approx(10 * (0.5 * 2.718281828**-1 + 0.5), rel=1e-4)


def test_the_running_mean_counts_from_the_second_step() -> None:
    """Catches a running mean that holds the newest interaction only."""
    table = torch.eye(4)
    first = update_running(None, mean_embeddings([[0]], table), 0.2)
    second = update_running(first, mean_embeddings([[1]], table), 0.2)
    assert second[0].tolist() == pytest.approx([0.8, 0.2, 0.0, 0.0])
    settings = RewardSettings(bleu_factor=0, cos_factor=1, len_factor=0, scale=1)
    found = float(rewards([[0]], [[2]], [[3]], second, table, settings)[0])
    assert found == pytest.approx(0.2 * 0.8 / (0.8**2 + 0.2**2) ** 0.5, rel=1e-5)


def test_an_oracle_reaches_the_ceiling_and_a_parrot_the_floor(
    known: ModuleType, tokenizer: Tokenizer
) -> None:
    """Catches a conversation that goes on from the wrong answers, and floors above the ceiling."""
    every = [item for part in SOURCES["builtin"] for item in part]
    contestants = [known.Oracle(("M",), every), known.Parrot(("Z",))]
    items = run_rewards(contestants, tokenizer, embedding(tokenizer), SOURCES, (0, 1))
    assert mean(items, "M") == pytest.approx(mean(items, "ceiling"))
    assert mean(items, "ceiling") > mean(items, "copy") and mean(items, "ceiling") > mean(
        items, "other"
    )
    # At the first step the parrot says what the floor says; later it is stuck with that.
    rows = reward_rows(items)
    first = {row["actor"]: row["reward"] for row in rows if (row["step"], row["seed"]) == (1, 0)}
    assert first["Z"] == pytest.approx(first["copy"])
    found = {item["name"]: item for item in summarise_rewards(items)}
    assert found["builtin_M_minus_Z"]["value"] == pytest.approx(mean(items, "M") - mean(items, "Z"))
    assert found["builtin_M_minus_Z"]["passed"] is True
    assert found["builtin_M"]["low"] <= found["builtin_M"]["value"] <= found["builtin_M"]["high"]


def test_a_conversation_goes_on_from_its_own_answers(known: ModuleType) -> None:
    """Catches a history of reference answers: then nothing is held by the model itself."""
    part = SOURCES["builtin"][0]
    said = hold(known.Parrot(("M",)), "M", part)
    assert said == [[item.interactions[0].answer for item in part]] * SETTINGS.steps
    fixed = fixed_answers(part)
    assert fixed["other"][0][0] == part[1].interactions[1].answer
    assert fixed["copy"][1][0] == part[0].interactions[1].answer


def test_conversations_are_new_for_each_seed_and_long_enough() -> None:
    """Catches seeds that share conversations, and a source of files without a folder."""
    assert list(SOURCES) == ["builtin"]
    one, two = SOURCES["builtin"]
    assert not {item.id for item in one} & {item.id for item in two}
    assert all(len(item) == 5 for item in one)
    assert DialogueGenerator().conversation(0, 5, "test") == one[0]
