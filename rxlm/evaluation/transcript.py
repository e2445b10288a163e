"""A scripted conversation that is interrupted: told early, saved, and asked by a new process.

Proof that what is remembered is in the saved memory and nowhere else. The queries are phrases of
the built-in dialogues (``rxlm.data.facts``), so a model trained on them understands them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rxlm.evaluation.scoring import DECLINE, contains_word, normalise
from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.reactive import ReactiveModel
from rxlm.rxt.session import Session

USER, MODEL = "you", "model"


class Line(NamedTuple):
    """One thing said: in which turn (from 1), by whom (:data:`USER` or :data:`MODEL`), what."""

    turn: int
    speaker: str
    text: str


class ScriptedQuestion(NamedTuple):
    """A question of the second part and the word that a right answer holds."""

    query: str
    expected: str


TELL: tuple[str, ...] = (
    "My name is Maria.",
    "How are you today?",
    "I live in Lisbon.",
    "My dog is called Pixie.",
    "It is raining today.",
    "My favourite drink is juice.",
    "Do you like books?",
    "Actually, I moved to Vienna.",
    "Thank you.",
)
"""Part one, turns 1 to 9: four facts, one of them changed, and small talk."""

ASK: tuple[ScriptedQuestion, ...] = (
    ScriptedQuestion("What is my name?", "Maria"),
    ScriptedQuestion("What is my dog called?", "Pixie"),
    ScriptedQuestion("Where do I live?", "Vienna"),
    ScriptedQuestion("What is my job?", DECLINE),
)
"""Part two, turns 10 to 13, asked after a restart; the last was never told."""


def run_script(
    model: ReactiveModel, queries: Sequence[str], session_dir: str | Path, *, resume: bool
) -> list[Line]:
    """Say ``queries`` one after the other and save the conversation.

    Answers are greedy, so the same model always says the same.

    Args:
        model: with its tokenizer.
        queries: what the user says, a turn each.
        session_dir: where the session is saved; if not ``resume``, one that is there is replaced.
        resume: go on with the session saved there, as a new process does, instead of a new one.

    Returns:
        query and answer of every turn of this part.

    Raises:
        UserError: when resuming without a session of this model in ``session_dir``.
    """
    if resume:
        session = Session.load(session_dir, model)
    else:
        session = Session(model, settings=SamplingSettings(temperature=0.0), name="script")
    first = len(session.turns) + 1
    lines = []
    for turn, query in enumerate(queries, start=first):
        lines += [Line(turn, USER, query), Line(turn, MODEL, session.ask(query))]
    session.save(session_dir, overwrite=True)
    return lines


def judge(lines: Sequence[Line], questions: Sequence[ScriptedQuestion] = ASK) -> list[bool]:
    """Return for each of the ``questions`` in turn whether its answer in ``lines`` is right.

    A question that was not asked counts as not answered.
    """
    answers: dict[str, str] = {}
    for asked, answered in itertools.pairwise(lines):
        if asked.speaker == USER and answered.speaker == MODEL:
            answers[normalise(asked.text)] = answered.text
    return [
        contains_word(answers.get(normalise(item.query), ""), item.expected) for item in questions
    ]
