"""One conversation that goes on: the place where a state is replaced instead of returned.

A turn is begun, read token by token, and committed: its memory update runs at once or on a worker
thread. A reader may leave at any point. Then the turn is committed (or dropped) the next time the
conversation is used, never inside the reader's clean-up, so that an error is seen by somebody.
Not here: what readers are shown (:mod:`rxlm.rxt.models`: ids; :mod:`rxlm.rxt.session`: events).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rxlm.errors import UserError
from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.answer_form import AnswerForm
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.generation import Answer, AnswerLimits, AnswerStream
from rxlm.rxt.reactive import ReactiveModel

MemoryUpdate = Literal["inline", "background"]
EarlyStop = Literal["commit", "discard"]


class WrittenTurn(NamedTuple):
    """A turn that has entered memory: states before and after it, what was said, how long the
    update took."""

    before: ConversationState
    after: ConversationState
    query: str
    answer: Answer
    seconds: float


@dataclass(eq=False)
class OpenTurn:
    """A turn that was begun and not committed yet."""

    before: ConversationState
    stream: AnswerStream
    query: str
    on_early_stop: EarlyStop
    left: bool = False
    """Whether the reader has left."""
    written: WrittenTurn | None = None
    """Set when the turn has entered memory."""


class HeldConversation:
    """The current state of one conversation, and the turn that is under way.

    For one thread at a time. If an update fails, its turn is kept and written at the next use.
    """

    def __init__(
        self,
        model: ReactiveModel,
        state: ConversationState,
        on_commit: Callable[[WrittenTurn], None] | None = None,
    ) -> None:
        """Hold ``state`` (one conversation); ``on_commit`` is told of every written turn."""
        self.model = model
        self._state = check_single(state)
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

    def replace(self, state: ConversationState) -> None:
        """Go on from ``state``; a turn that is not committed is dropped."""
        check_single(state)
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
        if turn.stream.done or (turn.left and turn.on_early_stop == "commit"):
            self._write(turn)
            self._accept()
        elif turn.left:
            self._open = None

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
    ) -> OpenTurn:
        """Start a turn; one that is still being read ends here, as if its reader had left.

        Raises:
            UserError: if the prompt leaves no room for an answer; nothing changes then.
        """
        if self._open is not None:
            self._open.left = True
        self.settle()
        start = self._state
        if seed is not None:
            start = start.replaced(seeds=(seed,), draws=(0,))
        stream = AnswerStream(self.model, start, [prompt], settings, limits, form)
        self._open = OpenTurn(self._state, stream, query, on_early_stop)
        return self._open

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

    def tokens(self, turn: OpenTurn) -> Iterator[int]:
        """Yield the ids of the answer of ``turn``.

        Raises:
            UserError: if the conversation went on without it: another turn has begun, or the
                state was replaced.
        """
        while not turn.stream.done:
            self._require_current(turn)
            step = next(turn.stream, None)
            if step is not None:
                assert step[0] is not None, "a single conversation ends with its only row"
                yield step[0]

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
            worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rxlm-memory")
            self._update = worker.submit(self._write, turn)
            worker.shutdown(wait=False)

    def _require_current(self, turn: OpenTurn) -> None:
        if self._open is not turn:
            raise UserError(
                "this answer was ended because the conversation went on without it; read an "
                "answer to its end before the next turn."
            )

    def _write(self, turn: OpenTurn) -> None:
        # Also runs on the worker: touches nothing but the turn.
        started = time.perf_counter()
        answer = turn.stream.answers()[0]
        after = self.model.update_memory(turn.stream.state, [answer.turn])
        seconds = time.perf_counter() - started
        turn.written = WrittenTurn(turn.before, after, turn.query, answer, seconds)

    def _accept(self) -> None:
        """Go on from the open turn, which has been written."""
        assert self._open is not None and self._open.written is not None
        written, self._open = self._open.written, None
        self._state = written.after
        if self._on_commit is not None:
            self._on_commit(written)


def check_single(state: ConversationState) -> ConversationState:
    """Return ``state``; raise ``UserError`` unless it is one conversation."""
    if state.batch_size != 1:
        raise UserError(
            f"the state holds {state.batch_size} conversations: choose one with "
            "state.select([row]), or answer all at once with generate() and update_memory()."
        )
    return state


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ``UserError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise UserError(f"{name}={value!r}: use one of {', '.join(map(repr, choices))}.")
