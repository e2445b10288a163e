"""The reading order: complete, seeded, and independent of who reads and from where."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxlm.data import epoch_order, locate, sample_index
from rxlm.data.order import random_offset
from rxlm.errors import UserError


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 50), size=st.integers(1, 300))
def test_epoch_is_a_permutation(seed: int, epoch: int, size: int) -> None:
    """Catches items read twice or never within an epoch."""
    assert sorted(epoch_order(seed, epoch, size)) == list(range(size))


@given(seed=st.integers(0, 99), size=st.integers(1, 40), data=st.data())
def test_position_alone_decides(seed: int, size: int, data: st.DataObject) -> None:
    """Catches a reader state: reading in any order gives what reading in sequence gives."""
    sequence = [index for epoch in range(12) for index in epoch_order(seed, epoch, size)]
    positions = data.draw(st.lists(st.integers(0, 12 * size - 1), max_size=30))
    for position in positions:
        assert sample_index(seed, position, size) == sequence[position]
        assert locate(seed, position, size) == (position // size, sequence[position])


def test_order_is_pinned() -> None:
    """Catches a change of numpy or of ours that would reorder a resumed run's data."""
    assert epoch_order(0, 0, 10) == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    assert epoch_order(0, 1, 10) == [3, 7, 4, 2, 9, 8, 1, 6, 5, 0]
    assert epoch_order(1, 0, 10) == [2, 0, 1, 4, 5, 6, 7, 8, 3, 9]
    assert [random_offset(5, position, 1000) for position in range(4)] == [850, 219, 376, 230]


def test_impossible_positions_are_refused() -> None:
    """Catches Python's negative indices silently reading from the end."""
    with pytest.raises(UserError, match="numbers >= 0"):
        sample_index(0, -1, 10)
    with pytest.raises(UserError, match="nothing to read"):
        epoch_order(0, 0, 0)
