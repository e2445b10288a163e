"""A comparison as tables of text, for a terminal and for a page. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rxlm.evaluation.tables import Table
from rxlm.training.comparison.curves import turn_of
from rxlm.training.progress import format_duration

_MISSING = "-"


def section_tables(section: Mapping[str, Any], *, all_metrics: bool = False) -> Iterator[Table]:
    """Yield the tables of one stage.

    Args:
        section: an entry of ``stages`` of :func:`~rxlm.training.comparison.compare.compare`.
        all_metrics: also those of training batches, and the loss of every turn.
    """
    yield _runs_table(section["columns"])
    yield _model_table(section["columns"])
    yield _config_table(section)
    rows = [
        row for row in section["metrics"] if all_metrics or is_shown(row["kind"], row["metric"])
    ]
    if rows:
        yield _metric_table(section["columns"], rows)


def is_shown(kind: str, metric: str) -> bool:
    """Return whether a metric is among those that are looked at first."""
    if kind == "validation":
        return turn_of(metric) is None
    return metric in ("loss", "grad_norm", "clip_rate", "num_skipped")


def _runs_table(columns: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for column in columns:
        for run in column["runs"]:
            seeds = ", ".join(f"{key}={value}" for key, value in run["seeds"].items())
            seconds = run["seconds"]
            rows.append(
                (
                    column["name"], run["label"], run["status"], f"{run['step']:,}",
                    _MISSING if run["num_tokens"] is None else f"{run['num_tokens']:,}",
                    _MISSING if seconds is None else format_duration(seconds),
                    seeds or _MISSING,
                )
            )  # fmt: skip
    header = ("", "run", "status", "steps", "tokens", "time", "seeds")
    return Table("Runs", header, rows, prose=True)


def _model_table(columns: Sequence[Mapping[str, Any]]) -> Table:
    names = {
        "parameters": "parameters",
        "non_embedding": "without embeddings",
        "decode_bytes": "decode state, bytes",
        "memory_bytes": "memory, bytes",
    }
    rows = []
    for key, name in names.items():
        values = [None if column["costs"] is None else column["costs"][key] for column in columns]
        if any(value is not None for value in values):
            rows.append((name, *(_whole(value) for value in values)))
    speeds = {
        "flops_per_token": ("FLOPs a token (training)", "{:,.0f}"),
        "tokens_per_second": ("tokens/s in training", "{:,.0f}"),
        "mfu": ("MFU", "{:.1%}"),
    }
    for key, (name, form) in speeds.items():
        values = [column[key] for column in columns]
        if any(value is not None for value in values):
            shown = (_MISSING if value is None else form.format(value) for value in values)
            rows.append((name, *shown))
    lengths = [column["costs"]["decode_tokens"] for column in columns if column["costs"]]
    note = f"Decode state after {', '.join(f'{n:,}' for n in sorted(set(lengths)))} tokens, fp32. "
    return Table(
        "Model and speed",
        ("", *(column["name"] for column in columns)),
        rows,
        (note if lengths else "") + "Speeds are medians over log lines, the first left out.",
    )


def _config_table(section: Mapping[str, Any]) -> Table:
    rows = [
        (item["setting"], *(_MISSING if value is None else str(value) for value in item["values"]))
        for item in section["config"]
    ]
    note = "" if rows else "No setting differs."
    header = ("setting", *(column["name"] for column in section["columns"]))
    return Table("What differs in the recipes", header, rows, note)


def _metric_table(columns: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> Table:
    first = columns[0]["name"]
    header = ["metric"]
    for column in columns:
        header += [f"{column['name']} final", f"{column['name']} best"]
    for column in columns[1:]:
        header += [f"{column['name']} - {first}", "95 % interval", "g"]
    lines = []
    for row in rows:
        line = [f"{row['kind']}/{row['metric']}"]
        for column in row["columns"]:
            spread = "" if column["sd"] is None else f" +- {column['sd']:.2g}"
            best = column["best"]
            line += [
                f"{column['mean']:.4g}{spread}",
                _MISSING if best is None else f"{best['value']:.4g} @ {best['step']:,.0f}",
            ]
        for item in row["effects"]:
            known = item["low"] is not None
            line += [
                f"{item['difference']:+.3g}",
                f"{item['low']:+.3g} .. {item['high']:+.3g}" if known else _MISSING,
                _MISSING if item["hedges_g"] is None else f"{item['hedges_g']:+.2f}",
            ]
        lines.append(tuple(line))
    note = (
        "final: mean over seeds +- standard deviation; best: of all seeds, at its step; interval: "
        "Welch's of the difference of means; g: Hedges' effect size."
    )
    return Table("Metrics", tuple(header), lines, note)


def _whole(value: int | None) -> str:
    return _MISSING if value is None else f"{value:,}"
