"""Counts, shares and how far they can be trusted. Pure arithmetic, no torch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


class Estimate(NamedTuple):
    """A share of successes, pooled over seeds; all values in [0, 1].

    ``low``, ``high``: 95 % Wilson interval of the pooled count; ``seed_min``, ``seed_max``: the
    worst and the best seed; ``n``: trials.
    """

    mean: float
    low: float
    high: float
    seed_min: float
    seed_max: float
    n: int


def wilson_interval(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Return the Wilson score interval of a share (E. B. Wilson, 1927).

    Unlike the textbook interval ``p +- z * sqrt(p (1 - p) / n)`` it is honest near 0 and 1, which
    is where recall is.

    Args:
        successes: how many of ``trials``.
        trials: at least 1.
        z: quantile of the normal distribution; default 95 %.
    """
    assert 0 <= successes <= trials and trials > 0
    share = successes / trials
    scale = 1.0 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # At 0 and 1 one end is exactly the share; rounding must not push it past.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def estimate(counts: Sequence[tuple[int, int, int]]) -> Estimate:
    """Pool counts of several seeds.

    Args:
        counts: (seed, successes, trials), any number per seed, at least one in all.
    """
    by_seed: dict[int, tuple[int, int]] = {}
    for seed, successes, trials in counts:
        before = by_seed.get(seed, (0, 0))
        by_seed[seed] = (before[0] + successes, before[1] + trials)
    successes = sum(item[0] for item in by_seed.values())
    trials = sum(item[1] for item in by_seed.values())
    shares = [item[0] / item[1] for item in by_seed.values()]
    low, high = wilson_interval(successes, trials)
    return Estimate(successes / trials, low, high, min(shares), max(shares), trials)


def difference(first: Estimate, second: Estimate) -> tuple[float, float, float]:
    """Return the difference of two independent shares and its 95 % interval (Newcombe, 1998)."""
    gap = first.mean - second.mean
    below = math.hypot(first.mean - first.low, second.high - second.mean)
    above = math.hypot(first.high - first.mean, second.mean - second.low)
    return gap, gap - below, gap + above


def bootstrap(
    items: Sequence[Item],
    statistic: Callable[[Sequence[Item]], float | None],
    rounds: int = 400,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Return a 95 % percentile bootstrap interval (Efron, 1979), the same for the same input.

    Args:
        items: what is drawn with replacement: whole conversations, not tokens, since what is said
            in one conversation hangs together.
        statistic: of such a draw; None where it cannot be told.
        rounds: draws.
        seed: of the draws.

    Returns:
        None if the statistic could not be told of most draws.
    """
    rng = random.Random(seed)
    found = []
    for _ in range(rounds):
        value = statistic([items[int(rng.random() * len(items))] for _ in items])
        if value is not None and math.isfinite(value):
            found.append(value)
    if 2 * len(found) < rounds:
        return None
    found.sort()
    last = len(found) - 1
    return found[round(0.025 * last)], found[round(0.975 * last)]
