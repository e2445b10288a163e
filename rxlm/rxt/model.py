"""The three networks of a Reactive Transformer, with one shared embedding. Tensors in and out.

Talking (tokens, sessions, the ``interact`` protocol) is in :mod:`rxlm.rxt.alpha`.

Shapes: B batch, T tokens, L layers, S slots, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rxlm.rxt.components import RxTDecoder, RxTEncoder
from rxlm.rxt.config import RxTConfig
from rxlm.rxt.freezing import FreezingMethods
from rxlm.rxt.memory_building import build_memory_attention


class RxTNetwork(FreezingMethods):
    """Decoder, encoder and memory attention. Holds weights only; memory is passed in and out."""

    def __init__(self, config: RxTConfig | dict[str, Any]) -> None:
        super().__init__()
        self.config = RxTConfig.parse(config)
        self.encoder = RxTEncoder(self.config.encoder)
        self.decoder = RxTDecoder(self.config.decoder)
        self.memory_attention = build_memory_attention(self.config.memory_attention)
        self.share_components()

    def share_components(self) -> None:
        """Let the decoder use the encoder's token embedding; done at construction, idempotent.

        Conversation memory is a value, so there is no memory to share and none to lose here.
        """
        self.decoder.load_shared_embedding(self.encoder.embedding)

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.encoder.embedding.weight.device

    @property
    def memory_dtype(self) -> torch.dtype:
        """In which precision memory is kept: that of the norm of its slots.

        Training in bfloat16 leaves that norm in float32, and the memory with it.
        """
        return self.memory_attention.slot_norm.scale.dtype

    def initial_memory(self, batch_size: int, *, seed: int = 0) -> Tensor:
        """Return the memory ``[L, B, S, D]`` that conversations start from."""
        return self.memory_attention.initial(
            batch_size, seed=seed, device=self.device, dtype=self.memory_dtype
        )

    def write_memory(self, slots: Tensor, ids: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Encode a finished turn ``[B, T]`` and return the memory after it, ``[L, B, S, D]``."""
        return self.memory_attention(slots, self.encoder(ids, key_mask), key_mask)
