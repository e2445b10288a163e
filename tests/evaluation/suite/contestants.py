"""Contestants whose scores are known: an oracle, a dice, a parrot, and readers of known losses."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from rxlm.data import Conversation, Interaction
from rxlm.data.facts import FACT_KINDS, FactKind
from rxlm.evaluation.suite.contestant import Control, TokenLosses, Turns
from rxlm.tokenization import Tokenizer

KIND_OF_QUESTION = {question: kind for kind in FACT_KINDS for question in kind.questions}


def kind_asked(query: str) -> FactKind | None:
    """Return the kind of fact that a built-in question asks for."""
    lowered = query[0].lower() + query[1:]
    for question, kind in KIND_OF_QUESTION.items():
        if lowered.endswith(question) or query.endswith(question):
            return kind
    return None


class Textual:
    """A contestant that is a rule from the turns so far and the query to an answer."""

    def __init__(self, controls: tuple[Control, ...] = ("M",)) -> None:
        self.controls = controls

    def fits(self, turns: Turns) -> bool:
        return True

    def read(self, histories: Sequence[Turns]) -> list[tuple[Interaction, ...]]:
        return [tuple(turns) for turns in histories]

    def answer(self, held: Any, queries: Sequence[str], control: Control) -> list[str]:
        return [self.rule(turns, query) for turns, query in zip(held, queries, strict=True)]

    def losses(self, conversations: Sequence[Conversation]) -> dict[Control, TokenLosses]:
        raise NotImplementedError

    def rule(self, turns: Turns, query: str) -> str:
        raise NotImplementedError


class Oracle(Textual):
    """Remembers every fact told and answers as the data have it; others, from a book of answers."""

    def __init__(
        self,
        controls: tuple[Control, ...] = ("M",),
        conversations: Sequence[Conversation] = (),
    ) -> None:
        super().__init__(controls)
        self.book = {
            (*(turn.query for turn in item.interactions[:number]), turn.query): turn.answer
            for item in conversations
            for number, turn in enumerate(item.interactions)
        }

    def rule(self, turns: Turns, query: str) -> str:
        known = (*(turn.query for turn in turns), query)
        if known in self.book:
            return self.book[known]
        kind = kind_asked(query)
        assert kind is not None, query
        told = [value for turn in turns for name, value in turn.told if name == kind.name]
        return kind.answer.replace("{}", told[-1]) if told else kind.unknown


class Dice(Textual):
    """Answers every question in the right form with a random value of its pool."""

    def __init__(self, controls: tuple[Control, ...] = ("M",), seed: int = 0) -> None:
        super().__init__(controls)
        self.rng = random.Random(seed)

    def rule(self, turns: Turns, query: str) -> str:
        kind = kind_asked(query)
        assert kind is not None, query
        return kind.answer.replace("{}", self.rng.choice(kind.values))


class Parrot(Textual):
    """Says again what it said last."""

    def rule(self, turns: Turns, query: str) -> str:
        return turns[-1].answer if turns else ""


class First(Textual):
    """Remembers the first value that it was told and never the new one."""

    def rule(self, turns: Turns, query: str) -> str:
        kind = kind_asked(query)
        assert kind is not None, query
        told = [value for turn in turns for name, value in turn.told if name == kind.name]
        return kind.answer.replace("{}", told[0]) if told else kind.unknown


class Known(Textual):
    """Predicts every token with a probability that is known by control."""

    def __init__(self, tokenizer: Tokenizer, nats: dict[Control, float]) -> None:
        super().__init__(tuple(nats))
        self.tokenizer, self.nats = tokenizer, nats

    def losses(self, conversations: Sequence[Conversation]) -> dict[Control, TokenLosses]:
        counts = [
            [len(self.tokenizer.encode(turn.answer)) + 1 for turn in item.interactions]
            for item in conversations
        ]
        return {
            control: [[[nats] * count for count in turns] for turns in counts]
            for control, nats in self.nats.items()
        }
