"""What a token of local attention sees: windows as a rule over positions, and changes of scores.

Shapes: B batch, T queries, P keys, H query heads, K head dimension, W window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class LocalPattern:
    """Which keys a query sees.

    With s = i // window * window, the first position of the window of query i:

    * not ``exact``: keys j with s - back <= j < s + window + forward,
    * ``exact``: keys j with -forward <= i - j <= back,
    * ``causal``: of these the keys with j <= i.

    Attributes:
        window: W.
        back: tokens before the window (exact: before the query).
        forward: tokens after the window (exact: after the query).
        causal: whether no query sees a later key.
        exact: whether the limits count from the query instead of from its window.
    """

    window: int
    back: int
    forward: int = 0
    causal: bool = True
    exact: bool = True

    @classmethod
    def sliding(cls, window: int, *, causal: bool = True) -> LocalPattern:
        """Return the exact window of ``window`` tokens, the query included (on each side)."""
        return cls(window, window - 1, 0 if causal else window - 1, causal, exact=True)

    @property
    def reach(self) -> tuple[int, int]:
        """Most tokens before and after a query that it can see."""
        extra = 0 if self.exact else self.window - 1
        return self.back + extra, 0 if self.causal else self.forward + extra

    def visible(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Return bool ``[..., T, P]`` for positions ``[..., T]`` and ``[..., P]``."""
        query, key = query_positions[..., :, None], key_positions[..., None, :]
        origin = query if self.exact else query // self.window * self.window
        size = 1 if self.exact else self.window
        seen = (key >= origin - self.back) & (key < origin + size + self.forward)
        return seen & (key <= query) if self.causal else seen

    def bounds(self, first: int, last: int) -> tuple[int, int]:
        """Return the range [low, high) of keys that queries ``first`` to ``last`` see."""
        if self.exact:
            low, high = first - self.back, last + 1 + self.forward
        else:
            low = first // self.window * self.window - self.back
            high = last // self.window * self.window + self.window + self.forward
        return low, min(high, last + 1) if self.causal else high


class Decay(NamedTuple):
    """Decay with distance (xPos, Sun et al. 2022, arXiv 2212.10554): products of feature f of query
    i and key j are multiplied by ``exp(-rate[f] * (i - j))``; ``rate`` ``[K]`` >= 0."""

    rate: Tensor


class ScoreChanges(NamedTuple):
    """What besides the pattern decides about the scores; everything may be left out.

    Attributes:
        key_mask: bool ``[B, P]``, True at keys that may be seen.
        mask: bool ``[T, P]`` or ``[B, T, P]``, True where a query may see a key.
        bias: ``[H, W, W + back + forward]``, added to the scores; rows are positions in a window,
            columns count from ``back`` before it. The same for every window.
        hide_self: whether a query sees its own key only if it sees no other (shared queries and
            keys).
        decay: decay with distance.
    """

    key_mask: Tensor | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    hide_self: bool = False
    decay: Decay | None = None


NOTHING = ScoreChanges()
