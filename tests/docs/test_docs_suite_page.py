"""The page of Micro is written from documents of the suite. Not here: their comparison."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rxlm.evaluation.suite.findings import finding


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    """The module scripts/suite_page.py."""
    return load_script("suite_page")


def document(share: float, extra: bool) -> dict[str, Any]:
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
    babi = {"findings": [finding("babi", "qa1", "qa1", 0.5, goal=0.95)], "rows": []}
    facts = {"findings": found, "rows": [row, {**row, "control": "Z", "exact": 0.0}]}
    return {
        "schema": "rxlm-suite/1",
        "model": {"num_parameters": 1_400_000},
        "environment": {"num_cpus": 2, "torch": "2"},
        "settings": {"seeds": [0, 1, 2], "max_answer_tokens": 24, "facts": {}, "babi": {}},
        "tests": {"facts": facts} | ({"babi": babi} if extra else {}),
    }


def test_files(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    """Catches a page or block that is not written, and a run without a document that is no clear
    error."""
    training = script.Training(2500, 3500, 1e-3, 40.0, 288, 0, 1)
    monkeypatch.setattr(script, "training_of", lambda run, paused: training)
    for name in ("micro-mha", "micro-kda"):
        (tmp_path / name).mkdir()
        text = json.dumps(document(0.5, extra=True))
        (tmp_path / name / "suite.json").write_text(text, encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text("# x\n<!-- micro:begin -->\nold\n<!-- micro:end -->\n", encoding="utf-8")
    runs = [str(tmp_path / name) for name in ("micro-mha", "micro-kda")]
    files = ["--page", str(tmp_path / "micro.md"), "--readme", str(readme)]
    assert script.main([*runs, *files]) == 0
    assert "| parameters | 1,400,000 | 1,400,000 |" in (tmp_path / "micro.md").read_text("utf-8")
    assert "| 2,500 of 3,500 |" in (tmp_path / "micro.md").read_text("utf-8")
    assert "kda was stopped after 2,500 of 3,500" in readme.read_text("utf-8")
    assert "1.40 million" in readme.read_text("utf-8") and "old\n" not in readme.read_text("utf-8")
    (tmp_path / "micro-kda" / "suite.json").unlink()
    assert script.main([*runs, *files]) == 2
    assert "micro-kda" in capsys.readouterr().err
