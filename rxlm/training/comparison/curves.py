"""Curves of metrics: values by step, tokens and time of training. No torch."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

AXES = ("step", "tokens", "minutes")
"""What a metric can be drawn over."""
_NO_METRICS = frozenset({"kind", "step", "num_tokens", "seconds"})
_BY_TURN = re.compile(r"loss_turn_(\d+)\Z")
_SMALLER = re.compile(r"(?:.*_)?(?:loss|perplexity)(?:_.*)?\Z")
_LARGER = re.compile(r"(?:.*_)?(?:accuracy|cosine|mfu|tokens_per_second|memory_gain)(?:_.*)?\Z")


class Point(NamedTuple):
    """A value after ``step`` updates, ``tokens`` tokens and ``minutes`` of training."""

    step: float
    tokens: float
    minutes: float
    value: float


Curves = dict[tuple[str, str], list[Point]]
"""By kind ('train' or 'validation') and metric."""


def curves_of(records: Sequence[Mapping[str, Any]]) -> Curves:
    """Return all curves of a run; values that are not finite are left out.

    Validation lines hold neither tokens nor time: both are interpolated between training lines.
    """
    train = [record for record in records if record["kind"] == "train"]
    clocks = {
        "num_tokens": _clock(train, "num_tokens"),
        "seconds": _clock(train, "seconds"),
    }
    curves: Curves = {}
    for record in records:
        step = record["step"]
        tokens = _read(clocks["num_tokens"], step)
        minutes = _read(clocks["seconds"], step) / 60
        for name, value in record.items():
            if name in _NO_METRICS or isinstance(value, bool | str) or value is None:
                continue
            curves.setdefault((record["kind"], name), []).append(
                Point(step, tokens, minutes, float(value))
            )
    return curves


def metric_names(all_curves: Sequence[Curves]) -> list[str]:
    """Return the metrics of several runs, each once, in the order in which they were met."""
    return list(dict.fromkeys(name for curves in all_curves for _, name in curves))


def turn_of(metric: str) -> int | None:
    """Return n of ``loss_turn_<n>``; None for other metrics."""
    found = _BY_TURN.match(metric)
    return int(found[1]) if found else None


def better(metric: str) -> Literal["min", "max"] | None:
    """Return whether a smaller or a larger value is better; None if neither is."""
    if metric in ("slot_cosine", "loss_zeroed"):
        return None
    if _SMALLER.match(metric):
        return "min"
    return "max" if _LARGER.match(metric) else None


def _clock(records: Sequence[Mapping[str, Any]], field: str) -> list[tuple[float, float]]:
    return [(0.0, 0.0)] + [
        (record["step"], record[field]) for record in records if record.get(field) is not None
    ]


def _read(clock: Sequence[tuple[float, float]], step: float) -> float:
    """Return the clock's value at a step, linear between known steps, constant after the last."""
    index = bisect_left(clock, (step, 0.0))
    if index >= len(clock):
        return clock[-1][1]
    after, before = clock[index], clock[max(0, index - 1)]
    if after[0] <= before[0]:
        return after[1]
    return before[1] + (step - before[0]) / (after[0] - before[0]) * (after[1] - before[1])
