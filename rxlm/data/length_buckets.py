"""Rows of similar length together, so that little is spent on padding.

Which bucket a row falls into never changes a result, only what it costs. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

MOST_CUTS = 64

Row = TypeVar("Row")


def length_buckets(
    rows: Sequence[Row], num_buckets: int, length: Callable[[Row], int]
) -> list[list[Row]]:
    """Sort rows by length and cut them where that leaves the least padding.

    Args:
        rows: any number of rows, also none.
        num_buckets: into how many buckets to cut at most, at least 1.
        length: of a row.
    """
    if not rows:
        return []
    ordered = sorted(rows, key=length)
    ends = least_padding([length(row) for row in ordered], num_buckets)
    return [ordered[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def least_padding(lengths: Sequence[int], num_buckets: int) -> list[int]:
    """Return where to cut ascending ``lengths`` into buckets that need the least padding.

    Exact up to 64 different lengths; of more, 32 evenly spread cuts and those at the 32 widest
    steps in length are tried.

    Returns:
        the end of each bucket, ascending; at most ``num_buckets`` of them, the last is
        ``len(lengths)``. A bucket is as long as its last row.
    """
    places = [i + 1 for i in range(len(lengths) - 1) if lengths[i] < lengths[i + 1]]
    if len(places) > MOST_CUTS:
        widest = sorted(places, key=lambda i: lengths[i - 1] - lengths[i])[: MOST_CUTS // 2]
        spread = places[:: -(-len(places) // (MOST_CUTS // 2))]
        places = sorted({*widest, *spread})
    places = [0, *places, len(lengths)]
    # cost[e]: tokens of the cheapest buckets of all rows before places[e]; cuts[e]: their ends.
    cost = [0] + [end * lengths[end - 1] for end in places[1:]]
    cuts: list[list[int]] = [[]] + [[end] for end in places[1:]]
    for _ in range(num_buckets - 1):
        for e in range(len(places) - 1, 1, -1):
            end, length = places[e], lengths[places[e] - 1]
            # Up to e - 1 still one bucket fewer: e runs down.
            best = min(range(e), key=lambda s: cost[s] + (end - places[s]) * length)
            total = cost[best] + (end - places[best]) * length
            if total < cost[e]:
                cost[e], cuts[e] = total, [*cuts[best], end]
    return cuts[-1]
