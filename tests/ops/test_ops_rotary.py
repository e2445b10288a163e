"""Rotary embedding against its definition and its defining property."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rxlm.ops.rotary import apply_rotary, rotary_phases, token_positions


@given(length=st.integers(1, 9), half=st.integers(1, 8), base=st.sampled_from([100.0, 10000.0]))
def test_matches_two_by_two_rotation_matrices(length: int, half: int, base: float) -> None:
    """A wrong pairing, frequency or sign would differ from eq. 34 of the paper written out."""
    x = torch.randn(2, length, 3, 2 * half, dtype=torch.float32)
    rotated = apply_rotary(x, rotary_phases(torch.arange(length), 2 * half, base))
    for position in range(length):
        for pair in range(half):
            angle = position * base ** (-2 * pair / (2 * half))
            matrix = torch.tensor(
                [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
            )
            expected = x[:, position, :, 2 * pair : 2 * pair + 2] @ matrix.T
            actual = rotated[:, position, :, 2 * pair : 2 * pair + 2]
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@given(shift=st.integers(0, 500), distance=st.integers(0, 40))
def test_scores_depend_on_distance_only(shift: int, distance: int) -> None:
    """Absolute positions leaking into scores would break decoding with a cache."""
    query, key = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(first: int, second: int) -> torch.Tensor:
        rotated_query = apply_rotary(query, rotary_phases(torch.tensor([first]), 16))
        rotated_key = apply_rotary(key, rotary_phases(torch.tensor([second]), 16))
        return (rotated_query * rotated_key).sum()

    torch.testing.assert_close(
        score(shift + distance, shift), score(distance, 0), atol=1e-4, rtol=1e-4
    )


def test_far_positions_stay_distinct_in_bf16() -> None:
    """Angles computed in bf16 alias above position 256: neighbours would become equal."""
    x = torch.ones(1, 2, 1, 8, dtype=torch.bfloat16)
    rotated = apply_rotary(x, rotary_phases(torch.tensor([4000, 4001]), 8))
    assert rotated.dtype == torch.bfloat16
    difference = (rotated[0, 0] - rotated[0, 1]).abs().max()
    assert difference > 0.3


def test_odd_head_dim_is_refused_with_remedy() -> None:
    """Silently dropping a channel would be worse than an error."""
    with pytest.raises(ValueError, match=r"head_dim=7 is odd.*even"):
        rotary_phases(torch.arange(3), 7)


def test_positions_count_real_tokens_on_either_padding_side() -> None:
    """Left padding that shifts positions would make batched differ from single."""
    mask = torch.tensor([[False, False, True, True], [True, True, False, False]])
    positions = token_positions(mask, 4, torch.device("cpu"))
    assert positions[mask].tolist() == [0, 1, 0, 1]


def test_no_tokens_is_a_valid_length() -> None:
    """An empty sequence (a decode call without new tokens) must not fail in a reshape."""
    assert apply_rotary(torch.zeros(2, 0, 1, 8), rotary_phases(torch.arange(0), 8)).shape[1] == 0


def test_float64_is_rotated_in_float64() -> None:
    """Numeric gradients of a float64 model are noise when its queries are rounded to float32."""
    x = torch.randn(1, 4, 1, 8, dtype=torch.float64, requires_grad=True)
    phases = rotary_phases(torch.arange(4), 8, 100.0)
    for form in (phases, torch.view_as_real(phases)):
        assert torch.autograd.gradcheck(lambda value, form=form: apply_rotary(value, form), (x,))
