"""The comparison with tptt runs without it as far as it can, and says what is missing."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the benchmark, found as when it runs as a script."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("tptt_side_by_side")


def test_missing_tptt_is_one_clear_error(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback for a folder that holds something else would show."""
    assert script.main(["--tptt", str(tmp_path)]) == 2
    assert "pip install --no-deps" in capsys.readouterr().err


@torch.no_grad()
def test_our_column_and_the_page(script: ModuleType) -> None:
    """A script that no longer fits the layer, or a table whose rows do not fit its head."""
    row = script.grid(longest=5)
    assert float(row.ours) < 1e-10
    page = script.render([row], [["5", "1 (1-1)", "2 (2-2)"]], "command")
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in tables] == [5] * 3 + [4] * 3


def test_the_yardstick_is_the_delta_rule(script: ModuleType) -> None:
    """A yardstick that shares an error with what it measures: one write is read back whole."""
    key = torch.eye(4)[None, None, :3]
    value = torch.randn(1, 1, 3, 4)
    ones = torch.ones(1, 1, 3, 4)
    torch.testing.assert_close(script.delta_rule(key, key, value, ones), value)
