"""One token a row, over and over: decoding with all that can be prepared prepared.

The same layers as :meth:`rxlm.rxt.components.RxTDecoder.forward`, which stays the plain form (and
does the prompt), without what a single token does not need: keys and values are written into
buffers (:mod:`rxlm.nn.key_value_buffer`), rotary phases come from a table, there is no mask while
every row has a token in every column. Compiled on request (:mod:`rxlm.rxt.decode_compile`): then
all shapes are fixed.

A step belongs to the generation that made it. Its buffers are its own copies; what the caller
passed in never changes. Not here: choosing tokens (:mod:`rxlm.rxt.generation`).

Shapes: B conversations, P tokens so far, L tokens that fit, D width, V vocabulary, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rxlm.nn.attention import KeyValue
from rxlm.nn.key_value_buffer import KeyValueBuffer
from rxlm.ops.rotary import rotary_phases
from rxlm.rxt.components import RxTDecoder
from rxlm.rxt.decode_compile import compiled_step, signature
from rxlm.rxt.decode_layout import keep_by_columns
from rxlm.rxt.decode_values import DecodeCache, MemoryReading
from rxlm.rxt.layers import LayerCache

SMALLEST_SIZE = 64
"""L of a compiled step is a power of two, at least this: few lengths, few compilations."""
FIRST_ROOM = 256
"""Buffers have room for at most so many tokens at first and double when they are full: a turn that
could be long, and is short, allocates little."""

Kept = tuple[LayerCache | KeyValueBuffer, ...]


class StepInputs(NamedTuple):
    """What one step computes from; tensors of fixed shapes.

    ``ids``: int64 ``[B, 1]``. ``real``: bool ``[B, 1]``, which rows have a token; None = all.
    ``mask``: bool ``[B, 1, 1, P]`` or ``[B, 1, 1, L]``, which keys are visible; None = all.
    ``phases``: ``[B, 1, K/2]``, or with real and imaginary part ``[B, 1, K/2, 2]``; None without
    rotary embedding. ``layers``: what each layer kept.
    """

    ids: Tensor
    real: Tensor | None
    mask: Tensor | None
    phases: Tensor | None
    layers: Kept
    memory: MemoryReading | None


def decode_step(decoder: RxTDecoder, inputs: StepInputs) -> tuple[Tensor, Kept]:
    """Return the scores ``[B, V]`` of what follows, and what the layers keep.

    Buffers of keys and values are written in place and returned as they are.
    """
    x = decoder.embed(inputs.ids)
    kept: list[LayerCache | KeyValueBuffer] = []
    for index, layer in enumerate(decoder.all_layers):
        past = inputs.layers[index]
        x, present = layer(
            x,
            mask=inputs.mask,
            phases=inputs.phases,
            key_mask=inputs.real,
            past=past,
            **decoder.reading_of(index, inputs.memory),
        )
        kept.append(past if isinstance(past, KeyValueBuffer) else present)
    return decoder.logits(decoder.head_norm(x))[:, -1], tuple(kept)


class DecodeStep:
    """The steps of one turn: call it with the tokens that were chosen, get the next scores."""

    def __init__(
        self,
        decoder: RxTDecoder,
        memory: MemoryReading | None,
        cache: DecodeCache,
        room: int,
        *,
        compiled: bool = False,
    ) -> None:
        """Prepare for ``room`` further tokens.

        Args:
            decoder: in evaluation mode whenever a step is made.
            memory: what the turn reads.
            cache: after the prompt; copied, not changed.
            room: how many tokens may follow.
            compiled: run the step through ``torch.compile``; on a CPU, the decoder's matrices are
                kept by columns from then on (:mod:`rxlm.rxt.decode_layout`).

        Raises:
            UserError: if the step should be compiled and there is no compiler.
        """
        self._decoder, self._memory, self._compiled = decoder, memory, compiled
        if compiled:
            keep_by_columns(decoder)
        self._has_keys = any(isinstance(layer, KeyValue) for layer in cache.layers)
        batch, past = cache.key_mask.shape
        # Where no layer keeps keys, positions alone are counted.
        self._column = past if self._has_keys else int(cache.lengths.max())
        self._most = self._column + room
        self._lengths = cache.lengths.clone()
        # Which columns are real; None while all are.
        self._seen: Tensor | None = None
        if self._has_keys and (compiled or not bool(cache.key_mask.all())):
            self._seen = cache.key_mask
        self._layers: Kept = cache.layers
        self._phases: Tensor | None = None
        self._shared_column: Tensor | None = None
        self._run: Callable[[StepInputs], tuple[Tensor, Kept]] = partial(decode_step, decoder)
        # Of the inputs that the code was made for, and whether those of all further steps have it.
        self._signature: object = None
        self._settled = False
        self._sizes = (batch, 0)
        self._all_real = torch.ones(batch, 1, dtype=torch.bool, device=cache.key_mask.device)
        self._resize(self._column + min(room, FIRST_ROOM))

    def _resize(self, size: int) -> None:
        """Make room for ``size`` tokens, those so far included."""
        batch, device = self._sizes[0], self._lengths.device
        if self._compiled:
            size = max(SMALLEST_SIZE, 1 << (size - 1).bit_length())
        self._settled = False
        self._sizes = (batch, size)
        self._layers = tuple(
            KeyValueBuffer.start(KeyValue(*layer[:2]), self._column, size)
            if isinstance(layer, KeyValue | KeyValueBuffer)
            else layer
            for layer in self._layers
        )
        if self._seen is not None:
            seen = self._seen[:, : self._column]
            self._seen = seen.new_zeros(self._sizes)
            self._seen[:, : self._column] = seen
        config = self._decoder.config
        if not config.use_nope:
            positions = torch.arange(size, device=device)
            phases = rotary_phases(positions, config.head_dim_resolved, config.rope_base)
            self._phases = torch.view_as_real(phases) if self._compiled else phases

    def __call__(self, tokens: list[int | None]) -> Tensor:
        """Read one token a row (None: the row has ended) and return the scores ``[B, V]``."""
        device = self._lengths.device
        if self._column == self._sizes[1]:
            self._resize(min(2 * self._column, self._most))
        ids = torch.tensor([[token or 0] for token in tokens], device=device)
        ended = None in tokens
        real = self._all_real if self._compiled else None
        if ended:
            real = torch.tensor([[token is not None] for token in tokens], device=device)
        phases = self._phases
        inputs = StepInputs(
            ids,
            real,
            self._mask(real if ended else None),
            None if phases is None else phases.index_select(0, self._lengths).unsqueeze(1),
            self._placed(),
            self._memory,
        )
        if self._compiled and not self._settled:
            self._settle(inputs)
        logits, layers = self._run(inputs)
        self._layers = layers
        self._lengths += real[:, 0] if ended and real is not None else 1
        self._column += 1
        return logits

    def _settle(self, inputs: StepInputs) -> None:
        """Take the code for inputs like these, until two steps had the same.

        What layers keep comes from the prompt first and then from the code itself, which may lay
        it out in memory in another way; from the second equal step on it stays as it is.
        """
        found = signature(inputs)
        self._settled = found == self._signature
        if not self._settled:
            self._signature = found
            self._run = compiled_step(decode_step, self._decoder, inputs)

    def _placed(self) -> Kept:
        """Return what the layers kept, buffers with the column of this token."""
        buffer = next((x for x in self._layers if isinstance(x, KeyValueBuffer)), None)
        if buffer is None:
            return self._layers
        buffer.column.fill_(self._column)
        if self._compiled and self._shared_column is buffer.column:
            return self._layers
        self._shared_column = buffer.column
        visible = None if self._compiled else self._column + 1
        # One column for all: the layers write the same place.
        return tuple(
            KeyValueBuffer(layer.key, layer.value, buffer.column, visible)
            if isinstance(layer, KeyValueBuffer)
            else layer
            for layer in self._layers
        )

    def _mask(self, real: Tensor | None) -> Tensor | None:
        if not self._has_keys:
            return None
        if self._seen is None:
            if real is None:
                return None
            # The first row that ended: until now every column was real.
            self._seen = torch.ones(self._sizes, dtype=torch.bool, device=real.device)
        self._seen[:, self._column] = True if real is None else real[:, 0]
        seen = self._seen if self._compiled else self._seen[:, : self._column + 1]
        return seen[:, None, None]
