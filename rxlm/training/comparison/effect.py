"""The difference between two groups of runs, and how far it can be trusted. Arithmetic, no torch.

Runs of a group differ in their seeds only. With two or more on both sides:

    difference   mean(b) - mean(a), with Welch's 95 % interval (B. L. Welch, 1947)
    effect size  Hedges' g (L. V. Hedges, 1981): (mean(b) - mean(a)) / s * J, with the pooled
                 standard deviation s and J = 1 - 3 / (4 (n_a + n_b) - 9), which takes off what
                 small groups add
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Effect(NamedTuple):
    """How group b differs from group a; what cannot be known is None."""

    difference: float
    low: float | None = None
    high: float | None = None
    hedges_g: float | None = None

    @property
    def verdict(self) -> str:
        """``same``, ``unknown`` (a single run on a side), ``no difference found``, ``differs``."""
        if self.low is None or self.high is None:
            return "same" if self.difference == 0 else "unknown"
        return "differs" if self.low > 0 or self.high < 0 else "no difference found"


def effect(a: Sequence[float], b: Sequence[float]) -> Effect:
    """Return how ``b`` differs from ``a``; at least one value each."""
    difference = statistics.fmean(b) - statistics.fmean(a)
    if min(len(a), len(b)) < 2:
        return Effect(difference)
    variances = [statistics.variance(values) for values in (a, b)]
    parts = [variance / len(values) for variance, values in zip(variances, (a, b), strict=True)]
    error = math.sqrt(sum(parts))
    if error == 0:
        return Effect(difference, difference, difference, 0.0 if difference == 0 else None)
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (a, b), strict=True)
    )
    half = student_quantile(0.975, freedom) * error
    count = len(a) + len(b)
    pooled = math.sqrt(
        sum(v * (len(values) - 1) for v, values in zip(variances, (a, b), strict=True))
        / (count - 2)
    )
    g = difference / pooled * (1 - 3 / (4 * count - 9))
    return Effect(difference, difference - half, difference + half, g)


def student_quantile(probability: float, freedom: float) -> float:
    """Return the quantile of Student's t distribution.

    Args:
        probability: between 0.5 and 1.
        freedom: degrees of freedom, > 0, not only whole numbers.
    """
    assert 0.5 <= probability < 1 and freedom > 0
    low, high = 0.0, 1.0
    while _student_cdf(high, freedom) < probability:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _student_cdf(t: float, freedom: float) -> float:
    """Return P(T <= t) for t >= 0: Simpson's rule after t = sqrt(freedom) tan(u), which turns the
    density into a constant times cos(u)^(freedom - 1) on a bounded interval."""
    end = math.atan(t / math.sqrt(freedom))
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    steps = 400
    width = end / steps
    total = 0.0
    for index in range(steps + 1):
        weight = 1 if index in (0, steps) else 4 if index % 2 else 2
        total += weight * math.cos(index * width) ** (freedom - 1)
    return 0.5 + scale * total * width / 3
