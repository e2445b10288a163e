"""Which tokens are real, from any attention mask in use.

Linear attention knows order by itself, so of a mask over pairs of tokens only padding is read: a
token is real if it may attend to itself. Windows and blocks in such a mask have no meaning here.

Shapes: B batch, T new tokens, P tokens of the past.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rxlm.errors import UserError


def real_tokens(
    attn_mask: Tensor | None, batch: int, length: int, *, has_past: bool = False
) -> Tensor | None:
    """Read a mask.

    Args:
        attn_mask: ``[B, T]``, ``[B, 1, T]`` or ``[B, 1, 1, T]`` over tokens, or ``[B, 1, T, T]``
            over pairs (queries, then keys); the first dimension may be 1. bool or integers: 1 at
            real tokens. Floating point: 1 and 0 likewise, or, if any is negative or the mask has
            four dimensions, additive: 0 at real tokens, large negative numbers elsewhere.
        batch: B.
        length: T.
        has_past: whether the last dimension may be P + T; its end is read.

    Returns:
        ``[B, T]`` bool, True at real tokens; None if there was no mask.

    Raises:
        UserError: for another shape or type, or (looked for on a CPU) other values.
    """
    if attn_mask is None:
        return None
    shape = tuple(attn_mask.shape)
    keys = shape[-1] if shape else 0
    fits = (
        len(shape) in (2, 3, 4)
        and shape[0] in (1, batch)
        and (keys == length or (has_past and keys >= length))
        and all(size == 1 for size in shape[1:-2])
        and (len(shape) == 2 or shape[-2] in ((1, length) if len(shape) == 4 else (1,)))
    )
    if not fits:
        raise UserError(
            f"attn_mask has shape {list(shape)}, expected {[batch, length]} (1 at real tokens), "
            f"{[batch, 1, 1, length]} or {[batch, 1, length, length]}."
        )
    mask = attn_mask
    if len(shape) == 4 and shape[-2] == length:
        mask = mask[..., keys - length :].diagonal(dim1=-2, dim2=-1)
    mask = mask.reshape(shape[0], -1)[:, -length:] if length else mask.reshape(shape[0], 0)
    return _truth(mask, additive=len(shape) == 4).expand(batch, -1)


def _truth(mask: Tensor, *, additive: bool) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    if mask.dtype.is_complex:
        raise UserError(f"attn_mask has type {mask.dtype}: use torch.bool.")
    if not mask.is_floating_point():
        _expect_values(mask, (mask == 0) | (mask == 1), "0 and 1")
        return mask != 0
    if additive:
        _expect_values(mask, mask <= 0, "0 where visible and negative numbers elsewhere")
        return mask >= 0
    # No branch on values: on a GPU the program would have to wait for them.
    negative = (mask < 0).any()
    sensible = torch.where(negative, mask <= 0, (mask == 0) | (mask == 1))
    _expect_values(mask, sensible, "0 and 1, or 0 and negative numbers")
    return torch.where(negative, mask >= 0, mask > 0)


def _expect_values(mask: Tensor, sensible: Tensor, expected: str) -> None:
    if mask.device.type != "cpu" or torch.compiler.is_compiling() or bool(sensible.all()):
        return
    wrong = float(mask[~sensible][0])
    raise UserError(f"attn_mask ({mask.dtype}) contains {wrong:g}, expected {expected}.")
