"""Softmax attention over true key masks, on top of PyTorch's fused kernels.

A masked key has weight exactly zero and a query without any visible key returns zeros, in every
precision, so padding never changes a result.

Shapes: B batch, T queries, P keys, H query heads, G key/value heads, K head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def visible_keys(
    key_mask: Tensor | None, num_queries: int, num_keys: int, *, causal: bool, device: torch.device
) -> Tensor | None:
    """Combine padding and causality into one mask of what each query may see.

    The queries are the last ``num_queries`` of the ``num_keys`` positions, so the same function
    serves the full forward (equal counts) and decoding with a cache (one query).

    Args:
        key_mask: ``[B, P]`` bool, True where the key is real; None if all are.
        num_queries: T.
        num_keys: P.
        causal: whether a query sees only keys at or before its own position.
        device: where to build the mask.

    Returns:
        bool ``[B or 1, 1, T, P]``, or None if everything is visible.
    """
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if causal and num_queries > 1:
        triangle = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(
            num_keys - num_queries
        )
        mask = triangle[None, None] if mask is None else mask & triangle
    return mask


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention with grouped heads.

    Args:
        query: ``[B, T, H, K]``.
        key: ``[B, P, G, K]``; G divides H (grouped-query attention), or H divides G (sparse
            "reverse" heads: queries are repeated).
        value: ``[B, P, G, K]``.
        mask: bool, broadcastable to ``[B, H, T, P]``, True where the key is visible.
        causal: in place of a mask and a bias, for T = P: a query sees the keys up to its own place.
            The kernels then need no T x P tensor.
        bias: added to the scores, broadcastable to ``[B, H, T, P]``, in the dtype of ``query``.
        dropout: probability of dropping an attention weight.
        scale: factor on the scores; default ``K**-0.5``.

    Returns:
        ``[B, T, max(H, G), K]``. Queries that see no key get zeros.

    Raises:
        ValueError: if the head counts do not divide each other.
    """
    assert not causal or (mask is None and bias is None and query.shape[1] == key.shape[1])
    num_query_heads, num_key_heads = query.shape[2], key.shape[2]
    if num_query_heads < num_key_heads:
        if num_key_heads % num_query_heads:
            raise ValueError(_head_message(num_query_heads, num_key_heads))
        query = query.repeat_interleave(num_key_heads // num_query_heads, dim=2)
    elif num_query_heads % num_key_heads:
        raise ValueError(_head_message(num_query_heads, num_key_heads))
    if torch.compiler.is_compiling() and query.shape[1] == 1 and bias is None and not dropout:
        # No kernel of its own for a few thousand products: a compiler fuses what is around.
        return _attend_once(query, key, value, mask, scale)
    blind = None
    if mask is not None:
        # The kernels disagree about queries that see nothing (NaN, mean of values, zeros), and a
        # NaN there poisons the backward pass. Such queries look at everything, then are zeroed.
        blind = ~mask.any(dim=-1, keepdim=True)
        mask = mask | blind
    if bias is not None:
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
    output = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=query.shape[2] != num_key_heads,
    )
    if blind is not None:
        output = output.masked_fill(blind, 0.0)
    return output.transpose(1, 2)


def _attend_once(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attend from one query ``[B, 1, H, K]``, as sums; what :func:`attend` says of the others."""
    batch, _, num_heads, width = query.shape
    groups = key.shape[2]
    split = (batch, groups, num_heads // groups, 1, width)
    keys, values = (part.transpose(1, 2).unsqueeze(2) for part in (key, value))
    query = query.view(split) * (width**-0.5 if scale is None else scale)
    scores = (query * keys).sum(dim=-1)  # [B, G, H / G, P]
    if mask is not None:
        mask = mask.expand(batch, num_heads, 1, -1)
        scores = scores.masked_fill(~mask.reshape(scores.shape), -torch.inf)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if mask is not None:
        # A query that sees nothing: its scores have no largest one, and its weights are NaN.
        weights = weights.nan_to_num(0.0)
    heads = (weights.to(value.dtype).unsqueeze(-1) * values).sum(dim=-2)
    return heads.view(batch, 1, num_heads, width)


def _head_message(num_query_heads: int, num_key_heads: int) -> str:
    return (
        f"{num_query_heads} query heads and {num_key_heads} key/value heads do not divide each "
        "other: choose counts where one is a multiple of the other."
    )
