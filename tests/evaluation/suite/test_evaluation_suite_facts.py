"""T1 with contestants whose scores are known, and what is derived from accuracies."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest

from rxlm.evaluation.suite.facts import (
    FactsRow,
    capacity,
    capacity_points,
    half_distance,
    mean_chance,
    plan_facts,
    pooled,
    run_facts,
    select,
    summarise_facts,
)
from rxlm.evaluation.suite.findings import Finding
from rxlm.evaluation.suite.settings import FactsSettings, SuiteSettings

SETTINGS = SuiteSettings.quick().facts.model_copy(
    update={"side_distances": (1, 4), "together": (2, 4), "long_distances": (24, 64)}
)


def rows_of(contestant: Any, settings: FactsSettings = SETTINGS) -> list[FactsRow]:
    """Return the rows of one contestant on two seeds."""
    return run_facts([contestant], settings, (0, 1))


def by_name(found: list[Finding]) -> dict[str, Finding]:
    """Return findings by name."""
    return {item["name"]: item for item in found}


def test_an_oracle_reaches_everything(known: ModuleType) -> None:
    """Catches a question that has no right answer, and a score that calls one wrong."""
    rows = rows_of(known.Oracle(("M",)))
    assert all(row["exact"] == 1.0 for row in rows)
    found = by_name(summarise_facts(rows))
    assert found["false_recall"]["value"] == 0.0 and found["stale"]["value"] == 0.0
    assert all(item["passed"] is not False for item in found.values())
    judged = {name for name, item in found.items() if item["passed"]}
    assert {"one_fact_near", "four_facts", "eight_facts_at_8", "updated", "stale"} <= judged
    assert {"after_24", "after_64", "unseen_words", "false_recall"} <= judged
    # It holds what it was told, and accuracy never falls.
    assert found["capacity"]["value"] == pytest.approx(8)
    assert found["half_distance_4"]["value"] is None
    assert "not within" in found["half_distance_4"]["note"]


def test_a_dice_is_at_chance(known: ModuleType) -> None:
    """Catches a level of chance that is too low: then guessing looks like remembering."""
    update = {
        "dialogues": 1200,
        "distances": (1,),
        "facts": (4,),
        "side_distances": (),
        "long_distances": (),
    }
    rows = select(rows_of(known.Dice(), SETTINGS.model_copy(update=update)), group="main")
    found, chance = pooled(rows), mean_chance(rows)
    assert found.low <= chance <= found.high
    assert capacity(4, chance, chance) == pytest.approx(0, abs=1e-9)
    few = SETTINGS.model_copy(update={"dialogues": 12, "long_distances": ()})
    unknown = by_name(summarise_facts(rows_of(known.Dice(), few)))["false_recall"]
    assert unknown["value"] == 1.0 and unknown["passed"] is False


def test_a_parrot_gets_nothing(known: ModuleType) -> None:
    """Catches an answer that is right because the turn before says it (distance 1 with an echo)."""
    rows = rows_of(known.Parrot())
    assert all(row["exact"] == 0.0 for row in rows if row["distance"] > 1)
    # Even the turn before says "noted", not the answer.
    assert pooled(select(rows, group="main")).mean < 0.02


def test_old_values_are_counted_as_stale(known: ModuleType) -> None:
    """Catches a stale rate that does not see a model which never updates."""
    found = by_name(summarise_facts(rows_of(known.First())))
    assert found["stale"]["value"] == 1.0 and found["stale"]["passed"] is False
    assert found["updated"]["value"] == 0.0
    assert found["four_facts"]["value"] == 1.0


def test_controls_are_judged_against_chance(known: ModuleType) -> None:
    """Catches a control that passes although it knows the answers: a leak."""
    found = by_name(summarise_facts(run_facts([known.Oracle(("M", "Z", "X"))], SETTINGS, (0,))))
    assert found["Z_minus_chance"]["passed"] is False
    assert found["memory_use"]["value"] == 0.0


def test_capacity_is_the_published_formula(known: ModuleType) -> None:
    """ARMT: n pairs among v values at accuracy a hold (n v a - n) / (v - 1)."""
    assert capacity(10, 0.55, 1 / 10) == pytest.approx((10 * 10 * 0.55 - 10) / 9)
    assert capacity(10, 1.0, 1 / 10) == pytest.approx(10)
    rows = rows_of(known.Oracle())
    assert [point["facts"] for point in capacity_points(rows)] == [1, 4, 8]


def test_half_distance_is_read_off_the_curve() -> None:
    """Catches a half taken of 1.0, or the first distance below it instead of the crossing."""
    assert half_distance([(1, 0.8), (4, 0.6), (16, 0.2)]) == pytest.approx(4 * 4**0.5)
    assert half_distance([(1, 0.8), (2, 0.7)]) is None
    assert half_distance([(1, 1.0), (2, 0.5)]) == pytest.approx(2)
    assert math.isclose(half_distance([(8, 0.4), (2, 0.9)]) or 0, 2 * 4**0.9)


def test_cells_are_distinct_and_the_whole_list() -> None:
    """Catches a cell asked twice (it would count double) and a group that is left out."""
    cells = plan_facts(FactsSettings())
    assert len(set(cells)) == len(cells)
    groups = {cell.group for cell in cells}
    assert groups == {"main", "long", "capacity", "together", "unseen", "update", "unknown"}
    assert {cell.distance for cell in cells if cell.group == "long"} == {24, 36, 64}
