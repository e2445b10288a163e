"""A named number, what is asked of it, and whether it is reached. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

from rxlm.evaluation.statistics import Estimate

Unit = Literal["share", "ratio", "number", "nats"]
Comparison = Literal[">=", "<=", "within"]
NOT_GIVEN = "not given"
"""What stands where a baseline would."""


class Finding(TypedDict):
    """One number of a test.

    ``value`` is None where it could not be measured, and ``note`` says why. ``low``, ``high``: 95 %
    interval; ``seed_min``, ``seed_max``: over seeds; ``n``: answers, tokens or whatever was
    counted. ``goal`` None: nothing is asked; ``passed`` None: not judged.
    """

    test: str
    name: str
    label: str
    unit: Unit
    value: float | None
    low: float | None
    high: float | None
    seed_min: float | None
    seed_max: float | None
    n: int
    comparison: Comparison
    goal: float | None
    passed: bool | None
    note: str


def finding(
    test: str,
    name: str,
    label: str,
    value: float | None,
    *,
    unit: Unit = "share",
    interval: tuple[float, float] | None = None,
    seeds: Sequence[float] = (),
    n: int = 0,
    comparison: Comparison = ">=",
    goal: float | None = None,
    note: str = "",
) -> Finding:
    """Return a finding, judged if there is a goal and a value."""
    passed = None if goal is None or value is None else reaches(value, comparison, goal)
    return Finding(
        test=test,
        name=name,
        label=label,
        unit=unit,
        value=value,
        low=None if interval is None else interval[0],
        high=None if interval is None else interval[1],
        seed_min=min(seeds, default=None),
        seed_max=max(seeds, default=None),
        n=n,
        comparison=comparison,
        goal=goal,
        passed=passed,
        note=note,
    )


def of_estimate(
    test: str, name: str, label: str, found: Estimate, base: float = 0.0, **more: Any
) -> Finding:
    """Return the finding of a share of successes, less ``base`` (the level of chance)."""
    return finding(
        test,
        name,
        label,
        found.mean - base,
        interval=(found.low - base, found.high - base),
        seeds=(found.seed_min - base, found.seed_max - base),
        n=found.n,
        **more,
    )


def reaches(value: float, comparison: Comparison, goal: float) -> bool:
    """Return whether a goal is reached; a value that is exactly the goal reaches it."""
    # The rounding of a difference must not decide.
    if comparison == ">=":
        return value >= goal - 1e-9
    if comparison == "<=":
        return value <= goal + 1e-9
    return abs(value) <= goal + 1e-9
