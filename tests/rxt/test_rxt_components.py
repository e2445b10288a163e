"""Encoder, decoder and the network of both: padding, batching and caching never change a result.

Not here: one layer's arithmetic (test_rxt_layers), memory attention's (tests/memory), generation.

Shapes: B batch, T tokens, L layers, S slots, D = 16, V = 30.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rxlm.errors import UserError
from rxlm.rxt.components import RxTDecoder, RxTEncoder
from rxlm.rxt.config import RxTConfig
from rxlm.rxt.decode_values import DecodeCache, MemoryReading
from rxlm.rxt.memory_building import build_memory_attention
from rxlm.rxt.model import RxTNetwork

KINDS = ("mha", "gqa", "mqa", "sqa")
SIZES: dict[str, Any] = {"num_layers": 2, "embed_dim": 16, "att_heads": 4, "stm_size": 3}
COMPONENT: dict[str, Any] = {**SIZES, "vocab_size": 30, "ff_dim": 20, "seq_len": 64}


@st.composite
def component_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Draw fields of a component that can be built."""
    heads = draw(st.sampled_from([1, 2, 4]))
    counts = st.sampled_from([count for count in (1, 2, 4) if count <= heads])
    num_layers = draw(st.integers(1, 3))
    fields = {
        **COMPONENT,
        "num_layers": num_layers,
        "att_heads": heads,
        "att_groups": draw(counts),
        "att_query_groups": draw(counts),
        "self_att_type": draw(st.sampled_from((*KINDS, "hybrid"))),
        "cross_att_type": draw(st.sampled_from(KINDS)),
        "cross_att_groups": draw(st.none() | counts),
        "use_nope": draw(st.booleans()),
        "head_dim": draw(st.sampled_from([None, 2, 6])),
    }
    if fields["self_att_type"] == "hybrid":
        fields["attn_layer_types"] = [draw(st.sampled_from(KINDS)) for _ in range(num_layers)]
    kinds = st.sampled_from(["dense", "moe"])
    for prefix in ("", "final_"):
        if draw(st.booleans()):
            layers = draw(st.lists(kinds, min_size=1, max_size=2))
            fields[f"{prefix}stateless_layers_config"] = layers
            if fields["self_att_type"] == "hybrid":
                types = [draw(st.sampled_from(KINDS)) for _ in layers]
                fields[f"{prefix}stateless_attn_layer_types"] = types
    fields |= {
        "use_moe": draw(st.booleans()),
        "dense_layer_dim": 12,
        "num_experts": 4,
        "moe_top_k": draw(st.integers(1, 4)),
        "num_shared_experts": draw(st.integers(0, 2)),
        "moe_bias_mode": draw(st.sampled_from(["global", "local", "off"])),
        "moe_balance": draw(st.sampled_from(["loss", "bias"])),
        "use_vectorized_moe": draw(st.booleans()),
    }
    for name in (
        "use_gated", "use_rms_norm", "use_head_norm", "tie_embeddings", "use_qk_norm",
        "use_attention_output_bias", "use_gated_attention", "skip_memory_cross_attention",
    ):  # fmt: skip
        fields[name] = draw(st.booleans())
    return fields


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter random values, so that none is neutral; returns the module."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module.eval()


def decoder_of(**fields: Any) -> RxTDecoder:
    torch.manual_seed(0)
    decoder = randomized(RxTDecoder({**COMPONENT, **fields}))
    assert isinstance(decoder, RxTDecoder)
    return decoder


def encoder_of(**fields: Any) -> RxTEncoder:
    torch.manual_seed(0)
    for name in ("final_stateless_layers_config", "final_stateless_attn_layer_types"):
        fields.pop(name, None)
    encoder = randomized(RxTEncoder({**COMPONENT, **fields}))
    assert isinstance(encoder, RxTEncoder)
    return encoder


def network_of(memory: dict[str, Any] | None = None, **fields: Any) -> RxTNetwork:
    torch.manual_seed(0)
    component = {**COMPONENT, **fields}
    parts = {"decoder": component, "encoder": component}
    network = randomized(RxTNetwork({**parts, "memory_attention": {**SIZES, **(memory or {})}}))
    assert isinstance(network, RxTNetwork)
    return network


def padded(rows: list[Tensor], *, left: list[bool], extra: int = 0) -> tuple[Tensor, Tensor]:
    """Return ids and mask of rows padded to a common length, each on the side it names."""
    length = max(len(row) for row in rows) + extra
    ids = torch.full((len(rows), length), 29)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for r, row in enumerate(rows):
        span = slice(length - len(row), length) if left[r] else slice(0, len(row))
        ids[r, span] = row
        mask[r, span] = True
    return ids, mask


@given(fields=component_fields(), data=st.data())
def test_decoding_in_pieces_in_a_padded_batch_equals_each_row_alone(
    fields: dict[str, Any], data: st.DataObject
) -> None:
    """Catches positions, masks or keys that go wrong with a cache, with padding on either side, or
    after a shorter row has ended; for every attention type, gate and norm."""
    decoder = decoder_of(**fields)
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=2, max_size=3))
    rows = [torch.randint(0, 29, (length,)) for length in lengths]
    slots = torch.randn(fields["num_layers"], len(rows), 3, 16)
    memory = decoder.read_memory(slots)
    seen: list[list[Tensor]] = [[] for _ in rows]
    cache, taken = None, [0] * len(rows)
    first = True
    while any(count < length for count, length in zip(taken, lengths, strict=True)):
        size = data.draw(st.integers(1, 4)) if first else data.draw(st.sampled_from([1, 1, 2]))
        pieces = [row[at : at + size] for row, at in zip(rows, taken, strict=True)]
        left = [data.draw(st.booleans()) for _ in rows]
        ids, mask = padded(pieces, left=left, extra=data.draw(st.integers(0, 2)))
        hidden, cache = decoder(ids, mask, memory=memory, cache=cache)
        for r, piece in enumerate(pieces):
            seen[r].append(hidden[r, mask[r]])
            taken[r] += len(piece)
        first = False
    for r, row in enumerate(rows):
        alone, _ = decoder(row[None], memory=decoder.read_memory(slots[:, r : r + 1]))
        together = torch.cat(seen[r])
        torch.testing.assert_close(together, alone[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            decoder.logits(together), decoder.logits(alone[0]), atol=1e-5, rtol=1e-5
        )
    assert cache is not None and cache.lengths.tolist() == lengths
    assert torch.equal(cache.key_mask.sum(dim=1), torch.tensor(lengths))


@given(fields=component_fields(), data=st.data())
def test_encoding_a_padded_batch_equals_each_row_alone(
    fields: dict[str, Any], data: st.DataObject
) -> None:
    """Catches padding that is read or counted by any layer, and layers returned in another order
    or missing."""
    encoder = encoder_of(**fields)
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=2, max_size=3))
    rows = [torch.randint(0, 29, (length,)) for length in lengths]
    left = [data.draw(st.booleans()) for _ in rows]
    ids, mask = padded(rows, left=left, extra=data.draw(st.integers(0, 2)))
    states = encoder(ids, mask)
    assert states.shape == (fields["num_layers"], *ids.shape, 16)
    assert torch.isfinite(states).all()
    for r, row in enumerate(rows):
        torch.testing.assert_close(
            states[:, r, mask[r]], encoder(row[None])[:, 0], atol=1e-5, rtol=1e-5
        )
    x = encoder.embedding(rows[0])[None] * 4.0
    phases = encoder._phases(torch.arange(lengths[0]))
    initial = len(fields.get("stateless_layers_config") or ())
    assert len(encoder.all_layers) == initial + fields["num_layers"]
    for index, layer in enumerate(encoder.all_layers, -initial):
        x, _ = layer(x, mask=None, phases=phases)
        if index >= 0:
            torch.testing.assert_close(x[0], states[index, 0, mask[0]], atol=1e-5, rtol=1e-5)


def influence(module: nn.Module, run: Any) -> Tensor:
    """Return ``[B, T out, B, T in]``: how much each output depends on each input token."""
    captured: list[Tensor] = []

    def capture(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        captured.append(output.detach().requires_grad_())
        return captured[-1]

    hook = module.embedding.register_forward_hook(capture)  # type: ignore[union-attr]
    outputs = run()
    hook.remove()
    weight = torch.randn(outputs.shape[-1])
    scores = outputs @ weight
    gradients = [
        torch.autograd.grad(score, captured[0], retain_graph=True)[0].abs().sum(dim=-1)
        for score in scores.flatten()
    ]
    return torch.stack(gradients).unflatten(0, tuple(scores.shape))


@pytest.mark.parametrize("kind", KINDS)
def test_decoder_is_causal(kind: str) -> None:
    """Catches a token that sees the future (training would look perfect and answers be noise), a
    past that is cut off, a padded token that is read, and rows that see each other."""
    decoder = decoder_of(self_att_type=kind)
    ids = torch.randint(0, 29, (2, 5))
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, :2] = False
    memory = decoder.read_memory(torch.randn(2, 2, 3, 16))
    reached = influence(decoder, lambda: decoder(ids, mask, memory=memory)[0]) > 0
    expected = torch.zeros(2, 5, 2, 5, dtype=torch.bool)
    for r in range(2):
        expected[r, :, r] = torch.ones(5, 5, dtype=torch.bool).tril() & mask[r]
    real = mask[:, :, None, None]
    assert torch.equal(reached & real, expected & real)


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_sees_the_whole_turn(kind: str) -> None:
    """Catches a causal encoder, padding that is read, and rows that see each other."""
    encoder = encoder_of(self_att_type=kind, num_layers=1)
    ids = torch.randint(0, 29, (2, 4))
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 3] = False
    reached = influence(encoder, lambda: encoder(ids, mask)[-1]) > 0
    expected = torch.zeros(2, 4, 2, 4, dtype=torch.bool)
    for r in range(2):
        expected[r, :, r] = mask[r]
    real = mask[:, :, None, None]
    assert torch.equal(reached & real, expected & real)


def test_every_visible_slot_of_every_layer_is_read() -> None:
    """Catches a memory mask on the wrong axis, one layer's slots read by all, and a memory that
    is projected but not read."""
    decoder = decoder_of(num_layers=3)
    ids = torch.randint(0, 29, (2, 4))
    slots = torch.randn(3, 2, 5, 16, requires_grad=True)
    slot_mask = torch.tensor([[True, False, True, True, False], [True, True, True, False, True]])
    hidden, _ = decoder(ids, memory=decoder.read_memory(slots, slot_mask))
    (hidden @ torch.randn(16)).sum().backward()
    assert slots.grad is not None
    read = slots.grad.abs().sum(dim=-1) > 0
    assert torch.equal(read, slot_mask.expand(3, 2, 5))
    alone, _ = decoder(ids[:1], memory=decoder.read_memory(slots[:, :1, [0, 2, 3]]))
    torch.testing.assert_close(hidden[:1], alone, atol=1e-5, rtol=1e-5)


def test_stateless_layers_stand_where_they_should() -> None:
    """Catches a stateless layer that reads memory, one in the wrong place, and slots that a
    memory layer reads of another layer because of those before it."""
    decoder = decoder_of(
        stateless_layers_config=["dense", "moe"],
        final_stateless_layers_config=["moe"],
        dense_layer_dim=12,
        num_experts=3,
    )
    ids, slots = torch.randint(0, 29, (2, 4)), torch.randn(2, 2, 3, 16)
    names = [name for name, _ in decoder.named_parameters() if "cross_attention" in name]
    assert names and all(name.startswith("layers.") for name in names)
    reading = decoder.read_memory(slots)
    hidden, cache = decoder(ids, memory=reading)
    assert len(cache.layers) == 5
    x = decoder.embed(ids)
    phases = decoder._phases(torch.arange(4))
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    for layer in decoder.initial_layers:
        x, _ = layer(x, mask=mask, phases=phases)
    for layer, memory in zip(decoder.layers, reading.layers, strict=True):
        x, _ = layer(x, mask=mask, phases=phases, memory=memory)
    for layer in decoder.final_layers:
        x, _ = layer(x, mask=mask, phases=phases)
    torch.testing.assert_close(hidden, decoder.head_norm(x), atol=1e-5, rtol=1e-5)


def test_a_cache_is_a_value() -> None:
    """Catches a cache that a step changes: two continuations of one beginning must not meet."""
    decoder = decoder_of()
    start = torch.randint(0, 29, (2, 4))
    _, cache = decoder(start)
    copies = [part.clone() for layer in cache.layers for part in layer]
    one, two = torch.randint(0, 14, (2, 1)), torch.randint(15, 29, (2, 1))
    first, grown = decoder(one, cache=cache)
    decoder(two, cache=cache)
    again, _ = decoder(one, cache=cache)
    assert torch.equal(first, again)
    kept = [part for layer in cache.layers for part in layer]
    assert all(torch.equal(a, b) for a, b in zip(copies, kept, strict=True))
    assert isinstance(grown, DecodeCache) and grown.lengths.tolist() == [5, 5]
    assert cache.lengths.tolist() == [4, 4]


def test_decoder_without_memory() -> None:
    """Catches a decoder that needs a memory to run, and one built without cross-attention that
    reads one or cannot be handed one."""
    ids = torch.randint(0, 29, (2, 4))
    slots = torch.randn(2, 2, 3, 16)
    decoder = decoder_of()
    without, _ = decoder(ids)
    reading, _ = decoder(ids, memory=decoder.read_memory(slots))
    assert (without - reading).abs().max() > 1e-3
    skipping = decoder_of(skip_memory_cross_attention=True)
    assert not any("cross" in name for name, _ in skipping.named_parameters())
    assert skipping.read_memory(slots) == MemoryReading(())
    handed, _ = skipping(ids, memory=skipping.read_memory(slots))
    assert torch.equal(handed, skipping(ids)[0])


@pytest.mark.parametrize("tied", [True, False])
def test_output_layer(tied: bool) -> None:
    """Catches a tied head with weights of its own, and an untied one without."""
    decoder = decoder_of(tie_embeddings=tied)
    hidden = torch.randn(2, 3, 16)
    weight = decoder.embedding.weight if tied else decoder.head_weight
    assert weight.shape == (30, 16)
    expected = hidden @ weight.T + decoder.head_bias
    torch.testing.assert_close(decoder.logits(hidden), expected, atol=1e-5, rtol=1e-5)
    assert hasattr(decoder, "head_weight") != tied
    decoder.logits(hidden).sum().backward()
    assert (decoder.embedding.weight.grad is not None) == tied


@pytest.mark.parametrize(
    ("use_head_norm", "head_norm_type"), [(False, "rms_norm"), (True, "rms_norm"),
                                          (True, "layer_norm")]
)  # fmt: skip
def test_head_norm(use_head_norm: bool, head_norm_type: str) -> None:
    """Catches a head norm of the other type, or applied although switched off."""
    fields = {"use_head_norm": use_head_norm, "head_norm_type": head_norm_type}
    torch.manual_seed(0)
    decoder = RxTDecoder({**COMPONENT, **fields}).eval()
    hidden, _ = decoder(torch.randint(0, 29, (2, 4)))
    size, mean = hidden.square().mean(dim=-1), hidden.mean(dim=-1).abs().max()
    assert torch.allclose(size, torch.ones(2, 4), atol=1e-3) == use_head_norm
    assert (mean < 1e-5) == (use_head_norm and head_norm_type == "layer_norm")


@pytest.mark.parametrize("tied", [True, False])
def test_one_embedding_for_both(tied: bool) -> None:
    """Catches two copies of the token embedding, after construction, training steps, conversion,
    and a repeated ``share_components``."""
    network = network_of(tie_embeddings=tied)
    network.share_components()
    for _ in range(2):
        assert network.decoder.embedding.weight is network.encoder.embedding.weight
        network.to(torch.float64)
    count = sum(parameter.shape == (30, 16) for parameter in network.parameters())
    assert count == (1 if tied else 2)
    ids = torch.randint(0, 29, (2, 4))
    network.encoder(ids).sum().backward()
    assert network.decoder.embedding.weight.grad is not None


def test_parameter_counts() -> None:
    """Catches a part that is built twice, too wide, with a stray bias, or not at all."""
    layers, vocab, dim, ff, heads, slots, width = 3, 30, 16, 20, 4, 5, 4
    component = {
        "num_layers": layers, "vocab_size": vocab, "embed_dim": dim, "ff_dim": ff,
        "att_heads": heads, "stm_size": slots, "self_att_type": "gqa", "att_groups": 2,
        "cross_att_type": "sqa", "cross_att_query_groups": 2, "cross_att_groups": 1,
        "use_gated_attention": True, "use_qk_norm": True, "use_head_norm": True,
    }  # fmt: skip
    memory = {
        "num_layers": layers, "embed_dim": dim, "att_heads": heads, "stm_size": slots,
        "variant": "interlayer", "att_type": "mqa", "interlayer_att_type": "mha",
    }  # fmt: skip
    network = RxTNetwork({"decoder": component, "encoder": component, "memory_attention": memory})

    def attention(query_heads: int, key_heads: int) -> int:
        inputs = dim * width * (query_heads + 2 * key_heads)
        mixed = max(query_heads, key_heads) * width
        output = mixed * dim + dim
        gate = dim * mixed + mixed
        norms = 2 * width
        return inputs + output + gate + norms

    feed_forward = 3 * dim * ff
    encoder_layer = attention(4, 2) + feed_forward + 2 * dim
    decoder_layer = attention(4, 2) + attention(2, 1) + feed_forward + 4 * dim
    head = vocab * dim + vocab + 2 * dim
    mixing = 4 * dim * dim + dim + (2 * dim + slots)
    writing = dim * width * (4 + 1 + 1) + 4 * width * dim + dim + (2 * dim + slots)
    start_and_identity = 2 * slots * dim

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(network.encoder) == vocab * dim + layers * encoder_layer
    assert count(network.decoder) == vocab * dim + layers * decoder_layer + head
    assert count(network.memory_attention) == layers * (mixing + writing + start_and_identity)
    parts = (network.encoder, network.decoder, network.memory_attention)
    assert count(network) == sum(map(count, parts)) - vocab * dim


@pytest.mark.parametrize(
    ("build", "fields", "named"),
    [
        (RxTDecoder, {"self_att_type": "dma"}, "'mha'|'gqa'|'mqa'|'sqa'|'local'"),
        (RxTEncoder, {"self_att_type": "hybrid", "attn_layer_types": ["gma", "mha"]},
         "'mha'|'gqa'|'mqa'|'sqa'|'local'|'gla'"),
        (RxTEncoder, {"final_stateless_layers_config": ["dense"]},
         "encoder.final_stateless_layers_config=None"),
        (RxTEncoder, {"legacy_stm_in_encoder": True}, "legacy_stm_in_encoder=False"),
        (RxTDecoder, {"att_dropuot": 0.1}, "did you mean 'att_dropout'"),
        (build_memory_attention, {"att_type": "gma"}, "'mha'|'gqa'|'mqa'|'sqa'"),
        (build_memory_attention, {"variant": "self", "self_att_type": "dma"},
         "'mha'|'gqa'|'mqa'|'sqa'"),
    ],
)  # fmt: skip
def test_what_is_not_built_is_refused_with_the_remedy(
    build: Any, fields: dict[str, Any], named: str
) -> None:
    """Catches a configured part that is silently replaced by another."""
    sizes = SIZES if build is build_memory_attention else COMPONENT
    with pytest.raises(UserError) as caught:
        build({**sizes, **fields})
    assert named in str(caught.value)


def test_memory_settings_arrive() -> None:
    """Catches a field of the memory configuration that no part of the module reads."""
    memory = build_memory_attention(
        {
            **SIZES, "variant": "self", "att_type": "mqa", "self_att_type": "gqa",
            "self_att_groups": 2, "att_dropout": 0.1, "self_att_dropout": 0.2, "norm_eps": 1e-3,
            "norm_type": "adaptive", "norm_init_gate": -1.0, "norm_per_dim_scale": True,
            "norm_decay": 0.5, "use_tanh_residual_gate": True, "residual_gate_type": "elementwise",
            "residual_gate_init": -0.5, "residual_per_slot_gate": False, "init_type": "uniform",
            "residual_gate_stretch": 0.05,
            "use_gate_for_self_attention": False, "use_slot_identity": False, "rope_base": 50.0,
            "write_sharpness": 2.0, "copy_path_init": False, "write_competition": True,
        }
    ).settings  # fmt: skip
    assert (memory.write_heads.num_heads, memory.write_heads.num_key_value_heads) == (4, 1)
    assert (memory.mix_heads.num_heads, memory.mix_heads.num_key_value_heads) == (4, 2)
    assert (memory.write_heads.dropout, memory.mix_heads.dropout) == (0.1, 0.2)
    assert (memory.gate.enabled, memory.mix_gate.enabled) == (True, False)
    assert (memory.gate.gate_type, memory.gate.per_slot) == ("elementwise", False)
    assert (memory.gate.tanh, memory.gate.init, memory.gate.residual) == (True, -0.5, True)
    assert (memory.gate.stretch, memory.mix_gate.stretch) == (0.05, 0.05)
    assert (memory.norm_type, memory.norm_init_gate, memory.eps) == ("adaptive", -1.0, 1e-3)
    assert (memory.norm_per_dim_scale, memory.norm_decay) == (True, 0.5)
    assert (memory.init_type, memory.slot_identity, memory.copy_path_init) == (
        "uniform", False, False,
    )  # fmt: skip
    assert (memory.rope_base, memory.write_sharpness, memory.num_slots) == (50.0, 2.0, 3)
    assert memory.write_competition
    replaced = build_memory_attention({**SIZES, "variant": "simple", "disable_residual": True})
    assert not replaced.settings.gate.residual
    grouped = build_memory_attention(
        {**SIZES, "variant": "grouped-self-interlayer", "num_groups": 2, "init_std": 0.3}
    )
    assert (grouped.settings.num_groups, grouped.settings.init_std) == (2, 0.3)


@given(data=st.data(), variant=st.sampled_from(["simple", "interlayer", "self"]))
def test_a_batch_of_conversations_equals_each_alone(data: st.DataObject, variant: str) -> None:
    """Catches anything that leaks between conversations or comes from padding, through two turns
    of writing and the answer after them; the memory handed in is left as it was."""
    network = network_of({"variant": variant})
    turns = [
        [torch.randint(0, 29, (data.draw(st.integers(0 if turn == 1 else 1, 5)),)) for _ in "abc"]
        for turn in range(3)
    ]

    def converse(rows: list[int], extra: int) -> Tensor:
        slots = network.initial_memory(len(rows))
        before = slots.clone()
        first = slots
        for turn in turns[:2]:
            left = [data.draw(st.booleans()) for _ in rows]
            ids, mask = padded([turn[row] for row in rows], left=left, extra=extra)
            slots = network.write_memory(slots, ids, mask)
        assert torch.equal(first, before)
        ids, mask = padded([turns[2][row] for row in rows], left=[True] * len(rows), extra=extra)
        hidden, _ = network.decoder(ids, mask, memory=network.decoder.read_memory(slots))
        return network.decoder.logits(hidden[:, -1])

    together = converse([0, 1, 2], 1)
    for row in range(3):
        torch.testing.assert_close(together[row], converse([row], 2)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init_type", ["learned", "standard"])
def test_initial_memory_of_a_network(init_type: str) -> None:
    """Catches a start whose shape, type or seed is not the network's."""
    network = network_of({"init_type": init_type}).to(torch.float64)
    slots = network.initial_memory(2, seed=4)
    assert slots.shape == (2, 2, 3, 16) and slots.dtype == torch.float64
    assert torch.equal(slots, network.memory_attention.initial(2, seed=4, dtype=torch.float64))
    assert RxTConfig.parse(network.config) == network.config


def test_training_step_in_bf16_autocast() -> None:
    """Catches an operation that refuses mixed types, and a parameter without a finite gradient,
    when a whole turn cycle is trained at reduced precision."""
    network = network_of({"variant": "self-interlayer", "norm_type": "adaptive"}).train()
    ids = torch.randint(0, 29, (3, 6))
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0, 3:] = False
    with torch.autocast("cpu", dtype=torch.bfloat16):
        slots = network.write_memory(network.initial_memory(3), ids, mask)
        hidden, _ = network.decoder(ids, mask, memory=network.decoder.read_memory(slots))
        loss = network.decoder.logits(hidden).float().logsumexp(dim=-1).mean()
    assert slots.dtype == torch.float32
    loss.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
