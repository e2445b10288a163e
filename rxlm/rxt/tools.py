"""Tools that a model may call: what a call looks like, and how it is run.

A call is JSON, ``{"name": "weather", "arguments": {"city": "Oslo"}}``. Whatever goes wrong with
one is told to the model as the text of its result, as a tool's answer is: it wrote the call and
may do better. Nothing here raises because of what a model wrote. Not here: when tools are run
(:mod:`rxlm.rxt.session`).
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rxlm.errors import UserError

logger = logging.getLogger(__name__)

Tool = Callable[..., Any]
"""Takes the arguments of a call by name; returns text, or what JSON can hold."""

MAX_TOOL_ROUNDS = 4
"""How many calls may follow one query by default."""
EXAMPLE = '{"name": "weather", "arguments": {"city": "Oslo"}}'
_FIELDS = ("name", "arguments")


@dataclass(frozen=True)
class ToolResult:
    """What became of a call: the text that the model is given, and whether the call failed.

    ``name`` is None if the call did not say which tool.
    """

    name: str | None
    text: str
    failed: bool = False


class _CallProblem(Exception):
    """What is wrong with a call, for the model to read."""


def check_tools(tools: Mapping[str, Tool] | None) -> dict[str, Tool]:
    """Return the tools as a dictionary of its own.

    Raises:
        UserError: unless it maps non-empty names to callables.
    """
    if tools is None:
        return {}
    if not isinstance(tools, Mapping):
        raise UserError(
            f"tools is a {type(tools).__name__}: give a mapping of names to functions, such as "
            "{'weather': weather}."
        )
    for name, tool in tools.items():
        if not isinstance(name, str) or not name or not callable(tool):
            raise UserError(
                f"tools[{name!r}] is {tool!r}: a tool is a function with a non-empty name."
            )
    return dict(tools)


def run_tool(tools: Mapping[str, Tool], call: str) -> ToolResult:
    """Run the tool that ``call`` names; errors become the text of the result.

    Args:
        tools: what may be called.
        call: as the model wrote it.
    """
    name: str | None = None
    try:
        name, arguments = _parse(call)
        tool = _find(tools, name)
        _check_arguments(name, tool, arguments)
        return ToolResult(name, _text(name, _run(name, tool, arguments)))
    except _CallProblem as problem:
        logger.info("tool call %r failed: %s", call, problem)
        return ToolResult(name, f"error: {problem}", failed=True)


def refuse_call(limit: int) -> ToolResult:
    """Return the result of a call beyond the limit of rounds."""
    return ToolResult(
        None, f"error: no more than {limit} tool calls a query: answer now.", failed=True
    )


def _parse(call: str) -> tuple[str, dict[str, Any]]:
    try:
        value = json.loads(call)
    except ValueError as error:
        raise _CallProblem(f"not JSON ({error}); a call is {EXAMPLE}") from None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise _CallProblem(f"no tool is named; a call is {EXAMPLE}")
    unknown = [key for key in value if key not in _FIELDS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], _FIELDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"a call is {EXAMPLE}"
        raise _CallProblem(f"a call has no field '{unknown[0]}': {hint}")
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        raise _CallProblem(f"'arguments' is no object; a call is {EXAMPLE}")
    return value["name"], arguments


def _find(tools: Mapping[str, Tool], name: str) -> Tool:
    if name in tools:
        return tools[name]
    near = difflib.get_close_matches(name, tools, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"there is: {', '.join(sorted(tools))}."
    raise _CallProblem(f"no tool is called '{name}': {hint}")


def _check_arguments(name: str, tool: Tool, arguments: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(tool)
    except (TypeError, ValueError):
        return  # Some built-in functions have none; calling tells.
    try:
        signature.bind(**arguments)
    except TypeError as error:
        expected = ", ".join(signature.parameters) or "none"
        raise _CallProblem(f"{name}: {error} (arguments: {expected})") from None


def _run(name: str, tool: Tool, arguments: dict[str, Any]) -> Any:
    try:
        return tool(**arguments)
    except Exception as error:  # A tool is anybody's code, and its failure is the model's to hear.
        logger.warning("tool '%s' failed", name, exc_info=True)
        raise _CallProblem(f"{name} failed: {type(error).__name__}: {error}") from None


def _text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        raise _CallProblem(
            f"{name} returned a {type(value).__name__}, which is neither text nor JSON"
        ) from None
