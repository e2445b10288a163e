"""Causal moving average over tokens: what the gates of the drop-in layer are computed from.

Shapes: B batch, T tokens, C channels, W width in tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CausalAvgPool1d(nn.Module):
    """Mean of the token and the W - 1 before it; those before the first repeat it.

    The kernel lies where TPTT has it (``causal_conv.conv1d``), frozen: its weights are loaded, and
    used as they are.
    """

    def __init__(self, num_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        convolution = nn.Conv1d(num_channels, num_channels, kernel_size, groups=num_channels)
        self.causal_conv = nn.ModuleDict({"conv1d": convolution})
        with torch.no_grad():
            convolution.weight.fill_(1 / kernel_size)
            assert convolution.bias is not None
            convolution.bias.zero_()
        self.causal_conv.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Average ``[B, T, C]`` to ``[B, T, C]``."""
        if not x.shape[1]:
            return x
        first = x[:, :1].expand(-1, self.kernel_size - 1, -1)
        return self.windows(torch.cat((first, x), dim=1))

    def windows(self, x: Tensor) -> Tensor:
        """Average ``[B, W - 1 + T, C]``, the tokens before the first included, to ``[B, T, C]``."""
        convolution = self.causal_conv["conv1d"]
        assert isinstance(convolution, nn.Conv1d) and convolution.bias is not None
        weight, bias = convolution.weight.to(x.dtype), convolution.bias.to(x.dtype)
        length = x.shape[1] - self.kernel_size + 1
        # Shifted sums: no transposition, and faster than a grouped convolution on a CPU.
        pooled = bias.expand(x.shape[0], length, -1)
        for offset in range(self.kernel_size):
            pooled = torch.addcmul(pooled, x[:, offset : offset + length], weight[:, 0, offset])
        return pooled
