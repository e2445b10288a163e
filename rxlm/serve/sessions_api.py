"""``/sessions``: conversations with a name, which the chat page and other programs work with.

Create, list, look at, rename, go on, stop, undo, fork, delete, export. Not here: OpenAI's
protocols.
"""

from __future__ import annotations

import dataclasses
import io
import tempfile
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi import Path as PathParameter
from fastapi.responses import JSONResponse, Response
from pydantic import Field, StringConstraints
from starlette.concurrency import run_in_threadpool

from rxlm.rxt.session_events import (
    MemoryUpdated,
    Stats,
    TextDelta,
    ThinkDelta,
    ToolCallDelta,
    TurnEnd,
)
from rxlm.serve.context import Context
from rxlm.serve.interface import MemoryView, SessionInfo, TurnHandle, TurnInfo, TurnRequest
from rxlm.serve.request_bodies import (
    MAX_INTEGER,
    Body,
    Count,
    Identifier,
    SamplingBody,
    StopStrings,
    stop_strings,
)
from rxlm.serve.turn_stream import DONE, KEEP_ALIVE, failure_of, sse, with_pauses

TURNS_FILE = "turns.jsonl"
Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
SessionId = Annotated[Identifier, PathParameter()]


class CreateBody(Body):
    """Body of a new session."""

    name: Name | None = None
    system: str | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_INTEGER)] | None = None
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
        Field(max_length=16),
    ] = {}


class RenameBody(Body):
    """Body of a change of a session."""

    name: Name


class ForkBody(Body):
    """Body of a fork."""

    at_turn: Identifier | None = None
    """The turn after which the fork goes on; None: the last."""
    name: Name | None = None


class UndoBody(Body):
    """Body of an undo."""

    num_turns: Count = 1


class TurnBody(SamplingBody):
    """Body of a turn."""

    query: str
    max_tokens: Count | None = None
    stop: StopStrings = None
    internal: str | None = None


def session_routes(context: Context) -> APIRouter:
    """Return the routes."""
    router = APIRouter(prefix="/sessions", tags=["sessions"])
    _add_kept(router, context)
    _add_changes(router, context)
    _add_turns(router, context)
    return router


def _add_kept(router: APIRouter, context: Context) -> None:
    service = context.service

    @router.post("", status_code=201, response_model=None)
    def create_session(body: CreateBody) -> JSONResponse:
        """Begin a conversation."""
        info = service.create(
            system=body.system, name=body.name, metadata=dict(body.metadata), seed=body.seed
        )
        return JSONResponse(session_json(info), 201)

    @router.get("", response_model=None)
    def list_sessions(
        limit: Annotated[int, Query(ge=1, le=200)] = 50, after: Identifier | None = None
    ) -> JSONResponse:
        """List conversations, the last used one first."""
        found = service.sessions(limit=limit + 1, after=after)
        data = [session_json(info) for info in found[:limit]]
        return JSONResponse({"object": "list", "data": data, "has_more": len(found) > limit})

    @router.get("/{session_id}", response_model=None)
    def get_session(session_id: SessionId) -> JSONResponse:
        """Return a conversation with what was said."""
        turns = [turn_json(turn) for turn in service.turns(session_id)]
        return JSONResponse({**session_json(service.session(session_id)), "turns": turns})

    @router.get("/{session_id}/memory", response_model=None)
    def get_memory(session_id: SessionId) -> JSONResponse:
        """Return what the last turn changed in memory."""
        return JSONResponse(memory_json(service.memory(session_id)))

    @router.get("/{session_id}/export", response_model=None)
    def export_session(session_id: SessionId, format: Literal["zip", "jsonl"] = "zip") -> Response:
        """Return a session's folder as a zip file, or what was said as training data."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / session_id
            service.export(session_id, folder)
            if format == "jsonl":
                content, kind = (folder / TURNS_FILE).read_bytes(), "application/jsonl"
            else:
                content, kind = _zipped(folder), "application/zip"
        name = f"{session_id}.{format}"
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return Response(content, media_type=kind, headers=headers)

    @router.delete("/{session_id}", response_model=None)
    def delete_session(session_id: SessionId) -> JSONResponse:
        """Forget a conversation for good."""
        service.delete(session_id)
        return JSONResponse({"id": session_id, "object": "session", "deleted": True})


def _add_changes(router: APIRouter, context: Context) -> None:
    service = context.service

    @router.patch("/{session_id}", response_model=None)
    def rename_session(session_id: SessionId, body: RenameBody) -> JSONResponse:
        """Give a conversation another name."""
        return JSONResponse(session_json(service.rename(session_id, body.name)))

    @router.post("/{session_id}/fork", status_code=201, response_model=None)
    def fork_session(session_id: SessionId, body: ForkBody) -> JSONResponse:
        """Begin another conversation that goes on from this one."""
        info = service.fork(session_id, at_turn=body.at_turn, name=body.name)
        return JSONResponse(session_json(info), 201)

    @router.post("/{session_id}/undo", response_model=None)
    def undo_turns(session_id: SessionId, body: UndoBody) -> JSONResponse:
        """Take back the last turns."""
        taken = [turn_json(turn) for turn in service.undo(session_id, body.num_turns)]
        return JSONResponse({"object": "list", "data": taken})


def _add_turns(router: APIRouter, context: Context) -> None:
    @router.post("/{session_id}/turns", response_model=None)
    async def say(session_id: SessionId, body: TurnBody) -> Response:
        """Say something; the answer comes as events (delta, think, end, memory, stats)."""
        turn = await run_in_threadpool(_submit, context, session_id, body)
        return context.stream(turn, _events(context, turn))

    @router.post("/{session_id}/stop", response_model=None)
    async def stop_answer(session_id: SessionId) -> JSONResponse:
        """End the answer that is being written."""
        await run_in_threadpool(context.service.session, session_id)
        return JSONResponse({"stopped": context.running.stop(session_id)})


def _submit(context: Context, session_id: str, body: TurnBody) -> TurnHandle:
    turn = TurnRequest(
        query=body.query,
        settings=body.sampling(context.settings.default_temperature),
        max_tokens=body.max_tokens,
        stop=stop_strings(body.stop, context.settings.max_stop_strings),
        internal=body.internal,
        thinking_mode=body.thinking_mode,
        seed=body.seed,
    )
    return context.service.submit(session_id, turn)


async def _events(context: Context, turn: TurnHandle) -> AsyncIterator[bytes]:
    yield sse({"turn_id": turn.turn_id}, "begin")
    try:
        async for event in with_pauses(turn, context.settings.keep_alive_seconds):
            if event is None:
                yield KEEP_ALIVE
            elif isinstance(event, TextDelta):
                yield sse({"text": event.text}, "delta")
            elif isinstance(event, ThinkDelta):
                yield sse({"text": event.text}, "think")
            elif isinstance(event, ToolCallDelta):
                yield sse({"text": event.text}, "tool_call")
            elif isinstance(event, TurnEnd):
                yield sse(dataclasses.asdict(event), "end")
            elif isinstance(event, MemoryUpdated):
                yield sse({"write_size": event.write_size}, "memory")
            elif isinstance(event, Stats):
                yield sse(dataclasses.asdict(event), "stats")
    except Exception as error:  # the status was sent: the reader is told in an event
        yield sse(failure_of(error), "error")
    yield DONE


def session_json(info: SessionInfo) -> dict[str, Any]:
    """Return a session as JSON."""
    values = dataclasses.asdict(info)
    values["id"] = values.pop("session_id")
    forked = values.pop("forked_from")
    values["forked_from"] = None if forked is None else {"id": forked[0], "turn": forked[1]}
    return {"object": "session", **values}


def turn_json(turn: TurnInfo) -> dict[str, Any]:
    """Return a turn as JSON."""
    said = turn.interaction.parts()
    return {
        "object": "turn",
        "id": turn.turn_id,
        "parent": turn.parent_id,
        "query": turn.query,
        "answer": turn.answer,
        **{name: said[name] for name in ("think", "tool_call", "tool_use") if name in said},
        "reason": turn.reason,
        "created": turn.created,
        "prompt_tokens": turn.prompt_tokens,
        "answer_tokens": turn.answer_tokens,
        "seconds": turn.seconds,
        "memory_seconds": turn.memory_seconds,
        "write_size": turn.write_size,
        "has_state": turn.has_state,
    }


def memory_json(view: MemoryView) -> dict[str, Any]:
    """Return a view of memory as JSON, with four digits a number."""
    return {
        "object": "memory",
        "turn": view.turn_id,
        "num_layers": view.num_layers,
        "num_slots": view.num_slots,
        "norms": [[round(value, 4) for value in layer] for layer in view.norms],
        "changes": [[round(value, 4) for value in layer] for layer in view.changes],
        "write_size": view.write_size,
    }


def _zipped(folder: Path) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, f"{folder.name}/{path.name}")
    return target.getvalue()
