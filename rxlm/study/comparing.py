"""Two studies beside one another: what is the same to the last digit, and what differs by how much.

Losses, right answers and counted bytes do not depend on the machine: two runs of the same settings
and seeds have the same (on a CPU). Times do, so they are compared by intervals and decide nothing.
Mechanisms that both studies have are compared with themselves; if each has one that the other
lacks, those two are compared with one another. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rxlm.evaluation.tables import Table
from rxlm.study.fits import median_interval
from rxlm.study.manifest import open_settings
from rxlm.study.mechanisms import title
from rxlm.study.results import OK, ResultStore, Row
from rxlm.training.comparison.effect import effect

SCHEMA = "rxlm-study-comparison/1"
_EXACT = {
    # kind -> what tells its rows apart besides mechanism and seed, what is compared, unit
    "ppl": ((), ("final_loss", "bits_per_byte")),
    "task": (("task", "size", "learning_rate"), ("accuracy", "final_loss")),
    "memory": (("seq_len",), ("counted_total_mb", "saved_mb", "state_bytes")),
}
_LESS_IS_BETTER = {"accuracy": False}


def compare_studies(a: str | Path, b: str | Path) -> dict[str, Any]:
    """Return the comparison of two study folders, as JSON-like data.

    Raises:
        UserError: if one of them holds no study.
    """
    stores, settings = [], []
    for folder in (a, b):
        settings.append(open_settings(folder))
        stores.append(ResultStore(Path(folder)))
    first, second = (item.model_dump(mode="json") for item in settings)
    differing = {
        key: [first[key], second[key]]
        for key in first
        if first[key] != second[key] and key not in ("processes", "time_budget", "preset")
    }
    pairs = _pairs(settings[0].attention, settings[1].attention)
    exact = [row for pair in pairs for row in _exact(stores, pair)]
    times = [row for pair in pairs for row in _times(stores, pair)]
    different = [row for row in exact if row["verdict"] not in ("same", "no difference found")]
    return {
        "schema": SCHEMA,
        "folders": [str(a), str(b)],
        "settings": differing,
        "identical": bool(exact) and all(row["identical"] for row in exact),
        "compared": len(exact),
        "results": exact,
        "times": times,
        "verdict": _verdict(exact, different),
    }


def _pairs(a: tuple[str, ...], b: tuple[str, ...]) -> list[tuple[str, str]]:
    only_a, only_b = ([name for name in x if name not in y] for x, y in ((a, b), (b, a)))
    pairs = [(name, name) for name in a if name in b]
    if len(only_a) == 1 and len(only_b) == 1:
        pairs.append((only_a[0], only_b[0]))
    return pairs


def _name(pair: tuple[str, str]) -> str:
    a, b = (title(name) for name in pair)
    return a if a == b else f"{b} against {a}"


def _exact(stores: list[ResultStore], pair: tuple[str, str]) -> Iterator[dict[str, Any]]:
    for kind, (keys, columns) in _EXACT.items():
        groups: list[dict[Any, list[Row]]] = []
        for store, attention in zip(stores, pair, strict=True):
            found: dict[Any, list[Row]] = {}
            for row in store.rows(kind, attention=attention):
                if row["outcome"] == OK:
                    found.setdefault(tuple(row.get(key) for key in keys), []).append(row)
            groups.append(found)
        for where in groups[0]:
            if where not in groups[1]:
                continue
            for column in columns:
                values = [
                    {row.get("seed", 0): row[column] for row in found[where] if row.get(column)
                     is not None}
                    for found in groups
                ]  # fmt: skip
                if all(values):
                    yield _difference(kind, pair, dict(zip(keys, where, strict=True)), column,
                                      values)  # fmt: skip


def _difference(
    kind: str,
    pair: tuple[str, str],
    where: dict[str, Any],
    column: str,
    values: list[dict[int, float]],
) -> dict[str, Any]:
    a, b = values
    found = effect(list(a.values()), list(b.values()))
    return {
        "kind": kind,
        "mechanism": _name(pair),
        **where,
        "metric": column,
        "a": sum(a.values()) / len(a),
        "b": sum(b.values()) / len(b),
        "seeds": [len(a), len(b)],
        "identical": a == b,
        **found._asdict(),
        "verdict": "same" if a == b else found.verdict,
    }


def _times(stores: list[ResultStore], pair: tuple[str, str]) -> Iterator[dict[str, Any]]:
    for kind in ("efficiency", "prefill", "decode", "op"):
        samples = [
            {
                (row["seq_len"], row["phase"]): row["samples"]
                for row in store.rows(kind, attention=name)
                if row.get("samples") and row["outcome"] == OK
            }
            for store, name in zip(stores, pair, strict=True)
        ]
        for where in samples[0]:
            if where in samples[1]:
                a, b = (median_interval(found[where]) for found in samples)
                apart = a.high < b.low or b.high < a.low
                yield {
                    "kind": kind, "mechanism": _name(pair), "seq_len": where[0], "phase": where[1],
                    "a_ms": a.value, "b_ms": b.value, "ratio": b.value / a.value,
                    "intervals_overlap": not apart,
                }  # fmt: skip


def _verdict(exact: list[dict[str, Any]], different: list[dict[str, Any]]) -> str:
    if not exact:
        return "The studies have nothing in common that could be compared."
    if all(row["identical"] for row in exact):
        return f"No difference found: all {len(exact)} results are the same to the last digit."
    if not different:
        return f"No difference found beyond what seeds explain, in {len(exact)} results."
    sure = [row for row in different if row["verdict"] == "differs"]
    parts = [
        f"{row['mechanism']}, {row['metric']} of {_where(row)} "
        f"{row['difference']:+.3g} [{row['low']:+.3g}, {row['high']:+.3g}]"
        for row in sure[:5]
    ]
    more = f", and {len(sure) - 5} more" if len(sure) > 5 else ""
    unsure = len(different) - len(sure)
    words = f"{len(sure)} results differ: {'; '.join(parts)}{more}." if sure else ""
    if unsure:
        words += (
            f" {unsure} results are not the same, but a single seed on a side does not show by how "
            "much they would differ anyway."
        )
    return words.strip()


def _where(row: dict[str, Any]) -> str:
    parts = [str(row[key]) for key in ("task", "size", "seq_len") if row.get(key) is not None]
    return " ".join([row["kind"] if row["kind"] != "task" else "", *parts]).strip()


def comparison_tables(found: dict[str, Any]) -> Iterator[Table]:
    """Yield the tables of a comparison."""
    if found["settings"]:
        rows = [(key, str(a)[:60], str(b)[:60]) for key, (a, b) in found["settings"].items()]
        yield Table("Settings that differ", ("setting", "A", "B"), rows, prose=True)
    shown = [row for row in found["results"] if not row["identical"]] or found["results"][:20]
    rows_of_results = [
        (
            row["mechanism"], _where(row), row["metric"], f"{row['a']:.6g}", f"{row['b']:.6g}",
            f"{row['difference']:+.3g}",
            "-" if row["low"] is None else f"[{row['low']:+.3g}, {row['high']:+.3g}]",
            "-" if row["hedges_g"] is None else f"{row['hedges_g']:+.2f}", row["verdict"],
        )
        for row in shown
    ]  # fmt: skip
    if rows_of_results:
        header = ("mechanism", "of", "metric", "A", "B", "B - A", "95 %", "g", "verdict")
        hidden = len(found["results"]) - len(shown)
        note = "Welch's interval and Hedges' g over seeds." + (
            f" {hidden} more results are the same." if hidden else ""
        )
        yield Table("Results", header, rows_of_results, note, prose=True)
    times = [
        (
            row["mechanism"], f"{row['kind']} {row['phase']}", f"{row['seq_len']:,}",
            f"{row['a_ms']:.3g}", f"{row['b_ms']:.3g}", f"{row['ratio']:.2f}",
            "yes" if row["intervals_overlap"] else "no",
        )
        for row in found["times"]
    ]  # fmt: skip
    if times:
        titles = ("mechanism", "of", "tokens", "A ms", "B ms", "B / A", "intervals overlap")
        yield Table("Times (they depend on the machine)", titles, times, prose=True)
