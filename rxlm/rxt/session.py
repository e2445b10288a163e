"""A session: one conversation in text, with its turns, undo, forks and files.

    session = model.session(system="You are a helpful assistant.")
    for event in session.interact("Hi, I am Ann."):
        if isinstance(event, TextDelta):
            print(event.text, end="", flush=True)
    session.save("sessions/ann")

A model that thinks (RxTBeta) also has thinking modes, and tools that are run between interactions:

    session = model.session(tools={"weather": weather}, thinking_mode="auto")

Not here: the files (``session_files``), the events (``session_events``), one turn of it
(``session_turns``), how a turn is kept when its reader leaves (``held``), how a tool is run
(``tools``).
Shapes: L layers, S slots, D width.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

from rxlm.data.conversations import Interaction
from rxlm.errors import UserError
from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.answer_form import ThinkingMode
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.decode_compile import check_compiler
from rxlm.rxt.generation import AnswerLimits
from rxlm.rxt.held import (
    EarlyStop,
    HeldConversation,
    MemoryUpdate,
    OpenTurn,
    WrittenTurn,
    check_choice,
)
from rxlm.rxt.reactive import ReactiveModel
from rxlm.rxt.session_events import (
    Event,
    MemoryUpdated,
    Stats,
    TextDelta,
    ThinkDelta,
    ToolCallDelta,
    TurnEnd,
    write_size,
)
from rxlm.rxt.session_files import StoredSession, read_session, write_session
from rxlm.rxt.session_turns import checked_prompt, parts_of_turn, turn_events
from rxlm.rxt.tools import MAX_TOOL_ROUNDS, Tool, ToolResult, check_tools, refuse_call, run_tool

logger = logging.getLogger(__name__)

__all__ = [
    "UNDO_DEPTH",
    "Event",
    "MemoryUpdated",
    "Session",
    "Stats",
    "TextDelta",
    "ThinkDelta",
    "ToolCallDelta",
    "ToolResult",
    "TurnEnd",
    "write_size",
]

UNDO_DEPTH = 8
"""How many turns a session can take back by default: so many memories are kept."""


class _TurnOptions(NamedTuple):
    """How the interactions that follow one query are answered."""

    settings: SamplingSettings | None
    memory_update: MemoryUpdate
    on_early_stop: EarlyStop
    thinking_mode: ThinkingMode | None


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
        thinking_mode: ThinkingMode | None = None,
        tools: Mapping[str, Tool] | None = None,
        max_tool_rounds: int = MAX_TOOL_ROUNDS,
        compile_decode: bool = False,
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
            thinking_mode: of a model that thinks; None: 'auto'.
            tools: what a model that thinks may call, by name; None: calls are reported, not run.
            max_tool_rounds: calls that may follow one query; a call beyond is refused, and the
                model answers without another.
            compile_decode: run the steps of answers compiled: a minute at the first answer of a
                length, then faster (docs/benchmarks/decode.md). Not saved with the session.

        Raises:
            UserError: for what does not fit, for thinking or tools with a model that has none, and
                for ``compile_decode`` without a compiler.
        """
        model.require_tokenizer()
        if model.thinks:
            thinking_mode = thinking_mode or "auto"
        model.answer_form(thinking_mode)
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
            thinking_mode=thinking_mode,
        )
        self._take(model, stored, undo_depth)
        self.set_tools(tools, max_tool_rounds)
        self.set_compile_decode(compile_decode)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        model: ReactiveModel,
        *,
        tools: Mapping[str, Tool] | None = None,
        max_tool_rounds: int = MAX_TOOL_ROUNDS,
        compile_decode: bool = False,
    ) -> Session:
        """Return the session saved in ``directory``, as it was; tools are functions, not saved.

        Raises:
            UserError: if there is none, it is damaged, or another model wrote it (the message
                says whether architecture, tokenizer or weights differ).
        """
        stored = read_session(
            directory, model.fingerprint(), model.memory_shape, model.decoder.carried_shape
        )
        session = cls._from(model, stored, max(UNDO_DEPTH, len(stored.history)))
        session.set_tools(tools, max_tool_rounds)
        session.set_compile_decode(compile_decode)
        return session

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
        self.thinking_mode = stored.thinking_mode
        self.set_tools(None)
        self.compile_decode = False
        self._stopping = False
        self._turns = stored.turns
        self._history = stored.history
        self._held = HeldConversation(model, stored.state, self._on_commit)
        self._open: OpenTurn | None = None

    def set_tools(
        self, tools: Mapping[str, Tool] | None, max_tool_rounds: int = MAX_TOOL_ROUNDS
    ) -> None:
        """Choose what the model may call; see the constructor.

        Raises:
            UserError: if it is no mapping of names to functions, or the model calls no tools.
        """
        if tools is not None and not self.model.thinks:
            raise UserError(
                f"{type(self.model).__name__} calls no tools; only RxTBeta does "
                "(model.architecture: beta in a recipe). Leave 'tools' out."
            )
        if max_tool_rounds < 1:
            raise UserError(f"max_tool_rounds={max_tool_rounds} must be positive.")
        self._tools, self.max_tool_rounds = check_tools(tools), max_tool_rounds

    def set_compile_decode(self, compiled: bool) -> None:
        """Choose whether the steps of the answers to come run compiled; see the constructor.

        Raises:
            UserError: if they should and there is no compiler.
        """
        if compiled:
            check_compiler(self.model.device)
        self.compile_decode = compiled

    def set_thinking_mode(self, mode: str) -> None:
        """Choose the thinking mode of the turns to come.

        Raises:
            UserError: for an unknown mode, and for a model that does not think.
        """
        self.model.answer_form(cast("ThinkingMode", mode))
        self.thinking_mode = cast("ThinkingMode", mode)

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
        internal: str | None = None,
        thinking_mode: ThinkingMode | None = None,
    ) -> Iterator[Event]:
        """Say ``text`` and read the answer as events.

        Args:
            text: the query.
            settings: for this turn only; None: the session's.
            memory_update: 'inline', or 'background': the iterator ends without waiting for the
                update (and without :class:`MemoryUpdated`); the next use of the session waits.
            on_early_stop: whether a turn whose reader leaves is committed as far as the answer
                was read, or dropped.
            internal: context for this turn that is not the user's.
            thinking_mode: for this turn only; None: the session's.

        Returns:
            iterator of :class:`TextDelta` ..., :class:`TurnEnd`, :class:`MemoryUpdated`,
            :class:`Stats`. Of a model that thinks, :class:`ThinkDelta` before and
            :class:`ToolCallDelta` after the text. If it calls a tool and the session has tools,
            :class:`ToolResult` follows, and the events of the next interaction, which the result
            opens; and so on, ``max_tool_rounds`` times at most.

        Raises:
            UserError: at once, if the query does not fit; nothing is changed.
        """
        options = self._options(settings, memory_update, on_early_stop, thinking_mode)
        opened = self._open_turn({"query": text, "internal": internal}, options)
        return self._with_tools(opened, options)

    def tool_result(
        self,
        text: str,
        *,
        settings: SamplingSettings | None = None,
        memory_update: MemoryUpdate = "inline",
        on_early_stop: EarlyStop = "commit",
        internal: str | None = None,
        thinking_mode: ThinkingMode | None = None,
    ) -> Iterator[Event]:
        """Give the result of a tool call that the caller ran; all else as :meth:`interact`.

        Raises:
            UserError: at once, if it does not fit or the model calls no tools.
        """
        options = self._options(settings, memory_update, on_early_stop, thinking_mode)
        opened = self._open_turn({"tool_use": text, "internal": internal}, options)
        return self._with_tools(opened, options)

    def _options(
        self,
        settings: SamplingSettings | None,
        memory_update: MemoryUpdate,
        on_early_stop: EarlyStop,
        thinking_mode: ThinkingMode | None,
    ) -> _TurnOptions:
        check_choice("memory_update", memory_update, get_args(MemoryUpdate))
        check_choice("on_early_stop", on_early_stop, get_args(EarlyStop))
        mode = thinking_mode or self.thinking_mode
        return _TurnOptions(settings, memory_update, on_early_stop, mode)

    def _with_tools(
        self, opened: Generator[Event, None, TurnEnd], options: _TurnOptions
    ) -> Iterator[Event]:
        self._stopping = False
        end = yield from opened
        rounds = 0
        while self._tools and end.reason == "eos" and end.tool_call is not None:
            if self._was_stopped():
                return
            rounds += 1
            is_last = rounds > self.max_tool_rounds
            refused = refuse_call(self.max_tool_rounds)
            result = refused if is_last else run_tool(self._tools, end.tool_call)
            if not self._fits(result.text, options):
                # In as few words as can be: a long message would not fit either.
                result = ToolResult(result.name, "error: the result is too long", failed=True)
            yield result
            if self._was_stopped():
                return
            if not self._fits(result.text, options):
                logger.warning(
                    "max_seq_len=%s leaves no room for an answer to a tool's result, however "
                    "short: the turn ends after the call",
                    self.max_seq_len,
                )
                return
            given = {"tool_use": result.text}
            # The last interaction cannot call again, so there is an end.
            end = yield from self._open_turn(given, options, tool_calls=not is_last)

    def _was_stopped(self) -> bool:
        # Changes while events are read: :meth:`stop` is called by others.
        return self._stopping

    def _fits(self, result: str, options: _TurnOptions) -> bool:
        """Return whether a tool's result leaves room for an answer."""
        form = self.model.answer_form(options.thinking_mode)
        try:
            checked_prompt(self.model, {"tool_use": result}, form, self.max_seq_len)
        except UserError:
            return False
        return True

    def _open_turn(
        self, given: Mapping[str, str | None], options: _TurnOptions, tool_calls: bool = True
    ) -> Generator[Event, None, TurnEnd]:
        """Check at once that the turn fits; it is begun when its first event is asked for."""
        form = self.model.answer_form(options.thinking_mode, tool_calls)
        prompt = checked_prompt(self.model, given, form, self.max_seq_len)

        def events() -> Generator[Event, None, TurnEnd]:
            turn = self._held.begin(
                prompt,
                options.settings or self.settings,
                AnswerLimits(self.max_seq_len),
                query=given.get("query") or "",
                on_early_stop=options.on_early_stop,
                form=form,
                compile_decode=self.compile_decode,
            )
            self._open = turn
            with self._held.reading(turn):
                events = turn_events(self._held, turn, prompt, form, options.memory_update)
                return (yield from events)

        return events()

    def ask(self, text: str, *, settings: SamplingSettings | None = None) -> str:
        """Say ``text`` and return the whole answer; after tool calls, the last one."""
        answer = ""
        for event in self.interact(text, settings=settings):
            if isinstance(event, TurnEnd):
                answer = event.answer
        return answer

    def wait_for_memory(self) -> None:
        """Wait for a memory update in the background; raises what it raised (it is tried again at
        the next use)."""
        self._held.settle()

    def stop(self) -> None:
        """End the answer that is being read; its reader gets ``TurnEnd('stopped')`` next.

        May be called from another thread or a signal handler.
        """
        self._stopping = True
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
                f"memory before the last {kept} (undo_depth={self.undo_depth}); a session with a "
                "larger undo_depth keeps more."
            )
        self._held.replace(self._history[-num_turns])
        taken = self._turns[-num_turns:]
        self._history = self._history[:-num_turns]
        self._turns = self._turns[:-num_turns]
        return taken

    def retry(
        self, *, settings: SamplingSettings | None = None, memory_update: MemoryUpdate = "inline"
    ) -> Iterator[Event]:
        """Take back the last turn (with the tool results that followed) and ask its query again.

        The random draws go on instead of starting over, so that a sampled answer is a new one.
        """
        draws = self._held.state.draws
        asked = [index for index, turn in enumerate(self.turns) if turn.tool_use is None]
        turn = self.undo(max(1, len(self.turns) - asked[-1]) if asked else 1)[0]
        self._held.replace(self._held.state.replaced(draws=draws))
        options = self._options(settings, memory_update, "commit", None)
        given = {name: getattr(turn, name) for name in ("internal", "tool_use")}
        given["query"] = turn.query if turn.tool_use is None else None
        return self._with_tools(self._open_turn(given, options), options)

    def fork(self, name: str | None = None) -> Session:
        """Return a session that goes on from here by itself; neither affects the other."""
        stored = self._stored()._replace(session_id=uuid.uuid4().hex, name=name)
        session = self._from(self.model, stored, self.undo_depth)
        session._tools, session.max_tool_rounds = self._tools, self.max_tool_rounds
        session.compile_decode = self.compile_decode
        return session

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
            self.thinking_mode,
        )

    def _on_commit(self, written: WrittenTurn) -> None:
        said = parts_of_turn(self.model, written.answer)
        turn = Interaction(
            written.query,
            said["answer"],
            think=said.get("think"),
            tool_call=said.get("tool_call"),
            tool_use=said.get("tool_use"),
            internal=said.get("internal"),
        )
        self._turns = (*self._turns, turn)
        history = (*self._history, written.before)
        depth = self.undo_depth
        if depth and self._tools:
            # A query is taken back with all interactions of its tools.
            depth = max(depth, self.max_tool_rounds + 2)
        self._history = history[max(0, len(history) - depth) :]
