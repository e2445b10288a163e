"""The index of a store: an SQLite file that one process opens, and its tables.

    sessions    a name and a head; ``detached`` ones have no name and are not listed
    turns       what was said, after which turn (``parent``), by which session; the digest and the
                counters of the state file while there is one (``sha256``); of one that was
                ``forgotten`` only its place is left
    meta        format and the fingerprint of the model

WAL with synchronous=FULL: a transaction that was committed survives a power cut. secure_delete:
what is deleted is overwritten. Not here: what is written and when (``store``).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rxlm.errors import RunError, UserError
from rxlm.rxt.fingerprint import ModelFingerprint
from rxlm.serve.interface import ClosedError

STORE_FORMAT = "1"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sessions (
    id TEXT PRIMARY KEY,
    name TEXT,
    system TEXT,
    metadata TEXT NOT NULL,
    seed INTEGER NOT NULL,
    head TEXT REFERENCES turns (id) DEFERRABLE INITIALLY DEFERRED,
    depth INTEGER NOT NULL,
    created REAL NOT NULL,
    used REAL NOT NULL,
    forked_session TEXT,
    forked_turn TEXT,
    detached INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS sessions_used ON sessions (detached, used, id);
CREATE INDEX IF NOT EXISTS sessions_head ON sessions (head);
CREATE TABLE IF NOT EXISTS turns (
    id TEXT PRIMARY KEY,
    session TEXT NOT NULL REFERENCES sessions (id) DEFERRABLE INITIALLY DEFERRED,
    parent TEXT REFERENCES turns (id) DEFERRABLE INITIALLY DEFERRED,
    depth INTEGER NOT NULL,
    chain BLOB NOT NULL,
    interaction TEXT NOT NULL,
    settings TEXT NOT NULL,
    reason TEXT,
    prompt_tokens INTEGER NOT NULL,
    answer_tokens INTEGER NOT NULL,
    created REAL NOT NULL,
    seconds REAL,
    memory_seconds REAL,
    write_size REAL,
    sha256 TEXT,
    bytes INTEGER,
    seed INTEGER,
    draws INTEGER,
    num_turns INTEGER,
    forgotten INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS turns_session ON turns (session);
CREATE INDEX IF NOT EXISTS turns_parent ON turns (parent);
CREATE INDEX IF NOT EXISTS turns_chain ON turns (chain) WHERE sha256 IS NOT NULL;
"""


class Index:
    """The database of a store. Safe for threads: one writes at a time, one reads."""

    def __init__(self, folder: Path, fingerprint: ModelFingerprint) -> None:
        """Open it, or make it.

        Raises:
            UserError: if another process has it open, another version of rxlm wrote it, or it
                belongs to another model.
            RunError: if it cannot be read.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "index.sqlite"
        self._lock_file = _locked(folder / "lock")
        self._write_lock, self._read_lock = threading.Lock(), threading.Lock()
        try:
            self._writer = self._connect()
            self._writer.executescript(_SCHEMA)
            self._reader = self._connect()
            self._check(folder, fingerprint)
        except sqlite3.DatabaseError as error:
            self._lock_file.close()
            raise RunError(f"{self.path} cannot be used ({error}): restore it.") from error
        except UserError:
            self._lock_file.close()
            raise

    def close(self) -> None:
        """Close it; another process may open it then."""
        with self._write_lock, self._read_lock:
            if self._lock_file.closed:
                return
            self._reader.close()
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._writer.close()
            self._lock_file.close()

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Give a connection in a transaction, committed at the end unless there is an error.

        Raises:
            ClosedError: if it is closed.
            RunError: if the disk refuses; nothing was written then.
        """
        with self._write_lock:
            self._check_open()
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                try:
                    yield self._writer
                except BaseException:
                    self._writer.execute("ROLLBACK")
                    raise
                self._writer.execute("COMMIT")
            except sqlite3.Error as error:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise RunError(f"could not write {self.path}: {error}.") from error

    @contextlib.contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Give a connection to read with.

        Raises:
            ClosedError: if it is closed.
        """
        with self._read_lock:
            self._check_open()
            yield self._reader

    def forget_deleted(self) -> None:
        """Take what was deleted out of the log as well."""
        with self._write_lock, self._read_lock:
            self._check_open()
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _check_open(self) -> None:
        if self._lock_file.closed:
            raise ClosedError("the store of the conversations was closed.")

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
            "secure_delete = ON",
            "busy_timeout = 10000",
        ):
            connection.execute(f"PRAGMA {pragma}")
        return connection

    def _check(self, folder: Path, fingerprint: ModelFingerprint) -> None:
        with self.write() as db:
            found = dict(tuple(row) for row in db.execute("SELECT key, value FROM meta"))
            if not found:
                rows = {"format": STORE_FORMAT, "model": json.dumps(fingerprint._asdict())}
                db.executemany("INSERT INTO meta VALUES (?, ?)", rows.items())
                return
        if found.get("format") != STORE_FORMAT:
            raise UserError(
                f"{folder} has store format {found.get('format')}; this rxlm reads "
                f"{STORE_FORMAT}: use the version of rxlm that wrote it."
            )
        stored = ModelFingerprint(**json.loads(found["model"]))
        differing = stored.differences(fingerprint)
        if differing:
            reasons = [
                f"{part} differs (store {getattr(stored, part)[:12] or 'none'}, model "
                f"{getattr(fingerprint, part)[:12] or 'none'})"
                for part in differing
            ]
            raise UserError(
                f"{folder} belongs to another model: {'; '.join(reasons)}. A memory can be read "
                "only by the model that wrote it: serve that model, or choose another folder."
            )


def _locked(path: Path) -> IO[str]:
    """Return the lock file, which nobody else has while it is open."""
    file = path.open("a+", encoding="ascii")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise UserError(
            f"{path.parent} is open in another process ({holder}): close that one, or choose "
            "another folder."
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()}")
    file.flush()
    return file
