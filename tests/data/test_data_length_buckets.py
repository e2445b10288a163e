"""Rows of similar length together: the cheapest cuts, and nothing lost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from rxlm.data.length_buckets import least_padding, length_buckets


@given(st.lists(st.text(max_size=9)), st.integers(1, 5))
def test_every_row_is_in_one_bucket(rows: list[str], num_buckets: int) -> None:
    """Catches rows lost, doubled or out of order, empty buckets, and more of them than asked."""
    buckets = length_buckets(rows, num_buckets, len)
    assert [row for bucket in buckets for row in bucket] == sorted(rows, key=len)
    assert len(buckets) <= num_buckets and all(buckets)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9), num_buckets=st.integers(1, 5))
def test_cuts_leave_the_least_padding(lengths: list[int], num_buckets: int) -> None:
    """Catches cuts that are not the best of all possible ones."""
    lengths = sorted(lengths)

    def padded(ends: Sequence[int]) -> int:
        return sum((e - s) * lengths[e - 1] for s, e in zip([0, *ends], ends, strict=False))

    found = least_padding(lengths, num_buckets)
    assert found == sorted(set(found)) and found[-1] == len(lengths)
    count = min(num_buckets, len(lengths))
    every = itertools.combinations(range(1, len(lengths)), count - 1)
    assert padded(found) == min(padded([*inner, len(lengths)]) for inner in every)


def test_cuts_of_many_lengths() -> None:
    """Catches time that grows with the square of the number of lengths, and a long row that
    lengthens all others: 3,000 different lengths and one outlier."""
    lengths = [*range(1, 3001), 100_000]
    ends = least_padding(lengths, 3)
    assert ends[-2:] == [3000, 3001] and 1000 < ends[0] < 2000
