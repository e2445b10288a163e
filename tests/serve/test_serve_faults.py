"""Those who call badly: malformed requests, readers who leave or do not read."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rxlm.rxt.models import RxTAlpha

SCRIPT = Path(__file__).parents[2] / "scripts" / "serve_fuzz.py"
LONG = {"query": "Tell me all", "temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def serve_fuzz() -> ModuleType:
    """The script that sends 10,000 of them."""
    spec = importlib.util.spec_from_file_location("serve_fuzz", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_fuzz"] = module
    spec.loader.exec_module(module)
    return module


def test_malformed_requests_are_answered_and_change_nothing(
    serve_fuzz: ModuleType, tiny: RxTAlpha, run_server: Any
) -> None:
    """Catches a request that makes the server fail, or that shows another session's text."""
    with run_server(tiny, None, {"max_new_tokens": 4}) as server:
        planted = serve_fuzz.plant(server.address)
        outcome = serve_fuzz.fuzz(server.address, planted, 120, seed=1)
    assert outcome.problems == []
    assert outcome.statuses.total() > 60
    assert any(status >= 400 for status in outcome.statuses)


def ask(port: int, path: str, body: dict[str, Any], receive_buffer: int = 0) -> socket.socket:
    """Send a request on a connection of its own."""
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", port))
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


def wait_until(happened: Any) -> None:
    """Wait until something is so."""
    end = time.monotonic() + 100
    while not happened():
        assert time.monotonic() < end, "it never happens"
        time.sleep(0.01)


def test_a_reader_who_leaves_ends_the_answer(slow_tiny: RxTAlpha, run_server: Any) -> None:
    """Catches an answer that goes on for nobody, and a turn that is lost with its reader."""
    with run_server(slow_tiny, None) as server:
        session = server.service.create().session_id
        with ask(server.port, f"/sessions/{session}/turns", LONG) as connection:
            seen = b""
            while b"event: delta" not in seen:
                seen += connection.recv(4096)
        wait_until(lambda: server.service.turns(session))
        (turn,) = server.service.turns(session)
        assert turn.reason == "stopped" and turn.answer_tokens > 0


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
def test_a_caller_who_does_not_wait_ends_the_answer(
    slow_tiny: RxTAlpha, run_server: Any, path: str
) -> None:
    """Catches the same where the answer comes in one piece."""
    body = {"temperature": 1.0, "seed": 3}
    body |= (
        {"input": "a"} if "responses" in path else {"messages": [{"role": "user", "content": "a"}]}
    )
    with run_server(slow_tiny, None) as server:
        with ask(server.port, path, body):
            wait_until(lambda: server.service.stats().running == 1)
        wait_until(lambda: server.service.stats().turns == 1)
        room = slow_tiny.config.decoder.seq_len - 20
        assert 0 < server.service.stats().answer_tokens < room, "the answer went on for nobody"


def test_a_reader_who_does_not_read_holds_nobody_up(tiny: RxTAlpha, run_server: Any) -> None:
    """Catches an engine that waits for its slowest reader."""
    with run_server(tiny, None, answer_timeout_seconds=5.0) as server:
        sessions = [server.service.create().session_id for _ in range(3)]
        lazy = [
            ask(server.port, f"/sessions/{session}/turns", LONG, receive_buffer=1024)
            for session in sessions
        ]
        with server.client() as client:
            answer = client.post("/v1/responses", json={"input": "a", "max_output_tokens": 3})
            assert answer.is_success
        for session in sessions:
            wait_until(lambda session=session: server.service.turns(session))
        for connection in lazy:
            connection.close()
