"""Decoding that rows join and leave: one step a token for all, each row at a place of its own.

What :class:`rxlm.rxt.decode_step.DecodeStep` is for a batch that begins together, for one whose
rows come and go: every row gets the scores that it would get alone. Keys, values and the projected
memory lie in buffers of the batch's own, the rows in use in front; one that leaves is replaced by
the last. What is of constant size (recurrent states, local windows) is a value, joined and selected
as such. What a caller passes in never changes.

Not here: choosing tokens, and who joins (:mod:`rxlm.rxt.answer_batch`).

Shapes: B rows in use, N rows that join, T tokens of their longest prompt, L tokens that fit, S
slots, G key/value heads, K head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rxlm.nn.attention import KeyValue
from rxlm.nn.key_value_buffer import KeyValueBuffer
from rxlm.nn.local_cache import LocalCache
from rxlm.nn.memory_driven import MemoryCondition
from rxlm.nn.recurrent_cache import RecurrentCache
from rxlm.ops.rotary import rotary_phases
from rxlm.rxt.components import RxTDecoder
from rxlm.rxt.decode_step import StepInputs, decode_step
from rxlm.rxt.decode_values import DecodeCache, MemoryReading

FEWEST_ROWS = 4
"""Buffers have room for so many rows at first, and double when they are full."""
FEWEST_TOKENS = 64
"""As many tokens fit at first; this doubles, too."""

ValueCache = LocalCache | RecurrentCache


class Moves(NamedTuple):
    """Who goes where when rows leave: ``order[i]`` is the old place of the new row i."""

    order: list[int]
    sources: list[int]
    targets: list[int]


def fill_holes(num_rows: int, leaving: Collection[int]) -> Moves:
    """Return how the last of ``num_rows`` rows fill the places of those that leave."""
    order = list(range(num_rows - len(leaving)))
    staying = [row for row in range(len(order), num_rows) if row not in leaving]
    holes = [row for row in order if row in leaving]
    for hole, row in zip(holes, staying, strict=True):
        order[hole] = row
    return Moves(order, staying, holes)


class _RowBuffer:
    """Keys and values of rows in tensors with room for more, stored ``[rows, G, L, K]``."""

    def __init__(self, like: KeyValue, num_rows: int, length: int) -> None:
        heads, width = like.key.shape[2:]
        self._parts = [part.new_zeros(num_rows, heads, length, width) for part in like]

    def resize(self, num_rows: int, length: int) -> None:
        """Make room for more rows, or longer ones."""
        for index, old in enumerate(self._parts):
            # Zeros, not garbage: a masked value counts with weight zero, and 0 * inf is NaN.
            new = old.new_zeros(num_rows, old.shape[1], length, old.shape[3])
            new[: old.shape[0], :, : old.shape[2]] = old
            self._parts[index] = new

    def put(self, start: int, given: KeyValue) -> None:
        """Write rows ``[N, T, G, K]`` from row ``start`` on, at their first T columns."""
        count, length = given.key.shape[:2]
        for part, new in zip(self._parts, given, strict=True):
            part[start : start + count, :, :length] = new.transpose(1, 2)

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole rows."""
        for part in self._parts:
            part[targets] = part[sources]

    def rows(self, count: int) -> KeyValue:
        """Return views of the first ``count`` rows, ``[count, L, G, K]``."""
        key, value = (part[:count].transpose(1, 2) for part in self._parts)
        return KeyValue(key, value)


class DecodeBatch:
    """The rows that are being decoded; empty at first. Steps need evaluation mode, no gradients."""

    def __init__(self, decoder: RxTDecoder) -> None:
        """Make an empty batch for ``decoder``."""
        self._decoder = decoder
        self._device = decoder.embedding.weight.device
        self._places: list[int] = []
        self._keys: list[_RowBuffer | None] = []
        self._memory: list[_RowBuffer] = []
        self._values: list[ValueCache | None] = []
        self._conditions: list[MemoryCondition | None] = []
        self._phases: Tensor | None = None
        self._clear()

    @property
    def num_rows(self) -> int:
        """Number of rows B."""
        return len(self._places)

    @property
    def places(self) -> list[int]:
        """Tokens of each row so far."""
        return list(self._places)

    def join(self, memory: MemoryReading, cache: DecodeCache) -> None:
        """Take in N rows after those that there are.

        Args:
            memory: what the rows read, from :meth:`RxTDecoder.read_memory`, without a slot mask.
            cache: after their prompts, which are padded on the right.
        """
        assert memory.mask is None, "rows of a batch read all their slots"
        start, places = self.num_rows, cache.lengths.tolist()
        if not start:
            self._clear()
        longest = max(places) + 1
        if self._keys:
            self._reserve(start + len(places), longest)
        else:
            self._create(memory, cache, longest)
        for buffer, present in zip(self._keys, cache.layers, strict=True):
            if buffer is not None:
                buffer.put(start, KeyValue(*present[:2]))
        for buffer, reading in zip(self._memory, memory.layers, strict=True):
            buffer.put(start, reading)
        self._values = [
            None if not isinstance(new, ValueCache) else _joined(old, new)
            for old, new in zip(self._values, cache.layers, strict=True)
        ]
        self._conditions = [
            None if new is None else _joined(old, new)
            for old, new in zip(self._conditions, memory.conditions, strict=True)
        ]
        self._places += places
        self._lengths = torch.tensor(self._places, device=self._device)

    def leave(self, rows: Collection[int]) -> list[int]:
        """Drop ``rows``; return the old places of those that are left, in their new order."""
        moves = fill_holes(self.num_rows, set(rows))
        if not rows:
            return moves.order
        self._places = [self._places[row] for row in moves.order]
        if not self._places:
            self._clear()
            return moves.order
        index, sources, targets = (torch.tensor(part, device=self._device) for part in moves)
        if moves.sources:
            for buffer in (*self._keys, *self._memory):
                if buffer is not None:
                    buffer.move(sources, targets)
        self._values = [None if value is None else value.select(index) for value in self._values]
        self._conditions = [
            None
            if condition is None
            else MemoryCondition(*(part.index_select(0, index) for part in condition))
            for condition in self._conditions
        ]
        self._lengths = self._lengths.index_select(0, index)
        return moves.order

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read one token a row; return the scores ``[B, V]`` of what follows."""
        assert len(tokens) == self.num_rows > 0, "one token for each row"
        visible = max(self._places) + 1
        self._reserve(self.num_rows, visible)
        layers: list[Any] = list(self._values)
        mask = None
        if any(buffer is not None for buffer in self._keys):
            if min(self._places) + 1 < visible:
                mask = self._columns[:visible] <= self._lengths[:, None]
                mask = mask[:, None, None]
            # One column where all rows are at the same place: writing it is cheaper.
            column = self._lengths if mask is not None else self._lengths[:1]
            for index, buffer in enumerate(self._keys):
                if buffer is not None:
                    layers[index] = KeyValueBuffer(*buffer.rows(self.num_rows), column, visible)
        phases = None if self._phases is None else self._phases[self._lengths][:, None]
        reading = MemoryReading(
            tuple(buffer.rows(self.num_rows) for buffer in self._memory),
            conditions=tuple(self._conditions),
        )
        ids = torch.tensor(tokens, device=self._device)[:, None]
        inputs = StepInputs(ids, None, mask, phases, tuple(layers), reading)
        logits, kept = decode_step(self._decoder, inputs)
        self._values = [layer if isinstance(layer, ValueCache) else None for layer in kept]
        self._lengths = self._lengths + 1
        self._places = [place + 1 for place in self._places]
        return logits

    def _clear(self) -> None:
        """Forget the buffers: nobody is in them."""
        self._keys, self._memory, self._conditions = [], [], []
        self._values = [None for _ in self._decoder.all_layers]
        self._lengths = torch.zeros(0, dtype=torch.long, device=self._device)
        self._sizes = (0, 0)

    def _create(self, memory: MemoryReading, cache: DecodeCache, longest: int) -> None:
        num_rows = max(FEWEST_ROWS, len(cache.lengths))
        length = max(FEWEST_TOKENS, 2 * longest)
        self._keys = [
            None if isinstance(layer, ValueCache) else _RowBuffer(layer, num_rows, length)
            for layer in cache.layers
        ]
        self._memory = [_RowBuffer(layer, num_rows, layer.key.shape[1]) for layer in memory.layers]
        self._conditions = [None for _ in memory.conditions]
        self._set_sizes(num_rows, length)

    def _reserve(self, num_rows: int, length: int) -> None:
        """Make room for so many rows of so many tokens."""
        rows, tokens = self._sizes
        if num_rows <= rows and length <= tokens:
            return
        new_rows = rows if num_rows <= rows else max(num_rows, 2 * rows)
        new_tokens = tokens if length <= tokens else max(length, 2 * tokens)
        for buffer in self._keys:
            if buffer is not None:
                buffer.resize(new_rows, new_tokens)
        if new_rows > rows:
            for buffer in self._memory:
                buffer.resize(new_rows, buffer.rows(0).key.shape[1])
        self._set_sizes(new_rows, new_tokens)

    def _set_sizes(self, num_rows: int, length: int) -> None:
        self._sizes = (num_rows, length)
        self._columns = torch.arange(length, device=self._device)
        config = self._decoder.config
        if not config.use_nope:
            self._phases = rotary_phases(self._columns, config.head_dim_resolved, config.rope_base)


def _joined(old: Any, new: Any) -> Any:
    """Return the rows of two named tuples of tensors, one after the other."""
    if old is None:
        return new
    cat: Callable[..., Tensor] = torch.cat
    return type(new)(*(cat((one, other)) for one, other in zip(old, new, strict=True)))
