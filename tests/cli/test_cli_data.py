"""``rxlm data``: inspect, stats, check, and what a run says about bad records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rxlm.cli.main import main
from rxlm.data import load_conversations
from rxlm.errors import UserError
from rxlm.rxt.dialogues import TurnEncoder
from rxlm.tokenization import (
    RICH_TEMPLATE,
    Tokenizer,
    TokenizerTraining,
    render_parts,
    train_tokenizer,
)

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


CALL = {"query": "Rain?", "internal": "i", "think": "hm", "answer": "", "tool_call": "w()"}
RESULT = {"tool_use": "no", "answer": "Dry."}


@pytest.fixture
def with_tools(tmp_path: Path) -> Path:
    path = tmp_path / "tools.jsonl"
    row = json.dumps({"id": "7", "interactions": [CALL, RESULT]})
    path.write_text(f"{row}\n{GOOD}\n", encoding="utf-8")
    return path


def test_inspect_shows_every_part(
    with_tools: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches thinking and tools that are trained on and not shown, a turn without its beginning,
    and a form shown that training would refuse."""
    spelled = ["[BOS][I]i[Q]Rain?[T]hm[A][C]w()[EOS]", "[BOS][U]no[A]Dry.[EOS]"]
    assert main(["data", "inspect", str(with_tools), "-n", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == spelled
    rich = Tokenizer.load(tokenizer).with_template(RICH_TEMPLATE)
    rich.save(tmp_path / "rich")
    words = ["data", "inspect", str(with_tools), "--json", "--tokenizer"]
    assert main([*words, str(tmp_path / "rich")]) == 0
    tools, good = json.loads(capsys.readouterr().out)
    assert [row["text"] for row in tools["rows"]] == spelled
    conversation = load_conversations(with_tools)[0]
    for row, turn in zip(tools["rows"], conversation.interactions, strict=True):
        assert (row["ids"], row["answer_start"]) == render_parts(rich, turn.parts()).turn
    assert good["rows"][0]["text"].startswith("[BOS][I]SYSTEM INSTRUCTIONS")
    assert main([*words, str(tokenizer)]) == 0
    tools, good = json.loads(capsys.readouterr().out)
    with pytest.raises(UserError) as refused:
        TurnEncoder(Tokenizer.load(tokenizer), 64).check_lengths([conversation], "data")
    assert tools["problem"] == str(refused.value).replace("data: ", f"{with_tools}:1: ", 1)
    assert "rows" not in tools and len(good["rows"]) == 3


def test_stats_count_every_part(
    with_tools: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches totals and a vocabulary without thinking and tools, and a tool's result counted as a
    query of no length."""
    assert main(["data", "stats", str(with_tools), "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    texts = [*CALL.values(), *RESULT.values(), "Be kind."]
    texts += [text for turn in TURNS for text in turn.values()]
    assert counts["total"] == counts["characters"] == sum(map(len, texts))
    assert counts["query"]["p0"] == 4 and counts["tool_use"]["mean"] == 2
    assert (counts["think"]["mean"], counts["tool_call"]["mean"]) == (2, 3)
    words = ["data", "stats", str(with_tools), "--tokenizer", str(tokenizer)]
    assert main([*words, "--json"]) == 0
    loaded = Tokenizer.load(tokenizer)
    used = {token for text in texts for token in loaded.encode(text)}
    assert json.loads(capsys.readouterr().out)["vocabulary"]["used"] == len(used)
    assert main(words) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in ("think", "tool_call", "tool_use", "internal"))


def test_options_without_effect_are_refused(
    dialogues: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an option that is silently left out, or that ends in a message of something else."""
    words = ["data", "inspect", str(dialogues)]
    assert main([*words, "--length", "9"]) == 2
    assert "--length 9: rows of tokens need a tokenizer" in capsys.readouterr().err
    words += ["--tokenizer", str(tokenizer), "--packing"]
    assert main(words) == 2
    assert "dialogues are not packed" in capsys.readouterr().err
    assert main([*words, "--kind", "text", "--json"]) == 0
    bad, row = json.loads(capsys.readouterr().out)
    assert "a.jsonl:2: not JSON" in bad["problem"] and len(row["rows"]) == 2
    dialogues.write_text("{\n", encoding="utf-8")
    assert main([*words, "--kind", "text"]) == 0
    assert "bad: " in capsys.readouterr().out
    assert main(["data", "check", str(dialogues), "--max-record-bytes", "0"]) == 2
    assert "max-record-bytes" in capsys.readouterr().err


def test_check_names_files_without_records(
    dialogues: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a check that passes a file which training refuses, and a file counted as a record."""
    dialogues.write_text(GOOD, encoding="utf-8")
    empty = dialogues.with_name("b.jsonl")
    empty.write_bytes(b"")
    assert main(["data", "check", str(dialogues.parent)]) == 2
    assert f"bad file: {empty}: holds no usable record" in capsys.readouterr().out
    assert main(["data", "check", str(dialogues.parent), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["bad_records"] == 0 and len(report["unusable_files"]) == 1
