"""``rxlm tokenizer``: train on files, look at a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rxlm.cli.main import main


def test_trained_tokenizer_can_be_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches options that do not reach the training, and tokens that are not the text's."""
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(["the cat sat on the mat"] * 20), encoding="utf-8")
    out = tmp_path / "tokenizer"
    assert main(["tokenizer", "train", str(texts), "--out", str(out), "--vocab-size", "275"]) == 0
    assert "275 ids" in capsys.readouterr().out
    assert main(["tokenizer", "show", str(out), "the cat [EOS] é", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["vocab_size"] == 275
    assert report["special_tokens"]["[EOS]"] == 3
    assert report["text"]["decodes_to_itself"]
    assert not set(report["text"]["ids"]) & set(report["special_tokens"].values())
    assert main(["tokenizer", "show", str(out), "the cat"]) == 0
    assert "' the'" in capsys.readouterr().out


def test_existing_tokenizer_is_not_replaced_unless_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a tokenizer lost to a repeated command."""
    texts = tmp_path / "texts.txt"
    words = ["tokenizer", "train", str(texts), "--out", str(tmp_path / "out")]
    for count, overwrite in ((10, []), (30, ["--overwrite"])):
        texts.write_text("\n\n".join(["to be or not to be"] * count), encoding="utf-8")
        assert main([*words, "--vocab-size", str(270 + count), *overwrite]) == 0
    texts.write_text("entirely different words, different words\n\nmore words", encoding="utf-8")
    assert main([*words, "--vocab-size", "300"]) == 2
    assert "overwrite" in capsys.readouterr().err


def test_show_finds_the_tokenizer_of_a_pipeline_and_of_a_model(
    micro_pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a folder that every other verb understands and this one does not."""
    fingerprints = set()
    for folder in (micro_pipeline, micro_pipeline / "50_memory_aware"):
        assert main(["tokenizer", "show", str(folder), "--json"]) == 0
        fingerprints.add(json.loads(capsys.readouterr().out)["fingerprint"])
    assert len(fingerprints) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "none.txt", "--out", "x"], "no such file"),
        (["train", "builtin", "--out", "x", "--vocab-size", "100"], "vocab_size"),
        (["train", "builtin", "--out", "x", "--kind", "wordpiece"], "kind"),
        (["show", "none"], "no such folder"),
    ],
)
def test_bad_input_is_status_2(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a traceback for a slip of the pen."""
    monkeypatch.chdir(tmp_path)
    assert main(["tokenizer", *words]) == 2
    assert message in capsys.readouterr().err
