"""The recall test: what is read under each control, what is counted, what does not matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from rxlm.data import DialogueGenerator, GeneratorConfig
from rxlm.errors import UserError
from rxlm.evaluation import recall
from rxlm.evaluation.conditions import memory_to_read
from rxlm.evaluation.recall import evaluate_recall
from rxlm.evaluation.recall_plan import SEED_STRIDE, RecallSettings, plan_cells
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.generation import Answer
from rxlm.rxt.models import RxTAlpha

CONDITIONS = ("memory", "zeroed", "reset", "swapped")
SMALL = RecallSettings(
    distances=(1, 2),
    facts=(2,),
    unseen=("pairs", "none"),
    update_distances=(2,),
    unknown_distances=(1,),
    dialogues=5,
    seeds=(0, 2),
    conditions=CONDITIONS,
    max_answer_tokens=6,
)


@pytest.mark.parametrize(
    ("batch_size", "init_type"), [(1, "standard"), (2, "learned"), (2, "standard"), (7, "learned")]
)
def test_the_batch_size_changes_nothing(
    make_model: Callable[..., RxTAlpha], batch_size: int, init_type: str
) -> None:
    """Catches neighbours taken within a batch, seeds that restart in each, and padding."""
    model = make_model(init_type=init_type)
    cell = plan_cells(SMALL)[1]
    assert cell.distance == 2
    turns = recall.TurnEncoder(model.require_tokenizer(), 64)
    dialogues = recall.cell_dialogues(DialogueGenerator(), cell, 0, 5)
    for history in ("reference", "own"):
        wanted = recall.answer_cell(model, turns, dialogues, cell._replace(history=history), SMALL)
        settings = SMALL.model_copy(update={"batch_size": batch_size})
        found = recall.answer_cell(
            model, turns, dialogues, cell._replace(history=history), settings
        )
        assert found == wanted
        assert wanted["memory"] != wanted["swapped"] != wanted["zeroed"], "the test sees nothing"


def test_each_condition_reads_what_it_says(
    model: RxTAlpha, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a control that reads the true memory: it would make any model look good or bad."""
    read: list[Tensor] = []

    def spy(
        _: RxTAlpha, state: ConversationState, queries: Sequence[str], limit: int
    ) -> list[Answer]:
        read.append(state.slots)
        return [Answer([], "eos", []) for _ in queries]

    monkeypatch.setattr(recall, "greedy_answers", spy)
    cell = plan_cells(SMALL)[0]
    turns = recall.TurnEncoder(model.require_tokenizer(), 64)
    dialogues = recall.cell_dialogues(DialogueGenerator(), cell, 0, 5)
    with torch.no_grad():
        recall.answer_cell(model, turns, dialogues, cell, SMALL)
        own = recall.memory_of_references(
            model, turns, [dialogue.interactions[:-1] for dialogue in dialogues]
        ).slots
        memory, zeroed, reset, swapped = read[0].chunk(4, dim=1)
        assert torch.equal(memory, own)
        assert torch.equal(zeroed, torch.zeros_like(own))
        assert torch.equal(reset, model.initial_memory(5))
        assert torch.equal(swapped, own[:, [1, 2, 3, 4, 0]])
    distances = torch.cdist(own.transpose(0, 1).flatten(1), own.transpose(0, 1).flatten(1))
    assert (distances + torch.eye(5)).min() > 0, "memories are told apart"


def test_swapping_gives_nobody_their_own() -> None:
    """Catches a permutation with a fixed point."""
    own = torch.arange(6.0).view(1, 6, 1, 1)
    swapped = memory_to_read("swapped", own, own.roll(-1, dims=1), own)
    assert (swapped != own).all()
    assert sorted(swapped.flatten().tolist()) == sorted(own.flatten().tolist())


def numbered_memories(
    model: RxTAlpha, turns: object, dialogues: Sequence[object], first: int
) -> ConversationState:
    """Stand in for a perfect memory: the slots hold the dialogue's number, from 1."""
    numbers = torch.arange(first + 1.0, first + 1.0 + len(dialogues))
    return ConversationState.start(numbers.view(1, -1, 1, 1).expand(2, -1, 4, 16), 0)


def test_a_perfect_memory_scores_full_marks_and_its_controls_do_not(
    model: RxTAlpha, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches answers compared with another dialogue's question, in any condition or chunk."""
    generator = DialogueGenerator()
    seeds, asked = [0, 2], {}
    settings = SMALL.model_copy(
        update={
            "batch_size": 2,
            "free_running": False,
            "conditions": ("memory", "swapped", "zeroed"),
        }
    )
    tokenizer = model.require_tokenizer()

    def remembering(
        _: RxTAlpha, state: ConversationState, queries: Sequence[str], limit: int
    ) -> list[Answer]:
        numbers = state.slots[0, :, 0, 0].int().tolist()
        answers = [asked[number].answer if number else "" for number in numbers]
        return [Answer(tokenizer.encode(text), "eos", []) for text in answers]

    dialogues_of = recall.cell_dialogues

    def noting(*arguments: object) -> list:
        dialogues = dialogues_of(*arguments)
        asked.clear()
        asked.update({n: item.interactions[-1] for n, item in enumerate(dialogues, start=1)})
        return dialogues

    monkeypatch.setattr(recall, "cell_dialogues", noting)
    monkeypatch.setattr(recall, "memory_of_references", numbered_memories)
    monkeypatch.setattr(recall, "greedy_answers", remembering)
    result = evaluate_recall(model, settings)
    for row in result.rows:
        if row["condition"] == "memory":
            assert row["exact"] == 1.0
            assert (row["declined"] == 1.0) == (row["test"] == "unknown")
        else:
            assert row["exact"] < 0.5
        assert row["n"] == 5 and row["seed"] in seeds
    assert result.mistakes == []
    chances = [row["chance"] for row in result.rows if row["test"] == "recall"]
    kinds = [generator.chance(kind) for kind in ("name", "city", "dog", "cat", "colour")]
    assert chances[0] == pytest.approx(sum(kinds) / 5)


def test_a_real_run_reports_every_cell(model: RxTAlpha) -> None:
    """Catches rows or progress calls that are missing, and training mode that is switched on."""
    calls: list[tuple[int, int, str]] = []
    model.train()
    result = evaluate_recall(model, SMALL, lambda *call: calls.append(call))
    assert model.training
    cells = plan_cells(SMALL)
    assert len(result.rows) == sum(len(cell.conditions) for cell in cells) * 2
    assert [done for done, _, _ in calls] == list(range(len(cells) * 2 + 1))
    assert {total for _, total, _ in calls} == {len(cells) * 2}
    assert result.settings == SMALL and result.seconds > 0
    # An untrained model is always wrong, so every cell and seed has an example.
    assert len(result.mistakes) == len(cells) * 2
    assert evaluate_recall(model, SMALL).rows == result.rows


def test_settings_of_the_generator_are_used(
    model: RxTAlpha, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an evaluation of other held-out values than those of the training."""
    seen = []

    def spy(generator: DialogueGenerator, cell: object, seed: int, count: int) -> list:
        seen.append((generator.config.held_out_values, seed))
        return [generator.probe(seed * SEED_STRIDE + n, distance=1, num_facts=1) for n in range(2)]

    monkeypatch.setattr(recall, "cell_dialogues", spy)
    settings = SMALL.model_copy(
        update={"generator": GeneratorConfig(held_out_values=0.25), "seeds": (4,)}
    )
    evaluate_recall(model, settings)
    assert set(seen) == {(0.25, 4)}


def test_turns_that_do_not_fit_are_refused(make_model: Callable[..., RxTAlpha]) -> None:
    """Catches dialogues that are cut silently."""
    with pytest.raises(UserError, match="seq_len"):
        evaluate_recall(make_model(seq_len=12), SMALL)
