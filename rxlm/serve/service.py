"""Conversations with one model, many at once: what HTTP, a chat page and tests talk to.

    service = ConversationService(model, Path("store"), ServeLimits(), model_name="nano")
    session = service.create(system="You are a helpful assistant.")
    handle = service.submit(session.session_id, TurnRequest("Hi, I am Ann."))
    for event in handle.events():
        ...

A store (what was said and remembered) and an engine (the thread that computes) behind one set of
calls, each of which may be made from any thread. What a conversation says is what
``model.session()`` with the same seed says, token for token, whatever others do meanwhile.
Folders of single sessions: ``transfer``.
"""

from __future__ import annotations

import re
import secrets
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from rxlm.data.conversations import Interaction
from rxlm.errors import UserError
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.generation import AnswerLimits, answer_room, turn_limit
from rxlm.rxt.reactive import ReactiveModel
from rxlm.rxt.session_turns import checked_prompt
from rxlm.serve.answer_text import AnswerText, check_stops
from rxlm.serve.committer import Committer
from rxlm.serve.engine import Engine
from rxlm.serve.interface import (
    BusyError,
    MemoryView,
    NotFoundError,
    ServeLimits,
    ServiceStats,
    SessionInfo,
    TooManySessionsError,
    TurnHandle,
    TurnInfo,
    TurnRequest,
)
from rxlm.serve.memory_view import memory_view
from rxlm.serve.recorder import Recorder
from rxlm.serve.running import RunningTurns
from rxlm.serve.state_files import StateShape
from rxlm.serve.store import SessionStore
from rxlm.serve.store_rows import NewSession
from rxlm.serve.transfer import read_folder, write_folder
from rxlm.serve.turn import FreshStart, Replay, Turn
from rxlm.tokenization import encode_system, render_parts

_SESSION_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_SEEDS = 1 << 31


class ConversationService:
    """See the module. Close it, or use it as a context manager."""

    def __init__(
        self, model: ReactiveModel, folder: Path | None, limits: ServeLimits, *, model_name: str
    ) -> None:
        """Open the store and start the engine.

        Args:
            model: with a tokenizer; nobody else may use it from now on.
            folder: of the store, made if missing; None: a temporary one, gone at the end.
            limits: of everything.
            model_name: what the model is called.

        Raises:
            UserError: if the model has no tokenizer, or the store is open elsewhere or belongs to
                another model.
            RunError: if the store cannot be read.
        """
        model.require_tokenizer()
        self.model_name, self.created = model_name, int(time.time())
        self._model, self._limits = model, limits
        self._temporary = None
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="rxlm-store-")
            folder = Path(self._temporary.name)
        self._store = SessionStore(
            folder,
            model.fingerprint(),
            StateShape(model.memory_shape, model.decoder.carried_shape),
            keep_versions=limits.keep_versions,
            cached_states=limits.cached_states,
        )
        self._recorder = Recorder()
        self._committer = Committer(self._store, limits, self._recorder)
        self._engine = Engine(model, self._committer, limits, self._recorder)
        self._turns = RunningTurns()
        self._creating = threading.Lock()
        self._closed = False

    def __enter__(self) -> ConversationService:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- sessions ---------------------------------------------------------------------------------

    def create(
        self,
        *,
        system: str | None = None,
        name: str | None = None,
        metadata: dict[str, str] | None = None,
        seed: int | None = None,
        session_id: str | None = None,
    ) -> SessionInfo:
        """Make a session.

        Args:
            system: a system prompt, the first that its memory will hold.
            name: for people.
            metadata: the caller's own, kept with it.
            seed: of its random draws; None: a random one.
            session_id: None: ``sess_`` and 24 hexadecimal digits.

        Raises:
            UserError: if the system prompt is too long, or the id is taken or not a plain name.
            TooManySessionsError: if there are ``max_sessions``.
        """
        self._engine.check_open()
        self._check_system(system)
        if session_id is not None and not _SESSION_ID.fullmatch(session_id):
            raise UserError(
                f"session_id={session_id!r}: use up to 64 letters, digits, and any of _ . -"
            )
        return self._add(
            NewSession(
                session_id or _new_id("sess"),
                system,
                secrets.randbelow(_SEEDS) if seed is None else seed,
                time.time(),
                name,
                metadata,
            )
        )

    def sessions(self, *, limit: int = 50, after: str | None = None) -> list[SessionInfo]:
        """Return sessions, those used last first; ``after``: from the one after this one on."""
        return [self._with_state(info) for info in self._store.sessions(limit, after)]

    def session(self, session_id: str) -> SessionInfo:
        """Return a session; raise ``NotFoundError`` if there is none."""
        return self._with_state(self._store.session(session_id))

    def rename(self, session_id: str, name: str) -> SessionInfo:
        """Give a session another name."""
        return self._with_state(self._store.rename(session_id, name))

    def fork(
        self, session_id: str, *, at_turn: str | None = None, name: str | None = None
    ) -> SessionInfo:
        """Make a session that goes on from a turn of this one; neither affects the other.

        Args:
            session_id: the session.
            at_turn: one of its turns; None: its head.
            name: of the new one.

        Raises:
            NotFoundError: if there is no such session or turn, or its memory is not kept any more.
            BusyError: if the head is asked for and a turn is being answered.
        """
        if at_turn is None:
            self._settle(session_id)
        info = self._store.session(session_id)
        head = info.head if at_turn is None else at_turn
        if at_turn is not None and not self._store.holds(session_id, at_turn):
            raise NotFoundError(f"session {session_id!r} has no turn {at_turn!r}.")
        if head is not None:
            # Whether it can be gone on from is known now, not at the first turn.
            self._store.state(head)
        return self._add(
            NewSession(
                _new_id("sess"),
                info.system,
                info.seed,
                time.time(),
                name,
                info.metadata,
                head,
                len(self._store.turns(head)),
                (session_id, head),
            )
        )

    def undo(self, session_id: str, num_turns: int = 1) -> list[TurnInfo]:
        """Take back the last turns of a session; return them, oldest first.

        Raises:
            UserError: if so many cannot be taken back; nothing changes then.
            BusyError: if a turn is being answered.
        """
        with self._turns.alone(session_id):
            self._settle(session_id)
            return self._store.undo(session_id, num_turns)

    def delete(self, session_id: str) -> None:
        """Delete a session: an answer under way ends, text and memory are gone from the disk.
        Turns that a fork goes on from stay with the fork."""
        with self._turns.alone(session_id):
            self._store.session(session_id)
            last = self._turns.last(session_id)
            if last is not None:
                last.cancel()
                last.wait()
            self._store.delete(session_id)

    def export(self, session_id: str, folder: Path) -> None:
        """Write a session as a folder that ``Session.load`` reads; ``turns.jsonl`` in it is
        training data.

        Raises:
            UserError: if the folder holds something else.
            BusyError: if a turn is being answered.
        """
        self._settle(session_id)
        info = self._store.session(session_id)
        fresh = FreshStart(info.system, info.seed)
        write_folder(folder, self._model, self._store, info, lambda: self._fresh_state(fresh))

    def import_session(self, folder: Path, name: str | None = None) -> SessionInfo:
        """Make a session of a folder that :meth:`export` or ``Session.save`` wrote.

        Raises:
            UserError: if there is none, it is damaged, or another model wrote it.
        """
        self._engine.check_open()
        session, turns = read_folder(folder, self._model, name, _new_id)
        self._add(session)
        for result in self._store.commit(turns):
            if isinstance(result, Exception):
                raise result
        return self.session(session.session_id)

    def memory(self, session_id: str) -> MemoryView:
        """Return what the last turn of a session did to its memory."""
        info = self._store.session(session_id)
        path = self._store.turns(info.head)[-2:]
        fresh = FreshStart(info.system, info.seed)
        states = [self._store.state(turn.turn_id) for turn in path]
        if len(states) < 2:
            states.insert(0, self._fresh_state(fresh))
        return memory_view(info.head, states[0], states[-1])

    # --- turns ------------------------------------------------------------------------------------

    def turns(self, session_id: str) -> list[TurnInfo]:
        """Return the turns of a session, the first first; one under way is not among them."""
        return self._store.turns(self._store.session(session_id).head)

    def turn(self, turn_id: str) -> TurnInfo:
        """Return a turn, whoever said it; raise ``NotFoundError`` if there is none."""
        return self._store.turn(turn_id)

    def delete_turn(self, turn_id: str) -> None:
        """Forget a turn of no session; raise ``UserError`` if it belongs to one."""
        self._store.forget(turn_id)

    def find_prefix(
        self, system: str | None, turns: Sequence[tuple[str, str]]
    ) -> tuple[str | None, int]:
        """Return the turn whose memory holds the most of ``turns``, and how many of them.

        Args:
            system: the system prompt before them.
            turns: queries and answers, the first first.

        Returns:
            (None, 0) if no memory holds any.
        """
        return self._store.find(system, turns)

    def submit(self, session_id: str, request: TurnRequest) -> TurnHandle:
        """Ask a session.

        Raises:
            NotFoundError: if there is none.
            BusyError: if a turn of it is being answered. One whose answer is complete is no
                hindrance, though its memory update may still be under way.
            QueueFullError: if too many turns wait.
            StateDamagedError: if the memory it would go on from cannot be read.
            UserError: if the query does not fit.
        """
        with self._turns.alone(session_id):
            # In this order: a turn that is done by now is in the store by then.
            last = self._turns.last(session_id)
            info = self._store.session(session_id)
            turn = self._new_turn(session_id, session_id, request)
            if last is not None and not last.ended:
                raise BusyError(
                    f"a turn of session {session_id!r} is being answered: read it or cancel it."
                )
            if last is not None and not last.done and last.request.store:
                turn.start, turn.parent_id = last, last.turn_id
            elif info.head is not None:
                turn.start, turn.parent_id = self._store.state(info.head), info.head
            else:
                turn.start = FreshStart(info.system, info.seed)
            return self._begin(turn)

    def submit_detached(
        self,
        request: TurnRequest,
        *,
        system: str | None,
        turns: Sequence[Interaction],
        at_turn: str | None,
    ) -> TurnHandle:
        """Ask a conversation that is no session: it goes on from any turn, or begins.

        The turn (and those that are replayed) can be found, and gone on from, later; no session is
        changed.

        Args:
            request: the turn.
            system: the system prompt; with ``at_turn``: None, or the one there.
            turns: what was said since ``at_turn`` and is not in its memory: read into memory turn
                by turn before the query is answered.
            at_turn: a turn of anybody (:meth:`find_prefix`); None: the conversation begins.

        Raises:
            NotFoundError: if there is no such turn, or its memory is not kept any more.
            BusyError: if it is being answered.
            QueueFullError, StateDamagedError, UserError: as :meth:`submit`.
        """
        if len(turns) > self._limits.max_replayed_turns:
            raise UserError(
                f"{len(turns)} earlier turns would have to be read into memory; at most "
                f"{self._limits.max_replayed_turns} are: go on from a known turn."
            )
        replays = [self._replay(interaction) for interaction in turns]
        if at_turn is None:
            turn = self._first_turn(request, system)
            turn.replays.extend(replays)
            return self._begin(turn)
        before = self._turns.pending(at_turn)
        if before is not None:
            if not before.ended:
                raise BusyError(f"turn {at_turn} is being answered: wait for its end.")
            before.wait()
        with self._turns.alone(self._store.origin(at_turn).session_id):
            turn = self._next_turn(request, system, at_turn)
            turn.replays.extend(replays)
            return self._begin(turn)

    def _first_turn(self, request: TurnRequest, system: str | None) -> Turn:
        """Return the first turn of a conversation that is no session."""
        self._check_system(system)
        seed = secrets.randbelow(_SEEDS) if request.seed is None else request.seed
        turn = self._new_turn(None, _new_id("conv"), request)
        turn.start = FreshStart(system, seed)
        turn.new_session = NewSession(turn.owner_id, system, seed, turn.created, detached=True)
        return turn

    def _next_turn(self, request: TurnRequest, system: str | None, at_turn: str) -> Turn:
        """Return a turn after ``at_turn``: of the conversation that ends there, if it is detached
        and nothing else follows, else of a new one."""
        session_id = self._store.origin(at_turn).session_id
        # In this order: a turn that is done by now has moved the head by then.
        follower = self._turns.last(session_id)
        origin = self._store.origin(at_turn)
        if system is not None and system != origin.system:
            raise UserError(
                f"turn {at_turn} has another system prompt: leave it out, or begin anew."
            )
        goes_on = origin.is_detached and origin.is_head and follower is None
        owner_id = origin.session_id if goes_on else _new_id("conv")
        turn = self._new_turn(None, owner_id, request)
        turn.start, turn.parent_id = self._store.state(at_turn), at_turn
        if not goes_on:
            turn.new_session = NewSession(
                owner_id, origin.system, origin.seed, turn.created, detached=True
            )
        return turn

    # --- the service ------------------------------------------------------------------------------

    def stats(self) -> ServiceStats:
        """Return what is going on, and was since the start."""
        counts, recorder = self._store.counts(), self._recorder
        with recorder.lock:
            return ServiceStats(
                running=self._engine.num_running,
                queued=self._engine.num_waiting,
                updating=self._engine.num_updating,
                sessions=counts.sessions,
                detached=counts.detached,
                turns=recorder.turns,
                failed_turns=recorder.failed,
                refused_turns=recorder.refused,
                cancelled_turns=recorder.cancelled,
                prompt_tokens=recorder.prompt_tokens,
                answer_tokens=recorder.answer_tokens,
                steps=recorder.steps,
                step_rows=recorder.step_rows,
                state_files=counts.state_files,
                state_bytes=counts.state_bytes,
                started=recorder.started,
                first_token=recorder.first_token.value(),
                turn=recorder.turn.value(),
                commit=recorder.commit.value(),
                queue=recorder.queue.value(),
            )

    def close(self, timeout: float | None = None) -> None:
        """Finish and commit the answers under way, refuse those that wait and all that follow.

        Args:
            timeout: seconds after which answers are ended where they are (and committed); None:
                as long as they take.
        """
        if self._closed:
            return
        self._closed = True
        self._engine.close(timeout)
        self._committer.close()
        self._store.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    # --- parts ------------------------------------------------------------------------------------

    def _add(self, session: NewSession) -> SessionInfo:
        with self._creating:
            if self._store.num_sessions() >= self._limits.max_sessions:
                raise TooManySessionsError(
                    f"there are {self._limits.max_sessions} sessions: delete some."
                )
            return self._with_state(self._store.add_session(session))

    def _with_state(self, info: SessionInfo) -> SessionInfo:
        last = self._turns.last(info.session_id)
        if last is None or last.ended:
            return info
        return SessionInfo(**{**vars(info), "busy": True})

    def _settle(self, session_id: str) -> None:
        """Wait for the memory of the last answer; raise ``BusyError`` if there is no answer yet."""
        last = self._turns.last(session_id)
        if last is None:
            return
        if not last.ended:
            raise BusyError(
                f"a turn of session {session_id!r} is being answered: read it or cancel it."
            )
        last.wait()

    def _new_turn(self, session_id: str | None, owner_id: str, request: TurnRequest) -> Turn:
        """Check a request; return its turn, whose start the caller sets."""
        self._engine.check_open()
        self._check_chars("the query", request.query)
        self._check_chars("internal context", request.internal)
        self._check_chars("a tool's result", request.tool_use)
        check_stops(request.stop)
        model = self._model
        form = model.answer_form(request.thinking_mode)
        given = {"tool_use": request.tool_use, "internal": request.internal}
        if request.tool_use is None or request.query:
            given["query"] = request.query
        prompt = checked_prompt(model, given, form, None)
        most = self._limits.max_new_tokens
        wanted = most if request.max_tokens is None else min(most, request.max_tokens)
        answer_room(model, prompt, AnswerLimits(None, wanted), form)
        opening = "answer" if form is None else form.part_of(form.opening_of(prompt))
        turn = Turn(
            _new_id("resp"),
            session_id,
            owner_id,
            request,
            prompt,
            form,
            FreshStart(None, 0),
            AnswerText(model.require_tokenizer(), opening, request.stop),
            self._engine.cancel,
            self._turns.done,
        )
        turn.max_new_tokens = wanted
        return turn

    def _begin(self, turn: Turn) -> TurnHandle:
        self._turns.add(turn)
        try:
            self._engine.submit(turn)
        except Exception:
            self._turns.done(turn)
            raise
        return turn

    def _replay(self, interaction: Interaction) -> Replay:
        parts = interaction.parts()
        for name, text in parts.items():
            self._check_chars(name, text)
        ids = list(render_parts(self._model.require_tokenizer(), parts).ids)
        limit = turn_limit(self._model)
        if len(ids) > limit:
            raise UserError(f"an earlier turn has {len(ids)} tokens; a turn has at most {limit}.")
        return Replay(_new_id("resp"), ids, interaction)

    def _check_system(self, system: str | None) -> None:
        if system is None:
            return
        self._check_chars("the system prompt", system)
        num_tokens = len(encode_system(self._model.require_tokenizer(), system))
        limit = turn_limit(self._model)
        if num_tokens > limit:
            raise UserError(
                f"the system prompt has {num_tokens} tokens; it may have {limit}: shorten it."
            )

    def _check_chars(self, what: str, text: str | None) -> None:
        most = self._limits.max_query_chars
        if text is not None and len(text) > most:
            raise UserError(f"{what} has {len(text)} characters; at most {most} are read.")

    def _fresh_state(self, fresh: FreshStart) -> ConversationState:
        def make() -> ConversationState:
            with torch.no_grad():
                return self._model.new_conversation(seed=fresh.seed, system=fresh.system)

        return self._engine.call(make).result()


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"
