"""``rxlm serve`` as a process: it starts, says where, and leaves in order."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from rxlm.cli import serve as serve_module
from rxlm.cli.main import main
from rxlm.cli.serve import default_model_name, listening, read_key
from rxlm.errors import UserError

QUICK = {"max_tokens": 4}


class Process:
    """A running ``rxlm serve``."""

    def __init__(self, *words: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rxlm", "serve", *words, "--port", "0"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        assert self.process.stderr is not None
        self.said = ""
        while not (found := re.search(r"on (http://\S+)/", self.said)):
            line = self.process.stderr.readline()
            assert line, self.said
            self.said += line
        self.client = httpx.Client(base_url=found[1], timeout=60, trust_env=False)
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.TransportError):
                if self.client.get("/health").is_success:
                    return
            assert time.monotonic() < end
            time.sleep(0.02)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; return the exit status."""
        self.process.send_signal(number)
        _, rest = self.process.communicate(timeout=60)
        self.said += rest
        self.client.close()
        return self.process.returncode


@contextlib.contextmanager
def served(*words: str, **environment: str) -> Iterator[Process]:
    """Run a server inside the block."""
    process = Process(*words, **environment)
    try:
        yield process
    finally:
        process.client.close()
        process.process.kill()
        process.process.communicate()


def test_sessions_outlive_the_server_and_signals_end_it_in_order(
    micro_pipeline: Path, tmp_path: Path
) -> None:
    """Catches an answer cut off by SIGTERM, an exit status that looks like a crash, and turns that
    a restart loses."""
    words = (str(micro_pipeline), "--sessions", str(tmp_path / "sessions"))
    with served(*words) as server:
        assert "WARNING" not in server.said
        assert server.client.get("/v1/models").json()["data"][0]["id"] == "runs"
        session = server.client.post("/sessions", json={"name": "Ann"}).json()["id"]
        body = {"query": "Tell me all.", "temperature": 1.0}
        kinds = []
        with server.client.stream("POST", f"/sessions/{session}/turns", json=body) as answer:
            for line in answer.iter_lines():
                kinds += [line] if line.startswith("event: ") else []
                if line == "event: delta" and kinds.count(line) == 1:
                    server.process.send_signal(signal.SIGTERM)
        assert kinds[-3:] == ["event: end", "event: memory", "event: stats"]
        server.process.communicate(timeout=60)
        assert server.process.returncode == 0
    with served(*words) as server:
        (turn,) = server.client.get(f"/sessions/{session}").json()["turns"]
        assert turn["query"] == "Tell me all." and turn["reason"] in ("eos", "length")
        assert server.client.post(f"/sessions/{session}/turns", json={"query": "Go on"}).is_success
        assert server.end(signal.SIGINT) == 0
        assert "Traceback" not in server.said


def test_open_addresses_are_warned_of_and_the_key_is_taken_from_the_environment(
    micro_pipeline: Path, tmp_path: Path
) -> None:
    """Catches a server that is open to the network and does not say so."""
    words = (str(micro_pipeline), "--host", "0.0.0.0", "--sessions", str(tmp_path))
    with served(*words) as server:
        assert "WARNING: 0.0.0.0 is reachable from other machines and no key is set" in server.said
    with served(*words, RXLM_API_KEY="sesame") as server:
        assert "WARNING" not in server.said
        assert server.client.get("/sessions").status_code == 401
        right = {"Authorization": "Bearer sesame"}
        assert server.client.get("/sessions", headers=right).is_success
    command_line = json.dumps(server.process.args)
    assert "sesame" not in command_line


def test_a_port_in_use_is_one_message(
    micro_pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, and a model that is read first."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", str(micro_pipeline / "nowhere"), "--port", port]) == 2
    told = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1, port {port}" in told and told.count("\n") == 1
    with pytest.raises(UserError, match="--host"):
        listening("no.such.host.invalid", 0)


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an ImportError for who installed only the base."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        serve_module.importlib.util,
        "find_spec",
        lambda name: None if name == "fastapi" else found(name),
    )
    assert main(["serve", "somewhere"]) == 2
    assert "needs fastapi: pip install 'reactive-lm[serve]'" in capsys.readouterr().err


def test_keys_are_read_from_files_and_checked(tmp_path: Path) -> None:
    """Catches a line break that becomes part of the key, and an empty key that lets all in."""
    file = tmp_path / "key"
    file.write_text("sesame\n")
    assert read_key(file, "other") == "sesame"
    assert read_key(None, "other") == "other"
    assert read_key(None, None) is None
    for bad in ("", " \n", "two words", "schlüssel"):
        file.write_text(bad, encoding="utf-8")
        with pytest.raises(UserError, match="one word"):
            read_key(file, None)


def test_models_are_called_after_their_run() -> None:
    """Catches a model that is called 'step-000300' or after a folder of a server."""
    assert default_model_name("runs/nano") == "nano"
    assert default_model_name("runs/nano/50_x/checkpoints/step-000300") == "50_x"
    assert default_model_name("hf://owner/name") == "name"
