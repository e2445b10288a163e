"""The benchmark of local attention runs, compares equals, and writes what it says."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = [
    *("--length", "64", "--window", "16", "--rounds", "2", "--threads", "1", "--heads", "1"),
    *("--head-dim", "8"),
]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, found as when it runs as a script; it has the name of a package."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    return importlib.import_module("local_attention")


def test_small_run_writes_every_file(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a script that no longer fits the module, or a contender that is not compared."""
    arguments = [*SMALL, "--memory-lengths", "--out", str(tmp_path)]
    assert script.main(arguments) == 0, capsys.readouterr().err
    rows = list(csv.DictReader((tmp_path / "local_attention.csv").read_text().splitlines()))
    contenders = {row["contender"] for row in rows}
    assert contenders >= {script.OURS, script.MASKED}
    assert len(rows) == len(contenders) * len(script.CASES) * len(script.TASKS)
    assert (tmp_path / "local_attention.png").read_bytes().startswith(b"\x89PNG")
    assert "faster than SDPA with a mask" in (tmp_path / "local_attention.md").read_text()


def test_lengths_are_checked_before_hours_of_work(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a length that the package refuses in the middle of a run."""
    assert script.main(["--length", "100", "--window", "16"]) == 2
    assert "100 tokens are not a multiple of --window 16" in capsys.readouterr().err


def test_contenders_that_differ_stop_the_run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a comparison of things that compute something else."""
    monkeypatch.setattr(script, "masked_attention", lambda arguments, window, q, k, v: q + k + v)
    with pytest.raises(script.RunError, match="differs from SDPA with a mask"):
        script.check_agreement([script.OURS, script.MASKED], script.Sizes(1, 8, 16))
