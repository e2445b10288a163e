"""The rows of results: plain dictionaries, ready for JSON or a data frame. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

ALL_TURNS = 0
"""The ``turn`` of perplexities over all turns; the turns themselves are numbered from 1."""


class RecallRow(TypedDict):
    """Shares of the ``n`` answers of one cell, seed and condition (see ``recall_plan``)."""

    test: str
    unseen: str
    distance: int
    facts: int
    history: str
    seed: int
    condition: str
    n: int
    exact: float
    value: float
    stale: float
    declined: float
    chance: float
    """Share that random guessing from the pool of values would get right."""


class Mistake(TypedDict):
    """A wrong answer from memory, to look at."""

    test: str
    unseen: str
    distance: int
    facts: int
    told: str
    query: str
    expected: str
    answer: str


class PerplexityRow(TypedDict):
    """One figure: ``turn`` 0 = all turns; ``n`` tokens; ``loss`` in nats a token."""

    test: str
    tokens: str
    turn: int
    condition: str
    n: int
    loss: float
    perplexity: float


def matching(rows: Iterable[RecallRow], **wanted: Any) -> list[RecallRow]:
    """Return the rows with the wanted values."""
    wanted_items = wanted.items()
    return [row for row in rows if wanted_items <= dict(row).items()]


def loss_of(
    rows: Sequence[PerplexityRow], condition: str, tokens: str = "answer", turn: int = ALL_TURNS
) -> float | None:
    """Return one loss in nats a token; None if it was not measured."""
    for row in rows:
        if (row["condition"], row["tokens"], row["turn"]) == (condition, tokens, turn):
            return row["loss"]
    return None
