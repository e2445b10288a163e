"""The benchmarks of serving and of turns run, and write what they say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def found_as_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")


def test_a_small_run_of_serving(tmp_path: Path) -> None:
    """Catches a script that no longer fits the service, or a page without its figures."""
    script = importlib.import_module("serving")
    small = ["--sessions", "6", "--clients", "4", "--turns", "8", "--rounds", "1", "--tokens", "3"]
    assert script.main([*small, "--out", str(tmp_path)]) == 0
    values = json.loads((tmp_path / "serving.json").read_text())
    assert values["speedup"]["median"] > 0 and values["state_files"] > 0
    assert "continuous batching" in (tmp_path / "serving.md").read_text()
    assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG")


def test_a_small_run_of_turns(tmp_path: Path) -> None:
    """Catches a script that no longer fits the model or Llama, and a conversation that grows."""
    pytest.importorskip("transformers")
    script = importlib.import_module("turns")
    small = ["--model", "nano", "--turns", "1", "3", "--query", "6", "--answer", "3"]
    small += ["--rounds", "1", "--think-rounds", "2", "--budget", "1"]
    assert script.main([*small, "--out", str(tmp_path)]) == 0
    page = (tmp_path / "turns.md").read_text()
    assert "| bytes of a conversation: constant | 16,384 | yes |" in page
    # Keys and values of the two turns before the third: 2 layers, 2 heads of 16, float32.
    assert f"| {2 * 2 * 2 * 16 * 2 * 9 * 4:,} |" in page
    assert (tmp_path / "turns.png").read_bytes().startswith(b"\x89PNG")
