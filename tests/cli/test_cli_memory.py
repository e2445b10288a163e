"""``rxlm memory show``: of what is said, of a session, of a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rxlm.cli.main import main
from rxlm.rxt.models import RxTAlpha
from rxlm.rxt.session import Session


def test_what_is_said_and_what_a_session_said(
    micro_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a session that is changed by looking, and another turn than the last."""
    model = RxTAlpha.from_pretrained(str(micro_pipeline))
    session = Session(model, max_seq_len=24)
    for text in ("Hi.", "I am Ann."):
        session.ask(text)
    session.save(tmp_path / "ann")
    command = ["memory", "show", str(micro_pipeline)]
    assert (
        main([*command, "--session", str(tmp_path / "ann"), "--png", str(tmp_path / "m.png")]) == 0
    )
    out = capsys.readouterr().out
    assert "I am Ann." in out and "written" in out and "read" in out and "Hi." not in out
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--session", str(tmp_path / "ann"), "--say", "Who am I?"]) == 0
    assert "Who am I?" in capsys.readouterr().out
    assert len(Session.load(tmp_path / "ann", model).turns) == 2


def test_conversations_of_a_file(
    micro_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches --number and --every-turn being ignored, and choices that contradict each other."""
    rows = [[("A one.", "Yes."), ("A two.", "No.")], [("B one.", "Yes."), ("B two.", "No.")]]
    lines = [
        json.dumps({"interactions": [{"query": q, "answer": a} for q, a in row]}) for row in rows
    ]
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    command = ["memory", "show", str(micro_pipeline), "--data", str(file)]
    assert main([*command, "--number", "1", "--every-turn"]) == 0
    out = capsys.readouterr().out
    assert "turn 1: B one." in out and "turn 2: B two." in out and "A one." not in out
    assert main([*command, "--number", "2"]) == 2
    assert main([*command, "--say", "Hi."]) == 2
    assert main(["memory", "show", str(micro_pipeline)]) == 2
    assert "--say" in capsys.readouterr().err
