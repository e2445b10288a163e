"""Multi-query associative recall (MQAR): the synthetic task that tells recurrences apart.

A row tells pairs and then asks for all of them, each key once and in any order:

    k1 v1 k2 v2 ... kN vN | f f k2 f k1 f f f ...        length T
                                |    |
                  target:       v2   v1                   everywhere else: IGNORED

The layout is that of Zoology (arXiv:2312.04927, "multiquery_ar"): keys are the tokens 1 to V/2 - 1
and values V/2 to V - 1, both without repetition in a row; questions stand at every second token
after the pairs, at distances drawn without replacement with probability ~ n**(power - 1), so that
most are near; fillers f are random. Two things differ. A row is a function of (seed, position) and
nothing else (Zoology's fillers come from the global generator), and fillers are never keys of the
row: in a small vocabulary they would often bind a key to another value, and no answer were right.

numpy only; not here: models and scores (``benchmarks/mqar.py``).

Shapes: B rows, T tokens, N pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rxlm.errors import UserError

IGNORED = -100
"""Target of positions where nothing is asked; what torch's cross-entropy skips by default."""


@dataclass(frozen=True)
class MqarSettings:
    """One difficulty of the task.

    Attributes:
        num_pairs: N, pairs told and asked in each row.
        length: T; even, and at least 4 N, so that all questions find a place.
        vocab_size: V, even; half of it keys (one less: token 0 is none), half of it values.
        power: of the law of the distances; 1 = uniform, near 0 = most are near.

    Raises:
        UserError: for sizes that do not fit.
    """

    num_pairs: int
    length: int
    vocab_size: int = 8192
    power: float = 0.01

    def __post_init__(self) -> None:
        if self.num_pairs < 1:
            raise UserError(f"num_pairs={self.num_pairs}: expected at least 1.")
        if self.length % 2 or self.length < 4 * self.num_pairs:
            raise UserError(
                f"length={self.length} with num_pairs={self.num_pairs}: expected an even number, "
                f"at least {4 * self.num_pairs} (four tokens a pair)."
            )
        if self.vocab_size % 2 or self.vocab_size < 2 * (self.num_pairs + 1):
            raise UserError(
                f"vocab_size={self.vocab_size} with num_pairs={self.num_pairs}: expected an even "
                f"number, at least {2 * (self.num_pairs + 1)}, so that no key repeats."
            )
        if not self.power > 0:
            raise UserError(f"power={self.power}: expected a positive number, such as 0.01.")

    @property
    def first_value(self) -> int:
        """The smallest token that is a value; keys are 1 to the one before it."""
        return self.vocab_size // 2

    @property
    def context_length(self) -> int:
        """Tokens that tell the pairs."""
        return 2 * self.num_pairs


class MqarRows(NamedTuple):
    """``tokens`` and ``targets``, both int64 ``[B, T]``: the value at a question, else IGNORED."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]


def mqar_rows(settings: MqarSettings, seed: int, positions: Iterable[int]) -> MqarRows:
    """Return the rows at ``positions`` of the endless data set that ``seed`` names.

    Args:
        settings: the difficulty.
        seed: >= 0.
        positions: each >= 0, in any order.
    """
    rows = [_row(settings, seed, position) for position in positions]
    shape = (len(rows), settings.length)
    tokens, targets = np.empty(shape, np.int64), np.empty(shape, np.int64)
    for index, (row, answers) in enumerate(rows):
        tokens[index], targets[index] = row, answers
    return MqarRows(tokens, targets)


def distance_law(settings: MqarSettings) -> NDArray[np.float64]:
    """Return the probability of each place of a first question, ``[(T - 2 N) / 2]``.

    Place n stands 2 n tokens after the last pair.
    """
    places = np.arange(1, (settings.length - settings.context_length) // 2 + 1, dtype=np.float64)
    weights = settings.power * places ** (settings.power - 1.0)
    return weights / weights.sum()


def _row(
    settings: MqarSettings, seed: int, position: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if seed < 0 or position < 0:
        raise UserError(f"seed={seed}, position={position}: expected numbers >= 0.")
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, position))))
    pairs, context, first_value = settings.num_pairs, settings.context_length, settings.first_value
    keys = 1 + generator.permutation(first_value - 1)[:pairs]
    values = first_value + generator.permutation(first_value)[:pairs]
    # The smallest of exponential times with rates p are draws without replacement, in their order.
    law = distance_law(settings)
    places = np.argsort(generator.standard_exponential(len(law)) / law)[:pairs]
    questions = context + 2 * places
    # The n-th of the tokens that are no key of the row: n, plus the keys at or before it.
    fillers = generator.integers(settings.vocab_size - pairs, size=settings.length)
    ranks = np.sort(keys) - np.arange(pairs)
    tokens = fillers + np.searchsorted(ranks, fillers, side="right")
    targets = np.full(settings.length, IGNORED)
    tokens[:context:2], tokens[1:context:2] = keys, values
    tokens[questions], targets[questions] = keys, values
    return tokens, targets
