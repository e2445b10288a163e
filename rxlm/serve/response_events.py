"""A response and its streaming events, as OpenAI's API has them.

Items of a response: what the model thought ('reasoning', of a model that thinks), what it said
('message'), and the tool that it calls ('function_call').
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from starlette.concurrency import run_in_threadpool

from rxlm.rxt.answer_row import StopReason
from rxlm.rxt.session_events import TextDelta, ThinkDelta, TurnEnd
from rxlm.serve.interface import TurnHandle, TurnInfo
from rxlm.serve.tool_calls import openai_call
from rxlm.serve.turn_stream import KEEP_ALIVE, failure_of, sse, with_pauses

STATUS = {"eos": "completed", "length": "incomplete", "stopped": "incomplete"}
INCOMPLETE = {"length": {"reason": "max_output_tokens"}}


class ResponseWriter:
    """One response, in one piece or as events."""

    def __init__(self, turn: TurnHandle, echo: dict[str, Any]) -> None:
        """Take the turn, and the fields that repeat the request."""
        self._turn = turn
        self._id = turn.turn_id.removeprefix("resp_")
        self._head = {**_head(turn.turn_id, time.time()), **echo}
        self._number = 0

    def whole(self, end: TurnEnd, info: TurnInfo) -> dict[str, Any]:
        """Return the finished response."""
        items = _items(self._id, end.answer, end.think, end.tool_call, STATUS[end.reason])
        return {**self._head, **_state(end.reason), "output": items, "usage": _usage(info)}

    async def stream(self, keep_alive_seconds: float) -> AsyncIterator[bytes]:
        """Yield events; ``response.completed`` when the turn is safely remembered."""
        begun = {**self._head, "status": "in_progress", "output": [], "usage": None}
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        message: _OpenMessage | None = None
        thoughts, index = "", 0
        end: TurnEnd | None = None
        try:
            async for event in with_pauses(self._turn, keep_alive_seconds):
                if event is None:
                    yield KEEP_ALIVE
                elif isinstance(event, ThinkDelta):
                    thoughts += event.text
                elif isinstance(event, TextDelta):
                    if message is None:
                        if thoughts:
                            for piece in self._whole_item(index, _reasoning(self._id, thoughts)):
                                yield piece
                            index += 1
                        message = _OpenMessage(self, f"msg_{self._id}", index)
                        for piece in message.open():
                            yield piece
                    yield message.delta(event.text)
                elif isinstance(event, TurnEnd):
                    end = event
                    for piece in self._rest(end, message):
                        yield piece
            assert end is not None, "a turn ends, or raises"
            whole = self.whole(end, await run_in_threadpool(self._turn.result))
            yield self._event(f"response.{whole['status']}", response=whole)
        except Exception as error:  # the status was sent: the reader is told in an event
            failure = failure_of(error)["error"]
            reason = {"code": "server_error", "message": failure["message"]}
            failed = {**begun, "status": "failed", "error": reason}
            yield self._event("response.failed", response=failed)

    def _rest(self, end: TurnEnd, message: _OpenMessage | None) -> Iterator[bytes]:
        """Yield what follows the last piece of the answer."""
        items = _items(self._id, end.answer, end.think, end.tool_call, STATUS[end.reason])
        for index, item in enumerate(items):
            if item["type"] == "message":
                if message is None:
                    message = _OpenMessage(self, item["id"], index)
                    yield from message.open()
                yield from message.close(item)
            elif item["type"] == "function_call":
                yield from self._call(index, item)
            elif message is None:
                yield from self._whole_item(index, item)

    def _call(self, index: int, item: dict[str, Any]) -> Iterator[bytes]:
        where = {"item_id": item["id"], "output_index": index}
        opened = {**item, "arguments": "", "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=index, item=opened)
        kind = "response.function_call_arguments"
        yield self._event(f"{kind}.delta", **where, delta=item["arguments"])
        yield self._event(f"{kind}.done", **where, name=item["name"], arguments=item["arguments"])
        yield self._event("response.output_item.done", output_index=index, item=item)

    def _whole_item(self, index: int, item: dict[str, Any]) -> Iterator[bytes]:
        for kind in ("added", "done"):
            yield self._event(f"response.output_item.{kind}", output_index=index, item=item)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return sse({"type": kind, "sequence_number": number, **fields}, kind)


class _OpenMessage:
    """The events of the message while it is being written."""

    def __init__(self, writer: ResponseWriter, item_id: str, index: int) -> None:
        self._writer, self._id, self._index = writer, item_id, index
        self._where = {"item_id": item_id, "output_index": index, "content_index": 0}

    def open(self) -> Iterator[bytes]:
        """Yield what comes before the text."""
        item = {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        event = self._writer._event
        yield event("response.output_item.added", output_index=self._index, item=item)
        yield event("response.content_part.added", **self._where, part=_text_part(""))

    def delta(self, text: str) -> bytes:
        """Return the event of a piece of text."""
        kind = "response.output_text.delta"
        return self._writer._event(kind, **self._where, delta=text, logprobs=[])

    def close(self, item: dict[str, Any]) -> Iterator[bytes]:
        """Yield what comes after the text."""
        event, part = self._writer._event, item["content"][0]
        text = part["text"]
        yield event("response.output_text.done", **self._where, text=text, logprobs=[])
        yield event("response.content_part.done", **self._where, part=part)
        yield event("response.output_item.done", output_index=self._index, item=item)


def response_of_turn(turn: TurnInfo, model_name: str) -> dict[str, Any]:
    """Return an earlier turn as a response; how it was asked for is not kept."""
    said = turn.interaction
    reason = turn.reason or "eos"
    turn_id = turn.turn_id.removeprefix("resp_")
    return {
        **_head(turn.turn_id, turn.created),
        **_state(reason),
        "model": model_name,
        "previous_response_id": turn.parent_id,
        "output": _items(turn_id, said.answer, said.think, said.tool_call, STATUS[reason]),
        "usage": _usage(turn),
    }


def _head(response_id: str, created: float) -> dict[str, Any]:
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(created),
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "parallel_tool_calls": False,
        "tool_choice": "auto",
        "tools": [],
        "truncation": "disabled",
        "text": {"format": {"type": "text"}},
        "reasoning": None,
        "background": False,
    }


def _state(reason: StopReason) -> dict[str, Any]:
    return {"status": STATUS[reason], "incomplete_details": INCOMPLETE.get(reason)}


def _items(
    turn_id: str, answer: str, think: str | None, tool_call: str | None, status: str
) -> list[dict[str, Any]]:
    items = []
    if think:
        items.append(_reasoning(turn_id, think))
    if answer or tool_call is None:
        items.append(
            {
                "id": f"msg_{turn_id}",
                "type": "message",
                "role": "assistant",
                "status": status,
                "content": [_text_part(answer)],
            }
        )
    if tool_call is not None:
        call = openai_call(tool_call, turn_id)
        items.append(
            {
                "id": f"fc_{turn_id}",
                "type": "function_call",
                "call_id": call["id"],
                **call["function"],
                "status": "completed",
            }
        )
    return items


def _reasoning(turn_id: str, text: str) -> dict[str, Any]:
    summary = [{"type": "summary_text", "text": text}]
    return {"id": f"rs_{turn_id}", "type": "reasoning", "summary": summary}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(turn: TurnInfo) -> dict[str, Any]:
    return {
        "input_tokens": turn.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": turn.answer_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": turn.prompt_tokens + turn.answer_tokens,
    }
