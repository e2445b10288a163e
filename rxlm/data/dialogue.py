"""A dialogue being made: adds turns one by one and knows which facts hold.

For ``generator`` and ``probes`` only. Randomness comes from ``rng.random()`` alone, the one method
that Python promises to reproduce across versions.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rxlm.data.conversations import Interaction
from rxlm.data.fact_values import POOLS
from rxlm.data.facts import ACKNOWLEDGEMENTS, DISTRACTORS, KINDS_BY_NAME, FactKind
from rxlm.data.wordings import WORDINGS, Wordings

ItemType = TypeVar("ItemType")

PREFIX_SHARE = 0.25
FIXED_CHAT_SHARE = 0.5
ONSETS = (*"bdfghjklmnprstvwz", "br", "dr", "gr", "kl", "pl", "st", "tr", "sh")
VOWELS = tuple("aeiou")
CODAS = ("", "", *"nrlsmxk")
NUM_SYLLABLES = 2
ALL_VALUES = tuple(value for values in POOLS.values() for value in values)


def seeded(*parts: object) -> random.Random:
    """Return a generator of random numbers that depends on ``parts`` only."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return random.Random(int.from_bytes(digest[:16], "big"))


def pick(rng: random.Random, items: Sequence[ItemType]) -> ItemType:
    """Return one of ``items``, each with the same probability."""
    return items[int(rng.random() * len(items))]


def shuffled(rng: random.Random, items: Iterable[ItemType]) -> list[ItemType]:
    """Return ``items`` in random order (Fisher-Yates)."""
    result = list(items)
    for last in range(len(result) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        result[last], result[other] = result[other], result[last]
    return result


def capitalised(text: str) -> str:
    """Return ``text`` with its first letter in upper case, the others as they are."""
    return text[0].upper() + text[1:]


def acknowledgement(wording: int, echo: str) -> str:
    """Return what is answered to the ``wording``-th way to tell something: half of them an echo.

    It follows from the wording, so that it can be learned: an answer drawn at random is noise in
    the loss, and drowns the lesson of the questions.
    """
    if wording % 2:
        return echo
    return ACKNOWLEDGEMENTS[wording // 2 % len(ACKNOWLEDGEMENTS)]


def _listed(clauses: Sequence[str]) -> str:
    return f"{', '.join(clauses[:-1])} and {clauses[-1]}"


def made_up_word(rng: random.Random, kind: FactKind) -> str:
    """Return a word of two random syllables, such as "Brulom": one of about a million."""
    word = "".join(
        pick(rng, ONSETS) + pick(rng, VOWELS) + pick(rng, CODAS) for _ in range(NUM_SYLLABLES)
    )
    return capitalised(word) if kind.values[0][0].isupper() else word


@dataclass(frozen=True)
class ToldFact:
    """What was said last about one kind of fact."""

    value: str
    turn: int
    stale: tuple[str, ...] = ()


class Dialogue:
    """Turns so far, and the facts that hold after them.

    Args:
        rng: where all choices come from.
        values: per kind, the values that facts may take (training pairs).
        any_value: share of the facts whose value is taken from the pools of all kinds.
        made_up: share of the facts whose value is a made-up word.
        held_out: per kind, the values that facts never take.
        wordings: how the user talks.
    """

    def __init__(
        self,
        rng: random.Random,
        values: Mapping[str, tuple[str, ...]],
        any_value: float = 0.0,
        made_up: float = 0.0,
        held_out: Mapping[str, tuple[str, ...]] | None = None,
        wordings: Wordings = WORDINGS["few"],
    ) -> None:
        self.rng = rng
        self._wordings = wordings
        self.kinds = {kind.name: kind for kind in wordings.kinds}
        self._any_value, self._made_up = any_value, made_up
        self._held_out = held_out or {}
        self.turns: list[Interaction] = []
        self.told: dict[str, ToldFact] = {}
        self._values = values
        self._used: set[str] = set()

    def replay(self, interactions: Sequence[Interaction]) -> None:
        """Take ``interactions`` as the turns so far (an extension of the present ones)."""
        for interaction in interactions[len(self.turns) :]:
            self._record(
                [(kind, value) for kind, value in interaction.told if kind in KINDS_BY_NAME]
            )
            self.turns.append(interaction)

    def untold(self) -> tuple[FactKind, ...]:
        """Return the kinds that nothing was said about."""
        return tuple(kind for kind in self._wordings.kinds if kind.name not in self.told)

    def free_values(self, kind: FactKind) -> list[str]:
        """Return values of ``kind`` that no fact has or had in this dialogue.

        So a wrong binding (the sister's name for the friend's) never looks right by accident.
        """
        return [value for value in self._values[kind.name] if value not in self._used]

    def random_value(self, kind: FactKind, taken: Sequence[str] = ()) -> str | None:
        """Return a free value that is not ``taken``: of the kind's pool, or sometimes of any.

        A value of another pool ("my favourite colour is Oslo") does not betray the kind it was
        told for: only the binding in memory does. A made-up word has to be copied piece by piece.
        ``None`` when every value was used up.
        """
        draw = self.rng.random()
        if draw < self._any_value + self._made_up:
            never = self._held_out.get(kind.name, ())
            # Few of very many are excluded: drawing again is faster than listing the rest (and in
            # a dialogue so long that it fails, the kind's own pool will do).
            for _ in range(20):
                if draw < self._any_value:
                    value = pick(self.rng, ALL_VALUES)
                else:
                    value = made_up_word(self.rng, kind)
                if value not in self._used and value not in taken and value not in never:
                    return value
        free = [value for value in self.free_values(kind) if value not in taken]
        return pick(self.rng, free) if free else None

    def add(self, interaction: Interaction) -> None:
        """Append a turn."""
        self._record(interaction.told)
        self.turns.append(interaction)

    def tell(self, kind: FactKind, value: str, statements: Sequence[str] | None = None) -> None:
        """Add a turn that tells one fact (worded by ``statements`` if given)."""
        wording = pick(self.rng, statements or kind.statements[:-1])
        text = self._said(wording.replace("{}", value), self._wordings.statement_prefixes)
        echo = kind.echo.replace("{}", value)
        answer = acknowledgement(kind.statements.index(wording), echo)
        self.add(Interaction(text, answer, "fact", kind.name, value, told=((kind.name, value),)))

    def tell_two(self, first: FactKind, value: str, second: FactKind, other: str) -> None:
        """Add a turn that tells two facts in one sentence."""
        self.tell_several([(first, value), (second, other)])

    def tell_several(self, facts: Sequence[tuple[FactKind, str]]) -> None:
        """Add a turn that tells several facts (at least two) in one sentence."""
        clauses = [kind.clause.replace("{}", value) for kind, value in facts]
        known = [kind.answer.replace("{}", value).removesuffix(".") for kind, value in facts]
        rest = [f"{also[0].lower()}{also[1:]}" for also in known[1:]]
        echo = f"{_listed([known[0], *rest])}, noted."
        answer = acknowledgement(list(self.kinds).index(facts[0][0].name), echo)
        told = tuple((kind.name, value) for kind, value in facts)
        text = capitalised(f"{_listed(clauses)}.")
        self.add(Interaction(text, answer, "fact", *told[0], told=told))

    def tell_random(self, count: int) -> None:
        """Add a turn that tells ``count`` (1 or 2) facts of kinds not told yet."""
        kinds = shuffled(self.rng, self.untold())[:count]
        chosen: list[tuple[FactKind, str]] = []
        for kind in kinds:
            value = self.random_value(kind, [value for _, value in chosen])
            if value is not None:
                chosen.append((kind, value))
        if len(chosen) == 2:
            self.tell_two(*chosen[0], *chosen[1])
        elif chosen:
            self.tell(*chosen[0])
        else:
            self.chat()

    def update(self, kind: FactKind, value: str) -> None:
        """Add a turn that changes a fact told earlier to ``value``."""
        before = self.told[kind.name]
        wording = pick(self.rng, kind.updates)
        text = self._said(wording.replace("{}", value))
        echo = kind.answer.replace("{}", value).removesuffix(".") + " now, noted."
        answer = acknowledgement(kind.updates.index(wording), echo)
        stale = (*before.stale, before.value)
        told = ((kind.name, value),)
        self.add(Interaction(text, answer, "update", kind.name, value, stale, told=told))

    def update_random(self) -> None:
        """Add a turn that changes one of the facts (small talk if every value was used up)."""
        kind = self.kinds[pick(self.rng, tuple(self.told))]
        value = self.random_value(kind)
        if value is not None:
            self.update(kind, value)
        else:
            self.chat()

    def asked_kind(self) -> FactKind:
        """Choose a told fact to ask for: any of them, the newest or the oldest."""
        draw = self.rng.random()
        if draw < 0.6:
            name = pick(self.rng, tuple(self.told))
        else:
            choose = max if draw < 0.8 else min
            name = choose(self.told, key=lambda item: self.told[item].turn)
        return self.kinds[name]

    def question(self, kind: FactKind, questions: Sequence[str] | None = None) -> Interaction:
        """Return a question for a told fact, as the next turn; it is not added."""
        fact = self.told[kind.name]
        text = pick(self.rng, questions or kind.questions[:-1])
        return Interaction(
            query=self._said(text, self._wordings.question_prefixes),
            answer=kind.answer.replace("{}", fact.value),
            kind="question",
            fact=kind.name,
            value=fact.value,
            stale=fact.stale,
            distance=len(self.turns) - fact.turn,
        )

    def unknown_question(
        self, kind: FactKind, questions: Sequence[str] | None = None
    ) -> Interaction:
        """Return a question for a fact never told, as the next turn; it is not added."""
        wording = pick(self.rng, questions or kind.questions[:-1])
        text = self._said(wording, self._wordings.question_prefixes)
        return Interaction(text, kind.unknown, "unknown", kind.name)

    def chat(self) -> None:
        """Add a turn with nothing to remember, half of them with a word that could be a fact."""
        rng = self.rng
        if rng.random() < FIXED_CHAT_SHARE:
            query, answer = pick(rng, self._wordings.small_talk)
        else:
            pool, query, answer = pick(rng, DISTRACTORS)
            value = pick(rng, POOLS[pool])
            query, answer = query.replace("{}", value), answer.replace("{}", value)
        self.add(Interaction(query, answer))

    def _said(self, text: str, prefixes: Sequence[str] = ()) -> str:
        """Return a sentence as the user writes it: after a prefix, carelessly or as it should be.

        A choice that the wordings do not offer draws nothing, so that dialogues stay the same.
        """
        casual = self._wordings.casual
        if casual > 0 and self.rng.random() < casual:
            return re.sub(r"\bI\b", "i", text).rstrip(".?!")
        if prefixes and self.rng.random() < PREFIX_SHARE:
            return pick(self.rng, prefixes) + text
        return capitalised(text)

    def _record(self, told: Iterable[tuple[str, str]]) -> None:
        turn = len(self.turns)
        for name, value in told:
            before = self.told.get(name)
            stale = (*before.stale, before.value) if before else ()
            self.told[name] = ToldFact(value, turn, stale)
            self._used.add(value)
