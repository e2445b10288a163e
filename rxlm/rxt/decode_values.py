"""What a decoder is given and returns, as values: a memory read once per turn, and the turn so far.

Shapes: B batch, P past and present tokens, S slots, G key/value heads, K head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rxlm.nn.attention import KeyValue
from rxlm.nn.local_cache import LocalCache
from rxlm.nn.memory_driven import MemoryCondition
from rxlm.nn.recurrent_cache import RecurrentCache
from rxlm.rxt.layers import LayerCache


class MemoryReading(NamedTuple):
    """A memory, projected for every decoder layer once per turn.

    ``layers``: one :class:`KeyValue` a layer, ``[B, S, G, K]``; ``mask``: bool ``[B, 1, 1, S]``
    or None when every slot is visible; ``conditions``: what MD-GDN takes from the memory, one a
    layer, None for layers of other types.
    """

    layers: tuple[KeyValue, ...]
    mask: Tensor | None = None
    conditions: tuple[MemoryCondition | None, ...] = ()


class DecodeCache(NamedTuple):
    """What decoding has seen of the current turn, as a value.

    ``layers``: what each layer keeps, :class:`KeyValue` ``[B, P, G, K]``,
    :class:`~rxlm.nn.local_cache.LocalCache` or :class:`~rxlm.nn.recurrent_cache.RecurrentCache`;
    ``key_mask``: bool ``[B, P]``, True at real tokens (P = 0 if no layer keeps all keys: then
    nothing here grows); ``lengths``: int ``[B]``, real tokens so far (the next position of each
    row).
    """

    layers: tuple[LayerCache, ...]
    key_mask: Tensor
    lengths: Tensor

    def select(self, rows: Sequence[int] | Tensor) -> DecodeCache:
        """Return the batch's ``rows``, in that order; a row may be repeated."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.lengths.device)
        return DecodeCache(
            tuple(_rows_of(layer, index) for layer in self.layers),
            self.key_mask.index_select(0, index),
            self.lengths.index_select(0, index),
        )


def _rows_of(layer: LayerCache, index: Tensor) -> LayerCache:
    if isinstance(layer, LocalCache | RecurrentCache):
        return layer.select(index)
    return KeyValue(*(part.index_select(0, index) for part in layer))
