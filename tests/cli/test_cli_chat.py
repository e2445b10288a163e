"""``rxlm chat``: over a pipe, across restarts, its commands, and Ctrl-C."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rxlm.cli.chat import Keyboard, default_sessions_dir
from rxlm.cli.chat_loop import COMMANDS, Chat, Lines
from rxlm.cli.main import main
from rxlm.errors import UserError
from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.models import RxTAlpha
from rxlm.rxt.session import Session

LINES = ["My name is Ann.", "How are you?", "What is my name?"]
SAMPLED = ("--temperature", "1.0", "--seed", "5")


@pytest.fixture
def model(micro_pipeline: Path) -> RxTAlpha:
    """The (nearly untrained) model of the micro pipeline."""
    return RxTAlpha.from_pretrained(micro_pipeline)


class Talk:
    """A chat whose output is kept."""

    def __init__(self, model: RxTAlpha, folder: Path) -> None:
        self.said: list[str] = []
        self.told: list[str] = []
        self.chat = Chat(model, folder, Lines(self.said.append, self.told.append))

    def run(self, *lines: str) -> str:
        """Run lines; return what was told about the conversation."""
        self.told.clear()
        self.chat.run(lines, forgiving=True)
        return "\n".join(self.told)


@pytest.fixture
def talk(model: RxTAlpha, tmp_path: Path) -> Talk:
    """A chat with the micro model."""
    return Talk(model, tmp_path / "sessions")


def pipe(
    monkeypatch: pytest.MonkeyPatch, text: str, model_dir: Path, sessions: Path, *words: str
) -> int:
    """Run ``rxlm chat`` in this process with ``text`` as standard input."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return main(["chat", str(model_dir), "--sessions-dir", str(sessions), *words])


def test_session_survives_a_restart(
    micro_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a conversation that goes on differently after the program was started again."""
    words = ("--session", "ann", *SAMPLED)
    uninterrupted = "\n".join(LINES)
    assert pipe(monkeypatch, uninterrupted, micro_pipeline, tmp_path / "one", *words) == 0
    wanted = capsys.readouterr().out

    assert pipe(monkeypatch, "\n".join(LINES[:2]), micro_pipeline, tmp_path / "two", *words) == 0
    first = capsys.readouterr().out
    command = [sys.executable, "-m", "rxlm", "chat", str(micro_pipeline), "--session", "ann"]
    # Bytes: text mode would turn a carriage return that the random model says into a line feed.
    second = subprocess.run(
        [*command, "--sessions-dir", str(tmp_path / "two")],
        input=LINES[2].encode(),
        capture_output=True,
        check=True,
    )
    assert first + second.stdout.decode() == wanted
    assert "going on with 'ann' after 2 turns" in second.stderr.decode()


def test_pipe_prints_answers_only(
    micro_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: RxTAlpha,
) -> None:
    """Catches prompts or notes among the answers, which a script would take for answers."""
    assert pipe(monkeypatch, f"{LINES[0]}\n\n/stats\n/quit\nnever", micro_pipeline, tmp_path) == 0
    captured = capsys.readouterr()
    answer = model.session(settings={"temperature": 0.0}).ask(LINES[0])
    assert captured.out == f"{answer}\n"
    assert "1 turns" in captured.err
    assert not list(tmp_path.iterdir()), "a conversation without a name is not saved"


def test_query_that_does_not_fit_is_status_2_and_loses_nothing(
    micro_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: RxTAlpha,
) -> None:
    """Catches a long query that is cut silently, or that takes the conversation with it."""
    text = f"{LINES[0]}\n{'word ' * 500}\n"
    assert pipe(monkeypatch, text, micro_pipeline, tmp_path, "--session", "ann") == 2
    assert "the query has" in capsys.readouterr().err
    assert len(Session.load(tmp_path / "ann", model).turns) == 1


def test_unusable_options_are_status_2(
    micro_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a traceback for a model that is not there, a bad number or a bad name."""
    for words, message in (
        (("--temperature", "-1"), "temperature=-1.0 must be 0"),
        (("--session", "../x"), "cannot be the name of a conversation"),
        (("--device", "abacus"), "device='abacus'"),
    ):
        assert pipe(monkeypatch, "hello", micro_pipeline, tmp_path, *words) == 2
        assert message in capsys.readouterr().err
    assert pipe(monkeypatch, "hello", tmp_path / "none", tmp_path) == 2
    assert "does not exist" in capsys.readouterr().err


def test_compiled_decoding_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    model: RxTAlpha,
    micro_pipeline: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches an option that changes nothing, or is lost in a new or a loaded conversation."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert pipe(monkeypatch, "Hello\n", micro_pipeline, tmp_path, "--compile") == 2
    assert "no-such-compiler" in capsys.readouterr().err
    monkeypatch.setattr("rxlm.rxt.session.check_compiler", lambda device: None)
    chat = Chat(model, tmp_path, Lines(print, print), compile_decode=True)
    assert chat.session.compile_decode
    chat.run(["/save kept", "/new", "/load kept"], forgiving=False)
    assert chat.session.compile_decode


def test_ctrl_c_stops_the_answer_and_not_the_program(model: RxTAlpha, tmp_path: Path) -> None:
    """Catches Ctrl-C that ends the program, loses the turn, or stops every later answer."""
    said: list[str] = []
    told: list[str] = []

    def interrupt_once(text: str) -> None:
        said.append(text)
        if len(said) == 1:
            signal.raise_signal(signal.SIGINT)

    sampled = SamplingSettings(temperature=1.0)
    screen = Lines(interrupt_once, told.append)
    chat = Chat(model, tmp_path, screen, settings=sampled)
    with Keyboard(lambda: "", lambda: chat.session.stop()).interrupts():
        chat.run(LINES[:2], forgiving=True)
        assert "[stopped]" in told
        assert [turn.query for turn in chat.session.turns] == LINES[:2]
        first, second = (turn.answer for turn in chat.session.turns)
        assert 0 < len(first) < len(second)


def test_ctrl_c_while_typing_clears_the_line_and_ctrl_d_leaves(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a program that ends because a half-typed line was thrown away."""
    typed = iter(["hello", "interrupted", "again", EOFError()])

    def read_line() -> str:
        line = next(typed)
        if line == "interrupted":
            signal.raise_signal(signal.SIGINT)
        if isinstance(line, BaseException):
            raise line
        return line

    keyboard = Keyboard(read_line, lambda: pytest.fail("there is no answer to stop"))
    with keyboard.interrupts():
        assert list(keyboard.lines()) == ["hello", "again"]
    assert "Ctrl-D leaves" in capsys.readouterr().err


def test_undo_and_retry(talk: Talk) -> None:
    """Catches a turn that is taken back from the text but not from the memory."""
    talk.run(LINES[0])
    slots = talk.chat.session.state.slots.clone()
    assert talk.run(LINES[1], "/undo") == f"[the turn is full]\nforgotten: {LINES[1]}"
    assert talk.chat.session.state.slots.equal(slots)
    told = talk.run("/retry")
    assert "greedy would repeat the answer" in told
    assert [turn.query for turn in talk.chat.session.turns] == [LINES[0]]
    assert "cannot take back 9" in talk.run("/undo 9")
    assert "is no number of turns" in talk.run("/undo x")
    talk.run("/undo")
    assert "there is no turn to forget" in talk.run("/undo")
    assert "there is no answer to try again" in talk.run("/retry")


def test_save_new_and_load(talk: Talk, model: RxTAlpha) -> None:
    """Catches /new going on in the old memory, or overwriting the saved conversation."""
    assert "has no name yet" in talk.run("/save")
    talk.run(LINES[0], "/save ann", LINES[1])
    assert len(Session.load(talk.chat.folder / "ann", model).turns) == 2
    assert "a new conversation" in talk.run("/new")
    assert not talk.chat.session.turns
    talk.run(LINES[2])
    assert len(Session.load(talk.chat.folder / "ann", model).turns) == 2
    assert "'ann' exists already" in talk.run("/new ann")
    assert "there is: ann" in talk.run("/load bob")
    assert "which one?" in talk.run("/load")
    assert "after 2 turns" in talk.run("/load ann")
    assert "another session" in talk.run("/new", "/save ann")
    assert len(Session.load(talk.chat.folder / "ann", model).turns) == 2


def test_commands_are_listed_known_and_escaped(talk: Talk) -> None:
    """Catches a command that is listed but not understood, and text lost to a slash."""
    told = talk.run("/help")
    assert all(name in told for name in COMMANDS)
    assert "numbers" in talk.run("/memory")
    talk.run("hello")
    assert "tokens/s" in talk.run("/stats")
    assert "changed it by" in talk.run("/memory")
    assert "did you mean /stats?" in talk.run("/stat")
    assert "/retry takes no further word" in talk.run("/retry now")
    talk.run("//help")
    assert talk.chat.session.turns[-1].query == "/help"


def test_sessions_lie_beside_checkpoints_not_in_them(tmp_path: Path) -> None:
    """Catches conversations that are deleted together with an old checkpoint."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
    assert default_sessions_dir(str(checkpoint)) == tmp_path / "run" / "sessions"
    assert default_sessions_dir(str(tmp_path / "run")) == tmp_path / "run" / "sessions"
    with pytest.raises(UserError, match="--sessions-dir"):
        default_sessions_dir("hf://owner/name")
