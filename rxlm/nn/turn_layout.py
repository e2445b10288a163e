"""Turns of different lengths behind one another: one row a conversation, cut into small chunks.

A recurrence that is carried from turn to turn has to run over the turns in their order. Each turn
begins a new chunk, so a turn wastes less than a chunk of padding, and what happens where a turn
begins (a new memory, an empty convolution) happens where a chunk begins. Not here: what the tokens
are and what reads them.

Shapes: B conversations, N turns, T tokens of the longest turn, Q chunks of the longest
conversation, C tokens of a chunk, P = Q * C tokens of a row, X anything. Flat turns are numbered
``n * B + b``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_SIZE = 16
"""Turns of a conversation are short: larger chunks are mostly padding, smaller ones cost steps."""


class TurnLayout(NamedTuple):
    """Where every token of every turn stands.

    Attributes:
        lengths: int64 ``[N, B]``, tokens of each turn; 0 for a turn that does not exist.
        first_chunk: int64 ``[N + 1, B]``, the chunk with which each turn begins, and their number.
        turn: int64 ``[B, Q]``, the turn that each chunk belongs to (any, for chunks of padding).
        begins: bool ``[B, Q]``, whether a turn begins with the chunk.
        position: int64 ``[B, P]``, place of each token in its turn.
        mask: bool ``[B, P]``, which tokens are real.
        longest: T.
    """

    lengths: Tensor
    first_chunk: Tensor
    turn: Tensor
    begins: Tensor
    position: Tensor
    mask: Tensor
    longest: int

    @classmethod
    def of_lengths(cls, lengths: Tensor) -> TurnLayout:
        """Lay out turns of ``lengths`` int64 ``[N, B]`` tokens; at least one has a token."""
        chunks = (lengths + CHUNK_SIZE - 1) // CHUNK_SIZE
        first = torch.cat((torch.zeros_like(chunks[:1]), chunks.cumsum(0)))
        longest, num_chunks = torch.stack((lengths.max(), first[-1].max())).tolist()
        numbers = torch.arange(num_chunks, device=lengths.device)
        # The number of turns that have ended before the chunk is the number of its turn.
        turn = (first[1:, :, None] <= numbers).sum(0).clamp(max=len(lengths) - 1)
        exists = numbers < first[-1][:, None]
        within = numbers - first[:-1].T.gather(1, turn)
        inside = torch.arange(CHUNK_SIZE, device=lengths.device)
        position = (within[..., None] * CHUNK_SIZE + inside).flatten(1)
        length = lengths.T.gather(1, turn).repeat_interleave(CHUNK_SIZE, dim=1)
        mask = (position < length) & exists.repeat_interleave(CHUNK_SIZE, dim=1)
        return cls(lengths, first, turn, (within == 0) & exists, position, mask, longest)

    @property
    def place(self) -> Tensor:
        """Flat turn of each chunk, int64 ``[B * Q]``."""
        batch = self.turn.shape[0]
        rows = torch.arange(batch, device=self.turn.device)
        return (self.turn * batch + rows[:, None]).flatten()

    def index_of(self, place: Tensor, position: Tensor) -> Tensor:
        """Return where tokens stand in a flattened ``[B * P, X]``.

        Args:
            place: flat turns, any shape.
            position: places in them, of a shape that goes with it.
        """
        batch, width = self.mask.shape
        start = self.first_chunk[:-1].flatten()[place] * CHUNK_SIZE
        return place % batch * width + start + position

    def pack(self, turns: Tensor) -> Tensor:
        """Reorder ``[N * B, T, X]`` to ``[B, P, X]``; padding is filled with anything."""
        place = self.place.repeat_interleave(CHUNK_SIZE)
        position = self.position.flatten().clamp(max=self.longest - 1)
        flat = turns.flatten(0, 1).index_select(0, place * self.longest + position)
        return flat.unflatten(0, self.mask.shape)

    def unpack(self, packed: Tensor) -> Tensor:
        """Undo :meth:`pack`."""
        num_turns, batch = self.lengths.shape
        place = torch.arange(num_turns * batch, device=packed.device)[:, None]
        position = torch.arange(self.longest, device=packed.device)
        index = torch.where(self.turn_mask, self.index_of(place, position), 0)
        flat = packed.flatten(0, 1).index_select(0, index.flatten())
        return flat.unflatten(0, index.shape)

    @property
    def turn_mask(self) -> Tensor:
        """Real tokens of the padded turns, bool ``[N * B, T]``."""
        positions = torch.arange(self.longest, device=self.lengths.device)
        return positions < self.lengths.flatten()[:, None]

    def states_of_turns(self, states: Tensor) -> Tensor:
        """Choose states before each turn and after the last, ``[N + 1, B, ...]``.

        Args:
            states: ``[Q + 1, B, ...]``, before each chunk and after the last.
        """
        rows = torch.arange(states.shape[1], device=states.device)
        # What follows a conversation's last chunk is padding, which changes nothing.
        return states[self.first_chunk, rows]
