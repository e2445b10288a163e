"""The benchmark of training runs, and keeps the rows that a later run does not measure."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, found as when it runs as a script."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    return importlib.import_module("training")


def test_rows_of_an_earlier_run_are_kept(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a script that no longer fits the stages, a second run that throws rows away or keeps
    the old one of what it measured, and a page without its figure."""
    quick = ["--quick", "--no-overhead", "--dialogues", "2", "--turns", "2", "--out", str(tmp_path)]
    for words in (["--stages", "sft", "memory_aware"], ["--stages", "sft", "--keep"]):
        monkeypatch.setattr(sys, "argv", ["training.py", *quick, *words])
        script.main()
        lines = (tmp_path / "training.csv").read_text(encoding="utf-8").splitlines()
        rows = list(csv.DictReader(lines))
        assert [row["stage"] for row in rows] == ["sft", "memory_aware"]
    assert all(float(row["peak_megabytes_layers"]) > 0 for row in rows)
    assert rows[0]["peak_megabytes_turns"] == "" != rows[1]["peak_megabytes_turns"]
    text = (tmp_path / "training.md").read_text(encoding="utf-8")
    assert "| nano | sft |" in text and "--keep" in text
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
