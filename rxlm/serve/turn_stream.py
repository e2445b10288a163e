"""A turn as the answer to a request: its events one by one, or all at once; cancelled with it.

Whoever asked may leave at any time. The answer then ends at the next step, and what was said until
then is remembered. Not here: what the events look like (the routes).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from rxlm.rxt.session_events import Event
from rxlm.serve.http_errors import CallerLeftError, error_body, known_error
from rxlm.serve.interface import TurnHandle, TurnTimeoutError

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": still there\n\n"
STREAM_HEADERS = {"X-Accel-Buffering": "no"}
"""Asks proxies not to hold pieces back."""


class RunningTurns:
    """The turns being answered, by id of the turn and of the session, so that they can be stopped.

    For the thread of the event loop only.
    """

    def __init__(self) -> None:
        self._by_id: dict[str, TurnHandle] = {}

    def stop(self, session_id: str) -> bool:
        """End the answer being written in a session; return whether there is one."""
        found = [turn for turn in self._by_id.values() if turn.session_id == session_id]
        for turn in found:
            turn.cancel()
        return bool(found)

    @contextlib.contextmanager
    def holding(self, turn: TurnHandle) -> Iterator[None]:
        """Know ``turn`` inside the block, and cancel it at the end if it goes on then."""
        self._by_id[turn.turn_id] = turn
        try:
            yield
        finally:
            del self._by_id[turn.turn_id]
            turn.cancel()


class EventStream(StreamingResponse):
    """Server-sent events of a turn. A reader who is too slow or gone ends the turn."""

    media_type = "text/event-stream"

    def __init__(
        self,
        content: AsyncIterator[bytes],
        turn: TurnHandle,
        running: RunningTurns,
        timeout_seconds: float,
    ) -> None:
        """Send ``content``, the events of ``turn`` in bytes, within ``timeout_seconds``."""
        super().__init__(content, headers=STREAM_HEADERS)
        self._turn, self._running, self._timeout = turn, running, timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request."""
        with self._running.holding(self._turn):
            try:
                await asyncio.wait_for(super().__call__(scope, receive, send), self._timeout)
            except asyncio.TimeoutError:
                logger.warning("%s: its reader did not take it in time", self._turn.turn_id)
                raise CallerLeftError from None


async def with_pauses(turn: TurnHandle, seconds: float) -> AsyncIterator[Event | None]:
    """Yield the events of a turn, and None whenever there was none for so many ``seconds``."""
    events = turn.aevents().__aiter__()
    coming: asyncio.Task[Event] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(_next(events))
            await asyncio.wait({coming}, timeout=seconds)
            if not coming.done():
                yield None
                continue
            finished, coming = coming, None
            try:
                event = finished.result()
            except StopAsyncIteration:
                return
            yield event
    finally:
        if coming is not None:
            coming.cancel()


async def all_events(
    request: Request, turn: TurnHandle, running: RunningTurns, timeout_seconds: float
) -> list[Event]:
    """Return the events of a turn when it has ended.

    Raises:
        CallerLeftError: if the caller leaves before; the turn is cancelled.
        TurnTimeoutError: if it takes too long.
        RunError, UserError: what went wrong with the turn.
    """

    async def collect() -> list[Event]:
        return [event async for event in turn.aevents()]

    with running.holding(turn):
        collecting = asyncio.ensure_future(collect())
        leaving = asyncio.ensure_future(_until_gone(request.receive))
        try:
            await asyncio.wait(
                {collecting, leaving},
                timeout=timeout_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if collecting.done():
                return collecting.result()
            if leaving.done():
                raise CallerLeftError
            raise TurnTimeoutError(f"the answer took longer than {timeout_seconds:g} seconds.")
        finally:
            collecting.cancel()
            leaving.cancel()


def failure_of(error: Exception) -> dict[str, Any]:
    """Return what a reader of a stream is told about an error; others are logged, under an id."""
    found = known_error(error)
    if found is not None:
        return found[1]
    failure_id = f"req_{uuid.uuid4().hex}"
    logger.error("a turn failed (%s)", failure_id, exc_info=error)
    return error_body(
        500,
        f"the server failed; its log has the reason under {failure_id}.",
        code="internal_error",
    )


def sse(data: Mapping[str, Any], event: str | None = None) -> bytes:
    """Return one server-sent event."""
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


async def _next(events: AsyncIterator[Event]) -> Event:
    return await events.__anext__()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
