"""Memory reinforcement: the policy gradient is one, episodes repeat, and a reward is learned."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from rxlm.data import Conversation, ConversationList, Interaction
from rxlm.errors import UserError
from rxlm.rxt.reactive import ReactiveModel
from rxlm.rxt.unroll import Answers
from rxlm.training.checkpoint import find_latest
from rxlm.training.metrics import TIMING_FIELDS, read_metrics
from rxlm.training.objectives.curriculum import Phase, TurnsPhase
from rxlm.training.objectives.episode_rewards import RewardSettings, advantages
from rxlm.training.objectives.episode_scores import clipped_gain
from rxlm.training.objectives.episodes import Episode, Said
from rxlm.training.objectives.frozen_policy import token_scores
from rxlm.training.objectives.memory_aware import MemoryAwareObjective, MemoryAwareSettings
from rxlm.training.objectives.memory_reinforcement import (
    MemoryReinforcementObjective,
    MemoryReinforcementSettings,
)
from rxlm.training.run_folder import RunFolder
from rxlm.training.settings import TrainSettings
from rxlm.training.trainer import Trainer

PARTS = {"bleu": 0.0, "cosine": 0.0, "length": 0.0}


def settings(**values: Any) -> MemoryReinforcementSettings:
    defaults: dict[str, Any] = {
        "phases": (TurnsPhase(turns=3, dialogues=2),),
        "group": 3,
        "max_answer_tokens": 5,
        "validation_dialogues": 3,
    }
    return MemoryReinforcementSettings(**{**defaults, **values})


def reinforce(tiny: Any, model: Any = None, **values: Any) -> Any:
    names = ("train", "valid", "accumulation", "seed")
    options = {name: values.pop(name) for name in names if name in values}
    made = tiny.objective(MemoryReinforcementObjective, settings(**values), model, **options)
    made.set_training_mode()
    return made


def gradients(module: Any) -> dict[str, Tensor]:
    return {
        name: item.grad.clone() for name, item in module.named_parameters() if item.grad is not None
    }


def own_log_prob(
    model: Any, slots: Tensor, turn: list[int], start: int, carried: Any = None
) -> Tensor:
    """Return the log-probabilities of a single turn's tokens from ``start`` on, by hand."""
    ids = torch.tensor([turn])
    memory = model.decoder.read_memory(slots)
    hidden, _ = model.decoder(ids[:, :-1], memory=memory, carried=carried)
    scores = torch.log_softmax(model.decoder.logits(hidden[0]), dim=-1)
    return scores[torch.arange(start - 1, len(turn) - 1), ids[0, start:]]


def test_the_gradient_is_that_of_the_expected_reward(tiny: Any) -> None:
    """Catches a sign, an advantage or a ratio at the wrong answer, tokens of one bucket with the
    numbers of another, and a gradient that ends at a memory write: all answers of one token are
    enumerated, so the expectation is a sum."""
    source = tiny.chat(("my dog is Rex.", "ok."), ("hm.", "well."), ("my dog?", "Rex."))
    objective = reinforce(
        tiny,
        train=source,
        phases=(TurnsPhase(turns=3, dialogues=1),),
        group=tiny.tokenizer.vocab_size,
        writes="reference",
        max_answer_tokens=1,
        normalise_advantage=False,
        clip=1e9,
        kl_scale=0.0,
        num_buckets=2,
    )
    model, tokens = objective.model, tiny.tokenizer.vocab_size
    worth = torch.rand(3, tokens, generator=torch.Generator().manual_seed(1)).tolist()
    # As if drawn evenly: the ratio makes the model's own distribution of it.
    even = [-math.log(tokens)]

    def outcome(n: int, token: int) -> Said:
        ids = [] if token == tiny.tokenizer.eos_id else [token]
        return Said(ids, not ids, {"reward": worth[n][token], "exact": 0.0, **PARTS}, even)

    episode = Episode(0, [[outcome(n, token) for token in range(tokens)] for n in range(3)])
    objective._sampling, objective._episodes = 0, {0: episode}
    objective.loss(objective.batch(0, 0), 0).loss.backward()
    found = gradients(model)

    model.zero_grad()
    slots = model.initial_memory(1, seed=0)
    expected = torch.zeros(())
    for n, item in enumerate(source.conversations[0].interactions):
        turn = tiny.turns.encode(item)
        prompt = torch.tensor([turn.ids[: turn.answer_start + 1]])
        hidden, _ = model.decoder(prompt, memory=model.decoder.read_memory(slots))
        chances = model.decoder.logits(hidden[0, -1]).softmax(dim=-1)
        expected = expected + chances @ torch.tensor(worth[n])
        slots = model.write_memory(slots, torch.tensor([turn.ids]))
    (-expected / 3).backward()
    wanted = gradients(model)
    assert found.keys() == wanted.keys()
    assert any("memory_attention" in name and bool(wanted[name].any()) for name in wanted)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=2e-6, rtol=2e-3, msg=name)


def test_log_probs_are_those_of_a_conversation_held_alone(tiny: Any) -> None:
    """Catches padding, neighbours, a memory of another member of the group, another dialogue's
    beginning, and [A] or a cut [EOS] among the targets."""
    # A drawn beginning: every dialogue has its own.
    drawn = tiny.model(init_type="normal")
    objective = reinforce(tiny, drawn, num_buckets=2)
    batch = objective.batch(2, 0)
    objective.loss(batch, 2)
    model = objective.model
    ids = model.config.tokenizer
    with torch.no_grad():
        for dialogue in batch.dialogues:
            episode = objective._episodes[dialogue.position]
            for g in range(3):
                slots = model.initial_memory(1, seed=dialogue.position)
                for turn, group in zip(dialogue.turns, episode.said, strict=True):
                    said = group[g]
                    opened = [*turn.prompt, ids.answer_token_id]
                    whole = [*opened, *said.ids, ids.eos_token_id]
                    scored = whole if said.ended else whole[:-1]
                    by_hand = own_log_prob(model, slots, scored, len(opened))
                    torch.testing.assert_close(
                        torch.tensor(said.log_probs), by_hand, atol=2e-5, rtol=0
                    )
                    slots = model.write_memory(slots, torch.tensor([whole]))


@pytest.mark.parametrize("writes", ["own", "reference"])
def test_a_carried_state_is_that_of_what_was_written(tiny: Any, writes: str) -> None:
    """Catches a decoder that carries on from an answer which was sampled and never written."""
    plain = tiny.model().config.model_dump()
    plain["decoder"] |= {"use_linear_self_attn": True, "linear_attn_type": "md_gdn"}
    model = ReactiveModel(plain, tiny.tokenizer)
    assert model.decoder.carries_state
    objective = reinforce(tiny, model, writes=writes)
    batch = objective.batch(0, 0)
    objective.loss(batch, 0)
    ids = model.config.tokenizer
    dialogue = batch.dialogues[1]
    state = model.new_conversation(seed=dialogue.position)
    for turn, group in zip(
        dialogue.turns, objective._episodes[dialogue.position].said, strict=True
    ):
        opened = [*turn.prompt, ids.answer_token_id]
        whole = [*opened, *group[2].ids, ids.eos_token_id]
        scored = whole if group[2].ended else whole[:-1]
        with torch.no_grad():
            by_hand = own_log_prob(model, state.slots, scored, len(opened), state.carried)
        torch.testing.assert_close(torch.tensor(group[2].log_probs), by_hand, atol=2e-5, rtol=0)
        written = whole if writes == "own" else turn.reference.ids
        state = model.update_memory(state, [written])


def test_what_is_said_does_not_depend_on_the_batch(tiny: Any) -> None:
    """Catches draws by row: with other processes or batch sizes other episodes would be held."""
    whole, part = reinforce(tiny), reinforce(tiny)
    batch = whole.batch(0, 0)
    whole.loss(batch, 0)
    for rank in (0, 1):
        part.loss(part.shard(batch, rank, 2), 0)
    assert whole._episodes.keys() == part._episodes.keys() == {0, 1}
    for position, episode in whole._episodes.items():
        ids = [[item.ids for item in turn] for turn in episode.said]
        assert ids == [[item.ids for item in turn] for turn in part._episodes[position].said]
    assert len({tuple(item.ids) for item in whole._episodes[0].said[0]}) > 1, "all drew the same"


def test_at_the_start_the_divergence_is_zero_and_the_ratio_is_one(tiny: Any) -> None:
    """Catches a reference that is not the model as it began, and dropout in one of the two."""
    objective = reinforce(tiny, tiny.model(dropout=0.5), inner_epochs=2, kl_scale=1.0)
    first = objective.loss(objective.batch(0, 0), 0)
    assert float(first.metrics["kl"]) == 0.0
    assert float(first.metrics["clip_fraction"]) == 0.0
    first.loss.backward()
    with torch.no_grad():
        for item in objective.model.parameters():
            if item.grad is not None:
                item -= 0.5 * item.grad
    again = objective.loss(objective.batch(1, 0), 1)
    assert float(again.metrics["kl"]) > 0.0
    assert float(again.metrics["reward"]) == float(first.metrics["reward"]), "sampled anew"
    third = objective.loss(objective.batch(2, 0), 2)
    assert set(objective._episodes) == {2, 3}
    assert float(third.metrics["clip_fraction"]) == 0.0


def test_the_gradient_ends_after_the_horizon(tiny: Any) -> None:
    """Catches a horizon that cuts nothing, or everything."""
    sizes = {}
    for horizon in (None, 1):
        objective = reinforce(tiny, horizon=horizon, seed=3)
        objective.loss(objective.batch(0, 0), 0).loss.backward()
        sizes[horizon] = torch.cat(
            [item.flatten() for item in gradients(objective.model.memory_attention).values()]
        )
    assert bool(sizes[1].any())
    assert not torch.allclose(sizes[None], sizes[1])


def test_advantages_compare_within_a_group() -> None:
    """Catches a mean over the batch, a spread of one answer, and noise blown up to a lesson."""
    returns = torch.tensor([[1.0, 0.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0]])
    centred = advantages(returns, normalise=False)
    assert centred.tolist() == [[0.75, -0.25, -0.25, -0.25], [0.0] * 4]
    scaled = advantages(returns, normalise=True)
    torch.testing.assert_close(scaled[0] * 0.1876**0.5, centred[0], atol=1e-3, rtol=0)
    assert scaled[1].tolist() == [0.0] * 4


def test_returns_discount_what_comes_later() -> None:
    """Catches credit that flows backwards in time."""
    said = [[Said([], True, {"reward": reward})] for reward in (1.0, 0.0, 4.0)]
    assert Episode(0, said).returns(0.5)[:, 0].tolist() == [2.0, 2.0, 4.0]
    assert Episode(0, said).returns(0.0)[:, 0].tolist() == [1.0, 0.0, 4.0]


def test_clipping_stops_only_what_goes_on_in_its_own_direction() -> None:
    """Catches min and max exchanged: bad answers that could never be unlearned."""
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5])
    worth = torch.tensor([1.0, -1.0, 1.0, -1.0])
    log_probs = ratio.log().requires_grad_()
    gain, clipped = clipped_gain(log_probs, torch.zeros(4), worth, 0.2)
    torch.testing.assert_close(gain, torch.tensor([1.2, -1.5, 0.5, -0.8]))
    assert clipped.tolist() == [True, False, False, True]
    gain.sum().backward()
    assert (log_probs.grad != 0).tolist() == [False, True, True, False]


def test_entropy_and_divergence_are_exact(tiny: Any) -> None:
    """Catches an entropy of the chosen tokens alone, and a temperature that is forgotten."""
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0]])
    zero = torch.zeros(2, dtype=torch.long)
    scores = token_scores(Answers(logits, zero, zero, zero[:1], zero[:1]), 2.0)
    wanted = torch.log_softmax(logits / 2.0, dim=-1)
    assert torch.equal(scores.log_probs, wanted)
    assert torch.equal(scores.chosen, wanted[:, 0])


def run(tiny: Any, folder: Path, steps: int) -> None:
    objective = reinforce(
        tiny,
        tiny.model(dropout=0.1),
        accumulation=2,
        inner_epochs=3,
        phases=(TurnsPhase(turns=2, dialogues=2, steps=4), TurnsPhase(turns=3, dialogues=2)),
        group=2,
    )
    trained = TrainSettings(
        steps=steps,
        accumulation=2,
        schedule="constant",
        log_every=1,
        validate_every=4,
        best_metric="reward",
        best_mode="max",
        prefetch=2,
        loggers=(),
        device="cpu",
    )
    Trainer(objective, trained, RunFolder.open(folder, "test", {})).train()


def test_four_steps_and_four_more_equal_eight(tiny: Any, tmp_path: Path) -> None:
    """Catches episodes or a reference that a resumed run makes anew: it stops in the middle of the
    updates that share their episodes, and the model is not the reference any more."""
    run(tiny, tmp_path / "whole", 8)
    run(tiny, tmp_path / "parts", 4)
    torch.manual_seed(12345)
    run(tiny, tmp_path / "parts", 8)
    folders = [find_latest(tmp_path / name) for name in ("whole", "parts")]
    for name in ("model", "reference", "train/optimizer", "train/rng"):
        left, right = (load_file(f"{folder}/{name}.safetensors") for folder in folders)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), name
    logged = [
        [
            {key: value for key, value in line.items() if key not in TIMING_FIELDS}
            for line in read_metrics(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "parts")
    ]
    assert logged[0] == logged[1]
    start = tiny.model(dropout=0.1).state_dict()
    reference = load_file(f"{folders[0]}/reference.safetensors")
    assert all(torch.equal(reference[name], start[name]) for name in reference), "it has moved"


def test_a_later_stage_measures_against_the_model_that_it_begins_with(
    tiny: Any, tmp_path: Path
) -> None:
    """Catches a reference of two stages ago."""
    first = reinforce(tiny)
    with torch.no_grad():
        first.model.decoder.head_bias += 1.0
    first.save_model(tmp_path)
    second = reinforce(tiny, copy.deepcopy(first.model))
    assert second.load_extra_modules(tmp_path) == []
    assert torch.equal(second.reference.decoder.head_bias, first.model.decoder.head_bias)


def test_state_goes_through_json_unchanged(tiny: Any) -> None:
    """Catches log-probabilities that are rounded on their way through a checkpoint."""
    objective = reinforce(tiny, inner_epochs=2)
    objective.loss(objective.batch(0, 0), 0)
    state = json.loads(json.dumps(objective.state_dict()))
    other = reinforce(tiny, inner_epochs=2)
    other.load_state_dict(other.merge_states([state]))
    assert other._episodes == objective._episodes


def test_only_the_named_components_learn(tiny: Any) -> None:
    """Catches a frozen part that learns all the same, and a reference that does."""
    objective = reinforce(tiny, trains=("memory_attention",))
    objective.loss(objective.batch(0, 0), 0).loss.backward()
    learned = {name.split(".")[0] for name in gradients(objective.model)}
    assert learned == {"memory_attention"}
    assert not gradients(objective.reference)


def test_mixed_precision_trains(tiny: Any) -> None:
    """Catches weights cast while sampling (without gradients) that training then reuses."""
    learning = []
    for enabled in (False, True):
        objective = reinforce(tiny)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            objective.loss(objective.batch(0, 0), 0).loss.backward()
        found = gradients(objective.model)
        learning.append({name for name, item in found.items() if bool(item.any())})
    assert learning[0] == learning[1]


def test_system_prompts_and_dialogues_of_unequal_length(tiny: Any) -> None:
    """Catches places that are shifted by a system prompt, and turns that are not there."""
    long = tuple(Interaction(f"query {n}", f"answer {n}") for n in range(3))
    source = ConversationList(
        [Conversation(long, system="be kind."), Conversation(long[:1]), Conversation(long[:2])]
    )
    objective = reinforce(tiny, train=source, phases=(TurnsPhase(turns=3, dialogues=3),))
    output = objective.loss(objective.batch(0, 0), 0)
    assert output.num_targets == 3 * (3 + 1 + 2)
    assert math.isfinite(float(output.loss.detach()))
    assert math.isnan(output.metrics["accuracy"]), "there is no question"
    assert output.weights["reward_turn_3"] == 3


def test_settings_that_contradict_each_other_are_refused() -> None:
    """Catches a discount that does nothing, and a reward of nothing."""
    with pytest.raises(ValidationError, match="has no consequences"):
        settings(discount=0.5, writes="reference")
    with pytest.raises(ValidationError, match="nothing is rewarded"):
        RewardSettings(bleu=0, cosine=0, length=0)
    with pytest.raises(ValidationError, match="expected at most 1"):
        RewardSettings(previous=0.9, earlier=0.2)


def test_a_model_that_thinks_is_refused(tiny: Any) -> None:
    """Catches log-probabilities of answers whose form restricted what could be drawn."""
    model = tiny.model()
    model.thinks = True
    with pytest.raises(UserError, match="answer at once"):
        reinforce(tiny, model)


def test_the_reward_is_learned_and_what_was_known_stays(tiny: Any) -> None:
    """Catches a stage that computes everything and learns nothing, or unlearns the rest.

    A bandit: the model has learned to say 'left.' and 'right.' equally often, and is paid for one
    of them. It also tells back what it was told before, which is not what it is paid for.
    """

    def conversation(choice: str, pet: str, kind: str = "chat") -> Conversation:
        return Conversation(
            (
                Interaction(f"pet {pet}", "ok."),
                Interaction("choose", choice, kind=kind),
                Interaction("pet?", pet),
            )
        )

    choices, pets = ("left.", "right."), ("a", "b")
    both = ConversationList([conversation(choice, pet) for choice in choices for pet in pets])
    model = tiny.model(seed=1)
    taught = tiny.objective(
        MemoryAwareObjective,
        MemoryAwareSettings(phases=(Phase(turns=3, dialogues=8),), probes=0),
        model,
        train=both,
        valid=both,
    )
    learn(taught, 120, 1e-2)
    paid = ConversationList([conversation("left.", pet, "question") for pet in pets])
    objective = reinforce(
        tiny,
        model,
        train=paid,
        valid=paid,
        phases=(TurnsPhase(turns=3, dialogues=2),),
        group=8,
        reward={"exact": 1.0, "bleu": 0, "cosine": 0, "length": 0},
        validation_dialogues=2,
    )
    before = objective.loss(objective.batch(1000, 0), 1000).metrics
    assert 0.2 < float(before["accuracy"]) < 0.8
    told = accuracy_chat(objective)
    learn(objective, 25, 5e-3)
    after = objective.loss(objective.batch(1000, 0), 1000).metrics
    assert float(after["accuracy"]) > 0.95
    assert float(after["reward"]) > float(before["reward"])
    assert accuracy_chat(objective) >= told


def learn(objective: Any, steps: int, lr: float) -> None:
    objective.set_training_mode()
    parameters = [item for item in objective.trained_modules().parameters() if item.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        objective.loss(objective.batch(step, 0), step).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def accuracy_chat(objective: Any) -> float:
    with torch.no_grad():
        return float(objective.validate()["accuracy_chat"])
