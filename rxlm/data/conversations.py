"""What a conversation is: turns of query and answer, with what a test needs to know about each; and
what a source of them offers.

Not here: reading them from files (``sources``), making them up (``generator``), tokens
(``rxlm.tokenization``). A conversation is an immutable value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

INTERACTION_KINDS = ("chat", "fact", "update", "question", "unknown")
"""What a turn does: small talk, tells facts, changes one, asks for one, asks for one never told."""
OPTIONAL_PARTS = ("think", "tool_call", "tool_use", "internal")
"""Texts that a turn may have beside query and answer."""


@dataclass(frozen=True)
class Interaction:
    """One turn: what the user says (or a tool returns) and what the model answers."""

    query: str
    answer: str
    kind: str = "chat"
    """One of :data:`INTERACTION_KINDS`."""
    fact: str | None = None
    """Kind of the fact that is asked, changed or told (the first one, if it tells two)."""
    value: str | None = None
    """Its value after this turn; ``None`` when it was never told."""
    stale: tuple[str, ...] = ()
    """Values that the fact had before, oldest first: answering one of these is a stale answer."""
    distance: int | None = None
    """On questions: turns since the fact was last told or changed; 1 is the previous turn."""
    told: tuple[tuple[str, str], ...] = ()
    """(fact kind, value) pairs that this turn tells or changes."""
    think: str | None = None
    """What the model thinks before it answers."""
    tool_call: str | None = None
    """The tool that the model calls after its answer (which may then be empty), as JSON."""
    tool_use: str | None = None
    """Result of the tool called in the turn before; it stands in place of a query (then empty)."""
    internal: str | None = None
    """Context for this turn only, which the user does not see."""
    rejected: str | None = None
    """A worse answer to the same query, for preference optimisation; nobody has said it."""

    def parts(self) -> dict[str, str]:
        """Return the texts that are there, by name, in the order in which they are said."""
        opener = {"query": self.query} if self.tool_use is None else {"tool_use": self.tool_use}
        if self.tool_use is not None and self.query:
            opener["query"] = self.query  # One too many: rendering refuses it.
        texts = {
            "internal": self.internal,
            **opener,
            "think": self.think,
            "answer": self.answer,
            "tool_call": self.tool_call,
        }
        return {name: text for name, text in texts.items() if text is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; metadata at its default is left out."""
        row: dict[str, Any] = {"query": self.query, "answer": self.answer}
        if self.kind != "chat":
            row["kind"] = self.kind
        if self.fact is not None:
            row["fact"] = self.fact
        if self.value is not None:
            row["value"] = self.value
        if self.stale:
            row["stale"] = list(self.stale)
        if self.distance is not None:
            row["distance"] = self.distance
        if self.told:
            row["told"] = [list(pair) for pair in self.told]
        row.update({name: self.parts()[name] for name in OPTIONAL_PARTS if name in self.parts()})
        if self.rejected is not None:
            row["rejected"] = self.rejected
        return row

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Interaction:
        """Return the interaction that :meth:`to_dict` wrote (trusted input; no checks)."""
        return cls(
            query=row["query"],
            answer=row["answer"],
            kind=row.get("kind", "chat"),
            fact=row.get("fact"),
            value=row.get("value"),
            stale=tuple(row.get("stale", ())),
            distance=row.get("distance"),
            told=tuple((pair[0], pair[1]) for pair in row.get("told", ())),
            **{name: row.get(name) for name in OPTIONAL_PARTS},
            rejected=row.get("rejected"),
        )


@dataclass(frozen=True)
class Conversation:
    """Interactions in order, with the system text that precedes them, if any."""

    interactions: tuple[Interaction, ...]
    system: str | None = None
    id: str = ""
    source: str = ""

    def __len__(self) -> int:
        """Return the number of turns."""
        return len(self.interactions)

    def window(self, start: int, num_turns: int) -> Conversation:
        """Return turns ``start`` to ``start + num_turns`` as a conversation (system text kept)."""
        end = min(start + num_turns, len(self))
        if start == 0 and end == len(self):
            return self
        part = self.interactions[start:end]
        return replace(self, interactions=part, id=f"{self.id}[{start}:{end}]")

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: one line of a ``.jsonl`` file."""
        row: dict[str, Any] = {"id": self.id, "source": self.source}
        if self.system is not None:
            row["system"] = self.system
        row["interactions"] = [interaction.to_dict() for interaction in self.interactions]
        return row

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Conversation:
        """Return the conversation that :meth:`to_dict` wrote (trusted input; no checks)."""
        return cls(
            interactions=tuple(Interaction.from_dict(item) for item in row["interactions"]),
            system=row.get("system"),
            id=row.get("id", ""),
            source=row.get("source", ""),
        )


class ConversationSource(Protocol):
    """Conversations by position."""

    name: str
    """For logs and reports."""
    size: int | None
    """Conversations in an epoch; ``None``: endless."""
    has_probes: bool
    """Whether :meth:`probe_questions` can ask anything, of some conversation at least."""

    def sample(self, position: int, num_turns: int) -> Conversation:
        """Return the conversation at ``position`` (>= 0), of at most ``num_turns`` turns."""
        ...

    def has_probes_at(self, position: int) -> bool:
        """Return whether questions can be asked of the conversation at ``position``."""
        ...

    def probe_questions(
        self, conversation: Conversation, position: int, count: int
    ) -> list[tuple[int, Interaction]]:
        """Return (turn after which to ask, question) for facts told in ``conversation``.

        See :meth:`rxlm.data.generator.DialogueGenerator.probe_questions`.
        """
        ...
