"""One turn on its way through the engine: what it starts from, what is said, how it ends.

The engine's thread moves it on; readers and callers see a
:class:`~rxlm.serve.interface.TurnHandle`. Not here: when what happens (``engine``).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from rxlm.data.conversations import Interaction
from rxlm.rxt.answer_form import AnswerForm
from rxlm.rxt.answer_row import Answer, AnswerRow
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.session_events import Event, MemoryUpdated, Stats
from rxlm.serve.answer_text import AnswerText
from rxlm.serve.channel import Channel
from rxlm.serve.interface import TurnInfo, TurnRequest
from rxlm.serve.store_rows import NewSession


@dataclass(frozen=True)
class FreshStart:
    """A conversation before its first turn."""

    system: str | None
    seed: int


@dataclass(frozen=True, eq=False)
class Replay:
    """A finished turn that is read into memory before the turn that is asked for."""

    turn_id: str
    ids: list[int]
    interaction: Interaction


class Turn:
    """A turn under way."""

    def __init__(
        self,
        turn_id: str,
        session_id: str | None,
        owner_id: str,
        request: TurnRequest,
        prompt: list[int],
        form: AnswerForm | None,
        start: ConversationState | FreshStart | Turn,
        text: AnswerText,
        on_cancel: Callable[[Turn], None],
        on_done: Callable[[Turn], None],
    ) -> None:
        """Describe a turn that waits.

        Args:
            turn_id: of this turn.
            session_id: what readers are told: None for a detached turn.
            owner_id: the session that keeps it, detached or not.
            request: what is asked.
            prompt: its ids, with what opens the answer.
            form: of the answer.
            start: the state it goes on from, or what that will be made of.
            text: of the answer.
            on_cancel: is told that the reader wants it to end.
            on_done: is told that it is committed, or failed.
        """
        self.turn_id, self.session_id, self.owner_id = turn_id, session_id, owner_id
        self.request, self.prompt, self.form, self.start = request, prompt, form, start
        self.text, self._on_cancel, self._on_done = text, on_cancel, on_done
        self.parent_id: str | None = None
        self.new_session: NewSession | None = None
        self.replays: deque[Replay] = deque()
        self.max_new_tokens: int | None = None
        self.before: ConversationState | None = None
        """The state that the turn reads; known before it is admitted."""
        self.after: ConversationState | None = None
        """The state after its update."""
        self.pending_system: list[int] | None = None
        """A system prompt that ``before`` does not hold yet."""
        self.row: AnswerRow | None = None
        self.answer: Answer | None = None
        self.interaction: Interaction | None = None
        self.cancelled = False
        self.ended = False
        """The answer is complete (or failed): the session may be asked again."""
        self.error: Exception | None = None
        self.submitted = time.perf_counter()
        self.created = time.time()
        self.admitted = self.first_token = self.answered = 0.0
        self.num_tokens = 0
        self.memory_seconds: float | None = None
        self.write_size: float | None = None
        self._channel = Channel()
        self._done = threading.Event()
        self._info: TurnInfo | None = None

    # --- for readers ------------------------------------------------------------------------------

    def events(self) -> Iterator[Event]:
        """See :class:`~rxlm.serve.interface.TurnHandle`, as for all of these."""
        return self._channel.events()

    def aevents(self) -> AsyncIterator[Event]:
        """See there."""
        return self._channel.aevents()

    def cancel(self) -> None:
        """See there."""
        self._on_cancel(self)

    def result(self, timeout: float | None = None) -> TurnInfo:
        """See there."""
        if not self._done.wait(timeout):
            raise TimeoutError(f"turn {self.turn_id} is not committed after {timeout} s.")
        if self.error is not None:
            raise self.error
        assert self._info is not None, "a turn ends with one of the two"
        return self._info

    @property
    def done(self) -> bool:
        """Whether it is committed, or failed."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is done, whatever came of it; return whether it is."""
        return self._done.wait(timeout)

    # --- for the engine ---------------------------------------------------------------------------

    def tell(self, event: Event) -> None:
        """Give the reader an event."""
        self._channel.put(event)

    def fail(self, error: Exception) -> None:
        """End without an answer that counts."""
        self.error, self.ended = error, True
        self._on_done(self)
        self._done.set()
        self._channel.close(error)

    def finish(self, info: TurnInfo) -> None:
        """End well: it is committed (or was not to be)."""
        if self.request.store:
            self.tell(MemoryUpdated(self.write_size or 0.0))
        seconds = self.answered - self.admitted
        rate = self.num_tokens / max(seconds, 1e-9)
        self.tell(Stats(self.num_tokens, seconds, rate, self.memory_seconds))
        self._info = info
        self._on_done(self)
        # Before the reader can see the end of the events: whoever saw it may ask for the result.
        self._done.set()
        self._channel.close()
