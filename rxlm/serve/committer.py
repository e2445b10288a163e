"""Committed turns to disk, on a thread of its own: what has gathered shares one transaction.

Waiting for a disk is not computing, so decoding goes on meanwhile. Readers are told only after
their turn is on disk. Not here: what a turn is (``turn``), the disk (``store``).
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import NamedTuple

from rxlm.errors import RunError, UserError
from rxlm.serve.interface import ServeLimits, TurnInfo
from rxlm.serve.recorder import Recorder
from rxlm.serve.store import SessionStore
from rxlm.serve.store_rows import NewTurn
from rxlm.serve.turn import Turn

logger = logging.getLogger(__name__)

MOST_AT_ONCE = 128
"""Turns of one transaction."""
EXPIRY_SECONDS = 30.0
"""How often what is too old is looked for."""


class Commit(NamedTuple):
    """Turns of one request in order: those that were replayed, then the one that was asked for
    (``turn``; None: it is not to be stored, or not finished)."""

    rows: tuple[NewTurn, ...]
    turn: Turn | None


class Committer:
    """Stores turns and tells their readers."""

    def __init__(self, store: SessionStore, limits: ServeLimits, recorder: Recorder) -> None:
        """Start the thread."""
        self._store, self._limits, self._recorder = store, limits, recorder
        self._queue: queue.SimpleQueue[Commit | None] = queue.SimpleQueue()
        self._expired = 0.0
        self._thread = threading.Thread(target=self._run, name="rxlm-store", daemon=True)
        self._thread.start()

    @property
    def backlog(self) -> int:
        """Commits that wait."""
        return self._queue.qsize()

    def put(self, commit: Commit) -> None:
        """Store ``commit`` after those that were put before."""
        self._queue.put(commit)

    def close(self) -> None:
        """Store what waits, and end."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        is_open = True
        while is_open:
            batch: list[Commit] = []
            try:
                item = self._queue.get(timeout=EXPIRY_SECONDS)
                while item is not None:
                    batch.append(item)
                    if len(batch) == MOST_AT_ONCE:
                        break
                    item = self._queue.get_nowait()
                is_open = item is not None
            except queue.Empty:
                pass
            if batch:
                self._store_all(batch)
            self._expire(any(row.new_session for one in batch for row in one.rows))

    def _store_all(self, batch: list[Commit]) -> None:
        rows = [row for commit in batch for row in commit.rows]
        try:
            results = self._store.commit(rows)
        except (RunError, UserError) as error:
            logger.error("store: %d turns were not kept: %s", len(rows), error)
            results = [error for _ in rows]
        outcome = {row.turn_id: result for row, result in zip(rows, results, strict=True)}
        now = time.perf_counter()
        for commit in batch:
            if commit.turn is None:
                continue
            result = outcome[commit.turn.turn_id]
            with self._recorder.lock:
                if isinstance(result, TurnInfo):
                    self._recorder.commit.add(now - commit.turn.answered)
                else:
                    self._recorder.failed += 1
            if isinstance(result, TurnInfo):
                commit.turn.finish(result)
            else:
                commit.turn.fail(result)

    def _expire(self, has_new: bool) -> None:
        """Delete what is too old, now and then, and detached conversations that are too many."""
        now = time.time()
        if not has_new and now - self._expired < EXPIRY_SECONDS:
            return
        self._expired = now
        seconds = self._limits.session_ttl_seconds
        try:
            count = self._store.expire(
                0.0 if seconds is None else now - seconds, self._limits.max_detached
            )
        except RunError as error:
            logger.error("store: could not delete what is too old: %s", error)
            return
        if count:
            logger.info("store: deleted %d conversations that were not used any more", count)
