"""One layer against its equations written out, and how it starts.

Not here: stacks of layers, caches, padding (test_rxt_components).

Shapes: B batch, T = 5 tokens, S = 3 slots, D = 24, K head dimension.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rxlm.nn.attention import Attention
from rxlm.ops.attention import visible_keys
from rxlm.ops.rotary import apply_rotary, rotary_phases
from rxlm.rxt.config import RxTComponentConfig
from rxlm.rxt.layers import ReactiveLayer

PHASES = rotary_phases(torch.arange(5), 6)
CAUSAL = visible_keys(None, 5, 5, causal=True, device=torch.device("cpu"))


def config_of(**fields: Any) -> RxTComponentConfig:
    """Return a configuration of width 24 with four heads of width 6."""
    sizes = {"num_layers": 3, "vocab_size": 11, "embed_dim": 24, "att_heads": 4, "ff_dim": 20}
    return RxTComponentConfig(
        **{**sizes, "self_att_type": "mha", "cross_att_type": "mha", **fields}
    )


def layer_of(
    config: RxTComponentConfig, *, reads_memory: bool = True, randomized: bool = True
) -> ReactiveLayer:
    """Return the first layer, by default with every parameter random."""
    torch.manual_seed(0)
    layer = ReactiveLayer(config, 0, reads_memory=reads_memory)
    if randomized:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.4)
    return layer


def norm_written_out(norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(dim=-1, keepdim=True)
    normed = x / (x.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    return normed + norm.bias if isinstance(norm, nn.LayerNorm) else normed


def attention_written_out(
    attention: Attention, x: Tensor, source: Tensor, *, rotate: str, causal: bool
) -> Tensor:
    """Attend with explicitly repeated heads; ``rotate`` names the sides with positions."""
    settings = attention.settings
    count = max(settings.num_heads, settings.num_key_value_heads)

    def split(projection: nn.Linear, tensor: Tensor) -> Tensor:
        return projection(tensor).unflatten(-1, (-1, settings.head_dim))

    query, key, value = (
        split(attention.query, x), split(attention.key, source), split(attention.value, source)
    )  # fmt: skip
    if settings.query_key_norm:
        query = norm_written_out(attention.query_norm, query)
        key = norm_written_out(attention.key_norm, key)
    query = apply_rotary(query, PHASES) if "q" in rotate else query
    key = apply_rotary(key, PHASES) if "k" in rotate else key
    query, key, value = (
        part.repeat_interleave(count // part.shape[2], dim=2).transpose(1, 2)
        for part in (query, key, value)
    )
    heads = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    mixed = heads.transpose(1, 2).flatten(-2)
    if settings.gated:
        gate = attention.gate(x)
        act = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "silu": F.silu}
        mixed = mixed * act[settings.gate_activation](gate)
    return attention.output(mixed)


def layer_written_out(layer: ReactiveLayer, x: Tensor, slots: Tensor | None, rope: bool) -> Tensor:
    """Return h1, h2, y of the module's docstring, written out."""
    normed = norm_written_out(layer.norm_self, x)
    x = x + attention_written_out(
        layer.self_attention, normed, normed, rotate="qk" if rope else "", causal=True
    )
    if slots is not None:
        x = x + attention_written_out(
            layer.cross_attention,
            norm_written_out(layer.norm_cross, x),
            norm_written_out(layer.norm_slots, slots),
            rotate="q" if rope else "",
            causal=False,
        )
    return x + layer.feed_forward(norm_written_out(layer.norm_feed_forward, x))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"self_att_type": "gqa", "att_groups": 2, "cross_att_type": "mqa"},
        {"self_att_type": "sqa", "att_query_groups": 2, "att_groups": 1, "cross_att_type": "sqa"},
        {"self_att_type": "sqa", "att_query_groups": 1, "att_groups": 2, "cross_att_groups": 4,
         "cross_att_type": "gqa"},
        {"use_nope": True},
        {"use_gated_attention": True},
        {"use_gated_attention": True, "use_gated_cross_attention": False},
        {"use_gated_cross_attention": True, "gated_attention_activation": "silu"},
        {"use_qk_norm": True, "use_rms_norm": False},
        {"use_attention_output_bias": False, "use_gated": False, "ff_activation": "gelu"},
        {"head_dim": 6, "att_heads": 2, "norm_eps": 0.1},
    ],
)  # fmt: skip
def test_equals_the_equations(fields: dict[str, Any]) -> None:
    """Catches another order of the blocks, a norm on the wrong input, positions on slots, and a
    configured head count, gate, bias or epsilon that does not reach the layer."""
    config = config_of(**fields)
    layer = layer_of(config)
    x, slots = torch.randn(2, 5, 24), torch.randn(2, 3, 24)
    phases = None if config.use_nope else PHASES
    actual, _ = layer(x, mask=CAUSAL, phases=phases, memory=layer.read_slots(slots))
    expected = layer_written_out(layer, x, slots, rope=not config.use_nope)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert layer.self_attention.settings.gated == config.use_gated_attention
    assert layer.cross_attention.settings.gated == config.cross_attention_is_gated
    for attention in (layer.self_attention, layer.cross_attention):
        assert (attention.output.bias is not None) == config.use_attention_output_bias
        assert attention.settings.norm_eps == config.norm_eps


def test_memory_is_optional() -> None:
    """Catches a layer that cannot decode without memory, or that reads one it was built without."""
    x = torch.randn(2, 5, 24)
    layer = layer_of(config_of())
    without, _ = layer(x, mask=CAUSAL, phases=PHASES)
    expected = layer_written_out(layer, x, None, rope=True)
    torch.testing.assert_close(without, expected, atol=1e-4, rtol=1e-4)
    stateless = layer_of(config_of(), reads_memory=False)
    assert not any("cross" in name or "slots" in name for name, _ in stateless.named_parameters())
    output, _ = stateless(x, mask=CAUSAL, phases=PHASES, memory=layer.read_slots(x))
    expected = layer_written_out(stateless, x, None, rope=True)
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


def test_slots_have_no_order_and_no_size() -> None:
    """Catches slots that are read with positions, or without their norm."""
    layer = layer_of(config_of())
    x, slots = torch.randn(2, 5, 24), torch.randn(2, 3, 24)
    outputs = [
        layer(x, mask=CAUSAL, phases=PHASES, memory=layer.read_slots(read))[0]
        for read in (slots, slots[:, [2, 0, 1]], 50.0 * slots)
    ]
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs[2], outputs[0], atol=1e-4, rtol=1e-4)


def test_hidden_slots_are_not_read() -> None:
    """Catches a memory mask that is dropped, or that hides what it should show."""
    layer = layer_of(config_of())
    x, slots = torch.randn(2, 5, 24), torch.randn(2, 3, 24)
    mask = torch.tensor([[True, False, True], [True, False, True]])[:, None, None]
    masked, _ = layer(
        x, mask=CAUSAL, phases=PHASES, memory=layer.read_slots(slots), memory_mask=mask
    )
    fewer, _ = layer(x, mask=CAUSAL, phases=PHASES, memory=layer.read_slots(slots[:, [0, 2]]))
    torch.testing.assert_close(masked, fewer, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "silu"])
def test_attention_gates_start_half_open(activation: str) -> None:
    """Catches a gate that starts closed (the branch and all before it would get no gradient) or
    that depends on its input before it has learned to."""
    config = config_of(use_gated_attention=True, gated_attention_activation=activation)
    layer = layer_of(config, randomized=False)
    apply = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "silu": torch.nn.functional.silu}
    for attention in (layer.self_attention, layer.cross_attention):
        gate = apply[activation](attention.gate(torch.randn(4, 24) * 5))
        torch.testing.assert_close(gate, torch.full((4, 24), 0.5), atol=1e-6, rtol=0)


def test_memory_starts_as_a_copy_path() -> None:
    """Catches a cold start: with one slot, the read adds the normalised slot itself (scaled for
    depth) to the hidden state; switched off, it adds something else."""
    x, slots = torch.randn(2, 5, 24), torch.randn(2, 1, 24)
    added = {}
    for copies in (True, False):
        layer = layer_of(config_of(copy_path_init=copies), randomized=False)
        memory = layer.read_slots(slots)
        added[copies] = layer.cross_attention(layer.norm_cross(x), memory, None, PHASES)
    expected = layer.norm_slots(slots).expand_as(x) * (2 * 3) ** -0.5
    torch.testing.assert_close(added[True], expected, atol=1e-5, rtol=1e-5)
    assert (added[False] - expected).abs().max() > 0.1


def test_deep_stacks_keep_their_scale() -> None:
    """Catches residual branches that are not scaled for depth: the sum over 2 L of them must stay
    of unit size, for any L."""
    for num_layers in (2, 24):
        config = config_of(num_layers=num_layers, copy_path_init=False)
        torch.manual_seed(0)
        x = torch.randn(4, 5, 24)
        for index in range(num_layers):
            layer = ReactiveLayer(config, index, reads_memory=True)
            slots = layer.read_slots(torch.randn(4, 3, 24))
            x, _ = layer(x, mask=CAUSAL, phases=PHASES, memory=slots)
        assert 1.0 < x.square().mean().sqrt().item() < 1.6
