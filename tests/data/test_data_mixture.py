"""Mixtures: exact ratios, every item in turn, and where they stop."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rxlm.data.data_config import DataConfig, MixtureItem
from rxlm.data.mixture import Mixture
from rxlm.errors import UserError

WEIGHTS = st.lists(st.floats(0.05, 1), min_size=1, max_size=5)


@given(WEIGHTS, st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_ratios_hold_and_nothing_is_left_out(weights: list[float], seed: int) -> None:
    """Catches ratios that hold in the mean only, items read twice or never, and an order that
    depends on what was asked for before."""
    mixture = Mixture(weights, seed)
    dealt = [mixture.locate(position) for position in range(2500)]
    seen = [0] * len(weights)
    for source, number in dealt:
        assert number == seen[source]
        seen[source] += 1
    for start in (0, 1000):
        counts = Counter(source for source, _ in dealt[start : start + 1000])
        for source, weight in enumerate(weights):
            assert abs(counts[source] - 1000 * weight / sum(weights)) <= 1
    assert Mixture(weights, seed).locate(1234) == dealt[1234]


@given(WEIGHTS, st.lists(st.integers(1, 900), min_size=5, max_size=5))
@settings(max_examples=20, deadline=None)
def test_stopping_rules(weights: list[float], sizes: list[int]) -> None:
    """Catches an end that is one item early or late, and the rules mixed up."""
    mixture, sizes = Mixture(weights, 1), sizes[: len(weights)]
    ends: dict[int, int] = {}
    position = 0
    while len(ends) < len(sizes):
        source, number = mixture.locate(position)
        position += 1
        if number + 1 == sizes[source]:
            ends[source] = position
    assert mixture.size(sizes, "steps") is None
    assert mixture.size(sizes, "first_exhausted") == min(ends.values())
    assert mixture.size(sizes, "all_exhausted") == max(ends.values())


def test_impossible_mixtures_are_refused() -> None:
    """Catches a source that is silently never read."""
    with pytest.raises(UserError, match="would never be read"):
        Mixture([1.0, 0.0001])
    with pytest.raises(UserError, match="one number > 0"):
        Mixture([1.0, 0.0])
    with pytest.raises(UserError, match="give one of the two"):
        MixtureItem.parse({"weight": 1.0})
    with pytest.raises(UserError, match="a mixture lists all its texts"):
        DataConfig.parse({"text": "a.txt", "mixture": [{"text": "b.txt", "weight": 1}]})
    with pytest.raises(UserError, match=r"data\.text is not set"):
        DataConfig.parse({"streaming": True})
