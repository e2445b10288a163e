"""Token stores: made once for a content and a tokenizer, whole or not there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest

from rxlm.data.token_store import (
    TokenStore,
    content_fingerprint,
    open_store,
    store_key,
    tokens_in_memory,
)
from rxlm.errors import RunError, UserError

TEXTS = ["abc", "", "de", "f" * 100]


def encode(texts: list[str]) -> list[list[int]]:
    return [[ord(letter) for letter in text] for text in texts]


def open_texts(
    cache: Path, key: str, built: list[str] | None = None, texts: Iterable[str] = TEXTS
) -> TokenStore:
    def build() -> tuple[Iterable[str], Any]:
        if built is not None:
            built.append(key)
        return texts, lambda: {"records": 4}

    return open_store(cache, key, build, encode, 300)


@pytest.mark.parametrize("vocab_size", [300, 70_000])
def test_store_holds_what_memory_would(tmp_path: Path, vocab_size: int) -> None:
    """Catches ids that do not fit their bytes, documents that run together, a lost empty one."""
    texts = [*TEXTS, chr(vocab_size - 1)]
    described: Mapping[str, Any] = {"records": 5}
    store = open_store(tmp_path, "k", lambda: (texts, lambda: described), encode, vocab_size)
    wanted = tokens_in_memory(texts, encode)
    assert store.tokens.tolist() == wanted.tokens.tolist()
    assert store.offsets.tolist() == wanted.offsets.tolist() == [0, 3, 3, 5, 105, 106]
    assert store.num_documents == 5 and store.info["records"] == 5
    assert isinstance(store.tokens, numpy.memmap)


def test_store_is_made_once(tmp_path: Path) -> None:
    """Catches tokenising again at every start, and a store that another content is read from."""
    built: list[str] = []
    for key in ("a", "a", "b", "a"):
        open_texts(tmp_path, key, built)
    assert built == ["a", "b"]


def test_failed_builds_leave_nothing(tmp_path: Path) -> None:
    """Catches half a store that the next start takes for a whole one; also one left by a process
    that was killed."""

    def broken() -> Iterator[str]:
        yield "abc"
        raise UserError("bad record")

    with pytest.raises(UserError, match="bad record"):
        open_texts(tmp_path, "a", texts=broken())
    assert not (tmp_path / "a").exists() and not list(tmp_path.glob(".a.*.tmp"))
    left = tmp_path / ".a.1.tmp"
    left.mkdir()
    (left / "tokens.bin").write_bytes(b"x")
    assert open_texts(tmp_path, "a").num_documents == 4
    assert not left.exists()


def test_damaged_stores_are_refused(tmp_path: Path) -> None:
    """Catches training on a store that was cut off."""
    open_texts(tmp_path, "a")
    path = tmp_path / "a" / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"damaged\. Delete the folder"):
        open_texts(tmp_path, "a")


CODE = """
import sys, time, pathlib
from rxlm.data.token_store import open_store
def texts():
    with open(sys.argv[1] + "/built", "a") as file: file.write("x")
    for number in range(3):
        time.sleep(0.1)
        yield "abc"
encode = lambda texts: [[1, 2]] * len(texts)
store = open_store(pathlib.Path(sys.argv[1]), "k", lambda: (texts(), dict), encode, 9)
print(store.tokens.tolist())
"""


def test_processes_make_one_store(tmp_path: Path) -> None:
    """Catches processes of one run that each tokenise, or that read what another has half done."""
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(2)]
    outputs = {run.communicate()[0] for run in runs}
    assert outputs == {b"[1, 2, 1, 2, 1, 2]\n"}
    assert (tmp_path / "built").read_text() == "x"


def test_key_is_of_content_tokenizer_and_options(tmp_path: Path) -> None:
    """Catches a cache that is read although the file, the tokenizer or a setting has changed, and
    one that is missed because the file was moved."""
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("one")
    first = content_fingerprint([path], cache)
    assert content_fingerprint([path], cache) == first
    (tmp_path / "b.txt").write_text("one")
    assert content_fingerprint([tmp_path / "b.txt"], cache) == first
    (tmp_path / "b.jsonl").write_text("one")
    assert content_fingerprint([tmp_path / "b.jsonl"], cache) != first
    path.write_text("two")
    assert content_fingerprint([path], cache) != first
    keys = {
        store_key(first, "t", {"a": 1}),
        store_key(first, "u", {"a": 1}),
        store_key(first, "t", {"a": 2}),
        store_key("x", "t", {"a": 1}),
    }
    assert len(keys) == 4


def test_hashes_of_unchanged_files_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches gigabytes hashed at every start, and a kept hash of a file that has changed."""
    monkeypatch.setattr("rxlm.data.token_store._RACY_NANOSECONDS", -1)
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("one")
    first = content_fingerprint([path], cache)
    (note,) = (cache / "hashes").iterdir()
    note.write_text(note.read_text().replace('"sha256": "', '"sha256": "kept'))
    assert content_fingerprint([path], cache) != first, "the note was not used"
    path.write_text("two")
    os.utime(path, ns=(0, 0))
    assert content_fingerprint([path], cache) != first
    (note,) = (cache / "hashes").iterdir()
    assert "kept" not in note.read_text()


def test_a_store_is_verified_before_it_is_kept(tmp_path: Path) -> None:
    """Catches a store that is kept although what was read is not what its key says, and a check
    before the last document was read."""
    read: list[str] = []

    def texts() -> Iterator[str]:
        for text in TEXTS:
            read.append(text)
            yield text

    def verify() -> None:
        assert read == TEXTS
        raise RunError("changed")

    with pytest.raises(RunError, match="changed"):
        open_store(tmp_path, "a", lambda: (texts(), dict), encode, 300, verify)
    assert [item.name for item in tmp_path.iterdir()] == [".a.lock"]


@pytest.mark.parametrize("other", ["x.jsonl.txt", "x.parquet.jsonl.gz", "x.jsonl.gz", "x.txt"])
def test_the_end_of_a_name_says_how_a_file_is_read(tmp_path: Path, other: str) -> None:
    """Catches a store of paragraphs that is taken for one of lines of JSON with the same bytes."""
    for name in ("x.jsonl", other, "y.parquet.jsonl"):
        (tmp_path / name).write_text('{"text": "one"}')
    cache = tmp_path / "cache"
    first = content_fingerprint([tmp_path / "x.jsonl"], cache)
    assert content_fingerprint([tmp_path / other], cache) != first
    assert content_fingerprint([tmp_path / "y.parquet.jsonl"], cache) == first


@pytest.mark.parametrize("note", ["", "[]", "null", "{}", "SIGNED", "\x00"])
def test_a_damaged_note_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: str
) -> None:
    """Catches a traceback of a note of a hash that a full disk or an editor has left."""
    monkeypatch.setattr("rxlm.data.token_store._RACY_NANOSECONDS", -1)
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("one")
    first = content_fingerprint([path], cache)
    (kept,) = (cache / "hashes").iterdir()
    whole = kept.read_text()
    kept.write_text(whole.replace("sha256", "sha") if note == "SIGNED" else note)
    assert content_fingerprint([path], cache) == first
    assert kept.read_text() == whole
