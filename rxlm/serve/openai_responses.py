"""``/v1/responses``: the stateful protocol, the natural one for a model with a memory.

A response is a turn, and its id names the conversation as it was after it: ``previous_response_id``
goes on from there, as often as one likes. Not here: what its parts look like on the wire
(``response_events``).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from rxlm.rxt.session_events import TurnEnd
from rxlm.serve.context import Context
from rxlm.serve.http_errors import ParameterError
from rxlm.serve.interface import TurnHandle, TurnRequest
from rxlm.serve.messages import Asked, CalledFunction, Message, ToolCall, asked_by
from rxlm.serve.request_bodies import (
    NO_TOOLS,
    ONLY_TEXT,
    Body,
    Count,
    Identifier,
    SamplingBody,
    TextPart,
    check_model,
    detached_seed,
    refuse_what_is_not_offered,
)
from rxlm.serve.response_events import ResponseWriter, response_of_turn
from rxlm.serve.turn_stream import all_events

ResponseId = Annotated[Identifier, Path()]


class InputItem(Body):
    """One item of ``input``: a message, a tool call of an earlier answer, or a tool's result."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[TextPart] | None = None
    id: str | None = None
    status: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | None = None
    phase: str | None = None

    def message(self) -> Message:
        """Return the item as a message of a chat.

        Raises:
            ParameterError: if a part is missing.
        """
        if self.type == "function_call_output":
            return Message(role="tool", content=self.output or "")
        if self.type == "function_call":
            function = CalledFunction(name=self.name or "", arguments=self.arguments or "{}")
            return Message(role="assistant", tool_calls=[ToolCall(function=function)])
        if self.role is None:
            raise ParameterError("input", "a message of 'input' has no role.")
        return Message(role=self.role, content=self.content)


class ResponseBody(SamplingBody):
    """Body of a response."""

    model: str | None = None
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    """System prompt; a conversation gets it when it begins."""
    previous_response_id: Identifier | None = None
    max_output_tokens: Count | None = None
    stream: bool | None = None
    store: bool | None = None
    """False: the turn is answered and forgotten."""
    metadata: dict[str, str] | None = None
    """Repeated in the answer; not kept."""
    # Refused unless neutral.
    background: bool | None = None
    conversation: Any = None
    include: list[str] | None = None
    max_tool_calls: int | None = None
    prompt: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    tool_choice: Any = None
    tools: list[Any] | None = None
    top_logprobs: int | None = None
    truncation: str | None = None
    context_management: list[Any] | None = None
    moderation: dict[str, Any] | None = None
    # Change nothing here.
    user: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    stream_options: dict[str, Any] | None = None


NOT_OFFERED: dict[str, tuple[tuple[Any, ...], str]] = {
    "background": ((False,), "answers are given on the request's own connection."),
    "conversation": ((), "use previous_response_id, or a session."),
    "include": (([],), "there is nothing more to include."),
    "max_tool_calls": ((), NO_TOOLS),
    "prompt": ((), "there are no stored prompts."),
    "reasoning": (({}, {"effort": "none"}), "use thinking_mode, with a model that thinks."),
    "text": (({}, {"format": {"type": "text"}}), ONLY_TEXT),
    "tool_choice": (("none", "auto"), NO_TOOLS),
    "tools": (([],), NO_TOOLS),
    "top_logprobs": ((0,), "probabilities are not reported."),
    "truncation": (("disabled", "auto"), "memory has a fixed size; nothing is cut."),
    "context_management": (([],), "memory has a fixed size; nothing is cut."),
    "moderation": ((), "nothing is moderated."),
}


def response_routes(context: Context) -> APIRouter:
    """Return the routes."""
    router = APIRouter(prefix="/v1", tags=["responses"])
    service = context.service

    @router.post("/responses", response_model=None)
    async def create_response(request: Request, body: ResponseBody) -> Response:
        """Answer, in a new conversation or after an earlier response."""
        check_model(body.model, service.model_name)
        refuse_what_is_not_offered(body, NOT_OFFERED)
        asked = _asked(context, body)
        turn = await run_in_threadpool(_submit, context, body, asked)
        writer = ResponseWriter(turn, _echo(context, body))
        if body.stream:
            return context.stream(turn, writer.stream(context.settings.keep_alive_seconds))
        timeout = context.settings.answer_timeout_seconds
        events = await all_events(request, turn, context.running, timeout)
        (end,) = (event for event in events if isinstance(event, TurnEnd))
        return JSONResponse(writer.whole(end, await run_in_threadpool(turn.result)))

    @router.get("/responses/{response_id}", response_model=None)
    def get_response(response_id: ResponseId) -> JSONResponse:
        """Return an earlier response."""
        return JSONResponse(response_of_turn(service.turn(response_id), service.model_name))

    @router.get("/responses/{response_id}/input_items", response_model=None)
    def get_input_items(response_id: ResponseId) -> JSONResponse:
        """Return what was asked."""
        said = service.turn(response_id).interaction
        item = {
            "id": f"msg_in_{response_id}",
            "type": "message",
            "role": "user",
            "status": "completed",
            "content": [{"type": "input_text", "text": said.query}],
        }
        if said.tool_use is not None:
            item = {
                "id": f"fco_{response_id}",
                "type": "function_call_output",
                "call_id": "",
                "output": said.tool_use,
                "status": "completed",
            }
        page = {"object": "list", "data": [item], "has_more": False}
        return JSONResponse(page | {"first_id": item["id"], "last_id": item["id"]})

    @router.delete("/responses/{response_id}", response_model=None)
    def delete_response(response_id: ResponseId) -> JSONResponse:
        """Forget a response."""
        service.delete_turn(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    return router


def _asked(context: Context, body: ResponseBody) -> Asked:
    if isinstance(body.input, str):
        return Asked(body.instructions, [], body.input, None)
    context.check_count("input", body.input)
    asked = asked_by([item.message() for item in body.input], "input")
    if body.instructions is None:
        return asked
    if asked.system is not None:
        raise ParameterError(
            "instructions", "there are instructions and a system message in 'input': send one."
        )
    return asked._replace(system=body.instructions)


def _submit(context: Context, body: ResponseBody, asked: Asked) -> TurnHandle:
    settings = body.sampling(context.settings.default_temperature)
    begins = body.previous_response_id is None
    turn = TurnRequest(
        query=asked.query or "",
        settings=settings,
        max_tokens=body.max_output_tokens,
        thinking_mode=body.thinking_mode,
        store=body.store is not False,
        seed=detached_seed(body.seed, settings, begins),
        tool_use=asked.tool_use,
    )
    return context.service.submit_detached(
        turn, system=asked.system, turns=asked.turns, at_turn=body.previous_response_id
    )


def _echo(context: Context, body: ResponseBody) -> dict[str, Any]:
    """Return the parts of a response that repeat the request."""
    sampling = body.sampling(context.settings.default_temperature)
    return {
        "model": context.service.model_name,
        "instructions": body.instructions,
        "previous_response_id": body.previous_response_id,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "store": body.store is not False,
        "temperature": sampling.temperature,
        "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
        "user": body.user,
    }
