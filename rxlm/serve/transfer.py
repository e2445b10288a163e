"""Sessions of a store to folders and back, in the format of :mod:`rxlm.rxt.session_files`.

Such a folder is what ``Session.save`` writes and ``Session.load`` reads; its ``turns.jsonl`` is
training data.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.reactive import ReactiveModel
from rxlm.rxt.session_files import StoredSession, read_session, write_session
from rxlm.serve.interface import SessionInfo
from rxlm.serve.store import SessionStore
from rxlm.serve.store_rows import NewSession, NewTurn


def write_folder(
    folder: Path,
    model: ReactiveModel,
    store: SessionStore,
    info: SessionInfo,
    fresh_state: Callable[[], ConversationState],
) -> None:
    """Write a session with as many states as are kept; see :func:`write_session`.

    Args:
        folder: made if missing.
        model: of the store.
        store: holds the session.
        info: the session.
        fresh_state: makes the state before its first turn.
    """
    turns = store.turns(info.head)
    kept: list[ConversationState] = []
    for turn in reversed(turns):
        if not turn.has_state:
            break
        kept.insert(0, store.state(turn.turn_id))
    if len(kept) == len(turns):
        kept.insert(0, fresh_state())
    settings = SamplingSettings() if info.head is None else store.settings(info.head)
    stored = StoredSession(
        session_id=info.session_id,
        name=info.name,
        system=info.system,
        settings=settings,
        max_seq_len=None,
        turns=tuple(turn.interaction for turn in turns),
        state=kept[-1],
        history=tuple(kept[:-1]),
        fingerprint=model.fingerprint(),
        thinking_mode="auto" if model.thinks else None,
    )
    write_session(folder, stored)


def read_folder(
    folder: Path, model: ReactiveModel, name: str | None, new_id: Callable[[str], str]
) -> tuple[NewSession, list[NewTurn]]:
    """Return a session and its turns as they are stored, with ids of their own.

    Args:
        folder: of a session of this model.
        model: of the store.
        name: of the session; None: as in the folder.
        new_id: makes ids with a prefix.

    Raises:
        UserError: if there is none, it is damaged, or another model wrote it.
    """
    stored = read_session(
        folder, model.fingerprint(), model.memory_shape, model.decoder.carried_shape
    )
    now = time.time()
    session = NewSession(
        new_id("sess"), stored.system, stored.state.seeds[0], now, name or stored.name
    )
    # After the last turns; the state before the first turn is made anew.
    states = [*stored.history, stored.state][-len(stored.turns) :] if stored.turns else []
    missing = [None] * (len(stored.turns) - len(states))
    rows: list[NewTurn] = []
    for interaction, state in zip(stored.turns, [*missing, *states], strict=True):
        parent = rows[-1].turn_id if rows else None
        rows.append(
            NewTurn(
                new_id("resp"),
                session.session_id,
                parent,
                interaction,
                stored.settings,
                state,
                now,
            )
        )
    return session, rows
