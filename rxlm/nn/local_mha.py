"""``LocalMHA``: multi-head local attention with projections, and decoding with a constant cache.

Arguments and parameter names are those of ``LocalMHA`` of the package ``local-attention``, so its
weights load. Two of its defects are corrected: it rotates cached keys again at every step, and its
steps ignore the scale of normed queries.

Shapes: B batch, T tokens, D width, H heads, W window, J = W (1 + look_backward + look_forward).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rxlm.errors import UserError
from rxlm.nn.local_attention import LocalAttention
from rxlm.nn.local_cache import LocalCache


class LocalMHA(nn.Module):
    """Projections around :class:`LocalAttention`."""

    def __init__(
        self,
        *,
        dim: int,
        window_size: int,
        dim_head: int = 64,
        heads: int = 8,
        dropout: float = 0.0,
        causal: bool = False,
        prenorm: bool = False,
        qk_rmsnorm: bool = False,
        qk_scale: float = 8,
        use_xpos: bool = False,
        xpos_scale_base: float | None = None,
        exact_windowsize: bool | None = None,
        gate_values_per_head: bool = False,
        gate_output: bool = False,
        **options: Any,
    ) -> None:
        """Set up.

        Args:
            dim: D.
            window_size: W.
            dim_head: width of a head.
            heads: H.
            dropout: probability of dropping an attention weight in training.
            causal: whether no token sees a later one; needed for a cache.
            prenorm: whether the input is normalised (LayerNorm).
            qk_rmsnorm: whether queries and keys get length 1 and learned factors.
            qk_scale: factor on the scores, with ``qk_rmsnorm``.
            use_xpos: see :class:`LocalAttention`.
            xpos_scale_base: see :class:`LocalAttention`.
            exact_windowsize: see :class:`LocalAttention`; None = True.
            gate_values_per_head: whether each head is multiplied by a learned gate in (0, 1).
            gate_output: whether each channel is, before the last projection. Not in the package.
            **options: further arguments of :class:`LocalAttention`.
        """
        super().__init__()
        width = heads * dim_head
        self.heads, self.qk_rmsnorm = heads, qk_rmsnorm
        self.norm = nn.LayerNorm(dim) if prenorm else None
        self.to_qkv = nn.Linear(dim, 3 * width, bias=False)
        if qk_rmsnorm:
            self.q_scale = nn.Parameter(torch.ones(dim_head))
            self.k_scale = nn.Parameter(torch.ones(dim_head))
        self.attn_fn = LocalAttention(
            window_size,
            causal,
            dropout=dropout,
            dim=dim_head,
            autopad=True,
            exact_windowsize=True if exact_windowsize is None else exact_windowsize,
            scale=qk_scale if qk_rmsnorm else None,
            use_xpos=use_xpos,
            xpos_scale_base=xpos_scale_base,
            **options,
        )
        # In a Sequential, for the parameter names of the package.
        self.to_v_gate = nn.Sequential(nn.Linear(dim, heads)) if gate_values_per_head else None
        self.to_gate = nn.Linear(dim, width) if gate_output else None
        self.to_out = nn.Linear(width, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        cache: LocalCache | None = None,
        return_cache: bool = False,
    ) -> Any:
        """Attend from new tokens to themselves and the cached past.

        Args:
            x: ``[B, T, D]``.
            mask: ``[B, T]``, true (or 1) at real tokens, padding on either side; None = all.
            attn_bias: ``[H, W, J]``, added to the scores of every window.
            cache: from the call before; unchanged.
            return_cache: whether to return the cache, too.

        Returns:
            ``[B, T, D]``, or a pair of that and the :class:`LocalCache`.

        Raises:
            UserError: for a cache without causality or with ``compat``.
        """
        if return_cache and not self.attn_fn.causal:
            raise UserError("return_cache=True needs causal=True: else no token can be added.")
        if self.norm is not None:
            x = self.norm(x)
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.qk_rmsnorm:
            q = F.normalize(q, dim=-1) * self.q_scale
            k = F.normalize(k, dim=-1) * self.k_scale
        kept = None
        if self.attn_fn.compat is not None and cache is None and not return_cache:
            heads = self.attn_fn(q, k, v, mask=mask, attn_bias=attn_bias)
        else:
            heads, kept = self.attn_fn.extend(q, k, v, mask, attn_bias, cache)
        if self.to_v_gate is not None:
            heads = heads * self.to_v_gate(x).sigmoid().transpose(1, 2)[..., None]
        mixed = heads.transpose(1, 2).flatten(-2)
        if self.to_gate is not None:
            mixed = mixed * self.to_gate(x).sigmoid()
        output = self.to_out(mixed)
        return (output, kept) if return_cache else output
