"""Sends a server malformed requests and says what became of it.

    python scripts/serve_fuzz.py [--requests 10000] [--seed 0] [--model MODEL_DIR]

A server (``rxlm serve``, of a small random model unless ``--model`` names one) is started in a
process of its own. One session with a secret in it is planted; then it gets requests that
schemathesis makes of its own OpenAPI document (most of them wrong on purpose) and random and
mutilated bytes. What is checked: no answer has a status of 5xx, none holds the secret or a path of
this machine, the session is as it was, the server answers, and its memory stays what it was after
the first tenth.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import hypothesis
import psutil
import requests
import schemathesis
from schemathesis import GenerationMode

MEGABYTE = 2**20
MOST_GROWTH = 64 * MEGABYTE
"""The states of a small model that are kept in main memory are far less; a leak of 10 kB a request
is more."""
SHARES = {"wrong": 0.5, "right": 0.1, "bytes": 0.4}
"""Of the requests: schemathesis' negative and positive ones, and bytes."""
PATHS = re.compile(rb"/(?:home|root|tmp|usr|var)/|Traceback|\.py\b")
SECONDS = 30.0


class Outcome(NamedTuple):
    """What the answers were. ``statuses``: how often; ``closed``: connections closed without an
    answer; ``problems``: what must not be, a line each."""

    statuses: Counter[int]
    closed: int
    problems: list[str]


class Planted(NamedTuple):
    """A session that no request may read or change."""

    session_id: str
    secret: str
    content: Any


class Fuzzer:
    """Sends requests to one address and keeps what is wrong with the answers."""

    def __init__(self, address: str, secret: str, seed: int) -> None:
        self.address, self._secret = address, secret.encode()
        self._random = random.Random(seed)
        self._seed = seed
        self.statuses: Counter[int] = Counter()
        self.closed = 0
        self.problems: list[str] = []

    def outcome(self) -> Outcome:
        """Return what came of it so far."""
        return Outcome(self.statuses, self.closed, self.problems)

    def send_generated(self, schema: dict[str, Any], count: int, mode: GenerationMode) -> None:
        """Send requests that schemathesis makes of the server's own description."""
        loaded = schemathesis.openapi.from_dict(schema)
        with requests.Session() as session:
            session.trust_env = False

            @hypothesis.seed(self._seed)
            @hypothesis.settings(
                max_examples=count,
                deadline=None,
                database=None,
                phases=[hypothesis.Phase.generate],
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(case=loaded.as_strategy(generation_mode=mode))
            def send(case: Any) -> None:
                what = f"{case.method} {case.path} {str(case.body)[:300]}"
                try:
                    answer = case.call(base_url=self.address, session=session, timeout=SECONDS)
                except requests.exceptions.ConnectionError:
                    self.closed += 1
                    return
                self._check(answer.status_code, answer.content, what)

            send()

    def send_bytes(self, count: int) -> None:
        """Send random bytes, and requests that were right before something happened to them."""
        port = int(self.address.rpartition(":")[2])
        for _ in range(count):
            data = self._bytes()
            answer = b""
            with contextlib.suppress(ConnectionError, TimeoutError):
                with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
                    connection.sendall(data)
                    # No more will come: a server that waits for the rest would wait for ever.
                    connection.shutdown(socket.SHUT_WR)
                    while piece := connection.recv(65536):
                        answer += piece
            status = re.match(rb"HTTP/1\.1 (\d{3})", answer)
            if status is None:
                self.closed += 1
            else:
                self._check(int(status[1]), answer, repr(data[:300]))

    def _bytes(self) -> bytes:
        draw = self._random
        if draw.random() < 0.2:
            return draw.randbytes(draw.randint(1, 2000))
        path = draw.choice(
            ["/v1/chat/completions", "/v1/responses", "/sessions", "/sessions/x/turns", "/%00/..//"]
        )
        body = json.dumps({"messages": [{"role": "user", "content": "a"}], "input": "a"}).encode()
        length = draw.choice([len(body), 0, len(body) * 2, -1, 10**30])
        data = bytearray(
            b"%s %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s"
            % (draw.choice([b"GET", b"POST", b"DELETE", b"PUT"]), path.encode(), length, body)
        )
        for _ in range(draw.randint(0, 6)):
            place = draw.randrange(len(data))
            change = draw.random()
            if change < 0.4:
                data[place] = draw.randrange(256)
            elif change < 0.7:
                del data[place : place + draw.randint(1, 20)]
            else:
                data[place:place] = draw.randbytes(draw.randint(1, 20))
            data = data or bytearray(b"x")
        return bytes(data)

    def _check(self, status: int, content: bytes, what: str) -> None:
        self.statuses[status] += 1
        if status >= 500:
            self.problems.append(f"status {status}: {what}: {content[:300]!r}")
        if self._secret in content:
            self.problems.append(f"another session's text: {what}")
        if status >= 400 and PATHS.search(content.partition(b"\r\n\r\n")[2] or content):
            self.problems.append(f"an error that says too much: {what}: {content[:300]!r}")


def plant(address: str) -> Planted:
    """Make a session that holds a secret; return it."""
    secret = f"secret-{secrets.token_hex(8)}"
    with httpx.Client(base_url=address, timeout=SECONDS, trust_env=False) as client:
        session = client.post("/sessions", json={"name": "planted"}).json()["id"]
        client.post(f"/sessions/{session}/turns", json={"query": secret}).raise_for_status()
        return Planted(session, secret, _content(client, session))


def check_planted(address: str, planted: Planted) -> list[str]:
    """Return what is wrong with the planted session, and with the server."""
    with httpx.Client(base_url=address, timeout=SECONDS, trust_env=False) as client:
        if not client.get("/health").is_success:
            return ["the server does not answer any more"]
        if _content(client, planted.session_id) != planted.content:
            return ["the planted session is not what it was"]
    return []


def fuzz(address: str, planted: Planted, count: int, seed: int) -> Outcome:
    """Send ``count`` requests; return what came of it."""
    schema = httpx.get(f"{address}/openapi.json", trust_env=False).json()
    fuzzer = Fuzzer(address, planted.secret, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzzer.send_generated(schema, round(count * SHARES["wrong"]), GenerationMode.NEGATIVE)
        fuzzer.send_generated(schema, round(count * SHARES["right"]), GenerationMode.POSITIVE)
    fuzzer.send_bytes(round(count * SHARES["bytes"]))
    fuzzer.problems.extend(check_planted(address, planted))
    return fuzzer.outcome()


def _content(client: httpx.Client, session: str) -> Any:
    said = client.get(f"/sessions/{session}").json()
    return said["turns"], client.get(f"/sessions/{session}/memory").json()


def save_small_model(folder: Path) -> None:
    """Save a model that says random things."""
    import torch

    from rxlm.rxt.models import RxTAlpha
    from rxlm.tokenization import TokenizerTraining, train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(["Hello, my name is Ann."] * 8, TokenizerTraining(vocab_size=290))
    part = {"num_layers": 2, "embed_dim": 16, "att_heads": 2, "stm_size": 4, "seq_len": 96}
    network = {**part, "vocab_size": tokenizer.vocab_size, "ff_dim": 16}
    network |= {"self_att_type": "mha", "cross_att_type": "mha"}
    memory = {**part, "att_type": "mha", "interlayer_att_type": "mha"}
    RxTAlpha(network, network, memory, tokenizer=tokenizer).save_pretrained(folder)


@contextlib.contextmanager
def served(model: Path, sessions: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Serve ``model`` inside the block; gives the address and the process."""
    command = [sys.executable, "-m", "rxlm", "serve", str(model), "--port", "0"]
    command += ["--sessions", str(sessions), "--max-new-tokens", "8"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            found = re.search(r"http://[\d.]+:\d+", line)
            if found:
                break
            print(line, end="", file=sys.stderr)
        else:
            raise SystemExit("the server did not start")
        # Nobody else reads what it logs: a full pipe would stop it.
        with (sessions.parent / "server.log").open("w") as log:
            copying = subprocess.Popen(["cat"], stdin=process.stderr, stdout=log)
            wait_for(found[0])
            yield found[0], psutil.Process(process.pid)
            process.terminate()
            process.wait(60)
            copying.wait(60)
    finally:
        process.kill()
        process.wait()


def wait_for(address: str) -> None:
    """Wait until a server answers."""
    for _ in range(600):
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{address}/health", trust_env=False).is_success:
                return
        time.sleep(0.1)
    raise SystemExit("the server does not answer")


def main() -> int:
    """Run the check; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or Path(scratch) / "model"
        if options.model is None:
            save_small_model(model)
        with served(model, Path(scratch) / "sessions") as (address, process):
            planted = plant(address)
            first = max(1, options.requests // 10)
            warm = fuzz(address, planted, first, options.seed)
            before = process.memory_info().rss
            rest = fuzz(address, planted, options.requests - first, options.seed + 1)
            growth = process.memory_info().rss - before
    statuses = warm.statuses + rest.statuses
    problems = [*warm.problems, *rest.problems]
    if growth > MOST_GROWTH:
        problems.append(f"memory grew by {growth / MEGABYTE:.0f} MiB")
    print(f"{statuses.total()} answers, {warm.closed + rest.closed} connections closed without one")
    print("by status: " + ", ".join(f"{status}: {statuses[status]}" for status in sorted(statuses)))
    print(f"resident memory: {before / MEGABYTE:.0f} MiB, then {growth / MEGABYTE:+.1f} MiB")
    print("\n".join(problems[:20]) or "no problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
