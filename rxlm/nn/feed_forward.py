"""Position-wise feed-forward networks, plain and gated (Shazeer 2020, arXiv 2002.05202).

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _linear(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "swish": F.silu,
    "silu": F.silu,
    "linear": _linear,
    "sigmoid": torch.sigmoid,
}


class FeedForward(nn.Module):
    """``down(act(up(x)))``, or gated ``down(act(gate(x)) * up(x))``."""

    def __init__(
        self, dim: int, hidden_dim: int, *, activation: str, gated: bool, dropout: float
    ) -> None:
        """Build the network.

        Args:
            dim: D.
            hidden_dim: inner width.
            activation: a key of :data:`ACTIVATIONS`.
            gated: whether to multiply by a gate (SwiGLU with ``swish``).
            dropout: probability on the inner activations.
        """
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gated = gated
        # Gate and up projection share one matrix product.
        self.up = nn.Linear(dim, hidden_dim * (2 if gated else 1), bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, T, D]`` to ``[B, T, D]``."""
        hidden = self.up(x)
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = self.activation(gate) * hidden
        else:
            hidden = self.activation(hidden)
        return self.down(self.dropout(hidden))
