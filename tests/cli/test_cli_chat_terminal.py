"""``rxlm chat`` on a terminal: keys, history, completion, Markdown; once a real pseudo-terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.input.base import PipeInput
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from rxlm.cli.chat_terminal import CommandCompleter, Terminal, line_editor, split_blocks
from rxlm.errors import UserError

WORDS = "Title 1 one more of it 2 two a b end of it next"
PASTE = "\x1b[200~one\ntwo\x1b[201~"


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    """A keyboard."""
    with create_pipe_input() as pipe:
        yield pipe


def test_lines_are_edited_pasted_whole_and_remembered(keys: PipeInput, tmp_path: Path) -> None:
    """Catches a paste that is sent line by line, and a history lost with the program."""
    history = tmp_path / "sessions" / ".history"
    read_line = line_editor("> ", history, list, input=keys, output=DummyOutput())
    keys.send_text("helo\x1b[Dl\r")
    assert read_line() == "hello"
    keys.send_text(f"{PASTE}\r")
    assert read_line() == "one\ntwo"
    keys.send_text("a\x1b\rb\r")
    assert read_line() == "a\nb"
    again = line_editor("> ", history, list, input=keys, output=DummyOutput())
    keys.send_text("\x1b[A" * 6 + "\r")
    assert again() == "hello"
    assert history.stat().st_mode & 0o077 == 0, "others can read what was said"


def test_ctrl_c_clears_and_ctrl_d_ends(keys: PipeInput, tmp_path: Path) -> None:
    """Catches a half-typed line that is sent, or a Ctrl-D that does not leave."""
    read_line = line_editor("> ", tmp_path / "history", list, input=keys, output=DummyOutput())
    keys.send_text("half\x03")
    with pytest.raises(KeyboardInterrupt):
        read_line()
    keys.send_text("\x04")
    with pytest.raises(EOFError):
        read_line()


def test_a_history_that_cannot_be_kept_is_said_at_once(tmp_path: Path) -> None:
    """Catches a traceback, or a history that is silently dropped."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--sessions-dir"):
        line_editor("> ", tmp_path / "file" / "history", list)


def test_commands_and_names_are_completed() -> None:
    """Catches completion inside a normal sentence, and names that are not offered."""
    completer = CommandCompleter(lambda: ["ann", "anton", "bob"])

    def offered(text: str) -> list[str]:
        return [item.text for item in completer.get_completions(Document(text), CompleteEvent())]

    assert offered("/s") == ["/save", "/stats"]
    assert offered("/load an") == ["ann", "anton"]
    assert offered("and /s") == offered("/save an") == []


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_markdown_is_the_same_whatever_the_pieces(size: int) -> None:
    """Catches text that is lost, doubled or rendered apart at the border of two pieces."""
    answer = "# Title\n\n1. one\n\n   more of it\n2. two\n\n```\na\n\nb\n```\n\n*end* of it"
    assert "".join(split_blocks(answer)) == answer
    assert [block.strip()[:7] for block in split_blocks(answer)] == [
        "# Title", "1. one\n", "```\na\n\n", "*end* o",
    ]  # fmt: skip

    def shown(step: int) -> str:
        out = io.StringIO()
        screen = Terminal(Console(file=out, width=60), lambda text: None)
        for start in range(0, len(answer), step):
            screen.say(answer[start : start + step])
        screen.end_answer()
        screen.say("next")
        screen.end_answer()
        return out.getvalue()

    assert shown(size) == shown(len(answer))
    assert shown(size).split() == [
        "Title",
        "1",
        "one",
        "more",
        "of",
        "it",
        "2",
        "two",
        "a",
        "b",
        "end",
        "of",
        "it",
        "next",
    ]


def test_an_answer_cannot_control_the_terminal() -> None:
    """Catches escape sequences of a model that reach the terminal."""
    out = io.StringIO()
    screen = Terminal(Console(file=out, width=60), lambda text: None)
    screen.say("a\x1b]0;title\x07b\x9b31m")
    screen.end_answer()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", out.getvalue())


class PseudoTerminal:
    """``rxlm chat`` as somebody at a terminal has it."""

    def __init__(self, *words: str) -> None:
        self._fd, other = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
        command = [sys.executable, "-m", "rxlm", "chat", *words]
        self.process = subprocess.Popen(
            command,
            stdin=other,
            stdout=other,
            stderr=other,
            env=environment,
            start_new_session=True,
        )
        os.close(other)
        self.shown = ""

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._fd, text.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> None:
        """Wait until something new is shown that matches."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.shown):
            assert time.monotonic() < end, f"no {pattern!r} in {self.shown!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                self.shown += os.read(self._fd, 65536).decode(errors="replace")
                # The editor asks where the cursor is, as a terminal would know.
                if "\x1b[6n" in self.shown:
                    self.shown = self.shown.replace("\x1b[6n", "")
                    self.type("\x1b[1;1R")
        self.shown = self.shown[re.search(pattern, self.shown).end() :]  # type: ignore[union-attr]

    def close(self) -> None:
        """End the program if it still runs."""
        self.process.kill()
        self.process.wait()
        os.close(self._fd)


def test_a_conversation_at_a_terminal(micro_pipeline: Path, tmp_path: Path) -> None:
    """Catches what only a terminal shows: raw mode, Ctrl-C in an answer, leaving with Ctrl-D."""
    sampled = ("--temperature", "1", "--session", "ann", "--sessions-dir", str(tmp_path))
    terminal = PseudoTerminal(str(micro_pipeline), *sampled)
    try:
        terminal.wait_for("Ctrl-C stops")
        terminal.wait_for(">")
        terminal.type("half a line\x03")
        terminal.wait_for("Ctrl-D leaves")
        terminal.wait_for(">")
        terminal.type("Hello there\r")
        terminal.wait_for(
            r"tokens, \d+/s \| memory changed by \d+ % \| [\d,]+ bytes kept \| turn 1"
        )
        terminal.wait_for(">")
        terminal.type("/mem\t\r")
        terminal.wait_for("layer 1: slot norm")
        terminal.wait_for(">")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.close()
    assert (tmp_path / "ann" / "meta.json").exists()
    assert "Hello there" in (tmp_path / ".history").read_text()
    assert "half a line" not in (tmp_path / ".history").read_text()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
