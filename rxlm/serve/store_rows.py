"""Rows of a store's index as values, and back. Not here: when they are written (``store``)."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from typing import Any

from rxlm.data.conversations import Interaction
from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.answer_row import StopReason
from rxlm.rxt.conversation import ConversationState
from rxlm.serve.interface import SessionInfo, TurnInfo


@dataclass(frozen=True)
class NewSession:
    """A session before it is stored; one that is ``detached`` is not listed and has no name."""

    session_id: str
    system: str | None
    seed: int
    created: float
    name: str | None = None
    metadata: dict[str, str] | None = None
    head: str | None = None
    depth: int = 0
    forked_from: tuple[str, str | None] | None = None
    detached: bool = False

    def row(self) -> dict[str, Any]:
        """Return the columns."""
        forked = self.forked_from or (None, None)
        return {
            "id": self.session_id,
            "name": self.name,
            "system": self.system,
            "metadata": json.dumps(self.metadata or {}),
            "seed": self.seed,
            "head": self.head,
            "depth": self.depth,
            "created": self.created,
            "used": self.created,
            "forked_session": forked[0],
            "forked_turn": forked[1],
            "detached": self.detached,
        }


@dataclass(frozen=True, eq=False)
class NewTurn:
    """A turn before it is stored.

    ``session_id``: whose head it becomes, also of a detached session; ``new_session``: that
    session, if it begins with this turn; ``state``: after the turn, None if it is not known any
    more (of old turns that are imported).
    """

    turn_id: str
    session_id: str
    parent_id: str | None
    interaction: Interaction
    settings: SamplingSettings
    state: ConversationState | None
    created: float
    reason: StopReason | None = None
    prompt_tokens: int = 0
    answer_tokens: int = 0
    seconds: float | None = None
    memory_seconds: float | None = None
    write_size: float | None = None
    new_session: NewSession | None = None


def turn_info(row: sqlite3.Row) -> TurnInfo:
    """Return a row of turns, joined with ``detached`` of its session."""
    return TurnInfo(
        row["id"],
        None if row["detached"] else row["session"],
        row["parent"],
        Interaction.from_dict(json.loads(row["interaction"])),
        row["reason"],
        row["prompt_tokens"],
        row["answer_tokens"],
        row["created"],
        row["seconds"],
        row["memory_seconds"],
        row["write_size"],
        row["sha256"] is not None,
    )


def session_info(row: sqlite3.Row) -> SessionInfo:
    """Return a row of sessions, joined with ``bytes`` of its head."""
    forked = row["forked_session"]
    return SessionInfo(
        row["id"],
        row["name"],
        row["system"],
        json.loads(row["metadata"]),
        row["seed"],
        row["head"],
        row["depth"],
        row["created"],
        row["used"],
        None if forked is None else (forked, row["forked_turn"]),
        state_bytes=row["bytes"],
    )
