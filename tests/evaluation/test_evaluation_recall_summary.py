"""The named figures, their goals, and what passes."""

from __future__ import annotations

from typing import Any

import pytest

from rxlm.evaluation.recall_plan import RecallSettings, plan_cells
from rxlm.evaluation.recall_summary import GOALS, Figure, aggregate, all_passed, summarise
from rxlm.evaluation.rows import RecallRow


def row(**values: Any) -> RecallRow:
    """Return a row of the main test, changed by ``values``."""
    base: dict[str, Any] = {
        "test": "recall", "unseen": "pairs", "distance": 1, "facts": 4, "history": "reference",
        "seed": 0, "condition": "memory", "n": 100, "exact": 1.0, "value": 1.0, "stale": 0.0,
        "declined": 0.0, "chance": 0.02,
    }  # fmt: skip
    return RecallRow(**{**base, **values})


def good_rows() -> list[RecallRow]:
    """Return rows of the default plan in which every goal is just reached."""
    rows = []
    for cell in plan_cells(RecallSettings()):
        for seed in (0, 1, 2):
            for condition in cell.conditions:
                exact = {1: 0.97, 2: 0.97, 4: 0.97, 8: 0.95, 16: 0.85}[cell.distance]
                if condition != "memory":
                    exact = 0.05
                if cell.test == "update":
                    exact = 0.90
                rows.append(
                    row(
                        test=cell.test, unseen=cell.unseen, distance=cell.distance,
                        facts=cell.facts, history=cell.history, seed=seed, condition=condition,
                        exact=exact, stale=0.05 if cell.test == "update" else 0.0,
                        declined=0.90 if cell.test == "unknown" else 0.0,
                    )
                )  # fmt: skip
    return rows


def by_name(figures: list[Figure]) -> dict[str, Figure]:
    """Return the figures by name."""
    return {figure["name"]: figure for figure in figures}


def test_the_default_plan_measures_every_figure() -> None:
    """Catches a figure whose rows the plan does not produce, and goals missed by rounding."""
    figures = summarise(good_rows())
    assert [figure["name"] for figure in figures] == [goal.name for goal in GOALS]
    assert all(figure["passed"] is not False for figure in figures)
    assert all_passed(figures)
    found = by_name(figures)
    assert found["distance_1_to_4"]["n"] == 3 * 3 * 3 * 100
    assert found["distance_16"]["value"] == pytest.approx(0.85)
    assert found["zeroed_minus_chance"]["value"] == pytest.approx(0.03)
    assert found["free_running"]["passed"] is None


@pytest.mark.parametrize(
    ("name", "chosen", "changed"),
    [
        ("distance_1_to_4", {"distance": 4, "condition": "memory"}, {"exact": 0.95}),
        ("distance_8", {"distance": 8, "condition": "memory"}, {"exact": 0.94}),
        ("distance_16", {"distance": 16, "condition": "memory"}, {"exact": 0.80}),
        ("updated", {"test": "update", "condition": "memory"}, {"exact": 0.89}),
        ("stale", {"test": "update", "condition": "memory"}, {"stale": 0.06}),
        ("declined", {"test": "unknown"}, {"declined": 0.89}),
        ("zeroed_minus_chance", {"condition": "zeroed"}, {"exact": 0.06}),
        ("swapped_minus_chance", {"condition": "swapped", "distance": 1}, {"exact": 0.5}),
    ],
)
def test_each_goal_fails_by_its_own_rows(
    name: str, chosen: dict[str, Any], changed: dict[str, Any]
) -> None:
    """Catches a goal that looks at other rows, or that cannot fail."""
    rows = [
        RecallRow(**{**item, **changed})  # type: ignore[typeddict-item]
        if chosen.items() <= dict(item).items()
        else item
        for item in good_rows()
    ]
    figures = by_name(summarise(rows))
    assert [key for key, figure in figures.items() if figure["passed"] is False] == [name]
    assert not all_passed(list(figures.values()))


def test_below_chance_is_as_bad_as_above() -> None:
    """Catches a control that may be arbitrarily worse than guessing, as broken decoding is."""
    rows = [row(condition="zeroed", exact=0.0, chance=0.031)]
    assert summarise(rows)[0]["passed"] is False
    assert summarise([row(condition="zeroed", exact=0.0, chance=0.029)])[0]["passed"] is True


def test_what_was_not_measured_is_not_passed() -> None:
    """Catches a verdict of success on a part of the test."""
    rows = [item for item in good_rows() if item["distance"] != 16]
    figures = summarise(rows)
    assert "distance_16" not in by_name(figures)
    assert all(figure["passed"] is not False for figure in figures)
    assert not all_passed(figures)
    assert summarise([]) == []


def test_other_rows_do_not_touch_the_main_figures() -> None:
    """Catches own answers, easier dialogues and more facts pooled into the main test."""
    rows = [
        row(exact=0.98),
        row(exact=0.0, history="own"),
        row(exact=0.0, unseen="none"),
        row(exact=0.0, facts=8),
        row(exact=0.0, test="update"),
        row(exact=0.0, condition="reset"),
    ]
    found = by_name(summarise(rows))
    assert found["distance_1_to_4"]["value"] == pytest.approx(0.98)
    assert found["distance_1_to_4"]["n"] == 100
    assert found["free_running"]["value"] == 0.0


def test_aggregates_pool_seeds_and_nothing_else() -> None:
    """Catches cells that are merged, or seeds that are not."""
    rows = [row(seed=0, exact=1.0), row(seed=1, exact=0.5, n=300), row(facts=2, exact=0.25)]
    first, second = aggregate(rows)
    assert (first["mean"], first["n"], first["facts"]) == (0.625, 400, 4)
    assert (first["seed_min"], first["seed_max"]) == (0.5, 1.0)
    assert first["low"] < 0.625 < first["high"]
    assert (second["mean"], second["facts"], second["chance"]) == (0.25, 2, 0.02)
