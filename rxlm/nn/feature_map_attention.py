"""Normalised feature-map attention as a layer: ELU + 1, and the Taylor map of Based.

    q, k, v = projections of x, if asked for through a short convolution and SiLU
    heads   = feature-map attention (:mod:`rxlm.ops.feature_map_attention`)
    y       = output(heads)

Positive weights that sum to 1, as in softmax attention, and a state of constant size, as in a
recurrence. No positions and no norm: normalised heads are averages of values already. Padding
leaves no trace on either side.

Shapes: B batch, T tokens, D width, H heads, K/V head dimensions, F features of a head, W width of
the short convolution, C its channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rxlm.errors import UserError
from rxlm.nn.linear_settings import FORMS, Mode
from rxlm.nn.short_conv import RealTokensFirst, ShortConvolution
from rxlm.ops.feature_map_attention import DEFAULT_EPS, FeatureMapState, feature_map_attention
from rxlm.ops.feature_maps import get_feature_map

TAYLOR_DIM = 16
"""K of the Taylor map in Based; the number of features grows with its square."""


@dataclass(frozen=True)
class FeatureMapSettings:
    """What distinguishes one feature-map attention from another.

    Attributes:
        dim: D.
        num_heads: H.
        feature_map: ``elu`` or ``taylor``.
        feature_dim: K, of one head before the map; None = 16 for ``taylor``, otherwise V.
        value_dim: V, of one head; None = D / H.
        normalize: whether the weights of a token sum to 1.
        eps: added to that sum.
        mode: ``chunk`` computes many tokens at once, ``fused`` one after the other; one token is
            always a single step.
        conv_size: tokens of a short convolution of q, k, v; None = as published, without.
        bidirectional: whether each token sees all others; such a layer has no cache.
    """

    dim: int
    num_heads: int
    feature_map: str = "elu"
    feature_dim: int | None = None
    value_dim: int | None = None
    normalize: bool = True
    eps: float = DEFAULT_EPS
    mode: Mode = "chunk"
    conv_size: int | None = None
    bidirectional: bool = False

    def __post_init__(self) -> None:
        get_feature_map(self.feature_map)
        if self.mode not in FORMS:
            raise UserError(
                f"feature map attention mode={self.mode!r} does not exist: use one of "
                f"{', '.join(FORMS)}."
            )
        for field in ("dim", "num_heads", "feature_dim", "value_dim", "eps", "conv_size"):
            number = getattr(self, field)
            if number is not None and not number > 0:
                raise UserError(f"feature map attention {field}={number} must be positive.")
        if self.value_dim is None and self.dim % self.num_heads:
            raise UserError(
                f"dim={self.dim} is not divisible by num_heads={self.num_heads}: choose sizes that "
                "divide, or say value_dim."
            )

    @property
    def head_value_dim(self) -> int:
        """V."""
        return self.dim // self.num_heads if self.value_dim is None else self.value_dim

    @property
    def head_feature_dim(self) -> int:
        """K."""
        if self.feature_dim is not None:
            return self.feature_dim
        return TAYLOR_DIM if self.feature_map == "taylor" else self.head_value_dim


class FeatureMapCache(NamedTuple):
    """The past of B sequences: as large after one token as after a million.

    Attributes:
        key_value: ``[B, H, F, V]`` float32 (float64 in a float64 model).
        key_sum: ``[B, H, F]``, of the same type.
        recent: ``[B, W - 1, C]``, the inputs of the short convolution at the last real tokens,
            zeros before the first; ``[B, 0, C]`` for a layer without.
    """

    key_value: Tensor
    key_sum: Tensor
    recent: Tensor

    def select(self, rows: Sequence[int] | Tensor) -> FeatureMapCache:
        """Return the sequences ``rows``, in that order; a row may be repeated."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.recent.device)
        return FeatureMapCache(*(part.index_select(0, index) for part in self))

    def detach(self) -> FeatureMapCache:
        """Return the value outside of every autograd graph."""
        return FeatureMapCache(*(part.detach() for part in self))

    @property
    def num_bytes(self) -> int:
        """Size of the value, independent of how many tokens it stands for."""
        return sum(part.numel() * part.element_size() for part in self)


class FeatureMapAttention(nn.Module):
    """Self-attention through a feature map. State is passed in and returned, never kept."""

    def __init__(self, settings: FeatureMapSettings) -> None:
        super().__init__()
        self.settings = settings
        heads = settings.num_heads
        key_width, value_width = heads * settings.head_feature_dim, heads * settings.head_value_dim
        self._widths = (key_width, key_width, value_width)
        self.query_key_value = nn.Linear(settings.dim, sum(self._widths), bias=False)
        if settings.conv_size is not None:
            self.short_convolution = ShortConvolution(
                sum(self._widths), settings.conv_size, centred=settings.bidirectional
            )
        self.output = nn.Linear(value_width, settings.dim, bias=False)

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None = None,
        cache: FeatureMapCache | None = None,
    ) -> tuple[Tensor, FeatureMapCache | None]:
        """Run over new tokens.

        Args:
            x: ``[B, T, D]``.
            key_mask: ``[B, T]`` bool, True at real tokens, wherever they stand; None = all. The
                others change nothing and yield zeros.
            cache: what was seen before; None for nothing. Unchanged.

        Returns:
            ``[B, T, D]``, and the cache with the new tokens; None in both directions.

        Raises:
            UserError: for a cache where attention goes in both directions, or a cache or mask of
                another shape or type.
        """
        if self.settings.bidirectional and cache is not None:
            raise UserError(
                "feature map attention in both directions has no cache: it sees later tokens, so "
                "the whole sequence is computed at once."
            )
        if key_mask is not None and (key_mask.shape != x.shape[:2] or key_mask.dtype != torch.bool):
            raise UserError(
                f"feature map attention: key_mask is {key_mask.dtype} {list(key_mask.shape)}, "
                f"expected torch.bool {list(x.shape[:2])}, True where a token is real."
            )
        if key_mask is None or x.shape[1] == 1 or self.settings.conv_size is None:
            return self._attend(x, key_mask, cache)
        order = RealTokensFirst(key_mask)
        y, cache = self._attend(order.pack(x), order.key_mask, cache)
        return order.unpack(y), cache

    def _attend(
        self, x: Tensor, key_mask: Tensor | None, cache: FeatureMapCache | None
    ) -> tuple[Tensor, FeatureMapCache | None]:
        """Do what :meth:`forward` does; with a convolution real tokens come first in each row."""
        settings = self.settings
        mixed = self.query_key_value(x)
        if settings.conv_size is not None:
            past = None if cache is None else cache.recent
            mixed, recent = self.short_convolution(mixed, key_mask, past)
        else:
            recent = mixed.new_empty(x.shape[0], 0, sum(self._widths))
        query, key, value = (
            part.unflatten(-1, (settings.num_heads, -1))
            for part in mixed.split(self._widths, dim=-1)
        )
        heads, state = feature_map_attention(
            query,
            key,
            value,
            settings.feature_map,
            causal=not settings.bidirectional,
            initial_state=None if cache is None else FeatureMapState(*cache[:2]),
            key_mask=key_mask,
            form="step" if x.shape[1] == 1 else FORMS[settings.mode],
            normalize=settings.normalize,
            eps=settings.eps,
        )
        # Heads stand next to each other for one token: [B, T, H, V] to [B, T, H * V].
        y = self.output(heads.flatten(-2))
        return y, None if settings.bidirectional else FeatureMapCache(*state, recent)
