"""``/sessions``: what the chat page is built on."""

from __future__ import annotations

import io
import json
import threading
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest

from rxlm.data.conversations import Conversation
from rxlm.ops.sampling import GREEDY
from rxlm.rxt.models import RxTAlpha
from rxlm.rxt.session import Session

Events = list[tuple[str, dict[str, Any]]]


def say(client: httpx.Client, session: str, query: str, **options: Any) -> Events:
    """Say something; return the events of the answer."""
    events: Events = []
    body = {"query": query, **options}
    with client.stream("POST", f"/sessions/{session}/turns", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        kind = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: {"):
                events.append((kind, json.loads(line.removeprefix("data: "))))
    return events


def begin(client: httpx.Client, **body: Any) -> str:
    """Begin a conversation; return its id."""
    answer = client.post("/sessions", json=body)
    assert answer.status_code == 201
    return str(answer.json()["id"])


def test_a_conversation_with_undo_and_fork(client: httpx.Client, tiny: RxTAlpha) -> None:
    """Catches turns that are taken back in text only, and forks that share a memory."""
    alone = tiny.session(system="Be kind.", settings=GREEDY)
    session = begin(client, system="Be kind.", name="Ann", seed=0)
    events = say(client, session, "Hi")
    assert "".join(data["text"] for kind, data in events if kind == "delta") == alone.ask("Hi")
    kinds = [kind for kind, _ in events]
    assert kinds[0] == "begin" and kinds[-3:] == ["end", "memory", "stats"]
    say(client, session, "A")
    taken = client.post(f"/sessions/{session}/undo", json={}).json()["data"]
    assert [turn["query"] for turn in taken] == ["A"]
    fork = client.post(f"/sessions/{session}/fork", json={"name": "other"}).json()
    assert fork["name"] == "other" and fork["forked_from"]["id"] == session
    alone.ask("B")
    for each in (session, fork["id"]):
        say(client, each, "B")
        turns = client.get(f"/sessions/{each}").json()["turns"]
        assert [(turn["query"], turn["answer"]) for turn in turns] == [
            (turn.query, turn.answer) for turn in alone.turns
        ]
    before = client.post(f"/sessions/{fork['id']}/fork", json={"at_turn": turns[0]["id"]}).json()
    assert before["num_turns"] == 1
    assert client.post(f"/sessions/{session}/undo", json={"num_turns": 9}).status_code == 400


def test_list_rename_and_delete(client: httpx.Client) -> None:
    """Catches a deleted session that can still be read, and pages that overlap."""
    made = [begin(client, name=f"session {number}") for number in range(5)]
    listed: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = client.get("/sessions", params={"limit": 2, **after}).json()
        listed += [item["id"] for item in page["data"]]
        if not page["has_more"]:
            break
        after = {"after": listed[-1]}
    assert len(listed) == len(set(listed)) and set(made) <= set(listed)
    assert listed[:5] == made[::-1], "the last used one comes first"
    assert client.patch(f"/sessions/{made[0]}", json={"name": "new"}).json()["name"] == "new"
    assert client.get(f"/sessions/{made[0]}").json()["name"] == "new"
    assert client.delete(f"/sessions/{made[0]}").json()["deleted"] is True
    for method, rest in (("GET", ""), ("DELETE", ""), ("GET", "/memory"), ("GET", "/export")):
        assert client.request(method, f"/sessions/{made[0]}{rest}").status_code == 404


def test_memory_is_shown(client: httpx.Client, tiny: RxTAlpha) -> None:
    """Catches a view of another turn, or of the wrong shape."""
    session = begin(client)
    view = client.get(f"/sessions/{session}/memory").json()
    assert view["turn"] is None and view["write_size"] == 0
    events = dict(say(client, session, "Hi"))
    view = client.get(f"/sessions/{session}/memory").json()
    num_layers, num_slots, _ = tiny.memory_shape
    assert (view["num_layers"], view["num_slots"]) == (num_layers, num_slots)
    assert [len(layer) for layer in view["changes"]] == [num_slots] * num_layers
    assert view["write_size"] == pytest.approx(events["memory"]["write_size"], rel=1e-4)


def test_export_is_a_session_and_training_data(
    client: httpx.Client, tiny: RxTAlpha, tmp_path: Path
) -> None:
    """Catches a download that cannot be opened again, or whose turns no loader reads."""
    session = begin(client, name="Ann", system="Be kind.")
    say(client, session, "Hi")
    content = client.get(f"/sessions/{session}/export").content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(tmp_path)
    restored = Session.load(tmp_path / session, tiny)
    assert [turn.query for turn in restored.turns] == ["Hi"]
    lines = client.get(f"/sessions/{session}/export", params={"format": "jsonl"}).text
    conversation = Conversation.from_dict(json.loads(lines))
    assert conversation.system == "Be kind." and len(conversation) == 1


def test_a_busy_session_and_stop(run_server: Any, slow_tiny: RxTAlpha) -> None:
    """Catches two answers that write one memory, and a stop that loses what was said."""
    with run_server(slow_tiny, None) as server, server.client() as client:
        session = begin(client)
        events: Events = []
        first = threading.Event()

        def read() -> None:
            body = {"query": "Tell me all", "temperature": 1.0}
            with server.client() as other:
                with other.stream("POST", f"/sessions/{session}/turns", json=body) as answer:
                    kind = ""
                    for line in answer.iter_lines():
                        if line.startswith("event: "):
                            kind = line.removeprefix("event: ")
                        if line.startswith("data: {"):
                            events.append((kind, json.loads(line[6:])))
                        if kind == "delta":
                            first.set()

        thread = threading.Thread(target=read)
        thread.start()
        assert first.wait(60)
        busy = client.post(f"/sessions/{session}/turns", json={"query": "And?"})
        assert (busy.status_code, busy.json()["error"]["code"]) == (409, "busy")
        assert client.post(f"/sessions/{session}/stop").json() == {"stopped": True}
        thread.join(60)
        assert dict(events)["end"]["reason"] == "stopped"
        (turn,) = client.get(f"/sessions/{session}").json()["turns"]
        assert turn["reason"] == "stopped" and turn["answer"] == dict(events)["end"]["answer"]
        assert client.post(f"/sessions/{session}/stop").json() == {"stopped": False}
