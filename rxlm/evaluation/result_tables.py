"""What the tables of an evaluation hold. Built from rows, so from a report's JSON. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rxlm.evaluation.recall_summary import Figure, mean_chance, pool
from rxlm.evaluation.rows import PerplexityRow, RecallRow, loss_of, matching
from rxlm.evaluation.tables import FAILED, PASSED, Table

SHOWN_TURNS = (1, 2, 4, 8, 12, 16, 24, 32)
MAX_MISTAKES = 12
NO_VALUE = "-"

TEST_NAMES = {"recall": "told fact", "update": "changed fact", "unknown": "never told"}
UNSEEN_NAMES = {
    "pairs": "value for this fact",
    "none": "dialogue only",
    "templates": "wording",
    "words": "made-up word",
}
CONDITION_NAMES = {
    "memory": "memory",
    "zeroed": "memory zeroed",
    "reset": "memory reset",
    "swapped": "memory swapped",
}


def percent(share: float) -> str:
    """Return ``97.3``."""
    return f"{100 * share:.1f}"


def span(low: float, high: float) -> str:
    """Return ``96.0 .. 98.2`` in percent."""
    return f"{percent(low)} .. {percent(high)}"


def goals_table(summary: Sequence[Figure]) -> Table:
    """Return the named figures beside what is asked of them."""
    body = []
    for figure in summary:
        goal, passed = figure["goal"], figure["passed"]
        sign = "+-" if figure["comparison"] == "within" else figure["comparison"] + " "
        body.append(
            (
                figure["label"],
                percent(figure["value"]),
                span(figure["low"], figure["high"]),
                span(figure["seed_min"], figure["seed_max"]),
                NO_VALUE if goal is None else f"{sign}{percent(goal)}",
                NO_VALUE if passed is None else PASSED if passed else FAILED,
            )
        )
    return Table(
        "Memory test",
        ("percent of answers", "found", "95 % interval", "by seed", "goal", ""),
        body,
        "Right: word for word. Facts asked for: values never told for their kind of fact in "
        "training.",
    )


def recall_table(rows: Sequence[RecallRow], main: str, history: str) -> Table:
    """Return right answers by distance and number of facts, beside the controls.

    Args:
        rows: of the recall test.
        main: the ``unseen`` of the main test.
        history: the ``history`` of the main test.
    """
    main_rows = matching(rows, test="recall", unseen=main)
    columns = _recall_columns(main_rows, history)
    body = []
    widest = 0.0
    for distance in sorted({row["distance"] for row in main_rows}):
        at = matching(main_rows, distance=distance)
        cells = [str(distance)]
        for wanted in columns.values():
            chosen = matching(at, **wanted)
            found = pool(chosen) if chosen else None
            cells.append(NO_VALUE if found is None else percent(found.mean))
            if found is not None:
                widest = max(widest, found.high - found.mean, found.mean - found.low)
        body.append((*cells, percent(mean_chance(at))))
    return Table(
        f"Recall by distance (new to the model: {UNSEEN_NAMES[main]})",
        ("turns ago", *columns, "chance"),
        body,
        f"Percent of questions answered right, at most +-{percent(widest)} (95 % interval). "
        "Controls: over all numbers of facts. 'own answers': what the model itself had answered "
        "was remembered, with the largest number of facts.",
    )


def _recall_columns(rows: Sequence[RecallRow], history: str) -> dict[str, dict[str, Any]]:
    """Return the columns that ``rows`` can fill: name and which rows they take."""
    columns: dict[str, dict[str, Any]] = {}
    for facts in sorted({row["facts"] for row in rows}):
        name = f"{facts} fact{'s' * (facts > 1)}"
        columns[name] = {"facts": facts, "condition": "memory", "history": history}
    if history != "own":
        columns["own answers"] = {"condition": "memory", "history": "own"}
    for condition in ("zeroed", "reset", "swapped"):
        columns[condition] = {"condition": condition, "history": history}
    return {name: wanted for name, wanted in columns.items() if matching(rows, **wanted)}


def other_tests_table(rows: Sequence[RecallRow], main: str) -> Table:
    """Return the tests beside the main one: other novelty, changed facts, facts never told."""
    chosen = [
        row
        for row in rows
        if row["condition"] == "memory" and (row["test"] != "recall" or row["unseen"] != main)
    ]
    keys = dict.fromkeys((row["test"], row["unseen"], row["distance"]) for row in chosen)
    body = []
    for test, unseen, distance in keys:
        at = matching(chosen, test=test, unseen=unseen, distance=distance)
        exact = pool(at)
        body.append(
            (
                TEST_NAMES[test],
                UNSEEN_NAMES[unseen],
                str(distance),
                percent(exact.mean),
                span(exact.low, exact.high),
                percent(pool(at, "stale").mean) if test == "update" else NO_VALUE,
                percent(pool(at, "declined").mean),
            )
        )
    return Table(
        "Other questions",
        (
            *("asked for", "new to the model", "turns ago", "right", "95 % interval"),
            *("old value", "declined"),
        ),
        body,
        "Percent. 'declined': the answer says that the fact is not known.",
    )


def perplexity_table(result: Mapping[str, Any]) -> Table:
    """Return the perplexities of one data set by condition."""
    rows = result["rows"]
    turns = [turn for turn in SHOWN_TURNS if any(row["turn"] == turn for row in rows)]
    columns = [("answer", 0), ("carry-over", 0), *(("answer", turn) for turn in turns)]
    body = []
    for condition in dict.fromkeys(row["condition"] for row in rows):
        losses = [loss_of(rows, condition, tokens, turn) for tokens, turn in columns]
        body.append((CONDITION_NAMES[condition], *map(_perplexity, losses)))
    return Table(
        f"Answer perplexity: {result['source'] or 'conversations'}",
        ("read", "all turns", "carry-over words", *(f"turn {turn}" for turn in turns)),
        body,
        f"{result['num_dialogues']} conversations"
        + (f", {result['num_skipped']} left out as too long" if result["num_skipped"] else "")
        + ". Carry-over words occurred in an earlier turn and not in the query. Lowest over all "
        f"turns: {_lowest(rows)}.",
    )


def mistakes_table(mistakes: Sequence[Mapping[str, Any]]) -> Table:
    """Return some wrong answers, spread over the tests."""
    step = max(1, len(mistakes) // MAX_MISTAKES)
    body = [
        (
            f"{TEST_NAMES[item['test']]}, distance {item['distance']}",
            item["told"] or NO_VALUE,
            item["query"],
            item["expected"],
            item["answer"],
        )
        for item in mistakes[::step][:MAX_MISTAKES]
    ]
    return Table(
        "Some wrong answers", ("asked for", "told", "asked", "right", "given"), body, prose=True
    )


def report_tables(report: Mapping[str, Any]) -> list[Table]:
    """Return the tables of a report that have rows, the summary first."""
    tables = []
    recall = report["recall"]
    if recall is not None:
        main, history = recall["settings"]["unseen"][0], recall["settings"]["history"]
        tables += [
            goals_table(recall["summary"]),
            recall_table(recall["rows"], main, history),
            other_tests_table(recall["rows"], main),
        ]
    tables += [perplexity_table(result) for result in report["perplexity"]]
    return [table for table in tables if table.rows]


def _lowest(rows: Sequence[PerplexityRow]) -> str:
    """Return the name of the condition under which answers are predicted best."""
    losses = {row["condition"]: loss_of(rows, row["condition"]) or 0.0 for row in rows}
    return CONDITION_NAMES[min(losses, key=losses.__getitem__)]


def _perplexity(loss: float | None) -> str:
    if loss is None:
        return NO_VALUE
    value = math.exp(min(loss, 700.0))
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 10_000 else f"{value:.2e}"
