"""The form of an interaction as text: for people, and as the ecosystem's chat template (Jinja).

Both follow the table in ``interaction``, so that other tools form an interaction as ``template``
(ids) does. Spelled text is for reading: a text that spells a special token looks like one, which
is why nothing here is ever turned back into ids. Not here: anything that needs a tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rxlm.tokenization.interaction import PLAIN_TEMPLATE, InteractionTemplate, Section
from rxlm.tokenization.special import SpecialTokens


def render_interaction(
    query: str,
    answer: str,
    internal: str | None = None,
    special: SpecialTokens | None = None,
) -> str:
    """Return the interaction as text with spelled special tokens, for people and other tools."""
    return render_text({"query": query, "answer": answer, "internal": internal}, special=special)


def render_text(
    parts: Mapping[str, str | None],
    template: InteractionTemplate = PLAIN_TEMPLATE,
    special: SpecialTokens | None = None,
) -> str:
    """Return an interaction of any parts as text with spelled special tokens.

    Raises:
        UserError: for parts that do not make an interaction of ``template``.
    """
    special = special or SpecialTokens()
    return special.bos + spelled(template.sections(parts), special) + special.eos


def spelled(sections: Iterable[Section], special: SpecialTokens) -> str:
    """Return sections as text, each after the spelling of the special token that opens it."""
    return "".join(opening(special, section.name) + section.text for section in sections)


def opening(special: SpecialTokens, section_name: str) -> str:
    """Return the spelling of the special token that opens the section ``section_name``."""
    spelling: str = getattr(special, section_name)
    return spelling


def chat_template(
    special: SpecialTokens | None = None, template: InteractionTemplate = PLAIN_TEMPLATE
) -> str:
    """Return the Jinja template that ``transformers`` and servers read (``chat_template.jinja``).

    Messages are ``system``, ``user`` (with an optional ``internal`` text), ``assistant`` and, where
    the form has tools, ``tool``; an assistant's message may have ``think`` and ``tool_call`` texts
    there, and ``thinking_mode`` chooses how a generation prompt ends. A reactive model needs only
    the newest user message: its memory holds the others.
    """
    special = special or SpecialTokens()

    def literal(text: str) -> str:
        return "{{- '" + text + "' -}}"

    def message(field: str, section_name: str, default: str = "") -> str:
        value = "{{- message['" + field + "']" + default + " -}}"
        return literal(opening(special, section_name)) + value

    def optional(name: str) -> str:
        present = f"message['{name}'] is defined and message['{name}'] is not none"
        return "{%- if " + present + " -%}" + message(name, name) + "{%- endif -%}"

    def given(opener: str) -> list[str]:
        return [
            message("content", opener) if name == opener else optional(name)
            for name in template.given
            if name in ("internal", opener)
        ]

    # Only beside a tool call may there be no answer.
    no_answer = " or ''" if "tool_call" in template.said else ""
    said = [
        message("content", "answer", no_answer) if name == "answer" else optional(name)
        for name in template.said
    ]
    head = template.system_section("").text
    title = head.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    tool = "{%- elif message['role'] == 'tool' -%}"
    prompt = _generation_prompt(special, template)
    lines = [
        "{%- for message in messages -%}",
        "{%- if message['role'] == 'system' -%}",
        literal(special.bos)
        + literal(opening(special, "internal") + title)
        + "{{- message['content'] -}}"
        + literal(special.eos),
        "{%- elif message['role'] == 'user' -%}",
        literal(special.bos),
        *given("query"),
        *([tool, literal(special.bos), *given("tool_use")] if "tool_use" in template.given else []),
        "{%- elif message['role'] == 'assistant' -%}",
        *said[:-1],
        said[-1] + literal(special.eos),
        "{%- else -%}",
        "{{- raise_exception('unknown role: ' ~ message['role']) -}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        "{%- if add_generation_prompt -%}" + prompt + "{%- endif -%}",
    ]
    return "\n".join(lines) + "\n"


def _generation_prompt(special: SpecialTokens, template: InteractionTemplate) -> str:
    """Return the Jinja code of what opens what the model says."""
    answer = "{{- '" + opening(special, "answer") + "' -}}"
    if "think" not in template.said:
        return answer
    think = "{{- '" + opening(special, "think") + "' -}}"
    # In mode 'auto' the model itself chooses how it begins.
    return (
        "{%- if thinking_mode is defined and thinking_mode == 'extended' -%}"
        + think
        + "{%- elif thinking_mode is not defined or thinking_mode != 'auto' -%}"
        + answer
        + "{%- endif -%}"
    )
