"""Sampled episodes as numbers for the loss and for the log. Pure functions.

Shapes: B dialogues, G conversations of each, N turns, P places (``n * B * G + b * G + g``), M
target tokens of a bucket.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rxlm.training.objectives.episode_rewards import PARTS, advantages
from rxlm.training.objectives.episodes import Dialogue, Episode


class SaidByPlace(NamedTuple):
    """Of each flat place ``[P]``: the advantage of what was said there, and the log-probabilities
    of its tokens when it was sampled (0 and none where nothing was)."""

    advantages: list[float]
    log_probs: list[list[float]]


def clipped_gain(
    log_probs: Tensor, old: Tensor, advantages: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Return PPO's clipped objective of each token, to be raised, and where it is clipped.

    Args:
        log_probs: of the tokens now, ``[M]``, with a graph.
        old: when they were sampled, ``[M]``.
        advantages: of their answers, ``[M]``.
        clip: largest change of a ratio that counts.
    """
    ratio = (log_probs - old).exp()
    free = ratio * advantages
    held = ratio.clamp(1.0 - clip, 1.0 + clip) * advantages
    return torch.minimum(free, held), (held < free)


def episode_metrics(
    dialogues: Sequence[Dialogue], episodes: Sequence[Episode]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return metrics of what was said, and the weights of those that are no mean over answers.

    ``reward`` and its parts; ``reward_turn_<n>``, n from 1; ``accuracy``: share of the questions
    answered word for word (NaN without questions); ``answer_length`` in tokens.
    """
    said = [item for episode in episodes for turn in episode.said for item in turn]
    metrics: dict[str, Any] = {
        "reward": _mean([item.parts["reward"] for item in said]),
        **{f"reward_{part}": _mean([item.parts[part] for item in said]) for part in PARTS},
        "answer_length": _mean([len(item.ids) for item in said]),
    }
    asked = [
        item.parts["exact"]
        for dialogue, episode in zip(dialogues, episodes, strict=True)
        for turn, group in zip(dialogue.turns, episode.said, strict=True)
        if turn.is_question
        for item in group
    ]
    metrics["accuracy"] = _mean(asked)
    weights: dict[str, float] = {"accuracy": len(asked)}
    for n in range(max(len(episode.said) for episode in episodes)):
        here = [
            item.parts["reward"]
            for episode in episodes
            if n < len(episode.said)
            for item in episode.said[n]
        ]
        metrics[f"reward_turn_{n + 1}"] = _mean(here)
        weights[f"reward_turn_{n + 1}"] = len(here)
    return metrics, weights


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def places_of(dialogues: Sequence[Dialogue], group: int) -> list[list[list[int]]]:
    """Return the flat place of every answer: ``places[b][n][g]``."""
    count = len(dialogues) * group
    return [
        [
            [(n + item.offset) * count + b * group + g for g in range(group)]
            for n in range(len(item.turns))
        ]
        for b, item in enumerate(dialogues)
    ]


def said_by_place(
    dialogues: Sequence[Dialogue],
    episodes: Sequence[Episode],
    discount: float,
    normalise_advantage: bool,
) -> SaidByPlace:
    """Return advantages and log-probabilities where the rows of a batch look for them.

    Args:
        dialogues: B of them.
        episodes: one of each, whose log-probabilities are known.
        discount: of later rewards.
        normalise_advantage: see :func:`~rxlm.training.objectives.episode_rewards.advantages`.
    """
    group = len(episodes[0].said[0])
    places = places_of(dialogues, group)
    num_places = len(dialogues) * group * max(len(item.turns) + item.offset for item in dialogues)
    found = SaidByPlace([0.0] * num_places, [[] for _ in range(num_places)])
    for b, episode in enumerate(episodes):
        worth = advantages(episode.returns(discount), normalise=normalise_advantage).tolist()
        for n, turn in enumerate(episode.said):
            for g, said in enumerate(turn):
                found.advantages[places[b][n][g]] = worth[n][g]
                found.log_probs[places[b][n][g]] = said.log_probs or []
    return found
