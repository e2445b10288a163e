"""What the engine makes of a turn: the rows that are stored, and why it cannot begin.

Not here: when (``engine``).
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from rxlm.data.conversations import Interaction
from rxlm.errors import RunError
from rxlm.rxt.conversation import ConversationState
from rxlm.serve.interface import TurnInfo
from rxlm.serve.store_rows import NewTurn
from rxlm.serve.turn import Replay, Turn


def failed_start(turn: Turn) -> Exception | None:
    """Return why a turn cannot begin: the one before it failed after its answer."""
    start = turn.start
    if not isinstance(start, Turn) or start.error is None:
        return None
    failure = RunError(f"the turn before this one was not kept: {start.error}")
    failure.__cause__ = start.error
    return failure


def interaction_of(turn: Turn, said: Mapping[str, str]) -> Interaction:
    """Return a finished turn as text."""
    return Interaction(
        turn.request.query,
        said["answer"],
        think=said.get("think"),
        tool_call=said.get("tool_call"),
        tool_use=turn.request.tool_use,
        internal=turn.request.internal,
    )


def new_turn_row(turn: Turn) -> NewTurn:
    """Return a turn whose memory is updated, as it is stored."""
    assert turn.answer is not None and turn.interaction is not None and turn.after is not None
    return NewTurn(
        turn.turn_id,
        turn.owner_id,
        turn.parent_id,
        turn.interaction,
        turn.request.settings,
        turn.after,
        turn.created,
        turn.answer.reason,
        len(turn.prompt),
        len(turn.answer.ids),
        turn.answered - turn.admitted,
        turn.memory_seconds,
        turn.write_size,
        turn.new_session,
    )


def replayed_row(
    turn: Turn, replay: Replay, state: ConversationState, write_size: float
) -> NewTurn:
    """Return a turn that was replayed for ``turn``, as it is stored."""
    return NewTurn(
        replay.turn_id,
        turn.owner_id,
        turn.parent_id,
        replay.interaction,
        turn.request.settings,
        state,
        time.time(),
        prompt_tokens=len(replay.ids),
        write_size=write_size,
        new_session=turn.new_session,
    )


def untold_info(turn: Turn) -> TurnInfo:
    """Return a turn that is not stored."""
    assert turn.answer is not None and turn.interaction is not None
    return TurnInfo(
        turn.turn_id,
        turn.session_id,
        turn.parent_id,
        turn.interaction,
        turn.answer.reason,
        len(turn.prompt),
        len(turn.answer.ids),
        turn.created,
        turn.answered - turn.admitted,
        has_state=False,
    )
