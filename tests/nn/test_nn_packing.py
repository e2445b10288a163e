"""Packed rows: every mixer sees each sequence by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rxlm.nn.mixers import MIXERS, MixerSettings, build_mixer
from rxlm.nn.packing import PackedLayout

SEGMENTS = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 0],
        [1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3],
        [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
)


@pytest.mark.parametrize("name", MIXERS)
def test_packed_is_each_sequence_alone(name: str) -> None:
    """Catches attention, a state, a convolution or a position that crosses from one document to
    the next, in the output or in a gradient, for any kind of mixer."""
    torch.manual_seed(0)
    mixer = build_mixer(name, MixerSettings(dim=16, num_heads=2, window=4, conv_size=3)).double()
    x = torch.randn(*SEGMENTS.shape, 16, dtype=torch.float64)
    weights = torch.randn_like(x)

    def run(packed: bool) -> list[torch.Tensor]:
        given = x.clone().requires_grad_()
        mixer.zero_grad()
        if packed:
            y = PackedLayout.of_segments(SEGMENTS, 2).apply(
                lambda t, m: mixer(t, key_mask=m)[0], given
            )
        else:
            y = torch.zeros_like(x)
            for row in range(len(SEGMENTS)):
                for number in SEGMENTS[row].unique().tolist():
                    at = SEGMENTS[row] == number
                    if number:
                        alone = mixer(given[row, at][None])[0][0]
                        y[row] = y[row].masked_scatter(at[:, None], alone)
        (y * weights).sum().backward()
        parameters = [item.grad for item in mixer.parameters() if item.grad is not None]
        assert given.grad is not None and parameters
        return [y.detach(), given.grad, *parameters]

    torch.testing.assert_close(run(packed=True), run(packed=False), rtol=1e-9, atol=1e-11)


@given(
    st.lists(st.lists(st.integers(1, 5), min_size=0, max_size=4), min_size=1, max_size=3),
    st.integers(1, 4),
)
@settings(max_examples=40, deadline=None)
def test_layout_finds_every_token_once(rows: list[list[int]], num_groups: int) -> None:
    """Catches a token lost or doubled, a position that is not counted from its sequence's
    beginning, and rows without any token."""
    width = max(1, max(sum(row) for row in rows))
    segments = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros_like(segments)
    for row, lengths in enumerate(rows):
        start = 0
        for number, length in enumerate(lengths, start=1):
            segments[row, start : start + length] = number
            positions[row, start : start + length] = torch.arange(length)
            start += length
    layout = PackedLayout.of_segments(segments, num_groups)
    assert torch.equal(layout.position, positions)
    x = torch.arange(1.0, segments.numel() + 1).view(*segments.shape, 1)
    if segments.any():
        total = layout.apply(lambda t, m: t * m.sum(1).view(-1, 1, 1), x)
        lengths = [[length for length in row for _ in range(length)] for row in rows]
        wanted = torch.tensor([[*row, *[0] * (width - len(row))] for row in lengths])
        assert torch.equal(total[..., 0], x[..., 0] * wanted)
