"""Data sets of the Hub and saved ones, with the real package `datasets` and a Hub on this machine.

The Hub answers what `datasets` asks of huggingface.co: the record of a repository, its files, and
ranges of them. The reader runs in a process of its own, for the address of the Hub is read when
the package is imported.
"""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

COMMIT = "a" * 40
ROWS = [{"text": f"document {number}", "label": number} for number in range(10)]
CONTENT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
READER = """
import json, sys
from rxlm.data.dataset_texts import DatasetRecords, load_dataset_texts
from rxlm.data.records import Place
from rxlm.errors import UserError
path, split = sys.argv[1], sys.argv[2]
try:
    found = {
        "first": load_dataset_texts(path, split=split, limit=3),
        "from": [record.value for record in DatasetRecords(path, split=split).read(0, Place(7, 7))],
    }
except UserError as error:
    found = {"error": str(error)}
print(json.dumps(found))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """One data set, owner/name, of one file."""

    protocol_version = "HTTP/1.1"
    ranges: list[str]

    def log_message(self, *args: Any) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        """Answer; HEAD gets the same without its body."""
        path = self.path.split("?")[0]
        repository = "/api/datasets/owner/name"
        files = [{"type": "file", "oid": "b" * 40, "size": len(CONTENT), "path": "train.jsonl"}]
        if path == f"{repository}/tree/{COMMIT}":
            self.reply(json.dumps(files).encode())
        elif path.startswith(f"{repository}/tree/"):
            self.reply(b"[]")
        elif path in (repository, f"{repository}/revision/{COMMIT}"):
            record = {
                "_id": "1", "id": "owner/name", "sha": COMMIT, "private": False, "gated": False,
                "disabled": False, "downloads": 0, "likes": 0, "tags": [],
                "siblings": [{"rfilename": "train.jsonl"}],
            }  # fmt: skip
            self.reply(json.dumps(record).encode())
        elif path.endswith("/train.jsonl"):
            self.reply_range()
        else:
            self.reply(b"{}", 404, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def reply_range(self) -> None:
        """Send the bytes that were asked for."""
        first, last = 0, len(CONTENT) - 1
        if asked := self.headers.get("Range"):
            self.ranges.append(asked)
            begin, _, end = asked.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(last, int(end or last))
        headers = {
            "ETag": '"1"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes",
            "Content-Range": f"bytes {first}-{last}/{len(CONTENT)}",
        }  # fmt: skip
        self.reply(CONTENT[first : last + 1], 206 if asked else 200, headers)

    def reply(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send an answer."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """Address of a Hub, and the ranges of the file that it was asked for."""
    ranges: list[str] = []
    handler = type("Handler", (Hub,), {"ranges": ranges})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", ranges
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def read(path: str, split: str, address: str, home: Path) -> dict[str, Any]:
    """Read a data set in a process that knows only the Hub at ``address``."""
    root = Path(__file__).resolve().parents[2]
    environment = {
        **os.environ, "PYTHONPATH": str(root), "HF_ENDPOINT": address, "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", READER, path, split],
        env=environment, capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_data_set_of_the_hub_is_streamed(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    """Catches a call that the real package understands otherwise, a place that is off by one, and a
    split that is not there told as a defect."""
    address, ranges = hub
    found = read("hf://owner/name", "train", address, tmp_path)
    assert found == {
        "first": ["document 0", "document 1", "document 2"],
        "from": ["document 7", "document 8", "document 9"],
    }
    assert ranges, "read by range, not downloaded"
    assert not list(tmp_path.rglob("*.jsonl"))
    assert "could not be read" in read("hf://owner/name", "test", address, tmp_path)["error"]
    missing = read("hf://owner/nothing", "train", address, tmp_path)["error"]
    assert missing.startswith("hf://owner/nothing (split train) could not be read")


def test_a_saved_data_set(tmp_path: Path) -> None:
    """Catches a folder that the real `save_to_disk` wrote and ours does not know or misreads."""
    writer = (
        "import datasets, json, sys\n"
        "rows = datasets.Dataset.from_list(json.loads(sys.argv[1]))\n"
        "datasets.DatasetDict(train=rows).save_to_disk(sys.argv[2])\n"
    )
    folder = tmp_path / "saved"
    subprocess.run(
        [sys.executable, "-c", writer, json.dumps(ROWS), str(folder)],
        capture_output=True, timeout=240, check=True,
    )  # fmt: skip
    found = read(str(folder), "train", "http://127.0.0.1:9", tmp_path / "home")
    assert found["first"] == ["document 0", "document 1", "document 2"]
    assert found["from"] == ["document 7", "document 8", "document 9"]
    assert "data.text_split" in read(str(folder), "test", "http://127.0.0.1:9", tmp_path)["error"]
