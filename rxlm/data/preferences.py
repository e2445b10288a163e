"""Worse answers to the questions of built-in dialogues, so that preferences need no annotators.

An answer that only a memory can tell from the right one:

* asked for a fact that was changed: the answer as it was before (the stale value);
* asked for a fact: a value that was told for something else, else one never told; sometimes "I do
  not know";
* asked for what was never told: a value all the same.

Answers of files bring their own (``rejected``). Not here: what is trained on a pair.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from rxlm.data.conversations import Conversation, Interaction
from rxlm.data.dialogue import pick, seeded
from rxlm.data.facts import KINDS_BY_NAME, FactKind

STALE_SHARE = 0.6
"""Of the pairs about a fact that was changed: how many reject an old value."""
REFUSAL_SHARE = 0.2
"""Of the other pairs about a fact that was told: how many reject a refusal."""
TOLD_SHARE = 0.7
"""Of the pairs that reject a wrong value: how many take one that was told for something else."""


def with_rejected(conversation: Conversation) -> Conversation:
    """Return the conversation with a rejected answer at every question on a built-in fact.

    A function of the conversation alone: its id draws. Turns that have a rejected answer keep it;
    turns that ask for nothing get none.
    """
    rng = seeded("preferences", conversation.id)
    told: dict[str, str] = {}
    turns = []
    for interaction in conversation.interactions:
        rejected = interaction.rejected
        if rejected is None and interaction.fact in KINDS_BY_NAME:
            rejected = _rejected(rng, interaction, told)
        turns.append(replace(interaction, rejected=rejected))
        told.update(interaction.told)
    return replace(conversation, interactions=tuple(turns))


def has_pairs(conversations: Iterable[Conversation]) -> bool:
    """Return whether :func:`with_rejected` finds a pair in any of the conversations."""
    return any(
        interaction.rejected is not None
        for conversation in conversations
        for interaction in with_rejected(conversation).interactions
    )


def as_rejected(conversation: Conversation) -> Conversation:
    """Return a conversation of the turns with a rejected answer, which stands as the answer."""
    turns = tuple(
        rejected_turn(interaction)
        for interaction in conversation.interactions
        if interaction.rejected is not None
    )
    return replace(conversation, interactions=turns)


def rejected_turn(interaction: Interaction) -> Interaction:
    """Return the turn as if the rejected answer had been given."""
    assert interaction.rejected is not None, "asked for turns with a pair only"
    return replace(interaction, answer=interaction.rejected, rejected=None)


def _rejected(rng: random.Random, asked: Interaction, told: dict[str, str]) -> str | None:
    """Return a wrong answer to a question; None for a turn that is none."""
    kind = KINDS_BY_NAME[asked.fact or ""]
    if asked.kind == "unknown":
        return kind.answer.replace("{}", _wrong_value(rng, kind, told, None))
    if asked.kind != "question":
        return None
    if asked.stale and rng.random() < STALE_SHARE:
        # A value that was told again is right again.
        old = [value for value in asked.stale if value != asked.value]
        if old:
            return kind.answer.replace("{}", old[-1])
    if rng.random() < REFUSAL_SHARE:
        return kind.unknown
    return kind.answer.replace("{}", _wrong_value(rng, kind, told, asked.value))


def _wrong_value(
    rng: random.Random, kind: FactKind, told: dict[str, str], right: str | None
) -> str:
    others: Sequence[str] = [
        value for name, value in told.items() if name != kind.name and value != right
    ]
    if others and rng.random() < TOLD_SHARE:
        return pick(rng, others)
    return pick(rng, [value for value in kind.values if value != right])
