"""``rxlm data``: inspect, stats, check, and what a run says about bad records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rxlm.cli.main import main
from rxlm.tokenization import Tokenizer, TokenizerTraining, train_tokenizer

TURNS = [{"query": "Hi, I am Ann.", "answer": "Hello, Ann!"}, {"query": "Bye.", "answer": "Bye!"}]
GOOD = json.dumps({"id": "1", "system": "Be kind.", "interactions": TURNS})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tokenizer"
    train_tokenizer(["hello world"] * 9, TokenizerTraining(vocab_size=275)).save(folder)
    return folder


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{GOOD}\n{{\n{GOOD}\n", encoding="utf-8")
    return path


def test_check_names_bad_records_and_exits_with_2(
    dialogues: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a check that a script takes for passed, and a bad record without its line."""
    assert main(["data", "check", str(dialogues)]) == 2
    out = capsys.readouterr().out
    assert f"bad: {dialogues}:2: not JSON" in out and "3 records, 1 bad, 1 notes" in out
    assert main(["data", "check", str(dialogues), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["bad_records"] == 1 and not report["good"]
    assert report["files"] == {str(dialogues): "dialogues"}
    dialogues.write_text(GOOD, encoding="utf-8")
    assert main(["data", "check", str(dialogues)]) == 0
    assert main(["data", "check", str(dialogues), "--kind", "text"]) == 0
    assert main(["data", "check", str(dialogues), "--max-record-bytes", "50"]) == 2
    assert main(["data", "check", str(dialogues), "--kind", "poems"]) == 2
    assert main(["data", "check", "none.jsonl"]) == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err


def test_inspect_shows_what_the_model_sees(
    dialogues: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches special tokens that are not those of training, a target that begins elsewhere, a
    bad record that ends the listing, and pieces of packed rows that run together."""
    assert main(["data", "inspect", str(dialogues)]) == 0
    out = capsys.readouterr().out
    assert "[BOS][I]Be kind.[EOS]" in out and "not JSON" in out
    assert "[BOS][Q]Hi, I am Ann.[A]Hello, Ann![EOS]" in out
    words = ["data", "inspect", str(dialogues), "--tokenizer", str(tokenizer), "--json", "-n", "1"]
    assert main(words) == 0
    (record,) = json.loads(capsys.readouterr().out)
    system, first, _ = record["rows"]
    assert system["text"] == "[BOS][I]Be kind.[EOS]"
    loaded = Tokenizer.load(tokenizer)
    assert first["ids"][first["answer_start"]] == loaded.answer_id
    texts = dialogues.parent / "b.txt"
    texts.write_text("one\n\ntwo\n\nthree", encoding="utf-8")
    words = ["data", "inspect", str(texts), "--tokenizer", str(tokenizer), "--length", "12"]
    assert main([*words, "--packing", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    shown = [[piece["text"] for piece in row["rows"]] for row in rows]
    assert len(shown) == 2
    pieces = sorted(piece for row in shown for piece in row)
    assert pieces == ["[BOS]one[EOS]", "[BOS]three[EOS]", "[BOS]two[EOS]"]
    assert main(["data", "inspect", str(texts), "--packing"]) == 2


def test_stats_count_in_tokens(
    dialogues: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches bad records that are not counted, percentiles of something else, and a vocabulary
    whose use is not that of the texts."""
    assert main(["data", "stats", str(dialogues), "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["records"], counts["bad_records"], counts["conversations"]) == (3, 1, 2)
    assert counts["unit"] == "characters" and counts["turns"]["p50"] == 2
    assert counts["answer"] == {
        "mean": 7.5, "p0": 4, "p10": 4, "p50": 4, "p90": 11, "p99": 11, "p100": 11,
    }  # fmt: skip
    words = ["data", "stats", str(dialogues), "--tokenizer", str(tokenizer)]
    assert main([*words, "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    loaded = Tokenizer.load(tokenizer)
    texts = ["Be kind.", *(text for turn in TURNS for text in turn.values())]
    used = {token for text in texts for token in loaded.encode(text)}
    assert counts["vocabulary"]["used"] == len(used)
    assert counts["total"] == 2 * sum(len(loaded.encode(text)) for text in texts)
    assert main(words) == 0
    assert "ids occur" in capsys.readouterr().out


def test_a_run_says_what_it_skipped(
    tmp_path: Path, nano: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches bad records that are fatal although they are to be skipped, or that are left out
    without a trace in the run's summary."""
    text = tmp_path / "a.jsonl"
    text.write_text('{"text": "hello"}\n{"body": 1}\n{"text": "world"}\n', encoding="utf-8")
    words = [
        "train", str(nano / "10_tokenizer.yaml"), "--out", str(tmp_path / "run"),
        f"data.text={text}", "objective.dialogues=20", "tokenizer.vocab_size=300",
    ]  # fmt: skip
    assert main(words) == 2
    assert f"{text}:2: field 'text'" in capsys.readouterr().err
    assert main([*words, "data.on_bad_record=skip"]) == 0
    summary = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["data"]
    assert summary["train"]["records"] == 3 and summary["train"]["bad_records"] == 1
    assert summary["train"]["problems"][0].startswith(f"{text}:2: ")
