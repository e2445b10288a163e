"""Preference optimisation: what a pair is read from, what the loss is, and that it is learned."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from rxlm.data import Conversation, ConversationList, Interaction
from rxlm.data.preferences import with_rejected
from rxlm.errors import UserError
from rxlm.rxt.dialogues import GROUPS
from rxlm.rxt.unroll import encode_turns, scan_memory
from rxlm.training.checkpoint import find_latest
from rxlm.training.metrics import TIMING_FIELDS, read_metrics
from rxlm.training.objectives.preference import (
    PairScores,
    PreferenceObjective,
    PreferenceSettings,
    preference_loss,
    preference_margins,
)
from rxlm.training.run_folder import RunFolder
from rxlm.training.settings import TrainSettings
from rxlm.training.trainer import Trainer


def settings(**values: Any) -> PreferenceSettings:
    defaults = {"turns": 6, "dialogues": 3, "validation_dialogues": 4}
    return PreferenceSettings(**{**defaults, **values})


def prefer(tiny: Any, model: Any = None, **values: Any) -> Any:
    names = ("train", "valid", "accumulation", "seed")
    options = {name: values.pop(name) for name in names if name in values}
    made = tiny.objective(PreferenceObjective, settings(**values), model, **options)
    made.set_training_mode()
    return made


def conversations(tiny: Any, count: int = 3, turns: int = 6) -> list[Conversation]:
    return [with_rejected(tiny.source().sample(position, turns)) for position in range(count)]


def memories(objective: Any, batch: Any) -> Tensor:
    """Return the memory before every turn and after the last."""
    model = objective.model
    slots = model.initial_memory(batch.num_dialogues, seed=batch.memory_seed)
    return scan_memory(
        model.memory_attention, slots, encode_turns(model.encoder, batch), batch.num_turns
    )


def test_a_rejected_answer_never_enters_memory(tiny: Any) -> None:
    """Catches a memory that holds the worse answer, for this turn or for any later one: other
    rejected answers leave every memory, and the scores of all chosen answers, as they are."""
    objective = prefer(tiny, num_buckets=1)
    given = conversations(tiny)
    other = [
        replace(
            item,
            interactions=tuple(
                turn if turn.rejected is None else replace(turn, rejected="something else.")
                for turn in item.interactions
            ),
        )
        for item in given
    ]
    one, two = objective.pairs_of(given), objective.pairs_of(other)
    assert objective.count_targets(one) >= 5
    with torch.no_grad():
        assert torch.equal(memories(objective, one), memories(objective, two))
        scores = [objective.pair_scores(objective.model, batch) for batch in (one, two)]
    torch.testing.assert_close(scores[0].chosen, scores[1].chosen, atol=2e-5, rtol=0)
    assert not torch.allclose(scores[0].rejected, scores[1].rejected)
    assert all((rows.group != GROUPS.index("probe")).all() for rows in one.encode)


def test_both_answers_are_read_from_the_memory_before_the_turn(tiny: Any) -> None:
    """Catches the leak: a turn that was written before its answers were scored, or one that was
    never written. Every answer is scored again by hand, turn by turn."""
    objective = prefer(tiny, num_buckets=3)
    given = conversations(tiny)
    batch = objective.pairs_of(given)
    model = objective.model
    found = []
    with torch.no_grad():
        scores = objective.pair_scores(model, batch)
        starts = model.initial_memory(len(given), seed=0)
        for b, conversation in enumerate(given):
            slots = starts[:, b : b + 1]
            for n, item in enumerate(conversation.interactions):
                if item.rejected is not None:
                    pair = [
                        log_prob(objective, slots, replace(item, answer=text, rejected=None))
                        for text in (item.answer, item.rejected)
                    ]
                    found.append((n * len(given) + b, pair))
                turn = torch.tensor([objective.turns.encode(item).ids])
                slots = model.write_memory(slots, turn)
    wanted = torch.tensor([pair for _, pair in sorted(found)])
    torch.testing.assert_close(scores.chosen, wanted[:, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.rejected, wanted[:, 1], atol=1e-4, rtol=0)


def log_prob(objective: Any, slots: Tensor, item: Interaction) -> float:
    turn, decoder = objective.turns.encode(item), objective.model.decoder
    ids = torch.tensor([turn.ids])
    hidden, _ = decoder(ids[:, :-1], memory=decoder.read_memory(slots))
    scores = torch.log_softmax(decoder.logits(hidden[0]), dim=-1)
    # [A] is given; everything after it, [EOS] included, is the answer.
    places = torch.arange(turn.answer_start, len(turn.ids) - 1)
    return float(scores[places, ids[0, places + 1]].sum())


def pairs(*values: tuple[float, float, float, float]) -> PairScores:
    return PairScores(*(torch.tensor(column) for column in zip(*values, strict=True)))


def test_the_losses_are_those_of_the_papers() -> None:
    """Catches a sign, a sum where a mean belongs, and a margin on the wrong side."""
    scores = pairs((-2.0, -3.0, 4.0, 2.0))
    reference = pairs((-2.5, -2.0, 4.0, 2.0))
    dpo = preference_margins(scores, reference, settings(beta=0.5))
    assert dpo.tolist() == [0.5 * ((-2.0 + 3.0) - (-2.5 + 2.0))]
    simpo = preference_margins(scores, None, settings(variant="simpo", beta=2.0, margin=0.25))
    assert simpo.tolist() == [2.0 * (-0.5 + 1.5) - 0.25]
    loss = preference_loss(dpo, 0.1)
    ahead = 1 / (1 + math.exp(-0.75))
    assert float(loss) == pytest.approx(-0.9 * math.log(ahead) - 0.1 * math.log(1 - ahead))


def test_at_the_start_no_answer_is_ahead(tiny: Any) -> None:
    """Catches a reference that is not the model, reads another memory, or drops something out."""
    objective = prefer(tiny, tiny.model(dropout=0.5), chosen_scale=0.0)
    output = objective.loss(objective.batch(1, 0), 1)
    assert float(output.loss.detach()) == pytest.approx(math.log(2), abs=1e-6)
    assert float(output.metrics["margin"]) == 0.0
    assert prefer(tiny, variant="simpo").reference is None


def test_the_gradient_reaches_the_writes_of_earlier_turns(tiny: Any) -> None:
    """Catches a memory that is cut off from the preference."""
    objective = prefer(tiny, chosen_scale=0.0)
    objective.loss(objective.batch(0, 0), 0).loss.backward()
    model = objective.model
    assert any(bool(item.grad.any()) for item in model.memory_attention.parameters())
    assert all(item.grad is None for item in objective.reference.parameters())


def test_padding_and_sharding_change_nothing(tiny: Any) -> None:
    """Catches pairs that are mixed up between buckets or between processes."""
    whole = prefer(tiny)
    batch = whole.batch(4, 0)
    losses = [
        prefer(tiny, num_buckets=count).loss(batch_of, 4).loss.detach()
        for count, batch_of in ((1, prefer(tiny, num_buckets=1).batch(4, 0)), (3, batch))
    ]
    torch.testing.assert_close(losses[0], losses[1], atol=2e-6, rtol=0)
    parts = [whole.loss(whole.shard(batch, rank, 2), 4) for rank in (0, 1)]
    counts = [part.num_targets for part in parts]
    assert sum(counts) == whole.count_targets(batch)
    mean = sum(part.loss.detach() * count for part, count in zip(parts, counts, strict=True))
    torch.testing.assert_close(mean / sum(counts), losses[1], atol=2e-6, rtol=0)


def test_files_bring_their_own_pairs(tiny: Any) -> None:
    """Catches data without pairs that trains on nothing, silently."""
    source = tiny.chat(("a", "b"), ("c", "d"))
    with pytest.raises(UserError, match="no turn has a rejected answer"):
        prefer(tiny, train=source)
    turns = (Interaction("a", "b"), Interaction("c", "d", rejected="e"))
    source = ConversationList([Conversation(turns)])
    objective = prefer(tiny, train=source, valid=source, dialogues=2)
    assert objective.count_targets(objective.batch(0, 0)) == 2
    long = ConversationList([Conversation((replace(turns[1], rejected="long " * 80),))])
    with pytest.raises(UserError, match=r"rejected answers: 1 of 1 turns have more than seq_len"):
        prefer(tiny, train=long)


def test_settings_that_do_nothing_are_refused() -> None:
    """Catches a margin that DPO would leave out without a word."""
    with pytest.raises(ValidationError, match="only simpo has one"):
        settings(margin=0.5)


@pytest.mark.parametrize("variant", ["dpo", "simpo"])
def test_the_better_answers_win_and_stay_likely(tiny: Any, variant: str) -> None:
    """Catches a loss that computes everything and prefers nothing, or the wrong one; and chosen
    answers that become less likely than they were."""
    objective = prefer(
        tiny,
        variant=variant,
        beta=0.5 if variant == "dpo" else 2.0,
        chosen_scale=0.2,
    )
    parameters = [item for item in objective.model.parameters() if item.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    before = measure(objective)
    for step in range(30):
        optimizer.zero_grad()
        objective.loss(objective.batch(step % 4, 0), step).loss.backward()
        optimizer.step()
    after = measure(objective)
    assert after["preference_accuracy"] > 0.8 > before["preference_accuracy"]
    assert after["chosen_log_prob"] > before["chosen_log_prob"]


def measure(objective: Any) -> dict[str, float]:
    """Return the metrics of the training pairs: so small a model can only learn by heart."""
    with torch.no_grad():
        outputs = [objective.loss(objective.batch(step, 0), step) for step in range(4)]
    total = sum(output.num_targets for output in outputs)
    return {
        name: sum(float(item.metrics[name]) * item.num_targets for item in outputs) / total
        for name in ("preference_accuracy", "chosen_log_prob")
    }


def run(tiny: Any, folder: Path, steps: int) -> None:
    trained = TrainSettings(
        steps=steps,
        accumulation=2,
        schedule="constant",
        log_every=1,
        validate_every=2,
        prefetch=2,
        loggers=(),
        device="cpu",
    )
    objective = prefer(tiny, accumulation=2)
    Trainer(objective, trained, RunFolder.open(folder, "test", {})).train()


def test_two_steps_and_two_more_equal_four(tiny: Any, tmp_path: Path) -> None:
    """Catches a resumed run that measures against the model as it was when it stopped."""
    run(tiny, tmp_path / "whole", 4)
    run(tiny, tmp_path / "parts", 2)
    run(tiny, tmp_path / "parts", 4)
    folders = [find_latest(tmp_path / name) for name in ("whole", "parts")]
    for name in ("model", "reference", "train/optimizer"):
        left, right = (load_file(f"{folder}/{name}.safetensors") for folder in folders)
        assert all(torch.equal(left[key], right[key]) for key in left), name
    logged = [
        [
            {key: value for key, value in line.items() if key not in TIMING_FIELDS}
            for line in read_metrics(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "parts")
    ]
    assert logged[0] == logged[1]
