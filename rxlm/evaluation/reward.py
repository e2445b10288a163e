"""The reward of an answer in a conversation: words, meaning and length, on a scale from 0 to 10.

    reward = scale * (bleu_factor * B + cos_factor * C + len_factor * L)
    B  = half BLEU-2 against the reference, half against the interaction before
    C  = cosines of mean token embeddings: with the reference, with the interaction before, and
         with a running mean over all earlier ones
    L  = length over that of the reference, at most 1

It rewards being on topic. An answer that recalls nothing, or repeats what was just said, gets a
good part of it, so it is worth nothing without its floors (``suite.rewards``). The form is that of
the Reactive Transformer's reinforcement stage (arXiv 2510.03561, section on MRL).

Shapes: B answers, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from rxlm.configuration import Config
from rxlm.ops.bleu import sentence_bleu
from rxlm.ops.padding import padded


class RewardSettings(Config):
    """Weights of the parts."""

    bleu_factor: float = Field(default=0.4, ge=0)
    """Of the common n-grams."""
    cos_factor: float = Field(default=0.5, ge=0)
    """Of the cosines."""
    len_factor: float = Field(default=0.1, ge=0)
    """Of the length."""
    scale: float = Field(default=10.0, gt=0)
    """Of the whole."""
    bleu_weights: tuple[float, ...] = (0.5, 0.5)
    """Of the orders of n-grams."""
    first_weights: tuple[float, float] = (0.5, 0.5)
    """Of the cosines with the reference and with the interaction before, at the first step."""
    later_weights: tuple[float, float, float] = (0.3, 0.5, 0.2)
    """The same later, and with the running mean."""
    decay: float = Field(default=0.2, ge=0, le=1)
    """Weight of the newest interaction in the running mean."""


def mean_embeddings(texts: Sequence[Sequence[int]], embedding: Tensor) -> Tensor:
    """Return the mean embedding of the tokens of each text, ``[B, D]``; zeros for an empty one.

    Args:
        texts: B rows of ids.
        embedding: ``[V, D]``.
    """
    ids, mask = padded(texts, 0)
    weight = mask.to(embedding.device)[..., None].float()
    summed = (embedding[ids.to(embedding.device)].float() * weight).sum(dim=1)
    return summed / weight.sum(dim=1).clamp(min=1)


def update_running(running: Tensor | None, newest: Tensor, decay: float) -> Tensor:
    """Return the running mean ``[B, D]`` with the newest interaction in it; None: the first."""
    return newest if running is None else (1 - decay) * running + decay * newest


def rewards(
    answers: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]],
    before: Sequence[Sequence[int]],
    running: Tensor | None,
    embedding: Tensor,
    settings: RewardSettings | None = None,
) -> Tensor:
    """Return the reward of each answer, fp64 ``[B]``.

    Args:
        answers: ids of what was said; may be empty.
        references: ids of what should have been said; not empty.
        before: ids of the query and the answer of the interaction before; not empty.
        running: mean embedding of earlier interactions ``[B, D]``; None at the first step.
        embedding: of tokens, ``[V, D]``.
        settings: weights.
    """
    settings = settings or RewardSettings()
    ids, mask = padded(answers, 0)
    bleu = torch.zeros(len(answers), dtype=torch.float64)
    for others in (references, before):
        theirs, their_mask = padded(others, 0)
        bleu += 0.5 * sentence_bleu(
            ids, theirs, mask, their_mask, weights=settings.bleu_weights, smoothing="method4"
        )
    said = mean_embeddings(answers, embedding)
    compared = [mean_embeddings(references, embedding), mean_embeddings(before, embedding)]
    weights: tuple[float, ...] = settings.first_weights
    if running is not None:
        compared.append(running)
        weights = settings.later_weights
    cosine = torch.zeros(len(answers), dtype=torch.float64)
    for weight, other in zip(weights, compared, strict=True):
        similarity = torch.nn.functional.cosine_similarity(said, other, dim=-1, eps=1e-8)
        cosine += weight * similarity.double().cpu()
    length = torch.tensor(
        [
            min(1.0, len(answer) / len(reference))
            for answer, reference in zip(answers, references, strict=True)
        ],
        dtype=torch.float64,
    )
    return settings.scale * (
        settings.bleu_factor * bleu + settings.cos_factor * cosine + settings.len_factor * length
    )
