"""Conversations that go on: the place where a state is replaced instead of returned.

A turn is begun, read token by token, and committed: its memory update runs at once or on a worker
thread. A reader may leave at any point. Then the turn is committed (or dropped) the next time the
conversation is used, never inside the reader's clean-up, so that an error is seen by somebody.
Not here: what readers are shown (:mod:`rxlm.rxt.alpha`: ids; :mod:`rxlm.rxt.session`: events),
and several conversations at once (:mod:`rxlm.rxt.held_batch`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from rxlm.errors import UserError
from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.answer_form import AnswerForm
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.generation import Answer, AnswerLimits, AnswerStream
from rxlm.rxt.reactive import ReactiveModel
from rxlm.rxt.side_stream import SideStream

MemoryUpdate = Literal["inline", "background"]
EarlyStop = Literal["commit", "discard"]


class WrittenTurn(NamedTuple):
    """A turn that has entered memory: states before and after it, what was said, how long the
    update took."""

    before: ConversationState
    after: ConversationState
    query: str
    answers: tuple[Answer, ...]
    seconds: float

    @property
    def answer(self) -> Answer:
        """The answer of a turn of one conversation."""
        (answer,) = self.answers
        return answer


class RowsUpdate(NamedTuple):
    """What a memory update gave: which conversations it wrote, their state, what was said."""

    rows: tuple[int, ...]
    state: ConversationState | None
    answers: tuple[Answer, ...]
    seconds: float


@dataclass(eq=False)
class OpenTurn:
    """A turn that was begun and not committed yet."""

    before: ConversationState
    stream: AnswerStream
    query: str
    on_early_stop: EarlyStop
    rows: tuple[int, ...] = (0,)
    """Which of the held conversations take part, one for each row of the stream."""
    left: bool = False
    """Whether the reader has left."""
    dropped: set[int] = field(default_factory=set)
    """Those of ``rows`` that do not enter memory, whatever was said."""
    aside: SideStream | None = None
    """Where the update is computed, if by the worker."""
    update: RowsUpdate | None = None
    """Set when the update is computed, perhaps by the worker."""
    written: WrittenTurn | None = None
    """Set when the turn has entered memory."""

    @property
    def places(self) -> list[int]:
        """The rows of the stream whose answers enter memory if the turn is over now."""
        return [
            place
            for place, (row, ended) in enumerate(zip(self.rows, self.stream.ended, strict=True))
            if row not in self.dropped and (ended or self.on_early_stop == "commit")
        ]


class HeldConversations:
    """The current state of conversations, and the turn that is under way.

    For one thread at a time. If an update fails, its turn is kept and written at the next use.
    """

    def __init__(
        self,
        model: ReactiveModel,
        state: ConversationState,
        on_commit: Callable[[WrittenTurn], None] | None = None,
    ) -> None:
        """Hold ``state``; ``on_commit`` is told of every written turn."""
        self.model = model
        self._state = state
        self._check(state)
        self._on_commit = on_commit
        self._open: OpenTurn | None = None
        self._update: Future[None] | None = None

    @property
    def state(self) -> ConversationState:
        """The state after the last finished turn; waits for its update.

        A turn whose reader has left is committed first; one that is still being read is not yet
        part of the state.
        """
        self.settle()
        return self._state

    @property
    def batch_size(self) -> int:
        """Number of conversations; waits for nothing."""
        return self._state.batch_size

    def replace(self, state: ConversationState) -> None:
        """Go on from ``state``; a turn that is not committed is dropped."""
        self._check(state)
        if self._update is not None:
            # Its result is not wanted, its error neither; but it must not outlive this call.
            self._update.exception()
        self._open, self._update = None, None
        self._state = state

    def settle(self) -> None:
        """Finish what is under way: wait for the update, commit a turn whose reader has left.

        Raises:
            Exception: what the update raised; the next call tries it again.
        """
        if self._update is not None:
            update, self._update = self._update, None
            update.result()
            self._accept()
        turn = self._open
        if turn is None:
            return
        if turn.stream.done or (turn.left and turn.places):
            self._write(turn)
            self._accept()
        elif turn.left:
            self._open = None

    def _end_open_turn(self) -> None:
        """Make way for a new turn: one that is still being read ends as if its reader had left."""
        if self._open is not None:
            self._open.left = True
        self.settle()

    @contextlib.contextmanager
    def reading(self, turn: OpenTurn) -> Iterator[None]:
        """Note how the reader of ``turn`` leaves the block.

        Closing the generator or Ctrl-C is leaving early. Any other error means that there is no
        answer: an unfinished turn is dropped.
        """
        try:
            yield
        except (GeneratorExit, KeyboardInterrupt):
            turn.left = True
            raise
        finally:
            if self._open is turn and not turn.left and not turn.stream.done:
                self._open = None

    def steps(self, turn: OpenTurn) -> Iterator[list[int | None]]:
        """Yield the steps of the answers of ``turn``.

        Raises:
            UserError: if the conversation went on without it: another turn has begun, or the
                state was replaced.
        """
        while not turn.stream.done:
            self._require_current(turn)
            step = next(turn.stream, None)
            if step is not None:
                yield step

    def commit(self, turn: OpenTurn) -> WrittenTurn:
        """Write a finished turn into memory and go on from there.

        Once only: the turn may have been committed already, by somebody who asked for the state.

        Raises:
            UserError: if the turn was dropped meanwhile.
        """
        if turn.written is None:
            self._require_current(turn)
            self.settle()
        assert turn.written is not None, "settling writes a finished turn"
        return turn.written

    def commit_in_background(self, turn: OpenTurn) -> None:
        """As :meth:`commit`, on a worker thread; the next use of the conversation waits for it."""
        if turn.written is None:
            self._require_current(turn)
            turn.aside = SideStream(self.model.device)
            worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rxlm-memory")
            self._update = worker.submit(self._write_aside, turn, turn.aside)
            worker.shutdown(wait=False)

    def _require_current(self, turn: OpenTurn) -> None:
        if self._open is not turn:
            raise UserError(
                "this answer was ended because the conversation went on without it; read an "
                "answer to its end before the next turn."
            )

    def _write_aside(self, turn: OpenTurn, aside: SideStream) -> None:
        with aside.working(turn.stream.state.tensors()):
            self._write(turn)

    def _write(self, turn: OpenTurn) -> None:
        # Also runs on the worker: touches nothing but the turn.
        started = time.perf_counter()
        places = turn.places
        said = turn.stream.answers()
        answers = tuple(said[place] for place in places)
        after = None
        if places:
            before = turn.stream.state
            before = before if len(places) == before.batch_size else before.select(places)
            after = self.model.update_memory(before, [answer.turn for answer in answers])
        rows = tuple(turn.rows[place] for place in places)
        turn.update = RowsUpdate(rows, after, answers, time.perf_counter() - started)

    def _accept(self) -> None:
        """Go on from the open turn, whose update is computed; other rows stay as they are now."""
        turn, self._open = self._open, None
        assert turn is not None and turn.update is not None, "the update is computed first"
        rows, updated, answers, seconds = turn.update
        if updated is not None:
            if turn.aside is not None:
                turn.aside.hand_over(updated.tensors())
            everyone = rows == tuple(range(self._state.batch_size))
            self._state = updated if everyone else self._state.with_rows(rows, updated)
        turn.written = WrittenTurn(turn.before, self._state, turn.query, answers, seconds)
        if self._on_commit is not None:
            self._on_commit(turn.written)

    def _check(self, state: ConversationState) -> None:
        """Raise ``UserError`` for a state that cannot be held here."""


class HeldConversation(HeldConversations):
    """The current state of one conversation, and the turn that is under way."""

    def begin(
        self,
        prompt: list[int],
        settings: SamplingSettings,
        limits: AnswerLimits,
        *,
        query: str = "",
        on_early_stop: EarlyStop = "commit",
        seed: int | None = None,
        form: AnswerForm | None = None,
        compile_decode: bool = False,
    ) -> OpenTurn:
        """Start a turn; one that is still being read ends here, as if its reader had left.

        Raises:
            UserError: if the prompt leaves no room for an answer, or there is no compiler for
                ``compile_decode``; nothing changes then.
        """
        self._end_open_turn()
        start = self._state
        if seed is not None:
            start = start.replaced(seeds=(seed,), draws=(0,))
        stream = AnswerStream(
            self.model, start, [prompt], settings, limits, form, compile_decode=compile_decode
        )
        self._open = OpenTurn(self._state, stream, query, on_early_stop)
        return self._open

    def tokens(self, turn: OpenTurn) -> Iterator[int]:
        """Yield the ids of the answer of ``turn``; errors are those of :meth:`steps`."""
        for (token,) in self.steps(turn):
            assert token is not None, "a single conversation ends with its only row"
            yield token

    def _check(self, state: ConversationState) -> None:
        check_single(state)


def check_single(state: ConversationState) -> None:
    """Raise ``UserError`` unless ``state`` is one conversation."""
    if state.batch_size != 1:
        raise UserError(
            f"the state holds {state.batch_size} conversations: choose one with "
            "state.select([row]), or hold all of them with set_batch_mode(True, state=state)."
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ``UserError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise UserError(f"{name}={value!r}: use one of {', '.join(map(repr, choices))}.")
