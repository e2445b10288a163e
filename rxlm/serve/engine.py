"""The thread that owns the model: turns of many sessions are decoded and remembered together.

Turns wait in one queue and are admitted in its order (one whose memory is not ready is passed by).
Work goes in cycles: ``STEPS_PER_CYCLE`` decode steps of all answers under way, then one batch of
memory updates (answers that are complete, and what turns that wait need: system prompts, replayed
turns), then one batch of prompts that join. Both batches are bounded, so an answer under way waits
for one of each at most; both get their turn every cycle, so neither starves however many answers
are written. When nothing is being decoded nothing is waited for.

An answer is complete, and its reader told so, before its memory is updated; the session's next turn
waits only if that is unfinished when its place is free. What goes wrong in one turn ends that turn
alone. Not here: disk (``committer``), sessions (``service``).

Shapes: B turns of a batch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

import torch

from rxlm.errors import RunError, UserError
from rxlm.nn.evaluation_mode import evaluation_mode
from rxlm.rxt.answer_batch import AnswerBatch
from rxlm.rxt.answer_row import AnswerRow
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.generation import AnswerLimits, answer_row
from rxlm.rxt.reactive import ReactiveModel
from rxlm.rxt.session_events import DELTAS, TurnEnd, write_sizes
from rxlm.rxt.session_turns import parts_of_turn
from rxlm.serve.committer import Commit, Committer
from rxlm.serve.engine_turns import (
    failed_start,
    interaction_of,
    new_turn_row,
    replayed_row,
    untold_info,
)
from rxlm.serve.interface import (
    ClosedError,
    QueueFullError,
    ServeLimits,
    TurnCancelledError,
    TurnTimeoutError,
)
from rxlm.serve.recorder import Recorder
from rxlm.serve.state_files import is_finite
from rxlm.serve.turn import FreshStart, Replay, Turn
from rxlm.tokenization import encode_system

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

STEPS_PER_CYCLE = 4
"""Decode steps between updates and admissions: the first token waits for so many at most, and
prompts and updates of that time share a batch."""
MOST_UPDATE_TOKENS = 8192
"""Tokens (padding included) of one batch of memory updates."""
MOST_PROMPT_TOKENS = 8192
"""Tokens (padding included) of one batch of prompts."""
MOST_FRESH = 64
"""System prompts whose memory is kept at hand."""
MOST_BACKLOG = 256
"""Commits that may wait for the disk; more, and nobody is admitted until it has caught up."""


class _Write(NamedTuple):
    """One memory update of a batch: whose, from which state, of which whole turn, and after it."""

    turn: Turn
    state: ConversationState
    ids: list[int]
    replay: Replay | None
    is_system: bool


class Engine:
    """Answers turns; see the module."""

    def __init__(
        self, model: ReactiveModel, committer: Committer, limits: ServeLimits, recorder: Recorder
    ) -> None:
        """Start the thread; from now on the model is its own."""
        self._model, self._committer = model, committer
        self._limits, self._recorder = limits, recorder
        self._wake = threading.Condition()
        self._inbox: deque[Turn] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._cancels: deque[Turn] = deque()
        self._closing = False
        self._dropping = False
        self._num_waiting = 0
        self.error: Exception | None = None
        """What ended the engine, if anything did; every later turn is refused with it."""
        # The rest belongs to the thread.
        self._batch = AnswerBatch(model)
        self._waiting: deque[Turn] = deque()
        self._running: dict[AnswerRow, Turn] = {}
        self._complete: deque[Turn] = deque()
        self._fresh: OrderedDict[FreshStart, ConversationState] = OrderedDict()
        self._steps = 0
        self._thread = threading.Thread(target=self._run, name="rxlm-engine", daemon=True)
        self._thread.start()

    # --- for other threads ------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Answers being written."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Turns that have no place yet."""
        return self._num_waiting

    @property
    def num_updating(self) -> int:
        """Turns that are complete and wait for their memory update or the disk."""
        return len(self._complete) + self._committer.backlog

    def submit(self, turn: Turn) -> None:
        """Let a turn wait for its place.

        Raises:
            QueueFullError: if too many wait.
            ClosedError: if the engine is closing.
            RunError: if it has failed.
        """
        most = self._limits.max_running + self._limits.max_queued
        with self._wake:
            self.check_open()
            if self._num_waiting + len(self._running) >= most:
                with self._recorder.lock:
                    self._recorder.refused += 1
                raise QueueFullError(
                    f"{most} turns are being answered or wait: try again in a moment."
                )
            self._inbox.append(turn)
            self._num_waiting += 1
            self._wake.notify()

    def check_open(self) -> None:
        """Raise what :meth:`submit` would."""
        if self.error is not None:
            raise RunError(f"the engine has failed: {self.error}") from self.error
        if self._closing:
            raise ClosedError("the service is closing: no turns are accepted.")

    def cancel(self, turn: Turn) -> None:
        """End a turn at the next step."""
        with self._wake:
            turn.cancelled = True
            self._cancels.append(turn)
            self._wake.notify()

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Run something with the model, between steps."""
        future: Future[Result] = Future()
        with self._wake:
            self.check_open()
            self._calls.append((function, future))
            self._wake.notify()
        return future

    def close(self, timeout: float | None) -> None:
        """Finish what is being answered (after ``timeout`` seconds: end it where it is), refuse
        what waits, end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout)
        if self._thread.is_alive():
            with self._wake:
                self._dropping = True
                self._wake.notify()
            self._thread.join()

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with evaluation_mode(self._model), torch.no_grad():
                while self._work():
                    pass
            self._refuse_all(ClosedError("the service was closed."))
        except Exception as error:  # Nobody is above this thread: whoever waits must hear of it.
            logger.exception("the engine failed")
            with self._wake:
                self.error = error
            failure = RunError(f"the engine has failed: {error}")
            failure.__cause__ = error
            self._refuse_all(failure)

    def _work(self) -> bool:
        """Do one cycle's next part; return whether there will be more."""
        self._receive()
        if self._closing:
            self._refuse_waiting(ClosedError("the service was closed before this turn began."))
        if not self._running or self._steps >= STEPS_PER_CYCLE:
            self._steps = 0
            self._end_late_turns()
            self._write_memories()
            self._admit()
        if self._running:
            self._step()
        return bool(self._running or self._complete or self._waiting or not self._closing)

    def _receive(self) -> None:
        """Take what other threads have asked for; sleep while there is nothing to do."""
        with self._wake:
            while not (
                self._inbox or self._calls or self._cancels or self._closing or self._has_work()
            ):
                self._wake.wait(self._patience())
                if self._waiting:
                    break
            self._waiting.extend(self._inbox)
            self._inbox.clear()
            calls, self._calls = self._calls, deque()
            cancels, self._cancels = self._cancels, deque()
            if self._dropping:
                cancels.extend(self._running.values())
        for turn in cancels:
            self._cancel(turn)
        for function, future in calls:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except (RuntimeError, ValueError) as error:
                    future.set_exception(error)

    def _has_work(self) -> bool:
        if self._running or self._complete:
            return True
        return not self._is_behind and any(map(self._can_move, self._waiting))

    @property
    def _is_behind(self) -> bool:
        """Whether the disk has more to do than it should."""
        return self._committer.backlog > MOST_BACKLOG

    def _can_move(self, turn: Turn) -> bool:
        """Whether a turn that waits could do something now."""
        start = turn.start
        return not isinstance(start, Turn) or start.after is not None or start.error is not None

    def _patience(self) -> float | None:
        return None if not self._waiting else 0.05

    def _cancel(self, turn: Turn) -> None:
        if turn.row is not None:
            if turn.row.reason is None:
                turn.row.reason = "stopped"
        elif not turn.ended:
            self._drop(turn, TurnCancelledError("the turn was cancelled before it began."))
            with self._recorder.lock:
                self._recorder.cancelled += 1

    def _drop(self, turn: Turn, error: Exception) -> None:
        """Fail a turn that waits."""
        if turn in self._waiting:
            self._waiting.remove(turn)
        self._count_waiting(-1)
        self._fail(turn, error)

    def _fail(self, turn: Turn, error: Exception) -> None:
        with self._recorder.lock:
            self._recorder.failed += 1
        turn.fail(error)

    def _count_waiting(self, change: int) -> None:
        with self._wake:
            self._num_waiting += change

    def _refuse_waiting(self, error: Exception) -> None:
        # What a turn that was accepted before is known to follow, may follow.
        for turn in list(self._waiting):
            self._drop(turn, error)

    def _refuse_all(self, error: Exception) -> None:
        with self._wake:
            self._waiting.extend(self._inbox)
            self._inbox.clear()
            calls, self._calls = self._calls, deque()
        for turn in (*self._waiting, *self._running.values(), *self._complete):
            if not turn.done:
                turn.fail(error)
        self._waiting.clear()
        self._running.clear()
        self._complete.clear()
        for _, future in calls:
            future.set_exception(error)

    def _end_late_turns(self) -> None:
        seconds = self._limits.request_timeout_seconds
        if seconds is None:
            return
        limit = time.perf_counter() - seconds
        for turn in [turn for turn in self._waiting if turn.submitted < limit]:
            message = f"the turn waited longer than {seconds} s for its place: try again later."
            self._drop(turn, TurnTimeoutError(message))
        for row, turn in self._running.items():
            if turn.submitted < limit and row.reason is None:
                row.reason = "stopped"

    # --- memory -----------------------------------------------------------------------------------

    def _write_memories(self) -> None:
        """Update one batch of memories: of complete turns first, then of turns that wait."""
        writes: list[_Write] = []
        longest = 0
        for turn in self._complete:
            assert turn.before is not None and turn.answer is not None
            longest = max(longest, len(turn.answer.turn))
            if writes and longest * (len(writes) + 1) > MOST_UPDATE_TOKENS:
                break
            writes.append(_Write(turn, turn.before, turn.answer.turn, None, False))
        for turn in self._waiting:
            if len(writes) >= 2 * self._limits.max_running:
                break
            write = self._next_write(turn)
            if write is None:
                continue
            longest = max(longest, len(write.ids))
            if writes and longest * (len(writes) + 1) > MOST_UPDATE_TOKENS:
                break
            writes.append(write)
        if writes:
            self._write_batch(writes)

    def _next_write(self, turn: Turn) -> _Write | None:
        """Return what has to be written before ``turn`` can begin; None if nothing (now)."""
        self._find_start(turn)
        if turn.before is None:
            return None
        if turn.pending_system is not None:
            return _Write(turn, turn.before, turn.pending_system, None, True)
        if turn.replays:
            replay = turn.replays[0]
            return _Write(turn, turn.before, replay.ids, replay, False)
        return None

    def _find_start(self, turn: Turn) -> None:
        """Set the state that a turn goes on from, if it is known by now."""
        if turn.before is not None:
            return
        start = turn.start
        if isinstance(start, ConversationState):
            turn.before = start
        elif isinstance(start, Turn):
            turn.before = start.after
            if turn.before is not None:
                # Not a chain of all turns that ever were.
                turn.start = turn.before
        elif (known := self._fresh.get(start)) is not None:
            turn.before = known
        else:
            turn.before = self._model.new_conversation(seed=start.seed)
            if start.system is not None:
                turn.pending_system = encode_system(self._model.require_tokenizer(), start.system)

    def _write_batch(self, writes: list[_Write]) -> None:
        """Write these turns into their memories; where a batch fails, one by one."""
        started = time.perf_counter()
        before = ConversationState.stack(
            [write.state.to(self._model.device, self._model.memory_dtype) for write in writes]
        )
        try:
            after = self._model.update_memory(before, [write.ids for write in writes])
        except (RuntimeError, UserError) as error:
            if len(writes) > 1:
                for write in writes:
                    self._write_batch([write])
            else:
                self._end_write(writes[0], error)
            return
        seconds = time.perf_counter() - started
        finite = is_finite(after)
        sizes = write_sizes(before.slots, after.slots)
        for index, write in enumerate(writes):
            if not finite[index]:
                message = "the memory after this turn is not finite: the model has diverged on it."
                self._end_write(write, RunError(message))
                continue
            state = after.select([index])
            if write.is_system:
                self._keep_fresh(write.turn, state.replaced(num_turns=(0,)))
            elif write.replay is not None:
                self._replayed(write.turn, write.replay, state, sizes[index])
            else:
                write.turn.after = state
                write.turn.memory_seconds, write.turn.write_size = seconds, sizes[index]
                self._complete.remove(write.turn)
                self._commit(write.turn)

    def _end_write(self, write: _Write, error: Exception) -> None:
        if write.turn in self._complete:
            self._complete.remove(write.turn)
            self._fail(write.turn, error)
        else:
            self._drop(write.turn, error)

    def _keep_fresh(self, turn: Turn, state: ConversationState) -> None:
        assert isinstance(turn.start, FreshStart)
        turn.before, turn.pending_system = state, None
        self._fresh[turn.start] = state
        while len(self._fresh) > MOST_FRESH:
            self._fresh.popitem(last=False)

    def _replayed(
        self, turn: Turn, replay: Replay, state: ConversationState, write_size: float
    ) -> None:
        turn.replays.popleft()
        turn.before = state
        if turn.request.store:
            row = replayed_row(turn, replay, state, write_size)
            self._committer.put(Commit((row,), None))
            turn.parent_id, turn.new_session = replay.turn_id, None

    def _commit(self, turn: Turn) -> None:
        self._committer.put(Commit((new_turn_row(turn),), turn))

    # --- answers ----------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Let turns that wait begin, in order, as far as there are places."""
        room = self._limits.max_running - len(self._running)
        if room < 1 or not self._waiting or self._is_behind:
            return
        joining: list[Turn] = []
        longest = 0
        for turn in list(self._waiting):
            if len(joining) == room:
                break
            if (error := failed_start(turn)) is not None:
                self._drop(turn, error)
                continue
            self._find_start(turn)
            if turn.before is None or turn.pending_system is not None or turn.replays:
                continue
            longest = max(longest, len(turn.prompt))
            if joining and longest * (len(joining) + 1) > MOST_PROMPT_TOKENS:
                break
            joining.append(turn)
        if joining:
            chosen = set(joining)
            self._waiting = deque(turn for turn in self._waiting if turn not in chosen)
            self._count_waiting(-len(joining))
            self._join(joining)

    def _join(self, turns: list[Turn]) -> None:
        """Read the prompts of turns and choose their first tokens; if it fails, one by one."""
        now = time.perf_counter()
        for turn in turns:
            self._prepare(turn, now)
        rows = [turn.row for turn in turns if turn.row is not None]
        state = ConversationState.stack(
            [
                turn.before.to(self._model.device, self._model.memory_dtype)
                for turn in turns
                if turn.before is not None
            ]
        )
        try:
            tokens = self._batch.join(state, rows)
        except (RuntimeError, UserError) as error:
            if len(turns) > 1:
                for turn in turns:
                    self._join([turn])
            else:
                self._fail(turns[0], error)
            return
        self._running |= dict(zip(rows, turns, strict=True))
        self._say(rows, tokens)

    def _prepare(self, turn: Turn, now: float) -> None:
        assert turn.before is not None
        if turn.request.seed is not None:
            turn.before = turn.before.replaced(seeds=(turn.request.seed,), draws=(0,))
        turn.admitted = now
        turn.row = answer_row(
            self._model,
            turn.prompt,
            AnswerLimits(None, turn.max_new_tokens),
            turn.form,
            turn.request.settings,
            turn.before.seeds[0],
            turn.before.draws[0],
        )

    def _step(self) -> None:
        """Choose one more token of every answer."""
        if any(row.reason is not None for row in self._batch.rows):
            # Cancelled or late: they leave before another token is made.
            self._say((), ())
            if not self._running:
                return
        try:
            tokens = self._batch.step()
        except RuntimeError as error:
            # Whose fault it was cannot be told. Those who wait may fare better.
            logger.exception("a decode step failed")
            for turn in self._running.values():
                self._fail(turn, error)
            self._running.clear()
            self._batch = AnswerBatch(self._model)
            return
        self._steps += 1
        with self._recorder.lock:
            self._recorder.steps += 1
            self._recorder.step_rows += len(tokens)
        self._say(self._batch.rows, tokens)

    def _say(self, rows: Sequence[AnswerRow], tokens: Sequence[int | None]) -> None:
        """Tell the readers what was chosen; see off the answers that have ended."""
        now = time.perf_counter()
        for row, token in zip(rows, tokens, strict=True):
            if token is None or token == row.eos_id:
                continue
            turn = self._running[row]
            if not turn.first_token:
                turn.first_token = now
            for piece in turn.text.push(token):
                turn.tell(DELTAS[piece.name](piece.text))
            if turn.text.stopped and row.reason is None:
                row.reason = "stopped"
        for row in self._batch.leave():
            turn = self._running.pop(row)
            error = self._batch.errors.pop(row, None)
            if error is not None:
                self._fail(turn, error)
            else:
                self._end(turn, row, now)

    def _end(self, turn: Turn, row: AnswerRow, now: float) -> None:
        """An answer is complete: its reader hears so, its memory is updated later."""
        assert turn.before is not None
        for piece in turn.text.flush():
            turn.tell(DELTAS[piece.name](piece.text))
        if turn.text.stopped:
            row.ids, row.reason = turn.text.cut(row.ids), "stopped"
        turn.answer, turn.answered = row.answer(), now
        turn.num_tokens = row.draws - turn.before.draws[0]
        turn.before = turn.before.replaced(draws=(row.draws,))
        said = parts_of_turn(self._model, turn.answer)
        turn.interaction = interaction_of(turn, said)
        self._record(turn)
        end = TurnEnd(turn.answer.reason, said["answer"], said.get("think"), said.get("tool_call"))
        if turn.request.store:
            self._complete.append(turn)
        turn.ended = True
        turn.tell(end)
        if not turn.request.store:
            turn.finish(untold_info(turn))

    def _record(self, turn: Turn) -> None:
        recorder, answer = self._recorder, turn.answer
        assert answer is not None
        with recorder.lock:
            recorder.turns += 1
            recorder.prompt_tokens += len(turn.prompt)
            recorder.answer_tokens += len(answer.ids)
            recorder.queue.add(turn.admitted - turn.submitted)
            recorder.turn.add(turn.answered - turn.submitted)
            if turn.first_token:
                recorder.first_token.add(turn.first_token - turn.submitted)
