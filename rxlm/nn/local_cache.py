"""What local attention keeps of the past, as a value of constant size; attention that goes on.

The cache holds the last tokens that a later query can still see, and nothing else: it is as large
after one token as after a million. Only real tokens enter it, so padding on either side, and where
a sequence is cut into calls, change nothing.

Shapes: B batch, T new tokens, C kept tokens, H query heads, G key/value heads, K head dimension,
D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rxlm.nn.attention import Attention
from rxlm.ops.local_attention import NOTHING, LocalPattern, ScoreChanges, local_attention


class LocalCache(NamedTuple):
    """The past of B sequences.

    Attributes:
        key: ``[B, C, G, K]``, of the last real tokens in order, the newest last; already rotated.
        value: ``[B, C, G, K]``.
        lengths: int ``[B]``, real tokens so far. Of C places the last ``min(lengths, C)`` are used.
    """

    key: Tensor
    value: Tensor
    lengths: Tensor

    def select(self, rows: Sequence[int] | Tensor) -> LocalCache:
        """Return the sequences ``rows``, in that order; a row may be repeated."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.lengths.device)
        return LocalCache(*(part.index_select(0, index) for part in self))

    def detach(self) -> LocalCache:
        """Return the value outside of every autograd graph."""
        return LocalCache(*(part.detach() for part in self))

    @property
    def num_bytes(self) -> int:
        """Size of the value, independent of how many tokens it stands for."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self)


def next_positions(
    key_mask: Tensor | None, batch: int, length: int, cache: LocalCache | None, device: torch.device
) -> Tensor:
    """Return the positions ``[B, T]`` of new tokens; only real ones count (pads repeat one)."""
    if key_mask is None:
        new = torch.arange(length, device=device).expand(batch, length)
    else:
        new = (key_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return new if cache is None else new + cache.lengths[:, None]


def extend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: LocalPattern,
    key_mask: Tensor | None = None,
    cache: LocalCache | None = None,
    changes: ScoreChanges = NOTHING,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, LocalCache | None]:
    """Attend from new tokens to themselves and the cached past.

    Args:
        query: ``[B, T, H, K]``, rotated.
        key: ``[B, T, G, K]``, rotated.
        value: ``[B, T, G, K]``.
        pattern: what a query sees, by positions that count real tokens.
        key_mask: bool ``[B, T]``, True at real new tokens (anywhere); None = all.
        cache: from the call before; unchanged.
        changes: as of ``local_attention``, without ``key_mask`` and ``mask``.
        scale: factor on the scores; default ``K**-0.5``.
        dropout: probability of dropping an attention weight.

    Returns:
        ``[B, T, max(H, G), K]`` (padded tokens: finite, of no meaning) and the cache, None without
        causality (nothing can be added then).
    """
    batch, length = query.shape[:2]
    order = None
    if key_mask is None:
        counts = torch.full((batch,), length, device=query.device)
    else:
        counts = key_mask.sum(dim=1)
        if length > 1:  # Real tokens move together; the order among them stays.
            order = key_mask.long().argsort(dim=1, descending=True, stable=True)
            query, key, value = (_reorder(part, order) for part in (query, key, value))
    num_kept = pattern.reach[0]
    start, seen = None, None
    if cache is not None:
        start = cache.lengths
        key = torch.cat((cache.key, key), dim=1)
        value = torch.cat((cache.value, value), dim=1)
        places = torch.arange(num_kept, device=query.device)
        kept = places >= num_kept - cache.lengths[:, None]
        seen = torch.cat((kept, kept.new_ones(batch, length)), dim=1)
    if key_mask is not None and not pattern.causal:  # A later pad would be seen.
        seen = torch.arange(length, device=query.device) < counts[:, None]
    heads = local_attention(
        query,
        key,
        value,
        pattern,
        changes._replace(key_mask=seen),
        start=start,
        scale=scale,
        dropout=dropout,
    )
    if order is not None:
        heads = _reorder(heads, order.argsort(dim=1))
    if not pattern.causal:
        return heads, None
    return heads, _kept(key, value, counts, num_kept, cache)


def _kept(
    key: Tensor, value: Tensor, counts: Tensor, num_kept: int, cache: LocalCache | None
) -> LocalCache:
    """Return the last ``num_kept`` real tokens of each row."""
    if cache is None:
        padding = (0, 0, 0, 0, num_kept, 0)
        key, value = (torch.nn.functional.pad(part, padding) for part in (key, value))
    index = counts[:, None] + torch.arange(num_kept, device=key.device)
    lengths = counts if cache is None else counts + cache.lengths
    return LocalCache(_reorder(key, index), _reorder(value, index), lengths)


def _reorder(x: Tensor, index: Tensor) -> Tensor:
    """Pick tokens: ``[B, T, ...]`` by ``[B, T']``."""
    shape = (*index.shape, *x.shape[2:])
    return x.gather(1, index.view(*index.shape, *(1 for _ in x.shape[2:])).expand(shape))


def attend_locally(
    attention: Attention,
    x: Tensor,
    pattern: LocalPattern,
    phases: Tensor | None = None,
    key_mask: Tensor | None = None,
    cache: LocalCache | None = None,
) -> tuple[Tensor, LocalCache | None]:
    """Run ``attention`` as self-attention within a window.

    Args:
        attention: its projections, norms and gate.
        x: ``[B, T, D]``.
        pattern: what a token sees.
        phases: rotary phases of the T positions.
        key_mask: bool ``[B, T]``, True at real tokens (either padding side); None = all.
        cache: what was kept of earlier tokens; unchanged.

    Returns:
        ``[B, T, D]`` and what to keep (None without causality).
    """
    present = attention.project(x, phases)
    heads, kept = extend(
        attention.project_queries(x, phases),
        present.key,
        present.value,
        pattern,
        key_mask,
        cache,
        dropout=attention.settings.dropout if attention.training else 0.0,
    )
    return attention.combine(heads, x), kept
