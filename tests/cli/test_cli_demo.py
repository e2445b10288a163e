"""``rxlm demo``: two processes, one conversation, and the table."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from rxlm.cli.main import main
from rxlm.evaluation.transcript import ASK, TELL
from rxlm.rxt.models import RxTAlpha
from rxlm.rxt.session import Session


def test_second_process_answers_from_the_saved_memory(
    micro_pipeline: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a restart that is only claimed, and a transcript that the report lacks."""
    out = tmp_path / "runs"
    shutil.copytree(micro_pipeline, out)
    assert main(["demo", str(out)]) == 0
    printed = capfd.readouterr().out
    before, after = printed.split(f"process {os.getpid()} says no more")
    assert all(query in before for query in TELL)
    assert all(question.query in after for question in ASK)
    assert f"of {len(ASK)} questions answered rightly" in after
    assert "Recall by distance" in after
    assert f"rxlm chat {out} --session demo" in after

    session = Session.load(out / "sessions" / "demo", RxTAlpha.from_pretrained(out))
    asked = [turn.query for turn in session.turns]
    assert asked == [*TELL, *(question.query for question in ASK)]
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert [len(part) for part in report["transcript"]] == [2 * len(TELL), 2 * len(ASK)]


def test_without_a_report_it_says_how_to_measure(
    micro_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a demo that works on a pipeline's folder only."""
    monkeypatch.setattr("rxlm.cli.demo._start_second_process", lambda *_: None)
    run = micro_pipeline / "50_memory_aware"
    assert main(["demo", str(run), "--sessions-dir", str(tmp_path)]) == 0
    assert f"rxlm eval recall {run}" in capsys.readouterr().out
