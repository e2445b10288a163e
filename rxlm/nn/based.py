"""Based (arXiv:2402.18668): linear attention for the far past, an exact window for the near one.

The published model alternates three kinds of layers: gated short convolutions (most of them),
Taylor linear attention, and softmax attention within a sliding window. Here each kind is a mixer,
:class:`BasedBlock` puts any of them one after the other with norms and residuals, and
:func:`based_layers` gives the published order.

:class:`BasedMixer` is *our* form for one layer, not the paper's: both attentions side by side,

    u = x + SiLU(conv(x))        y = taylor(u) + window(u)

Not here: positions other than the rotary ones of the window, feed-forward layers, whole models.

Shapes: B batch, T tokens, D width, H heads, G key/value heads, K head dimension, W window, C
tokens of the convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rxlm.errors import UserError
from rxlm.nn.attention import Attention, AttentionSettings, KeyValue
from rxlm.nn.feature_map_attention import (
    TAYLOR_DIM,
    FeatureMapAttention,
    FeatureMapSettings,
)
from rxlm.nn.linear_attention import Mode
from rxlm.nn.short_conv import RealTokensFirst, ShortConvolution
from rxlm.ops.rotary import rotary_phases

Kind = Literal["conv", "taylor", "window"]
"""A kind of layer of the published model."""
SMALLEST_BLOCK = 64
"""Queries that a window attends from at once, if it is not longer."""


@dataclass(frozen=True)
class BasedSettings:
    """Sizes of the parts of Based.

    Attributes:
        dim: D.
        num_heads: H of both attentions.
        window: W tokens that the window sees, the token itself included.
        feature_dim: of one head before the Taylor map.
        value_dim: of one head of the linear attention; None = D / H.
        conv_size: C.
        rope_base: base of the rotary frequencies of the window; None = no rotation.
        dropout: probability of dropping an attention weight of the window.
        mode: how the linear attention computes many tokens.
        norm_eps: epsilon of the norms of :class:`BasedBlock`.
    """

    dim: int
    num_heads: int
    window: int = 128
    feature_dim: int = TAYLOR_DIM
    value_dim: int | None = None
    conv_size: int = 3
    rope_base: float | None = 10000.0
    dropout: float = 0.0
    mode: Mode = "chunk"
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for field in ("dim", "num_heads", "window", "feature_dim", "value_dim", "conv_size"):
            size = getattr(self, field)
            if size is not None and size < 1:
                raise UserError(f"based {field}={size} must be positive.")
        if self.dim % self.num_heads:
            raise UserError(f"dim={self.dim} is not divisible by num_heads={self.num_heads}.")
        if self.rope_base is not None and self.dim // self.num_heads % 2:
            raise UserError(
                f"dim={self.dim} with num_heads={self.num_heads} makes heads "
                f"{self.dim // self.num_heads} wide, but rotary positions turn pairs: use an even "
                "width, or rope_base=None."
            )

    def taylor(self) -> FeatureMapAttention:
        """Return a new linear attention of these sizes."""
        return FeatureMapAttention(
            FeatureMapSettings(
                dim=self.dim,
                num_heads=self.num_heads,
                feature_map="taylor",
                feature_dim=self.feature_dim,
                value_dim=self.value_dim,
                mode=self.mode,
            )
        )


class ConvCache(NamedTuple):
    """Inputs ``[B, C - 1, D]`` of a convolution at the last real tokens, zeros before the first."""

    recent: Tensor

    def select(self, rows: Sequence[int] | Tensor) -> ConvCache:
        """Return the sequences ``rows``, in that order; a row may be repeated."""
        return ConvCache(_select(self.recent, rows))

    def detach(self) -> ConvCache:
        """Return the value outside of every autograd graph."""
        return ConvCache(self.recent.detach())

    @property
    def num_bytes(self) -> int:
        """Size of the value, independent of how many tokens it stands for."""
        return self.recent.nbytes


class WindowCache(NamedTuple):
    """What a window still sees.

    Attributes:
        key: ``[B, W - 1, G, K]`` of the last real tokens, the newest last; already rotated.
        value: ``[B, W - 1, G, K]``.
        lengths: int ``[B]``, real tokens so far. The last ``min(lengths, W - 1)`` places are used.
    """

    key: Tensor
    value: Tensor
    lengths: Tensor

    def select(self, rows: Sequence[int] | Tensor) -> WindowCache:
        """Return the sequences ``rows``, in that order; a row may be repeated."""
        return WindowCache(*(_select(part, rows) for part in self))

    def detach(self) -> WindowCache:
        """Return the value outside of every autograd graph."""
        return WindowCache(*(part.detach() for part in self))

    @property
    def num_bytes(self) -> int:
        """Size of the value, independent of how many tokens it stands for."""
        return sum(part.nbytes for part in self)


class BasedCache(NamedTuple):
    """The caches of several mixers, in their order."""

    parts: tuple[Any, ...]

    def select(self, rows: Sequence[int] | Tensor) -> BasedCache:
        """Return the sequences ``rows``, in that order; a row may be repeated."""
        return BasedCache(tuple(part.select(rows) for part in self.parts))

    def detach(self) -> BasedCache:
        """Return the value outside of every autograd graph."""
        return BasedCache(tuple(part.detach() for part in self.parts))

    @property
    def num_bytes(self) -> int:
        """Size of the value, independent of how many tokens it stands for."""
        return sum(part.num_bytes for part in self.parts)


class GatedConvolution(nn.Module):
    """Short gated convolution: ``output(SiLU(conv(u_1)) * u_2)`` with u_1, u_2 projections of x.

    The BaseConv of the published code, without its biases.
    """

    def __init__(self, dim: int, conv_size: int = 3) -> None:
        super().__init__()
        self.input = nn.Linear(dim, 2 * dim, bias=False)
        self.short_convolution = ShortConvolution(dim, conv_size)
        self.output = nn.Linear(dim, dim, bias=False)

    def forward(
        self, x: Tensor, key_mask: Tensor | None = None, cache: ConvCache | None = None
    ) -> tuple[Tensor, ConvCache]:
        """Convolve ``x`` ``[B, T, D]``, going on from ``cache``; padding yields zeros.

        Args:
            x: ``[B, T, D]``.
            key_mask: ``[B, T]`` bool, True at real tokens, wherever they stand; None = all.
            cache: what was seen before; None for nothing. Unchanged.

        Returns:
            ``[B, T, D]``, and the cache with the new tokens.

        Raises:
            UserError: on a mask of another shape or type.
        """
        _check_mask(x, key_mask)
        if key_mask is not None:
            order = RealTokensFirst(key_mask)
            y, cache = self._convolve(order.pack(x), order.key_mask, cache)
            return order.unpack(y).masked_fill(~key_mask.unsqueeze(-1), 0.0), cache
        return self._convolve(x, None, cache)

    def _convolve(
        self, x: Tensor, key_mask: Tensor | None, cache: ConvCache | None
    ) -> tuple[Tensor, ConvCache]:
        inner, gate = self.input(x).chunk(2, dim=-1)
        past = None if cache is None else cache.recent
        convolved, recent = self.short_convolution(inner, key_mask, past)
        return self.output(convolved * gate), ConvCache(recent)


class WindowAttention(nn.Module):
    """Softmax attention to the last W tokens, with rotary positions."""

    def __init__(self, settings: BasedSettings) -> None:
        super().__init__()
        self.window, self.rope_base = settings.window, settings.rope_base
        self.attention = Attention(
            AttentionSettings(
                dim=settings.dim,
                num_heads=settings.num_heads,
                num_key_value_heads=settings.num_heads,
                head_dim=settings.dim // settings.num_heads,
                rotary="none" if settings.rope_base is None else "both",
                output_bias=False,
                dropout=settings.dropout,
            )
        )

    def forward(
        self, x: Tensor, key_mask: Tensor | None = None, cache: WindowCache | None = None
    ) -> tuple[Tensor, WindowCache]:
        """Attend from ``x`` ``[B, T, D]``, going on from ``cache``; padding yields zeros.

        Args and errors are those of :meth:`GatedConvolution.forward`.
        """
        _check_mask(x, key_mask)
        if key_mask is not None:
            order = RealTokensFirst(key_mask)
            y, cache = _attend_in_window(self, order.pack(x), order.key_mask, cache)
            return order.unpack(y).masked_fill(~key_mask.unsqueeze(-1), 0.0), cache
        return _attend_in_window(self, x, None, cache)


class BasedBlock(nn.Module):
    """Mixers one after the other, ``x = x + mixer(norm(x))``: the layers of Based, without MLPs."""

    def __init__(self, settings: BasedSettings, kinds: Sequence[Kind]) -> None:
        """Build one mixer for each of ``kinds``.

        Raises:
            UserError: for no kind, or one that does not exist.
        """
        super().__init__()
        known: dict[str, Callable[[], nn.Module]] = {
            "conv": lambda: GatedConvolution(settings.dim, settings.conv_size),
            "taylor": settings.taylor,
            "window": lambda: WindowAttention(settings),
        }
        if not kinds or any(kind not in known for kind in kinds):
            raise UserError(f"based kinds={list(kinds)}: give at least one of {', '.join(known)}.")
        self.mixers = nn.ModuleList(known[kind]() for kind in kinds)
        self.norms = nn.ModuleList(nn.RMSNorm(settings.dim, eps=settings.norm_eps) for _ in kinds)

    def forward(
        self, x: Tensor, key_mask: Tensor | None = None, cache: BasedCache | None = None
    ) -> tuple[Tensor, BasedCache]:
        """Run all mixers over ``x`` ``[B, T, D]``; padding stays as it is.

        Args and errors are those of :meth:`GatedConvolution.forward`.
        """
        past = (None,) * len(self.mixers) if cache is None else cache.parts
        present = []
        for norm, mixer, before in zip(self.norms, self.mixers, past, strict=True):
            y, after = mixer(norm(x), key_mask, before)
            x = x + y
            present.append(after)
        return x, BasedCache(tuple(present))


class BasedMixer(nn.Module):
    """Both attentions of Based in one layer, after a short convolution: see the module."""

    def __init__(self, settings: BasedSettings) -> None:
        super().__init__()
        self.short_convolution = ShortConvolution(settings.dim, settings.conv_size)
        self.taylor = settings.taylor()
        self.window = WindowAttention(settings)

    def forward(
        self, x: Tensor, key_mask: Tensor | None = None, cache: BasedCache | None = None
    ) -> tuple[Tensor, BasedCache]:
        """Mix ``x`` ``[B, T, D]``, going on from ``cache``; padding yields zeros.

        Args and errors are those of :meth:`GatedConvolution.forward`.
        """
        _check_mask(x, key_mask)
        if key_mask is None:
            return self._mix(x, None, cache)
        order = RealTokensFirst(key_mask)
        y, cache = self._mix(order.pack(x), order.key_mask, cache)
        return order.unpack(y).masked_fill(~key_mask.unsqueeze(-1), 0.0), cache

    def _mix(
        self, x: Tensor, key_mask: Tensor | None, cache: BasedCache | None
    ) -> tuple[Tensor, BasedCache]:
        conv, linear, window = (None, None, None) if cache is None else cache.parts
        past = None if conv is None else conv.recent
        convolved, recent = self.short_convolution(x, key_mask, past)
        mixed = x + convolved
        far, linear = self.taylor(mixed, key_mask, linear)
        near, window = self.window(mixed, key_mask, window)
        return far + near, BasedCache((ConvCache(recent), linear, window))


def based_layers(num_layers: int) -> tuple[Kind, ...]:
    """Return the kinds of layers of a Based model, in order.

    As in the published 360M model of 27 layers: counted from 0, layers 1, 6, 11 ... are Taylor
    attention, 2, 7, 12 ... a window, all others convolutions; a last block of five that is cut
    short (layers 25 and 26 of 27) has convolutions only.

    Raises:
        UserError: if ``num_layers`` is not positive.
    """
    if num_layers < 1:
        raise UserError(f"num_layers={num_layers} must be positive.")
    if num_layers < 5:
        return cast("tuple[Kind, ...]", ("conv", "taylor", "window", "conv")[:num_layers])
    block: tuple[Kind, ...] = ("conv", "taylor", "window", "conv", "conv")
    return block * (num_layers // 5) + block[:1] * (num_layers % 5)


def _attend_in_window(
    layer: WindowAttention, x: Tensor, key_mask: Tensor | None, cache: WindowCache | None
) -> tuple[Tensor, WindowCache]:
    """Attend in blocks of queries, each to itself and the W - 1 keys before it.

    Args:
        layer: whose weights and window to use.
        x: ``[B, T, D]``, real tokens first.
        key_mask: ``[B, T]`` bool, or None for all.
        cache: what earlier calls left.
    """
    batch, length, kept = *x.shape[:2], layer.window - 1
    settings, device = layer.attention.settings, x.device
    start = torch.zeros(batch, dtype=torch.long, device=device) if cache is None else cache.lengths
    steps = torch.arange(length, device=device)
    phases = None
    if layer.rope_base is not None:
        phases = rotary_phases(start[:, None] + steps, settings.head_dim, layer.rope_base)
    present = layer.attention.project(x, phases)
    if cache is None:
        present = KeyValue(*(F.pad(part, (0, 0, 0, 0, kept, 0)) for part in present))
    else:
        present = KeyValue(cache.key, cache.value).append(present)
    block = min(length, max(layer.window, SMALLEST_BLOCK))
    y = _attend_in_blocks(layer, x, present, phases, kept - start, block)
    counts = start.new_full((batch,), length) if key_mask is None else key_mask.sum(dim=1)
    index = (counts[:, None] + torch.arange(kept, device=device))[:, :, None, None]
    key, value = (torch.take_along_dim(part, index, dim=1) for part in present)
    return y, WindowCache(key, value, start + counts)


def _attend_in_blocks(
    layer: WindowAttention,
    x: Tensor,
    present: KeyValue,
    phases: Tensor | None,
    first_used: Tensor,
    block: int,
) -> Tensor:
    """Return what queries ``[B, T, D]`` read of keys at W - 1 + T places.

    Query t stands at place W - 1 + t. Places before ``first_used`` ``[B]`` were never filled; pads
    come after all real tokens, so that no real query sees one.
    """
    batch, length, kept = *x.shape[:2], layer.window - 1
    missing = -length % block
    x = F.pad(x, (0, 0, 0, missing))
    num_blocks = x.shape[1] // block
    if phases is not None:
        phases = F.pad(phases, (0, 0, 0, missing)).unflatten(1, (-1, block)).flatten(0, 1)
    # [B, N, G, K, P] to [B * N, P, G, K], with P = W - 1 + block.
    key, value = (
        F.pad(part, (0, 0, 0, 0, 0, missing))
        .unfold(1, kept + block, block)
        .flatten(0, 1)
        .movedim(-1, 1)
        for part in present
    )
    steps = torch.arange(block, device=x.device)[:, None]
    places = torch.arange(kept + block, device=x.device)
    band = (places >= steps) & (places <= steps + kept)
    starts = torch.arange(num_blocks, device=x.device)[:, None] * block
    used = (starts + places) >= first_used[:, None, None]
    mask = (band & used.unsqueeze(2)).flatten(0, 1).unsqueeze(1)
    y = layer.attention(
        x.unflatten(1, (-1, block)).flatten(0, 1), KeyValue(key, value), mask, phases
    )
    return y.unflatten(0, (batch, num_blocks)).flatten(1, 2)[:, :length]


def _select(tensor: Tensor, rows: Sequence[int] | Tensor) -> Tensor:
    index = torch.as_tensor(rows, dtype=torch.long, device=tensor.device)
    return tensor.index_select(0, index)


def _check_mask(x: Tensor, key_mask: Tensor | None) -> None:
    if key_mask is not None and (key_mask.shape != x.shape[:2] or key_mask.dtype != torch.bool):
        raise UserError(
            f"based: key_mask is {key_mask.dtype} {list(key_mask.shape)}, expected torch.bool "
            f"{list(x.shape[:2])}, True where a token is real."
        )
