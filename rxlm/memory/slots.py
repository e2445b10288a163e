"""The initial short-term memory. Memory itself is a plain tensor value: passed in, returned.

Shapes: L layers, B batch, S slots, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

InitType = Literal["learned", "zeros", "ones", "normal", "standard", "uniform"]


class InitialMemory(nn.Module):
    """Makes the slots a conversation starts from.

    ``learned`` gives every slot a trained start, the same for every conversation; ``zeros`` and
    ``ones`` are constants; ``normal`` (std 0.01), ``standard`` (std 1) and ``uniform`` (0..0.01)
    are drawn from a seed, so that the same seed always starts the same conversation.
    """

    def __init__(
        self, num_layers: int, num_slots: int, dim: int, *, init_type: InitType, std: float
    ) -> None:
        super().__init__()
        self.shape = (num_layers, num_slots, dim)
        self.init_type = init_type
        if init_type == "learned":
            self.start = nn.Parameter(torch.randn(self.shape) * std)
            self.start._no_weight_decay = True  # type: ignore[attr-defined]
            self.start._full_precision = True  # type: ignore[attr-defined]

    def forward(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return initial slots ``[L, B, S, D]``.

        Args:
            batch_size: B.
            seed: of the drawn kinds; row b uses ``seed + b``, so a row of a batch starts like the
                single conversation with that seed.
            device: where the slots live; ``learned`` slots live with the module.
            dtype: of the constant and drawn kinds.
        """
        num_layers, num_slots, dim = self.shape
        if self.init_type == "learned":
            return self.start[:, None].expand(-1, batch_size, -1, -1)
        if self.init_type in ("zeros", "ones"):
            value = 0.0 if self.init_type == "zeros" else 1.0
            return torch.full(
                (num_layers, batch_size, num_slots, dim), value, device=device, dtype=dtype
            )
        rows = [self._draw(seed + row) for row in range(batch_size)]
        return torch.stack(rows, dim=1).to(device=device, dtype=dtype)

    def _draw(self, seed: int) -> Tensor:
        # Drawn on the CPU so that a seed means the same memory on every device.
        generator = torch.Generator().manual_seed(seed)
        if self.init_type == "uniform":
            return torch.rand(self.shape, generator=generator) * 0.01
        return torch.randn(self.shape, generator=generator) * (
            0.01 if self.init_type == "normal" else 1.0
        )
