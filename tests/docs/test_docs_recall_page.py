"""The recall page: what was asked is held against the rows of a report, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    """The module scripts/recall_page.py."""
    return load_script("recall_page")


def row(test: str, distance: int, share: float, **changes: Any) -> dict[str, Any]:
    made = {
        "test": test, "unseen": "pairs", "distance": distance, "facts": 4, "seed": 0,
        "history": "reference", "condition": "memory", "n": 100, "exact": share,
    }  # fmt: skip
    return {**made, **changes}


@pytest.mark.parametrize("worst", [0.99, 0.9])
def test_one_distance_below_the_bar_is_not_met(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, worst: float
) -> None:
    """Catches a bar that a good mean hides a bad distance from, controls that are counted as the
    model's own answers, and a distance that was not measured but passes."""
    rows = [row("recall", distance, 1.0) for distance in (1, 2, 4)]
    rows += [row("recall", 8, worst), row("recall", 8, 0.0, condition="zeroed")]
    rows += [row("recall", 8, 0.1, unseen="words")]
    if worst > 0.95:
        rows.append(row("update", 4, 0.97))
    report = {"recall": {"rows": rows, "settings": {"unseen": ["pairs", "words"]}}}
    monkeypatch.setattr(script, "read_json", lambda path: report)
    monkeypatch.setattr(script, "training_minutes", lambda run: 15.2)
    met = [line[2] for line in script.bars(Path("runs/x")).rows]
    expected = "yes" if worst > 0.95 else "NO"
    assert met == [expected, expected, "NO", "NO"]
