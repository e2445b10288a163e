"""What :class:`~rxlm.nn.local_attention.LocalAttention` accepts as masks, and how axes are seen.

Shapes: B batch, H heads, X packed batch and heads, N tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rxlm.errors import UserError


def as_bool(mask: Tensor, name: str) -> Tensor:
    """Return a mask of booleans, or of numbers 0 and 1, as booleans."""
    if mask.dtype == torch.bool:
        return mask
    if not ((mask == 0) | (mask == 1)).all():
        raise UserError(
            f"{name} of {mask.dtype} holds other values than 0 and 1: give True (or 1) at what may "
            "be seen. Numbers to add to scores go into attn_bias."
        )
    return mask != 0


def key_mask(mask: Tensor, packed: int, length: int) -> Tensor:
    """Return ``mask`` ``[B, N]`` as booleans, if B divides X = ``packed`` and N = ``length``."""
    if mask.ndim != 2 or mask.shape[1] != length or mask.shape[0] < 1 or packed % mask.shape[0]:
        raise UserError(
            f"mask of shape {list(mask.shape)}: expected [batch, {length}] with a batch that "
            f"divides {packed} sequences."
        )
    return as_bool(mask, "mask")


def pair_mask(mask: Tensor, packed: int, length: int) -> Tensor:
    """Return ``mask`` ``[N, N]`` or ``[B, N, N]`` as booleans, if it fits."""
    fits = mask.ndim in (2, 3) and list(mask.shape[-2:]) == [length, length]
    if not fits or (mask.ndim == 3 and packed % mask.shape[0]):
        raise UserError(
            f"attn_mask of shape {list(mask.shape)}: expected [{length}, {length}], or [batch, "
            f"{length}, {length}] with a batch that divides {packed} sequences."
        )
    return as_bool(mask, "attn_mask")


def layout(
    q: Tensor, mask: Tensor | None, attn_mask: Tensor | None, bias: Tensor | None
) -> tuple[int, int]:
    """Return how the packed sequences are seen, as batch and heads: what is given decides."""
    packed = math.prod(q.shape[:-2])
    batches = {len(attn_mask)} if attn_mask is not None and attn_mask.ndim == 3 else set()
    if mask is not None:
        batches.add(len(mask))
    if len(batches) > 1:
        raise UserError(f"mask and attn_mask are of {sorted(batches)} rows: give one batch size.")
    if batches:
        batch = batches.pop()
        if bias is not None and (packed // batch) % bias.shape[0]:
            raise UserError(
                f"attn_bias of {bias.shape[0]} heads, but a mask of {batch} rows makes "
                f"{packed // batch} heads: shape q [batch, heads, tokens, dim], mask [batch, "
                "tokens]."
            )
        return batch, packed // batch
    heads = q.shape[-3] if q.ndim > 3 else 1
    if bias is not None:
        heads = bias.shape[0]
    return packed // heads, heads
