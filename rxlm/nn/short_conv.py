"""Short depth-wise convolution over tokens with a carried past, followed by SiLU.

Linear attention reads keys and queries of single tokens; the convolution lets each of them see its
few neighbours (ablations: arXiv:2412.06464, table 3; arXiv:2510.26692, table 1). Also here: moving
real tokens to the front of each row, so that neighbours are neighbours whatever the padding.

Shapes: B batch, T tokens, C channels, W width in tokens, X anything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rxlm.errors import UserError


class ShortConvolution(nn.Module):
    """One filter of W tokens a channel, without bias, then SiLU.

    Causal: the token and the W - 1 before it. Centred: the token, W // 2 before it and
    (W - 1) // 2 after it.
    """

    def __init__(self, num_channels: int, width: int, *, centred: bool = False) -> None:
        super().__init__()
        self.centred = centred
        # The last column weighs the token itself if causal, as in torch.nn.Conv1d.
        self.weight = nn.Parameter(torch.empty(num_channels, width))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    def forward(
        self, x: Tensor, key_mask: Tensor | None = None, recent: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolve.

        Args:
            x: ``[B, T, C]``.
            key_mask: ``[B, T]`` bool, True at real tokens, which come first in each row.
            recent: ``[B, W - 1, C]``, inputs before the first token; None = zeros. Not with a
                centred convolution.

        Returns:
            ``[B, T, C]`` (of no meaning at padding), and the inputs at the last W - 1 real tokens
            (centred: none, ``[B, 0, C]``).
        """
        length, width = x.shape[1], self.weight.shape[1]
        if self.centred:
            if key_mask is not None:
                x = x.masked_fill(~key_mask.unsqueeze(-1), 0.0)
            inputs = F.pad(x, (0, 0, width // 2, (width - 1) // 2))
            last = x.new_empty(x.shape[0], 0, x.shape[2])
        else:
            if recent is None:
                recent = x.new_zeros(x.shape[0], width - 1, x.shape[2])
            inputs = torch.cat((recent, x), dim=1)
            last = _last_inputs(inputs, key_mask, length, width)
        return self._convolve(inputs, length), last

    def over_chunks(self, x: Tensor, begins: Tensor) -> Tensor:
        """Convolve sequences that are cut into chunks, some of which begin anew. Causal only.

        Args:
            x: ``[B, N * C, channels]``, N chunks of C >= W - 1 tokens.
            begins: ``[B, N]`` bool, whether the chunk sees nothing of the one before.

        Returns:
            As :meth:`forward`, ``[B, N * C, channels]``.
        """
        width = self.weight.shape[1]
        size = x.shape[1] // begins.shape[1]
        if size < width - 1:
            raise UserError(
                f"conv_size={width} reaches over more than one chunk of {size} tokens: use "
                f"conv_size <= {size + 1}."
            )
        chunks = x.unflatten(1, (begins.shape[1], -1))
        tails = chunks[:, :-1, chunks.shape[2] - width + 1 :]
        tails = F.pad(tails, (0, 0, 0, 0, 1, 0)).masked_fill(begins[..., None, None], 0.0)
        inputs = torch.cat((tails, chunks), dim=2).flatten(0, 1)
        return self._convolve(inputs, chunks.shape[2]).view_as(x)

    def _convolve(self, inputs: Tensor, length: int) -> Tensor:
        # Sums of shifted products: no transposition of the channels, and faster than a grouped
        # convolution on a CPU.
        width = self.weight.shape[1]
        weight = self.weight.to(inputs.dtype)
        convolved = inputs[:, :length] * weight[:, 0]
        for offset in range(1, width):
            convolved = torch.addcmul(
                convolved, inputs[:, offset : offset + length], weight[:, offset]
            )
        return F.silu(convolved)


class RealTokensFirst:
    """Moves the real tokens of each row to its front, in their order, and back."""

    def __init__(self, key_mask: Tensor) -> None:
        """Find the order.

        Args:
            key_mask: ``[B, T]`` bool, True at real tokens.
        """
        self._order = torch.argsort((~key_mask).to(torch.uint8), dim=1, stable=True)
        self._back = torch.argsort(self._order, dim=1)
        self.key_mask = key_mask.gather(1, self._order)

    def pack(self, x: Tensor) -> Tensor:
        """Return ``[B, T, X]`` with the real tokens first; they are those of ``key_mask``."""
        return torch.take_along_dim(x, self._order.unsqueeze(-1), dim=1)

    def unpack(self, x: Tensor) -> Tensor:
        """Undo :meth:`pack`."""
        return torch.take_along_dim(x, self._back.unsqueeze(-1), dim=1)


def _last_inputs(inputs: Tensor, key_mask: Tensor | None, length: int, width: int) -> Tensor:
    """Return ``[B, W - 1, C]`` before the position after the last real token of ``inputs``.

    A copy: a view would keep all inputs in memory for as long as the cache lives.
    """
    if key_mask is None:
        return inputs[:, length : length + width - 1].clone()
    positions = torch.arange(width - 1, device=inputs.device)
    last = key_mask.sum(dim=1, keepdim=True) + positions
    return torch.take_along_dim(inputs, last.unsqueeze(-1), dim=1)
