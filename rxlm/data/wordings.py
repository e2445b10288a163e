"""Sets of wordings for the built-in dialogues: few that are learned fast, or many.

For ``generator``, ``dialogue`` and ``probes``; the wordings themselves stand in ``facts`` and
``more_wordings``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rxlm.data.facts import (
    FACT_KINDS,
    QUESTION_PREFIXES,
    SMALL_TALK,
    STATEMENT_PREFIXES,
    FactKind,
)
from rxlm.data.more_wordings import (
    MORE_QUESTION_PREFIXES,
    MORE_SMALL_TALK,
    MORE_STATEMENT_PREFIXES,
    MORE_WORDINGS,
    SUBJECT_QUESTIONS,
    SUBJECT_STATEMENTS,
    SUBJECT_UPDATES,
)


@dataclass(frozen=True)
class Wordings:
    """How the user of a built-in dialogue talks. What is answered is the same in every set."""

    kinds: tuple[FactKind, ...]
    statement_prefixes: tuple[str, ...]
    question_prefixes: tuple[str, ...]
    small_talk: tuple[tuple[str, str], ...]
    casual: float
    """Share of the turns about facts in lower case and without a full stop ("i live in Oslo")."""


def _with_more(kind: FactKind) -> FactKind:
    """Return ``kind`` with all its wordings; the last ones stay those held out of training."""
    more = MORE_WORDINGS[kind.name]

    def about(patterns: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(pattern.replace("{subject}", more.subject) for pattern in patterns)

    def joined(known: tuple[str, ...], added: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*known[:-1], *added, known[-1])))

    return replace(
        kind,
        statements=joined(kind.statements, more.statements + about(SUBJECT_STATEMENTS)),
        updates=joined(kind.updates, more.updates + about(SUBJECT_UPDATES)),
        questions=joined(kind.questions, more.questions + about(SUBJECT_QUESTIONS)),
    )


WORDINGS: dict[str, Wordings] = {
    "few": Wordings(FACT_KINDS, STATEMENT_PREFIXES, QUESTION_PREFIXES, SMALL_TALK, casual=0.0),
    "many": Wordings(
        tuple(_with_more(kind) for kind in FACT_KINDS),
        STATEMENT_PREFIXES + MORE_STATEMENT_PREFIXES,
        QUESTION_PREFIXES + MORE_QUESTION_PREFIXES,
        SMALL_TALK + MORE_SMALL_TALK,
        casual=0.15,
    ),
}
"""By the name in ``data.generator.wordings``."""
