"""Turns with thinking, tools and internal context: read from rows, written, and left alone."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from rxlm.data import Conversation
from rxlm.data.conversation_source import conversation_texts
from rxlm.data.interaction_rows import _warn_once
from rxlm.data.sources import parse_conversation, render
from rxlm.errors import UserError


def parsed(*turns: dict[str, Any]) -> Conversation:
    return parse_conversation({"system": "s", "interactions": list(turns)}, "row 1")


CALL = {"query": "q", "internal": "i", "think": "t", "tool_call": {"name": "f"}}


def test_all_parts_are_read_and_come_back() -> None:
    """Would catch a part that is lost on the way, or a published name that is not understood."""
    conversation = parsed(CALL, {"tool_response": "r", "answer": "a", "think": "", "query": None})
    first, second = conversation.interactions
    assert first.parts() == {
        "internal": "i", "query": "q", "think": "t", "answer": "", "tool_call": '{"name": "f"}',
    }  # fmt: skip
    assert second.parts() == {"tool_use": "r", "answer": "a"}
    assert Conversation.from_dict(conversation.to_dict()) == conversation
    texts = ["s", "i", "q", "t", "", '{"name": "f"}', "r", "a"]
    assert list(conversation_texts([conversation])) == texts
    assert render(conversation).split("\n") == texts


def test_plain_turns_are_written_as_before() -> None:
    """Would catch new fields in the files of everybody."""
    row = parsed({"query": "q", "answer": "a"}).to_dict()
    assert row["interactions"] == [{"query": "q", "answer": "a"}]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"query": "q", "tool_use": "r", "answer": "a"}, "begins with one of them"),
        ({"tool_use": "r", "tool_response": "r", "answer": "a"}, "is the same; keep one"),
        ({"query": "q", "answer": "a", "think": 3}, r"interactions\[0\].think': expected text"),
        ({"query": "q", "tool_call": ""}, "answer': expected non-empty text, got nothing"),
        ({"answer": "a"}, "query': expected text"),
    ],
)
def test_what_cannot_be_used_is_named(turn: dict[str, Any], message: str) -> None:
    """Would catch half a turn in the training data."""
    with pytest.raises(UserError, match=message):
        parsed(turn)


def test_near_misses_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """Would catch thinking that is silently not trained on because of a plural."""
    _warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        parsed({"query": "q", "answer": "a", "tool_calls": "c", "task": 3})
    assert [record.getMessage() for record in caplog.records] == [
        "field 'tool_calls' of a turn is left out: did you mean 'tool_call'?"
    ]
