"""Memory pretraining: targets, alignment, and the loss against a slow loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rxlm.nn.attention import KeyValue
from rxlm.rxt.unroll import EncodedTurns, encode_turns
from rxlm.training.objectives.memory_pretraining import (
    MemoryPretrainingObjective,
    MemoryPretrainingSettings,
    align_by_content,
    align_by_position,
)


def settings(**values: Any) -> MemoryPretrainingSettings:
    return MemoryPretrainingSettings(
        **{"turns": 3, "dialogues": 3, "validation_dialogues": 3, **values}
    )


def pretraining(tiny: Any, model: Any = None, **values: Any) -> Any:
    options = {name: values.pop(name) for name in ("train",) if name in values}
    return tiny.objective(MemoryPretrainingObjective, settings(**values), model, **options)


def random_turns(lengths: list[int], dim: int = 16) -> EncodedTurns:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, len(lengths), max(lengths), dim, generator=generator)
    return EncodedTurns(states, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


def test_positions_are_matched_one_to_one_when_counts_agree() -> None:
    """A stretch that shifts tokens, or reads padding: the reference's rule is the identity."""
    encoded = random_turns([7, 5, 3])
    for flat, length in enumerate([7, 5, 3]):
        aligned = align_by_position(encoded, length)[:, flat]
        torch.testing.assert_close(aligned, encoded.states[:, flat, :length])


@pytest.mark.parametrize("num_slots", [1, 2, 4, 20])
def test_any_number_of_slots_is_stretched_over_the_turn(num_slots: int) -> None:
    """A demand that there are as many slots as tokens, or ends that are missed."""
    encoded = random_turns([7, 3])
    aligned = align_by_position(encoded, num_slots)
    assert aligned.shape == (2, 2, num_slots, 16)
    torch.testing.assert_close(aligned[:, :, 0], encoded.states[:, :, 0])
    if num_slots > 1:
        torch.testing.assert_close(aligned[:, 0, -1], encoded.states[:, 0, 6])
        torch.testing.assert_close(aligned[:, 1, -1], encoded.states[:, 1, 2])


@pytest.mark.parametrize(
    "memory",
    [
        {},
        {"att_heads": 4, "att_type": "gqa", "att_groups": 2},
        {"variant": "self-interlayer", "interlayer_att_type": "mha"},
        {"use_slot_identity": False},
    ],
)
def test_write_weights_are_those_of_the_write(memory: dict[str, Any], tiny: Any) -> None:
    """A target chosen by other weights than the write uses (heads, rotation, mask, norm)."""
    attention = tiny.model(**memory).memory_attention
    encoded = random_turns([7, 5, 3])
    slots = attention.initial(3) + torch.randn(2, 3, 8, 16)
    weights = attention.write_weights(slots, encoded.states, encoded.mask)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
    assert (weights.permute(1, 4, 0, 2, 3)[~encoded.mask] == 0).all()
    key_value = attention.project(encoded.states, encoded.mask)
    value = key_value.value.unflatten(0, (2, 3))
    value = value.repeat_interleave(weights.shape[2] // value.shape[3], dim=3)
    heads = torch.einsum("lbhst,lbthk->lbshk", weights, value).flatten(-2)
    update = torch.einsum("lbse,led->lbsd", heads, attention.write_attention.output)
    written = attention.gate(attention._mix(slots), update)
    wanted = attention.write(slots, KeyValue(*key_value), encoded.mask)
    torch.testing.assert_close(written, wanted, atol=1e-5, rtol=1e-4)


def test_content_alignment_takes_the_token_that_is_read_most(tiny: Any) -> None:
    """A target that is an average of tokens, or of another slot, layer or turn."""
    attention = tiny.model().memory_attention
    encoded = random_turns([7, 5])
    slots = torch.randn(2, 2, 8, 16)
    aligned = align_by_content(attention, slots, encoded)
    weights = attention.write_weights(slots, encoded.states, encoded.mask).mean(dim=2)
    for layer in range(2):
        for flat in range(2):
            for slot in range(8):
                token = int(weights[layer, flat, slot].argmax())
                assert torch.equal(aligned[layer, flat, slot], encoded.states[layer, flat, token])


def naive_loss(objective: Any, ids_of_turns: list[Tensor]) -> list[Tensor]:
    """Return 1 - cosine of each turn of one dialogue, written one after the other."""
    model, options = objective.model, objective.settings
    slots, losses = model.initial_memory(1), []
    for turn, ids in enumerate(ids_of_turns):
        states = model.encoder(ids[None])
        encoded = EncodedTurns(states, torch.ones(1, len(ids), dtype=torch.bool))
        aligned = (
            align_by_content(model.memory_attention, slots, encoded)
            if options.alignment == "content"
            else align_by_position(encoded, slots.shape[2])
        )
        rms = aligned.square().mean(dim=-1, keepdim=True).sqrt()
        new = options.new_weight_first if turn == 0 else options.new_weight_later
        target = (1 - new) * slots + new * aligned / rms
        written = model.write_memory(slots, ids[None])
        cosine = torch.nn.functional.cosine_similarity(written, target, dim=-1)
        change = (written - slots).square().mean(dim=-1)
        losses.append((1 - cosine + options.stm_diff_factor * (turn + 1) ** 0.5 * change).mean())
        slots = written
    return losses


@pytest.mark.parametrize("alignment", ["content", "position"])
def test_the_loss_equals_the_loop_over_single_dialogues(alignment: str, tiny: Any) -> None:
    """Turns that do not exist in the mean, weights of the wrong turn, another dialogue's slots."""
    objective = pretraining(tiny, alignment=alignment, stm_diff_factor=0.3)
    turns = tiny.turns
    losses, windows = [], []
    for position, num_turns in enumerate((3, 1, 2)):
        conversation = tiny.source().sample(position, num_turns)
        rows = [turns.interaction(item.query, item.answer) for item in conversation.interactions]
        windows.append(conversation)
        losses += naive_loss(objective, [torch.tensor(row.ids) for row in rows])

    class Ragged:
        name, size, has_probes = "ragged", None, False

        def sample(self, position: int, num_turns: int) -> Any:
            return windows[position]

    objective.train_source = Ragged()
    output = objective.loss(objective.batch(0, 0), 0)
    assert output.num_targets == 6
    torch.testing.assert_close(output.loss, torch.stack(losses).mean(), atol=1e-6, rtol=1e-5)


def test_targets_are_constants(tiny: Any) -> None:
    """A gradient through the target, which lets slots and target meet at nothing."""
    objective = pretraining(tiny, new_weight_first=0.0, new_weight_later=0.0)
    # The target is the memory before the turn, the very input of the write: without the detach
    # the initial memory would be pulled by both sides of the cosine.
    batch = objective.batch(0, 0)
    with torch.no_grad():
        encoded = encode_turns(objective.model.encoder, batch)
    before = objective.model.initial_memory(9).clone().requires_grad_()
    target = objective._target(before, encoded, batch)
    assert not target.requires_grad
    torch.testing.assert_close(target, before.detach())


def test_backprop_turns_cuts_the_gradient_and_not_the_loss(tiny: Any) -> None:
    """A setting without effect, or one that changes what is computed."""
    model = tiny.model()
    losses, starts = [], []
    for backprop_turns in (None, 1):
        objective = pretraining(tiny, model, backprop_turns=backprop_turns)
        loss = objective.loss(objective.batch(0, 0), 0).loss
        model.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        starts.append(model.memory_attention.initial.start.grad.clone())
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(starts[0], starts[1])


@pytest.mark.parametrize("slots", [3, 40])
def test_slots_need_not_be_as_many_as_tokens(slots: int, tiny: Any) -> None:
    """The reference's demand that the memory has one slot a token."""
    objective = pretraining(tiny, tiny.model(slots=slots))
    assert objective.loss(objective.batch(0, 0), 0).loss.isfinite()


def test_pretraining_teaches_the_weights_of_the_target(tiny: Any) -> None:
    """A memory that ends up overwriting everything although the target keeps three quarters."""
    sizes = {}
    for new_weight in (0.1, 0.9):
        objective = pretraining(tiny, new_weight_first=0.9, new_weight_later=new_weight)
        parameters = objective.model.memory_attention.parameters()
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for step in range(30):
            optimizer.zero_grad()
            objective.loss(objective.batch(step, 0), step).loss.backward()
            optimizer.step()
        with torch.no_grad():
            sizes[new_weight] = objective.validate()["write_size"]
    assert sizes[0.1] < sizes[0.9]


def test_a_system_prompt_is_written_as_the_first_turn(tiny: Any) -> None:
    """A prompt that is skipped, so that the memory has never seen one."""
    source = tiny.chat(("hi", "hello"), system="You are brief.")
    objective = pretraining(tiny, train=source, dialogues=1)
    batch = objective.batch(0, 0)
    assert batch.num_turns == 2
    assert objective.loss(batch, 0).num_targets == 2
