"""What the tables of an evaluation hold. Built from rows, so from a report's JSON. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rxlm.evaluation.recall_summary import Figure, mean_chance, pool
from rxlm.evaluation.rows import RecallRow, loss_of, matching
from rxlm.evaluation.tables import FAILED, PASSED, Table

SHOWN_TURNS = (1, 2, 4, 8, 12, 16, 24, 32)
MAX_MISTAKES = 12
NO_VALUE = "-"

TEST_NAMES = {"recall": "told fact", "update": "changed fact", "unknown": "never told"}
UNSEEN_NAMES = {
    "pairs": "value new for its fact",
    "none": "only the dialogue",
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


def with_interval(mean: float, low: float, high: float) -> str:
    """Return ``97.3 [96.0, 98.2]`` in percent."""
    return f"{percent(mean)} [{percent(low)}, {percent(high)}]"


def goals_table(summary: Sequence[Figure]) -> Table:
    """Return the named figures beside what is asked of them."""
    rows = []
    for figure in summary:
        goal = figure["goal"]
        sign = {"within": "within +-"}.get(figure["comparison"], figure["comparison"] + " ")
        rows.append(
            (
                figure["label"],
                with_interval(figure["value"], figure["low"], figure["high"]),
                f"{percent(figure['seed_min'])} .. {percent(figure['seed_max'])}",
                str(figure["n"]),
                NO_VALUE if goal is None else f"{sign}{percent(goal)}",
                NO_VALUE if figure["passed"] is None else PASSED if figure["passed"] else FAILED,
            )
        )
    return Table(
        "Memory test",
        ("figure", "percent [95 % interval]", "seeds", "answers", "goal", ""),
        rows,
        "Facts asked for are values never told for their kind of fact in training.",
    )


def recall_table(rows: Sequence[RecallRow], main: str, history: str) -> Table:
    """Return right answers by distance and number of facts, beside the controls.

    Args:
        rows: of the recall test.
        main: the ``unseen`` of the main test.
        history: the ``history`` of the main test.
    """
    main_rows = [row for row in rows if row["test"] == "recall" and row["unseen"] == main]
    facts = sorted({row["facts"] for row in main_rows})
    columns: list[tuple[str, dict[str, Any]]] = [
        (
            f"{count} fact{'s' * (count > 1)}",
            {"facts": count, "condition": "memory", "history": history},
        )
        for count in facts
    ]
    if history != "own":
        columns.append(("own answers", {"condition": "memory", "history": "own"}))
    for condition in ("zeroed", "reset", "swapped"):
        columns.append((condition, {"condition": condition, "history": history}))
    columns = [item for item in columns if matching(main_rows, **item[1])]
    body = []
    for distance in sorted({row["distance"] for row in main_rows}):
        at = [row for row in main_rows if row["distance"] == distance]
        cells = [_share_or_dash(matching(at, **wanted)) for _, wanted in columns]
        body.append((str(distance), *cells, percent(mean_chance(at))))
    return Table(
        f"Recall by distance ({UNSEEN_NAMES[main]})",
        ("turns ago", *(name for name, _ in columns), "chance"),
        body,
        "Percent of questions answered word for word [95 % interval]; controls over all numbers "
        "of facts. 'own answers': the model's own answers were remembered, not the reference's.",
    )


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
                with_interval(exact.mean, exact.low, exact.high),
                percent(pool(at, "stale").mean) if test == "update" else NO_VALUE,
                percent(pool(at, "declined").mean),
            )
        )
    return Table(
        "Other questions",
        ("asked for", "new to the model", "turns ago", "right", "old value", "declined"),
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
        + ". Carry-over words occurred in an earlier turn and not in the query.",
    )


def mistakes_table(mistakes: Sequence[Mapping[str, Any]]) -> Table:
    """Return some wrong answers, spread over the tests."""
    step = max(1, len(mistakes) // MAX_MISTAKES)
    body = [
        (
            f"{TEST_NAMES[item['test']]}, {item['distance']} turns ago",
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


def _share_or_dash(rows: Sequence[RecallRow]) -> str:
    if not rows:
        return NO_VALUE
    found = pool(rows)
    return with_interval(found.mean, found.low, found.high)


def _perplexity(loss: float | None) -> str:
    return NO_VALUE if loss is None else f"{math.exp(min(loss, 700.0)):.4g}"
