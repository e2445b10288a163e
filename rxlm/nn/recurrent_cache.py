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


class CarriedLayer(NamedTuple):
    """The state that one layer carries over: ``state`` ``[B, HV, K, V]``, ``started`` ``[B]``."""

    state: Tensor
    started: Tensor


class CarriedState(NamedTuple):
    """What the layers of a decoder carry from one interaction to the next, as a value.

    Attributes:
        states: ``[R, B, HV, K, V]`` float32 (float64 in a float64 model), one of each of the R
            layers that carry theirs.
        started: ``[B]`` bool, which conversations have had an interaction; the states of the
            others are zeros.
    """

    states: Tensor
    started: Tensor

    def layer(self, index: int) -> CarriedLayer:
        """Return what the ``index``-th of the R layers carries."""
        return CarriedLayer(self.states[index], self.started)

    def select(self, rows: Sequence[int] | Tensor) -> CarriedState:
        """Return the conversations ``rows``, in that order; a row may be repeated."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.states.device)
        return CarriedState(self.states.index_select(1, index), self.started.index_select(0, index))

    def where(self, kept: Tensor, other: CarriedState) -> CarriedState:
        """Return the own conversations where ``kept`` ``[B]`` is True, else those of ``other``."""
        return CarriedState(
            torch.where(kept[None, :, None, None, None], self.states, other.states),
            torch.where(kept, self.started, other.started),
        )

    def reset(self, rows: Tensor) -> CarriedState:
        """Return the value with the conversations where ``rows`` ``[B]`` is True without a past."""
        nothing = CarriedState(torch.zeros_like(self.states), torch.zeros_like(self.started))
        return nothing.where(rows, self)

    def to(self, device: torch.device | str) -> CarriedState:
        """Return the value on ``device``, in its own precision."""
        return CarriedState(self.states.to(device), self.started.to(device))

    def detach(self) -> CarriedState:
        """Return the value outside of every autograd graph."""
        return CarriedState(self.states.detach(), self.started)
