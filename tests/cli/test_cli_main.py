"""The edge of the command line: exit statuses, messages, global options."""

from __future__ import annotations

import errno
import json
import logging

import pydantic
import pytest
import typer

import rxlm
from rxlm.cli import console
from rxlm.cli.main import VERBS, Invocation, build_app, describe_error, main, run_app
from rxlm.configuration import Config
from rxlm.errors import RunError, UserError


class Shape(Config):
    """A configuration to get wrong."""

    width: int = pydantic.Field(default=1, gt=0)


def run_with(action: object, *words: str) -> int:
    """Run an application with one verb, ``act``, that raises or calls ``action``."""
    invocation = Invocation()
    app = build_app(invocation, verbs=())

    @app.command("act")
    def act() -> None:
        if isinstance(action, BaseException):
            raise action
        action()  # type: ignore[operator]

    return run_app(app, invocation, [*words, "act"])


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("width=0: use 1"), 2, "error: width=0: use 1\n"),
        (RunError("diverged at step 7"), 1, "error: diverged at step 7\n"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a.yaml"),
            2,
            "error: a.yaml: No such file or directory\n",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "error: /x: Permission"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left on device\n"),
        (MemoryError(), 1, "error: out of memory"),
        (KeyError("lost"), 1, "error: internal error: KeyError: 'lost'\n"),
    ],
)
def test_error_becomes_one_message_and_a_status(
    error: Exception, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback shown to a user, and a bad input reported as a failed run."""
    assert run_with(error) == status
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_validation_error_names_field_and_value(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches pydantic's own many-line text, with its URL, reaching the user."""
    assert run_with(lambda: Shape(width=-3)) == 2
    assert capsys.readouterr().err == (
        "error: Shape.width: Input should be greater than 0 (got -3)\n"
    )


def test_long_message_is_not_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches rich breaking a path in two, so that it cannot be copied."""
    path = "/" + "/".join(["folder"] * 60)
    assert run_with(UserError(f"{path}[A]: not found")) == 2
    assert f"error: {path}[A]: not found\n" in capsys.readouterr().err


def test_debug_adds_the_traceback_and_keeps_the_status(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches --debug being ignored, or changing the exit status that scripts rely on."""
    assert run_with(UserError("width=0"), "--debug") == 2
    error_text = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error_text
    assert error_text.endswith("error: width=0\n")


def test_internal_error_says_how_to_repeat_it() -> None:
    """Catches a hint that cannot be pasted: unquoted words, or --debug after the verb."""
    _, message = describe_error(KeyError("x"), ["train", "my recipe.yaml", "--debug"])
    assert message.endswith("rxlm --debug train 'my recipe.yaml'")


def test_torch_out_of_memory_is_a_failed_run_not_a_defect() -> None:
    """Catches the commonest failure of training being reported as an internal error."""
    torch = pytest.importorskip("torch")
    status, message = describe_error(torch.OutOfMemoryError("CUDA out of memory."))
    assert status == 1
    assert message.startswith("out of memory: use a smaller batch")


def test_ctrl_c_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches Ctrl-C ending with a traceback or with the status of a failed run."""
    assert run_with(KeyboardInterrupt()) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_typer_exit_keeps_its_status() -> None:
    """Catches run_app swallowing the status of a command that ends itself."""
    assert run_with(typer.Exit(3)) == 3


@pytest.mark.parametrize("words", [["no-such-verb"], ["--no-such-option"], ["doctor", "--nope"]])
def test_usage_error_is_status_2_on_stderr(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches usage errors on standard output, where they would end up in a result file."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Error: No such" in captured.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a version that differs from the package's."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rxlm {rxlm.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_answers_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a verb in the table that does not register itself under its own name."""
    assert main([verb, "--help"]) == 0
    assert f"Usage: rxlm {verb}" in capsys.readouterr().out


def test_logging_goes_to_stderr_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches log lines in the results, and handlers that pile up and repeat each line."""
    logger = logging.getLogger("rxlm.example")
    console.configure_logging()
    console.configure_logging()
    logger.debug("hidden")
    logger.info("shown")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("shown") == 1
    assert "hidden" not in captured.err


def test_other_processes_of_a_run_log_warnings_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches eight processes of a distributed run each printing the same progress lines."""
    monkeypatch.setenv("RANK", "1")
    console.configure_logging()
    logging.getLogger("rxlm.example").info("quiet")
    logging.getLogger("rxlm.example").warning("loud")
    error_text = capsys.readouterr().err
    assert "quiet" not in error_text
    assert "loud" in error_text


def test_json_is_parseable_and_keeps_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches rich treating '[A]' as markup or wrapping long strings inside JSON."""
    value = {"token": "[A]", "text": "long " * 80}
    console.print_json(value)
    assert json.loads(capsys.readouterr().out) == value
