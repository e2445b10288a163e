"""Memory attention against the paper's equations, written out one layer, row and head at a time.

The oracle shares no code with the package: no stacked product, no fused kernel, no masks (padded
tokens are cut out), rotations as 2 x 2 matrices, everything in float64.

Shapes: L layers, B batch, S slots, T tokens, D width, H query heads, G key/value heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rxlm.memory.attention import MemoryAttention, StackedAttention
from rxlm.memory.gates import GateSettings, ResidualGate
from rxlm.memory.norms import MemoryNorm

EPS = 1e-6


def rotated(head: Tensor, base: float) -> Tensor:
    """Rotate the channel pairs of ``[T, K]`` by position times frequency."""
    rows = []
    for position, vector in enumerate(head):
        pairs = []
        for j in range(0, len(vector), 2):
            angle = position * base ** (-j / len(vector))
            cos, sin = math.cos(angle), math.sin(angle)
            pairs += [vector[j] * cos - vector[j + 1] * sin, vector[j] * sin + vector[j + 1] * cos]
        rows.append(torch.stack(pairs))
    return torch.stack(rows)


def attended(
    attention: StackedAttention, layer: int, x: Tensor, source: Tensor, rope_base: float | None
) -> Tensor:
    """One row and layer: ``x`` ``[S, D]`` reads ``source`` ``[T, D]``."""
    heads = attention.heads
    query, key, value = (
        source_of @ weight[layer].double()
        for source_of, weight in (
            (x, attention.query), (source, attention.key), (source, attention.value)
        )
    )  # fmt: skip
    outputs = []
    width = heads.head_dim
    count = max(heads.num_heads, heads.num_key_value_heads)
    for head in range(count):
        q_at = head * heads.num_heads // count * width
        k_at = head * heads.num_key_value_heads // count * width
        k = key[:, k_at : k_at + width]
        if rope_base is not None:
            k = rotated(k, rope_base)
        scores = (query[:, q_at : q_at + width] @ k.T) / width**0.5
        weights = torch.softmax(scores, dim=-1)
        if attention.competition:
            shares = [column.exp() / column.exp().sum() for column in scores.T]
            weights = torch.stack([row / row.sum() for row in torch.stack(shares, dim=1)])
        outputs.append(weights @ value[:, k_at : k_at + width])
    return torch.cat(outputs, dim=-1) @ attention.output[layer].double()


def normalized(norm: MemoryNorm, layer: int, slots: Tensor) -> Tensor:
    """One row and layer of a memory norm, ``[S, D]``."""
    squares = [(slot**2).mean() for slot in slots]
    rows = []
    for s, slot in enumerate(slots):
        centred, square = slot, squares[s]
        if norm.norm_type == "layer":
            centred = slot - slot.mean()
            square = (centred**2).mean()
        if norm.norm_type == "adaptive":
            square = norm.decay * sum(squares) / len(squares) + (1 - norm.decay) * square
        at = s if norm.norm_type == "positional" else 0
        row = centred / (square + EPS) ** 0.5 * norm.scale[layer, 0, at].double()
        if norm.norm_type != "classic-rms":
            share = 1 / (1 + torch.exp(-norm.gate[layer, 0, at].double()))
            row = share * row + (1 - share) * slot
        rows.append(row)
    return torch.stack(rows)


def gated(gate: ResidualGate, layer: int, old: Tensor, new: Tensor) -> Tensor:
    """One row and layer of a residual gate, ``[S, D]`` each."""
    settings = gate.settings
    if not settings.enabled:
        return old + new
    rows = []
    for s in range(len(old)):
        normed = old[s] / ((old[s] ** 2).mean() + EPS) ** 0.5
        bias = gate.bias[layer, 0, min(s, gate.bias.shape[2] - 1), 0].double()
        if settings.gate_type == "static":
            logit = bias.expand(1)
        elif settings.gate_type == "elementwise":
            products = gate.weight[layer, 0, 0].double() * (normed + new[s])
            logit = (products.sum().expand(1) if settings.per_slot else products) + bias
        else:
            logit = torch.cat((normed, new[s])) @ gate.weight[layer].double() + bias
        share = (1 + torch.tanh(logit)) / 2 if settings.tanh else 1 / (1 + torch.exp(-logit))
        share = (1 + 2 * settings.stretch) * share - settings.stretch
        share = torch.minimum(torch.maximum(share, share.new_zeros(())), share.new_ones(()))
        rows.append(share * new[s] + (1 - share) * old[s])
    return torch.stack(rows)


def written_out(memory: MemoryAttention, slots: Tensor, states: Tensor, key_mask: Tensor) -> Tensor:
    """Return the memory after a turn; arguments as of :class:`MemoryAttention`, in float64."""
    settings = memory.settings
    num_layers, batch_size = slots.shape[:2]
    size = num_layers // (settings.num_groups if settings.variant.startswith("grouped") else 1)
    result = torch.zeros_like(slots)
    for b in range(batch_size):
        for layer in range(num_layers):
            old = slots[layer, b]
            tokens = states[layer, b][key_mask[b]]
            if len(tokens) == 0:
                result[layer, b] = old
                continue
            first = layer // size * size
            mean = torch.stack([slots[j, b] for j in range(first, first + size)]).mean(dim=0)
            mixed = old
            if settings.variant != "simple":
                normed = normalized(memory.mix_norm, layer, old)
                source = normed
                if "interlayer" in settings.variant:
                    source = normalized(memory.mix_norm, layer, mean)
                if "self-interlayer" in settings.variant:
                    source = gated(memory.source_gate, layer, normed, source)
                read = attended(memory.mix_attention, layer, normed, source, None)
                mixed = gated(memory.mix_gate, layer, old, read)
            query = normalized(memory.slot_norm, layer, mixed)
            if settings.slot_identity:
                query = query + memory.slot_identity[layer, 0].double()
            tokens = tokens / ((tokens**2).mean(dim=-1, keepdim=True) + EPS) ** 0.5
            read = attended(memory.write_attention, layer, query, tokens, settings.rope_base)
            result[layer, b] = gated(memory.gate, layer, mixed, read)
    return result


@given(
    variant=st.sampled_from(
        ["simple", "self", "interlayer", "self-interlayer", "grouped-self-interlayer"]
    ),
    norm_type=st.sampled_from(["classic-rms", "rms", "layer", "adaptive", "positional"]),
    gate_type=st.sampled_from(["off", "static", "elementwise", "linear"]),
    per_slot=st.booleans(),
    tanh=st.booleans(),
    stretch=st.sampled_from([0.0, 0.1]),
    heads=st.sampled_from([(2, 2), (2, 1), (1, 2), (4, 2)]),
    mix_heads=st.sampled_from([(2, 2), (2, 1), (1, 1)]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 999),
)
def test_equals_the_equations(
    make_memory: Callable[..., MemoryAttention],
    variant: str,
    norm_type: str,
    gate_type: Any,
    per_slot: bool,
    tanh: bool,
    stretch: float,
    heads: tuple[int, int],
    mix_heads: tuple[int, int],
    flags: tuple[bool, bool, bool, bool],
    seed: int,
) -> None:
    """Catches stacked layers that mix (weights of one layer on the slots of another), a wrong
    head grouping, order of steps, norm, gate, rotation or mask, shares of the wrong side of the
    competition; in results and in gradients."""
    if gate_type == "off":
        gate = GateSettings(enabled=False)
    else:
        gate = GateSettings(gate_type=gate_type, per_slot=per_slot, tanh=tanh, stretch=stretch)
    identity, copy_path, per_dim, competition = flags
    memory = make_memory(
        variant, norm_type, gate, seed=seed, heads=heads, mix_heads=mix_heads,
        slot_identity=identity, copy_path_init=copy_path, norm_per_dim_scale=per_dim,
        rope_base=100.0, write_competition=competition,
    )  # fmt: skip
    slots, states = torch.randn(4, 2, 3, 8), torch.randn(4, 2, 3, 8) * 3
    key_mask = torch.rand(2, 3) < 0.6
    slots.requires_grad_()
    states.requires_grad_()
    actual = memory(slots, states, key_mask)
    expected = written_out(memory, slots.double(), states.double(), key_mask)
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-4)
    weight = torch.randn(actual.shape)
    inputs = (slots, memory.write_attention.query, memory.write_attention.value)
    ours = torch.autograd.grad((actual * weight).sum(), inputs)
    if key_mask.any():
        theirs = torch.autograd.grad((expected * weight).sum(), inputs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
