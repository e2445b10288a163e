"""SFT: only answers are predicted, from what was said before."""

from __future__ import annotations

from typing import Any

import torch

from rxlm.training.objectives.sft import SFTObjective, SFTSettings

SETTINGS = SFTSettings(turns=3, dialogues=2, validation_dialogues=2)


def test_answers_are_predicted_with_their_markers(tiny: Any) -> None:
    """[EOS] not learned (the model never stops), [A] not learned, or the user's words learned."""
    tokenizer = tiny.tokenizer
    batch = tiny.objective(SFTObjective, SETTINGS).batch(0, 0)
    wanted = []
    for position in range(2):
        for item in tiny.source().sample(position, 3).interactions:
            answer = [tokenizer.answer_id, *tokenizer.encode(item.answer), tokenizer.eos_id]
            wanted.append(answer)
    found = [
        ids[targets].tolist()
        for rows in batch.dialogues.answer
        for ids, targets in zip(rows.ids, rows.targets, strict=True)
    ]
    assert sorted(found) == sorted(wanted)


def test_the_encoder_restores_queries_and_answers(tiny: Any) -> None:
    """A masked LM that follows the decoder's targets and never reads queries."""
    objective = tiny.objective(SFTObjective, SETTINGS)
    hidden_in_query = hidden_in_answer = 0
    for step in range(4):
        batch = objective.batch(step, 0)
        for rows, labels in zip(batch.dialogues.encode, batch.labels, strict=True):
            marker = (labels == tiny.tokenizer.answer_id).long().argmax(dim=1, keepdim=True)
            is_query = torch.arange(labels.shape[1]) < marker
            hidden_in_query += int((rows.targets & is_query).sum())
            hidden_in_answer += int((rows.targets & ~is_query).sum())
    assert hidden_in_query > 0
    assert hidden_in_answer > 0


def test_the_default_context_cannot_leak_the_answer() -> None:
    """Accuracies near one because the decoder reads its own answer."""
    assert SFTSettings().context == "previous"


def test_a_system_prompt_is_read_and_never_predicted(tiny: Any) -> None:
    """A model that learns to speak its system prompt, or does not see it before turn one."""
    source = tiny.chat(("hi", "hello"), ("and you?", "fine"), system="You are brief.")
    settings = SFTSettings(turns=2, dialogues=1, num_buckets=1, noise_level=0.0)
    objective = tiny.objective(SFTObjective, settings, train=source)
    batch = objective.batch(0, 0)
    (encode,), (answer,) = batch.dialogues.encode, batch.dialogues.answer
    assert sorted(encode.place.tolist()) == [0, 1, 2]
    assert sorted(answer.place.tolist()) == [1, 2]
    answer_ids = answer.ids[answer.targets]
    assert not (answer_ids == tiny.tokenizer.internal_id).any()
    other = tiny.objective(
        SFTObjective,
        settings,
        objective.model,
        train=tiny.chat(("hi", "hello"), ("and you?", "fine"), system="Sing!"),
    )
    first = objective.loss(batch, 0).metrics["lm_loss"]
    assert first != other.loss(other.batch(0, 0), 0).metrics["lm_loss"]
