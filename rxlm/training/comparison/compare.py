"""Two recipes, or two runs of one, beside one another, as JSON-like data.

Runs that share a recipe but for seeds make a column; if all do, every run is a column of its own.
Differences are those from the first column. What would make the comparison unfair is said in
words (``notes``). Not here: how it is shown (``tables.py``, ``page.py``, ``plots.py``).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rxlm.errors import UserError
from rxlm.training.comparison.costs import Costs, costs_of_run
from rxlm.training.comparison.curves import Point, better, curves_of
from rxlm.training.comparison.effect import effect
from rxlm.training.comparison.runs import Run, by_stage, read_targets
from rxlm.training.metrics import TIMING_FIELDS
from rxlm.training.settings import deciding_values

SCHEMA = "rxlm-comparison/1"
NAMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SPEEDS = ("tokens_per_second", "mfu", "flops_per_token")
_NOT_COMPARED = frozenset({*_SPEEDS, "lr"})
_UNLIKE = 0.01
"""Shares of parameters or tokens that may differ without a note."""


def compare(paths: Sequence[str | Path]) -> dict[str, Any]:
    """Return the comparison of run folders, or of pipelines stage by stage.

    Raises:
        UserError: for folders that hold no runs, cannot be compared, or are fewer than two.
    """
    if len(paths) < 2:
        raise UserError("a comparison needs two or more folders: rxlm compare RUN RUN [RUN]...")
    if len(paths) > len(NAMES):
        raise UserError(f"{len(paths)} folders are too many for a table: at most {len(NAMES)}.")
    stages = by_stage(read_targets(paths))
    return {
        "schema": SCHEMA,
        "folders": [str(path) for path in paths],
        "stages": {name: compare_runs(runs) for name, runs in stages.items()},
    }


def columns_of(runs: Sequence[Run]) -> list[list[Run]]:
    """Return the runs by recipe, in the order in which they were given; runs of a single recipe
    stay apart."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps([run.stage, run.recipe], sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
    return [[run] for run in runs] if len(groups) == 1 else list(groups.values())


def compare_runs(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the comparison of runs of one stage."""
    columns = columns_of(runs)
    described = [_column(name, group) for name, group in zip(NAMES, columns, strict=False)]
    metrics = _metrics(columns)
    left_out = _left_out(columns)
    identical = all(_content(run) == _content(runs[0]) for run in runs[1:])
    return {
        "stage": runs[0].stage,
        "columns": described,
        "config": _config_differences(columns),
        "notes": _notes(columns, described, left_out),
        "identical": identical,
        "metrics": metrics,
        "verdict": _verdict(described, metrics, identical, left_out),
    }


def _column(name: str, group: Sequence[Run]) -> dict[str, Any]:
    first = group[0]
    costs = costs_of_run(first.path)
    return {
        "name": name,
        "label": first.label + (f" and {len(group) - 1} more" if len(group) > 1 else ""),
        "runs": [
            {"label": run.label, "status": run.status, "seeds": run.seeds, **_progress(run)}
            for run in group
        ],
        "costs": None if costs is None else costs._asdict(),
        "device": first.environment.get("device"),
        "num_threads": first.environment.get("num_threads"),
        **{speed: _speed(group, speed) for speed in _SPEEDS},
    }


def _progress(run: Run) -> dict[str, Any]:
    last = [record for record in run.records if record["kind"] == "train"][-1:]
    values = last[0] if last else {}
    return {
        "step": max(record["step"] for record in run.records),
        "num_tokens": values.get("num_tokens"),
        "seconds": values.get("seconds"),
    }


def _speed(group: Sequence[Run], name: str) -> float | None:
    """Return the median over all training lines; the first, with its cold caches, is left out if
    there are others."""
    values: list[float] = []
    for run in group:
        own = [
            record[name]
            for record in run.records
            if record["kind"] == "train" and record.get(name) is not None
        ]
        values += own[1:] or own
    return statistics.median(values) if values else None


def _metrics(columns: Sequence[Sequence[Run]]) -> list[dict[str, Any]]:
    """Return a row per metric that every column has."""
    curves = [[curves_of(run.records) for run in _distinct(group)] for group in columns]
    names = [
        key
        for key in dict.fromkeys(key for group in curves for item in group for key in item)
        if key[1] not in _NOT_COMPARED and all(key in item for group in curves for item in group)
    ]
    # What is measured on held-out data comes first.
    names.sort(key=lambda key: key[0] != "validation")
    rows = []
    for kind, name in names:
        found = [[item[kind, name] for item in group] for group in curves]
        goal = better(name)
        finals = [[points[-1].value for points in group] for group in found]
        rows.append(
            {
                "kind": kind,
                "metric": name,
                "better": goal,
                "columns": [
                    {
                        "final": values,
                        "mean": statistics.fmean(values),
                        "sd": statistics.stdev(values) if len(values) > 1 else None,
                        "best": None if goal is None else _best(group, goal),
                    }
                    for values, group in zip(finals, found, strict=True)
                ],
                "effects": [_effect(finals[0], values) for values in finals[1:]],
            }
        )
    return rows


def _left_out(columns: Sequence[Sequence[Run]]) -> list[str]:
    """Return the validation metrics that only some columns have, and which those are."""
    names = [
        {name for run in group for kind, name in curves_of(run.records) if kind == "validation"}
        for group in columns
    ]
    found = []
    for name in sorted(set().union(*names) - _NOT_COMPARED):
        have = [letter for letter, known in zip(NAMES, names, strict=False) if name in known]
        if len(have) < len(columns):
            found.append(f"{name} (only {', '.join(have)})")
    return found


def _best(group: Sequence[Sequence[Point]], goal: str) -> dict[str, float]:
    """Return the best value of all runs of a column, and its step."""
    choose = min if goal == "min" else max
    point = choose((item for points in group for item in points), key=lambda item: item.value)
    return {"value": point.value, "step": point.step}


def _effect(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    found = effect(a, b)
    return {**found._asdict(), "verdict": found.verdict}


def _distinct(group: Sequence[Run]) -> list[Run]:
    """Return the runs of a column, one for each choice of seeds: a repetition proves nothing."""
    by_seeds = {json.dumps(run.seeds, sort_keys=True): run for run in reversed(group)}
    return [run for run in group if any(run is kept for kept in by_seeds.values())]


def _content(run: Run) -> list[dict[str, Any]]:
    """Return what a run measured, but for what depends on the machine."""
    return [
        {key: value for key, value in record.items() if key not in TIMING_FIELDS}
        for record in run.records
    ]


def _config_differences(columns: Sequence[Sequence[Run]]) -> list[dict[str, Any]]:
    """Return the settings that are not the same in all columns (seeds only between single runs)."""
    single = all(len(group) == 1 for group in columns)
    flat = [
        _leaves(deciding_values(group[0].config) if single else group[0].recipe)
        for group in columns
    ]
    keys = sorted({key for values in flat for key in values})
    return [
        {"setting": key, "values": [values.get(key) for values in flat]}
        for key in keys
        if len({json.dumps(values.get(key), default=str) for values in flat}) > 1
    ]


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {path: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _leaves(item, f"{path}.{key}" if path else str(key))
    return found


def _notes(
    columns: Sequence[Sequence[Run]],
    described: Sequence[Mapping[str, Any]],
    left_out: Sequence[str],
) -> list[str]:
    """Say in words what keeps the comparison from being one of the recipes alone."""
    notes = []
    if left_out:
        notes.append(f"validation metrics that not all have are left out: {', '.join(left_out)}")
    costs: list[Costs | None] = [costs_of_run(group[0].path) for group in columns]
    known = [item for item in costs if item is not None]
    if len(known) == len(costs):
        notes += _ratio_note(
            "parameters without embeddings", [item.non_embedding for item in known]
        )
    tokens = [column["runs"][0]["num_tokens"] or 0 for column in described]
    notes += _ratio_note("tokens seen", tokens)
    notes += _differs("steps", [column["runs"][0]["step"] for column in described])
    for key in ("device", "num_threads", "world_size"):
        values = [group[0].environment.get(key) for group in columns]
        notes += [f"{item}: speeds cannot be compared" for item in _differs(key, values)]
    for key in ("rxlm", "git"):
        notes += _differs(key, [group[0].environment.get(key) for group in columns])
    unfinished = [
        f"{run.label} ({run.status})"
        for group in columns
        for run in group
        if run.status not in ("complete", "early_stopped")
    ]
    if unfinished:
        notes.append(f"not finished: {', '.join(unfinished)}")
    counts = [len(_distinct(group)) for group in columns]
    for group, count in zip(columns, counts, strict=True):
        if count < len(group):
            notes.append(f"{group[0].label}: runs of the same seeds count once")
    if min(counts) < 2 and len(columns) > 1:
        notes.append(
            "a single seed on a side: a difference may be due to the seed; train each recipe with "
            "two or more (train.seed=1, --out ...) to get intervals and effect sizes"
        )
    return notes


def _ratio_note(what: str, values: Sequence[float]) -> list[str]:
    first = values[0]
    if not first or all(abs(value / first - 1) <= _UNLIKE for value in values):
        return []
    shown = ", ".join(
        f"{name} {value:,}" + (f" ({value / first - 1:+.1%})" if value != first else "")
        for name, value in zip(NAMES, values, strict=False)
    )
    return [f"{what} differ: {shown}"]


def _differs(what: str, values: Sequence[Any]) -> list[str]:
    if len({json.dumps(value, default=str) for value in values}) == 1:
        return []
    shown = ", ".join(f"{name} {value}" for name, value in zip(NAMES, values, strict=False))
    return [f"{what} differ: {shown}"]


def _verdict(
    described: Sequence[Mapping[str, Any]],
    metrics: Sequence[Mapping[str, Any]],
    identical: bool,
    left_out: Sequence[str],
) -> list[str]:
    """Say for each later column where it differs from the first for sure."""
    first = described[0]["name"]
    if identical:
        names = ", ".join(column["name"] for column in described)
        return [f"{names}: no difference found; every metric of every line is the same."]
    rows = [row for row in metrics if row["kind"] == "validation" and row["better"]]
    if not rows:
        names = ", ".join(column["name"] for column in described)
        common = [row["metric"] for row in metrics if row["kind"] == "validation"]
        left_out = [*left_out, *(f"{name} (neither less nor more is better)" for name in common)]
        why = f" (left out: {', '.join(left_out)})" if left_out else ""
        return [f"{names}: not compared, they have no validation metric in common{why}."]
    sentences = []
    for index, column in enumerate(described[1:]):
        verdicts = [(row, row["effects"][index]) for row in rows]
        sure = [(row, item) for row, item in verdicts if item["verdict"] == "differs"]
        name = column["name"]
        if sure:
            parts = []
            for row, item in sure:
                lower = item["difference"] < 0
                word = "better" if lower == (row["better"] == "min") else "worse"
                size = "" if item["hedges_g"] is None else f" (g = {item['hedges_g']:+.2f})"
                parts.append(f"{row['metric']} is {word}{size}")
            sentences.append(f"{name} against {first}: " + "; ".join(parts) + ".")
        elif any(item["low"] is None for _, item in verdicts):
            sentences.append(
                f"{name} against {first}: the runs differ, but a single seed does not show by how "
                "much they would differ anyway."
            )
        else:
            sentences.append(f"{name} against {first}: no difference found.")
    return sentences
