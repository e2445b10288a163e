"""Events from the thread that computes to whoever reads a turn, in a thread or an event loop.

The writer never waits: events are put down, and a reader that sleeps is woken. A reader that left
is not noticed, and not needed. Not here: what the events are.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from rxlm.rxt.session_events import Event


class Channel:
    """Events of one turn, for one reader altogether."""

    def __init__(self) -> None:
        """Begin empty."""
        self._lock = threading.Lock()
        self._events: deque[Event] = deque()
        self._wake: Callable[[], None] | None = None
        self._closed = False
        self._error: Exception | None = None

    def put(self, event: Event) -> None:
        """Add an event."""
        with self._lock:
            self._events.append(event)
            wake, self._wake = self._wake, None
        if wake is not None:
            wake()

    def close(self, error: Exception | None = None) -> None:
        """End: the reader gets what is left, then ``error`` if there is one."""
        with self._lock:
            self._closed, self._error = True, error
            wake, self._wake = self._wake, None
        if wake is not None:
            wake()

    def _take(self, wake: Callable[[], None]) -> list[Event] | None:
        """Return what is there, None at the end; if there is nothing yet, ``wake`` is called once
        there is."""
        with self._lock:
            if self._events:
                taken = list(self._events)
                self._events.clear()
                return taken
            if self._closed:
                if self._error is not None:
                    raise self._error
                return None
            self._wake = wake
            return []

    def events(self) -> Iterator[Event]:
        """Yield the events; blocks between them."""
        ready = threading.Event()
        while (taken := self._take(ready.set)) is not None:
            yield from taken
            if not taken:
                ready.wait()
                ready.clear()

    async def aevents(self) -> AsyncIterator[Event]:
        """Yield the events, without blocking the event loop."""
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            # A loop that was closed meanwhile has no reader any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(ready.set)

        while (taken := self._take(wake)) is not None:
            for event in taken:
                yield event
            if not taken:
                await ready.wait()
                ready.clear()
