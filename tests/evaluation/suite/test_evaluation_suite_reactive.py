"""A reactive model as a contestant: the same answers as in the recall test, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from rxlm.data import DialogueGenerator
from rxlm.evaluation import recall
from rxlm.evaluation.recall_plan import RecallSettings, plan_cells
from rxlm.evaluation.suite.facts import answers_of
from rxlm.evaluation.suite.reactive import ReactiveContestant
from rxlm.rxt.dialogues import TurnEncoder
from rxlm.rxt.models import RxTAlpha

SETTINGS = RecallSettings(
    distances=(2,),
    facts=(3,),
    dialogues=5,
    max_answer_tokens=6,
    conditions=("memory", "zeroed", "swapped"),
)


@pytest.mark.parametrize("batch_size", [2, 100])
def test_controls_are_those_of_the_recall_test(
    make_model: Callable[..., RxTAlpha], batch_size: int
) -> None:
    """Catches X that reads its own memory, Z that reads one, and a neighbour within the batch."""
    model = make_model(init_type="standard")
    cell = plan_cells(SETTINGS)[0]
    dialogues = recall.cell_dialogues(DialogueGenerator(), cell, 0, 5)
    turns = TurnEncoder(model.require_tokenizer(), 64)
    wanted = recall.answer_cell(model, turns, dialogues, cell, SETTINGS)
    found = dict(answers_of([ReactiveContestant(model, batch_size, 6)], dialogues))
    assert found == {"M": wanted["memory"], "Z": wanted["zeroed"], "X": wanted["swapped"]}
    assert found["M"] != found["Z"] != found["X"] != found["M"], "the test sees nothing"


def test_turns_that_do_not_fit(make_model: Callable[..., RxTAlpha]) -> None:
    """Catches an endless answer of the model that stops the suite, or is taken as fitting."""
    contestant = ReactiveContestant(make_model())
    turn = DialogueGenerator().conversation(0, 1).interactions[0]
    long = replace(turn, answer="very " * 200)
    assert contestant.fits([turn]) and not contestant.fits([turn, long])
    assert contestant.read([[turn, long]]).batch_size == 1
