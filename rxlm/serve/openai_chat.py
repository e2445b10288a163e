"""``POST /v1/chat/completions``: the stateless protocol over a model with a memory.

The messages that were sent before are looked up: if the server has the memory after them, the
answer goes on from there, else the turns are first written into a new memory one by one. The header
``X-RxLM-Session`` names a session instead; then only the last message is read.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from rxlm.rxt.session_events import TextDelta, ThinkDelta, TurnEnd
from rxlm.serve.context import Context
from rxlm.serve.http_errors import ConflictError
from rxlm.serve.interface import TurnHandle, TurnInfo, TurnRequest
from rxlm.serve.messages import Asked, Message, asked_by
from rxlm.serve.request_bodies import (
    NO_TOOLS,
    ONLY_TEXT,
    Body,
    Count,
    Identifier,
    SamplingBody,
    StopStrings,
    check_model,
    detached_seed,
    refuse_what_is_not_offered,
    stop_strings,
)
from rxlm.serve.tool_calls import openai_call
from rxlm.serve.turn_stream import (
    DONE,
    KEEP_ALIVE,
    all_events,
    failure_of,
    sse,
    with_pauses,
)

FINISH = {"eos": "stop", "stopped": "stop", "length": "length"}


class StreamOptions(Body):
    """Of ``stream``."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatBody(SamplingBody):
    """Body of a chat completion."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    stop: StopStrings = None
    store: bool | None = None
    """False: nothing is kept, and a next request with these messages reads them all again."""
    # Refused unless neutral.
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    moderation: dict[str, Any] | None = None
    # Change nothing here.
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None


NOT_OFFERED: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "one answer a request."),
    "logprobs": ((False,), "probabilities are not reported."),
    "top_logprobs": ((0,), "probabilities are not reported."),
    "logit_bias": (({},), "scores of single tokens cannot be changed."),
    "frequency_penalty": ((0,), "use repetition_penalty."),
    "presence_penalty": ((0,), "use repetition_penalty."),
    "response_format": (({"type": "text"},), ONLY_TEXT),
    "tools": (([],), NO_TOOLS),
    "tool_choice": (("none", "auto"), NO_TOOLS),
    "functions": (([],), NO_TOOLS),
    "function_call": (("none", "auto"), NO_TOOLS),
    "modalities": ((["text"],), ONLY_TEXT),
    "audio": ((), ONLY_TEXT),
    "prediction": ((), "answers are not predicted."),
    "web_search_options": ((), "the model has no access to the web."),
    "reasoning_effort": (("none",), "use thinking_mode, with a model that thinks."),
    "verbosity": (("medium",), "ask for it in words."),
    "moderation": ((), "nothing is moderated."),
}


def chat_routes(context: Context) -> APIRouter:
    """Return the route."""
    router = APIRouter(prefix="/v1", tags=["chat completions"])

    @router.post("/chat/completions", response_model=None)
    async def create_chat_completion(
        request: Request,
        body: ChatBody,
        session: Annotated[Identifier | None, Header(alias="X-RxLM-Session")] = None,
    ) -> Response:
        """Answer the last message of a chat."""
        check_model(body.model, context.service.model_name)
        refuse_what_is_not_offered(body, NOT_OFFERED)
        context.check_count("messages", body.messages)
        asked = asked_by(body.messages)
        turn = await run_in_threadpool(_submit, context, body, asked, session)
        answer = _Completion(context, turn, body)
        if body.stream:
            return context.stream(turn, answer.chunks())
        events = await all_events(
            request, turn, context.running, context.settings.answer_timeout_seconds
        )
        (end,) = (event for event in events if isinstance(event, TurnEnd))
        info = await run_in_threadpool(turn.result)
        return JSONResponse(answer.whole(end, info))

    return router


def _submit(context: Context, body: ChatBody, asked: Asked, session: str | None) -> TurnHandle:
    service = context.service
    max_tokens = body.max_completion_tokens or body.max_tokens
    turn = TurnRequest(
        query=asked.query or "",
        settings=body.sampling(context.settings.default_temperature),
        max_tokens=max_tokens,
        stop=stop_strings(body.stop, context.settings.max_stop_strings),
        thinking_mode=body.thinking_mode,
        store=body.store is not False,
        seed=body.seed,
        tool_use=asked.tool_use,
    )
    if session is not None:
        _check_history(context, session, asked)
        return service.submit(session, turn)
    found, num_known = None, 0
    pairs = asked.pairs
    if pairs:
        found, num_known = service.find_prefix(asked.system, pairs)
    seed = detached_seed(turn.seed, turn.settings, begins=found is None)
    turn = dataclasses.replace(turn, seed=seed)
    return service.submit_detached(
        turn, system=asked.system, turns=asked.turns[num_known:], at_turn=found
    )


def _check_history(context: Context, session: str, asked: Asked) -> None:
    """Refuse messages before the last that say something else than the session's memory."""
    info = context.service.session(session)
    if asked.system is not None and asked.system != info.system:
        raise ConflictError("the system message is not that of the session: leave it out.")
    if asked.turns:
        kept = context.service.turns(session)[-len(asked.turns) :]
        said = [(turn.query, turn.answer) for turn in asked.turns]
        if [(turn.query, turn.answer) for turn in kept] != said:
            raise ConflictError(
                "the earlier messages are not the last turns of the session: send only the new "
                "one; the session remembers the others."
            )


class _Completion:
    """The forms of one answer."""

    def __init__(self, context: Context, turn: TurnHandle, body: ChatBody) -> None:
        self._context, self._turn = context, turn
        self._id = turn.turn_id.removeprefix("resp_")
        self._with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{self._id}",
            "created": int(time.time()),
            "model": context.service.model_name,
        }

    def whole(self, end: TurnEnd, info: TurnInfo) -> dict[str, Any]:
        """Return the answer in one piece."""
        message: dict[str, Any] = {"role": "assistant", "content": end.answer, "refusal": None}
        if end.think is not None:
            message["reasoning_content"] = end.think
        if end.tool_call is not None:
            message["tool_calls"] = [openai_call(end.tool_call, self._id)]
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": _finish(end),
            "logprobs": None,
        }
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(info),
        }

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the answer piece by piece; the last when it is safely remembered."""
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            async for event in with_pauses(self._turn, self._context.settings.keep_alive_seconds):
                if event is None:
                    yield KEEP_ALIVE
                elif isinstance(event, TextDelta):
                    yield self._chunk({"content": event.text})
                elif isinstance(event, ThinkDelta):
                    yield self._chunk({"reasoning_content": event.text})
                elif isinstance(event, TurnEnd):
                    if event.tool_call is not None:
                        call = openai_call(event.tool_call, self._id)
                        yield self._chunk({"tool_calls": [{"index": 0, **call}]})
                    yield self._chunk({}, _finish(event))
            if self._with_usage:
                info = await run_in_threadpool(self._turn.result)
                yield sse(
                    {
                        **self._head,
                        "object": "chat.completion.chunk",
                        "choices": [],
                        "usage": usage(info),
                    }
                )
        except Exception as error:  # the status was sent: the reader is told in an event
            yield sse(failure_of(error))
        yield DONE

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return sse(chunk | {"usage": None} if self._with_usage else chunk)


def usage(info: TurnInfo) -> dict[str, int]:
    """Return the tokens of this turn; earlier ones are in memory, and cost nothing again."""
    return {
        "prompt_tokens": info.prompt_tokens,
        "completion_tokens": info.answer_tokens,
        "total_tokens": info.prompt_tokens + info.answer_tokens,
    }


def _finish(end: TurnEnd) -> str:
    return "tool_calls" if end.tool_call is not None else FINISH[end.reason]
