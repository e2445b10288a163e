"""The comparison before and after reinforcement: its page, and what it says without a model."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the benchmark, found as when it runs as a script."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("reinforcement")


def test_a_missing_model_is_one_clear_error(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback for somebody who has not trained nano yet."""
    assert script.main(["--init", str(tmp_path / "nothing"), "--out", str(tmp_path)]) == 2
    assert "does not exist: give a model folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_page_has_a_column_for_every_model(script: ModuleType) -> None:
    """Catches a row that is measured and not shown, or figures in the wrong column."""
    names = ("before", *script.RECIPES)
    results = {
        name: {key: column + row / 100 for row, (key, _) in enumerate(script.ROWS)}
        for column, name in enumerate(names)
    }
    found = {
        "command": "c", "machine": "m", "threads": 1, "torch": "t", "date": "d",
        "load_average": [0, 0], "dialogues": 4, "steps": {"reinforced": 2, "preferred": 3},
        "results": results,
    }  # fmt: skip
    lines = [line for line in script.page(found).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(script.ROWS)
    assert "before" in lines[0] and "reinforced" in lines[0] and "preferred" in lines[0]
    assert "0.0100" in lines[3] and "1.0100" in lines[3] and "2.0100" in lines[3]
    assert all(path.is_file() for path in script.RECIPES.values())
