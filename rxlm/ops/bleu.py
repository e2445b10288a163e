"""BLEU on token ids: many sentences at once, equal to NLTK's for every smoothing method.

(NLTK's ``method5`` and ``method7`` look at 5-grams beyond the last order, whatever that is; here it
is the next order, which is the same for four weights.)

    p_n   = matched n-grams / n-grams of the candidate, a match counted as often as in a reference
    score = brevity penalty * exp(sum_n w_n log p_n)

N-grams are named by sorting: an n-gram is the name of its first n - 1 tokens and one token more,
so each order takes one sort over what may still match in the batch, on any device. (Papineni et
al. 2002; smoothing: Chen and Cherry 2014; batches of ids: "TensorBLEU", arXiv 2510.05485.)

Not here: text and tokenization (sacrebleu's business), rewards.

Shapes: B sentences, R references of each, T tokens, N highest order of n-grams.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rxlm.errors import UserError

Smoothing = Literal[
    "none",
    "method1",
    "method2",
    "method3",
    "method4",
    "method5",
    "method6",
    "method7",
]
"""What becomes of orders without a match; the names are NLTK's (``none`` is its ``method0``)."""

WEIGHTS = (0.25, 0.25, 0.25, 0.25)
_EPSILON, _K, _ALPHA = 0.1, 5.0, 5.0
_OF_SENTENCES = ("method5", "method6", "method7")


class NgramCounts(NamedTuple):
    """What BLEU is computed from.

    ``matches``, ``totals``: int64 ``[B, N]``; ``length``, ``reference_length``: int64 ``[B]``, of
    the candidate and of the reference that is closest in length (the shorter of two).
    """

    matches: Tensor
    totals: Tensor
    length: Tensor
    reference_length: Tensor


def sentence_bleu(
    candidates: Tensor,
    references: Tensor,
    candidate_mask: Tensor | None = None,
    reference_mask: Tensor | None = None,
    *,
    weights: Sequence[float] = WEIGHTS,
    smoothing: Smoothing = "none",
) -> Tensor:
    """Return the BLEU of each sentence, float64 ``[B]``, between 0 and 1 (method5: a little above).

    Args:
        candidates: ids ``[B, T]``.
        references: ids ``[B, R, T']``, or ``[B, T']`` for one each.
        candidate_mask: which ids are real, ``[B, T]``, padding anywhere; None = all.
        reference_mask: of the shape of ``references``; a reference without any is not there.
        weights: of the orders 1 to N.
        smoothing: see :data:`Smoothing`. Where NLTK's ``method6`` refuses (no trigram matches),
            the score is 0.

    Raises:
        UserError: for shapes that do not fit, ids that are no integers from 0 on, a sentence
            without a reference, or an unknown smoothing.
    """
    _check_smoothing(smoothing, len(weights))
    order = len(weights) + (1 if smoothing in ("method5", "method7") else 0)
    counts = ngram_counts(candidates, references, candidate_mask, reference_mask, order=order)
    return _score(counts, weights, smoothing)


def corpus_bleu(
    candidates: Tensor,
    references: Tensor,
    candidate_mask: Tensor | None = None,
    reference_mask: Tensor | None = None,
    *,
    weights: Sequence[float] = WEIGHTS,
    smoothing: Smoothing = "none",
) -> Tensor:
    """Return the BLEU of a corpus, a float64 scalar: counts are added up before they are divided.

    Arguments and errors are those of :func:`sentence_bleu`; methods 5 to 7 are for sentences.
    """
    _check_smoothing(smoothing, len(weights))
    if smoothing in _OF_SENTENCES:
        raise UserError(
            f"smoothing={smoothing!r} is defined for a sentence: use 'none' or method1 to method4, "
            "or the mean of sentence_bleu()."
        )
    counts = ngram_counts(
        candidates, references, candidate_mask, reference_mask, order=len(weights)
    )
    # As NLTK does: a sentence that is too short for an order counts as one n-gram without a match.
    totals = counts.totals.clamp(min=1)
    whole = NgramCounts(
        counts.matches.sum(0, keepdim=True),
        totals.sum(0, keepdim=True),
        counts.length.sum(0, keepdim=True),
        counts.reference_length.sum(0, keepdim=True),
    )
    return _score(whole, weights, smoothing)[0]


def ngram_counts(
    candidates: Tensor,
    references: Tensor,
    candidate_mask: Tensor | None = None,
    reference_mask: Tensor | None = None,
    *,
    order: int = len(WEIGHTS),
) -> NgramCounts:
    """Return matches, totals and lengths; arguments and errors are those of :func:`sentence_bleu`.

    Args:
        candidates: see there; this and the next three.
        references: see there.
        candidate_mask: see there.
        reference_mask: see there.
        order: N.
    """
    if references.dim() == 2:
        references = references[:, None]
        reference_mask = None if reference_mask is None else reference_mask[:, None]
    _check_shapes(candidates, references)
    real = _mask(candidates, candidate_mask, "candidate_mask")
    real_references = _mask(references, reference_mask, "reference_mask")
    tokens, lengths = _left_aligned(
        _joined(
            _real_ids(candidates, real, "candidates")[:, None],
            _real_ids(references, real_references, "references"),
            0,
        ),
        _joined(real[:, None], real_references, False),
    )
    there = lengths[:, 1:] > 0
    if not bool(there.any(1).all()):
        row = int((~there.any(1)).nonzero()[0])
        raise UserError(f"sentence {row} has no reference: give at least one that is not empty.")
    num_texts, num_tokens = tokens.shape[1:]
    vocabulary = int(tokens.max()) + 1 if tokens.numel() else 1
    room = torch.arange(num_tokens, device=tokens.device).neg() + lengths[..., None]
    # Places where an n-gram may begin that matches, in one row of the batch after the other.
    places = (room > 0).flatten().nonzero()[:, 0]
    tokens, room = tokens.flatten(), room.flatten()
    texts = places // num_tokens
    rows, texts = texts // num_texts, texts % num_texts
    # The name of an n-gram in its sentence; at first of nothing, the same for the whole sentence.
    names = rows
    matches, totals = [], []
    for n in range(1, order + 1):
        names, num_names = _numbered(names * vocabulary + tokens[places + (n - 1)])
        # How often each n-gram stands in each text of its sentence.
        counts = torch.bincount(texts * num_names + names, minlength=num_texts * num_names)
        counts = counts.view(num_texts, num_names)
        matched = torch.minimum(counts[0], counts[1:].amax(0))
        row_of = torch.zeros_like(matched).scatter(0, names, rows)
        matches.append(torch.zeros_like(lengths[:, 0]).index_add(0, row_of, matched))
        totals.append((lengths[:, 0] - n + 1).clamp(min=0))
        # A longer n-gram can match only where this one does.
        going_on = ((matched > 0)[names] & (room[places] > n)).nonzero()[:, 0]
        places, names = places[going_on], names[going_on]
        rows, texts = rows[going_on], texts[going_on]
    return NgramCounts(
        torch.stack(matches, 1),
        torch.stack(totals, 1),
        lengths[:, 0],
        _closest_length(lengths[:, 0], lengths[:, 1:], there),
    )


def _score(counts: NgramCounts, weights: Sequence[float], smoothing: Smoothing) -> Tensor:
    matches, totals = counts.matches.double(), counts.totals.double().clamp(min=1)
    precision = _smoothed(counts, matches, totals, smoothing)[:, : len(weights)]
    length, reference = counts.length.double(), counts.reference_length.double()
    brevity = torch.exp((1 - reference / length.clamp(min=1)).clamp(max=0))
    weight = torch.tensor(weights, dtype=torch.float64, device=matches.device)
    # A precision of 0 that smoothing left is passed over, as NLTK does.
    logs = torch.where(precision > 0, precision, 1.0).log()
    score = brevity * torch.exp((weight * logs).sum(1))
    nothing = matches[:, 0] == 0
    if smoothing == "method6":
        nothing = nothing | (matches[:, 2] == 0)
    return torch.where(nothing, 0.0, score)


def _smoothed(counts: NgramCounts, matches: Tensor, totals: Tensor, smoothing: Smoothing) -> Tensor:
    plain = matches / totals
    none = matches == 0
    if smoothing == "none":
        return torch.where(none, sys.float_info.min, plain)
    if smoothing == "method1":
        return torch.where(none, _EPSILON / totals, plain)
    if smoothing == "method2":
        first = torch.arange(matches.shape[1], device=matches.device) == 0
        return torch.where(first, plain, (matches + 1) / (totals + 1))
    if smoothing == "method3":
        return torch.where(none, 0.5 ** none.cumsum(1) / totals, plain)
    if smoothing == "method6":
        return _interpolated(plain, counts)
    if smoothing in ("method4", "method7"):
        length = counts.length.double()[:, None]
        invented = 0.5 ** none.cumsum(1) * length.clamp(min=1).log() / _K / totals
        smoothed = torch.where(none & (length > 1), invented, plain)
        if smoothing == "method4":
            return smoothed
        # The order that only the mean of neighbours needs is taken as it is.
        smoothed = torch.cat([smoothed[:, :-1], plain[:, -1:]], 1)
        return _mean_of_neighbours(smoothed)
    return _mean_of_neighbours(plain)


def _mean_of_neighbours(precision: Tensor) -> Tensor:
    """Method 5; ``precision`` has one order more than the result."""
    before = precision[:, 0] + 1
    means = []
    for n in range(precision.shape[1] - 1):
        before = (before + precision[:, n] + precision[:, n + 1]) / 3
        means.append(before)
    return torch.stack(means, 1)


def _interpolated(precision: Tensor, counts: NgramCounts) -> Tensor:
    """Method 6: a prior from the two orders before, themselves interpolated."""
    orders = [precision[:, 0], precision[:, 1]]
    for n in range(2, precision.shape[1]):
        two, one = orders[n - 2], orders[n - 1]
        prior = torch.where(two == 0, 0.0, one**2 / torch.where(two == 0, 1.0, two))
        matched, total = counts.matches[:, n].double(), counts.totals[:, n].double()
        orders.append((matched + _ALPHA * prior) / (total + _ALPHA))
    return torch.stack(orders, 1)


def _numbered(keys: Tensor) -> tuple[Tensor, int]:
    """Return the number of each key among the different ones, in order, and how many there are."""
    if not len(keys):
        return keys, 0
    ordered, order = torch.sort(keys)
    steps = torch.zeros_like(ordered)
    steps[1:] = ordered[1:] != ordered[:-1]
    numbers = steps.cumsum(0)
    return torch.empty_like(numbers).scatter_(0, order, numbers), int(numbers[-1]) + 1


def _closest_length(length: Tensor, reference_lengths: Tensor, there: Tensor) -> Tensor:
    """Return the reference length that is closest, the shorter one of two; ``[B]``."""
    largest = int(reference_lengths.max()) + 1
    distance = (reference_lengths - length[:, None]).abs() * largest + reference_lengths
    best = distance.masked_fill(~there, torch.iinfo(distance.dtype).max).argmin(1, keepdim=True)
    return reference_lengths.gather(1, best)[:, 0]


def _left_aligned(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the real ids of each text from column 0 on, and their number."""
    lengths = mask.sum(-1)
    columns = torch.arange(tokens.shape[-1], device=tokens.device)
    if bool((mask == (columns < lengths[..., None])).all()):
        return tokens, lengths
    order = torch.argsort(mask.logical_not().to(torch.uint8), dim=-1, stable=True)
    return tokens.gather(-1, order), lengths


def _joined(candidates: Tensor, references: Tensor, fill: int | bool) -> Tensor:
    width = max(candidates.shape[-1], references.shape[-1])
    parts = [
        torch.nn.functional.pad(part, (0, width - part.shape[-1]), value=fill)
        for part in (candidates, references)
    ]
    return torch.cat(parts, 1)


def _mask(ids: Tensor, mask: Tensor | None, name: str) -> Tensor:
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.shape != ids.shape:
        raise UserError(
            f"{name} has shape {list(mask.shape)}, the ids {list(ids.shape)}: they must be equal."
        )
    if mask.is_floating_point():
        raise UserError(
            f"{name} has dtype {mask.dtype}; expected bool, or 0 and 1: a mask that is added to "
            "scores means the opposite."
        )
    return mask.bool()


def _real_ids(ids: Tensor, mask: Tensor, name: str) -> Tensor:
    """Return the ids with 0 at padding, whatever stood there."""
    ids = ids.masked_fill(~mask, 0)
    if ids.numel() and int(ids.min()) < 0:
        raise UserError(
            f"{name} holds the id {int(ids.min())}: ids count from 0; mask what is no token."
        )
    return ids


def _check_shapes(candidates: Tensor, references: Tensor) -> None:
    for name, ids in (("candidates", candidates), ("references", references)):
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise UserError(f"{name} has dtype {ids.dtype}; expected integers.")
    if candidates.dim() != 2 or references.dim() != 3 or len(candidates) != len(references):
        raise UserError(
            f"candidates {list(candidates.shape)} and references {list(references.shape)}: "
            "expected [B, T] and [B, R, T'] (or [B, T'])."
        )
    if not len(candidates):
        raise UserError("no sentences (B = 0): give at least one.")


def _check_smoothing(smoothing: str, num_orders: int) -> None:
    if smoothing not in get_args(Smoothing):
        raise UserError(
            f"smoothing={smoothing!r} does not exist: use one of {', '.join(get_args(Smoothing))}."
        )
    if not num_orders or (smoothing == "method6" and num_orders < 3):
        raise UserError(
            f"{num_orders} weights: give one for each order of n-grams, and three or more with "
            "method6."
        )
