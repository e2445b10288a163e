"""``rxlm chat`` on a terminal: lines with editing and history, answers as Markdown while they come.

Libraries do the work: prompt_toolkit reads lines, rich renders. Here is what they are told. Not
here: the conversation (``chat_loop``), pipes and plain terminals (``chat``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import is_done
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown

from rxlm.cli.chat_loop import COMMANDS
from rxlm.errors import UserError

FRAMES_PER_SECOND = 12
_BLOCK_END = re.compile(r"\n[ \t]*\n(?=\S)")
"""Before text at the margin: what is indented after a blank line still belongs to a list."""
_FENCE = re.compile(r"^ {0,3}(```|~~~)", re.MULTILINE)
# Everything but line feed and tab: a model must not move the cursor or set the window's title.
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160))}
_CONTROLS.update({ord("\n"): "\n", ord("\t"): "\t", ord("\r"): "\n"})


class Terminal:
    """Shows answers as Markdown: finished paragraphs stay, the last one is drawn as it grows."""

    def __init__(self, console: Console, tell: Callable[[str], None]) -> None:
        """``console`` shows answers, ``tell`` lines about the conversation."""
        self.console = console
        self.tell = tell
        self._pending = ""
        self._live: Live | None = None

    def say(self, text: str) -> None:
        """Show a piece of an answer."""
        self._pending += text.replace("\r\n", "\n").translate(_CONTROLS)
        *finished, self._pending = split_blocks(self._pending)
        for block in finished:
            self._close_live()
            self._print(block)
        if self._pending.strip():
            if self._live is None:
                self._live = Live(
                    console=self.console, refresh_per_second=FRAMES_PER_SECOND, transient=True
                )
                self._live.start()
            self._live.update(Markdown(self._pending))

    def end_answer(self) -> None:
        """Show the rest of the answer for good."""
        self._close_live()
        if self._pending.strip():
            self._print(self._pending)
        self._pending = ""

    def status(self, text: str) -> None:
        """Show the line below an answer."""
        self.tell(text)

    def _close_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, block: str) -> None:
        self.console.print(Markdown(block))


def split_blocks(text: str) -> list[str]:
    """Return the Markdown blocks of ``text`` that can be shown one by one; the last may grow.

    Blank lines inside a code fence separate nothing.
    """
    blocks, start = [], 0
    for match in _BLOCK_END.finditer(text):
        if len(_FENCE.findall(text, start, match.end())) % 2 == 0:
            blocks.append(text[start : match.end()])
            start = match.end()
    return [*blocks, text[start:]]


class CommandCompleter(Completer):
    """Completes slash commands, and names of saved conversations after ``/load``."""

    def __init__(self, saved: Callable[[], Iterable[str]]) -> None:
        """``saved`` returns the names of the saved conversations."""
        self._saved = saved

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterator[Completion]:
        """Yield what the word before the cursor may become."""
        text = document.text_before_cursor
        command, space, word = text.partition(" ")
        if not space:
            if text.startswith("/"):
                for name, line in COMMANDS.items():
                    if name.startswith(text):
                        yield Completion(name, -len(text), display_meta=line)
        elif command == "/load":
            for name in self._saved():
                if name.startswith(word):
                    yield Completion(name, -len(word))


def line_editor(
    prompt: str,
    history: Path,
    saved: Callable[[], Iterable[str]],
    **terminal: Any,
) -> Callable[[], str]:
    """Return what reads a line (or several: Alt-Enter, and pasted ones) from the terminal.

    Args:
        prompt: shown before the line.
        history: file of what was typed, made if missing and readable by its owner only.
        saved: returns the names that ``/load`` may take.
        terminal: ``input`` and ``output`` of prompt_toolkit; this process's terminal by default.

    Raises:
        UserError: if the history cannot be written.
    """
    try:
        history.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(history, os.O_CREAT | os.O_WRONLY, 0o600))
    except OSError as error:
        raise UserError(
            f"cannot keep the history of what is typed in {history} ({error.strerror}): choose a "
            "folder that can be written with --sessions-dir, or use --plain."
        ) from None
    session: PromptSession[str] = PromptSession(
        message=prompt,
        history=FileHistory(history),
        completer=CommandCompleter(saved),
        complete_style=CompleteStyle.READLINE_LIKE,
        multiline=True,
        key_bindings=_keys(),
        prompt_continuation=lambda width, line, is_wrapped: "." * (width - 1) + " ",
        enable_history_search=True,
        **terminal,
    )
    return session.prompt


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter", filter=~is_done)
    def _accept(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=~is_done)
    def _new_line(event: KeyPressEvent) -> None:
        get_app().current_buffer.insert_text("\n")

    return keys
