"""The conversation behind ``rxlm chat``: lines in, streamed answers and slash commands out.

Lines come from anywhere (a terminal, a pipe, a test), and all that is shown goes to a
:class:`Screen`. Not here: options and signals (``chat``), line editing and Markdown
(``chat_terminal``).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rxlm.errors import RunError, UserError

if TYPE_CHECKING:
    from rxlm.ops.sampling import SamplingSettings
    from rxlm.rxt.models import RxTAlpha
    from rxlm.rxt.session import Event, Session, Stats, TurnEnd

COMMANDS = {
    "/new": "/new [NAME]     start over with an empty memory (and keep it as NAME)",
    "/save": "/save [NAME]    save now, and after every turn from now on",
    "/load": "/load NAME      go on with a saved conversation",
    "/undo": "/undo [N]       forget the last turn (or the last N)",
    "/retry": "/retry          forget the last answer and ask again",
    "/think": "/think [MODE]   fast, extended or auto, for a model that thinks",
    "/memory": "/memory         what the memory looks like",
    "/stats": "/stats          speed of the last answer, length of the conversation",
    "/help": "/help           this list",
    "/quit": "/quit           leave (also Ctrl-D)",
}
TAKE_A_WORD = ("/new", "/save", "/load", "/undo", "/think")
_NAME = re.compile(r"\w[\w.-]*\Z")
RETRY_TEMPERATURE = 0.8
"""Greedy decoding would only repeat its answer."""


class Screen(Protocol):
    """Where a conversation is shown."""

    def say(self, text: str) -> None:
        """Show a piece of an answer, as it comes."""

    def end_answer(self) -> None:
        """Take note that the answer is complete."""

    def tell(self, text: str) -> None:
        """Show a line about the conversation."""

    def status(self, text: str) -> None:
        """Show what the turn cost and did to the memory."""


class Lines:
    """A screen of plain text; what a turn cost is told only when asked for (``/stats``)."""

    def __init__(self, say: Callable[[str], None], tell: Callable[[str], None]) -> None:
        """``say`` shows pieces of answers, ``tell`` lines about the conversation."""
        self.say, self.tell = say, tell

    def end_answer(self) -> None:
        """End the line of the answer."""
        self.say("\n")

    def status(self, text: str) -> None:
        """Show nothing: a pipe holds answers, and notes only where something is amiss."""


class Chat:
    """One conversation at a time, saved after every turn once it has a name."""

    def __init__(
        self,
        model: RxTAlpha,
        folder: Path,
        screen: Screen,
        *,
        system: str | None = None,
        seed: int = 0,
        settings: SamplingSettings | None = None,
        compile_decode: bool = False,
    ) -> None:
        """Begin an unsaved conversation.

        Args:
            model: with its tokenizer.
            folder: where saved conversations lie, a folder each.
            screen: shows answers, and what is to be told about the conversation.
            system: system prompt of new conversations.
            seed: of their random draws.
            settings: how tokens are chosen; None: greedy, or as a loaded conversation has it.
            compile_decode: run the steps of answers compiled.

        Raises:
            UserError: for ``compile_decode`` without a compiler.
        """
        self.model = model
        self.folder = folder
        self.name: str | None = None
        self.screen = screen
        self._system, self._seed, self._settings = system, seed, settings
        self._compile_decode = compile_decode
        self._stats: Stats | None = None
        self._write_size: float | None = None
        self.session = self._new_session()

    def open(self, name: str) -> None:
        """Go on with the conversation ``name``, or begin it.

        Raises:
            UserError: when it cannot be read or is another model's.
        """
        if (self._path(name) / "meta.json").exists():
            self.load(name)
        else:
            self.name = name
            self.session.name = name

    def load(self, name: str) -> None:
        """Go on with a saved conversation.

        Raises:
            UserError: when there is none of that name, or it cannot be read.
        """
        path = self._path(name)
        if not path.is_dir():
            saved = ", ".join(self.saved()) or "none"
            raise UserError(f"no conversation '{name}' in {self.folder} (there is: {saved}).")
        from rxlm.rxt.session import Session

        self.session = Session.load(path, self.model, compile_decode=self._compile_decode)
        if self._settings is not None:
            self.session.settings = self._settings
        self.name = name
        self._stats = self._write_size = None
        self.screen.tell(f"going on with '{name}' after {len(self.session.turns)} turns")

    def saved(self) -> list[str]:
        """Return the names of the saved conversations."""
        return sorted(path.parent.name for path in self.folder.glob("*/meta.json"))

    def run(self, lines: Iterable[str], *, forgiving: bool) -> None:
        """Answer lines until they end or say ``/quit``.

        Args:
            lines: what the user says, and slash commands; ``//text`` says ``/text``.
            forgiving: whether errors are only reported.

        Raises:
            UserError: for a line that cannot be used, unless ``forgiving``.
            RunError: when the conversation cannot be saved, unless ``forgiving``.
        """
        for line in lines:
            text = line.strip()
            if not text:
                continue
            try:
                if text.startswith("/") and not text.startswith("//"):
                    if not self._command(*text.split()):
                        return
                else:
                    self.answer(text[1:] if text.startswith("//") else text)
            except (UserError, RunError) as error:
                if not forgiving:
                    raise
                self.screen.tell(str(error))

    def answer(self, text: str) -> None:
        """Answer one query, then save if the conversation has a name."""
        self._show(self.session.interact(text))

    def _show(self, events: Iterator[Event]) -> None:
        from rxlm.rxt.session import MemoryUpdated, Stats, TextDelta, ThinkDelta, TurnEnd

        thoughts = ""
        for event in events:
            if isinstance(event, ThinkDelta):
                thoughts += event.text
                continue
            if thoughts:
                self.screen.tell(f"[thinks] {thoughts.strip()}")
                thoughts = ""
            if isinstance(event, TextDelta):
                self.screen.say(event.text)
            elif isinstance(event, TurnEnd):
                self._show_end(event)
            elif isinstance(event, MemoryUpdated):
                self._write_size = event.write_size
            elif isinstance(event, Stats):
                self._stats = event
        self._save_if_named()
        self.screen.status(self._status())

    def _status(self) -> str:
        """Return in one line what the last turn cost and did."""
        parts = []
        if self._stats is not None:
            parts.append(f"{self._stats.tokens} tokens, {self._stats.tokens_per_second:.0f}/s")
        if self._write_size is not None:
            parts.append(f"memory changed by {100 * self._write_size:.0f} %")
        state = self.session.state
        parts.append(f"{state.slots.numel() * state.slots.element_size():,} bytes kept")
        parts.append(f"turn {len(self.session.turns)}")
        if self.name is not None:
            parts.append(f"saved as '{self.name}'")
        return " | ".join(parts)

    def _show_end(self, event: TurnEnd) -> None:
        # Beside a tool call there may be no answer.
        if event.answer or event.tool_call is None:
            self.screen.end_answer()
        if event.tool_call is not None:
            self.screen.tell(
                f"[calls] {event.tool_call.strip()} (no tools here: answer it yourself)"
            )
        if event.reason != "eos":
            why = {"length": "the turn is full", "stopped": "stopped"}[event.reason]
            self.screen.tell(f"[{why}]")

    def _command(self, name: str, *arguments: str) -> bool:
        """Run a slash command; return whether the conversation goes on."""
        if name == "/quit":
            return False
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else "see /help."
            raise UserError(f"unknown command {name}: {hint} (//... says it to the model)")
        if len(arguments) > 1:
            raise UserError(f"too many words. {COMMANDS[name]}")
        action: dict[str, Callable[..., None]] = {
            "/new": self._new,
            "/save": self._save,
            "/load": self._load,
            "/undo": self._undo,
            "/retry": self._retry,
            "/think": self._think,
            "/memory": self._show_memory,
            "/stats": self._show_stats,
            "/help": self._help,
        }
        if arguments and name not in TAKE_A_WORD:
            raise UserError(f"{name} takes no further word.")
        action[name](*arguments)
        return True

    def _new(self, name: str | None = None) -> None:
        if name is not None and self._path(name).exists():
            raise UserError(f"'{name}' exists already: /load {name}, or choose another name.")
        self.session = self._new_session()
        self.session.name = self.name = name
        self._stats = self._write_size = None
        kept = f"kept as '{name}'" if name else "/save NAME keeps it"
        self.screen.tell(f"a new conversation ({kept})")

    def _save(self, name: str | None = None) -> None:
        name = name or self.name
        if name is None:
            raise UserError("this conversation has no name yet: /save NAME")
        self.session.save(self._path(name))
        self.session.name = self.name = name
        self.screen.tell(f"saved in {self._path(name)}")

    def _load(self, name: str | None = None) -> None:
        if name is None:
            raise UserError(
                f"which one? /load NAME (there is: {', '.join(self.saved()) or 'none'})"
            )
        self.load(name)

    def _undo(self, count: str = "1") -> None:
        if not count.isdecimal():
            raise UserError(f"'{count}' is no number of turns. {COMMANDS['/undo']}")
        if not self.session.turns:
            raise UserError("there is no turn to forget.")
        for turn in self.session.undo(int(count)):
            self.screen.tell(f"forgotten: {turn.query}")
        self._save_if_named()

    def _retry(self) -> None:
        if not self.session.turns:
            raise UserError("there is no answer to try again.")
        settings = self.session.settings
        if settings.temperature == 0:
            settings = settings.model_copy(update={"temperature": RETRY_TEMPERATURE})
            self.screen.tell(
                f"[at temperature {RETRY_TEMPERATURE}: greedy would repeat the answer]"
            )
        self._show(self.session.retry(settings=settings))

    def _think(self, mode: str | None = None) -> None:
        if mode is not None:
            self.session.set_thinking_mode(mode)
        now = self.session.thinking_mode
        self.screen.tell(f"thinking: {now or 'none (this model answers at once)'}")

    def _show_memory(self) -> None:
        state = self.session.state
        slots = state.slots[:, 0].float()
        start = self.model.new_conversation(seed=state.seeds[0]).slots[:, 0].float()
        num_layers, num_slots, dim = slots.shape
        self.screen.tell(
            f"{num_layers} layers x {num_slots} slots x {dim} = {slots.numel():,} numbers, "
            f"{slots.numel() * slots.element_size():,} bytes, whatever the length"
        )
        for layer in range(num_layers):
            size = slots[layer].norm(dim=-1)
            changed = (slots[layer] - start[layer]).norm(dim=-1)
            most = changed.topk(min(4, num_slots)).indices.tolist()
            self.screen.tell(
                f"layer {layer + 1}: slot norm {float(size.mean()):.2f} "
                f"({float(size.min()):.2f} to {float(size.max()):.2f}), change since the start "
                f"{float(changed.mean()):.2f}, most in slots {', '.join(map(str, most))}"
            )
        if self._write_size is not None:
            self.screen.tell(f"the last turn changed it by {100 * self._write_size:.0f} %")

    def _show_stats(self) -> None:
        for line in self._stats_lines():
            self.screen.tell(line)

    def _stats_lines(self) -> Iterator[str]:
        num_turns = len(self.session.turns)
        tokenizer = self.model.require_tokenizer()
        texts = [text for turn in self.session.turns for text in (turn.query, turn.answer)]
        num_tokens = sum(map(len, tokenizer.encode_batch(texts))) if texts else 0
        yield f"{num_turns} turns, {num_tokens} tokens; kept as: {self.name or '(nothing)'}"
        if self._stats is not None:
            memory = self._stats.memory_seconds
            update = "" if memory is None else f", memory update {1000 * memory:.1f} ms"
            yield (
                f"last answer: {self._stats.tokens} tokens, "
                f"{self._stats.tokens_per_second:.0f} tokens/s{update}"
            )
        yield f"decoding: {self.session.settings.model_dump(exclude_none=True)}"
        yield f"device: {self.model.device}"

    def _help(self) -> None:
        for line in COMMANDS.values():
            self.screen.tell(line)

    def _save_if_named(self) -> None:
        if self.name is not None:
            self.session.save(self._path(self.name))

    def _new_session(self) -> Session:
        from rxlm.ops.sampling import SamplingSettings

        settings = self._settings or SamplingSettings(temperature=0.0)
        return self.model.session(
            system=self._system,
            seed=self._seed,
            settings=settings,
            compile_decode=self._compile_decode,
        )

    def _path(self, name: str) -> Path:
        if not _NAME.match(name):
            raise UserError(
                f"'{name}' cannot be the name of a conversation: use letters, digits, '-', '_' "
                "and '.'."
            )
        return self.folder / name
