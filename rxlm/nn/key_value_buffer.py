"""Keys and values of one generation in tensors of fixed size: written in place, nothing grows.

Appending to a :class:`~rxlm.nn.attention.KeyValue` copies all that is there, for every token and
layer. A buffer is allocated once for many tokens; one costs a column. It is not a value:
whoever makes it owns it, and hands it to nobody else. It copies what it starts from.

Shapes: B batch, P tokens so far, L tokens that fit, G key/value heads, K head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rxlm.nn.attention import KeyValue


class KeyValueBuffer(NamedTuple):
    """Keys and values, each ``[B, L, G, K]`` (a view of ``[B, G, L, K]``), and the next column.

    ``column``: int64, where the next token is written: ``[1]`` for all rows, or ``[B]`` where rows
    are at different places (a mask then hides what is not theirs). ``visible``: how many columns
    are read after that: the number of tokens of the longest row; None = all L, where a mask hides
    the empty ones (static shapes, as compilers want them).
    """

    key: Tensor
    value: Tensor
    column: Tensor
    visible: int | None

    @classmethod
    def start(cls, past: KeyValue, length: int, size: int) -> KeyValueBuffer:
        """Return a buffer of ``size`` columns that begins with a copy of ``length`` of ``past``."""
        batch, _, heads, width = past.key.shape

        def longer(part: Tensor) -> Tensor:
            # Zeros, not garbage: a masked value still counts with weight zero, and 0 * inf is NaN.
            room = part.new_zeros(batch, heads, size, width)
            room[:, :, :length] = part[:, :length].transpose(1, 2)
            return room.transpose(1, 2)

        column = torch.tensor([length], device=past.key.device)
        return cls(longer(past.key), longer(past.value), column, length + 1)

    def append(self, other: KeyValue) -> KeyValue:
        """Write the keys and values of one token, ``[B, 1, G, K]``; return those to attend to."""
        if len(self.column) == 1:
            self.key.index_copy_(1, self.column, other.key)
            self.value.index_copy_(1, self.column, other.value)
        else:
            places = (torch.arange(len(self.column), device=self.column.device), self.column)
            self.key.index_put_(places, other.key[:, 0])
            self.value.index_put_(places, other.value[:, 0])
        if self.visible is None:
            return KeyValue(self.key, self.value)
        return KeyValue(self.key[:, : self.visible], self.value[:, : self.visible])
