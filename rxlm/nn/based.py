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
from torch import Tensor, nn

from rxlm.errors import UserError
from rxlm.nn.attention import AttentionSettings
from rxlm.nn.feature_map_attention import (
    TAYLOR_DIM,
    FeatureMapAttention,
    FeatureMapSettings,
)
from rxlm.nn.linear_settings import Mode
from rxlm.nn.short_conv import RealTokensFirst, ShortConvolution
from rxlm.nn.window_attention import WindowAttention

Kind = Literal["conv", "taylor", "window"]
"""A kind of layer of the published model."""


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
        index = torch.as_tensor(rows, dtype=torch.long, device=self.recent.device)
        return ConvCache(self.recent.index_select(0, index))

    def detach(self) -> ConvCache:
        """Return the value outside of every autograd graph."""
        return ConvCache(self.recent.detach())

    @property
    def num_bytes(self) -> int:
        """Size of the value, independent of how many tokens it stands for."""
        return self.recent.nbytes


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


def window_of(settings: BasedSettings) -> WindowAttention:
    """Return the sliding window of Based: softmax attention with rotary positions."""
    return WindowAttention(
        AttentionSettings(
            dim=settings.dim,
            num_heads=settings.num_heads,
            num_key_value_heads=settings.num_heads,
            head_dim=settings.dim // settings.num_heads,
            rotary="none" if settings.rope_base is None else "both",
            output_bias=False,
            dropout=settings.dropout,
        ),
        settings.window,
        settings.rope_base,
    )


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
            "window": lambda: window_of(settings),
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
        self.window = window_of(settings)

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


def _check_mask(x: Tensor, key_mask: Tensor | None) -> None:
    if key_mask is not None and (key_mask.shape != x.shape[:2] or key_mask.dtype != torch.bool):
        raise UserError(
            f"based: key_mask is {key_mask.dtype} {list(key_mask.shape)}, expected torch.bool "
            f"{list(x.shape[:2])}, True where a token is real."
        )
