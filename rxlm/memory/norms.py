"""Norms of the memory slots. All of them normalise: rms 1 per element after the full norm.

Shapes: L layers, B batch, S slots, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

MemoryNormType = Literal["layer", "rms", "adaptive", "positional", "classic-rms"]


class MemoryNorm(nn.Module):
    """Normalise slots of all layers at once.

    * ``classic-rms``: RMSNorm over the width, learned scale.
    * ``rms``, ``layer``: RMS or LayerNorm mixed with the input, ``g * norm(x) + (1 - g) * x`` with
      one learned ``g = sigmoid(gate)`` a layer.
    * ``adaptive``: like ``rms``, but the mean square is ``decay * (mean over all slots of this
      conversation) + (1 - decay) * (the slot's own)``: a slot keeps part of its relative size.
    * ``positional``: like ``rms`` with one gate and one scale a slot.

    The statistics come from the slots at hand only: nothing is remembered between calls.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        dim: int,
        *,
        norm_type: MemoryNormType,
        init_gate: float = -2.0,
        per_dim_scale: bool = False,
        decay: float = 0.9,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm_type = norm_type
        self.decay = decay
        self.eps = eps
        per_slot = num_slots if norm_type == "positional" else 1
        width = dim if per_dim_scale or norm_type in ("classic-rms", "layer") else 1
        self.scale = nn.Parameter(torch.ones(num_layers, 1, per_slot, width))
        if norm_type != "classic-rms":
            self.gate = nn.Parameter(torch.full((num_layers, 1, per_slot, 1), init_gate))
        for parameter in self.parameters():
            # Stacking gives scales and gates the shape of matrices; they are vectors.
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
            parameter._full_precision = True  # type: ignore[attr-defined]

    def forward(self, slots: Tensor) -> Tensor:
        """Normalise ``[L, B, S, D]``, computed in fp32, returned in the input's dtype."""
        x = slots.float()
        if self.norm_type == "layer":
            x = x - x.mean(dim=-1, keepdim=True)
        mean_square = x.square().mean(dim=-1, keepdim=True)
        if self.norm_type == "adaptive":
            pooled = mean_square.mean(dim=-2, keepdim=True)
            mean_square = self.decay * pooled + (1.0 - self.decay) * mean_square
        normed = x * torch.rsqrt(mean_square + self.eps) * self.scale.float()
        if self.norm_type != "classic-rms":
            normed = torch.lerp(slots.float(), normed, torch.sigmoid(self.gate.float()))
        return normed.to(slots.dtype)
