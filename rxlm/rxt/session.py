"""A session: one conversation in text, with its turns, undo, forks and files.

    session = model.session(system="You are a helpful assistant.")
    for event in session.interact("Hi, I am Ann."):
        if isinstance(event, TextDelta):
            print(event.text, end="", flush=True)
    session.save("sessions/ann")

Not here: the files (``session_files``), how a turn is kept when its reader leaves (``held``).
Shapes: L layers, S slots, D width.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from rxlm.data.conversations import Interaction
from rxlm.errors import UserError
from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.generation import AnswerLimits, StopReason, answer_room, with_answer_token
from rxlm.rxt.held import (
    EarlyStop,
    HeldConversation,
    MemoryUpdate,
    OpenTurn,
    WrittenTurn,
    check_choice,
)
from rxlm.rxt.reactive import ReactiveModel
from rxlm.rxt.session_files import StoredSession, read_session, write_session
from rxlm.tokenization import encode_query

UNDO_DEPTH = 8
"""How many turns a session can take back by default: so many memories are kept."""


@dataclass(frozen=True)
class TextDelta:
    """A piece of the answer: complete characters only."""

    text: str


@dataclass(frozen=True)
class TurnEnd:
    """The answer is complete: ended by the model, cut by length, or stopped."""

    reason: StopReason
    answer: str


@dataclass(frozen=True)
class MemoryUpdated:
    """The memory holds the turn. ``write_size``: how much it changed, the norm of the difference
    over the larger of the norms before and after."""

    write_size: float


@dataclass(frozen=True)
class Stats:
    """What the turn cost. ``tokens`` were chosen in ``seconds`` of computing (waiting for the
    reader is not counted); ``memory_seconds`` is None when the update runs in the background."""

    tokens: int
    seconds: float
    tokens_per_second: float
    memory_seconds: float | None


Event = TextDelta | TurnEnd | MemoryUpdated | Stats


class Session:
    """One conversation with a model. For one thread at a time, :meth:`stop` excepted."""

    def __init__(
        self,
        model: ReactiveModel,
        *,
        system: str | None = None,
        seed: int = 0,
        settings: SamplingSettings | dict[str, Any] | None = None,
        name: str | None = None,
        max_seq_len: int | None = None,
        undo_depth: int = UNDO_DEPTH,
    ) -> None:
        """Start a conversation.

        Args:
            model: with a tokenizer.
            system: a system prompt, written into memory first.
            seed: of the session's random draws.
            settings: how tokens are chosen; None: temperature 1.
            name: for people; also the id of the conversation in ``turns.jsonl``.
            max_seq_len: tokens of a whole turn at which answers are cut; None: the model's.
            undo_depth: how many turns can be taken back.
        """
        model.require_tokenizer()
        stored = StoredSession(
            session_id=uuid.uuid4().hex,
            name=name,
            system=system,
            settings=SamplingSettings.parse(settings or {}, "settings"),
            max_seq_len=max_seq_len,
            turns=(),
            state=model.new_conversation(seed=seed, system=system),
            history=(),
            fingerprint=model.fingerprint(),
        )
        self._take(model, stored, undo_depth)

    @classmethod
    def load(cls, directory: str | Path, model: ReactiveModel) -> Session:
        """Return the session saved in ``directory``, as it was.

        Raises:
            UserError: if there is none, it is damaged, or another model wrote it (the message
                says whether architecture, tokenizer or weights differ).
        """
        stored = read_session(
            directory, model.fingerprint(), model.memory_shape, model.decoder.carried_shape
        )
        return cls._from(model, stored, max(UNDO_DEPTH, len(stored.history)))

    @classmethod
    def _from(cls, model: ReactiveModel, stored: StoredSession, undo_depth: int) -> Session:
        session = cls.__new__(cls)
        session._take(model, stored, undo_depth)
        return session

    def _take(self, model: ReactiveModel, stored: StoredSession, undo_depth: int) -> None:
        self.model = model
        self.session_id = stored.session_id
        self.name = stored.name
        self.system = stored.system
        self.settings = stored.settings
        self.max_seq_len = stored.max_seq_len
        self.undo_depth = undo_depth
        self._turns = stored.turns
        self._history = stored.history
        self._held = HeldConversation(model, stored.state, self._on_commit)
        self._open: OpenTurn | None = None

    @property
    def state(self) -> ConversationState:
        """The conversation as a value; waits for the memory update."""
        return self._held.state

    @property
    def turns(self) -> tuple[Interaction, ...]:
        """What was said, oldest first; waits for the memory update."""
        self._held.settle()
        return self._turns

    def interact(
        self,
        text: str,
        *,
        settings: SamplingSettings | None = None,
        memory_update: MemoryUpdate = "inline",
        on_early_stop: EarlyStop = "commit",
    ) -> Iterator[Event]:
        """Say ``text`` and read the answer as events.

        Args:
            text: the query.
            settings: for this turn only; None: the session's.
            memory_update: 'inline', or 'background': the iterator ends without waiting for the
                update (and without :class:`MemoryUpdated`); the next use of the session waits.
            on_early_stop: whether a turn whose reader leaves is committed as far as the answer
                was read, or dropped.

        Returns:
            iterator of :class:`TextDelta` ..., :class:`TurnEnd`, :class:`MemoryUpdated`,
            :class:`Stats`.

        Raises:
            UserError: at once, if the query does not fit; nothing is changed.
        """
        check_choice("memory_update", memory_update, get_args(MemoryUpdate))
        check_choice("on_early_stop", on_early_stop, get_args(EarlyStop))
        ids = encode_query(self.model.require_tokenizer(), text)
        prompt = with_answer_token(ids, self.model.config.tokenizer.answer_token_id)
        limits = AnswerLimits(self.max_seq_len)
        answer_room(self.model, prompt, limits)

        def events() -> Iterator[Event]:
            turn = self._held.begin(
                prompt,
                settings or self.settings,
                limits,
                query=text,
                on_early_stop=on_early_stop,
            )
            self._open = turn
            with self._held.reading(turn):
                yield from self._events(turn, memory_update)

        return events()

    def _events(self, turn: OpenTurn, memory_update: MemoryUpdate) -> Iterator[Event]:
        tokenizer = self.model.require_tokenizer()
        text = tokenizer.stream()
        tokens = self._held.tokens(turn)
        seconds = 0.0
        while True:
            started = time.perf_counter()
            token = next(tokens, None)
            seconds += time.perf_counter() - started
            delta = text.flush() if token is None else text.push(token)
            if delta:
                yield TextDelta(delta)
            if token is None:
                break
        answer = turn.stream.answers()[0]
        num_tokens = turn.stream.num_tokens
        memory_seconds = None
        if memory_update == "background":
            self._held.commit_in_background(turn)
            yield TurnEnd(answer.reason, tokenizer.decode(answer.ids))
        else:
            yield TurnEnd(answer.reason, tokenizer.decode(answer.ids))
            written = self._held.commit(turn)
            memory_seconds = written.seconds
            yield MemoryUpdated(write_size(written))
        yield Stats(num_tokens, seconds, num_tokens / max(seconds, 1e-9), memory_seconds)

    def ask(self, text: str, *, settings: SamplingSettings | None = None) -> str:
        """Say ``text`` and return the whole answer."""
        answer = ""
        for event in self.interact(text, settings=settings):
            if isinstance(event, TurnEnd):
                answer = event.answer
        return answer

    def stop(self) -> None:
        """End the answer that is being read; its reader gets ``TurnEnd('stopped')`` next.

        May be called from another thread or a signal handler.
        """
        if self._open is not None:
            self._open.stream.stop()

    def undo(self, num_turns: int = 1) -> tuple[Interaction, ...]:
        """Take back the last turns: memory, randomness and text are as before them.

        Returns:
            the turns taken back, oldest first.

        Raises:
            UserError: if not so many can be taken back; nothing changes then.
        """
        self._held.settle()
        if num_turns < 1:
            raise UserError(f"num_turns={num_turns} must be positive.")
        if num_turns > len(self._history):
            kept = len(self._history)
            raise UserError(
                f"cannot take back {num_turns} of {len(self._turns)} turns: the session keeps the "
                f"memory before the last {kept} (undo_depth={self.undo_depth})."
            )
        self._held.replace(self._history[-num_turns])
        taken = self._turns[-num_turns:]
        self._history = self._history[:-num_turns]
        self._turns = self._turns[:-num_turns]
        return taken

    def retry(
        self, *, settings: SamplingSettings | None = None, memory_update: MemoryUpdate = "inline"
    ) -> Iterator[Event]:
        """Take back the last turn and ask its query again.

        The random draws go on instead of starting over, so that a sampled answer is a new one.
        """
        draws = self._held.state.draws
        (turn,) = self.undo()
        self._held.replace(self._held.state.replaced(draws=draws))
        return self.interact(turn.query, settings=settings, memory_update=memory_update)

    def fork(self, name: str | None = None) -> Session:
        """Return a session that goes on from here by itself; neither affects the other."""
        stored = self._stored()._replace(session_id=uuid.uuid4().hex, name=name)
        return self._from(self.model, stored, self.undo_depth)

    def save(self, directory: str | Path, overwrite: bool = False) -> None:
        """Write the session; waits for the memory update.

        Args:
            directory: made if missing. A folder of this very session is updated.
            overwrite: whether another session's folder may be replaced.

        Raises:
            UserError: if the folder holds another session or something else.
            RunError: if the disk refuses; what was saved before is intact.
        """
        write_session(directory, self._stored(), overwrite)

    def _stored(self) -> StoredSession:
        state = self._held.state
        return StoredSession(
            self.session_id,
            self.name,
            self.system,
            self.settings,
            self.max_seq_len,
            self._turns,
            state,
            self._history,
            self.model.fingerprint(),
        )

    def _on_commit(self, written: WrittenTurn) -> None:
        text = self.model.require_tokenizer().decode(written.answer.ids)
        self._turns = (*self._turns, Interaction(written.query, text))
        history = (*self._history, written.before)
        self._history = history[max(0, len(history) - self.undo_depth) :]


def write_size(written: WrittenTurn) -> float:
    """Return how much a turn changed the memory: 0 not at all, 1 (about) altogether."""
    before, after = written.before.slots.float(), written.after.slots.float()
    larger = max(float(torch.linalg.vector_norm(before)), float(torch.linalg.vector_norm(after)))
    if larger == 0.0:
        return 0.0
    return float(torch.linalg.vector_norm(after - before.to(after.device))) / larger
