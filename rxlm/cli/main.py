"""The ``rxlm`` command: the table of verbs, the global options, and how errors reach a person.

A verb is a module ``rxlm/cli/<verb>.py`` with ``register(app)``. Verb modules are imported for
every ``--help``, so they import light things at the top and torch only inside their commands.

Exit status: 0 done, 1 a run failed, 2 the input cannot be used, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer
from pydantic_core import ValidationError

from rxlm import __version__
from rxlm.cli import console
from rxlm.errors import RunError, UserError

VERBS = (
    "doctor", "pipeline", "train", "plot", "compare", "config", "data", "tokenizer", "chat",
    "serve", "eval", "memory", "export", "study", "demo",
)  # fmt: skip
MODULE_OF_VERB = {"eval": "evaluate"}
"""Verbs whose module has another name than they (a built-in function is called ``eval``)."""

EXIT_RUN_FAILED = 1
EXIT_BAD_INPUT = 2

# What the caller of a command can put right. Other OSErrors (disk full, I/O error) fail the run.
BAD_INPUT_ERRNOS = frozenset(
    {
        errno.EACCES,
        errno.EEXIST,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.ENOTEMPTY,
        errno.EPERM,
        errno.EROFS,
    }
)


@dataclasses.dataclass
class Invocation:
    """What the global options of one command line said."""

    debug: bool = False


def build_app(invocation: Invocation, verbs: Sequence[str] = VERBS) -> typer.Typer:
    """Return the typer application with ``verbs`` registered; it fills ``invocation``."""
    app = typer.Typer(
        name="rxlm",
        help="Build, train and run reactive language models: models with a memory.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        # Plain usage errors and help: the boxes of the rich form break lines inside messages.
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def global_options(
        debug: Annotated[
            bool, typer.Option("--debug", help="Show tracebacks and debug log lines.")
        ] = False,
        version: Annotated[
            bool,
            typer.Option(
                "--version", help="Print the version.", callback=_print_version, is_eager=True
            ),
        ] = False,
    ) -> None:
        invocation.debug = debug
        console.configure_logging(debug=debug)

    for verb in verbs:
        importlib.import_module(f"rxlm.cli.{MODULE_OF_VERB.get(verb, verb)}").register(app)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: the words after ``rxlm``; those of the process by default.
    """
    invocation = Invocation()
    return run_app(build_app(invocation), invocation, arguments)


def run_app(
    app: typer.Typer, invocation: Invocation, arguments: Sequence[str] | None = None
) -> int:
    """Run ``app`` and turn whatever it raises into one message and an exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(args=words, prog_name="rxlm")
    except SystemExit as error:  # how typer ends, for success and for usage errors
        return error.code if isinstance(error.code, int) else EXIT_RUN_FAILED
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # the edge of the program: everything becomes a message here
        status, message = describe_error(error, words)
        if invocation.debug:
            traceback.print_exception(error)
        console.print_error(message)
        return status
    return 0


def describe_error(error: Exception, words: Sequence[str] = ()) -> tuple[int, str]:
    """Return the exit status for ``error`` and the message that a person gets to read.

    Args:
        error: what a command raised.
        words: the command line, to say how to repeat it with a traceback.
    """
    if isinstance(error, UserError):
        return EXIT_BAD_INPUT, str(error)
    if isinstance(error, RunError):
        return EXIT_RUN_FAILED, str(error)
    if isinstance(error, ValidationError):
        return EXIT_BAD_INPUT, _describe_validation_error(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        bad_input = error.errno in BAD_INPUT_ERRNOS
        return EXIT_BAD_INPUT if bad_input else EXIT_RUN_FAILED, f"{where}{error.strerror}"
    if _is_out_of_memory(error):
        return EXIT_RUN_FAILED, (
            f"out of memory: use a smaller batch, a shorter window or a smaller model. {error}"
        )
    again = shlex.join(["rxlm", "--debug", *(word for word in words if word != "--debug")])
    return EXIT_RUN_FAILED, (
        f"internal error: {type(error).__name__}: {error}\n"
        f"This is a defect of rxlm. For the traceback, run again with --debug: {again}"
    )


def _is_out_of_memory(error: Exception) -> bool:
    # torch's own error is known by name, so that this module does not import torch; on a CPU torch
    # raises a plain RuntimeError.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _describe_validation_error(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        path = ".".join([error.title, *map(str, item["loc"])])
        given = "" if item["type"] in {"value_error", "missing"} else f" (got {item['input']!r})"
        lines.append(f"{path}: {item['msg'].removeprefix('Value error, ')}{given}")
    return "\n".join(lines)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.results().out(f"rxlm {__version__}", highlight=False)
        raise typer.Exit
