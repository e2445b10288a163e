"""One turn as a row of JSON: what is read from it, and what is wrong with it.

Not here: files and whole conversations (``sources``).
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from rxlm.data.conversations import INTERACTION_KINDS, OPTIONAL_PARTS, Interaction
from rxlm.errors import UserError

logger = logging.getLogger(__name__)

TOOL_RESPONSE = "tool_response"
"""Another name of ``tool_use`` in published data sets."""
_JSON_PARTS = ("tool_call", "tool_use")
PART_NAMES = ("query", "answer", *OPTIONAL_PARTS, TOOL_RESPONSE)
"""Fields of a row that hold what is said in a turn."""
REJECTED = "rejected"
"""A worse answer, which is not said."""
_TEXT_NAMES = (*PART_NAMES, REJECTED)


def parse_interaction(item: Any, where: str) -> Interaction:
    """Return the turn in ``item`` (decoded JSON).

    ``query`` and ``answer`` are texts. A tool's result (``tool_use``, or ``tool_response``) stands
    in place of the query, and beside a ``tool_call`` the answer may be missing. ``think`` and
    ``internal`` may be there; empty texts of all four count as absent. ``rejected``, a worse answer
    than ``answer``, may be there, too.

    Args:
        item: a row.
        where: place for messages, ending in an open quote: the name of the field completes it.

    Raises:
        UserError: naming field, expectation and remedy.
    """
    if not isinstance(item, Mapping):
        raise UserError(
            f"{where}': expected an object with 'query' and 'answer', got {shown(item)}."
        )
    _warn_of_near_misses(item)
    parts = {name: _optional_text(item, name, where) for name in OPTIONAL_PARTS}
    answer = item.get("answer")
    if parts["tool_call"] is not None and answer is None:
        answer = ""
    query = item.get("query")
    if parts["tool_use"] is not None:
        if query:
            raise UserError(
                f"{where}.query': this turn has a tool's result as well; a turn begins with one "
                "of them. Leave 'query' out, or make two turns of it."
            )
        query = ""
    for field, text in (("query", query), ("answer", answer)):
        # A user may say nothing (dialogue data marks silence so); an answer is what is learned.
        needed = field == "answer" and parts["tool_call"] is None
        if not isinstance(text, str) or (needed and not text.strip()):
            raise UserError(
                f"{where}.{field}': expected {'non-empty ' if field == 'answer' else ''}text, got "
                f"{shown(text)}. Fill it in, or remove the turn."
            )
    rejected = _optional_text(item, REJECTED, where)
    if rejected is not None and rejected.strip() == str(answer).strip():
        raise UserError(
            f"{where}.{REJECTED}': is the same text as 'answer', so neither is better; got "
            f"{shown(rejected)}. Write a worse answer, or leave the field out."
        )
    kind, distance = item.get("kind"), item.get("distance")
    return Interaction(
        query=str(query),
        answer=str(answer),
        kind=kind if kind in INTERACTION_KINDS else "chat",
        fact=item["fact"] if isinstance(item.get("fact"), str) else None,
        value=item["value"] if isinstance(item.get("value"), str) else None,
        stale=tuple(_strings(item.get("stale"))),
        distance=distance if type(distance) is int and distance >= 1 else None,
        told=tuple(
            (pair[0], pair[1]) for pair in map(_strings, _items(item.get("told"))) if len(pair) == 2
        ),
        **parts,
        rejected=rejected,
    )


def _optional_text(item: Mapping[str, Any], name: str, where: str) -> str | None:
    """Return the text of a part that need not be there; a call may be given as an object."""
    value = item.get(name)
    if name == "tool_use":
        other = item.get(TOOL_RESPONSE)
        if value and other:
            raise UserError(f"{where}.{name}': '{TOOL_RESPONSE}' is the same; keep one of them.")
        value = value or other
    if isinstance(value, Mapping | list) and name in _JSON_PARTS:
        value = json.dumps(value, ensure_ascii=False) if value else None
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        raise UserError(
            f"{where}.{name}': expected text{' or an object' if name in _JSON_PARTS else ''}, got "
            f"{shown(value)}. Make it a string or leave it out."
        )
    return value


def _warn_of_near_misses(item: Mapping[str, Any]) -> None:
    """Other people's fields are left out, but 'thinking' or 'tool_calls' are hardly meant so."""
    for name in item:
        if name not in _TEXT_NAMES:
            _warn_once(str(name))


@lru_cache(maxsize=1000)
def _warn_once(name: str) -> None:
    near = difflib.get_close_matches(name, _TEXT_NAMES, n=1, cutoff=0.7)
    if near:
        logger.warning("field '%s' of a turn is left out: did you mean '%s'?", name, near[0])


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _strings(value: Any) -> list[str]:
    return [item for item in _items(value) if isinstance(item, str)]


def shown(value: Any) -> str:
    """Return ``value`` as JSON-like text that is short enough for a message."""
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
