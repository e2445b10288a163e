"""The form of an interaction: its parts, their order, and who says them. One table, no tokenizer.

    given to the model   ([I] internal) ([U] tool result | [Q] query)
    said by the model    ([T] thinking) [A] answer ([C] tool call)

What the model says is what it learns: one run of tokens, from its first part to [EOS]. The plain
form (RxTAlpha) has a query and an answer; the rich one (RxTBeta) all of it. ``template`` makes ids
and loss masks of it, ``chat_format`` text and Jinja.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from pydantic import model_validator

from rxlm.configuration import Config
from rxlm.errors import UserError

GivenPart = Literal["internal", "tool_use", "query"]
SaidPart = Literal["think", "answer", "tool_call"]

PARTS = ("internal", "tool_use", "query", "think", "answer", "tool_call")
"""Every part; each is opened by the special token of the same role."""
OPENERS = ("tool_use", "query")
"""What an interaction is about: one of them, not both."""
SYSTEM_TITLE = "SYSTEM INSTRUCTIONS"
"""What tells a system text from other internal instructions, in the rich form."""


class Section(NamedTuple):
    """One part of an interaction that is there: its name (of :data:`PARTS`), and its text."""

    name: str
    text: str


class InteractionTemplate(Config):
    """Which parts an interaction may have, in order. Saved with the tokenizer."""

    given: tuple[GivenPart, ...] = ("internal", "query")
    """What is put before the model."""
    said: tuple[SaidPart, ...] = ("answer",)
    """What the model says, and learns to say."""
    system_title: str | None = None
    """Heads a system text, followed by an empty line; ``None``: no title."""

    @model_validator(mode="after")
    def _check_parts(self) -> InteractionTemplate:
        for field, needed in (("given", "internal"), ("given", "query"), ("said", "answer")):
            if needed not in getattr(self, field):
                raise ValueError(f"{field} must name '{needed}'")
        wanted = tuple(name for name in PARTS if name in self.parts)
        if self.parts != wanted:
            raise ValueError(
                f"parts are named once each and in order, got {', '.join(self.parts)}: "
                f"write {', '.join(wanted)}"
            )
        return self

    @property
    def parts(self) -> tuple[str, ...]:
        """Every part in the order in which they stand."""
        return (*self.given, *self.said)

    def sections(self, parts: Mapping[str, str | None]) -> list[Section]:
        """Return what stands between [BOS] and [EOS] of a whole interaction.

        The answer is always there, empty beside a tool call: [A] is where thinking ends.

        Args:
            parts: texts by name; ``None`` is a part that is not there.

        Raises:
            UserError: for a part that is unknown or not of this form, and for an interaction
                without a beginning (query or tool result) or an end (answer or tool call).
        """
        given = self.given_sections(parts)
        if parts.get("answer") is None and parts.get("tool_call") is None:
            raise UserError(
                "an interaction ends with what the model says: give 'answer' or 'tool_call'."
            )
        return [*given, *_present({**parts, "answer": parts.get("answer") or ""}, self.said)]

    def given_sections(self, parts: Mapping[str, str | None]) -> list[Section]:
        """Return what stands before the model speaks; arguments and errors as :meth:`sections`."""
        self.check_names(name for name in parts if parts[name] is not None)
        openers = [name for name in OPENERS if parts.get(name) is not None]
        if len(openers) != 1:
            raise UserError(
                f"an interaction begins with a query or with a tool's result ('tool_use'), got "
                f"{' and '.join(openers) or 'neither'}: give exactly one."
            )
        return _present(parts, self.given)

    def system_section(self, text: str) -> Section:
        """Return a system text as the only part of its interaction."""
        return Section("internal", f"{self.system_title}\n\n{text}" if self.system_title else text)

    def check_names(self, names: Iterable[str]) -> None:
        """Raise ``UserError`` for a name that is no part, with the one that was probably meant."""
        known = self.parts
        for name in names:
            if name in known:
                continue
            if name in PARTS:
                raise UserError(
                    f"the template of this tokenizer has no part '{name}' (it has "
                    f"{', '.join(known)}): use RxTBeta (model.architecture: beta in a recipe), "
                    "or leave it out."
                )
            raise UserError(unknown_part_message(name, known))


PLAIN_TEMPLATE = InteractionTemplate()
"""Query and answer, perhaps with internal context: RxTAlpha, and every tokenizer as trained."""
RICH_TEMPLATE = InteractionTemplate(
    given=("internal", "tool_use", "query"),
    said=("think", "answer", "tool_call"),
    system_title=SYSTEM_TITLE,
)
"""Thinking, tools and a titled system text: RxTBeta."""


def unknown_part_message(name: str, known: Iterable[str]) -> str:
    """Say that ``name`` is no part of an interaction, and which one was probably meant."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(names)}."
    return f"an interaction has no part '{name}': {hint}"


def _present(parts: Mapping[str, str | None], order: Iterable[str]) -> list[Section]:
    return [Section(name, text) for name in order if (text := parts.get(name)) is not None]
