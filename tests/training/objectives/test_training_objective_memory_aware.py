"""Memory-aware training: what is written, what is asked, and what reads what."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rxlm.data import Conversation, ConversationList, Interaction
from rxlm.rxt.dialogues import GROUPS, DialogueBatch
from rxlm.training.objectives.curriculum import Phase
from rxlm.training.objectives.memory_aware import MemoryAwareObjective, MemoryAwareSettings


def settings(*phases: Phase, **values: Any) -> MemoryAwareSettings:
    chosen = phases or (Phase(turns=4, dialogues=3),)
    return MemoryAwareSettings(**{"phases": chosen, "validation_dialogues": 4, **values})


def aware(tiny: Any, *phases: Phase, model: Any = None, **values: Any) -> Any:
    names = ("train", "valid", "accumulation")
    options = {name: values.pop(name) for name in names if name in values}
    return tiny.objective(MemoryAwareObjective, settings(*phases, **values), model, **options)


def places(buckets: Any, group: str | None = None) -> list[int]:
    return sorted(
        place
        for rows in buckets
        for place, kind in zip(rows.place.tolist(), rows.group.tolist(), strict=True)
        if group is None or GROUPS[kind] == group
    )


def test_every_turn_is_written_and_no_probe_is(tiny: Any) -> None:
    """A turn that memory never sees, or an extra question that it does."""
    batch = aware(tiny, probes=3).batch(0, 0)
    assert places(batch.encode) == list(range(12))
    assert places(batch.encode, "probe") == []
    assert len(places(batch.answer, "probe")) >= 3


def test_probes_read_the_memory_after_the_turn_they_follow(tiny: Any) -> None:
    """A probe whose fact is not yet written, or that reads another dialogue's memory."""
    batch = aware(tiny, probes=3, num_buckets=1).batch(2, 0)
    wanted = []
    for b, position in enumerate((6, 7, 8)):
        conversation = tiny.source().sample(position, 4)
        for after, item in tiny.source().probe_questions(conversation, position, 3):
            row = tiny.turns.interaction(item.query, item.answer)
            wanted.append(((after + 1) * 3 + b, row.ids))
    (rows,) = batch.answer
    found = [
        (place, ids[mask].tolist())
        for place, ids, mask, kind in zip(
            rows.place.tolist(), rows.ids, rows.mask, rows.group.tolist(), strict=True
        )
        if GROUPS[kind] == "probe"
    ]
    assert sorted(found) == sorted(wanted)


def test_all_questions_are_answered_and_a_share_of_the_chat(tiny: Any) -> None:
    """Questions left out of the loss by the setting that thins out small talk."""
    turns = [
        (n * 3 + b, item.kind)
        for b in range(3)
        for n, item in enumerate(tiny.source().sample(b, 4).interactions)
    ]
    asked = sorted(place for place, kind in turns if kind in ("question", "unknown"))
    assert asked
    for share, count in ((0.0, 0), (1.0, len(turns) - len(asked))):
        batch = aware(tiny, chat_answers=share, probes=0).batch(0, 0)
        assert places(batch.answer, "chat") == sorted(places(batch.answer, "chat"))
        assert len(places(batch.answer, "chat")) == count
        questions = places(batch.answer, "recall") + places(batch.answer, "unknown")
        assert sorted(questions) == asked


def test_data_without_questions_predicts_every_answer(tiny: Any) -> None:
    """Real dialogues of which four fifths of the answers are thrown away."""
    source = tiny.chat(*((f"query {n}", f"answer {n}") for n in range(4)))
    batch = aware(tiny, train=source, chat_answers=0.0).batch(0, 0)
    assert places(batch.answer) == list(range(12))


def test_padding_and_queries_are_never_targets(tiny: Any) -> None:
    """[PAD] or the user's words in the loss; [A] or [EOS] missing from it."""
    batch = aware(tiny).batch(0, 0)
    for rows in batch.answer:
        assert not (rows.targets & ~rows.mask).any()
        for ids, targets in zip(rows.ids, rows.targets, strict=True):
            learned = ids[targets].tolist()
            assert learned[0] == tiny.tokenizer.answer_id
            assert learned[-1] == tiny.tokenizer.eos_id


def gradient_sizes(objective: Any, batch: DialogueBatch) -> dict[str, float]:
    model = objective.model
    model.zero_grad()
    objective.loss(batch, 0).loss.backward()
    return {
        name: sum(
            float(item.grad.abs().sum()) for item in part.parameters() if item.grad is not None
        )
        for name, part in (("encoder", model.encoder.layers), ("memory", model.memory_attention))
    }


def test_history_phases_leave_memory_attention_alone(tiny: Any) -> None:
    """A warm-up that reads the memory after all, or a memory phase that does not."""
    for reads, learns in (("history", False), ("memory", True)):
        objective = aware(tiny, Phase(turns=4, dialogues=3, reads=reads))
        sizes = gradient_sizes(objective, objective.batch(0, 0))
        assert sizes["encoder"] > 0
        assert (sizes["memory"] > 0) is learns


def test_one_answer_at_the_end_teaches_the_encoder_about_the_first_turn(tiny: Any) -> None:
    """Backpropagation that stops before the first write of an 8-turn window."""
    first, filler = Interaction("my dog is Rex.", "ok."), Interaction("hm.", "yes.")
    middle = (filler,) * 6
    question = Interaction("what is my dog called?", "Rex.", kind="question")
    source = ConversationList([Conversation((first, *middle, question))])
    for backprop_turns, reaches in ((None, True), (4, False)):
        objective = aware(
            tiny,
            Phase(turns=8, dialogues=1),
            train=source,
            backprop_turns=backprop_turns,
            num_buckets=1,
        )
        batch = objective.batch(0, 0)
        # Only the last answer is predicted, only the first turn has the embedding of 'Rex'.
        last = [
            rows._replace(targets=rows.targets & (rows.place == 7)[:, None])
            for rows in batch.answer
        ]
        seen: list[torch.Tensor] = []

        def keep(module: Any, inputs: Any, output: torch.Tensor, seen: Any = seen) -> None:
            output.retain_grad()
            seen.append(output)

        handle = objective.model.encoder.register_forward_hook(keep)
        objective.loss(batch._replace(answer=tuple(last)), 0).loss.backward()
        handle.remove()
        row = int((batch.encode[0].place == 0).nonzero())
        assert (float(seen[0].grad[:, row].abs().max()) > 0) is reaches


def test_phases_change_the_batch_and_what_it_reads(tiny: Any) -> None:
    """A curriculum that is counted but not applied."""
    objective = aware(
        tiny,
        Phase(turns=2, dialogues=5, reads="history", steps=2),
        Phase(turns=6, dialogues=2),
    )
    shapes = []
    for step in range(4):
        batch = objective.batch(step, 0)
        shapes.append((batch.num_turns, batch.num_dialogues))
        assert objective.loss(batch, step).metrics["phase"] == (step >= 2)
        objective.after_step(step, {"accuracy": 0.0})
    assert shapes == [(2, 5), (2, 5), (6, 2), (6, 2)]


def test_batch_state_changes_with_the_phase_only(tiny: Any) -> None:
    """Batches built ahead that are thrown away every step, or kept from the phase before."""
    objective = aware(tiny, Phase(turns=2, dialogues=2, steps=3), Phase(turns=3, dialogues=2))
    states = []
    for step in range(5):
        objective.after_step(step, {"accuracy": 0.1 * step})
        states.append(objective.batch_state())
    assert states[0] == states[1] != states[2] == states[3] == states[4]


def test_the_loss_is_the_mean_over_all_target_tokens(tiny: Any) -> None:
    """A mean of bucket means, which weighs short answers more."""
    losses = []
    objective = aware(tiny, num_buckets=3)
    batch = objective.batch(0, 0)
    whole = objective.loss(batch, 0)
    for rows in batch.answer:
        part = objective.loss(batch._replace(answer=(rows,)), 0)
        losses.append((part.loss.item(), part.num_targets))
    count = sum(number for _, number in losses)
    assert whole.num_targets == count
    mean = sum(loss * number for loss, number in losses) / count
    assert whole.loss.item() == pytest.approx(mean, abs=1e-5)


def test_ragged_dialogues_weigh_like_single_ones(tiny: Any) -> None:
    """Short dialogues that are cut off, or that change the loss of longer ones."""
    long, short = (tiny.source().sample(index, turns) for index, turns in ((0, 5), (1, 2)))
    model = tiny.model()
    outputs = []
    for conversations in ([long, short], [long], [short]):
        objective = aware(
            tiny,
            Phase(turns=5, dialogues=len(conversations)),
            model=model,
            chat_answers=1.0,
            probes=0,
            train=ConversationList(conversations),
        )
        outputs.append(objective.loss(objective.batch(0, 0), 0))
    both, *single = outputs
    assert both.num_targets == sum(item.num_targets for item in single)
    wanted = sum(item.loss.item() * item.num_targets for item in single) / both.num_targets
    assert both.loss.item() == pytest.approx(wanted, abs=1e-5)


def test_validation_reads_memory_and_reports_each_kind_of_answer(tiny: Any) -> None:
    """A validation of the warm-up, which says nothing about memory."""
    history = Phase(turns=4, dialogues=2, reads="history")
    memory = Phase(turns=4, dialogues=2)
    model = tiny.model()
    with torch.no_grad():
        results = [aware(tiny, phase, model=model).validate() for phase in (history, memory)]
    assert results[0] == results[1]
    assert {"loss", "accuracy", "accuracy_recall", "accuracy_probe"} <= results[0].keys()


def test_a_batch_without_any_target_weighs_nothing(tiny: Any) -> None:
    """A crash, in the middle of a run, on a small batch of small talk only."""
    objective = aware(tiny, Phase(turns=1, dialogues=1), chat_answers=0.0, probes=0)
    batch = next(batch for step in range(50) if not (batch := objective.batch(step, 0)).answer)
    assert objective.loss(batch, 0).num_targets == 0


def test_accuracy_is_not_measured_where_nothing_was_asked(tiny: Any) -> None:
    """A batch of small talk that counts as 'every answer wrong' for the curriculum's gate."""
    objective = aware(tiny, Phase(turns=1, dialogues=1), chat_answers=1.0, probes=0)
    batch = next(
        batch
        for step in range(50)
        if not places((batch := objective.batch(step, 0)).answer, "recall")
        and not places(batch.answer, "unknown")
    )
    accuracy = float(objective.loss(batch, 0).metrics["accuracy"])
    assert accuracy != accuracy


def test_the_place_in_a_batch_decides_nothing(tiny: Any) -> None:
    """A drawn initial memory, or the choice of answers, that depends on the row of a dialogue: then
    1 x 2 dialogues would train differently from 2 x 1."""
    wide = aware(tiny, Phase(turns=3, dialogues=2)).batch(1, 0)
    narrow = aware(tiny, Phase(turns=3, dialogues=1), accumulation=2)
    single = [narrow.batch(1, micro_step) for micro_step in range(2)]
    assert [batch.memory_seed for batch in single] == [wide.memory_seed, wide.memory_seed + 1]
    answers = sum(len(places(batch.answer)) for batch in single)
    assert answers == len(places(wide.answer))


def test_validation_asks_what_its_own_source_tells(tiny: Any) -> None:
    """Validation on dialogues with facts that is silent because the training data hold none."""
    quiet = tiny.chat(("Hello.", "Hi."), ("How are you?", "Fine."))
    objective = aware(tiny, Phase(turns=4, dialogues=2), train=quiet)
    assert "accuracy_probe" in objective.validate()
