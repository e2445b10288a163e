"""What a linear attention layer has seen, as a value of constant size.

Shapes: B batch, HV value heads, K/V head dimensions, W width of the short convolution, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RecurrentCache(NamedTuple):
    """The past of B sequences: as large after one token as after a million.

    Attributes:
        state: ``[B, HV, K, V]`` float32 (float64 in a float64 model), what the mechanism carries.
        recent: ``[B, W - 1, C]``, the inputs of the short convolution at the last real tokens,
            zeros before the first; ``[B, 0, C]`` for a layer without short convolution.
    """

    state: Tensor
    recent: Tensor

    def select(self, rows: Sequence[int] | Tensor) -> RecurrentCache:
        """Return the sequences ``rows``, in that order; a row may be repeated."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.state.device)
        return RecurrentCache(self.state.index_select(0, index), self.recent.index_select(0, index))

    def detach(self) -> RecurrentCache:
        """Return the value outside of every autograd graph."""
        return RecurrentCache(self.state.detach(), self.recent.detach())

    @property
    def num_bytes(self) -> int:
        """Size of the value, independent of how many tokens it stands for."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self)
