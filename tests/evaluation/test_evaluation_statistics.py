"""Intervals and pooled shares."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxlm.evaluation.statistics import estimate, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_intervals_equal_published_ones(
    successes: int, trials: int, low: float, high: float
) -> None:
    """Catches a wrong formula, and the normal approximation, which is wrong near 0 and 1."""
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 2000), st.data())
def test_an_interval_holds_the_share_and_mirrors(trials: int, data: st.DataObject) -> None:
    """Catches rounding that pushes an end past the share, past 0 or past 1."""
    successes = data.draw(st.integers(0, trials))
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1
    mirrored = wilson_interval(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low))


def test_pooling_weighs_answers_not_seeds() -> None:
    """Catches a mean of means, and minima over rows instead of over seeds."""
    found = estimate([(0, 8, 10), (0, 0, 10), (1, 30, 30), (2, 5, 10)])
    assert found.mean == 43 / 60
    assert (found.seed_min, found.seed_max) == (0.4, 1.0)
    assert found.n == 60
    assert (found.low, found.high) == wilson_interval(43, 60)
