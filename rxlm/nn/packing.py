"""Several sequences in one row: whatever mixes tokens sees each sequence by itself.

A packed row has almost no padding, so all that treats tokens singly (embedding, feed-forward,
norms, scores) wastes nothing. What mixes tokens gets the sequences unpacked, each from its own
beginning: attention cannot look across, a recurrence or a convolution begins with nothing, and
positions count from 0. That is exact for every mixer, by construction, and costs it padding to the
longest of each length group; a mask inside the row would cost softmax attention the square of the
whole row. Not here: which sequences share a row (``rxlm.training``).

Shapes: B rows, T tokens, S sequences of a group, L tokens of its longest, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LengthGroup(NamedTuple):
    """Sequences of similar length: ``places`` int64 ``[S, L]`` says where in ``[B * T]`` their
    tokens are (anything at padding), ``mask`` bool ``[S, L]`` which are real."""

    places: Tensor
    mask: Tensor


class PackedLayout(NamedTuple):
    """Where the sequences of packed rows are.

    Attributes:
        position: int64 ``[B, T]``, the place of each token in its sequence; 0 at padding.
        groups: all sequences, by length.
    """

    position: Tensor
    groups: tuple[LengthGroup, ...]

    @classmethod
    def of_segments(cls, segments: Tensor, num_groups: int = 4) -> PackedLayout:
        """Find the sequences.

        Args:
            segments: int ``[B, T]``: tokens of a sequence bear the same number >= 1 and stand
                together, those of the next one another number; 0 is padding.
            num_groups: more groups mean less padding and more calls of the mixer.
        """
        before = F.pad(segments[:, :-1], (1, 0))
        begins = ((segments != before) & (segments > 0)).flatten()
        real = (segments > 0).flatten()
        first = begins.nonzero().squeeze(1)
        sequence = (begins.cumsum(0) - 1).clamp(min=0)
        lengths = torch.zeros_like(first).index_add_(0, sequence[real], real[real].long())
        place = torch.arange(segments.numel(), device=segments.device)
        # A start more than there are, for rows without any sequence.
        position = torch.where(real, place - F.pad(first, (0, 1))[sequence], 0).view(segments.shape)
        order = lengths.argsort(stable=True)
        size = max(1, -(-len(order) // num_groups))
        groups = []
        for chosen in order.split(size) if len(order) else ():
            longest = int(lengths[chosen].max())
            within = torch.arange(longest, device=segments.device)
            mask = within < lengths[chosen][:, None]
            index = torch.where(mask, first[chosen][:, None] + within, first[chosen][:, None])
            groups.append(LengthGroup(index, mask))
        return cls(position, tuple(groups))

    @property
    def num_mixed(self) -> int:
        """Tokens that a mixer computes, padding included."""
        return sum(group.mask.numel() for group in self.groups)

    def apply(self, mix: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        """Mix the tokens of each sequence by itself.

        Args:
            mix: from ``[S, L, D]`` and the mask of the real tokens, which come first, to
                ``[S, L, D]``.
            x: ``[B, T, D]``.

        Returns:
            ``[B, T, D]``, zeros at padding.
        """
        if not self.groups:
            return torch.zeros_like(x)
        flat = x.flatten(0, 1)
        mixed = [mix(flat[group.places], group.mask)[group.mask] for group in self.groups]
        order = torch.cat([group.places[group.mask] for group in self.groups])
        values = torch.cat(mixed)
        return values.new_zeros(flat.shape).index_copy(0, order, values).view(x.shape)
