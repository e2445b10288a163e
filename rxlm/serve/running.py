"""Which turns are under way, by session: so that a session has one answer at a time.

Not here: the turns themselves (``turn``), what is done with them (``service``).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from rxlm.serve.turn import Turn

NUM_LOCKS = 256
"""Calls that change sessions wait for each other where two sessions share a lock."""


class RunningTurns:
    """The turns that are not committed yet. Safe for threads."""

    def __init__(self) -> None:
        """Begin empty."""
        self._lock = threading.Lock()
        self._last: dict[str, Turn] = {}
        self._pending: dict[str, Turn] = {}
        self._locks = tuple(threading.RLock() for _ in range(NUM_LOCKS))

    @contextlib.contextmanager
    def alone(self, session_id: str) -> Iterator[None]:
        """Let nobody else change a session for a block."""
        with self._locks[hash(session_id) % NUM_LOCKS]:
            yield

    def last(self, session_id: str) -> Turn | None:
        """Return the turn of a session that was submitted last, unless it is done."""
        with self._lock:
            return self._last.get(session_id)

    def pending(self, turn_id: str) -> Turn | None:
        """Return a turn that is not done."""
        with self._lock:
            return self._pending.get(turn_id)

    def add(self, turn: Turn) -> None:
        """Note a turn."""
        with self._lock:
            self._last[turn.owner_id] = turn
            self._pending[turn.turn_id] = turn

    def done(self, turn: Turn) -> None:
        """Note that a turn is committed, or failed."""
        with self._lock:
            self._pending.pop(turn.turn_id, None)
            if self._last.get(turn.owner_id) is turn:
                del self._last[turn.owner_id]
