"""T2 with contestants whose scores are known, on conversations made here."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import ModuleType

import pytest

from rxlm.data import Conversation, Interaction
from rxlm.evaluation.suite.babi import (
    FILE,
    load_questions,
    majority_share,
    pooled,
    questions_of,
    run_babi,
    summarise_babi,
)
from rxlm.evaluation.suite.settings import BabiSettings

PLACES = ("kitchen", "garden", "kitchen", "office")
SETTINGS = BabiSettings(tasks=("qa1", "qa2"), questions=10)


def conversations(task: str, count: int = 40) -> list[Conversation]:
    """Return conversations that tell a place and ask for it two turns later."""
    found = []
    for number in range(count):
        place = PLACES[number % 4]
        turns = (
            Interaction(f"Mary went to the {place}.", "ok.", "fact"),
            Interaction("John slept.", "ok.", "fact"),
            Interaction("Where is Mary?", place, "question", distance=2),
        )
        found.append(Conversation(turns, id=f"{task}:{number}"))
    return found


def test_oracle_parrot_and_majority(known: ModuleType) -> None:
    """Catches a score that counts other turns than questions, or compares with the wrong answer."""
    data = {task: conversations(task) for task in SETTINGS.tasks}
    questions = {task: questions_of(task, found) for task, found in data.items()}
    every = [item for found in data.values() for item in found]
    contestants = [known.Oracle(("M", "F"), every), known.Parrot(("Z",))]
    rows = run_babi(contestants, questions, SETTINGS, (0, 1, 2))
    by_control = {c: [row for row in rows if row["control"] == c] for c in "MFZ"}
    assert pooled(by_control["M"]).mean == pooled(by_control["F"]).mean == 1.0
    assert pooled(by_control["Z"]).mean == 0.0
    assert {row["distance"] for row in rows} == {2}
    assert sum(row["n"] for row in by_control["M"]) == 2 * 3 * 10
    assert {row["seed"] for row in rows} == {0, 1, 2}
    # "kitchen" is half of all answers, give or take which of them were drawn.
    assert majority_share(rows) == pytest.approx(0.5, abs=0.2)
    found = {item["name"]: item for item in summarise_babi(rows)}
    assert found["qa1"]["passed"] is True and found["mean_Z"]["value"] == 0.0
    assert "most frequent" in found["qa1"]["note"]


def test_seeds_share_no_conversation() -> None:
    """Catches three seeds that ask the same: an interval that is too small."""
    questions = questions_of("qa1", conversations("qa1"))
    assert len({question.asked for question in questions}) <= 4
    assert len(questions) == 40 and len({id(question.history) for question in questions}) == 40


def test_a_task_is_known_by_its_id(tmp_path: Path) -> None:
    """Catches tasks that are mixed up, and conversations that a contestant cannot read."""
    file = tmp_path / FILE
    file.parent.mkdir()
    with gzip.open(file, "wt") as out:
        for task in ("qa1", "qa2", "qa20"):
            for item in conversations(task, 4):
                out.write(json.dumps(item.to_dict()) + "\n")
    found = load_questions(tmp_path, SETTINGS, lambda turns: "office" not in turns[0].query)
    assert {task: len(questions) for task, questions in found.items()} == {"qa1": 3, "qa2": 3}
