"""The form of an interaction as text: which special token opens which section, in one table.

The table also makes the ecosystem's chat template (Jinja), so that other tools form an
interaction as ``template`` (ids) does. Not here: anything that needs a tokenizer.
"""

from __future__ import annotations

from typing import NamedTuple

from rxlm.tokenization.special import SpecialTokens

OPENING_ROLE = {"system": "internal", "internal": "internal", "query": "query", "answer": "answer"}
"""Which role's special token opens each section."""


class Section(NamedTuple):
    """One part of an interaction: its name in :data:`OPENING_ROLE`, and its text."""

    name: str
    text: str


def query_sections(query: str, internal: str | None = None) -> list[Section]:
    """Return what stands between [BOS] and [A]: internal context, if any, then the query."""
    sections = [Section("query", query)]
    return sections if internal is None else [Section("internal", internal), *sections]


def render_interaction(
    query: str,
    answer: str,
    internal: str | None = None,
    special: SpecialTokens | None = None,
) -> str:
    """Return the interaction as text with spelled special tokens, for people and other tools."""
    special = special or SpecialTokens()
    sections = [*query_sections(query, internal), Section("answer", answer)]
    body = "".join(opening(special, section.name) + section.text for section in sections)
    return special.bos + body + special.eos


def opening(special: SpecialTokens, section_name: str) -> str:
    """Return the spelling of the special token that opens the section ``section_name``."""
    spelling: str = getattr(special, OPENING_ROLE[section_name])
    return spelling


def chat_template(special: SpecialTokens | None = None) -> str:
    """Return the Jinja template that ``transformers`` and servers read (``chat_template.jinja``).

    Messages are ``system``, ``user`` (with an optional ``internal`` text) and ``assistant``. A
    reactive model needs only the newest user message: its memory holds the others.
    """
    special = special or SpecialTokens()

    def literal(text: str) -> str:
        return "{{- '" + text + "' -}}"

    def message(field: str, section_name: str) -> str:
        return literal(opening(special, section_name)) + "{{- message['" + field + "'] -}}"

    has_internal = "message['internal'] is defined and message['internal'] is not none"
    lines = [
        "{%- for message in messages -%}",
        "{%- if message['role'] == 'system' -%}",
        literal(special.bos) + message("content", "system") + literal(special.eos),
        "{%- elif message['role'] == 'user' -%}",
        literal(special.bos),
        "{%- if " + has_internal + " -%}" + message("internal", "internal") + "{%- endif -%}",
        message("content", "query"),
        "{%- elif message['role'] == 'assistant' -%}",
        message("content", "answer") + literal(special.eos),
        "{%- else -%}",
        "{{- raise_exception('unknown role: ' ~ message['role']) -}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        "{%- if add_generation_prompt -%}" + literal(opening(special, "answer")) + "{%- endif -%}",
    ]
    return "\n".join(lines) + "\n"
