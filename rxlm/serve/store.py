"""Sessions on disk: an index of what was said, and one state file for each version.

    FOLDER/index.sqlite   sessions and turns (``index``)
    FOLDER/states/        what conversations go on from (``state_files``)
    FOLDER/lock           held by the process that has the store open

A turn is committed in this order: its state file is written and fsynced, then its row is committed;
a kill before the row leaves a file that nobody names, which the next opening deletes. States that
no session can go back to are dropped in the other order: the row first, then the file. So whatever
the index names is there, short of a damaged disk; then that version alone is refused.

Shapes: none; states are values (:class:`rxlm.rxt.conversation.ConversationState`).
"""

from __future__ import annotations

import itertools
import json
import logging
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rxlm.data.conversations import Interaction
from rxlm.errors import RunError, UserError
from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.fingerprint import ModelFingerprint
from rxlm.serve.chain import next_hash, prefix_hashes, root_hash
from rxlm.serve.index import Index
from rxlm.serve.interface import NotFoundError, SessionInfo, TurnInfo
from rxlm.serve.state_files import StateFiles, StateRow, StateShape
from rxlm.serve.store_queries import (
    SELECT_SESSION,
    SELECT_TURN,
    delete_session,
    drop_unneeded_states,
    path_ids,
    path_rows,
)
from rxlm.serve.store_rows import NewSession, NewTurn, session_info, turn_info

logger = logging.getLogger(__name__)

MOST_VARIABLES = 500
"""Values in one query."""


class StoreCounts(NamedTuple):
    """How much there is; ``detached`` conversations are not among the sessions."""

    sessions: int
    detached: int
    state_files: int
    state_bytes: int


class Origin(NamedTuple):
    """Where a conversation goes on: the session that said a turn, its system prompt and seed,
    whether it is detached, and whether the turn is its head."""

    session_id: str
    system: str | None
    seed: int
    is_detached: bool
    is_head: bool


class StateCache:
    """The states that were used last, by the ids of their turns. Safe for threads."""

    def __init__(self, most: int) -> None:
        """Keep ``most`` of them."""
        self._most, self._lock = most, threading.Lock()
        self._states: OrderedDict[str, ConversationState] = OrderedDict()

    def get(self, turn_id: str) -> ConversationState | None:
        """Return a state that is here."""
        with self._lock:
            state = self._states.get(turn_id)
            if state is not None:
                self._states.move_to_end(turn_id)
            return state

    def put(self, turn_id: str, state: ConversationState) -> None:
        """Keep a state."""
        with self._lock:
            self._states[turn_id] = state
            self._states.move_to_end(turn_id)
            while len(self._states) > self._most:
                self._states.popitem(last=False)

    def drop(self, turn_ids: Sequence[str]) -> None:
        """Forget states."""
        with self._lock:
            for turn_id in turn_ids:
                self._states.pop(turn_id, None)


class SessionStore:
    """The sessions of one model in a folder. Safe for threads; for one process at a time."""

    def __init__(
        self,
        folder: Path,
        fingerprint: ModelFingerprint,
        shape: StateShape,
        *,
        keep_versions: int = 8,
        cached_states: int = 256,
    ) -> None:
        """Open the store, or make it; deletes what a kill left half done.

        Raises:
            UserError: if another process has it open, or it belongs to another model (the message
                says what differs).
            RunError: if it cannot be read.
        """
        self.folder, self._keep = folder, keep_versions
        self._index = Index(folder, fingerprint)
        self._files = StateFiles(folder / "states", shape)
        self._cache = StateCache(cached_states)
        with self._index.read() as db:
            known = {row[0] for row in db.execute("SELECT id FROM turns WHERE sha256 IS NOT NULL")}
        swept = self._files.sweep(known)
        if swept:
            logger.info("store: deleted %d state files that no turn names", swept)

    def close(self) -> None:
        """Close the store."""
        self._index.close()

    # --- sessions ---------------------------------------------------------------------------------

    def add_session(self, session: NewSession) -> SessionInfo:
        """Store a new session.

        Raises:
            UserError: if there is one with this id.
        """
        with self._index.write() as db:
            there = db.execute("SELECT 1 FROM sessions WHERE id = ?", (session.session_id,))
            if there.fetchone():
                raise UserError(f"there is a session {session.session_id!r}: choose another id.")
            _insert(db, "sessions", session.row())
        return self.session(session.session_id)

    def session(self, session_id: str) -> SessionInfo:
        """Return a session.

        Raises:
            NotFoundError: if there is none; detached ones cannot be asked for.
        """
        with self._index.read() as db:
            row = db.execute(
                f"{SELECT_SESSION} WHERE sessions.id = ? AND NOT sessions.detached", (session_id,)
            ).fetchone()
        if row is None:
            raise NotFoundError(f"there is no session {session_id!r}.")
        return session_info(row)

    def sessions(self, limit: int, after: str | None = None) -> list[SessionInfo]:
        """Return sessions, those used last first, of those after session ``after`` if given."""
        place = (1e300, "")
        if after is not None:
            info = self.session(after)
            place = (info.used, info.session_id)
        with self._index.read() as db:
            rows = db.execute(
                f"{SELECT_SESSION} WHERE NOT sessions.detached AND (sessions.used, sessions.id) < "
                "(?, ?) ORDER BY sessions.used DESC, sessions.id DESC LIMIT ?",
                (*place, limit),
            ).fetchall()
        return [session_info(row) for row in rows]

    def rename(self, session_id: str, name: str) -> SessionInfo:
        """Give a session another name."""
        self.session(session_id)
        with self._index.write() as db:
            db.execute("UPDATE sessions SET name = ? WHERE id = ?", (name, session_id))
        return self.session(session_id)

    def undo(self, session_id: str, num_turns: int) -> list[TurnInfo]:
        """Move the head of a session back; return the turns that are taken back, oldest first.

        Raises:
            UserError: if so many cannot be taken back; nothing changes then.
        """
        head = self.session(session_id).head
        with self._index.write() as db:
            path = path_rows(db, head)
            target = path[-num_turns - 1] if len(path) > num_turns else None
            if not 1 <= num_turns <= len(path) or (target and target["sha256"] is None):
                kept = list(
                    itertools.takewhile(lambda row: row["sha256"] is not None, reversed(path))
                )
                possible = len(path) if len(kept) == len(path) else max(0, len(kept) - 1)
                raise UserError(
                    f"cannot take back {num_turns} of {len(path)} turns: {possible} can be "
                    f"(keep_versions={self._keep})."
                )
            db.execute(
                "UPDATE sessions SET head = ?, depth = ?, used = ? WHERE id = ?",
                (
                    None if target is None else target["id"],
                    len(path) - num_turns,
                    time.time(),
                    session_id,
                ),
            )
            undone = path[-num_turns:]
            dropped = drop_unneeded_states(db, [row["id"] for row in undone], self._keep)
        self._forget(dropped)
        return [turn_info(row) for row in undone]

    def delete(self, session_id: str) -> None:
        """Delete a session: rows are overwritten, files removed. Turns that a fork goes on from
        belong to the fork then.

        Raises:
            NotFoundError: if there is none.
        """
        self.session(session_id)
        self._delete([session_id])

    def expire(self, used_before: float, max_detached: int) -> int:
        """Delete what was not used since ``used_before`` (seconds since 1970), and the detached
        conversations beyond ``max_detached`` that were used least recently; return how many."""
        with self._index.read() as db:
            old = db.execute("SELECT id FROM sessions WHERE used < ?", (used_before,)).fetchall()
            excess = db.execute(
                "SELECT id FROM sessions WHERE detached ORDER BY used DESC, id DESC "
                "LIMIT -1 OFFSET ?",
                (max_detached,),
            ).fetchall()
        gone = list(dict.fromkeys(row[0] for row in (*old, *excess)))
        self._delete(gone)
        return len(gone)

    def _delete(self, session_ids: Sequence[str]) -> None:
        if not session_ids:
            return
        gone: list[str] = []
        with self._index.write() as db:
            for session_id in session_ids:
                gone += delete_session(db, session_id)
        self._forget(gone)
        self._index.forget_deleted()

    # --- turns ------------------------------------------------------------------------------------

    def turn(self, turn_id: str) -> TurnInfo:
        """Return a turn.

        Raises:
            NotFoundError: if there is none.
        """
        with self._index.read() as db:
            row = db.execute(
                f"{SELECT_TURN} WHERE turns.id = ? AND NOT forgotten", (turn_id,)
            ).fetchone()
        if row is None:
            raise NotFoundError(f"there is no turn {turn_id!r}.")
        return turn_info(row)

    def forget(self, turn_id: str) -> None:
        """Delete what a turn of no session said, and its state. If others go on from it, its empty
        place stays until they are gone.

        Raises:
            NotFoundError: if there is no such turn.
            UserError: if it belongs to a session.
        """
        origin = self.origin(turn_id)
        with self._index.write() as db:
            row = db.execute(f"{SELECT_TURN} WHERE turns.id = ?", (turn_id,)).fetchone()
            if row is None or not row["detached"]:
                raise UserError(
                    f"turn {turn_id} belongs to a session: undo it, or delete the session."
                )
            db.execute(
                "UPDATE turns SET forgotten = 1, interaction = ?, sha256 = NULL, bytes = NULL "
                "WHERE id = ?",
                (json.dumps(Interaction("", "").to_dict()), turn_id),
            )
            if origin.is_head and row["parent"] is not None:
                db.execute(
                    "UPDATE sessions SET head = ?, depth = depth - 1 WHERE id = ?",
                    (row["parent"], origin.session_id),
                )
            elif origin.is_head:
                delete_session(db, origin.session_id)
        self._forget([turn_id])
        self._index.forget_deleted()

    def settings(self, turn_id: str) -> SamplingSettings:
        """Return how the answer of a turn was chosen."""
        with self._index.read() as db:
            row = db.execute("SELECT settings FROM turns WHERE id = ?", (turn_id,)).fetchone()
        if row is None:
            raise NotFoundError(f"there is no turn {turn_id!r}.")
        return SamplingSettings.model_validate_json(row[0])

    def turns(self, turn_id: str | None) -> list[TurnInfo]:
        """Return a turn and all before it, the first first."""
        with self._index.read() as db:
            return [turn_info(row) for row in path_rows(db, turn_id)]

    def holds(self, session_id: str, turn_id: str) -> bool:
        """Return whether a turn is on the way to the head of a session, or was said in it."""
        head = self.session(session_id).head
        with self._index.read() as db:
            return turn_id in path_ids(db, head) or bool(
                db.execute(
                    "SELECT 1 FROM turns WHERE id = ? AND session = ?", (turn_id, session_id)
                ).fetchone()
            )

    def origin(self, turn_id: str) -> Origin:
        """Return what a conversation that goes on from a turn has to know.

        Raises:
            NotFoundError: if there is no such turn.
        """
        with self._index.read() as db:
            row = db.execute(
                "SELECT turns.id AS turn, sessions.* FROM turns "
                "JOIN sessions ON sessions.id = turns.session "
                "WHERE turns.id = ? AND NOT forgotten",
                (turn_id,),
            ).fetchone()
        if row is None:
            raise NotFoundError(f"there is no turn {turn_id!r}.")
        return Origin(
            row["id"],
            row["system"],
            row["seed"],
            bool(row["detached"]),
            row["head"] == turn_id,
        )

    def find(self, system: str | None, turns: Sequence[tuple[str, str]]) -> tuple[str | None, int]:
        """Return the version that holds the most of ``turns`` (queries and answers), and how many.

        Of several the newest; (None, 0) if there is none.
        """
        hashes = prefix_hashes(system, turns)
        for end in range(len(hashes), 0, -MOST_VARIABLES):
            part = hashes[max(0, end - MOST_VARIABLES) : end]
            marks = ", ".join("?" for _ in part)
            with self._index.read() as db:
                row = db.execute(
                    f"SELECT id, depth FROM turns WHERE chain IN ({marks}) AND sha256 IS NOT NULL "
                    "ORDER BY depth DESC, created DESC LIMIT 1",
                    part,
                ).fetchone()
            if row is not None:
                return row["id"], row["depth"]
        return None, 0

    def state(self, turn_id: str) -> ConversationState:
        """Return what a conversation goes on from after a turn.

        Raises:
            NotFoundError: if there is no such turn, or its state is no longer kept.
            StateDamagedError: if its file is missing or damaged.
        """
        found = self._cache.get(turn_id)
        if found is not None:
            return found
        with self._index.read() as db:
            row = db.execute(
                "SELECT sha256, bytes, seed, draws, num_turns FROM turns WHERE id = ?", (turn_id,)
            ).fetchone()
        if row is None:
            raise NotFoundError(f"there is no turn {turn_id!r}.")
        if row["sha256"] is None:
            raise NotFoundError(
                f"the memory after turn {turn_id} is no longer kept (keep_versions={self._keep}): "
                "go on from a later turn."
            )
        state = self._files.read(turn_id, StateRow(*row))
        self._cache.put(turn_id, state)
        return state

    def commit(self, turns: Sequence[NewTurn]) -> list[TurnInfo | RunError | UserError]:
        """Store turns, in order; each becomes the head of its session.

        After the return nothing short of a lost disk loses them. All share one transaction.

        Returns:
            for each what was stored, or why it was not (its session was deleted, the turn before
            it was not stored).

        Raises:
            RunError: if the disk refuses; nothing was stored.
        """
        states = {turn.turn_id: turn.state for turn in turns if turn.state is not None}
        files = self._files.write(states)
        refused: dict[str, RunError | UserError] = {}
        dropped: list[str] = []
        try:
            with self._index.write() as db:
                for turn in turns:
                    error = _store_turn(db, turn, files.get(turn.turn_id))
                    if error is not None:
                        refused[turn.turn_id] = error
                heads = {turn.session_id: turn.turn_id for turn in turns}
                for turn_id in heads.values():
                    oldest = path_ids(db, turn_id, self._keep + 1)[self._keep + 1 :]
                    dropped += drop_unneeded_states(db, oldest, self._keep)
        except RunError:
            self._files.delete(files)
            raise
        for turn_id, state in states.items():
            self._cache.put(turn_id, state)
        self._forget([*dropped, *refused])
        return [refused.get(turn.turn_id) or self._stored(turn.turn_id) for turn in turns]

    def _stored(self, turn_id: str) -> TurnInfo | NotFoundError:
        """Return a turn that was just stored, or that it was deleted since."""
        try:
            return self.turn(turn_id)
        except NotFoundError as error:
            return error

    def counts(self) -> StoreCounts:
        """Count sessions and state files."""
        with self._index.read() as db:
            found = dict(
                tuple(row)
                for row in db.execute("SELECT detached, COUNT(*) FROM sessions GROUP BY detached")
            )
            files = db.execute(
                "SELECT COUNT(*), COALESCE(SUM(bytes), 0) FROM turns WHERE sha256 IS NOT NULL"
            ).fetchone()
        return StoreCounts(found.get(0, 0), found.get(1, 0), *files)

    def num_sessions(self) -> int:
        """Count the sessions that are not detached."""
        with self._index.read() as db:
            (count,) = db.execute("SELECT COUNT(*) FROM sessions WHERE NOT detached").fetchone()
        return int(count)

    def _forget(self, turn_ids: Sequence[str]) -> None:
        self._cache.drop(turn_ids)
        self._files.delete(turn_ids)


def _store_turn(
    db: sqlite3.Connection, turn: NewTurn, state: StateRow | None
) -> RunError | UserError | None:
    """Insert a turn and move the head of its session to it; return why not, if not."""
    if turn.new_session is not None:
        _insert(db, "sessions", turn.new_session.row())
    session = db.execute("SELECT system FROM sessions WHERE id = ?", (turn.session_id,)).fetchone()
    if session is None:
        return NotFoundError("the session was deleted while its turn was answered.")
    depth, chain = 0, root_hash(session["system"])
    if turn.parent_id is not None:
        parent = db.execute(
            "SELECT depth, chain FROM turns WHERE id = ?", (turn.parent_id,)
        ).fetchone()
        if parent is None:
            return RunError("the turn before this one was not kept, so this one cannot be.")
        depth, chain = parent["depth"], parent["chain"]
    row = {
        "id": turn.turn_id,
        "session": turn.session_id,
        "parent": turn.parent_id,
        "depth": depth + 1,
        "chain": next_hash(chain, turn.interaction),
        "interaction": json.dumps(turn.interaction.to_dict(), ensure_ascii=False),
        "settings": turn.settings.model_dump_json(),
        "reason": turn.reason,
        "prompt_tokens": turn.prompt_tokens,
        "answer_tokens": turn.answer_tokens,
        "created": turn.created,
        "seconds": turn.seconds,
        "memory_seconds": turn.memory_seconds,
        "write_size": turn.write_size,
    }
    if state is not None:
        row |= {"sha256": state.sha256, "bytes": state.num_bytes, "seed": state.seed}
        row |= {"draws": state.draws, "num_turns": state.num_turns}
    _insert(db, "turns", row)
    db.execute(
        "UPDATE sessions SET head = ?, depth = ?, used = MAX(used, ?) WHERE id = ?",
        (turn.turn_id, depth + 1, time.time(), turn.session_id),
    )
    return None


def _insert(db: sqlite3.Connection, table: str, row: dict[str, Any]) -> None:
    names = ", ".join(row)
    marks = ", ".join("?" for _ in row)
    db.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(row.values()))
