"""Local attention by PyTorch's FlexAttention: one compiled kernel that skips hidden blocks.

For CUDA; :func:`rxlm.ops.local_attention.local_attention` refuses other devices. ``compiled=False``
runs the same masks without a compiler, for tests without a GPU: slow, and it builds all scores.

Shapes: B batch, T queries, P keys, H query heads, G key/value heads, K head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rxlm.errors import UserError

if TYPE_CHECKING:
    from rxlm.ops.local_attention import LocalPattern, ScoreChanges


def flex_local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: LocalPattern,
    changes: ScoreChanges,
    *,
    start: Tensor | None = None,
    scale: float | None = None,
    compiled: bool = True,
) -> Tensor:
    """Attend within the pattern; arguments and result as of ``local_attention``.

    Raises:
        UserError: for what this kernel does not compute: decay, and fewer query than key heads.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    for given, name in ((changes.decay, "decay (xpos)"), (changes.hide_self or None, "shared_qk")):
        if given is not None:
            raise UserError(f"backend 'flex' has no {name}: use backend='blocks'.")
    batch, num_queries, num_heads, _ = query.shape
    num_keys, num_groups = key.shape[1:3]
    if num_heads % num_groups:
        raise UserError(
            f"backend 'flex' needs query heads ({num_heads}) that are a multiple of the key heads "
            f"({num_groups}): use backend='blocks'."
        )
    offset = num_keys - num_queries
    first = torch.full((batch,), offset, device=query.device) if start is None else start
    shift = first.to(query.device) - offset
    block_mask = create_block_mask(
        _mask_rule(pattern, changes, shift, offset),
        batch,
        None,
        num_queries,
        num_keys,
        device=str(query.device),
    )
    run: Any = _compiled() if compiled else flex_attention
    output: Tensor = run(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        score_mod=_score_rule(pattern, changes.bias, shift, offset),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=num_heads != num_groups,
    )
    return output.transpose(1, 2)


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _mask_rule(
    pattern: LocalPattern, changes: ScoreChanges, shift: Tensor, offset: int
) -> Callable[..., Tensor]:
    key_mask, mask = changes.key_mask, changes.mask

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query, key = q + offset + shift[b], k + shift[b]
        origin = query if pattern.exact else query // pattern.window * pattern.window
        size = 1 if pattern.exact else pattern.window
        seen = (key >= origin - pattern.back) & (key < origin + size + pattern.forward)
        if pattern.causal:
            seen = seen & (key <= query)
        if key_mask is not None:
            seen = seen & key_mask[b, k]
        if mask is not None:
            seen = seen & (mask[q, k] if mask.ndim == 2 else mask[b, q, k])
        return seen

    return rule


def _score_rule(
    pattern: LocalPattern, bias: Tensor | None, shift: Tensor, offset: int
) -> Callable[..., Tensor] | None:
    if bias is None:
        return None
    width = bias.shape[-1]

    def rule(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query, key = q + offset + shift[b], k + shift[b]
        row = query % pattern.window
        column = (key - (query - row) + pattern.back).clamp(0, width - 1)
        return score + bias[h, row, column]

    return rule
