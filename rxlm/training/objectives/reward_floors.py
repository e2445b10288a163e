"""What a reward would be without a memory, or with a perfect answer: floors and a ceiling.

    reward_of_reference   the reference answers themselves: what can be reached
    reward_of_other       the reference answers of another dialogue, at the same turn
    reward_of_copying     the answer of the turn before (nothing at the first turn)
    reward_zeroed         the same model, answering from a memory of zeros

A reward that is not above all three floors shows no memory, however high it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rxlm.rxt.reactive import ReactiveModel
from rxlm.training.objectives.episodes import (
    Dialogue,
    EpisodeSettings,
    hold_episodes,
    score_given,
    text_ids,
)


def reward_floors(
    model: ReactiveModel,
    dialogues: Sequence[Dialogue],
    embedding: Tensor,
    settings: EpisodeSettings,
) -> dict[str, float]:
    """Return the values of this module, means over all answers.

    Args:
        model: in evaluation mode.
        dialogues: held-out ones, at consecutive positions.
        embedding: of the reward's cosine, ``[V, D]``.
        settings: of the episodes that the floors stand beside.
    """
    right = [
        [text_ids(model, turn.reference.ids[turn.reference.answer_start :]) for turn in item.turns]
        for item in dialogues
    ]
    count = len(dialogues)
    others = [
        [_turn_of(right[(b + 1) % count], n) for n in range(len(own))]
        for b, own in enumerate(right)
    ]
    before = [[[], *own[:-1]] for own in right]
    given = {"reference": right, "other": others, "copying": before}
    floors = {}
    for name, answers in given.items():
        scored = score_given(model, dialogues, answers, embedding, settings.reward)
        floors[f"reward_of_{name}"] = _mean([item["reward"] for item in scored])
    blind = hold_episodes(model, dialogues, embedding, settings._replace(zeroed=True))
    floors["reward_zeroed"] = _mean(
        [said.parts["reward"] for item in blind for turn in item.said for said in turn]
    )
    return floors


def _turn_of(answers: Sequence[list[int]], turn: int) -> list[int]:
    """Return the answer at a turn, or the last one of a dialogue that is shorter."""
    return answers[min(turn, len(answers) - 1)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
