"""``rxlm chat MODEL_DIR``: talk to a model in the terminal, or over a pipe.

On a terminal lines can be edited, answers stream as Markdown (``chat_terminal``), and Ctrl-C stops
the answer, not the program. In a pipe every line of standard input is a query, and standard output
holds the answers and nothing else.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from rxlm.cli import console
from rxlm.errors import UserError

if TYPE_CHECKING:
    from rxlm.ops.sampling import SamplingSettings

PROMPT = "> "
HISTORY_FILE = ".history"
"""What was typed, in the folder of the conversations: it says as much as they do."""


def register(app: typer.Typer) -> None:
    """Add ``chat`` to the command line."""
    app.command("chat")(chat)


def chat(
    model_dir: Annotated[
        str, typer.Argument(help="A pipeline's folder, a run, a checkpoint or a model folder.")
    ],
    session: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Go on with this conversation; saved after every turn."),
    ] = None,
    sessions_dir: Annotated[
        Path | None,
        typer.Option(help="Where conversations are saved.  [default: MODEL_DIR/sessions]"),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(help="System prompt of new conversations."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="0: the most likely answer; higher: more varied.  [default: 0]"),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Choose among the k most likely tokens."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Choose among the most likely tokens that make up this probability."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Leave out tokens less likely than this share of the most likely one."),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Above 1: tokens of the answer come less often again."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of random draws.")] = 0,
    threads: Annotated[
        int, typer.Option(min=1, help="CPU threads; small models are fastest on one.")
    ] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    compile_decode: Annotated[
        bool,
        typer.Option("--compile", help="Compile decoding: a minute once, then faster answers."),
    ] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="On a terminal too: no Markdown, no line editing.")
    ] = False,
) -> None:
    """Talk to a model. In the conversation, /help lists the commands."""
    from rxlm.cli.chat_loop import Chat, Lines, Screen
    from rxlm.rxt.models import RxTAlpha
    from rxlm.training.device import cpu_threads, resolve_device

    with cpu_threads(threads):
        settings = _settings(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        model = RxTAlpha.from_pretrained(model_dir, device=resolve_device(device))
        folder = sessions_dir or default_sessions_dir(model_dir)
        is_rich = sys.stdin.isatty() and sys.stdout.isatty() and not plain
        screen: Screen = Lines(_say, _tell)
        if is_rich:
            from rxlm.cli.chat_terminal import Terminal

            screen = Terminal(console.results(), _tell)
        talk = Chat(
            model,
            folder,
            screen,
            system=system,
            seed=seed,
            settings=settings,
            compile_decode=compile_decode,
        )
        if session is not None:
            talk.open(session)
        if not sys.stdin.isatty():
            talk.run(_piped_lines(), forgiving=False)
            return
        _tell(f"{model_dir}: /help lists the commands, Ctrl-C stops an answer")
        read_line = _plain_line
        if is_rich:
            from rxlm.cli.chat_terminal import line_editor

            read_line = line_editor(PROMPT, folder / HISTORY_FILE, talk.saved)
        # The session may be another one by then (/new, /load).
        keyboard = Keyboard(read_line, lambda: talk.session.stop())
        with keyboard.interrupts():
            talk.run(keyboard.lines(), forgiving=True)


def default_sessions_dir(model_dir: str) -> Path:
    """Return where the conversations with a model are saved by default.

    Beside the checkpoints of a run, not inside one: old checkpoints are deleted.

    Raises:
        UserError: for a model of the Hub, which has no folder of its own.
    """
    if model_dir.startswith("hf://"):
        raise UserError(f"{model_dir} has no folder for conversations: give --sessions-dir.")
    path = Path(model_dir)
    if path.resolve().parent.name == "checkpoints":
        path = path.resolve().parent.parent
    return path / "sessions"


def _settings(**given: float | int | None) -> SamplingSettings | None:
    """Return the settings that were given; ``None`` when none were."""
    from rxlm.ops.sampling import SamplingSettings

    values = {name: value for name, value in given.items() if value is not None}
    if not values:
        return None
    return SamplingSettings.parse({"temperature": 0.0, **values}, "decoding")


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _tell(text: str) -> None:
    console.messages().out(text, highlight=False, style="dim" if sys.stderr.isatty() else None)


def _piped_lines() -> Iterator[str]:
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text ({error}).") from None


def _plain_line() -> str:
    # Standard output may be a file: it holds answers and nothing else.
    sys.stderr.write(PROMPT)
    sys.stderr.flush()
    return input()


class Keyboard:
    """Lines that are typed, and what Ctrl-C means: clear the line, or stop the answer."""

    def __init__(self, read_line: Callable[[], str], stop_answer: Callable[[], None]) -> None:
        """Take how lines are read and answers stopped.

        Args:
            read_line: waits for a line; ``KeyboardInterrupt`` clears it, ``EOFError`` ends all.
            stop_answer: ends the answer that is being written; does nothing without one.
        """
        self._read_line = read_line
        self._stop_answer = stop_answer
        self._typing = False

    def lines(self) -> Iterator[str]:
        """Yield what is typed until Ctrl-D."""
        while True:
            try:
                self._typing = True
                line = self._read_line()
            except KeyboardInterrupt:
                _tell("(/quit or Ctrl-D leaves)")
                continue
            except EOFError:
                _tell("")
                return
            finally:
                self._typing = False
            yield line

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """Take Ctrl-C inside the block; the part of the answer that was shown is remembered."""
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._typing:
            raise KeyboardInterrupt
        self._stop_answer()
