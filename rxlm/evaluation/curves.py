"""Learning curves for a report, from the metrics lines of a run. Plain data; no torch.

The lines are those of ``metrics.jsonl``: ``kind`` ('train' or 'validation'), ``step``, and metrics;
training lines also hold ``seconds``, the training time so far.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

MAX_POINTS = 300
ACCURACY_METRICS = ("accuracy_recall", "accuracy_probe", "accuracy")
"""Which validation metric is 'the accuracy' of a stage: the first one that it measures."""
_KEPT = ("loss", "perplexity", *ACCURACY_METRICS)

Point = dict[str, float]


def stage_curves(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Return ``{'train': [...], 'validation': [...]}``: points with step, minutes and metrics.

    Validation lines hold no time, so theirs is interpolated between training lines. At most
    :data:`MAX_POINTS` of each kind, evenly spaced, the last one always among them.
    """
    clock = [
        (record["step"], record["seconds"])
        for record in records
        if record["kind"] == "train" and record.get("seconds") is not None
    ]
    curves: dict[str, list[Point]] = {}
    for kind in ("train", "validation"):
        points = [_point(record, clock) for record in records if record["kind"] == kind]
        curves[kind] = _thinned(points)
    return curves


def accuracy_metric(points: Sequence[Mapping[str, float]]) -> str | None:
    """Return the name of the accuracy that ``points`` hold, if any."""
    return next((name for name in ACCURACY_METRICS if any(name in point for point in points)), None)


def _point(record: Mapping[str, Any], clock: Sequence[tuple[int, float]]) -> Point:
    point = {"step": record["step"], "minutes": _seconds_at(record["step"], clock) / 60.0}
    point |= {name: record[name] for name in _KEPT if record.get(name) is not None}
    return point


def _seconds_at(step: int, clock: Sequence[tuple[int, float]]) -> float:
    """Return the training time at ``step``, linear between the known times."""
    if not clock:
        return 0.0
    index = bisect_left(clock, (step, 0.0))
    after = clock[min(index, len(clock) - 1)]
    before = clock[index - 1] if index else (0, 0.0)
    if after[0] <= before[0] or step >= after[0]:
        return after[1]
    share = (step - before[0]) / (after[0] - before[0])
    return before[1] + share * (after[1] - before[1])


def _thinned(points: list[Point]) -> list[Point]:
    if len(points) <= MAX_POINTS:
        return points
    step = (len(points) - 1) / (MAX_POINTS - 1)
    return [points[round(number * step)] for number in range(MAX_POINTS)]
