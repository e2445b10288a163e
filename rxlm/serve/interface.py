"""What the parts of a server say to each other: values, limits, errors, and the shape of a turn.

A conversation is a tree of turns. A committed turn is a version: its text, and the state (of
constant size) that the conversation goes on from. A session is a name and a head, one of these
turns or none yet. *Acknowledged* means that :class:`~rxlm.rxt.session_events.MemoryUpdated` was
delivered or :meth:`TurnHandle.result` returned: from then on nothing short of losing the disk loses
the turn.

Not here: who keeps them (``store``), who computes (``engine``), the calls themselves
(``service``), HTTP (``app``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Protocol

from pydantic import Field

from rxlm.configuration import Config
from rxlm.data.conversations import Interaction
from rxlm.errors import RunError, UserError
from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.answer_form import ThinkingMode
from rxlm.rxt.answer_row import StopReason
from rxlm.rxt.session_events import Event

# --- errors ---------------------------------------------------------------------------------------


class NotFoundError(UserError):
    """There is no such session or turn, or its state is no longer kept."""


class BusyError(UserError):
    """A turn of this session is being answered: read it, cancel it, or wait."""


class QueueFullError(RunError):
    """More turns wait than the limits allow: try again later."""


class TooManySessionsError(QueueFullError):
    """There are as many sessions as the limits allow: delete some."""


class ClosedError(RunError):
    """The service is closed, or closing."""


class StateDamagedError(RunError):
    """The state file of this turn is missing or damaged; earlier turns are usable (undo)."""


class TurnCancelledError(RunError):
    """The turn was cancelled before its first token: nothing was said and nothing is kept."""


class TurnTimeoutError(RunError):
    """The turn waited longer than ``request_timeout_seconds`` and was dropped."""


# --- limits ---------------------------------------------------------------------------------------


class ServeLimits(Config):
    """How much is served at once, how long anything may get, and how long it is kept."""

    max_running: Annotated[int, Field(ge=1)] = 64
    """Turns that are decoded together."""
    max_queued: Annotated[int, Field(ge=0)] = 256
    """Turns that wait for a place; one more is refused."""
    max_query_chars: Annotated[int, Field(ge=1)] = 32_768
    """Characters of a query, a system prompt or internal context, each."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 1024
    """Tokens of an answer; a request may ask for fewer. The model's turn length also limits it."""
    max_replayed_turns: Annotated[int, Field(ge=0)] = 256
    """Turns of a stateless request that may have to be read into memory first."""
    max_sessions: Annotated[int, Field(ge=1)] = 10_000
    """Named sessions that are kept; one more is refused until one is deleted or expires."""
    max_detached: Annotated[int, Field(ge=1)] = 1_000
    """Conversations without a session (stateless requests, responses) that are kept; the least
    recently used one makes way."""
    keep_versions: Annotated[int, Field(ge=0)] = 8
    """How many turns of a session can be undone: so many states before its head are kept."""
    cached_states: Annotated[int, Field(ge=1)] = 256
    """States that are kept in main memory."""
    session_ttl_seconds: Annotated[float, Field(gt=0)] | None = None
    """Conversations that were not used for so long are deleted; None: never."""
    request_timeout_seconds: Annotated[float, Field(gt=0)] | None = None
    """After so long a turn that still waits is dropped, and an answer that is being written ends
    ('stopped', and is committed); None: never."""


# --- values ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TurnRequest:
    """One turn that is asked for.

    Beyond the first eight fields, which are usual: ``seed`` starts a new stream of random draws
    for this turn and those after it (None: the conversation's own goes on), ``tool_use`` gives a
    tool's result in place of a query, for models that call tools.
    """

    query: str
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    """Texts at which the answer ends; neither the reader nor memory gets them."""
    internal: str | None = None
    thinking_mode: ThinkingMode | None = None
    store: bool = True
    """False: answer and forget. Memory is not updated, nothing is written, and the turn cannot be
    asked for later; no ``MemoryUpdated`` follows."""
    seed: int | None = None
    tool_use: str | None = None


@dataclass(frozen=True)
class TurnInfo:
    """A turn as it is kept.

    ``parent_id``: the turn before; None: it is the first. ``session_id``: the session in which it
    was said; None: in none. ``reason``: how the answer ended; None: it was not generated here
    (imported, or replayed for a stateless request). ``prompt_tokens`` and ``answer_tokens``:
    counts, of an answer without [EOS]. ``created``: seconds since 1970. ``seconds``: from the
    place in the batch to the last token; ``memory_seconds``: of the update (of all turns that were
    updated together); ``write_size``: how much memory changed, see ``MemoryUpdated``.
    ``has_state``: whether a conversation can go on from here.
    """

    turn_id: str
    session_id: str | None
    parent_id: str | None
    interaction: Interaction
    reason: StopReason | None
    prompt_tokens: int
    answer_tokens: int
    created: float
    seconds: float | None = None
    memory_seconds: float | None = None
    write_size: float | None = None
    has_state: bool = True

    @property
    def query(self) -> str:
        """What was asked."""
        return self.interaction.query

    @property
    def answer(self) -> str:
        """What was answered."""
        return self.interaction.answer


@dataclass(frozen=True)
class SessionInfo:
    """A session as it is kept.

    ``head``: its last turn; None: there is none yet. ``num_turns``: from the first to the head.
    ``created`` and ``used``: seconds since 1970. ``forked_from``: the session and turn it began
    as. ``busy``: a turn is being answered. ``state_bytes``: of the state of one version.
    """

    session_id: str
    name: str | None
    system: str | None
    metadata: dict[str, str]
    seed: int
    head: str | None
    num_turns: int
    created: float
    used: float
    forked_from: tuple[str, str | None] | None = None
    busy: bool = False
    state_bytes: int | None = None


@dataclass(frozen=True)
class MemoryView:
    """What the last turn did to memory, for people to look at.

    ``turn_id``: the head, None before the first turn (then nothing changed). ``norms`` and
    ``changes``: ``[L][S]``, length of each slot, and length of the difference over the larger of
    the lengths before and after (0 untouched, towards 1 and above replaced; at most 2).
    ``write_size``: the same over all slots.
    """

    turn_id: str | None
    num_layers: int
    num_slots: int
    norms: list[list[float]]
    changes: list[list[float]]
    write_size: float


@dataclass(frozen=True)
class Histogram:
    """Counts of durations: ``counts[i]`` were at most ``bounds[i]`` seconds (and above the bound
    before), the last of the counts is of those above all bounds. ``total``: their sum."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        """Number of durations."""
        return sum(self.counts)


@dataclass(frozen=True)
class ServiceStats:
    """What the service does now and did since it started.

    ``running``: answers being written; ``queued``: turns waiting for a place; ``updating``: turns
    whose answer is complete and whose commit is under way. ``sessions`` without the conversations
    of no session (``detached``). ``prompt_tokens`` and ``answer_tokens`` were read and written
    in turns that ended (``turns``); ``failed_turns`` ended in an error, ``refused_turns`` were not
    accepted (queue full). ``steps``: decode steps, ``step_rows``: rows summed over them, so that
    their ratio is the average batch. Histograms: ``first_token`` from submission to the first
    token, ``turn`` from submission to the end of the answer, ``commit`` from there to the
    acknowledgement, ``queue`` from submission to a place in the batch.
    """

    running: int
    queued: int
    updating: int
    sessions: int
    detached: int
    turns: int
    failed_turns: int
    refused_turns: int
    cancelled_turns: int
    prompt_tokens: int
    answer_tokens: int
    steps: int
    step_rows: int
    state_files: int
    state_bytes: int
    started: float
    first_token: Histogram
    turn: Histogram
    commit: Histogram
    queue: Histogram


class TurnHandle(Protocol):
    """A turn under way. Every method may be called from any thread; the reader may leave at any
    time. ``events`` and ``aevents`` are for one reader altogether."""

    @property
    def turn_id(self) -> str:
        """``resp_`` and 24 hexadecimal digits: also the response's id."""
        ...

    @property
    def session_id(self) -> str | None:
        """The session; None for a detached turn."""
        ...

    def events(self) -> Iterator[Event]:
        """Yield ``TextDelta`` (``ThinkDelta``, ``ToolCallDelta``) ..., ``TurnEnd``,
        ``MemoryUpdated``, ``Stats``; blocks between them.

        Raises:
            RunError, UserError: what went wrong with this turn, where it went wrong.
        """
        ...

    def aevents(self) -> AsyncIterator[Event]:
        """As :meth:`events`, without blocking the event loop that iterates."""
        ...

    def cancel(self) -> None:
        """End the answer at the next step; what was said is committed. A turn that has not begun
        is dropped (:class:`TurnCancelledError`), one that has ended is left alone."""
        ...

    def result(self, timeout: float | None = None) -> TurnInfo:
        """Wait until the turn is committed (of ``store=False``: until it has ended).

        Raises:
            TimeoutError: if it takes longer than ``timeout`` seconds; the turn goes on.
            RunError, UserError: what went wrong with this turn.
        """
        ...
