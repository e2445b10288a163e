"""The page of all commands, for the command-line reference: made from their help texts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from reference_text import cell
from typer.main import get_command

from rxlm.cli.main import Invocation, build_app


def command_line(made_by: str) -> list[str]:
    """Return the page of all commands; ``made_by`` says where it comes from."""
    lines = ["# Command line", "", made_by, ""]
    lines += ["Every command has `--help`. Exit status: 0 done, 1 a run failed, 2 the input cannot"]
    lines += ["be used, 130 stopped by Ctrl-C. `--debug` before the command shows tracebacks.", ""]
    root = get_command(build_app(Invocation()))
    for words, command in leaves(root, ("rxlm",)):
        lines += [f"## {' '.join(words)}", "", *describe_command(words, command), ""]
    return lines


def leaves(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the words and the command of everything that can be run."""
    if not hasattr(command, "commands"):
        yield words, command
        return
    for name, child in command.commands.items():
        yield from leaves(child, (*words, name))


def describe_command(words: Sequence[str], command: Any) -> list[str]:
    """Return usage, help text and parameters of a command."""
    usage, rows = [*words], []
    options = [item for item in command.params if item.param_type_name == "option"]
    usage += ["[OPTIONS]"] if options else []
    for item in command.params:
        text = cell(" ".join((getattr(item, "help", None) or "").split()))
        name = (item.metavar or item.name or "").upper()
        if item.param_type_name == "argument":
            name = name.strip("[].")
            shown_name = name if item.required else f"[{name}]"
            usage.append(shown_name + ("..." if item.nargs == -1 else ""))
            rows.append(f"| `{name}` | | {text} |")
            continue
        value = "" if item.is_flag else f" {item.metavar or item.name.upper()}"
        default = item.default if not item.is_flag and not callable(item.default) else None
        default = "required" if item.required else "" if default in (None, ()) else f"`{default}`"
        names = ", ".join([*item.opts, *item.secondary_opts])
        rows.append(f"| `{cell(names + value)}` | {default} | {text} |")
    lines = ["```text", " ".join(usage), "```", ""]
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        example = paragraph.removeprefix("Example: ")
        if example == paragraph:
            lines += [paragraph, ""]
        else:
            language = "text" if "\n" in example else "bash"
            lines += ["Example:", "", f"```{language}", example, "```", ""]
    return [*lines, "| | default | |", "|---|---|---|", *rows] if rows else lines
