"""Reading files: every accepted form, and every refusal with its place and remedy."""

from __future__ import annotations

import gzip
import json
import logging
import sys
from pathlib import Path

import pytest

from rxlm.data import Conversation, DialogueGenerator, Interaction, load_conversations, load_texts
from rxlm.errors import UserError

TURN = {"query": "Hi!", "answer": "Hello!"}
GOOD = {"id": 7, "source": "own", "interactions": [TURN]}


def write_lines(path: Path, *rows: object) -> Path:
    """Write rows (text as it is, other values as JSON) as lines, gzipped if the name says so."""
    text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl_keeps_what_the_generator_wrote(tmp_path: Path, name: str) -> None:
    """Catches metadata lost on the way through a file: probes would be impossible."""
    generator = DialogueGenerator()
    conversations = [generator.conversation(index, 12) for index in range(5)]
    path = write_lines(tmp_path / name, *(item.to_dict() for item in conversations))
    assert load_conversations(path) == conversations


def test_the_first_turn_may_stand_beside_the_list(tmp_path: Path) -> None:
    """Catches the first turn of rows in the reference's form being dropped without a word."""
    first, second = {"query": "a", "answer": "b", "think": "c"}, {"query": "d", "answer": "e"}
    rows = [{**first, "interactions": [second], "system": "s"}, first, {"interactions": [first]}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    both, alone, listed = load_conversations(path)
    assert [turn.query for turn in both.interactions] == ["a", "d"]
    assert (both.system, both.interactions[0].think) == ("s", "c")
    assert alone.interactions == listed.interactions == both.interactions[:1]
    path.write_text('{"query": "a", "interactions": []}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl:1: field 'row.answer': expected non-empty"):
        load_conversations(path)


def test_parquet_reads_the_same_as_jsonl(tmp_path: Path) -> None:
    """Catches nulls of parquet's fixed columns leaking in as metadata."""
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    conversations = [DialogueGenerator().conversation(index, 12) for index in range(5)]
    rows = [item.to_dict() for item in conversations]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert load_conversations(tmp_path / "a.parquet") == conversations


def test_metadata_of_other_people_is_left_out(tmp_path: Path) -> None:
    """Catches a foreign 'kind' or 'distance' taken for ours."""
    turn = {
        "query": "",
        "answer": "Hello?",
        "kind": "greeting",
        "distance": "far",
        "value": 3,
        "told": "nothing",
        "mood": 1,
    }
    path = write_lines(tmp_path / "a.jsonl", {"interactions": [turn], "persona": []})
    assert load_conversations(path) == [Conversation((Interaction("", "Hello?"),))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"id": 1,', r"a\.jsonl:3: not JSON"),
        ("[1, 2]", r"a\.jsonl:3: expected an object such as"),
        ({"turns": []}, r"a\.jsonl:3: field 'interactions': expected a non-empty.*of the row: tu"),
        ({"interactions": []}, r"a\.jsonl:3: field 'interactions': expected a non-empty list"),
        ({"interactions": ["Hi"]}, r"a\.jsonl:3: field 'interactions\[0\]': expected an object"),
        (
            {"interactions": [TURN, {"query": "Hi!", "answer": None}]},
            r"a\.jsonl:3: field 'interactions\[1\]\.answer': expected non-empty text, got nothing",
        ),
        (
            {"interactions": [{"query": 5, "answer": "x"}]},
            r"a\.jsonl:3: field 'interactions\[0\]\.query': expected text, got 5",
        ),
        ({**GOOD, "system": ["x"]}, r"a\.jsonl:3: field 'system': expected text or nothing"),
    ],
)
def test_malformed_row_names_line_field_and_remedy(
    tmp_path: Path, row: object, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a bare KeyError, a wrong line number (line 2 is blank), rows dropped silently."""
    path = write_lines(tmp_path / "a.jsonl", GOOD, "", row, GOOD)
    with pytest.raises(UserError, match=message):
        load_conversations(path)
    with caplog.at_level(logging.WARNING):
        assert len(load_conversations(path, on_bad_record="skip")) == 2
    assert "skipped 1 of 3 rows" in caplog.text and "a.jsonl:3" in caplog.text


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    """Catches training on nothing: empty files, empty folders, files with no usable row."""
    with pytest.raises(UserError, match="holds no row"):
        load_conversations(write_lines(tmp_path / "empty.jsonl", "", " "))
    with pytest.raises(UserError, match=r"none of 2 rows can be used.*empty2\.jsonl:1"):
        load_conversations(write_lines(tmp_path / "empty2.jsonl", {}, {}), on_bad_record="skip")
    with pytest.raises(UserError, match="holds no text"):
        load_texts(write_lines(tmp_path / "empty.txt", "", " "))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="the folder holds no file"):
        load_conversations(tmp_path / "folder")


def test_missing_file_names_near_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the unhelpful 'no such file' for a typing mistake."""
    write_lines(tmp_path / "dialogues.train.jsonl", GOOD)
    with pytest.raises(UserError, match=r"did you mean dialogues\.train\.jsonl\?"):
        load_conversations(tmp_path / "dialogue.train.jsonl")
    with pytest.raises(UserError, match=r"the folder .*nowhere does not exist"):
        load_conversations(tmp_path / "nowhere" / "a.jsonl")
    with pytest.raises(UserError, match="no file matches"):
        load_conversations(tmp_path / "*.parquet")
    monkeypatch.delenv("NO_SUCH_FOLDER", raising=False)
    with pytest.raises(UserError, match="is the environment variable"):
        load_conversations("$NO_SUCH_FOLDER/a.jsonl")
    monkeypatch.setenv("NO_SUCH_FOLDER", str(tmp_path))
    assert len(load_conversations("$NO_SUCH_FOLDER/dialogues.train.jsonl")) == 1


def test_unusable_files_name_the_reason(tmp_path: Path) -> None:
    """Catches tracebacks of gzip, codecs and parquet reaching the user."""
    (tmp_path / "notes.doc").write_text("x")
    with pytest.raises(UserError, match=r"unknown type of file; expected one of \.jsonl"):
        load_conversations(tmp_path / "notes.doc")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"a": "\xe9"}\n')
    with pytest.raises(UserError, match=r"latin\.jsonl:2: not UTF-8"):
        load_conversations(tmp_path / "latin.jsonl")
    whole = write_lines(tmp_path / "cut.jsonl.gz", *[GOOD] * 500).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz: damaged gzip file"):
        load_conversations(tmp_path / "cut.jsonl.gz")
    (tmp_path / "plain.jsonl.gz").write_text(json.dumps(GOOD))
    with pytest.raises(UserError, match=r"plain\.jsonl\.gz: damaged gzip file"):
        load_conversations(tmp_path / "plain.jsonl.gz")


def test_broken_parquet_and_missing_pyarrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback where the remedy is to install an extra."""
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_text("not parquet")
    with pytest.raises(UserError, match="not a readable parquet file"):
        load_conversations(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'reactive-lm\[data\]'"):
        load_conversations(tmp_path / "a.parquet")


def test_folder_and_glob_read_all_files_in_order(tmp_path: Path) -> None:
    """Catches a file left out, other files read along, or an order that the disk decides."""
    for number in (2, 1, 3):
        write_lines(tmp_path / f"{number}.jsonl", {**GOOD, "id": number})
    (tmp_path / "readme.md").write_text("x")
    assert [item.id for item in load_conversations(tmp_path)] == ["1", "2", "3"]
    assert [item.id for item in load_conversations(tmp_path / "[12].jsonl")] == ["1", "2"]


def test_texts_of_every_form(tmp_path: Path) -> None:
    """Catches paragraphs run together, byte-order marks in the text, answers left out."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfOne\r\nline.\r\n \r\n\r\nTwo.\r\n")
    assert load_texts(path) == ["One\nline.", "Two."]
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write("\n\nThree.")
    assert load_texts(tmp_path / "b.txt.gz") == ["Three."]
    rows = write_lines(tmp_path / "c.jsonl", {"text": "Four."}, {**GOOD, "system": "Be kind."})
    assert load_texts(rows) == ["Four.", "Be kind.\nHi!\nHello!"]
    with pytest.raises(UserError, match=r"d\.jsonl:1: field 'text': expected non-empty text"):
        load_texts(write_lines(tmp_path / "d.jsonl", {"body": "x"}))


def test_real_dialogues_load(data_dir: Path) -> None:
    """Catches assumptions that real files break (an empty query, ids that are numbers)."""
    for path in sorted((data_dir / "dialogues").glob("*.valid.jsonl.gz")):
        conversations = load_conversations(path)
        assert len(conversations) > 100
        assert all(len(item) >= 2 and item.source for item in conversations), path
    path = data_dir / "dialogues" / "dialog_babi.train.jsonl.gz"
    assert any(turn.query == "" for item in load_conversations(path) for turn in item.interactions)


def test_real_text_loads(data_dir: Path) -> None:
    """Catches a paragraph rule that makes one document of a book, or one of each line."""
    texts = load_texts(data_dir / "text" / "tinyshakespeare.valid.txt.gz")
    assert 300 < len(texts) < 1000
