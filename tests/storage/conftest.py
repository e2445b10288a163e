"""A Hugging Face Hub in this process: as much of its protocol as models need, over HTTP.

The real client talks to it, so what is tested is what users run.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
import yaml

from rxlm.rxt.models import RxTAlpha
from rxlm.tokenization import TokenizerTraining, train_tokenizer

TOKEN = "hf_" + "a" * 34


class Hub:
    """Repositories by name: their files, and whether they are private. ``messages`` are those of
    commits, ``heads`` what the YAML of uploaded cards says, ``refused`` the status of all replies
    (None: none is refused)."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.heads: list[dict[str, Any]] = []
        self.url = ""
        self.refused: int | None = None

    def sha(self, repo: str) -> str:
        """The commit: a digest of what is there."""
        content = b"".join(name.encode() + data for name, data in sorted(self.files[repo].items()))
        return hashlib.sha1(content).hexdigest()


def handler_of(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def reply(
            self, status: int, body: bytes | Any, headers: dict[str, str] | None = None
        ) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            given = {"Content-Length": str(len(data)), "Content-Type": "application/json"}
            for name, value in (given | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def authorized(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def refuse(self, status: int, code: str) -> None:
            self.reply(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

        def reply_refused(self) -> None:
            assert hub.refused is not None
            message = "Invalid credentials in Authorization header"
            self.reply(hub.refused, {"error": message}, {"X-Error-Message": message})

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            if hub.refused is not None:
                return self.reply_refused()
            match = re.match(r"/(?:api/models/)?([\w.-]+/[\w.-]+)/(\w+)/([\w.-]+)/?(.*)", path)
            if match is None or match[1] not in hub.files:
                return self.refuse(404 if self.authorized() else 401, "RepoNotFound")
            repo, verb, revision, name = match.groups()
            if hub.private[repo] and not self.authorized():
                return self.refuse(401, "RepoNotFound")
            files, sha = hub.files[repo], hub.sha(repo)
            if revision not in ("main", "v1", sha):
                return self.refuse(404, "RevisionNotFound")
            if verb == "revision":
                siblings = [{"rfilename": item, "size": len(files[item])} for item in files]
                return self.reply(200, {"id": repo, "sha": sha, "siblings": siblings})
            if verb == "tree":
                rows = [
                    {
                        "type": "file",
                        "path": item,
                        "size": len(data),
                        "oid": hashlib.sha1(data).hexdigest(),
                    }
                    for item, data in files.items()
                ]
                return self.reply(200, rows)
            if name not in files:
                return self.refuse(404, "EntryNotFound")
            etag = hashlib.sha1(files[name]).hexdigest()
            self.reply(200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": sha})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if hub.refused is not None:
                return self.reply_refused()
            if not self.authorized():
                return self.refuse(401, "Unauthorized")
            if self.path == "/api/repos/create":
                values = json.loads(body)
                repo = "/".join(
                    item for item in (values.get("organization"), values["name"]) if item
                )
                if repo in hub.files:
                    return self.reply(409, {"error": "exists", "url": f"{hub.url}/{repo}"})
                hub.files[repo] = {".gitattributes": b""}
                # Named one way or the other, by the version of the client.
                hidden = values.get("visibility") == "private" or values.get("private")
                hub.private[repo] = bool(hidden)
                return self.reply(200, {"url": f"{hub.url}/{repo}", "name": repo})
            if self.path == "/api/validate-yaml":
                # The client asks this before it uploads a README.md.
                head = yaml.safe_load(json.loads(body)["content"].split("---")[1])
                hub.heads.append(head)
                return self.reply(200, {"errors": [], "warnings": []})
            match = re.match(r"/api/models/([\w.-]+/[\w.-]+)/(\w+)/", self.path)
            assert match is not None, self.path
            repo, verb = match.groups()
            if verb == "preupload":
                rows = [
                    {"path": item["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for item in json.loads(body)["files"]
                ]
                return self.reply(200, {"files": rows})
            assert verb == "commit", self.path
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    hub.messages.append(entry["value"]["summary"])
                elif entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    hub.files[repo][entry["value"]["path"]] = content
            sha = hub.sha(repo)
            address = f"{hub.url}/{repo}/commit/{sha}"
            self.reply(200, {"success": True, "commitUrl": address, "commitOid": sha})

    return Handler


@contextlib.contextmanager
def running_hub(patch: pytest.MonkeyPatch, cache: str) -> Iterator[Hub]:
    """Run a Hub to which huggingface_hub talks; nothing is read from or written to the user's."""
    from huggingface_hub import constants

    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    patch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", cache)
    patch.setattr(constants, "HF_TOKEN_PATH", f"{cache}/token")
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"):
        patch.delenv(name, raising=False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub that is empty, and a cache that is."""
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with running_hub(monkeypatch, str(tmp_path / "hub_cache")) as running:
        yield running


@pytest.fixture
def hub_token() -> str:
    """The token that this Hub takes."""
    return TOKEN


@pytest.fixture(scope="session")
def model() -> RxTAlpha:
    """A tiny random model."""
    tokenizer = train_tokenizer(["Hello, my name is Ann."] * 4, TokenizerTraining(vocab_size=280))
    sizes = {"num_layers": 1, "embed_dim": 8, "att_heads": 2, "stm_size": 3, "seq_len": 32}
    part = {**sizes, "vocab_size": tokenizer.vocab_size, "ff_dim": 8, "self_att_type": "mha"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return RxTAlpha(part, part, {**sizes, "variant": "simple"}, tokenizer=tokenizer).eval()
