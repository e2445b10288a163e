"""Choosing the next token from scores: greedy or drawn, with the usual filters. Pure functions.

A draw is a number that depends on (seed, index of the draw) alone, so the state of a conversation's
randomness is two integers, a row of a batch is drawn as it would be alone, and every machine draws
the same.

Shapes: B batch (rows), V vocabulary, P earlier tokens of the longest row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field, field_validator
from torch import Tensor

from rxlm.configuration import Config
from rxlm.errors import RunError

MIN_TEMPERATURE = 1e-6
"""Dividing by less overflows; the result would be greedy anyway."""


class SamplingSettings(Config):
    """How a token is chosen from its scores; the filters apply in the order of the fields."""

    repetition_penalty: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Divides positive and multiplies negative scores of tokens already in the answer (Keskar et
    al. 2019, arXiv 1909.05858, 4.1). 1 = off; 1.1 to 1.3 are usual."""
    temperature: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Divides the scores. 0 = greedy: always the most likely token, nothing is drawn."""
    top_k: int | None = None
    """Keep the k most likely tokens, and those that tie with the k-th. None = all."""
    top_p: float | None = None
    """Keep the most likely tokens until their probabilities sum to p, the one that reaches p
    included (Holtzman et al. 2020, arXiv 1904.09751). None = all."""
    min_p: float | None = None
    """Keep tokens at least p times as likely as the most likely one (Nguyen et al. 2024, arXiv
    2407.01082). None = all."""

    @field_validator("repetition_penalty")
    @classmethod
    def _positive_penalty(cls, value: float) -> float:
        if value <= 0:
            raise ValueError(
                f"repetition_penalty={value} must be above 0: use 1.0 to switch it off"
            )
        return value

    @field_validator("temperature")
    @classmethod
    def _temperature_not_negative(cls, value: float) -> float:
        if value != 0 and value < MIN_TEMPERATURE:
            raise ValueError(
                f"temperature={value} must be 0 (greedy) or at least {MIN_TEMPERATURE}: use 0 or "
                "0.7"
            )
        return value

    @field_validator("top_k")
    @classmethod
    def _at_least_one_token(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError(f"top_k={value} keeps no token: use 1 or more, or None for all")
        return value

    @field_validator("top_p")
    @classmethod
    def _positive_mass(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"top_p={value} must be in (0, 1]: use 0.9, or None for all tokens")
        return value

    @field_validator("min_p")
    @classmethod
    def _share_of_the_best(cls, value: float | None) -> float | None:
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"min_p={value} must be in [0, 1]: use 0.05, or None for all tokens")
        return value


GREEDY = SamplingSettings(temperature=0.0)
"""Always the most likely token."""


def uniform_draw(seed: int, index: int) -> float:
    """Return draw number ``index`` of the stream ``seed``: uniform in [0, 1), 52 bits.

    A cryptographic hash is used as a counter-based generator (Salmon et al. 2011): any draw can
    be made without those before it.
    """
    digest = hashlib.blake2b(f"{seed}/{index}".encode("ascii"), digest_size=8).digest()
    # 52 bits, not 53: then u * total < total in float64 for every total.
    return float(int.from_bytes(digest, "little") >> 12) * 2.0**-52


def sample(
    logits: Tensor,
    settings: SamplingSettings,
    uniforms: Sequence[float] | Tensor | None = None,
    previous_ids: Tensor | None = None,
) -> Tensor:
    """Choose one token a row.

    Args:
        logits: scores ``[B, V]``; -inf forbids a token.
        settings: how to choose.
        uniforms: B numbers in [0, 1), from :func:`uniform_draw`; not read when greedy.
        previous_ids: tokens already in each answer, int64 ``[B, P]``, -1 where there is none;
            read by the repetition penalty only.

    Returns:
        token ids, int64 ``[B]``.

    Raises:
        RunError: if a score is NaN or +inf, or a row forbids every token.
        ValueError: if a draw is needed and ``uniforms`` is missing.
    """
    if settings.temperature == 0:
        scores = penalize(logits.float(), previous_ids, settings.repetition_penalty)
        best, chosen = scores.max(dim=-1)
        # NaN counts as the largest, so the best score tells about all of them.
        if not all(map(math.isfinite, best.tolist())):
            _check_scores(logits.float())
        return chosen
    if uniforms is None:
        raise ValueError("temperature > 0 draws tokens: pass uniforms, one number a row.")
    # float64: the sum over a large vocabulary then resolves a draw as fine as it is made.
    cumulative = token_probabilities(logits, settings, previous_ids).double().cumsum(dim=-1)
    draws = torch.as_tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None]
    # right=True finds the first token whose cumulative sum exceeds the draw, so a token of
    # probability zero is never found.
    return torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)[:, 0]


def token_probabilities(
    logits: Tensor, settings: SamplingSettings, previous_ids: Tensor | None = None
) -> Tensor:
    """Return the distribution that :func:`sample` draws from, fp32 ``[B, V]`` (temperature > 0).

    Arguments and errors are those of :func:`sample`.
    """
    scores = logits.float()
    _check_scores(scores)
    scores = penalize(scores, previous_ids, settings.repetition_penalty)
    # Shifted first, so that a tiny temperature cannot make two scores infinite.
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / settings.temperature
    if settings.top_k is not None and settings.top_k < scores.shape[-1]:
        worst = scores.topk(settings.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < worst, float("-inf"))
    if settings.top_p is not None and settings.top_p < 1:
        scores = _keep_top_p(scores, settings.top_p)
    probabilities = scores.softmax(dim=-1)
    if settings.min_p is not None:
        least = settings.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return probabilities


def penalize(scores: Tensor, previous_ids: Tensor | None, penalty: float) -> Tensor:
    """Make earlier tokens less likely (more likely if ``penalty`` < 1).

    Args:
        scores: ``[B, V]``; left unchanged.
        previous_ids: ``[B, P]``, -1 where there is none; a token that occurs often counts once.
        penalty: positive; 1 changes nothing.
    """
    if previous_ids is None or penalty == 1.0 or previous_ids.shape[1] == 0:
        return scores
    # One column more takes the -1 entries.
    seen = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
    columns = torch.where(previous_ids < 0, scores.shape[1], previous_ids)
    seen = seen.scatter(1, columns, True)[:, :-1]
    penalized = torch.where(scores > 0, scores / penalty, scores * penalty)
    return torch.where(seen, penalized, scores)


def _keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.double().softmax(dim=-1)
    # What precedes a token decides, so the token that crosses p is kept (and the first always is).
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before < top_p)
    return scores.masked_fill(~kept, float("-inf"))


def _check_scores(scores: Tensor) -> None:
    best = scores.amax(dim=-1)
    if not bool(torch.isfinite(best).all()):
        # amax is NaN if any score is.
        raise RunError(
            f"the model's scores of the next token are not finite (largest of each row: "
            f"{best.tolist()}): its weights or its memory have diverged. Use an earlier "
            "checkpoint or a fresh conversation."
        )
