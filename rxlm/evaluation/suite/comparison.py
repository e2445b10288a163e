"""Documents of the suite side by side: the same numbers of several models. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rxlm.errors import UserError
from rxlm.evaluation.result_tables import NO_VALUE, percent
from rxlm.evaluation.suite.facts import mean_chance, pooled, select
from rxlm.evaluation.suite.findings import Finding
from rxlm.evaluation.suite.settings import TEST_TITLES, SuiteSettings
from rxlm.evaluation.suite.tables import shown_number
from rxlm.evaluation.tables import Table

CHECK = "✓"
"""Stands behind a number that reaches its goal."""


def comparison_tables(documents: Mapping[str, Any]) -> list[Table]:
    """Return the tables of a comparison.

    Args:
        documents: by what their columns are called; at least one.

    Raises:
        UserError: if they asked different questions, with the test and setting that differ.
    """
    check_same_questions(documents)
    return [
        table for table in (compared_goals(documents), compared_recall(documents)) if table.rows
    ]


def check_same_questions(documents: Mapping[str, Any]) -> None:
    """Refuse documents whose tests were not asked alike.

    Raises:
        UserError: see :func:`comparison_tables`.
    """
    # Read anew: a setting that an older document does not know had the default.
    settings: dict[str, dict[str, Any]] = {}
    for name, document in documents.items():
        parsed = SuiteSettings.parse(document["settings"], f"settings of {name}")
        settings[name] = parsed.model_dump(mode="json")
    for (first, one), (name, other) in itertools.combinations(documents.items(), 2):
        for test in ("seeds", "max_answer_tokens", *one["tests"].keys() & other["tests"].keys()):
            mine, theirs = settings[first][test], settings[name][test]
            if mine != theirs:
                raise UserError(
                    f"{first} and {name} were asked different questions: {test} was {mine} and "
                    f"{theirs}. Run 'rxlm eval suite' with the same settings for both."
                )


def compared_goals(documents: Mapping[str, Any], only: Sequence[str] = ()) -> Table:
    """Return every finding with a goal, or those of the names ``only``; a column a document."""
    found: dict[tuple[str, str], dict[str, Finding]] = {}
    for name, document in documents.items():
        for result in document["tests"].values():
            for item in result["findings"]:
                if item["goal"] is not None and (not only or item["name"] in only):
                    found.setdefault((item["test"], item["name"]), {})[name] = item
    body = []
    for (test, _), by_document in found.items():
        example = next(iter(by_document.values()))
        sign = "+-" if example["comparison"] == "within" else f"{example['comparison']} "
        assert example["goal"] is not None
        goal = f"{sign}{shown_number(example['goal'], example['unit'])}"
        cells = [_cell(by_document.get(name)) for name in documents]
        label = example["label"] if only else f"{TEST_TITLES[test][:2]} {example['label']}"
        body.append((label, goal, *cells))
    note = f"{CHECK}: reached. Shares in percent."
    return Table("Goals of the suite", ("", "goal", *documents), body, note)


def _cell(item: Finding | None) -> str:
    if item is None or item["value"] is None:
        return NO_VALUE
    text = shown_number(item["value"], item["unit"])
    return f"{text} {CHECK}" if item["passed"] else text


def compared_recall(documents: Mapping[str, Any]) -> Table:
    """Return recall by number of facts and distance, memory on; a column a document."""
    rows = {
        name: [
            row
            for row in document["tests"].get("facts", {}).get("rows", ())
            if row["group"] in ("main", "long") and row["control"] == "M"
        ]
        for name, document in documents.items()
    }
    body = []
    for count, distance in sorted(
        {(r["facts"], r["distance"]) for own in rows.values() for r in own}
    ):
        parts = [select(own, facts=count, distance=distance) for own in rows.values()]
        cells = [percent(pooled(part).mean) if part else NO_VALUE for part in parts]
        chance = percent(mean_chance(next(part for part in parts if part)))
        body.append((str(count), str(distance), *cells, chance))
    return Table(
        "Recall of facts", ("facts", "turns ago", *documents, "chance"), body, "Percent, memory on."
    )
