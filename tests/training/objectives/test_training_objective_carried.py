"""Training a decoder that carries a state: turns in order, gradients across them.

The oracle is the slow loop: one dialogue, one turn after the other, no padding, no buckets.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from rxlm.data import Conversation, Interaction
from rxlm.evaluation.answering import memory_of_own_answers, memory_of_references
from rxlm.evaluation.conditions import state_to_read
from rxlm.evaluation.perplexity import PerplexitySettings, evaluate_perplexity
from rxlm.nn.linear_attention import LinearSelfAttention
from rxlm.rxt import unroll
from rxlm.rxt.dialogues import DialogueBatch, whole_dialogues
from rxlm.rxt.reactive import ReactiveModel
from rxlm.rxt.unroll import (
    answer_with_history,
    answer_with_memory,
    encode_turns,
    scan_memory,
)
from rxlm.training.objectives.curriculum import Phase
from rxlm.training.objectives.joint_lm import JointLMObjective, JointLMSettings
from rxlm.training.objectives.memory_aware import MemoryAwareObjective, MemoryAwareSettings

LAYOUTS: dict[str, dict[str, Any]] = {
    "add": {"use_linear_self_attn": True, "linear_attn_type": "md_gdn"},
    "hybrid concat": {
        "self_att_type": "hybrid",
        "attn_layer_types": ["mha", "md_gdn"],
        "memory_fusion_mode": "concat",
    },
    "no slots": {
        "use_linear_self_attn": True,
        "linear_attn_type": "md_gdn",
        "skip_memory_cross_attention": True,
    },
    "experts and stateless layers": {
        "use_linear_self_attn": True,
        "linear_attn_type": "md_gdn",
        "use_moe": True,
        "num_experts": 3,
        "moe_top_k": 2,
        "shared_expert_dim": 8,
        "stateless_layers_config": ["moe"],
        "final_stateless_layers_config": ["dense"],
        "dense_layer_dim": 12,
    },
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def carrying(tiny: Any, layout: dict[str, Any]) -> ReactiveModel:
    """Return a model whose memory has a say in the gates from the start."""
    config = tiny.model().config.model_dump(mode="json")
    config["decoder"] |= {"linear_attn_use_short_conv": True, **layout}
    torch.manual_seed(0)
    model = ReactiveModel(config, tiny.tokenizer)
    for part in model.modules():
        if isinstance(part, LinearSelfAttention) and part.settings.memory_fusion is not None:
            torch.nn.init.normal_(part.memory_fusion.up.weight)
            torch.nn.init.constant_(part.memory_fusion.scale, 1.0)
    return model


def dialogues(tiny: Any) -> list[Conversation]:
    """Return dialogues of different lengths, one with a system prompt."""
    made = [
        tiny.generator.conversation(index, count).interactions
        for index, count in enumerate((4, 1, 2))
    ]
    return [Conversation(made[0]), Conversation(made[1]), Conversation(made[2], system="Be brief.")]


def naive(model: ReactiveModel, tiny: Any, dialogue: Conversation, reads: str) -> list[Tensor]:
    """Return the logits of each answer, from a loop over turns of one dialogue."""
    turns = [tiny.turns.interaction(item.query, item.answer) for item in dialogue.interactions]
    if dialogue.system:
        turns.insert(0, tiny.turns.system(dialogue.system))
    slots, carried, states, logits = model.initial_memory(1), None, [], []
    for turn in turns:
        ids = torch.tensor([turn.ids])
        if reads == "memory":
            memory = model.decoder.read_memory(slots)
        else:
            nothing = torch.zeros(2, 1, 1, 16)
            seen = torch.cat(states or [nothing], dim=2)
            exists = torch.full((1, seen.shape[2]), bool(states))
            memory = model.decoder.read_memory(seen, exists)
        hidden, cache = model.decoder(ids, memory=memory, carried=carried)
        if turn.answer_start < len(turn.ids):
            logits.append(model.decoder.logits(hidden[0, turn.answer_start - 1 : -1]))
        carried = model.decoder.carry(cache, carried)
        states.append(model.encoder(ids))
        slots = model.write_memory(slots, ids)
    return logits


def answered(model: ReactiveModel, batch: DialogueBatch, reads: str) -> dict[int, Tensor]:
    encoded = encode_turns(model.encoder, batch)
    if reads == "history":
        answers = answer_with_history(model.decoder, batch, encoded)
    else:
        start = model.initial_memory(batch.num_dialogues)
        memories = scan_memory(model.memory_attention, start, encoded, batch.num_turns)
        answers = answer_with_memory(model.decoder, batch, memories)
    return {
        place: item.logits[item.row == row]
        for item in answers
        for row, place in enumerate(item.place.tolist())
    }


@layouts
@pytest.mark.parametrize("reads", ["memory", "history"])
def test_a_ragged_batch_is_the_loop_over_turns(
    tiny: Any, layout: dict[str, Any], reads: str
) -> None:
    """Catches turns decoded from another dialogue's state, out of order or from none, absent turns
    that are carried, and states that padding touches."""
    model = carrying(tiny, layout)
    made = dialogues(tiny)
    found = answered(model, whole_dialogues(made, tiny.turns, num_buckets=3), reads)
    for b, dialogue in enumerate(made):
        first = 1 if dialogue.system else 0
        for n, wanted in enumerate(naive(model, tiny, dialogue, reads), start=first):
            torch.testing.assert_close(found.pop(n * len(made) + b), wanted, atol=3e-5, rtol=0)
    assert not found


@pytest.mark.parametrize("reads", ["memory", "history"])
def test_groups_of_dialogues_change_nothing(
    tiny: Any, reads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches what the groups carry joined in another order than that of the dialogues, a gradient
    that is lost between them, and a batch that is never shared out."""
    model = carrying(tiny, LAYOUTS["add"])
    batch = whole_dialogues(dialogues(tiny), tiny.turns, num_buckets=3)
    lengths = unroll._turn_lengths(batch)
    assert len(unroll._dialogues_alike(lengths)) == 3
    nobody = torch.cat((lengths, torch.zeros_like(lengths[:, :1])), dim=1)
    grouped = torch.cat(unroll._dialogues_alike(nobody))
    assert sorted(grouped.tolist()) == [0, 1, 2, 3]
    found = []
    for most in (3, 1):
        monkeypatch.setattr(unroll, "_MOST_GROUPS", most)
        encoded = encode_turns(model.encoder, batch)
        start = model.initial_memory(batch.num_dialogues)
        memories = scan_memory(model.memory_attention, start, encoded, batch.num_turns)
        reader = unroll.memory_reader(memories)
        carried = unroll.decode_turns(model.decoder, batch, reader).carried
        answers = answered(model, batch, reads)
        values = [answers[place] for place in sorted(answers)]
        loss = sum(value.square().mean() for value in values) + carried.states.square().mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        found.append((carried.started, carried.states, *values, *gradients))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=3e-5, rtol=1e-4)


def objective_of(tiny: Any, model: ReactiveModel, **values: Any) -> Any:
    phases = values.pop("phases", (Phase(turns=4, dialogues=2),))
    options = {name: values.pop(name) for name in ("train",) if name in values}
    settings = MemoryAwareSettings(phases=phases, validation_dialogues=2, **values)
    return tiny.objective(MemoryAwareObjective, settings, model, **options)


def test_probes_start_from_the_state_at_their_place(tiny: Any) -> None:
    """Catches probes that are asked of no state, of that of their bucket's turns, or are carried
    on: a probe equals the turn in a dialogue that ends there."""
    model = carrying(tiny, LAYOUTS["add"])
    objective = objective_of(tiny, model, probes=3)
    batch = objective.batch(1, 0)
    encoded = encode_turns(model.encoder, batch)
    answers = objective._answers(batch, objective.settings.phases[0], encoded)
    conversations = [tiny.source().sample(2 + b, 4) for b in range(2)]
    num_probes = 0
    for item, rows in zip(answers, batch.answer, strict=True):
        for row in (rows.group == 3).nonzero().flatten().tolist():
            writes, b = divmod(int(rows.place[row]), 2)
            state = model.new_conversation(1)
            state = state.replaced(slots=model.initial_memory(1).detach())
            for turn in conversations[b].interactions[:writes]:
                state = model.update_memory(
                    state, [tiny.turns.interaction(turn.query, turn.answer).ids]
                )
            ids = rows.ids[row][rows.mask[row]][None]
            memory = model.decoder.read_memory(state.slots)
            hidden, _ = model.decoder(ids, memory=memory, carried=state.carried)
            places = rows.targets[row].nonzero().flatten() - 1
            wanted = model.decoder.logits(hidden[0, places])
            torch.testing.assert_close(item.logits[item.row == row], wanted, atol=3e-5, rtol=0)
            assert torch.equal(item.labels[item.row == row], ids[0, places + 1])
            num_probes += 1
    assert num_probes >= 2


@layouts
def test_the_gradient_of_the_last_answer_reaches_turn_one(
    tiny: Any, layout: dict[str, Any]
) -> None:
    """Catches a state that is detached between turns, and a cut that does not cut."""
    first, filler = Interaction("my dog is Rex.", "ok."), Interaction("hm.", "yes.")
    question = Interaction("what is my dog called?", "Rex.", kind="question")
    source = tiny.chat()
    source = type(source)([Conversation((first, *(filler,) * 6, question))])
    model = carrying(tiny, layout)
    for reads in ("memory", "history"):
        for backprop_turns, reaches in ((None, True), (4, False)):
            objective = objective_of(
                tiny,
                model,
                phases=(Phase(turns=8, dialogues=1, reads=reads),),
                train=source,
                backprop_turns=backprop_turns,
                num_buckets=1,
                # The balance of experts looks at the tokens of all turns, the first included.
                moe_aux_loss_scale=0.0,
            )
            batch = objective.batch(0, 0)
            last = tuple(
                rows._replace(targets=rows.targets & (rows.place == 7)[:, None])
                for rows in batch.answer
            )
            start = model.decoder.nothing_carried(1)
            assert start is not None
            start = start._replace(started=~start.started)
            forward_turns = functools.partial(model.decoder.forward_turns, carried=start)
            model.decoder.forward_turns = forward_turns  # type: ignore[method-assign]
            start.states.requires_grad_()
            objective.loss(batch._replace(answer=last), 0).loss.backward()
            del model.decoder.forward_turns
            gradient = start.states.grad
            found = gradient is not None and bool(gradient.any())
            assert found is reaches, (reads, backprop_turns)


def test_joint_training_carries_what_was_said_not_what_was_hidden(tiny: Any) -> None:
    """Catches a decoder that reads the encoder's masked tokens, and windows without a past."""
    model = carrying(tiny, LAYOUTS["no slots"])
    losses = []
    for probability in (0.1, 0.6):
        settings = JointLMSettings(
            turns=3, dialogues=2, mask_probability=probability, context="previous"
        )
        objective = tiny.objective(JointLMObjective, settings, model)
        batch = objective.batch(0, 0)
        losses.append(float(objective.loss(batch, 0).metrics["lm_loss"]))
    # Without slots the decoder has only what it carries: hiding from the encoder is no matter.
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    answers = objective._answers(batch, encode_turns(model.encoder, batch.dialogues))
    told = torch.cat([item.logits[item.place[item.row] // 2 == 1] for item in answers])
    alone = batch.dialogues.answer
    fresh = []
    for rows in alone:
        hidden, _ = model.decoder(rows.ids[:, :-1], rows.mask[:, :-1])
        row, position = rows.targets[:, 1:].nonzero(as_tuple=True)
        logits = model.decoder.logits(hidden[row, position])
        fresh.append(logits[rows.place[row] // 2 == 1])
    assert not torch.allclose(told, torch.cat(fresh), atol=1e-3)


# Evaluation measures the conversation that training trains.


@layouts
@torch.no_grad()
def test_evaluation_carries_the_state(tiny: Any, layout: dict[str, Any]) -> None:
    """Catches recall that is measured on the slots alone, and controls that keep the state."""
    model = carrying(tiny, layout).eval()
    made = [item.interactions for item in dialogues(tiny)]
    found = memory_of_references(model, tiny.turns, made)
    for b, dialogue in enumerate(made):
        state = model.new_conversation(1, seed=b)
        for turn in dialogue:
            ids = tiny.turns.interaction(turn.query, turn.answer).ids
            state = model.update_memory(state, [ids])
        assert found.carried is not None and state.carried is not None
        wanted = state.carried.states[:, 0]
        torch.testing.assert_close(found.carried.states[:, b], wanted, atol=1e-5, rtol=1e-4)
    own = memory_of_own_answers(model, made, 4)
    assert own.carried is not None and own.carried.started.all()
    fresh, other = model.new_conversation(3), found.select([1, 2, 0])
    for condition, source in (
        ("memory", found), ("swapped", other), ("reset", fresh), ("zeroed", fresh),
    ):  # fmt: skip
        read = state_to_read(condition, found, other, fresh)
        assert read.carried is not None and source.carried is not None
        assert torch.equal(read.carried.states, source.carried.states)


@torch.no_grad()
def test_perplexity_is_that_of_the_carried_conversation(tiny: Any) -> None:
    """Catches perplexities of a model that forgets between turns, and borrowed states of the wrong
    dialogue: without slots only the carried state tells the conditions apart."""
    model = carrying(tiny, LAYOUTS["no slots"]).eval()
    made = [Conversation(tiny.generator.conversation(n, 3).interactions) for n in range(4)]
    settings = PerplexitySettings(conditions=("memory", "reset", "swapped"), batch_size=2)
    result = evaluate_perplexity(model, made, settings)
    losses = {
        (row["condition"], row["turn"]): row["loss"]
        for row in result.rows
        if row["tokens"] == "answer"
    }
    for turn in range(3):
        wanted = {"memory": 0.0, "reset": 0.0, "swapped": 0.0}
        count = 0
        for number, dialogue in enumerate(made):
            ids = [
                tiny.turns.interaction(item.query, item.answer) for item in dialogue.interactions
            ]
            states = []
            for whose in (number, (number + 1) % 4):
                state = model.new_conversation(1, seed=whose)
                for item in made[whose].interactions[:turn]:
                    said = tiny.turns.interaction(item.query, item.answer).ids
                    state = model.update_memory(state, [said])
                states.append(state.carried)
            row = torch.tensor([ids[turn].ids])
            start = ids[turn].answer_start
            for condition, carried in zip(wanted, (states[0], None, states[1]), strict=True):
                hidden, _ = model.decoder(row[:, :-1], carried=carried)
                scores = model.decoder.logits(hidden[0])[start:]
                wanted[condition] += float(
                    torch.nn.functional.cross_entropy(scores, row[0, start + 1 :], reduction="sum")
                )
            count += row.shape[1] - start - 1
        for condition, total in wanted.items():
            assert losses[condition, turn + 1] == pytest.approx(total / count, abs=1e-4)
