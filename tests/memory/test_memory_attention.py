"""What must hold for memory attention of every variant, gate and norm.

Not here: the arithmetic against an oracle (test_memory_oracle), gates, norms and initial slots by
themselves.

Shapes: L = 4 layers, B batch, S = 3 slots, T tokens, D = 8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rxlm.memory.attention import MemoryAttention
from rxlm.memory.gates import GateSettings
from rxlm.nn.attention import KeyValue

Maker = Callable[..., MemoryAttention]


def random_turn(batch_size: int = 2, length: int = 5, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return slots ``[L, B, S, D]`` and encoder states ``[L, B, T, D]``."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randn(4, batch_size, 3, 8, generator=generator)
    return slots, torch.randn(4, batch_size, length, 8, generator=generator) * 2


def set_gates(memory: MemoryAttention, *, write: float, mix: float) -> None:
    """Saturate the gates, whatever the content."""
    for name, logit in (("gate", write), ("mix_gate", mix)):
        gate = getattr(memory, name, None)
        if gate is not None and gate.settings.enabled:
            with torch.no_grad():
                gate.bias.fill_(logit)


def update_of(memory: MemoryAttention, slots: Tensor, states: Tensor) -> Tensor:
    """Return what the write reads from the turn, before it is gated in."""
    query = memory.slot_norm(slots) + memory.slot_identity
    return memory.write_attention(query, memory.project(states), None)


def test_memory_is_a_value(combination: Any, make_memory: Maker) -> None:
    """Catches a write that changes its input, keeps something for the next call, drops a
    parameter from the computation, or returns another shape."""
    memory = make_memory(*combination)
    slots, states = random_turn()
    copies = slots.clone(), states.clone()
    written = memory(slots, states)
    assert written.shape == slots.shape
    assert not torch.equal(written, slots)
    assert torch.equal(memory(slots, states), written)
    assert torch.equal(slots, copies[0]) and torch.equal(states, copies[1])
    assert list(memory.buffers()) == []
    (written * torch.randn_like(written)).sum().backward()
    for name, parameter in memory.named_parameters():
        if name != "initial.start":
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().max() > 0, name


def test_closed_gates_keep_the_memory(combination: Any, make_memory: Maker) -> None:
    """Catches a residual path that changes what is kept (a norm, a mix, the reference's 1 + g)."""
    memory = make_memory(*combination)
    if not combination.gate.enabled:
        assert list(memory.gate.parameters()) == []
        return
    slots, states = random_turn()
    set_gates(memory, write=-40.0, mix=-40.0)
    torch.testing.assert_close(memory(slots, states), slots, atol=1e-6, rtol=0)


def test_open_gate_writes_the_update_alone(pair: Any, make_memory: Maker) -> None:
    """Catches a gate that keeps part of the old slot however far it is opened, and a missing one
    that does."""
    memory = make_memory(*pair)
    slots, states = random_turn()
    set_gates(memory, write=40.0, mix=-40.0)
    mixed = []
    memory.gate.register_forward_hook(lambda _module, inputs, _output: mixed.append(inputs[0]))
    written = memory(slots, states)
    expected = update_of(memory, mixed[0], states)
    if pair.gate.enabled or pair.variant == "simple":
        torch.testing.assert_close(mixed[0], slots, atol=1e-6, rtol=0)
    if not pair.gate.enabled:
        expected = mixed[0] + expected
    torch.testing.assert_close(written, expected, atol=1e-5, rtol=1e-5)


def test_projecting_ahead_equals_forward(pair: Any, make_memory: Maker) -> None:
    """Catches a projection that mixes turns: all turns are projected at once, written in order."""
    memory = make_memory(*pair)
    slots, _ = random_turn()
    turns = [random_turn(length=4, seed=seed)[1] for seed in range(3)]
    masks = [torch.rand(2, 4) < 0.7 for _ in turns]
    encoded = memory.project(torch.cat(turns, dim=1), torch.cat(masks))
    keys, values = (part.unflatten(0, (4, 3, 2)) for part in encoded)
    one_by_one, ahead = slots, slots
    for turn, (states, mask) in enumerate(zip(turns, masks, strict=True)):
        one_by_one = memory(one_by_one, states, mask)
        key_value = KeyValue(keys[:, turn].flatten(0, 1), values[:, turn].flatten(0, 1))
        ahead = memory.write(ahead, key_value, mask)
        torch.testing.assert_close(ahead, one_by_one, atol=1e-5, rtol=1e-5)


def test_projecting_real_tokens_only(make_memory: Maker) -> None:
    """Catches tokens of several ragged turns put back in the wrong place or at the wrong position,
    padding that is read, and a gradient that differs."""
    memory = make_memory("simple", "classic-rms").double()
    _, states = random_turn(batch_size=4, length=6)
    mask = torch.zeros(4, 6, dtype=torch.bool)
    for row, (start, end) in enumerate(((0, 6), (2, 5), (0, 0), (5, 6))):
        mask[row, start:end] = True
    results = []
    for project in (memory.project, memory.project_real):
        source = states.double().requires_grad_()
        parts = project(source, mask)
        kept = [part.unflatten(0, (4, 4))[:, mask] for part in parts]
        (gradient,) = torch.autograd.grad(sum((part**3).sum() for part in kept), source)
        results.append((*kept, gradient))
    for whole, real in zip(*results, strict=True):
        torch.testing.assert_close(real, whole)
    assert not memory.project_real(states.double(), mask).key.unflatten(0, (4, 4))[:, ~mask].any()


@pytest.mark.parametrize("competition", [False, True])
@pytest.mark.parametrize("heads", [(2, 2), (2, 1), (1, 2)])
def test_shown_weights_are_those_of_the_write(
    heads: tuple[int, int], variant: str, competition: bool, make_memory: Maker
) -> None:
    """Catches a picture of the write that is not what the kernel does: the weights must give the
    same memory, be zero on padding, and sum to one (equal ones where there is no token)."""
    memory = make_memory(variant, heads=heads, write_competition=competition)
    slots, states = random_turn()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 1:3] = False
    weights = memory.write_weights(slots, states, mask)
    assert weights.shape == (4, 2, max(heads), 3, 5)
    assert weights[:, 0, :, :, 1:3].abs().max() == 0
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, 2, max(heads), 3))
    values = memory.project(states, mask).value.unflatten(0, (4, 2))
    values = values.repeat_interleave(max(heads) // heads[1], dim=3)
    read = torch.einsum("lbhsp,lbphk->lbshk", weights, values).flatten(-2)
    update = torch.einsum("lbsk,lkd->lbsd", read, memory.write_attention.output)
    seen = []
    memory.gate.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[1]))
    memory(slots, states, mask)
    torch.testing.assert_close(seen[0], update, atol=1e-5, rtol=1e-5)
    empty = memory.write_weights(slots, states, torch.zeros_like(mask))
    assert torch.equal(empty, torch.full_like(empty, 0.2))


@pytest.mark.parametrize("competition", [False, True])
def test_padding_changes_nothing(pair: Any, competition: bool, make_memory: Maker) -> None:
    """Catches padded tokens that are read, counted as positions, or averaged over."""
    memory = make_memory(*pair, write_competition=competition)
    slots, states = random_turn()
    expected = memory(slots, states)
    for left, right in ((0, 0), (0, 3), (2, 0), (4, 1)):
        filler = torch.full((4, 2, left + right, 8), 7.0)
        padded = torch.cat((filler[:, :, :left], states, filler[:, :, left:]), dim=2)
        mask = torch.zeros(2, left + 5 + right, dtype=torch.bool)
        mask[:, left : left + 5] = True
        torch.testing.assert_close(memory(slots, padded, mask), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("competition", [False, True])
def test_rows_do_not_leak_into_each_other(pair: Any, competition: bool, make_memory: Maker) -> None:
    """Catches statistics over the batch and layers mistaken for rows: one conversation's memory
    must be the same whoever shares its batch."""
    memory = make_memory(*pair, write_competition=competition)
    slots, states = random_turn(batch_size=3)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, 3:] = False
    mask[2, :2] = False
    slots.requires_grad_()
    states.requires_grad_()
    together = memory(slots, states, mask)
    for row in range(3):
        alone = memory(slots[:, row : row + 1], states[:, row : row + 1], mask[row : row + 1])
        torch.testing.assert_close(together[:, row : row + 1], alone, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(together[:, 1].square().sum(), (slots, states))
    for gradient in gradients:
        assert gradient[:, (0, 2)].abs().max() == 0
        assert gradient[:, 1].abs().max() > 0


@pytest.mark.parametrize("competition", [False, True])
def test_a_row_without_tokens_keeps_its_memory(
    pair: Any, competition: bool, make_memory: Maker
) -> None:
    """Catches a dialogue that ended earlier than its batch being rewritten by empty turns, and
    NaN gradients from a softmax over nothing."""
    memory = make_memory(*pair, write_competition=competition)
    slots, states = random_turn()
    slots.requires_grad_()
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1] = True
    written = memory(slots, states, mask)
    assert torch.equal(written[:, 0], slots[:, 0])
    assert not torch.equal(written[:, 1], slots[:, 1])
    parts = (slots, *(p for name, p in memory.named_parameters() if name != "initial.start"))
    gradients = torch.autograd.grad(written.square().sum(), parts)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    torch.testing.assert_close(gradients[0][:, 0], 2 * slots[:, 0])


def test_slots_have_no_order_of_their_own(pair: Any, make_memory: Maker) -> None:
    """Catches slots that get positions: without slot identities a permutation of the slots only
    permutes the result, and with them it does not."""
    options = {"randomized": False, "write_sharpness": 1.0}
    slots, states = random_turn()
    order = torch.tensor([2, 0, 1])
    memory = make_memory(*pair, slot_identity=False, **options)
    torch.testing.assert_close(
        memory(slots[:, :, order], states), memory(slots, states)[:, :, order], atol=1e-5, rtol=1e-5
    )
    named = make_memory(*pair, slot_identity=True, **options)
    moved = named(slots[:, :, order], states) - named(slots, states)[:, :, order]
    assert moved.abs().max() > 1e-3


def test_equal_slots_become_different_only_by_identity(make_memory: Maker) -> None:
    """Catches a slot identity that is the same for all slots: equal slots would stay equal, and a
    memory of S slots would hold one."""
    slots = torch.ones(4, 1, 3, 8)
    _, states = random_turn(batch_size=1)
    same = make_memory("interlayer", slot_identity=False, randomized=False)(slots, states)
    torch.testing.assert_close(same, same[:, :, :1].expand_as(same))
    named = make_memory("interlayer", randomized=False)(slots, states)
    distance = torch.cdist(named[:, 0], named[:, 0]) + 10 * torch.eye(3)
    assert distance.min() > 1e-3


@pytest.mark.parametrize(
    ("variant", "reached"),
    [
        ("simple", [[0], [1], [2], [3]]),
        ("self", [[0], [1], [2], [3]]),
        ("interlayer", [[0, 1, 2, 3]] * 4),
        ("self-interlayer", [[0, 1, 2, 3]] * 4),
        ("grouped-self-interlayer", [[0, 1], [0, 1], [2, 3], [2, 3]]),
    ],
)
def test_which_layers_a_layer_reads(
    variant: str, reached: list[list[int]], make_memory: Maker
) -> None:
    """Catches a mean over the wrong layers, groups that are interleaved instead of contiguous,
    and encoder states of one layer written into another."""
    memory = make_memory(variant)
    slots, states = (part.requires_grad_() for part in random_turn())
    written = memory(slots, states)
    for layer in range(4):
        from_slots, from_states = torch.autograd.grad(
            written[layer].square().sum(), (slots, states), retain_graph=True
        )
        assert from_slots.flatten(1).abs().sum(1).nonzero().flatten().tolist() == reached[layer]
        assert from_states.flatten(1).abs().sum(1).nonzero().flatten().tolist() == [layer]


def test_groups_between_all_and_none(make_memory: Maker) -> None:
    """Catches a group count read the wrong way round: one group is the variant without groups,
    as many groups as layers leave each layer with its own slots."""
    slots, states = random_turn()
    whole = make_memory("self-interlayer", num_groups=2)
    grouped = make_memory("grouped-self-interlayer", num_groups=1)
    grouped.load_state_dict(whole.state_dict())
    assert torch.equal(grouped(slots, states), whole(slots, states))
    alone = make_memory("grouped-self-interlayer", num_groups=4)
    themselves = make_memory("self")
    themselves.load_state_dict(alone.state_dict(), strict=False)
    torch.testing.assert_close(alone(slots, states), themselves(slots, states))


def test_competing_slots_share_a_token_out(make_memory: Maker) -> None:
    """Catches a competition among tokens, or one that the mixing of slots takes part in: slots
    that ask for the same get equal shares of all tokens, whatever they ask for."""
    slots, states = random_turn()
    memory = make_memory(write_competition=True, slot_identity=False)
    equal = memory.write_weights(slots[:, :, :1].expand_as(slots), states)
    torch.testing.assert_close(equal, torch.full_like(equal, 0.2))
    assert (memory.write_weights(slots, states) - 0.2).abs().max() > 0.01
    mixing = make_memory("self", write_competition=True)
    assert mixing.write_attention.competition and not mixing.mix_attention.competition


def test_tokens_have_an_order(make_memory: Maker) -> None:
    """Catches a write without positions, to which "Ann called Ben" and "Ben called Ann" are the
    same; the order counts real tokens only."""
    memory = make_memory()
    slots, states = random_turn()
    assert (memory(slots, states.flip(2)) - memory(slots, states)).abs().max() > 1e-3
    gap = torch.ones(2, 6, dtype=torch.bool)
    gap[:, 2] = False
    spread = torch.cat((states[:, :, :2], states[:, :, :1] * 9, states[:, :, 2:]), dim=2)
    torch.testing.assert_close(
        memory(slots, spread, gap), memory(slots, states), atol=1e-5, rtol=1e-5
    )


def test_the_size_of_the_encoder_states_does_not_matter(make_memory: Maker) -> None:
    """Catches a missing norm of what is written: deep encoders have large states."""
    memory = make_memory("interlayer")
    slots, states = random_turn()
    torch.testing.assert_close(
        memory(slots, 1000.0 * states), memory(slots, states), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("gate_type", ["static", "elementwise", "linear"])
@pytest.mark.parametrize("tanh", [False, True])
def test_memory_stays_bounded_over_many_turns(
    gate_type: Any, tanh: bool, variant: str, make_memory: Maker
) -> None:
    """Catches a gate that is not convex (the reference's 1 + g and 1 - g): every written element
    must lie between the old and the update, so 200 turns cannot make the memory grow."""
    memory = make_memory(variant, "rms", GateSettings(gate_type=gate_type, tanh=tanh, init=0.0))
    largest_update = 0.0

    def check(_module: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        nonlocal largest_update
        low, high = torch.minimum(*inputs), torch.maximum(*inputs)
        assert (output >= low - 1e-5).all() and (output <= high + 1e-5).all()
        largest_update = max(largest_update, inputs[1].abs().max().item())

    memory.gate.register_forward_hook(check)
    if variant != "simple":
        memory.mix_gate.register_forward_hook(check)
    generator = torch.Generator().manual_seed(3)
    slots = torch.randn(4, 1, 3, 8, generator=generator)
    start = slots.abs().max().item()
    num_turns = 200 if gate_type == "linear" else 50
    with torch.no_grad():
        for _ in range(num_turns):
            slots = memory(slots, torch.randn(4, 1, 2, 8, generator=generator))
    assert slots.abs().max().item() <= max(start, largest_update) + 1e-4


def test_without_a_gate_the_memory_grows(make_memory: Maker) -> None:
    """Catches a test above that cannot fail: the plain sum must be seen to grow."""
    memory = make_memory(gate=GateSettings(enabled=False))
    slots, states = random_turn()
    start = slots.abs().max()
    with torch.no_grad():
        for _ in range(50):
            slots = memory(slots, states)
    assert slots.abs().max() > 3 * start


@pytest.mark.parametrize("competition", [False, True])
@pytest.mark.parametrize("under_autocast", [False, True])
def test_bf16(pair: Any, under_autocast: bool, competition: bool, make_memory: Maker) -> None:
    """Catches an operation that refuses mixed types, non-finite gradients, and a memory that
    silently becomes bf16 under autocast, where small writes round to nothing."""
    memory = make_memory(*pair, write_competition=competition)
    slots, states = random_turn()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1] = False
    exact = memory(slots, states, mask)
    if under_autocast:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            written = memory(slots, states, mask)
    else:
        memory, slots, states = memory.bfloat16(), slots.bfloat16(), states.bfloat16()
        written = memory(slots, states, mask)
    assert written.dtype == slots.dtype
    torch.testing.assert_close(written.float(), exact, atol=0.2, rtol=0.1)
    written.float().square().sum().backward()
    for name, parameter in memory.named_parameters():
        if name != "initial.start":
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_a_write_may_replace_the_memory(make_memory: Maker) -> None:
    """Catches a switched-off residual that still keeps old slots (``disable_residual``)."""
    memory = make_memory(gate=GateSettings(residual=False), slot_identity=True)
    slots, states = random_turn()
    assert not any(name.startswith("gate.") for name, _ in memory.named_parameters())
    torch.testing.assert_close(memory(slots, states), update_of(memory, slots, states))


def test_mixing_and_writing_have_their_own_gates(make_memory: Maker) -> None:
    """Catches one gate's settings used for both: here only the write is gated, and closed."""
    memory = make_memory("self", gate=GateSettings())
    plain = replace(memory.settings, mix_gate=GateSettings(enabled=False))
    memory = MemoryAttention(plain)
    set_gates(memory, write=-40.0, mix=0.0)
    slots, states = random_turn()
    normed = memory.mix_norm(slots)
    mixed = slots + memory.mix_attention(normed, memory.mix_attention.project(normed), None)
    torch.testing.assert_close(memory(slots, states), mixed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [(2, 2), (2, 1), (1, 2), (1, 1)])
def test_copy_path(heads: tuple[int, int], make_memory: Maker) -> None:
    """Catches a cold start: the one token of a turn is written as it is, or as its orthogonal
    projection of rank G*K where the values are narrower."""
    memory = make_memory(heads=heads)
    tokens = torch.eye(8)[None, :, None].expand(4, 8, 1, 8)
    attention = memory.write_attention
    queries = torch.randn(4, 8, 3, 8)
    path = attention(queries, attention.project(tokens), None)
    torch.testing.assert_close(path, path[:, :, :1].expand_as(path), atol=1e-5, rtol=0)
    for layer in path[:, :, 0]:
        torch.testing.assert_close(layer, layer.T, atol=1e-5, rtol=0)
        torch.testing.assert_close(layer @ layer, layer, atol=1e-5, rtol=0)
        assert torch.linalg.matrix_rank(layer, atol=1e-4) == heads[1] * 4
    random_path = make_memory(heads=heads, copy_path_init=False).write_attention
    output = random_path(queries, random_path.project(tokens), None)
    assert (output[0, :, 0] - output[0, :, 0].T).abs().max() > 1e-2


def test_sharpness_scales_the_first_queries(make_memory: Maker) -> None:
    """Catches a sharpness applied to keys or values, or not at all."""
    flat = make_memory(write_sharpness=1.0, slot_identity=False)
    sharp = make_memory(write_sharpness=5.0, slot_identity=False)
    torch.testing.assert_close(sharp.write_attention.query, 5.0 * flat.write_attention.query)
    for name, parameter in flat.named_parameters():
        if name != "write_attention.query":
            assert torch.equal(parameter, sharp.get_parameter(name)), name
