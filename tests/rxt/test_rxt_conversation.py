"""Conversations as values: memory updates, seeds, rows, and what a memory must look like."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rxlm.errors import UserError
from rxlm.ops.sampling import GREEDY
from rxlm.rxt.conversation import ConversationState, check_slots
from rxlm.rxt.models import RxTAlpha

ModelBuilder = Callable[..., RxTAlpha]

TURNS = [[2, 5, 40, 41, 6, 42, 3], [2, 5, 90, 6, 3], [2, 5, 7, 100, 101, 6, 50, 51, 52, 3]]


@pytest.fixture(scope="module")
def model(make_model: ModelBuilder) -> RxTAlpha:
    return make_model()


def test_an_update_leaves_its_input_unchanged(model: RxTAlpha) -> None:
    """Catches in-place writes: whoever keeps an old state must be able to go back to it."""
    state = model.new_conversation(3)
    before = state.slots.clone()
    after = model.update_memory(state, TURNS)
    assert torch.equal(state.slots, before) and state.num_turns == (0, 0, 0)
    assert after.num_turns == (1, 1, 1)
    assert (after.slots - before).abs().amax(dim=(0, 2, 3)).min() > 1e-3


def test_a_batched_update_equals_single_updates(model: RxTAlpha) -> None:
    """Catches writes that depend on the padding or the neighbours of a row."""
    state = model.update_memory(model.new_conversation(3), TURNS[::-1])
    together = model.update_memory(state, TURNS)
    for row, turn in enumerate(TURNS):
        alone = model.update_memory(state.select([row]), [turn])
        torch.testing.assert_close(alone.slots[:, 0], together.slots[:, row], atol=1e-5, rtol=1e-5)


def test_an_empty_turn_leaves_its_row_as_it_is(model: RxTAlpha) -> None:
    """Catches conversations that forget while others in the batch go on."""
    state = model.update_memory(model.new_conversation(3), TURNS)
    after = model.update_memory(state, [TURNS[0], [], TURNS[2]])
    assert torch.equal(after.slots[:, 1], state.slots[:, 1])
    assert after.num_turns == (2, 1, 2)
    assert not torch.equal(after.slots[:, 0], state.slots[:, 0])
    assert model.update_memory(state, [[], [], []]) is state


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([[2, *range(20, 70), 3]], "52 tokens but the model's seq_len is 48"),
        ([[2, 5, 5000, 3]], "token id 5000"),
        ([[2, 3], [2, 3]], "2 turns for 1 conversations"),
    ],
)
def test_turns_that_cannot_be_written_are_refused(
    model: RxTAlpha, turns: list[list[int]], message: str
) -> None:
    """Catches turns that are cut silently or fail inside an embedding."""
    with pytest.raises(UserError, match=message):
        model.update_memory(model.new_conversation(), turns)


@pytest.mark.parametrize("init_type", ["normal", "standard", "uniform", "learned", "zeros"])
def test_a_row_starts_like_a_single_conversation(make_model: ModelBuilder, init_type: str) -> None:
    """Catches memory or draws that depend on the batch, or a memory that no seed decides."""
    model = make_model(memory_init_type=init_type)
    batch = model.new_conversation(3, seed=20)
    for row in range(3):
        single = model.new_conversation(seed=20 + row)
        assert torch.equal(single.slots[:, 0], batch.slots[:, row])
        assert single.seeds[0] == batch.seeds[row]


def test_a_system_prompt_is_in_memory_but_is_no_turn(model: RxTAlpha) -> None:
    """Catches a system prompt that is ignored, or written to one row only."""
    plain = model.new_conversation(2)
    prompted = model.new_conversation(2, system="Your name is Ann.")
    assert prompted.num_turns == (0, 0)
    assert not torch.equal(prompted.slots, plain.slots)
    assert torch.equal(prompted.slots[:, 0], prompted.slots[:, 1])


def test_states_carry_no_graph(model: RxTAlpha) -> None:
    """Catches conversations that keep every earlier turn alive through autograd."""
    state = model.update_memory(model.new_conversation(), TURNS[:1])
    assert not state.slots.requires_grad
    assert torch.is_grad_enabled()
    trained = state.replaced(slots=state.slots.clone().requires_grad_())
    written = model.write_memory(trained.slots, torch.tensor(TURNS[:1]))
    written.sum().backward()
    assert trained.slots.grad is not None, "a state must be usable in training"
    assert not trained.detach().slots.requires_grad


def test_rows_can_be_selected_repeated_and_stacked(model: RxTAlpha) -> None:
    """Catches a batch operation that mixes up which memory belongs to which randomness."""
    state = model.update_memory(model.new_conversation(3, seed=5), TURNS)
    state = state.replaced(draws=(10, 11, 12), num_turns=(1, 2, 3))
    picked = state.select([2, 0])
    assert (picked.seeds, picked.draws, picked.num_turns) == ((7, 5), (12, 10), (3, 1))
    assert torch.equal(picked.slots[:, 0], state.slots[:, 2])
    again = ConversationState.stack([picked, state.select([1])])
    assert again.seeds == (7, 5, 6) and again.batch_size == 3
    assert torch.equal(again.slots[:, 2], state.slots[:, 1])
    assert state.repeat(2).seeds == (5, 5, 6, 6, 7, 7)
    with pytest.raises(UserError, match="no conversations"):
        ConversationState.stack([])


def test_a_model_in_another_precision_takes_the_state(make_model: ModelBuilder) -> None:
    """Catches a dtype clash when a conversation outlives a conversion of its model."""
    model = make_model()
    state = model.update_memory(model.new_conversation(), TURNS[:1])
    model.double()
    after = model.update_memory(state, TURNS[:1])
    assert after.slots.dtype == torch.float64
    assert model.generate(state, [TURNS[0][:4]], GREEDY, max_new_tokens=3).answers[0].ids


def spoiled(value: float) -> Tensor:
    slots = torch.zeros(2, 1, 6, 16)
    slots[1, 0, 2, 3] = value
    return slots


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (torch.zeros(2, 1, 5, 16), r"shape \[2, 1, 5, 16\].*6 slots"),
        (torch.zeros(2, 6, 16), "shape"),
        (torch.zeros(2, 0, 6, 16), "shape"),
        (torch.zeros(2, 1, 6, 16, dtype=torch.long), "int64"),
        (spoiled(float("nan")), "1 values that are not finite"),
        (spoiled(float("inf")), "not finite"),
        ([1.0], "expected a tensor"),
    ],
)
def test_a_memory_that_cannot_be_is_refused(slots: Tensor, message: str) -> None:
    """Catches a wrong or damaged memory being accepted and giving nonsense later."""
    with pytest.raises(UserError, match=message):
        check_slots(slots, (2, 6, 16))
