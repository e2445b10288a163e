"""The script that copies transcript and recall table from a report into the README."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rxlm.evaluation.recall_plan import RecallSettings
from rxlm.evaluation.recall_summary import summarise
from rxlm.evaluation.report import SCHEMA
from rxlm.training.run_folder import RunStatus

ROOT = Path(__file__).resolve().parents[2]
EMPTY = (
    "<!-- transcript:begin -->\n<!-- transcript:end -->\n<!-- recall:begin --><!-- recall:end -->"
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "scripts" / "update_readme.py"
    spec = importlib.util.spec_from_file_location("update_readme", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recall_row(**changes: Any) -> Any:
    row = {"test": "recall", "unseen": "pairs", "distance": 4, "facts": 1, "history": "reference"}
    row |= {"seed": 0, "condition": "memory", "n": 50, "exact": 0.96, "value": 0.98, "stale": 0.0}
    return {**row, "declined": 0.0, "chance": 0.02, **changes}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished pipeline, as far as the script reads it."""
    folder = tmp_path / "runs" / "nano"
    for name, seconds in (("10_tokenizer", 30.0), ("50_memory_aware", 270.0)):
        (folder / name).mkdir(parents=True)
        status = RunStatus(stage="sft", status="complete", seconds=seconds)
        (folder / name / "run.json").write_text(status.model_dump_json(), encoding="utf-8")
        (folder / name / "env.json").write_text('{"world_size": 2}', encoding="utf-8")
    rows = [
        recall_row(),
        recall_row(condition="zeroed", exact=0.02),
        recall_row(test="update", exact=0.9, stale=0.04),
        recall_row(unseen="words", exact=0.7),
        recall_row(unseen="words", exact=0.5, condition="zeroed"),
        recall_row(unseen="words", exact=0.1, distance=16),
    ]
    settings = RecallSettings(seeds=(0,), dialogues=50).model_dump(mode="json")
    report = {
        "schema": SCHEMA,
        "created": "",
        "model": {"num_parameters": 1234567, "num_layers": 2, "num_slots": 32, "dim": 64},
        "environment": {"num_cpus": 2, "num_threads": 1, "torch": "2.13.0"},
        "seconds": 1.0,
        "recall": {"settings": settings, "rows": rows, "summary": summarise(rows)},
        "perplexity": [],
        "training": {},
        "transcript": [
            [[1, "you", "I am Ann."], [1, "model", "Hello, Ann."]],
            [[2, "you", "Who am I?"], [2, "model", "Your name is Ann."]],
        ],
    }
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return folder


def test_the_blocks_hold_what_the_report_says(
    script: ModuleType, run: Path, tmp_path: Path
) -> None:
    """A number that is rounded wrongly, taken from another row, or left out."""
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{EMPTY}\nafter\n", encoding="utf-8")
    assert script.main([str(run), "--readme", str(readme)]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n")
    assert " 1  I am Ann.  Hello, Ann.\n" in text
    assert text.index("Hello, Ann.") < text.index("new one loads") < text.index("Who am I?")
    assert "| 4 | 96.0 | 2.0 | 2.0 |" in text
    assert "old value of a changed fact: 4.0 %" in text
    assert "made-up words: 70.0 %" in text
    assert "1,234,567 parameters" in text and "5.0 minutes" in text
    assert "2 processes of 1 thread on" in text


def test_check_tells_a_current_readme_from_an_old_one(
    script: ModuleType, run: Path, tmp_path: Path
) -> None:
    """A check that writes, or that passes whatever the README says."""
    readme = tmp_path / "README.md"
    readme.write_text(EMPTY, encoding="utf-8")
    arguments = [str(run), "--readme", str(readme)]
    assert script.main([*arguments, "--check"]) == 1
    assert readme.read_text(encoding="utf-8") == EMPTY
    assert script.main(arguments) == 0
    assert script.main([*arguments, "--check"]) == 0
    readme.write_text(readme.read_text(encoding="utf-8").replace("96.0", "99.0"), encoding="utf-8")
    assert script.main([*arguments, "--check"]) == 1


def test_what_is_missing_is_said(
    script: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A README that is half filled from a run without a demo, or one without the markers."""
    readme = tmp_path / "README.md"
    readme.write_text("no markers", encoding="utf-8")
    assert script.main([str(run), "--readme", str(readme)]) == 2
    assert "transcript:begin" in capsys.readouterr().err

    readme.write_text(EMPTY, encoding="utf-8")
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    (run / "report.json").write_text(json.dumps({**report, "transcript": []}), encoding="utf-8")
    assert script.main([str(run), "--readme", str(readme)]) == 2
    assert "rxlm demo" in capsys.readouterr().err
    assert readme.read_text(encoding="utf-8") == EMPTY


def test_the_readme_has_the_blocks(script: ModuleType) -> None:
    """A marker that was lost while the README was edited."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    filled = script.fill(text, {"transcript": "TALK", "recall": "TABLE"})
    assert "\nTALK\n" in filled and "\nTABLE\n" in filled
