"""A model that thinks, over HTTP: its thoughts and its answer apart, as in a session of its own."""

from __future__ import annotations

from typing import Any

import pytest

from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.models import RxTAlpha
from rxlm.rxt.session_events import TextDelta, ThinkDelta

TEXTS = ["Hello, my name is Ann.", "What is my name?", "Your name is Ann, I think."]
TEXT_OF = {"reasoning": "summary", "message": "content"}
MODES = ("fast", "extended", "auto")


def said(response: dict[str, Any]) -> tuple[str, str]:
    """Return what was thought and what was answered."""
    parts = {"reasoning": "", "message": ""}
    for item in response["output"]:
        if item["type"] in parts:
            parts[item["type"]] += "".join(part["text"] for part in item[TEXT_OF[item["type"]]])
    return parts["reasoning"], parts["message"]


@pytest.mark.parametrize("mode", MODES)
def test_thoughts_and_answers_are_those_of_a_session(
    tiny_beta: RxTAlpha, run_server: Any, mode: str
) -> None:
    """Catches thoughts in the answer, a mode that is not handed on, and a second turn that does not
    remember the first as a session does."""
    session = tiny_beta.session(seed=0)
    greedy = SamplingSettings(temperature=0.0)
    expected = []
    for query in TEXTS[:2]:
        events = list(session.interact(query, thinking_mode=mode, settings=greedy))
        thought = "".join(event.text for event in events if isinstance(event, ThinkDelta))
        answer = "".join(event.text for event in events if isinstance(event, TextDelta))
        expected.append((thought, answer))
    found, previous = [], None
    with run_server(tiny_beta, None) as server, server.client() as client:
        for query in TEXTS[:2]:
            body = {
                "model": "tiny", "input": query, "thinking_mode": mode, "temperature": 0,
                "previous_response_id": previous,
            }  # fmt: skip
            reply = client.post("/v1/responses", json=body)
            assert reply.is_success, reply.text
            found.append(said(reply.json()))
            previous = reply.json()["id"]
    assert found == expected
    assert any(thought for thought, _ in found) or mode == "fast"
