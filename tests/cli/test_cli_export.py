"""``rxlm export``: the folder, what it says of the loss, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rxlm.cli.main import main
from rxlm.nn.int8_linear import Int8Linear, is_int8
from rxlm.rxt.models import RxTAlpha


def test_an_exported_model_is_measured_and_used(
    micro_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an export that cannot be evaluated or talked to, and numbers missing in its card."""
    out = tmp_path / "int8"
    assert main(["export", str(micro_pipeline), str(out), "--int8"]) == 0
    said = capsys.readouterr().out
    card = (out / "README.md").read_text(encoding="utf-8")
    for text in (said, card):
        assert "perplexity of answers" in text and "same greedy token" in text
        assert "of the parameters are int8" in text
    assert json.loads((out / "config.json").read_text())["quantization"]["method"] == "int8_dynamic"
    assert is_int8(RxTAlpha.from_pretrained(out))
    assert main(["eval", "perplexity", str(out), "max_dialogues=2", "max_turns=2"]) == 0
    capsys.readouterr()
    # Twice the same place: only when asked.
    assert main(["export", str(micro_pipeline), str(out), "--int8", "--no-check"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    again = ["export", str(micro_pipeline), str(out), "--int8", "--no-check", "--overwrite"]
    assert main(again) == 0
    assert "not been measured" in (out / "README.md").read_text(encoding="utf-8")
    assert main(["export", str(out), str(tmp_path / "twice"), "--int8"]) == 2
    assert "int8 weights already" in capsys.readouterr().err
    assert main(["chat", str(out), "--device", "cuda"]) == 2


def test_what_is_not_an_export_is_refused(
    micro_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a form that is guessed, and a model that is overwritten by its own export."""
    assert main(["export", str(micro_pipeline), str(tmp_path / "x")]) == 2
    assert "--int8" in capsys.readouterr().err and not (tmp_path / "x").exists()
    RxTAlpha.from_pretrained(micro_pipeline).save_pretrained(tmp_path / "m")
    same = ["export", str(tmp_path / "m"), str(tmp_path / "m"), "--int8", "--overwrite"]
    assert main(same) == 2
    assert not any(
        isinstance(part, Int8Linear) for part in RxTAlpha.from_pretrained(tmp_path / "m").modules()
    )
