"""What a sampled answer is worth: BLEU, cosine, length and exact match. Pure functions.

    bleu     (1 - p) BLEU(answer, reference) + p BLEU(answer, previous turn)
    cosine   (1 - p - q) cos(answer, reference) + p cos(answer, previous turn)
             + q cos(answer, running mean of the turns before that)
    length   1 - |n - n_reference| / max(n, n_reference)
    exact    1 where a question is answered word for word, else 0
    reward   sum of the parts, each times its weight

``p`` and ``q`` are ``previous`` and ``earlier``; what is not there yet (the first turn has no
previous one) leaves its share to the reference. BLEU is of token ids, the cosine is of means of
token embeddings, and a turn is its query and its answer. (After the memory reinforcement stage of
RxT, arXiv 2510.03561; the length term is our own.)

**This reward does not measure memory.** A fluent answer on the topic that recalls nothing scores
well, and with ``previous`` > 0 repeating the turn before is paid for. Read it beside its floors
(:class:`Floors`); ``exact`` is the part that a memory is needed for.

Shapes: R answers, T tokens of the longest, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rxlm.configuration import Config
from rxlm.evaluation.reward import mean_embeddings
from rxlm.ops.bleu import sentence_bleu
from rxlm.ops.padding import padded

PARTS = ("bleu", "cosine", "length", "exact")


class RewardSettings(Config):
    """Weights of the parts of the reward, and what an answer is compared with."""

    bleu: float = Field(default=0.4, ge=0)
    """Weight of BLEU."""
    cosine: float = Field(default=0.5, ge=0)
    """Weight of the cosine of mean token embeddings (those of the frozen reference policy)."""
    length: float = Field(default=0.1, ge=0)
    """Weight of being as long as the reference answer."""
    exact: float = Field(default=0.0, ge=0)
    """Weight of answering a question of the built-in dialogues word for word."""
    previous: float = Field(default=0.5, ge=0, le=1)
    """Share of BLEU and cosine that compares with the previous turn, not with the reference
    answer. It pays for repeating that turn: 0 where answers are right or wrong."""
    earlier: float = Field(default=0.2, ge=0, le=1)
    """Share of the cosine that compares with the running mean of still earlier turns."""
    decay: float = Field(default=0.2, gt=0, le=1)
    """How much the newest of those turns counts in that mean."""
    bleu_weights: tuple[float, ...] = (0.5, 0.5)
    """Weights of the orders of n-grams; smoothing is NLTK's method4."""

    @model_validator(mode="after")
    def _check(self) -> RewardSettings:
        if self.previous + self.earlier > 1:
            raise ValueError(
                f"previous + earlier = {self.previous + self.earlier:g}, expected at most 1 (the "
                "rest compares with the reference answer): lower one of them"
            )
        if not any(getattr(self, part) for part in PARTS):
            raise ValueError(
                f"every weight of {', '.join(PARTS)} is 0, so nothing is rewarded: raise one"
            )
        if not self.bleu_weights or min(self.bleu_weights) < 0 or sum(self.bleu_weights) == 0:
            raise ValueError(
                f"bleu_weights={list(self.bleu_weights)}: expected one weight for each order of "
                "n-grams, such as [0.5, 0.5]"
            )
        return self


class Compared(NamedTuple):
    """What one answer is compared with, as token ids without special tokens.

    ``reference``: the right answer; ``previous``: query and answer of the turn before, empty for
    the first turn; ``earlier``: mean embedding ``[D]`` of the turns before that, or None;
    ``is_question``: whether the exact part counts; ``is_right``: whether the answer is the
    reference word for word.
    """

    reference: Sequence[int]
    previous: Sequence[int]
    earlier: Tensor | None
    is_question: bool
    is_right: bool


def rewards(
    answers: Sequence[Sequence[int]],
    compared: Sequence[Compared],
    embedding: Tensor,
    settings: RewardSettings,
) -> list[dict[str, float]]:
    """Return the parts of each answer's reward, unweighted, and ``reward``, their weighted sum.

    Args:
        answers: R lists of ids without special tokens, also empty ones.
        compared: what each is compared with.
        embedding: of tokens, ``[V, D]``.
        settings: the weights.
    """
    parts = {
        "bleu": _bleu(answers, compared, settings) if settings.bleu else [0.0] * len(answers),
        "cosine": (
            _cosine(answers, compared, embedding, settings)
            if settings.cosine
            else [0.0] * len(answers)
        ),
        "length": [
            1.0 - abs(len(ids) - len(item.reference)) / max(len(ids), len(item.reference), 1)
            for ids, item in zip(answers, compared, strict=True)
        ],
        "exact": [float(item.is_question and item.is_right) for item in compared],
    }
    scored = [{part: parts[part][row] for part in PARTS} for row in range(len(answers))]
    return [{**row, "reward": weighted(row, settings)} for row in scored]


def weighted(parts: Mapping[str, float], settings: RewardSettings) -> float:
    """Return the reward of its parts."""
    return sum(getattr(settings, part) * parts[part] for part in PARTS)


def advantages(returns: Tensor, *, normalise: bool) -> Tensor:
    """Return how much better than its group each answer is.

    Args:
        returns: ``[..., G]``, of G answers to the same question.
        normalise: divide by the standard deviation of the group (Shao et al. 2024, arXiv
            2402.03300); else the mean is taken off and nothing more (Liu et al. 2025, arXiv
            2503.20783). A group whose answers are all worth the same teaches nothing either way.
    """
    centred = returns - returns.mean(dim=-1, keepdim=True)
    if not normalise:
        return centred
    # A spread that is rounding error must not be blown up to one.
    return centred / (returns.std(dim=-1, correction=0, keepdim=True) + 1e-4)


def _bleu(
    answers: Sequence[Sequence[int]], compared: Sequence[Compared], settings: RewardSettings
) -> list[float]:
    share = [settings.previous if item.previous else 0.0 for item in compared]
    with_reference = _sentence_bleu(answers, [item.reference for item in compared], settings)
    # A turn without a previous one is compared with the reference again, for nothing.
    others = [item.previous or item.reference for item in compared]
    with_previous = (
        _sentence_bleu(answers, others, settings) if any(share) else [0.0] * len(answers)
    )
    return [
        (1 - p) * reference + p * previous
        for p, reference, previous in zip(share, with_reference, with_previous, strict=True)
    ]


def _sentence_bleu(
    answers: Sequence[Sequence[int]], references: Sequence[Sequence[int]], settings: RewardSettings
) -> list[float]:
    ids, mask = padded([list(text) for text in answers], 0)
    other, other_mask = padded([list(text) for text in references], 0)
    scores = sentence_bleu(
        ids, other, mask, other_mask, weights=settings.bleu_weights, smoothing="method4"
    )
    return [float(score) for score in scores.clamp(0.0, 1.0)]


def _cosine(
    answers: Sequence[Sequence[int]],
    compared: Sequence[Compared],
    embedding: Tensor,
    settings: RewardSettings,
) -> list[float]:
    own = mean_embeddings(answers, embedding)
    reference = mean_embeddings([item.reference for item in compared], embedding)
    previous = mean_embeddings([item.previous for item in compared], embedding)
    zero = torch.zeros_like(own[0])
    earlier = torch.stack([zero if item.earlier is None else item.earlier for item in compared])
    similar = [
        torch.nn.functional.cosine_similarity(own, other, dim=-1).tolist()
        for other in (reference, previous, earlier)
    ]
    scores = []
    for item, right, before, long_ago in zip(compared, *similar, strict=True):
        p = settings.previous if item.previous else 0.0
        q = settings.earlier if item.earlier is not None else 0.0
        scores.append((1 - p - q) * right + p * before + q * long_ago)
    return scores
