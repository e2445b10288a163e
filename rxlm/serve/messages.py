"""Messages of a stateless request as a conversation: system prompt, finished turns, what is asked.

OpenAI's messages are a flat list. A reactive model is given turns, each a query and an answer: that
is what is made of them here, or the list is refused. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pydantic import Field

from rxlm.data.conversations import Interaction
from rxlm.serve.http_errors import ParameterError
from rxlm.serve.request_bodies import Body, TextPart, text_of

BETWEEN = "\n\n"
"""Between the texts of messages of one speaker that follow one another."""


class CalledFunction(Body):
    """Name and arguments of a tool call; the arguments are JSON."""

    name: str
    arguments: str


class ToolCall(Body):
    """A tool call of an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Body):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    """Not shown to the model."""
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    """Of answers that are sent back; not read."""
    reasoning_content: str | None = None
    """What the model thought before an answer that is sent back."""
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = Field(default=None)
    """As ``refusal``."""


class Asked(NamedTuple):
    """A conversation that waits for an answer. ``query`` is None if a tool's result was given
    instead, then ``tool_use`` is that result."""

    system: str | None
    turns: list[Interaction]
    query: str | None
    tool_use: str | None

    @property
    def pairs(self) -> list[tuple[str, str]] | None:
        """The turns as (query, answer); None if they are more than that (thinking, tools)."""
        if any(turn.parts().keys() - {"query", "answer"} for turn in self.turns):
            return None
        return [(turn.query, turn.answer) for turn in self.turns]


def asked_by(messages: Sequence[Message], param: str = "messages") -> Asked:
    """Return the conversation that ``messages`` are.

    Raises:
        ParameterError: if they are none: nothing is asked, an answer comes without a question, or
            a system message later than at the beginning.
    """
    groups = _by_speaker(messages)
    system = None
    if groups and groups[0][0] == "system":
        system = BETWEEN.join(text_of(message.content) for message in groups.pop(0)[1])
    if any(speaker == "system" for speaker, _ in groups):
        raise ParameterError(
            param,
            "a system message follows other messages: instructions are written into memory when a "
            "conversation begins; put them first.",
        )
    turns: list[Interaction] = []
    for index in range(0, len(groups) - 1, 2):
        turns.append(_turn(groups[index], groups[index + 1], param))
    if len(groups) % 2 == 0:
        raise ParameterError(param, "the last message must be the user's (or a tool's result).")
    opener = _opener(groups[-1], param)
    return Asked(system, turns, opener.get("query"), opener.get("tool_use"))


_SPEAKERS = {"system": "system", "developer": "system", "assistant": "assistant"}


def _by_speaker(messages: Sequence[Message]) -> list[tuple[str, list[Message]]]:
    groups: list[tuple[str, list[Message]]] = []
    for message in messages:
        speaker = _SPEAKERS.get(message.role, "user")
        if not groups or groups[-1][0] != speaker:
            groups.append((speaker, []))
        groups[-1][1].append(message)
    return groups


def _turn(
    asked: tuple[str, list[Message]], answered: tuple[str, list[Message]], param: str
) -> Interaction:
    opener = _opener(asked, param)
    messages = answered[1]
    calls = [call for message in messages for call in message.tool_calls or ()]
    thoughts = [item.reasoning_content for item in messages if item.reasoning_content]
    return Interaction(
        query=opener.get("query", ""),
        answer=BETWEEN.join(filter(None, (text_of(item.content) for item in messages))),
        think=BETWEEN.join(thoughts) or None,
        tool_call=_call_text(calls, param),
        tool_use=opener.get("tool_use"),
    )


def _opener(group: tuple[str, list[Message]], param: str) -> dict[str, str]:
    speaker, messages = group
    if speaker == "assistant":
        raise ParameterError(param, "an answer comes first: a conversation begins with a user.")
    kinds = {message.role for message in messages}
    if len(kinds) > 1:
        raise ParameterError(
            param, "a tool's result and a user's message stand for the same turn: send one of them."
        )
    text = BETWEEN.join(text_of(message.content) for message in messages)
    return {"tool_use" if kinds == {"tool"} else "query": text}


def _call_text(calls: Sequence[ToolCall], param: str) -> str | None:
    if not calls:
        return None
    if len(calls) > 1:
        raise ParameterError(param, "an answer has several tool_calls: these models make one.")
    function = calls[0].function
    try:
        arguments = json.loads(function.arguments)
    except (ValueError, RecursionError):
        raise ParameterError(param, "the arguments of a tool call are not JSON.") from None
    return json.dumps({"name": function.name, "arguments": arguments}, ensure_ascii=False)
