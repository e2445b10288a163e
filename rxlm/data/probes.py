"""Test dialogues with a plan: one fact, told exactly so many turns before it is asked for.

For ``generator``; see :meth:`rxlm.data.generator.DialogueGenerator.probe`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from rxlm.data.conversations import Interaction
from rxlm.data.dialogue import Dialogue, made_up_word, pick, shuffled
from rxlm.data.facts import FACT_KINDS, FactKind
from rxlm.errors import UserError

PAIR_SHARE = 0.2
"""Of the other facts before the one under test: how often two share a sentence."""
QUESTION_SHARE = 0.3
"""Of the turns between that tell nothing: how many ask for another fact."""
PROBE_KINDS = ("recall", "update", "unknown")
OLD = "old value"
UNSEEN = ("none", "pairs", "templates", "words")

Turn = Callable[[], None]
Values = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class ProbePlan:
    """What to test; refuses what cannot be built."""

    kind: str
    distance: int
    num_facts: int
    unseen: str
    together: int = 1
    """How many facts the sentence tells that tells the one under test."""

    def __post_init__(self) -> None:
        if self.kind not in PROBE_KINDS:
            raise UserError(f"kind={self.kind!r}: expected one of {', '.join(PROBE_KINDS)}.")
        if self.unseen not in UNSEEN:
            raise UserError(f"unseen={self.unseen!r}: expected one of {', '.join(UNSEEN)}.")
        if self.kind == "unknown" and self.unseen in ("pairs", "words"):
            raise UserError(
                f"kind='unknown' has no value, so unseen={self.unseen!r} does not apply to it."
            )
        if self.distance < 1:
            raise UserError(f"distance={self.distance}: expected at least 1 (the previous turn).")
        if not 1 <= self.together <= self.num_facts:
            raise UserError(
                f"together={self.together}: expected 1 to num_facts={self.num_facts} facts in the "
                "sentence that tells the one under test."
            )
        if self.together > 1 and (self.kind != "recall" or self.unseen == "templates"):
            raise UserError(
                f"together={self.together}: several facts in one sentence are told in one wording, "
                f"and only kind='recall' asks for them; got kind={self.kind!r}, "
                f"unseen={self.unseen!r}."
            )
        most = len(FACT_KINDS) - (self.kind == "unknown")
        if not 1 <= self.num_facts <= most:
            raise UserError(
                f"num_facts={self.num_facts}: expected 1 to {most} for kind={self.kind!r} "
                f"(there are {len(FACT_KINDS)} kinds of fact)."
            )


def build(
    plan: ProbePlan, dialogue: Dialogue, index: int, held_out: Values
) -> tuple[Interaction, ...]:
    """Return the turns: [other facts, small talk] fact [facts, small talk, questions] question.

    Args:
        plan: what to test.
        dialogue: an empty one; all choices come from its ``rng``.
        index: number of the dialogue; the kinds of fact under test take turns over it.
        held_out: per kind, the values that facts of training never take.
    """
    rng = dialogue.rng
    tested, others = _choose_kinds(plan, dialogue, index, held_out)
    # Of an unknown fact there is nothing to tell: another one is told at the distance instead.
    told = others.pop() if plan.kind == "unknown" else tested
    values = _choose_values(plan, dialogue, told, others, held_out)
    companions = [others.pop() for _ in range(plan.together - 1)]
    unusual = plan.unseen == "templates"
    statements = told.statements[-1:] if unusual else None

    num_between = int(rng.random() * (min(len(others), plan.distance - 1) + 1))
    between, before = others[:num_between], others[num_between:]
    first = _other_turns(dialogue, before, values)
    if plan.kind == "update":
        first.append(partial(dialogue.tell, told, values[OLD], statements))
    first += [dialogue.chat] * pick(rng, (0, 0, 1, 2, 3))
    for turn in shuffled(rng, first):
        turn()

    if plan.kind == "update":
        dialogue.update(told, values[told.name])
    elif companions:
        facts = [(kind, values[kind.name]) for kind in (told, *companions)]
        dialogue.tell_several(shuffled(rng, facts))
    else:
        dialogue.tell(told, values[told.name], statements)

    _fill_between(dialogue, plan, between, values, told)
    questions = tested.questions[-1:] if unusual else None
    if plan.kind == "unknown":
        dialogue.add(dialogue.unknown_question(tested, questions))
    else:
        dialogue.add(dialogue.question(tested, questions))
    return tuple(dialogue.turns)


def _choose_kinds(
    plan: ProbePlan, dialogue: Dialogue, index: int, held_out: Values
) -> tuple[FactKind, list[FactKind]]:
    """Return the kind under test (they take turns) and the kinds of the other facts."""
    kinds = dialogue.kinds.values()
    possible = [kind for kind in kinds if plan.unseen != "pairs" or held_out[kind.name]]
    if not possible:
        raise UserError("unseen='pairs' needs held_out_values > 0 in the generator's settings.")
    tested = possible[index % len(possible)]
    rest = shuffled(dialogue.rng, (kind for kind in kinds if kind is not tested))
    return tested, rest[: plan.num_facts - (plan.kind != "unknown")]


def _choose_values(
    plan: ProbePlan, dialogue: Dialogue, told: FactKind, others: list[FactKind], held_out: Values
) -> dict[str, str]:
    """Return a value per kind, ``OLD`` for the one replaced; none twice within a pool."""
    values: dict[str, str] = {}
    keys = [(told.name, told), *((kind.name, kind) for kind in others)]
    if plan.kind == "update":
        keys.append((OLD, told))
    for key, kind in keys:
        special = plan.unseen if key == told.name else "none"
        if special == "words":
            values[key] = made_up_word(dialogue.rng, kind)
            continue
        pool = held_out[kind.name] if special == "pairs" else dialogue.free_values(kind)
        taken = set(values.values())
        values[key] = pick(dialogue.rng, [value for value in pool if value not in taken])
    return values


def _other_turns(
    dialogue: Dialogue, kinds: list[FactKind], values: Mapping[str, str]
) -> list[Turn]:
    """Return turns that tell ``kinds``, some of them two at a time."""
    turns: list[Turn] = []
    rest = list(kinds)
    while rest:
        kind = rest.pop()
        if rest and dialogue.rng.random() < PAIR_SHARE:
            other = rest.pop()
            pair = (kind, values[kind.name], other, values[other.name])
            turns.append(partial(dialogue.tell_two, *pair))
        else:
            turns.append(partial(dialogue.tell, kind, values[kind.name]))
    return turns


def _fill_between(
    dialogue: Dialogue,
    plan: ProbePlan,
    kinds: list[FactKind],
    values: Mapping[str, str],
    told: FactKind,
) -> None:
    """Add the ``distance - 1`` turns before the question: ``kinds`` at random places."""
    rng = dialogue.rng
    slots: list[FactKind | None] = [*kinds, *[None] * (plan.distance - 1 - len(kinds))]
    for kind in shuffled(rng, slots):
        known = [name for name in dialogue.told if name != told.name]
        if kind is not None:
            dialogue.tell(kind, values[kind.name])
        elif known and rng.random() < QUESTION_SHARE:
            dialogue.add(dialogue.question(dialogue.kinds[pick(rng, known)]))
        else:
            dialogue.chat()
