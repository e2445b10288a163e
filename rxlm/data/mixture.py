"""Which source of a mixture is read at which position: a pure function of seed and position.

Positions come in blocks of a thousand, and every block holds each source exactly as often as its
weight says, in an order of its own. So the ratio holds at any time, not only in the mean, and a run
that resumes needs the position alone. Not here: what a source gives (``rxlm.training``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from rxlm.data.order import epoch_order
from rxlm.errors import UserError

StoppingRule = Literal["steps", "first_exhausted", "all_exhausted"]
"""How long a mixture lasts. ``steps``: as long as the run, sources begin anew when they are read
through; ``first_exhausted``: until one source is read through; ``all_exhausted``: until each is,
smaller ones beginning anew until then."""

BLOCK = 1000


class Mixture:
    """Positions of a mixture, dealt out to its sources.

    Args:
        weights: one a source, > 0; only their ratios count.
        seed: of the order within a block, >= 0.
    """

    def __init__(self, weights: Sequence[float], seed: int = 0) -> None:
        total = sum(weights)
        if not weights or min(weights) <= 0:
            raise UserError(f"weights={list(weights)}: expected one number > 0 a source.")
        self.counts = _largest_remainders([BLOCK * weight / total for weight in weights])
        """How often each source is read in a block of :data:`BLOCK` positions."""
        if 0 in self.counts:
            raise UserError(
                f"weights={list(weights)}: a source has less than 1/{BLOCK} of the whole, so it "
                "would never be read. Raise its weight, or leave it out."
            )
        self.seed = seed

    def locate(self, position: int) -> tuple[int, int]:
        """Return (source, how often that source was read before) at ``position`` >= 0."""
        block, place = divmod(position, BLOCK)
        source, rank = _block(self.seed, block, tuple(self.counts))[place]
        return source, block * self.counts[source] + rank

    def size(self, sizes: Sequence[int], rule: StoppingRule) -> int | None:
        """Return the number of positions until a stopping rule ends the mixture; None: endless.

        Args:
            sizes: items in an epoch of each source.
            rule: the stopping rule.
        """
        if rule == "steps":
            return None
        ends = [self._end(source, size) for source, size in enumerate(sizes)]
        return min(ends) if rule == "first_exhausted" else max(ends)

    def _end(self, source: int, size: int) -> int:
        """Return the number of positions after which ``size`` items of a source were read."""
        block, rank = divmod(size - 1, self.counts[source])
        dealt = _block(self.seed, block, tuple(self.counts))
        return block * BLOCK + dealt.index((source, rank)) + 1


def _largest_remainders(shares: Sequence[float]) -> list[int]:
    """Round shares such that their sum stays: the largest remainders are rounded up."""
    counts = [int(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda item: (counts[item] - shares[item], item))
    for item in order[: BLOCK - sum(counts)]:
        counts[item] += 1
    return counts


@lru_cache(maxsize=16)
def _block(seed: int, block: int, counts: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return (source, rank within the block) of each position of a block."""
    sources = [source for source, count in enumerate(counts) for _ in range(count)]
    seen = [0] * len(counts)
    dealt = []
    for index in epoch_order(seed, block, BLOCK):
        source = sources[index]
        dealt.append((source, seen[source]))
        seen[source] += 1
    return dealt
