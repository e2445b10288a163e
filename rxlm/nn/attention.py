"""One softmax attention module. MHA, GQA, MQA and SQA are head counts, not classes.

Shapes: B batch, T queries, P keys, D width, H query heads, G key/value heads, K head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from rxlm.ops.attention import attend
from rxlm.ops.rotary import apply_rotary

RotaryRule = Literal["both", "queries", "keys", "none"]


class KeyValue(NamedTuple):
    """Projected keys (already rotated) and values, each ``[B, P, G, K]``."""

    key: Tensor
    value: Tensor

    def append(self, other: KeyValue) -> KeyValue:
        """Return the concatenation along the key axis; neither operand changes."""
        return KeyValue(
            torch.cat((self.key, other.key), dim=1), torch.cat((self.value, other.value), dim=1)
        )


@dataclass(frozen=True)
class AttentionSettings:
    """What distinguishes one softmax attention from another.

    ``rotary`` says which side is rotated: both in self-attention; only the queries when reading
    memory and only the keys when writing it, because slots have no position.
    """

    dim: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary: RotaryRule = "both"
    output_bias: bool = True
    dropout: float = 0.0
    query_key_norm: bool = False
    gated: bool = False
    gate_activation: Literal["sigmoid", "silu", "tanh"] = "sigmoid"
    norm_eps: float = 1e-6


_GATE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}


class Attention(nn.Module):
    """Multi-head attention whose keys and values may be projected ahead of the queries.

    ``project`` makes keys and values once (for a cache, or for a memory that many decode steps
    read); ``forward`` attends from ``x`` to them. State is passed in and returned, never kept.
    """

    def __init__(self, settings: AttentionSettings) -> None:
        super().__init__()
        self.settings = settings
        dim, head_dim = settings.dim, settings.head_dim
        kv_width = settings.num_key_value_heads * head_dim
        # SQA may have more key than query heads; the output then has the larger count.
        output_width = max(settings.num_heads, settings.num_key_value_heads) * head_dim
        self.query = nn.Linear(dim, settings.num_heads * head_dim, bias=False)
        self.key = nn.Linear(dim, kv_width, bias=False)
        self.value = nn.Linear(dim, kv_width, bias=False)
        self.output = nn.Linear(output_width, dim, bias=settings.output_bias)
        if settings.query_key_norm:
            self.query_norm = nn.RMSNorm(head_dim, eps=settings.norm_eps)
            self.key_norm = nn.RMSNorm(head_dim, eps=settings.norm_eps)
        if settings.gated:
            self.gate = nn.Linear(dim, output_width)

    def project(self, source: Tensor, phases: Tensor | None) -> KeyValue:
        """Project what will be attended to.

        Args:
            source: ``[B, P, D]``.
            phases: rotary phases of the P positions, ``[P, K/2]`` or ``[B, P, K/2]``; ignored
                when this attention does not rotate keys.

        Returns:
            keys and values ``[B, P, G, K]``.
        """
        shape = (*source.shape[:-1], self.settings.num_key_value_heads, self.settings.head_dim)
        key = self.key(source).view(shape)
        if self.settings.query_key_norm:
            key = self.key_norm(key)
        if phases is not None and self.settings.rotary in ("both", "keys"):
            key = apply_rotary(key, phases)
        return KeyValue(key, self.value(source).view(shape))

    def forward(
        self,
        x: Tensor,
        key_value: KeyValue,
        mask: Tensor | None,
        phases: Tensor | None,
        *,
        causal: bool = False,
    ) -> Tensor:
        """Attend from ``x`` to projected keys and values.

        Args:
            x: ``[B, T, D]``.
            key_value: from :meth:`project`.
            mask: bool, broadcastable to ``[B, H, T, P]``, True = visible; None = all visible.
            phases: rotary phases of the T query positions; ignored when queries do not rotate.
            causal: in place of a mask, where keys and queries are of the same tokens.

        Returns:
            ``[B, T, D]``.
        """
        dropout = self.settings.dropout if self.training else 0.0
        query = self.project_queries(x, phases)
        heads = attend(query, key_value.key, key_value.value, mask, causal=causal, dropout=dropout)
        return self.combine(heads, x)

    def project_queries(self, x: Tensor, phases: Tensor | None) -> Tensor:
        """Return the queries ``[B, T, H, K]`` of ``x`` ``[B, T, D]``, normed and rotated."""
        query = self.query(x).view(*x.shape[:-1], self.settings.num_heads, self.settings.head_dim)
        if self.settings.query_key_norm:
            query = self.query_norm(query)
        if phases is not None and self.settings.rotary in ("both", "queries"):
            query = apply_rotary(query, phases)
        return query

    def weights(
        self, x: Tensor, key_value: KeyValue, mask: Tensor | None, phases: Tensor | None
    ) -> Tensor:
        """Return how much each token attends to each key, for people to look at.

        Args:
            x: ``[B, T, D]``.
            key_value: as for :meth:`forward`.
            mask: as for :meth:`forward`.
            phases: as for :meth:`forward`.

        Returns:
            ``[B, max(H, G), T, P]`` in fp32; a row sums to 1, or to 0 where nothing is visible.
        """
        query, key = self.project_queries(x, phases).float(), key_value.key.float()
        heads = max(query.shape[2], key.shape[2])
        query, key = (
            part.repeat_interleave(heads // part.shape[2], dim=2).transpose(1, 2)
            for part in (query, key)
        )
        scores = query @ key.transpose(-1, -2) * self.settings.head_dim**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        # A query that sees nothing has no largest score: its weights would be NaN.
        return scores.softmax(dim=-1).nan_to_num(0.0)

    def combine(self, heads: Tensor, x: Tensor) -> Tensor:
        """Return the output ``[B, T, D]`` of heads ``[B, T, max(H, G), K]``, gated by ``x``."""
        mixed = heads.flatten(-2)
        if self.settings.gated:
            mixed = mixed * _GATE_ACTIVATIONS[self.settings.gate_activation](self.gate(x))
        return self.output(mixed)


@torch.no_grad()
def initialize_copy_path(attention: Attention, output_scale: float = 1.0) -> None:
    """Make output(value(x)) start as (a projection of) x times ``output_scale``.

    A memory that is read or written through random projections carries no usable signal, and
    training stays near chance for a long time (cold start). With the identity on the value path
    the first gradients already reward *which* slot is read. With G < H heads the identity cannot
    fit; orthonormal rows then make output o value a rank G*K projection, shared by each group.

    Args:
        attention: changed in place; its queries and keys are left alone.
        output_scale: factor on the path, usually ``(2 * num_layers) ** -0.5``.
    """
    settings = attention.settings
    width = settings.num_key_value_heads * settings.head_dim
    if width == settings.dim:
        value = torch.eye(settings.dim)
    else:
        value = torch.empty(width, settings.dim)
        nn.init.orthogonal_(value)
    attention.value.weight.copy_(value)
    repeats = max(1, settings.num_heads // settings.num_key_value_heads)
    per_head = value.view(settings.num_key_value_heads, settings.head_dim, settings.dim)
    spread = per_head.repeat_interleave(repeats, dim=0).reshape(-1, settings.dim) / repeats
    attention.output.weight.copy_(output_scale * spread.t())
    if attention.output.bias is not None:
        attention.output.bias.zero_()
