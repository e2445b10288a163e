"""The named figures of the recall test, and what a good model reaches. Works on rows; no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from rxlm.evaluation.rows import RecallRow
from rxlm.evaluation.statistics import Estimate, estimate

Metric = Literal["exact", "value", "stale", "declined"]
_CELL_KEYS = ("test", "unseen", "distance", "facts", "history", "condition")


class Figure(TypedDict):
    """One named number. ``low`` and ``high`` are its 95 % interval; ``goal`` and ``passed`` are
    None where nothing is asked of it."""

    name: str
    label: str
    value: float
    low: float
    high: float
    seed_min: float
    seed_max: float
    n: int
    comparison: str
    goal: float | None
    passed: bool | None


@dataclass(frozen=True)
class Goal:
    """How to find a figure among the rows and what it must reach.

    ``comparison``: ``>=`` or ``<=`` the goal; ``within``: the share minus chance is the figure, and
    it may be off by at most the goal in either direction.
    """

    name: str
    label: str
    metric: Metric
    chosen: Callable[[RecallRow], bool]
    comparison: Literal[">=", "<=", "within"]
    goal: float | None


def _main(row: RecallRow, condition: str = "memory", history: str = "reference") -> bool:
    return (
        row["test"] == "recall"
        and row["unseen"] == "pairs"
        and row["facts"] <= 4
        and row["condition"] == condition
        and row["history"] == history
    )


def _update(row: RecallRow) -> bool:
    return row["test"] == "update" and row["unseen"] == "pairs" and row["condition"] == "memory"


GOALS: tuple[Goal, ...] = (
    Goal(
        "distance_1_to_4",
        "right, told 1 to 4 turns ago",
        "exact",
        lambda row: _main(row) and row["distance"] <= 4,
        ">=",
        0.97,
    ),
    Goal(
        "distance_8",
        "right, told 8 turns ago",
        "exact",
        lambda row: _main(row) and row["distance"] == 8,
        ">=",
        0.95,
    ),
    Goal(
        "distance_16",
        "right, told 16 turns ago",
        "exact",
        lambda row: _main(row) and row["distance"] == 16,
        ">=",
        0.85,
    ),
    Goal("updated", "right, changed facts", "exact", _update, ">=", 0.90),
    Goal("stale", "old value of a changed fact", "stale", _update, "<=", 0.05),
    Goal(
        "declined",
        "declined, never told",
        "declined",
        lambda row: row["test"] == "unknown" and row["condition"] == "memory",
        ">=",
        0.90,
    ),
    Goal(
        "zeroed_minus_chance",
        "above chance, memory zeroed",
        "exact",
        lambda row: _main(row, "zeroed"),
        "within",
        0.03,
    ),
    Goal(
        "swapped_minus_chance",
        "above chance, memory swapped",
        "exact",
        lambda row: _main(row, "swapped"),
        "within",
        0.03,
    ),
    Goal(
        "free_running",
        "right, own answers remembered",
        "exact",
        lambda row: _main(row, history="own"),
        ">=",
        None,
    ),
)
"""The acceptance of the nano model. Facts are (kind, value) pairs never told in training, and up
to 4 of them are held."""


def summarise(rows: Sequence[RecallRow], goals: Sequence[Goal] = GOALS) -> list[Figure]:
    """Return the figures that ``rows`` allow; those without a single row are left out."""
    figures = []
    for goal in goals:
        chosen = [row for row in rows if goal.chosen(row)]
        if chosen:
            figures.append(_figure(goal, chosen))
    return figures


def all_passed(figures: Sequence[Figure], goals: Sequence[Goal] = GOALS) -> bool:
    """Return whether every goal was measured and reached."""
    passed = {figure["name"]: figure["passed"] for figure in figures}
    return all(passed.get(goal.name) is True for goal in goals if goal.goal is not None)


def pool(rows: Sequence[RecallRow], metric: Metric = "exact") -> Estimate:
    """Pool rows (at least one) of any cells and seeds."""
    return estimate([(row["seed"], round(row[metric] * row["n"]), row["n"]) for row in rows])


def mean_chance(rows: Sequence[RecallRow]) -> float:
    """Return the chance level of pooled rows."""
    return sum(row["chance"] * row["n"] for row in rows) / sum(row["n"] for row in rows)


def aggregate(rows: Sequence[RecallRow], metric: Metric = "exact") -> list[dict[str, Any]]:
    """Return one mapping per cell and condition: its keys, ``chance`` and an estimate over seeds.

    Cells come in the order in which they first occur.
    """
    cells: dict[tuple[Any, ...], list[RecallRow]] = {}
    for row in rows:
        cells.setdefault(tuple(row[key] for key in _CELL_KEYS), []).append(row)  # type: ignore[literal-required]
    return [
        {
            **dict(zip(_CELL_KEYS, cell, strict=True)),
            "metric": metric,
            **pool(members, metric)._asdict(),
            "chance": mean_chance(members),
        }
        for cell, members in cells.items()
    ]


def _figure(goal: Goal, rows: Sequence[RecallRow]) -> Figure:
    found = pool(rows, goal.metric)
    base = mean_chance(rows) if goal.comparison == "within" else 0.0
    return Figure(
        name=goal.name,
        label=goal.label,
        value=found.mean - base,
        low=found.low - base,
        high=found.high - base,
        seed_min=found.seed_min - base,
        seed_max=found.seed_max - base,
        n=found.n,
        comparison=goal.comparison,
        goal=goal.goal,
        passed=_passes(goal, found.mean - base),
    )


def _passes(goal: Goal, value: float) -> bool | None:
    if goal.goal is None:
        return None
    # A share that is exactly the goal passes; the rounding of a difference must not decide.
    if goal.comparison == ">=":
        return value >= goal.goal - 1e-9
    if goal.comparison == "<=":
        return value <= goal.goal + 1e-9
    return abs(value) <= goal.goal + 1e-9
