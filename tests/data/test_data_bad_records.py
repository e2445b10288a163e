"""Bad data of every kind: named by file and line, fatal or skipped, and counted."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from rxlm.data import load_conversations, load_texts
from rxlm.data.checking import check_files
from rxlm.data.data_config import DataConfig
from rxlm.data.records import DataSummary, read_records
from rxlm.errors import UserError

TURN = {"query": "Hi!", "answer": "Hello!"}
GOOD = json.dumps({"id": "1", "interactions": [TURN]}).encode()
BAD_LINES = [
    (b'{"interactions": [{"query": "\xff", "answer": "x"}]}', "not UTF-8"),
    (b'{"interactions": [{"query": "x"}]}', r"interactions\[0\]\.answer'"),
    (b'{"interactions": [{"query": "x", "answer": " "}]}', "expected non-empty text"),
    (b'{"interactions": []}', "non-empty list"),
    (b'{"id": "2"}', "field 'interactions'"),
    (
        b'{"interactions": [{"query": "a", "query": "b", "answer": "c"}]}',
        "'query' is written twice",
    ),
    (b'{"interactions": [{"query": "\\ud800", "answer": "c"}]}', "half of a surrogate pair"),
    (b"[" * 100_000, "not JSON"),
    (b'{"interactions": [{"query": "' + b"a" * 4000 + b'", "answer": "c"}]}', "4,0.. bytes, more"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=[text for _, text in BAD_LINES])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_bad_line_is_named_and_fatal_or_skipped(
    tmp_path: Path, line: bytes, message: str, suffix: str
) -> None:
    """Catches a bad record that ends in a traceback, is used all the same, has no place, takes
    its neighbours along, or is not counted."""
    path = tmp_path / f"a.jsonl{suffix}"
    content = b"\n".join([GOOD, b"", line, GOOD, b""])
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(UserError, match=rf"a\.jsonl{suffix}:3: .*{message}.*"):
        load_conversations(path, max_bytes=200_000 if line[:1] == b"[" else 3000)
    summary = DataSummary()
    kept = load_conversations(path, "skip", max_bytes=3000, summary=summary)
    assert len(kept) == 2
    assert (summary.num_records, summary.num_bad) == (3, 1)
    assert summary.problems[0].startswith(f"{path}:3: ")


def test_a_line_of_100_mb_is_never_held(tmp_path: Path) -> None:
    """Catches a reader that loads a line before it looks at its length."""
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(GOOD + b"\n")
        file.seek(100_000_000, 1)  # a hole: NULs that take no disk
        file.write(b"\n" + GOOD + b"\n")
    tracemalloc.start()
    try:
        records = list(read_records(path, max_bytes=2**20))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [record.problem is None for record in records] == [True, False, True]
    assert records[1].problem is not None and "a.jsonl:2" in records[1].problem
    assert "100,000,001 bytes" in records[1].problem
    assert peak < 10_000_000


def test_bad_paragraphs(tmp_path: Path) -> None:
    """Catches a broken line that takes the whole file along, or that splits its paragraph in two,
    and a text without blank lines that is held as a whole."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ntwo\nbroken \xff\nstill two\n\n\nthree\n")
    with pytest.raises(UserError, match=r"a\.txt:4: not UTF-8"):
        load_texts(path)
    summary = DataSummary()
    assert load_texts(path, "skip", summary=summary) == ["one", "three"]
    assert (summary.num_records, summary.num_bad) == (3, 1)
    path.write_text("short\n\n" + "word\n" * 1000 + "\nend")
    with pytest.raises(UserError, match=r"a\.txt:3: the paragraph has more than"):
        load_texts(path, max_bytes=1000)
    assert load_texts(path, "skip", max_bytes=1000) == ["short", "end"]


def test_truncated_files(tmp_path: Path) -> None:
    """Catches what was read before the damage being lost in skip mode, or the damage going by
    unnoticed in fail mode."""
    whole = gzip.compress(b"\n".join([GOOD] * 4000))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: damaged gzip file after line \d+"):
        load_conversations(tmp_path / "a.jsonl.gz")
    summary = DataSummary()
    assert load_conversations(tmp_path / "a.jsonl.gz", "skip", summary=summary)
    assert summary.num_bad == 1

    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    texts = [f"document number {number} " * 20 for number in range(3000)]
    path = tmp_path / "b.parquet"
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=1000)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"b\.parquet: not a readable parquet file"):
        load_texts(path)
    report = check_files(path)
    assert not report.is_good and "b.parquet" in report.problems[0]
    # Whole, but the pages of the second group are overwritten.
    path.write_bytes(content)
    start = parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    path.write_bytes(content[:start] + b"\xff" * 200 + content[start + 200 :])
    with pytest.raises(UserError, match=r"b\.parquet: rows 1001 to 2000 cannot be read"):
        load_texts(path)
    assert load_texts(path, "skip") == texts[:1000] + texts[2000:]


def test_check_names_everything(tmp_path: Path) -> None:
    """Catches a check that stops at the first problem, or that calls a silent user an error."""
    path = tmp_path / "a.jsonl"
    silent = json.dumps({"id": "1", "interactions": [{"query": "", "answer": "Hello?"}]}).encode()
    path.write_bytes(b"\n".join([GOOD, b"{", silent, b'{"id": "3"}', b""]))
    report = check_files(path)
    assert [problem.split(": ")[0] for problem in report.problems] == [f"{path}:2", f"{path}:4"]
    assert report.num_records == 4 and not report.is_good
    assert any(f"{path}:3: the id '1' was used before, at {path}:1" in n for n in report.notes)
    assert any("query' is empty" in note for note in report.notes)
    path.write_bytes(GOOD)
    assert check_files(path).is_good
    assert report.kinds == {str(path): "dialogues"}


def test_older_recipes_are_understood() -> None:
    """Catches a run folder of an older version that can no longer be read."""
    assert DataConfig(on_error="raise").on_bad_record == "fail"
    assert DataConfig(on_error="skip").on_bad_record == "skip"


@pytest.mark.parametrize("content", ["", "\n\n", "{\n"])
def test_check_refuses_what_training_refuses(tmp_path: Path, content: str) -> None:
    """Catches a folder that is called good, and that training then does not read."""
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"b\.jsonl: (the file holds no|none of 1 rows)"):
        load_conversations(tmp_path, "skip")
    report = check_files(tmp_path)
    assert not report.is_good and len(report.unusable_files) == 1
    assert report.unusable_files[0].startswith(f"{tmp_path / 'b.jsonl'}: holds no usable record")
    assert len(report.problems) == (content == "{\n")


def test_notes_name_the_turns_that_are_meant(tmp_path: Path) -> None:
    """Catches a tool's result called a silent user, and turns counted from the wrong place."""
    path = tmp_path / "a.jsonl"
    silent = {"query": "", "answer": "x"}
    result = {"tool_use": "3", "answer": "x"}
    rows = [
        {"interactions": [TURN, result, silent]},
        {**TURN, "interactions": [TURN, silent]},
        {**silent, "interactions": [result]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert check_files(path).notes == [
        f"{path}:1: field 'interactions[2].query' is empty (read as silence)",
        f"{path}:2: field 'interactions[1].query' is empty (read as silence)",
        f"{path}:3: field 'row.query' is empty (read as silence)",
    ]


def test_null_fields_are_absent(tmp_path: Path) -> None:
    """Catches rows of parquet, where every row has every column, taken for a turn of nulls."""
    path = tmp_path / "a.jsonl"
    nulls = {"query": None, "answer": None, "think": None}
    path.write_text(json.dumps({**nulls, "interactions": [TURN]}) + "\n")
    (conversation,) = load_conversations(path)
    assert [turn.query for turn in conversation.interactions] == ["Hi!"]
    for row, message in (
        ({**nulls, "interactions": None}, "'interactions': expected a non-empty list"),
        ({"query": "Hi!", "answer": None}, r"'row\.answer': expected non-empty text"),
        ({"query": None, "answer": "Hi!"}, r"'row\.query': expected text, got nothing"),
    ):
        path.write_text(json.dumps(row))
        with pytest.raises(UserError, match=message):
            load_conversations(path)
