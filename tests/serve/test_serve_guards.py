"""Who may call and with what: keys, hosts, origins, sizes, slow and broken requests."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from rxlm.errors import RunError
from rxlm.rxt.models import RxTAlpha
from rxlm.serve.header_timeout import HeadTimeoutProtocol
from rxlm.serve.interface import QueueFullError, StateDamagedError
from rxlm.serve.settings import is_loopback

KEY = "a-secret-key"


def raw(port: int, *pieces: bytes, pause: float = 0.0, seconds: float = 30.0) -> bytes:
    """Send bytes as they are; return what came back until the connection was closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)
        answer = b""
        try:
            while data := connection.recv(65536):
                answer += data
        except ConnectionResetError:
            pass
        return answer


def test_the_key_is_asked_for_everywhere(tiny: RxTAlpha, run_server: Any) -> None:
    """Catches a route that forgot to ask, and a key that is compared too kindly."""
    with run_server(tiny, None, api_key=KEY) as server, server.client() as client:
        paths = [path for path in server.app.openapi()["paths"] if path != "/health"]
        assert len(paths) > 10
        for path in [*paths, "/openapi.json", "/nowhere"]:
            for method in ("GET", "POST", "DELETE", "PATCH"):
                answer = client.request(method, path)
                assert answer.status_code == 401, (method, path)
        assert answer.json()["error"]["code"] == "invalid_api_key"
        for given in (KEY[:-1], f"{KEY}x", KEY.upper(), "x", "ключ".encode().decode("latin-1")):
            headers = {"Authorization": f"Bearer {given}".encode("latin-1")}
            assert client.get("/v1/models", headers=headers).status_code == 401
        assert (
            client.get("/v1/models", headers={"Authorization": f"Basic {KEY}"}).status_code == 401
        )
        assert client.get("/v1/models", headers={"Authorization": f"bearer {KEY}"}).is_success
        assert client.get("/health").is_success
        assert client.get("/").is_success, "the page asks for the key itself"


def test_foreign_hosts_and_pages_are_refused(client: httpx.Client) -> None:
    """Catches a page on the web that reads conversations through the user's browser."""
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", ""):
        assert client.get("/sessions", headers={"Host": host}).status_code == 403
    for host in ("localhost", "LOCALHOST:9", "[::1]:8000"):
        assert client.get("/sessions", headers={"Host": host}).is_success
    foreign = {"Origin": "https://evil.example"}
    assert client.get("/sessions", headers=foreign).status_code == 403
    assert client.post("/sessions", json={}, headers=foreign).status_code == 403
    assert client.post("/sessions", json={}, headers={"Origin": "null"}).status_code == 403
    own = {"Origin": f"http://127.0.0.1:{client.base_url.port}"}
    answer = client.get("/sessions", headers=own)
    assert answer.is_success and "access-control-allow-origin" not in answer.headers
    # What a form of another page could send without asking first.
    form = client.post("/sessions", content="{}", headers={"Content-Type": "text/plain"})
    assert form.status_code == 400


def test_an_allowed_origin_may_call(tiny: RxTAlpha, run_server: Any) -> None:
    """Catches CORS that allows everybody, or a preflight that is asked for the key."""
    site = "https://good.example"
    with run_server(tiny, None, api_key=KEY, allowed_origins=(site,)) as server:
        with server.client() as client:
            asked = {
                "Origin": site,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization, content-type",
            }
            allowed = client.options("/v1/responses", headers=asked)
            assert allowed.headers["access-control-allow-origin"] == site
            refused = client.options(
                "/v1/responses", headers=asked | {"Origin": "https://x.example"}
            )
            assert refused.status_code == 403


def test_bodies_have_a_limit_however_they_come(tiny: RxTAlpha, run_server: Any) -> None:
    """Catches a limit that believes Content-Length, or reads everything before it looks."""
    with run_server(tiny, None, max_body_bytes=2000) as server, server.client() as client:
        large = json.dumps({"name": "x" * 3000}).encode()
        answer = client.post("/sessions", content=large)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")

        def endless() -> Iterator[bytes]:
            for _ in range(10_000):
                yield b" " * 1000

        # It may also hang up while more is coming, which is as well.
        with contextlib.suppress(httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            assert client.post("/sessions", content=endless()).status_code == 413
        assert client.post("/sessions", json={"name": "fits"}).status_code == 201


def test_slow_bodies_and_half_requests(tiny: RxTAlpha, run_server: Any) -> None:
    """Catches a connection that is held for ever by who never finishes asking."""
    head = b"POST /sessions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with run_server(tiny, None, body_timeout_seconds=0.3) as server:
        slow = raw(server.port, head + b"Content-Length: 10\r\n\r\n{", b'"')
        assert b" 408 " in slow.split(b"\r\n")[0]
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head + b"Content-Length: 10\r\n\r\n{")
        assert b" 400 " in raw(server.port, b"\x00\x01\x02 nonsense\r\n\r\n").split(b"\r\n")[0]
        with server.client() as client:
            assert client.get("/health").is_success


def test_half_a_head_is_not_waited_for(
    tiny: RxTAlpha, run_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a connection held by who sends a head byte by byte, and one that is cut in use."""
    monkeypatch.setattr(HeadTimeoutProtocol, "head_seconds", 0.6)
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    with run_server(tiny, None) as server:
        for answers, pieces in ((0, [b""]), (0, [request]), (1, [request + b"\r\n", request])):
            begin = time.monotonic()
            answer = raw(server.port, *pieces, pause=0.2)
            assert time.monotonic() - begin < 4.0, "well before the keep-alive of 5 seconds"
            assert answer.count(b" 200 ") == answers
        trickle = [request[at : at + 1] for at in range(len(request))]
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            assert not raw(server.port, *trickle, pause=0.05)
        # A head in time is answered, however long the connection has been there by then.
        ports = set()
        with server.client() as client:
            for _ in range(3):
                with client.stream("GET", "/health") as reply:
                    assert reply.is_success
                    stream = reply.extensions["network_stream"]
                    ports.add(stream.get_extra_info("client_addr")[1])
                    reply.read()
                time.sleep(0.4)
        assert len(ports) == 1, "the connection was kept"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"messages": 1}',
        b'{"messages": [{"role": "user"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 0}',
        b'{"messages": [{"role": "user", "content": "a"}], "top_p": -1}',
    ],
)  # fmt: skip
def test_malformed_bodies_are_the_callers_fault(client: httpx.Client, body: bytes) -> None:
    """Catches a body that makes the server fail, or an error that is not of OpenAI's shape."""
    headers = {"Content-Type": "application/json"}
    answer = client.post("/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.json()["error"]["message"]


def test_what_is_known_to_go_wrong_has_a_status(
    client: httpx.Client, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a full queue that looks like a defect, and a path in an answer."""

    def failing(error: Exception) -> Any:
        def fail(*args: Any, **options: Any) -> Any:
            raise error

        return fail

    body = {"messages": [{"role": "user", "content": "a"}]}
    monkeypatch.setattr(server.service, "submit_detached", failing(QueueFullError("full.")))
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0
    damaged = StateDamagedError("/home/ann/states/x.safetensors is damaged.")
    monkeypatch.setattr(server.service, "submit_detached", failing(damaged))
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 410 and "/home" not in answer.text


def test_unexpected_errors_are_logged_and_not_shown(
    client: httpx.Client,
    server: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Catches a path, a message or a trace of an internal error that reaches the caller."""
    secret = "could not write /home/ann/sessions"
    for error in (RunError(secret), RuntimeError(secret)):

        def fail(*args: Any, _error: Exception = error, **options: Any) -> Any:
            raise _error

        monkeypatch.setattr(server.service, "sessions", fail)
        caplog.clear()
        with caplog.at_level(logging.ERROR, logger="rxlm"):
            answer = client.get("/sessions")
        assert answer.status_code == 500
        assert secret not in answer.text and "Traceback" not in answer.text
        request_id = answer.headers["x-request-id"]
        assert request_id in answer.json()["error"]["message"]
        assert request_id in caplog.text and secret in caplog.text


def test_every_answer_has_the_headers_that_browsers_obey(client: httpx.Client) -> None:
    """Catches a page that may load from elsewhere, and conversations in a browser's cache."""
    for path in ("/", "/app.js", "/sessions", "/nowhere", "/health"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "unsafe" not in headers["content-security-policy"]
    assert client.get("/sessions").headers["cache-control"] == "no-store"
    assert client.get("/docs").status_code == 404, "its scripts come from elsewhere"


def test_metrics_can_be_read(client: httpx.Client) -> None:
    """Catches metrics that Prometheus cannot parse, and one series a conversation."""
    from prometheus_client.parser import text_string_to_metric_families

    client.get("/sessions/some-id")
    families = {
        family.name: family
        for family in text_string_to_metric_families(client.get("/metrics").text)
    }
    assert {"rxlm_running", "rxlm_turns", "rxlm_first_token_seconds"} <= set(families)
    routes = {sample.labels["route"] for sample in families["rxlm_http_requests"].samples}
    assert "/sessions/{session_id}" in routes and not any("some-id" in route for route in routes)


def test_loopback_is_recognised() -> None:
    """Catches an open address that is taken for a private one: no warning would be shown."""
    for host in ("127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"):
        assert is_loopback(host)
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org", "localhost.example.org"):
        assert not is_loopback(host)
