"""What lines through measurements say: exponents, lengths at which two curves cross, intervals.

    slope      of log2(value) over log2(length), by least squares, with Student's 95 % interval and
               R^2, and by Theil and Sen's median of pairs, which one bad point does not move
    crossover  the length at which a ratio passes 1, on straight lines between measured points
    intervals  of medians and ratios: percentiles of 2,000 bootstrap draws; a ratio draws rounds, so
               that what disturbed both calls of a round disturbs no ratio

Arithmetic; no torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rxlm.training.comparison.effect import student_quantile

DRAWS = 2000
_LEVEL = (2.5, 97.5)
_DECADE = 10.0


class Interval(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


NEGLIGIBLE = 0.05
"""How far from a whole exponent nobody cares: bytes that are counted fit a line so closely that an
exponent of 0.99 with its interval of 0.99 to 1.00 would not pass for linear."""


class Slope(NamedTuple):
    """An exponent p of ``value ~ length**p``."""

    slope: float
    low: float
    high: float
    r_squared: float
    theil_sen: float
    asymptotic: float
    """Of the last three doublings (two if there are no more)."""
    points: int

    @property
    def verdict(self) -> str:
        """``constant``, ``linear`` or ``quadratic`` if the interval holds 0, 1 or 2 and reaches no
        further than half way to the next, or lies wholly within :data:`NEGLIGIBLE` of it; otherwise
        the exponent, or ``undecided``."""
        for name, exponent in (("constant", 0.0), ("linear", 1.0), ("quadratic", 2.0)):
            inside = exponent - 0.5 < self.low and self.high < exponent + 0.5
            furthest = max(abs(self.low - exponent), abs(self.high - exponent))
            if furthest <= NEGLIGIBLE or (inside and self.low <= exponent <= self.high):
                return name
        return "undecided" if self.high - self.low > 0.5 else f"exponent {self.slope:.2f}"


def median_interval(samples: Sequence[float], seed: int = 0) -> Interval:
    """Return the median of at least one sample; its interval is a point if there is only one."""
    values = np.asarray(samples, dtype=np.float64)
    drawn = np.median(values[_draws(len(values), seed)], axis=1)
    return Interval(float(np.median(values)), *_percentiles(drawn))


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], seed: int = 0
) -> Interval:
    """Return the median ratio within rounds; both have a value for each round."""
    ratios = np.asarray(numerators, np.float64) / np.asarray(denominators, np.float64)
    drawn = np.median(ratios[_draws(len(ratios), seed)], axis=1)
    return Interval(float(np.median(ratios)), *_percentiles(drawn))


def mean_interval(samples: Sequence[float], seed: int = 0) -> Interval:
    """Return the mean of at least one sample, as :func:`median_interval`."""
    values = np.asarray(samples, dtype=np.float64)
    drawn = values[_draws(len(values), seed)].mean(axis=1)
    return Interval(float(values.mean()), *_percentiles(drawn))


def fit_slope(lengths: Sequence[int], values: Sequence[float]) -> Slope | None:
    """Return the exponent over the upper decade of lengths.

    Args:
        lengths: ascending.
        values: positive, one a length.

    Returns:
        None for fewer than three points, or values that are not positive.
    """
    chosen = [
        (math.log2(length), math.log2(value))
        for length, value in zip(lengths, values, strict=True)
        if value > 0 and length * _DECADE >= max(lengths)
    ]
    if len(chosen) < 3:
        return None
    x, y = zip(*chosen, strict=True)
    slope, intercept = statistics.linear_regression(x, y)
    residual = sum((b - intercept - slope * a) ** 2 for a, b in chosen)
    spread = sum((a - statistics.fmean(x)) ** 2 for a in x)
    total = sum((b - statistics.fmean(y)) ** 2 for b in y)
    error = math.sqrt(residual / (len(chosen) - 2) / spread)
    half = student_quantile(0.975, len(chosen) - 2) * error
    pairs = [(y[j] - y[i]) / (x[j] - x[i]) for i in range(len(x)) for j in range(i + 1, len(x))]
    last = chosen[-min(4, len(chosen)) :]
    return Slope(
        slope,
        slope - half,
        slope + half,
        1.0 - residual / total if total else 1.0,
        statistics.median(pairs),
        (last[-1][1] - last[0][1]) / (last[-1][0] - last[0][0]),
        len(chosen),
    )


class Crossover(NamedTuple):
    """Where a mechanism becomes cheaper than the baseline."""

    length: float | None
    low: float | None
    high: float | None
    words: str


def find_crossover(
    own: Mapping[int, Sequence[float]], baseline: Mapping[int, Sequence[float]], seed: int = 0
) -> Crossover | None:
    """Return the length from which on a mechanism takes less than the baseline.

    Args:
        own: samples by length, one a round.
        baseline: those of the baseline, of the same rounds.
        seed: of the bootstrap.

    Returns:
        None for fewer than two lengths in common.
    """
    lengths = sorted(
        length for length in own if length in baseline and len(own[length]) == len(baseline[length])
    )
    if len(lengths) < 2:
        return None
    logs = {
        length: np.log(np.asarray(own[length], np.float64) / np.asarray(baseline[length]))
        for length in lengths
    }
    found = _crossing(lengths, [float(np.median(logs[length])) for length in lengths])
    drawn = np.stack(
        [
            np.median(logs[length][_draws(len(logs[length]), seed + number)], axis=1)
            for number, length in enumerate(lengths)
        ]
    )
    crossings = [_crossing(lengths, list(column)) for column in drawn.T]
    inside = [value for value in crossings if value not in (0.0, math.inf)]
    if found == 0.0:
        return Crossover(None, None, None, f"cheaper at every length from {lengths[0]:,}")
    if found == math.inf:
        return Crossover(None, None, None, f"not up to {lengths[-1]:,}")
    low, high = (float(value) for value in np.percentile(inside or [found], _LEVEL))
    sure = len(inside) >= 0.95 * len(crossings)
    words = f"{found:,.0f} ({low:,.0f} to {high:,.0f})" + ("" if sure else ", uncertain")
    return Crossover(found, low, high, words)


def _crossing(lengths: Sequence[int], logs: Sequence[float]) -> float:
    """Return where the log ratio stays below 0: 0 if always, infinity if it ends above."""
    if logs[-1] >= 0:
        return math.inf
    for index in range(len(lengths) - 1, 0, -1):
        if logs[index - 1] >= 0:
            before, after = math.log2(lengths[index - 1]), math.log2(lengths[index])
            share = logs[index - 1] / (logs[index - 1] - logs[index])
            return float(2.0 ** (before + share * (after - before)))
    return 0.0


def _draws(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(count, size=(DRAWS, count))


def _percentiles(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(drawn, _LEVEL)
    return float(low), float(high)
