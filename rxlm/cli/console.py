"""The one place that decides what a terminal or a pipe gets to see: consoles and logging.

Results go to standard output, everything about the work (logs, progress, errors) to standard
error, so that ``rxlm ... --json | jq`` works. A terminal gets colours and live progress; a pipe
gets plain lines. Not here: what the verbs print. No torch.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from typing import Any

from rich.console import Console
from rich.logging import RichHandler

PIPE_WIDTH = 100


@functools.cache
def results() -> Console:
    """Return the console for what a command was asked to produce (standard output)."""
    return _make_console(stderr=False)


@functools.cache
def messages() -> Console:
    """Return the console for logs, progress and errors (standard error).

    A progress bar has to be drawn on this very console: log lines then appear above it instead of
    tearing it.
    """
    return _make_console(stderr=True)


def print_json(value: Any) -> None:
    """Print ``value`` to standard output as indented JSON: never coloured, wrapped or shortened.

    Raises:
        ValueError: if ``value`` holds a NaN or an infinity, which are not JSON.
    """
    text = json.dumps(value, indent=2, allow_nan=False)
    results().out(text, highlight=False)


def print_error(message: str) -> None:
    """Print one error to standard error, in full, whatever its length."""
    messages().print("error:", style="bold red", end=" ")
    messages().out(message, highlight=False)


def configure_logging(*, debug: bool = False) -> None:
    """Send the package's log records to standard error; a second call replaces the first.

    The first process of a distributed run logs everything, the others warnings only.

    Args:
        debug: also show debug records, with the place in the code that they came from.
    """
    handler: logging.Handler
    if messages().is_terminal:
        handler = RichHandler(console=messages(), show_path=debug, log_time_format="%X")
    else:
        handler = logging.StreamHandler()
        place = " %(name)s:%(lineno)d" if debug else ""
        handler.setFormatter(
            logging.Formatter(f"%(asctime)s %(levelname)s{place} %(message)s", datefmt="%X")
        )
    logger = logging.getLogger("rxlm")
    for old in list(logger.handlers):
        logger.removeHandler(old)
    logger.addHandler(handler)
    is_first_process = os.environ.get("RANK", "0") == "0"
    quiet_level = logging.INFO if is_first_process else logging.WARNING
    logger.setLevel(logging.DEBUG if debug else quiet_level)


def _make_console(*, stderr: bool) -> Console:
    # No markup: what is printed often holds brackets of its own ("[A]", "pip install x[cuda]").
    console = Console(stderr=stderr, highlight=False, markup=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        # rich assumes 80 columns in a pipe, which cuts tables that fit on any page.
        console.width = PIPE_WIDTH
    return console
