"""What an answer is worth: each part by itself, against NLTK and by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rxlm.evaluation.reward import mean_embeddings, update_running
from rxlm.ops.sampling import SamplingSettings
from rxlm.training.objectives.episode_rewards import (
    Compared,
    RewardSettings,
    rewards,
)
from rxlm.training.objectives.episodes import EpisodeSettings, encode_dialogue
from rxlm.training.objectives.reward_floors import reward_floors

EMBEDDING = torch.eye(8)


def compared(
    reference: list[int], previous: tuple[int, ...] = (), earlier: Any = None, right: bool = False
) -> Compared:
    return Compared(reference, list(previous), earlier, is_question=True, is_right=right)


def one(answer: list[int], item: Compared, **values: Any) -> dict[str, float]:
    (found,) = rewards([answer], [item], EMBEDDING, RewardSettings(**values))
    return found


def test_bleu_is_that_of_nltk() -> None:
    """Catches other orders, another smoothing, and candidate and reference exchanged."""
    bleu_score = pytest.importorskip("nltk.translate.bleu_score")
    smooth = bleu_score.SmoothingFunction().method4
    cases = [([1, 2, 3, 4], [1, 2, 3]), ([1, 2], [1, 2, 3, 4]), ([5, 1, 2], [1, 2, 6, 7])]
    answers = [answer for answer, _ in cases]
    items = [compared(reference) for _, reference in cases]
    found = rewards(answers, items, EMBEDDING, RewardSettings())
    for (answer, reference), parts in zip(cases, found, strict=True):
        wanted = bleu_score.sentence_bleu(
            [reference], answer, weights=(0.5, 0.5), smoothing_function=smooth
        )
        assert parts["bleu"] == pytest.approx(wanted, abs=1e-6)


def test_shares_of_what_is_not_there_go_to_the_reference() -> None:
    """Catches a first turn that can never get the whole reward."""
    first = one([1, 2], compared([1, 2]))
    assert first["bleu"] == pytest.approx(1.0)
    assert first["cosine"] == pytest.approx(1.0)
    second = one([1, 2], compared([1, 2], (3, 4)))
    assert second["cosine"] == pytest.approx(0.5)
    third = one([1, 2], compared([1, 2], (3, 4), EMBEDDING[1]))
    assert third["cosine"] == pytest.approx(0.3 + 0.2 * math.sqrt(0.5))


def test_copying_is_paid_for_by_previous_only() -> None:
    """Catches documentation that promises a floor which the code does not have."""
    item = compared([1, 2], (3, 4))
    assert one([3, 4], item)["reward"] > one([5, 6], item)["reward"]
    assert one([3, 4], item, previous=0, earlier=0)["cosine"] == 0.0


def test_length_and_exact() -> None:
    """Catches a length term that prefers long answers, and an exact part without a question."""
    assert one([1, 2], compared([1, 2, 3, 4]))["length"] == 0.5
    assert one([1] * 8, compared([1, 2, 3, 4]))["length"] == 0.5
    assert one([1], compared([1], right=True))["exact"] == 1.0
    no_question = compared([1], right=True)._replace(is_question=False)
    assert one([1], no_question)["exact"] == 0.0


def test_the_reward_is_the_weighted_sum_and_empty_answers_get_little() -> None:
    """Catches NaN for an answer without a token, which ends training."""
    weights = {"bleu": 0.3, "cosine": 0.2, "length": 0.4, "exact": 2.0}
    parts = one([1, 2], compared([1, 2], right=True), **weights)
    assert parts["reward"] == pytest.approx(sum(weights.values()))
    empty = one([], compared([1, 2]), **weights)
    assert empty["reward"] == 0.0


def test_neighbours_do_not_change_a_reward() -> None:
    """Catches padding that counts as a token in BLEU or in a mean."""
    item = compared([1, 2, 3], (4, 5), EMBEDDING[6])
    alone = one([1, 2, 5], item)
    rows = [([1, 2, 5], item), ([1] * 9, compared([2] * 12, (3,) * 15))]
    both = rewards([row[0] for row in rows], [row[1] for row in rows], EMBEDDING, RewardSettings())
    assert both[0] == pytest.approx(alone)


def test_means() -> None:
    """Catches a running mean that forgets the old turns, or never takes in new ones."""
    mean = mean_embeddings([[1, 1, 2], []], EMBEDDING)
    torch.testing.assert_close(mean[0], (2 * EMBEDDING[1] + EMBEDDING[2]) / 3)
    assert not mean[1].any()
    assert torch.equal(update_running(None, mean[0], 0.2), mean[0])
    torch.testing.assert_close(update_running(mean[0], EMBEDDING[3], 0.25)[3], torch.tensor(0.25))


def test_floors_and_ceiling(tiny: Any) -> None:
    """Catches a ceiling that is none: right answers that are not worth all there is to get."""
    model = tiny.model()
    dialogues = [
        encode_dialogue(tiny.source().sample(position, 4), position, tiny.turns)
        for position in range(3)
    ]
    weights = RewardSettings(bleu=1, cosine=1, length=1, previous=0, earlier=0)
    settings = EpisodeSettings(1, SamplingSettings(temperature=0.0), 4, "own", weights, 0)
    found = reward_floors(model, dialogues, model.encoder.embedding.weight.detach(), settings)
    assert found["reward_of_reference"] == pytest.approx(3.0, abs=1e-5)
    for name in ("reward_of_other", "reward_of_copying", "reward_zeroed"):
        assert 0 < found[name] < 2.5, name
