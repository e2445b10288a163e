"""Counted costs against models that were built, caches that were filled, products made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rxlm.rxt.accounting import (
    decode_state_bytes,
    decoder_token_operations,
    encoder_token_operations,
    model_costs,
    part_of,
    read_operations,
    write_operations,
)
from rxlm.rxt.attention_heads import LINEAR_KINDS
from rxlm.rxt.components import RxTDecoder, RxTEncoder
from rxlm.rxt.decode_values import DecodeCache
from rxlm.rxt.memory_building import build_memory_attention
from rxlm.rxt.model import RxTNetwork

SIZES: dict[str, Any] = {"num_layers": 2, "embed_dim": 32, "att_heads": 4, "stm_size": 6}
COMPONENT: dict[str, Any] = {
    **SIZES, "vocab_size": 50, "ff_dim": 24, "seq_len": 40, "cross_att_type": "gqa",
    "att_groups": 2, "use_head_norm": True, "use_gated_attention": True,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "use_moe": True, "num_experts": 4, "moe_top_k": 2, "num_shared_experts": 2,
    "shared_expert_dim": 12, "stateless_layers_config": ["dense"], "dense_layer_dim": 20,
    "moe_use_weighted_shared_experts": True, "moe_shared_experts_bias_mode": "off",
}  # fmt: skip
FINAL: dict[str, Any] = {"final_stateless_layers_config": ["moe"]}
KINDS = ("mha", "gqa", "mqa", "sqa", "local", *LINEAR_KINDS)


def fields_of(kind: str) -> dict[str, Any]:
    if kind in LINEAR_KINDS:
        return {
            "use_linear_self_attn": True,
            "linear_attn_type": kind,
            "linear_attn_use_short_conv": kind != "gla",
        }
    return {"self_att_type": kind, "local_window_size": 8}


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in tensors(part)]


def counted(run: Any) -> dict[str, int]:
    """Return the operations that PyTorch counts while ``run`` runs, by kind of product."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    return {str(operation).split(".")[1]: value for operation, value in counts.items()}


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_decode_state_is_that_of_a_filled_cache(kind: str, moe: bool) -> None:
    """Catches a layer whose state is not counted, of the wrong width, type or length."""
    decoder = RxTDecoder({**COMPONENT, **fields_of(kind), **(EXPERTS | FINAL if moe else {})})
    for length in (3, 40):
        _, cache = decoder(torch.zeros(1, length, dtype=torch.long))
        assert isinstance(cache, DecodeCache)
        size = sum(item.numel() * item.element_size() for item in tensors(cache))
        assert decode_state_bytes(decoder, length) == size


@pytest.mark.parametrize("mode", ["add", "concat"])
@pytest.mark.parametrize("kind", KINDS)
def test_operations_of_a_token_are_those_that_are_made(kind: str, mode: str) -> None:
    """Catches a matrix that is left out, counted twice or for each token although it is used once
    a turn, idle experts that count, and attention to the wrong number of keys."""
    fields = {**COMPONENT, **fields_of(kind), **EXPERTS, **FINAL, "memory_fusion_mode": mode}
    decoder = RxTDecoder(fields).eval().requires_grad_(False)
    memory = decoder.read_memory(torch.randn(2, 1, 6, 32))
    ids = torch.zeros(1, 40, dtype=torch.long)
    with torch.no_grad():
        _, cache = decoder(ids[:, :39], memory=memory)
    counts = counted(lambda: decoder.logits(decoder(ids[:, 39:], memory=memory, cache=cache)[0]))
    total = decoder_token_operations(decoder, 40)
    if kind in LINEAR_KINDS:
        # PyTorch does not count the convolution and the outer products, which are no matmuls.
        layers = decoder.all_layers
        state = sum(
            layer.self_attention.settings.value_heads
            * layer.self_attention.settings.key_dim
            * layer.self_attention.settings.value_dim
            for layer in layers
        )
        convolution = sum(
            2 * layer.self_attention.short_convolution.weight.numel()
            for layer in layers
            if kind != "gla"
        )
        total -= 2 * state + convolution
    assert total == sum(counts.values())


@pytest.mark.parametrize("kind", ["mha", "sqa"])
def test_operations_of_a_turn_are_those_that_are_made(kind: str) -> None:
    """Catches a step that is not counted, or by tokens where it goes by slots."""
    fields = {**COMPONENT, **fields_of(kind), **EXPERTS}
    encoder = RxTEncoder(fields).eval().requires_grad_(False)
    ids = torch.zeros(1, 12, dtype=torch.long)
    made = counted(lambda: encoder(ids))
    assert 12 * encoder_token_operations(encoder, 12) == sum(made.values())
    decoder = RxTDecoder(fields).eval().requires_grad_(False)
    slots = torch.randn(2, 1, 6, 32)
    assert read_operations(decoder) == sum(counted(lambda: decoder.read_memory(slots)).values())
    for variant in ("simple", "interlayer", "self", "self-interlayer"):
        memory = build_memory_attention({**SIZES, "variant": variant, "att_type": kind})
        memory.requires_grad_(False)
        made = counted(lambda memory=memory: memory(slots, torch.randn(2, 1, 12, 32)))
        assert write_operations(memory, 12) == sum(made.values())


def test_parameters_of_the_meta_model_are_those_of_the_built_one() -> None:
    """Catches a part without a name, parameters counted twice or not at all, and counts that
    differ where there is no storage."""
    config = {
        "decoder": {**COMPONENT, **EXPERTS, **FINAL},
        "encoder": COMPONENT,
        "memory_attention": {**SIZES, "variant": "self-interlayer", "norm_type": "rms"},
    }
    built = RxTNetwork(config)
    with torch.device("meta"):
        weightless = RxTNetwork(config)
    costs = model_costs(weightless)
    assert costs == model_costs(built)
    assert costs.num_parameters == sum(item.numel() for item in built.parameters())
    assert costs.weight_bytes == 4 * costs.num_parameters
    assert costs.memory_bytes == built.initial_memory(1).numel() * 4
    assert costs.carried_bytes == 0
    names = {
        part_of(name)
        for component in (built.decoder, built.encoder, built.memory_attention)
        for name, _ in component.named_parameters()
    }
    assert "other" not in names
    assert costs.parameters["decoder"]["token embedding"] == 50 * 32
    assert "token embedding" not in costs.parameters["encoder"]


def test_active_parameters_are_those_that_a_token_uses() -> None:
    """Catches idle experts that count, shared ones that do not, and biases of one for all that
    are divided."""
    for bias in ("global", "local", "off"):
        experts = {**EXPERTS, "moe_bias_mode": bias, "moe_shared_experts_bias_mode": bias}
        decoder = {**COMPONENT, **experts, **FINAL}
        config = {"decoder": decoder, "encoder": COMPONENT, "memory_attention": SIZES}
        network = RxTNetwork(config)
        ids = torch.tensor([[7]])
        hidden, _ = network.decoder(
            ids, memory=network.decoder.read_memory(torch.randn(2, 1, 6, 32))
        )
        network.decoder.logits(hidden).square().sum().backward()
        used = 0
        for name, parameter in network.decoder.named_parameters():
            if ".experts." in f".{name}" and len(parameter) > 1:
                assert parameter.grad is not None
                used += int((parameter.grad.flatten(1).abs().sum(1) > 0).sum()) * (
                    parameter.numel() // len(parameter)
                )
            else:
                used += parameter.numel()
        assert model_costs(network).active["decoder"] == used


def test_carried_state_counts() -> None:
    """Catches a state between turns that nobody accounts for."""
    fields = {**COMPONENT, **fields_of("md_gdn")}
    network = RxTNetwork({"decoder": fields, "encoder": fields, "memory_attention": SIZES})
    carried = network.decoder.nothing_carried(1)
    assert carried is not None
    size = sum(item.numel() * item.element_size() for item in carried)
    assert model_costs(network).carried_bytes == size


def test_unknown_parameters_are_not_hidden() -> None:
    """Catches a new module whose parameters are counted under a wrong name."""
    assert part_of("something_new.weight") == "other"
