"""What MD-GDN adds to KDA, in one layer: gates and first state from a memory.

Not here: slots, turns and conversations (tests/rxt/test_rxt_carried_state).

Shapes: B = 2, D = 24, HV = 3, K = V = 8, S = 5 slots.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rxlm.errors import UserError
from rxlm.nn.linear_attention import LinearSelfAttention
from rxlm.nn.linear_settings import LinearAttentionSettings
from rxlm.nn.memory_driven import INITIAL_WRITE_LOGIT, MemoryFusion
from rxlm.nn.recurrent_cache import CarriedLayer, CarriedState

MODES = ("add", "concat")
modes = pytest.mark.parametrize("mode", MODES)


def layer_of(mode: str | None, **changes: Any) -> LinearSelfAttention:
    """Return a layer whose memory has a say: weights that start at zero are random."""
    torch.manual_seed(0)
    sizes = {"dim": 24, "num_heads": 3, "key_dim": 8, "value_dim": 8}
    layer = LinearSelfAttention(
        LinearAttentionSettings("kda", **sizes, memory_fusion=mode, **changes)
    )
    if mode is not None:
        torch.nn.init.normal_(layer.memory_fusion.up.weight)
        torch.nn.init.normal_(layer.memory_fusion.keep.weight, std=0.3)
        torch.nn.init.constant_(layer.memory_fusion.keep.bias, 0.5)
        torch.nn.init.constant_(layer.memory_fusion.scale, 1.0)
    return layer


def inputs(num_tokens: int = 7) -> tuple[Tensor, Tensor, CarriedLayer]:
    """Return tokens, slots and a carried state that only the first row has."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, num_tokens, 24, generator=generator)
    slots = torch.randn(2, 5, 24, generator=generator)
    state = torch.randn(2, 3, 8, 8, generator=generator)
    started = torch.tensor([True, False])
    return x, slots, CarriedLayer(state * started[:, None, None, None], started)


@modes
def test_without_memory_it_is_kda_to_the_last_bit(mode: str) -> None:
    """Catches gates or a first state that are touched although no memory was given."""
    driven, plain = layer_of(mode), layer_of(None)
    shared = {
        name: weight
        for name, weight in driven.state_dict().items()
        if not name.startswith("memory_fusion.")
    }
    plain.load_state_dict(shared)
    x, slots, _ = inputs(70)
    expected, expected_cache = plain(x)
    found, cache = driven(x)
    assert torch.equal(found, expected)
    assert torch.equal(cache.state, expected_cache.state)
    heard, _ = driven(x, memory=driven.memory_fusion(slots))
    assert not torch.allclose(heard, expected)


@modes
def test_memory_has_no_say_in_the_gates_at_the_start(mode: str) -> None:
    """Catches an untrained memory that disturbs the gates, and writes that start half open."""
    layer = layer_of(mode)
    layer.memory_fusion.initialize()
    x, slots, _ = inputs()
    offsets = layer.memory_fusion.gate_offsets(x, layer.memory_fusion(slots))
    assert not offsets[0].any()
    assert (offsets[1] == INITIAL_WRITE_LOGIT).all() and INITIAL_WRITE_LOGIT < -1


@modes
def test_both_gates_are_those_of_the_definition(mode: str) -> None:
    """Catches a mode that is the other one, and offsets that reach the wrong gate or head."""
    layer = layer_of(mode)
    fusion = layer.memory_fusion
    x, slots, _ = inputs()
    gates = layer.gates(x, fusion.gate_offsets(x, fusion(slots)))
    mean = torch.nn.functional.rms_norm(slots.mean(dim=1), (24,), fusion.norm.weight, 1e-5)
    from_memory = mean @ fusion.down.weight.T
    if mode == "add":
        offset = (from_memory @ fusion.up.weight.T)[:, None]
    else:
        hidden = x @ fusion.tokens.weight.T + from_memory[:, None]
        offset = torch.nn.functional.silu(hidden) @ fusion.up.weight.T
    logits = layer.gates.decay(x) + offset[..., :24]
    steps = torch.nn.functional.softplus(logits + layer.gates.dt_bias).unflatten(-1, (3, 8))
    decay = -layer.gates.A_log.exp()[:, None] * steps
    write = (layer.gates.write(x) + offset[..., 24:] + fusion.write_bias).sigmoid()
    torch.testing.assert_close(gates.log_decay, decay)
    torch.testing.assert_close(gates.write_strength, write)


def test_only_concat_lets_memory_and_token_interact() -> None:
    """Catches a 'concat' that is 'add' in disguise: one linear layer on both is just that."""
    x, slots, _ = inputs()
    for mode, interacts in (("add", False), ("concat", True)):
        fusion = layer_of(mode).memory_fusion
        one, other = (fusion.gate_offsets(x, fusion(part))[0] for part in (slots, slots + 1.0))
        difference = (one - other).expand(2, 7, 24)
        varies = not torch.allclose(difference, difference[:, :1].expand_as(difference))
        assert varies is interacts


@torch.no_grad()
def test_the_first_state_is_the_mix_of_the_definition() -> None:
    """Catches a gate the wrong way round, a row without a past that is mixed with zeros, and
    slots that lose their identity."""
    fusion = layer_of("add").memory_fusion
    _, slots, carried = inputs()
    condition = fusion(slots)
    narrow = slots @ fusion.slot_bottleneck.weight.T
    keys = (narrow @ fusion.slot_key.weight.T).unflatten(-1, (3, 8))
    keys = keys / (keys.square().sum(dim=-1, keepdim=True) + 1e-6).sqrt()
    values = (narrow @ fusion.slot_value.weight.T).unflatten(-1, (3, 8))
    writes = (slots @ fusion.slot_write.weight.T).sigmoid()
    memory = torch.zeros(2, 3, 8, 8)
    for slot in range(5):
        outer = keys[:, slot, :, :, None] * values[:, slot, :, None, :]
        memory += writes[:, slot, :, None, None] * outer / 5**0.5
    torch.testing.assert_close(condition.state, memory)
    start = fusion.initial_state(condition, carried.state, carried.started)
    keep = condition.keep[0, :, None, None]
    torch.testing.assert_close(start[0], keep * carried.state[0] + (1 - keep) * memory[0])
    assert torch.equal(start[1], condition.state[1])
    assert torch.equal(fusion.initial_state(condition, None, None), condition.state)


def test_the_parameters_stay_few() -> None:
    """Catches a projection onto the whole state, which is as large as a model of its own."""
    for mode, extra in (("add", 0), ("concat", 1024 * 64)):
        fusion = MemoryFusion(1024, 16, 64, 64, mode, 1e-5)
        gates = 1024 * 64 + 64 * 16 * 65 + extra
        slots = 1024 * 64 + 2 * 64 * 1024 + 1024 * 16
        found = sum(parameter.numel() for parameter in fusion.parameters())
        assert found == gates + slots + 1024 + (1024 * 16 + 16) + 2 * 16
        assert found == {"add": 362_544, "concat": 428_080}[mode]  # as the page says


@modes
def test_two_interactions_are_one_sequence_if_the_gate_is_open(mode: str) -> None:
    """Catches a carried state that is scaled, detached, off by a token or read too late: with the
    past kept and no convolution, a turn's end means nothing."""
    layer = layer_of(mode, conv_size=None)
    torch.nn.init.zeros_(layer.memory_fusion.keep.weight)
    torch.nn.init.constant_(layer.memory_fusion.keep.bias, 200.0)
    x, slots, _ = inputs(90)
    memory = layer.memory_fusion(slots)
    whole, whole_cache = layer(x, memory=memory)
    first, cache = layer(x[:, :37], memory=memory)
    carried = CarriedLayer(cache.state, torch.tensor([True, True]))
    second, cache = layer(x[:, 37:], memory=memory, carried=carried)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache.state, whole_cache.state, atol=1e-5, rtol=1e-5)


@modes
def test_padding_and_missing_slots_change_nothing(mode: str) -> None:
    """Catches padding that decays a state that is not zero, and masked slots that are read, even
    when they are not finite."""
    layer = layer_of(mode)
    x, slots, carried = inputs()
    wide = torch.cat((slots, torch.full((2, 2, 24), torch.inf)), dim=1)
    exists = torch.arange(7) < 5
    alone, alone_cache = layer(x, memory=layer.memory_fusion(slots), carried=carried)
    memory = layer.memory_fusion(wide, exists.expand(2, 7))
    for left, right in ((0, 3), (4, 0), (2, 5)):
        padded = torch.nn.functional.pad(x, (0, 0, left, right), value=3.0)
        mask = torch.zeros(2, left + 7 + right, dtype=torch.bool)
        mask[:, left : left + 7] = True
        found, cache = layer(padded, mask, memory=memory, carried=carried)
        torch.testing.assert_close(found[:, left : left + 7], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(cache.state, alone_cache.state, atol=1e-5, rtol=1e-5)


def test_a_memory_without_slots_is_none() -> None:
    """Catches a mean of no slots (0 / 0): that row is KDA's, but for the bias."""
    layer = layer_of("add")
    torch.nn.init.zeros_(layer.memory_fusion.write_bias)
    x, slots, _ = inputs()
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    condition = layer.memory_fusion(slots, nothing)
    torch.testing.assert_close(layer(x, memory=condition)[0], layer(x)[0])


@modes
def test_every_parameter_learns_through_the_past(mode: str) -> None:
    """Catches a parameter without gradient, and a gradient that does not reach the past."""
    layer = layer_of(mode)
    x, slots, carried = inputs()
    carried.state.requires_grad_()
    slots.requires_grad_()
    y, _ = layer(x, memory=layer.memory_fusion(slots), carried=carried)
    y.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert slots.grad is not None and slots.grad.any()
    assert carried.state.grad is not None
    assert carried.state.grad[0].any() and not carried.state.grad[1].any()


def test_no_parameter_is_without_gradient_at_the_first_turn() -> None:
    """Catches a gate outside the graph where nothing is carried yet (an error under DDP)."""
    layer = layer_of("add")
    x, slots, _ = inputs()
    layer(x, memory=layer.memory_fusion(slots))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_the_state_stays_float32_under_autocast() -> None:
    """Catches a carried state that loses its digits from turn to turn."""
    layer = layer_of("add")
    x, slots, carried = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        memory = layer.memory_fusion(slots)
        _, cache = layer(x, memory=memory, carried=carried)
    assert memory.state.dtype == memory.keep.dtype == cache.state.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_fusion": "mean"}, "use 'add' or 'concat'"),
        ({"memory_fusion": "add", "bidirectional": True}, "by 'kda' in one direction"),
        ({"memory_fusion": "add", "mechanism": "deltanet"}, "by 'kda' in one direction"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    """Catches a memory that is silently ignored."""
    fields = {"mechanism": "kda", "dim": 24, "num_heads": 3, "key_dim": 8, "value_dim": 8}
    with pytest.raises(UserError, match=message):
        LinearAttentionSettings(**{**fields, **settings})


def test_memories_and_states_that_do_not_fit_are_refused() -> None:
    """Catches a state of another model that broadcasts, and a memory that nobody reads."""
    x, slots, carried = inputs()
    condition = layer_of("add").memory_fusion(slots)
    with pytest.raises(UserError, match="reads no memory"):
        layer_of(None)(x, memory=condition)
    with pytest.raises(UserError, match=r"carried state \[1, 3, 8, 8\]"):
        layer_of(None)(x, carried=CarriedLayer(carried.state[:1], carried.started[:1]))
    with pytest.raises(UserError, match="both directions"):
        layer_of(None, bidirectional=True)(x, carried=carried)


def test_a_carried_state_is_a_value() -> None:
    """Catches rows that are mixed up when conversations are chosen or reset."""
    state = CarriedState(torch.randn(2, 3, 1, 4, 4), torch.tensor([True, False, True]))
    picked = state.select([2, 0, 2])
    assert torch.equal(picked.states, state.states[:, [2, 0, 2]])
    assert picked.started.tolist() == [True, True, True]
    fresh = state.reset(torch.tensor([False, False, True]))
    assert torch.equal(fresh.states[:, :2], state.states[:, :2]) and not fresh.states[:, 2].any()
    assert fresh.started.tolist() == [True, False, False]
    assert state.states[:, 2].any() and state.started.tolist() == [True, False, True]
    assert torch.equal(state.layer(1).state, state.states[1])


@pytest.mark.parametrize(("value_dim", "kept"), [(4, 12), (8, 24), (16, 24), (12, 24)])
def test_the_copy_path_says_again_what_was_written(value_dim: int, kept: int) -> None:
    """Catches a path that does not begin as the identity, a head without copies (it would never
    learn: zero times zero), and a convolution that mixes neighbours into values."""
    layer = LinearSelfAttention(LinearAttentionSettings("kda", 24, 3, 8, value_dim))
    layer.initialize_copy_path(0.5)
    width = 3 * value_dim
    value = layer.query_key_value.weight[-width:]
    path = layer.output.weight @ value
    expected = torch.zeros(24)
    expected[:kept] = 0.5
    if width > 24:  # Channels are copied once or twice.
        expected *= torch.bincount(torch.arange(width) % 24) * 24 / width
    torch.testing.assert_close(path, torch.diag(expected))
    assert value.abs().sum(1).min() == 1
    assert torch.equal(layer.short_convolution.weight[-width:].sum(1), torch.ones(width))
    assert torch.equal(layer.short_convolution.weight[-width:, -1], torch.ones(width))
