"""Residual gates: how much of a slot's update is written over the slot.

Shapes: L layers, B batch, S slots, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rxlm.ops.stretch import stretched

GateType = Literal["static", "elementwise", "linear"]


@dataclass(frozen=True)
class GateSettings:
    """Form of a residual gate.

    Attributes:
        enabled: False gives the plain sum ``old + new``.
        gate_type: ``static``: a learned constant; ``elementwise``: a learned weight and bias on
            the content ``norm(old) + new`` of each element; ``linear``: a linear map of
            ``[norm(old), new]``.
        per_slot: ``static``: one constant a slot (else one a layer); otherwise: one gate value a
            slot (else one for every element).
        init: initial gate logit; negative means that a slot mostly keeps what it holds.
        tanh: gate ``(1 + tanh(w)) / 2`` in place of ``sigmoid(w)``. Both are convex, so the size
            of the memory cannot grow from turn to turn.
        residual: False returns the update alone.
        stretch: above 0, the gate closes and opens altogether (:func:`rxlm.ops.stretch.stretched`).
    """

    enabled: bool = True
    gate_type: GateType = "linear"
    per_slot: bool = True
    init: float = -1.5
    tanh: bool = False
    residual: bool = True
    stretch: float = 0.0


class ResidualGate(nn.Module):
    """``g * new + (1 - g) * old`` for the slots of all layers at once."""

    def __init__(
        self, num_layers: int, num_slots: int, dim: int, settings: GateSettings, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.settings = settings
        self.eps = eps
        if not (settings.enabled and settings.residual):
            return
        slots = num_slots if settings.per_slot or settings.gate_type != "static" else 1
        self.bias = nn.Parameter(torch.full((num_layers, 1, slots, 1), settings.init))
        self.bias._no_weight_decay = True  # type: ignore[attr-defined]
        if settings.gate_type == "elementwise":
            self.weight = nn.Parameter(torch.zeros(num_layers, 1, 1, dim))
            self.weight._no_weight_decay = True  # type: ignore[attr-defined]
        elif settings.gate_type == "linear":
            outputs = 1 if settings.per_slot else dim
            self.weight = nn.Parameter(torch.randn(num_layers, 2 * dim, outputs) * 0.02)
        for parameter in self.parameters():
            # As the memory itself: small changes of many turns must not be rounded away.
            parameter._full_precision = True  # type: ignore[attr-defined]

    def forward(self, old: Tensor, new: Tensor) -> Tensor:
        """Combine old slots and their update, both ``[L, B, S, D]``, in the dtype of the old.

        Under autocast the update arrives in bf16; the memory must not, because small changes of
        many turns would be rounded away.
        """
        new = new.to(old.dtype)
        if not self.settings.residual:
            return new
        if not self.settings.enabled:
            return old + new
        return torch.lerp(old, new, self.value(old, new).to(old.dtype))

    def value(self, old: Tensor, new: Tensor) -> Tensor:
        """Return the gate in [0, 1], broadcastable to ``[L, B, S, D]``: 1 overwrites, 0 keeps."""
        logit = self._logit(old, new)
        share = (1.0 + torch.tanh(logit)) / 2.0 if self.settings.tanh else torch.sigmoid(logit)
        return stretched(share, self.settings.stretch)

    def _logit(self, old: Tensor, new: Tensor) -> Tensor:
        if self.settings.gate_type == "static":
            return self.bias
        normed = old * torch.rsqrt(old.square().mean(dim=-1, keepdim=True) + self.eps)
        if self.settings.gate_type == "elementwise":
            content = (normed + new) * self.weight
            if self.settings.per_slot:
                content = content.sum(dim=-1, keepdim=True)
            return content + self.bias
        content = torch.cat((normed, new), dim=-1)
        flat = torch.bmm(content.flatten(1, 2), self.weight)
        return flat.unflatten(1, content.shape[1:3]) + self.bias
