"""Causal softmax attention to a sliding window of real tokens, as one layer with a cache.

Not here: the operation (:mod:`rxlm.ops.local_attention`) and the layer with the arguments of other
packages (:mod:`rxlm.nn.local_attention`).

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rxlm.errors import UserError
from rxlm.nn.attention import Attention, AttentionSettings
from rxlm.nn.local_cache import LocalCache, attend_locally, next_positions
from rxlm.ops.local_pattern import LocalPattern
from rxlm.ops.rotary import rotary_phases


class WindowAttention(nn.Module):
    """Softmax attention to the last W real tokens, the token itself included."""

    def __init__(self, settings: AttentionSettings, window: int, rope_base: float | None) -> None:
        """Build the layer.

        Args:
            settings: of the attention; ``rotary`` says whether positions are used.
            window: W.
            rope_base: base of the rotary frequencies; None without rotary positions.

        Raises:
            UserError: for a window without a token.
        """
        super().__init__()
        if window < 1:
            raise UserError(f"window={window}: expected an integer >= 1 (1 = itself).")
        self.pattern, self.rope_base = LocalPattern.sliding(window), rope_base
        self.attention = Attention(settings)

    def forward(
        self, x: Tensor, key_mask: Tensor | None = None, cache: LocalCache | None = None
    ) -> tuple[Tensor, LocalCache]:
        """Attend over new tokens and the cached past.

        Args:
            x: ``[B, T, D]``.
            key_mask: ``[B, T]`` bool, True at real tokens, wherever they stand; None = all.
            cache: of the tokens before; None for nothing. Unchanged.

        Returns:
            ``[B, T, D]``, zeros at padding, and the cache with the new tokens.

        Raises:
            UserError: on a mask of another shape or type.
        """
        if key_mask is not None and (key_mask.shape != x.shape[:2] or key_mask.dtype != torch.bool):
            raise UserError(
                f"window attention: key_mask is {key_mask.dtype} {list(key_mask.shape)}, expected "
                f"torch.bool {list(x.shape[:2])}, True where a token is real."
            )
        phases = None
        if self.rope_base is not None:
            positions = next_positions(key_mask, x.shape[0], x.shape[1], cache, x.device)
            phases = rotary_phases(positions, self.attention.settings.head_dim, self.rope_base)
        y, kept = attend_locally(self.attention, x, self.pattern, phases, key_mask, cache)
        assert kept is not None  # The pattern is causal.
        return (y if key_mask is None else y.masked_fill(~key_mask.unsqueeze(-1), 0.0)), kept
