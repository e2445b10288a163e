"""Questions about the tree of turns in a store's index, asked inside a transaction of the caller.

Not here: what the answers are used for (``store``), the tables (``index``).
"""

from __future__ import annotations

import sqlite3

SELECT_TURN = (
    "SELECT turns.*, sessions.detached FROM turns JOIN sessions ON sessions.id = turns.session "
)
SELECT_SESSION = (
    "SELECT sessions.*, turns.bytes FROM sessions LEFT JOIN turns ON turns.id = sessions.head "
)

_UP = """
WITH RECURSIVE up (id, parent, distance) AS (
    SELECT id, parent, 0 FROM turns WHERE id = :turn
    UNION ALL
    SELECT turns.id, turns.parent, distance + 1
    FROM turns JOIN up ON turns.id = up.parent WHERE distance < :most
)
"""
_IS_NEEDED = """
WITH RECURSIVE down (id, distance) AS (
    SELECT :turn, 0
    UNION ALL
    SELECT turns.id, distance + 1
    FROM turns JOIN down ON turns.parent = down.id WHERE distance < :most
)
SELECT 1 FROM down JOIN sessions ON sessions.head = down.id LIMIT 1
"""


def path_ids(db: sqlite3.Connection, turn_id: str | None, most: int = 1 << 40) -> list[str]:
    """Return a turn and up to ``most`` turns before it, the last first."""
    if turn_id is None:
        return []
    rows = db.execute(f"{_UP} SELECT id FROM up ORDER BY distance", {"turn": turn_id, "most": most})
    return [row[0] for row in rows]


def path_rows(db: sqlite3.Connection, turn_id: str | None) -> list[sqlite3.Row]:
    """Return a turn and all turns before it, the first first."""
    if turn_id is None:
        return []
    return db.execute(
        f"{_UP} SELECT turns.*, sessions.detached FROM up JOIN turns ON turns.id = up.id "
        "JOIN sessions ON sessions.id = turns.session ORDER BY distance DESC",
        {"turn": turn_id, "most": 1 << 40},
    ).fetchall()


def drop_unneeded_states(
    db: sqlite3.Connection, candidates: list[str], keep_versions: int
) -> list[str]:
    """Let go of the states of those ``candidates`` that no session can go back to.

    Returns:
        the turns whose files can be deleted once the transaction is committed.
    """
    dropped = []
    for turn_id in candidates:
        values = {"turn": turn_id, "most": keep_versions}
        if db.execute(_IS_NEEDED, values).fetchone() is None:
            changed = db.execute(
                "UPDATE turns SET sha256 = NULL, bytes = NULL WHERE id = ? AND sha256 IS NOT NULL",
                (turn_id,),
            )
            if changed.rowcount:
                dropped.append(turn_id)
    return dropped


def delete_session(db: sqlite3.Connection, session_id: str) -> list[str]:
    """Delete a session and its turns; those that others go on from get a new owner.

    Returns:
        the turns that are gone.
    """
    owned = {
        row["id"]: row["parent"]
        for row in db.execute("SELECT id, parent FROM turns WHERE session = ?", (session_id,))
    }
    entries = db.execute(
        """
        SELECT own.id, other.session AS heir FROM turns AS own
        JOIN turns AS other ON other.parent = own.id
        WHERE own.session = :session AND other.session <> :session
        UNION
        SELECT own.id, other.id AS heir FROM turns AS own
        JOIN sessions AS other ON other.head = own.id
        WHERE own.session = :session AND other.id <> :session
        """,
        {"session": session_id},
    ).fetchall()
    heirs: dict[str, str] = {}
    for entry in entries:
        turn_id: str | None = entry["id"]
        # Everything up to the first turn, or to one that has an heir (and all before it then).
        while turn_id in owned and turn_id not in heirs:
            assert turn_id is not None
            heirs[turn_id] = entry["heir"]
            turn_id = owned[turn_id]
    db.executemany(
        "UPDATE turns SET session = ? WHERE id = ?", [(heir, one) for one, heir in heirs.items()]
    )
    gone = [turn_id for turn_id in owned if turn_id not in heirs]
    db.execute("DELETE FROM sessions WHERE id = ?", (session_id,))
    db.executemany("DELETE FROM turns WHERE id = ?", [(turn_id,) for turn_id in gone])
    return gone
