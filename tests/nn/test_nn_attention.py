"""The attention module against PyTorch's own, written-out heads, and its rules about positions.

Not here: the kernel and its masks (test_ops_attention), rotation itself (test_ops_rotary).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rxlm.nn.attention import Attention, AttentionSettings, initialize_copy_path
from rxlm.ops.rotary import apply_rotary, rotary_phases

HEADS = ((4, 4), (4, 2), (4, 1), (2, 1), (2, 2), (2, 4), (1, 4))
"""Query and key/value heads: MHA, GQA, MQA, SQA (fewer of both), reverse SQA (more keys)."""


def attention_of(seed: int = 0, **fields: Any) -> Attention:
    """Return a module of width 24 whose every parameter is random, biases included."""
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {"dim": 24, "num_heads": 4, "num_key_value_heads": 4, "head_dim": 6}
    attention = Attention(AttentionSettings(**{**defaults, **fields}))
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.4)
    return attention


def phases_of(length: int, start: int = 0, head_dim: int = 6) -> Tensor:
    """Return the rotary phases of ``length`` positions from ``start`` on."""
    return rotary_phases(torch.arange(start, start + length), head_dim)


def attend_to(
    attention: Attention,
    x: Tensor,
    source: Tensor,
    mask: Tensor | None = None,
    *,
    query_phases: Tensor | None = None,
    key_phases: Tensor | None = None,
) -> Tensor:
    """Run projection and attention as a caller does."""
    return attention(x, attention.project(source, key_phases), mask, query_phases)


def heads_written_out(
    attention: Attention, x: Tensor, source: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Return the mixed heads ``[B, T, heads * K]``: one plain attention per explicit head."""
    settings = attention.settings
    count = max(settings.num_heads, settings.num_key_value_heads)
    width = settings.head_dim
    outputs = []
    for head in range(count):
        query_head = head * settings.num_heads // count
        key_head = head * settings.num_key_value_heads // count
        query_rows = slice(query_head * width, (query_head + 1) * width)
        key_rows = slice(key_head * width, (key_head + 1) * width)
        query = x @ attention.query.weight[query_rows].T
        key = source @ attention.key.weight[key_rows].T
        value = source @ attention.value.weight[key_rows].T
        if settings.query_key_norm:
            query = F.rms_norm(query, (width,), attention.query_norm.weight, settings.norm_eps)
            key = F.rms_norm(key, (width,), attention.key_norm.weight, settings.norm_eps)
        head_mask = None if mask is None else mask[:, 0]
        outputs.append(F.scaled_dot_product_attention(query, key, value, attn_mask=head_mask))
    return torch.cat(outputs, dim=-1)


@pytest.mark.parametrize("output_bias", [True, False])
def test_multi_head_equals_pytorchs_module(output_bias: bool) -> None:
    """Catches a wrong scale, head split, bias or mask sense, in outputs and weight gradients."""
    ours = attention_of(output_bias=output_bias)
    theirs = nn.MultiheadAttention(24, 4, bias=output_bias, batch_first=True)
    with torch.no_grad():
        stacked = torch.cat((ours.query.weight, ours.key.weight, ours.value.weight))
        theirs.in_proj_weight.copy_(stacked)
        theirs.out_proj.weight.copy_(ours.output.weight)
        if output_bias:
            theirs.in_proj_bias.zero_()
            theirs.out_proj.bias.copy_(ours.output.bias)
    x, source = torch.randn(2, 5, 24), torch.randn(2, 7, 24)
    real = torch.ones(2, 7, dtype=torch.bool)
    real[0, 4:] = False
    actual = attend_to(ours, x, source, real[:, None, None])
    expected, _ = theirs(x, source, source, key_padding_mask=~real)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    actual.square().sum().backward()
    expected.square().sum().backward()
    gradient = torch.cat([part.weight.grad for part in (ours.query, ours.key, ours.value)])
    torch.testing.assert_close(gradient, theirs.in_proj_weight.grad, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(
        ours.output.weight.grad, theirs.out_proj.weight.grad, atol=1e-3, rtol=1e-4
    )


@given(
    heads=st.sampled_from(HEADS),
    length=st.integers(1, 5),
    num_keys=st.integers(1, 6),
    norm=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 999),
)
def test_shared_heads_equal_repeated_heads(
    heads: tuple[int, int], length: int, num_keys: int, norm: bool, masked: bool, seed: int
) -> None:
    """Catches pairing query heads with the wrong key/value head, in either direction of sharing,
    and query/key norms over the wrong axis or without their learned scale."""
    attention = attention_of(
        seed, num_heads=heads[0], num_key_value_heads=heads[1], query_key_norm=norm
    )
    x, source = torch.randn(2, length, 24), torch.randn(2, num_keys, 24)
    mask = None
    if masked:
        mask = torch.rand(2, 1, length, num_keys) < 0.6
        mask[..., 0] = True
    expected = attention.output(heads_written_out(attention, x, source, mask))
    assert expected.shape == x.shape
    torch.testing.assert_close(
        attend_to(attention, x, source, mask), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("activation", ["sigmoid", "silu", "tanh"])
def test_gate_multiplies_the_heads_by_an_activation_of_the_query_side(activation: str) -> None:
    """Catches a gate that is computed from the source, applied after the output projection, or
    with another activation than configured."""
    attention = attention_of(num_key_value_heads=2, gated=True, gate_activation=activation)
    x, source = torch.randn(2, 3, 24), torch.randn(2, 4, 24)
    logits = x @ attention.gate.weight.T + attention.gate.bias
    gate = {
        "sigmoid": 1 / (1 + (-logits).exp()),
        "silu": logits / (1 + (-logits).exp()),
        "tanh": (logits.exp() - (-logits).exp()) / (logits.exp() + (-logits).exp()),
    }[activation]
    expected = attention.output(heads_written_out(attention, x, source) * gate)
    torch.testing.assert_close(attend_to(attention, x, source), expected, atol=1e-4, rtol=1e-4)


@given(shift=st.integers(1, 300), seed=st.integers(0, 99))
def test_queries_rule_gives_the_source_no_order(shift: int, seed: int) -> None:
    """Catches slots that get positions when memory is read: their order, and any phases given for
    them, must not matter, whereas the position of the reading token must."""
    attention = attention_of(seed, rotary="queries")
    x, slots = torch.randn(1, 4, 24), torch.randn(1, 6, 24)
    query_phases = phases_of(4, shift)
    output = attend_to(attention, x, slots, query_phases=query_phases)
    shuffled = slots[:, torch.randperm(6)]
    torch.testing.assert_close(
        attend_to(attention, x, shuffled, query_phases=query_phases), output, atol=1e-5, rtol=1e-5
    )
    with_phases = attend_to(
        attention, x, slots, query_phases=query_phases, key_phases=phases_of(6, 3)
    )
    assert torch.equal(with_phases, output)
    moved = attend_to(attention, x, slots, query_phases=phases_of(4, shift + 1))
    assert (moved - output).abs().max() > 1e-4


@given(shift=st.integers(1, 300), seed=st.integers(0, 99))
def test_keys_rule_gives_the_reader_no_order(shift: int, seed: int) -> None:
    """Catches slots that get positions when memory is written: the outputs follow a permutation
    of the slots, phases of the slots are ignored, and the order of the tokens matters."""
    attention = attention_of(seed, rotary="keys")
    slots, tokens = torch.randn(1, 6, 24), torch.randn(1, 5, 24)
    output = attend_to(attention, slots, tokens, key_phases=phases_of(5))
    order = torch.randperm(6)
    permuted = attend_to(attention, slots[:, order], tokens, key_phases=phases_of(5))
    torch.testing.assert_close(permuted, output[:, order], atol=1e-5, rtol=1e-5)
    shifted = attend_to(
        attention, slots, tokens, query_phases=phases_of(6, shift), key_phases=phases_of(5)
    )
    assert torch.equal(shifted, output)
    reversed_tokens = attend_to(attention, slots, tokens.flip(1), key_phases=phases_of(5))
    assert (reversed_tokens - output).abs().max() > 1e-4


@given(shift=st.integers(0, 300), heads=st.sampled_from(HEADS), seed=st.integers(0, 99))
def test_both_rule_sees_distances_only(shift: int, heads: tuple[int, int], seed: int) -> None:
    """Catches rotating one side only in self-attention, where absolute positions would leak."""
    attention = attention_of(seed, num_heads=heads[0], num_key_value_heads=heads[1])
    x = torch.randn(1, 5, 24)
    start, moved = phases_of(5), phases_of(5, shift)
    output = attend_to(attention, x, x, query_phases=start, key_phases=start)
    again = attend_to(attention, x, x, query_phases=moved, key_phases=moved)
    torch.testing.assert_close(again, output, atol=2e-4, rtol=1e-3)
    unrotated = attend_to(attention, x, x)
    assert (unrotated - output).abs().max() > 1e-4


def test_none_rule_ignores_positions() -> None:
    """Catches positions that enter a model built without them."""
    attention = attention_of(rotary="none")
    x = torch.randn(1, 5, 24)
    given_phases = attend_to(attention, x, x, query_phases=phases_of(5), key_phases=phases_of(5))
    assert torch.equal(given_phases, attend_to(attention, x, x))


def test_query_key_norm_comes_before_the_rotation() -> None:
    """Catches normalising rotated heads, where a scale per channel breaks the rotation's pairs;
    and a norm that does not remove the size of queries and keys."""
    attention = attention_of(query_key_norm=True)
    x = torch.randn(2, 5, 24)
    phases = phases_of(5)
    split = (*x.shape[:2], 4, 6)
    query = F.rms_norm(attention.query(x).view(split), (6,), attention.query_norm.weight, 1e-6)
    key = F.rms_norm(attention.key(x).view(split), (6,), attention.key_norm.weight, 1e-6)
    query, key = (apply_rotary(part, phases).transpose(1, 2) for part in (query, key))
    value = attention.value(x).view(split).transpose(1, 2)
    heads = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)
    output = attend_to(attention, x, x, query_phases=phases, key_phases=phases)
    torch.testing.assert_close(output, attention.output(heads), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        attention.query.weight.mul_(50.0)
        attention.key.weight.mul_(0.1)
    louder = attend_to(attention, x, x, query_phases=phases, key_phases=phases)
    torch.testing.assert_close(louder, output, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", [6, 4])
def test_copy_path_starts_as_a_scaled_projection(heads: tuple[int, int], head_dim: int) -> None:
    """Catches a cold start: a token that is attended to must come out as itself times the scale,
    or as its orthogonal projection of rank G*K when the values are narrower than the model."""
    attention = attention_of(num_heads=heads[0], num_key_value_heads=heads[1], head_dim=head_dim)
    before = attention.query.weight.clone(), attention.key.weight.clone()
    initialize_copy_path(attention, 0.25)
    assert torch.equal(attention.query.weight, before[0])
    assert torch.equal(attention.key.weight, before[1])
    # With one key the attention weight is one: what remains is the path output(value(x)).
    basis = torch.eye(24)[:, None]
    path = attend_to(attention, torch.randn(24, 1, 24), basis)[:, 0] / 0.25
    rank = heads[1] * head_dim
    if rank == 24:
        torch.testing.assert_close(path, torch.eye(24), atol=1e-5, rtol=0)
    torch.testing.assert_close(path, path.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(path @ path, path, atol=1e-5, rtol=0)
    assert torch.linalg.matrix_rank(path, atol=1e-4) == rank


def test_copy_path_without_output_bias() -> None:
    """Catches an initialisation that needs a bias which the configuration left out."""
    attention = attention_of(output_bias=False)
    initialize_copy_path(attention)
    x = torch.randn(3, 1, 24)
    torch.testing.assert_close(attend_to(attention, torch.randn(3, 1, 24), x), x)


def test_keys_projected_in_pieces_equal_keys_projected_at_once() -> None:
    """Catches a cache that reorders or changes earlier keys: appending returns a new value."""
    attention = attention_of(num_key_value_heads=2)
    x = torch.randn(2, 7, 24)
    whole = attention.project(x, phases_of(7))
    first = attention.project(x[:, :3], phases_of(3))
    second = attention.project(x[:, 3:], phases_of(4, 3))
    copies = [part.clone() for part in (*first, *second)]
    joined = first.append(second)
    torch.testing.assert_close(joined.key, whole.key, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(joined.value, whole.value, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(copies, (*first, *second), strict=True))


def test_dropout_acts_in_training_only() -> None:
    """Catches dropout that is never applied, and answers that differ from call to call."""
    attention = attention_of(dropout=0.5)
    x = torch.randn(2, 6, 24)
    first, second = attend_to(attention, x, x), attend_to(attention, x, x)
    assert not torch.equal(first, second)
    attention.eval()
    expected = attention.output(heads_written_out(attention, x, x))
    torch.testing.assert_close(attend_to(attention, x, x), expected, atol=1e-5, rtol=1e-5)
