"""Documents side by side: each number in its own column, judged as the suite judged it."""

from __future__ import annotations

from typing import Any

import pytest

from rxlm.errors import UserError
from rxlm.evaluation.suite.comparison import compared_goals, comparison_tables
from rxlm.evaluation.suite.findings import finding


def document(share: float, with_babi: bool = False, **settings: Any) -> dict[str, Any]:
    row = {
        "group": "main", "kind": "recall", "unseen": "pairs", "distance": 4, "facts": 4,
        "together": 1, "control": "M", "seed": 0, "n": 1000, "exact": share, "value": share,
        "stale": 0.0, "declined": 0.0, "chance": 0.02,
    }  # fmt: skip
    found = [
        finding("facts", "four_facts", "4 facts", share, goal=0.99),
        finding("facts", "stale", "old value", 0.005, comparison="<=", goal=0.01),
        finding("facts", "no_goal", "never shown", 0.5),
    ]
    tests = {"facts": {"findings": found, "rows": [row, {**row, "control": "Z", "exact": 0.0}]}}
    if with_babi:
        tests["babi"] = {"findings": [finding("babi", "qa1", "qa1", 0.5, goal=0.95)], "rows": []}
    asked = {"seeds": [0], "max_answer_tokens": 24, "facts": {"dialogues": 100}, "babi": {}}
    return {"settings": {**asked, **settings}, "tests": tests}


def test_one_column_a_document() -> None:
    """Catches a column under another model's name, a mark of its own judgement, controls counted
    as the memory, and a test that was skipped and shifts the columns."""
    documents = {"mha": document(0.995), "kda": document(0.5, with_babi=True)}
    goals, recall = comparison_tables(documents)
    assert goals.header == ("", "goal", "mha", "kda")
    assert goals.rows == [
        ("T1 4 facts", ">= 99.0", "99.5 ✓", "50.0"),
        ("T1 old value", "<= 1.0", "0.5 ✓", "0.5 ✓"),
        ("T2 qa1", ">= 95.0", "-", "50.0"),
    ]
    assert recall.rows == [("4", "4", "99.5", "50.0", "2.0")]
    only = compared_goals(documents, ["stale"])
    assert only.rows == [("old value", "<= 1.0", "0.5 ✓", "0.5 ✓")]


def test_other_questions_are_refused() -> None:
    """Catches numbers of different questions beside each other; a test that only one has run is
    none of them."""
    comparison_tables(
        {"a": document(0.5), "b": document(0.5, with_babi=True, babi={"questions": 5})}
    )
    # The second and the third, in a test that the first has not run.
    apart = [document(0.5, with_babi=True, babi={"questions": count}) for count in (5, 6)]
    with pytest.raises(UserError, match=r"b and c .*babi"):
        comparison_tables({"a": document(0.5), "b": apart[0], "c": apart[1]})
    for setting in ({"seeds": [1]}, {"facts": {"dialogues": 20}}):
        with pytest.raises(UserError, match=next(iter(setting))):
            comparison_tables({"a": document(0.5), "b": document(0.5, **setting)})


def test_a_setting_that_came_later_had_the_default() -> None:
    """Catches documents that can no longer be compared because one is older than a setting."""
    new = document(0.5, facts={"dialogues": 100, "distances": [1, 2, 4, 8, 16]})
    comparison_tables({"old": document(0.5), "new": new})
    other = document(0.5, facts={"dialogues": 100, "distances": [1]})
    with pytest.raises(UserError, match=r"old and new .*facts"):
        comparison_tables({"old": document(0.5), "new": other})
