"""ALiBi: attention with linear biases (Press et al. 2022, arXiv 2108.12409, section 3).

A head with slope m adds ``-m * (i - j)`` to the score of query i and key j. The part ``-m * i``
would cancel in the softmax; it stays, because differences of large numbers are lost in bf16.

Shapes: B batch, T queries, P keys, H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def alibi_slopes(num_heads: int, device: torch.device | None = None) -> Tensor:
    """Return the slopes ``[H]``, fp32: ``2**(-8 h / H)`` for h = 1 .. H, H a power of two.

    Other head counts take the slopes of the power of two below, and every second one of the power
    of two above, as the authors' code does.
    """
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * head / below) for head in range(1, below + 1)]
    slopes += [2.0 ** (-4.0 * head / below) for head in range(1, 2 * (num_heads - below), 2)]
    return torch.tensor(slopes, device=device)


def alibi_bias(query_positions: Tensor, key_positions: Tensor, num_heads: int) -> Tensor:
    """Return what is added to the scores, fp32 ``[B, H, T, P]``; what is masked does not matter.

    Args:
        query_positions: ``[B, T]``.
        key_positions: ``[B, P]``.
        num_heads: H.
    """
    distance = (key_positions[:, None, :] - query_positions[:, :, None]).float()
    return alibi_slopes(num_heads, distance.device)[:, None, None] * distance[:, None]
