"""Turns in rows of chunks: every token has one place, and a layer finds the turns there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rxlm.errors import UserError
from rxlm.nn.linear_attention import LinearSelfAttention
from rxlm.nn.linear_settings import LinearAttentionSettings
from rxlm.nn.recurrent_cache import CarriedLayer
from rxlm.nn.turn_layout import CHUNK_SIZE, TurnLayout

ragged = st.integers(1, 3).flatmap(
    lambda batch: st.lists(
        st.lists(st.integers(0, 2 * CHUNK_SIZE + 1), min_size=batch, max_size=batch),
        min_size=1,
        max_size=4,
    ).filter(lambda rows: any(map(any, rows)))
)


@given(ragged)
def test_packing_is_undone_and_counts_tokens_once(lengths: list[list[int]]) -> None:
    """Catches tokens that overwrite each other, a turn that begins inside a chunk, and empty turns
    that shift the others."""
    layout = TurnLayout.of_lengths(torch.tensor(lengths))
    num_turns, batch = len(lengths), len(lengths[0])
    mask = layout.turn_mask
    turns = torch.arange(mask.numel()).view(*mask.shape, 1) + 1
    packed = layout.pack(turns)
    assert torch.equal(layout.unpack(packed)[mask], turns[mask])
    assert layout.mask.sum() == mask.sum() == sum(map(sum, lengths))
    assert torch.equal(packed[layout.mask].sort(dim=0).values, turns[mask])
    for b in range(batch):
        starts = layout.begins[b].nonzero().flatten().tolist()
        exists = [n for n in range(num_turns) if lengths[n][b]]
        assert [int(layout.turn[b, q]) for q in starts] == exists
        for q, n in zip(starts, exists, strict=True):
            tokens = packed[b, q * CHUNK_SIZE : q * CHUNK_SIZE + lengths[n][b]]
            assert torch.equal(tokens, turns[n * batch + b][: lengths[n][b]])
            positions = layout.position[b, q * CHUNK_SIZE : q * CHUNK_SIZE + lengths[n][b]]
            assert positions.tolist() == list(range(lengths[n][b]))


@given(ragged, st.sampled_from([None, 1, 3, 4]), st.booleans())
def test_a_layer_over_turns_is_the_loop_over_turns(
    lengths: list[list[int]], conv_size: int | None, carries: bool
) -> None:
    """Catches a convolution that sees the turn before, or not its own turn's earlier chunk, states
    of another turn, and absent turns that count as a past."""
    torch.manual_seed(0)
    fusion = "add" if carries else None
    layer = LinearSelfAttention(
        LinearAttentionSettings("kda", 8, 2, 4, 4, conv_size=conv_size, memory_fusion=fusion)
    ).double()
    layout = TurnLayout.of_lengths(torch.tensor(lengths))
    num_turns, batch = len(lengths), len(lengths[0])
    turns = torch.randn(num_turns * batch, layout.longest, 8, dtype=torch.float64)
    memory = None
    if carries:
        torch.nn.init.normal_(layer.memory_fusion.up.weight)
        torch.nn.init.normal_(layer.memory_fusion.keep.weight)
        memory = layer.memory_fusion(torch.randn(num_turns * batch, 3, 8, dtype=torch.float64))
    state = torch.randn(batch, 2, 4, 4, dtype=torch.float64)
    started = torch.arange(batch) % 2 == 0
    carried = CarriedLayer(state * started[:, None, None, None], started)
    packed, history = layer.forward_turns(layout.pack(turns), layout, memory, carried)
    found = layout.unpack(packed)
    for n in range(num_turns):
        rows = slice(n * batch, (n + 1) * batch)
        torch.testing.assert_close(history.state[n], carried.state)
        assert torch.equal(history.started[n], carried.started)
        part = None if memory is None else type(memory)(*(item[rows] for item in memory))
        mask = layout.turn_mask[rows]
        y, cache = layer(turns[rows], mask, memory=part, carried=carried)
        torch.testing.assert_close(found[rows][mask], y[mask], rtol=1e-9, atol=1e-11)
        exists = mask.any(dim=1)
        assert cache is not None
        carried = CarriedLayer(
            torch.where(exists[:, None, None, None], cache.state, carried.state),
            carried.started | exists,
        )
    torch.testing.assert_close(history.state[-1], carried.state)


def test_what_cannot_run_over_turns_is_refused() -> None:
    """Catches turns of a mechanism that carries nothing, and a convolution over three chunks."""
    layout = TurnLayout.of_lengths(torch.tensor([[3]]))
    x = torch.zeros(1, CHUNK_SIZE, 8)
    for settings in (
        LinearAttentionSettings("gla", 8, 2, 4, 4),
        LinearAttentionSettings("kda", 8, 2, 4, 4, bidirectional=True),
        LinearAttentionSettings("kda", 8, 2, 4, 4, backend="fla"),
    ):
        with pytest.raises(UserError, match="turns in their order"):
            LinearSelfAttention(settings).forward_turns(x, layout)
    wide = LinearSelfAttention(LinearAttentionSettings("kda", 8, 2, 4, 4, conv_size=18))
    with pytest.raises(UserError, match="use conv_size <= 17"):
        wide.forward_turns(x, layout)
