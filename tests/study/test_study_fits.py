"""Slopes, crossings and intervals find what was put in."""

from __future__ import annotations

import random

import pytest

from rxlm.study.claims import Share, _compared
from rxlm.study.fits import Slope, find_crossover, fit_slope, median_interval, ratio_interval

LENGTHS = (128, 256, 512, 1024, 2048)


@pytest.mark.parametrize(("power", "verdict"), [(0, "constant"), (1, "linear"), (2, "quadratic")])
def test_slope_of_a_power_law(power: int, verdict: str) -> None:
    """Catches a slope over the wrong axis, and a verdict without its interval."""
    noise = random.Random(0)
    values = [length**power * (1 + noise.uniform(-0.03, 0.03)) for length in LENGTHS]
    slope = fit_slope(LENGTHS, values)
    assert slope is not None
    assert slope.low <= power <= slope.high and abs(slope.theil_sen - power) < 0.1
    assert slope.verdict == verdict and slope.points == 4  # the upper decade
    assert fit_slope(LENGTHS[:2], values[:2]) is None


def test_a_wide_interval_decides_nothing() -> None:
    """Catches noise that is called linear because its interval holds everything."""
    slope = fit_slope(LENGTHS, [1.0, 9.0, 1.0, 9.0, 1.0])
    assert slope is not None and slope.verdict == "undecided"


def test_one_bad_point_does_not_move_theil_and_sen() -> None:
    """Catches a median that is a mean."""
    slope = fit_slope((256, 512, 1024, 2048), [256.0, 512.0, 10240.0, 2048.0])
    assert slope is not None and abs(slope.theil_sen - 1) < abs(slope.slope - 1) + 1e-9


def test_crossover_is_found_with_its_interval() -> None:
    """Catches a crossing at the first length where it is cheaper by chance, and one of none."""
    noise = random.Random(1)

    def samples(value: float) -> list[float]:
        return [value * (1 + noise.uniform(-0.02, 0.02)) for _ in range(9)]

    base = {length: samples(length**2 / 1000) for length in LENGTHS}
    own = {length: samples(float(length)) for length in LENGTHS}  # crosses at 1,000
    found = find_crossover(own, base)
    assert found is not None and found.length == pytest.approx(1000, rel=0.05)
    assert found.low is not None and found.high is not None
    assert found.low <= 1000 * 1.05 and found.high >= 1000 * 0.95
    never = find_crossover(base, {length: samples(1.0) for length in LENGTHS})
    assert never is not None and never.length is None and "not up to 2,048" in never.words
    always = find_crossover({n: samples(1.0) for n in LENGTHS}, base)
    assert always is not None and "every length" in always.words


def test_paired_ratios_are_not_moved_by_slow_rounds() -> None:
    """Catches a ratio of medians where rounds of a noisy machine are pairs."""
    slow = [1.0, 5.0, 1.0, 7.0, 1.1, 9.0, 1.0]
    found = ratio_interval([2 * value for value in slow], slow)
    assert found == (2.0, 2.0, 2.0)
    wide = median_interval(slow)
    assert wide.low <= wide.value <= wide.high and wide.high > 2
    assert median_interval([3.0]) == (3.0, 3.0, 3.0)


def test_orders_are_called_by_their_intervals() -> None:
    """Catches a tie that is called a win, and a reversal that is not said."""
    high, low = Share(90.0, 88.0, 92.0), Share(50.0, 47.0, 53.0)
    assert _compared("a", "t", high, low).verdict == "supported"
    turned = _compared("a", "t", low, high)
    assert turned.verdict == "not supported" and "other way round" in turned.effect
    tie = _compared("a", "t", Share(99.8, 99.5, 99.9), Share(99.9, 99.6, 100.0))
    assert tie.verdict == "not testable here"
    assert _compared("a", "t", None, low).verdict == "not testable here"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.985, 0.995, "linear"),  # so exact that the interval misses 1
        (0.85, 0.9, "exponent 0.88"),
        (0.4, 1.2, "undecided"),
        (0.8, 0.99, "exponent 0.90"),  # near 1 at one end is not enough
        (1.96, 1.99, "quadratic"),
        (1.4, 1.6, "exponent 1.50"),
    ],
)
def test_verdict_of_an_interval(low: float, high: float, verdict: str) -> None:
    """Catches a measurement that is not called linear because it is too exact, or a loose one that
    is."""
    middle = (low + high) / 2
    slope = Slope(middle, low, high, 1.0, middle, middle, 5)
    assert slope.verdict == verdict
