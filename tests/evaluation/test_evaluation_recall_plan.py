"""What the recall test asks."""

from __future__ import annotations

import itertools

import pytest

from rxlm.data import DialogueGenerator
from rxlm.data.facts import FACT_KINDS
from rxlm.errors import UserError
from rxlm.evaluation.recall_plan import (
    SEED_STRIDE,
    Cell,
    RecallSettings,
    cell_dialogues,
    plan_cells,
)


def test_the_default_plan_covers_the_acceptance() -> None:
    """Catches a cell that the summary needs and the plan does not run, or runs twice."""
    cells = plan_cells(RecallSettings())
    assert len(set(cells)) == len(cells)
    main = {
        (cell.distance, cell.facts)
        for cell in cells
        if (cell.test, cell.unseen, cell.history) == ("recall", "pairs", "reference")
    }
    assert main == set(itertools.product((1, 2, 4, 8, 16), (1, 2, 4)))
    others = {(cell.test, cell.unseen, cell.history) for cell in cells if cell.unseen != "pairs"}
    assert others == {
        ("recall", "none", "reference"),
        ("recall", "templates", "reference"),
        ("recall", "words", "reference"),
        ("update", "none", "reference"),
        ("unknown", "none", "reference"),
    }
    assert [cell.distance for cell in cells if cell.history == "own"] == [1, 2, 4, 8, 16]
    assert {cell.distance for cell in cells if cell.test == "update"} == {1, 4, 8}


def test_every_cell_can_be_built_and_asks_what_it_says() -> None:
    """Catches settings that the generator refuses, and a distance off by one."""
    generator = DialogueGenerator()
    for cell in plan_cells(RecallSettings(facts=(1, 12), distances=(1, 3))):
        asked = cell_dialogues(generator, cell, seed=1, count=2)[0].interactions[-1]
        if cell.test == "unknown":
            assert asked.kind == "unknown" and asked.value is None
        else:
            assert asked.distance == cell.distance
            assert bool(asked.stale) == (cell.test == "update")


def test_seeds_ask_other_dialogues_for_the_same_kinds() -> None:
    """Catches overlapping seeds (a spread that is too small) and kinds that differ by seed."""
    assert SEED_STRIDE % len(FACT_KINDS) == 0
    generator = DialogueGenerator()
    cell = Cell("recall", "none", 4, 2, "reference", ("memory",))
    sets = [cell_dialogues(generator, cell, seed, 30) for seed in (0, 1, 2)]
    ids = {dialogue.id for dialogues in sets for dialogue in dialogues}
    texts = {dialogue.interactions for dialogues in sets for dialogue in dialogues}
    assert len(ids) == len(texts) == 90
    kinds = [[dialogue.interactions[-1].fact for dialogue in dialogues] for dialogues in sets]
    assert kinds[0] == kinds[1] == kinds[2]


def test_main_test_values_are_held_out() -> None:
    """Catches a main test that asks for pairs the model was trained on."""
    generator = DialogueGenerator()
    cell = plan_cells(RecallSettings())[0]
    for dialogue in cell_dialogues(generator, cell, seed=0, count=24):
        asked = dialogue.interactions[-1]
        assert asked.fact is not None
        assert asked.value in generator.held_out(asked.fact)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dialogues", 1),
        ("distances", ()),
        ("distances", (1, 0)),
        ("seeds", (0, 0)),
        ("seeds", (-1,)),
        ("conditions", ("memory", "memory")),
        ("unseen", ("nothing",)),
    ],
)
def test_settings_that_make_no_test_are_refused(field: str, value: object) -> None:
    """Catches an empty or doubled test that would run and look fine."""
    with pytest.raises(UserError, match=field):
        RecallSettings.parse({field: value})
