"""One table of causal token mixers: what a language model, a benchmark or a study may be made of.

A mixer is a module ``mixer(x, key_mask=None, cache=None) -> (y, cache)``: ``x`` and ``y`` are
``[B, T, D]``, ``key_mask`` is bool ``[B, T]``, True at real tokens (padding may stand on either
side), and the cache is a value: with that of the earlier tokens, the result is that of one call.
A new mechanism is one decorated function; it then appears wherever mixers are listed:

    @register_mixer("mean", cost="linear", summary="running mean")
    def _mean(settings: MixerSettings) -> nn.Module: ...

Not here: the mechanisms, and layers that read a memory (``rxlm.rxt``).

Shapes: B batch, T tokens, D width, H heads, G key/value heads, K/V head dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rxlm.errors import UserError
from rxlm.nn.attention import Attention, AttentionSettings, KeyValue
from rxlm.nn.based import BasedMixer, BasedSettings, GatedConvolution
from rxlm.nn.feature_map_attention import TAYLOR_DIM, FeatureMapAttention, FeatureMapSettings
from rxlm.nn.linear_attention import LinearSelfAttention
from rxlm.nn.linear_settings import LinearAttentionSettings, Mode
from rxlm.nn.window_attention import WindowAttention
from rxlm.ops.alibi import alibi_bias
from rxlm.ops.attention import attend, visible_keys
from rxlm.ops.rotary import rotary_phases

Cost = Literal["linear", "quadratic"]
"""How time grows with the number of tokens."""

Positions = Literal["rotary", "alibi"]
"""How a mixer itself can know where a token stands."""


@dataclass(frozen=True)
class MixerSettings:
    """What a model tells its mixers; each reads what concerns it.

    Attributes:
        dim: D.
        num_heads: H.
        num_key_value_heads: G of softmax attention; None = H.
        rotary: whether softmax attention rotates queries and keys (recurrences know the order).
        rope_base: base of the rotary frequencies.
        alibi: whether softmax attention is biased towards near keys (not together with rotary).
        dropout: probability of dropping an attention weight.
        window: tokens that a window attention sees, the token itself included.
        conv_size: tokens of the short convolution of recurrences; None = without.
        expand_k: total key width of a recurrence as a factor of D; None = its published one.
        expand_v: total value width as a factor of D; None = its published one.
        gated: whether the output of a recurrence is gated.
        mode: how a recurrence computes many tokens.
        norm_eps: epsilon of norms inside the mixer.
    """

    dim: int
    num_heads: int
    num_key_value_heads: int | None = None
    rotary: bool = True
    rope_base: float = 10000.0
    alibi: bool = False
    dropout: float = 0.0
    window: int = 128
    conv_size: int | None = 4
    expand_k: float | None = None
    expand_v: float | None = None
    gated: bool = True
    mode: Mode = "chunk"
    norm_eps: float = 1e-5


class Mixer(NamedTuple):
    """An entry of the table: how to build it, how it scales, one line about it, and which
    positions it can apply itself if the settings ask for them."""

    build: Callable[[MixerSettings], nn.Module]
    cost: Cost
    summary: str
    positions: tuple[Positions, ...] = ()


MIXERS: dict[str, Mixer] = {}
"""Name -> mixer, in the order of registration."""


def register_mixer(
    name: str, *, cost: Cost, summary: str, positions: tuple[Positions, ...] = ()
) -> Callable[[Callable[[MixerSettings], nn.Module]], Callable[[MixerSettings], nn.Module]]:
    """Return a decorator that enters a builder into the table.

    Raises:
        UserError: if the name is taken.
    """

    def enter(build: Callable[[MixerSettings], nn.Module]) -> Callable[[MixerSettings], nn.Module]:
        if name in MIXERS:
            raise UserError(f"a mixer named {name!r} exists: choose another name.")
        MIXERS[name] = Mixer(build, cost, summary, positions)
        return build

    return enter


def build_mixer(name: str, settings: MixerSettings) -> nn.Module:
    """Return a new mixer with its published initialisation.

    Raises:
        UserError: for a name that is not in the table, or sizes that the mixer refuses.
    """
    if name not in MIXERS:
        raise UserError(f"mixer {name!r} does not exist: use one of {', '.join(MIXERS)}.")
    return MIXERS[name].build(settings)


class SoftmaxCache(NamedTuple):
    """Past of softmax attention: keys and values ``[B, P, G, K]``, which are real ``[B, P]``, and
    how many real tokens each row has had ``[B]``."""

    key_value: KeyValue
    key_mask: Tensor
    lengths: Tensor

    def select(self, rows: Any) -> SoftmaxCache:
        """Return the sequences ``rows``, in that order; a row may be repeated."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.lengths.device)
        return SoftmaxCache(
            KeyValue(*(part.index_select(0, index) for part in self.key_value)),
            self.key_mask.index_select(0, index),
            self.lengths.index_select(0, index),
        )

    @property
    def num_bytes(self) -> int:
        """Size of the value; it grows with the number of tokens."""
        tensors = (*self.key_value, self.key_mask, self.lengths)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class SoftmaxMixer(nn.Module):
    """Causal softmax attention (MHA, GQA, MQA by head counts), rotary or with linear biases."""

    def __init__(self, settings: MixerSettings) -> None:
        super().__init__()
        self.rope_base = settings.rope_base if settings.rotary else None
        self.alibi = settings.alibi
        self.attention = Attention(_attention_settings(settings))

    def forward(
        self, x: Tensor, key_mask: Tensor | None = None, cache: SoftmaxCache | None = None
    ) -> tuple[Tensor, SoftmaxCache]:
        """Attend over ``x`` ``[B, T, D]`` and the cached past; see the module's contract."""
        new_mask = (
            torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            if key_mask is None
            else key_mask
        )
        counts = new_mask.long().cumsum(dim=1)
        start = counts.new_zeros(x.shape[0]) if cache is None else cache.lengths
        phases = None
        if self.rope_base is not None:
            positions = (counts - 1).clamp(min=0) + start[:, None]
            phases = rotary_phases(positions, self.attention.settings.head_dim, self.rope_base)
        present = self.attention.project(x, phases)
        all_keys = new_mask
        if cache is not None:
            present = cache.key_value.append(present)
            all_keys = torch.cat((cache.key_mask, new_mask), dim=1)
        # Without padding and past the kernels know what a token sees: no T x T tensor is needed.
        causal = key_mask is None and cache is None and not self.alibi
        mask = None
        if not causal:
            num_keys = all_keys.shape[1]
            mask = visible_keys(all_keys, x.shape[1], num_keys, causal=True, device=x.device)
        lengths = start + counts[:, -1] if x.shape[1] else start
        y = self._attend(x, present, mask, phases, all_keys, causal)
        return y, SoftmaxCache(present, all_keys, lengths)

    def _attend(
        self,
        x: Tensor,
        present: KeyValue,
        mask: Tensor | None,
        phases: Tensor | None,
        all_keys: Tensor,
        causal: bool,
    ) -> Tensor:
        if not self.alibi:
            return self.attention(x, present, mask, phases, causal=causal)
        settings = self.attention.settings
        query = self.attention.project_queries(x, phases)
        positions = all_keys.long().cumsum(dim=1)
        bias = alibi_bias(positions[:, -x.shape[1] :], positions, settings.num_heads)
        bias = bias.to(query.dtype)
        dropout = settings.dropout if self.training else 0.0
        heads = attend(query, present.key, present.value, mask, bias=bias, dropout=dropout)
        return self.attention.combine(heads, x)


def _attention_settings(settings: MixerSettings) -> AttentionSettings:
    heads = settings.num_heads
    _check_heads(settings)
    return AttentionSettings(
        dim=settings.dim,
        num_heads=heads,
        num_key_value_heads=settings.num_key_value_heads or heads,
        head_dim=settings.dim // heads,
        rotary="both" if settings.rotary else "none",
        output_bias=False,
        dropout=settings.dropout,
        norm_eps=settings.norm_eps,
    )


def _check_heads(settings: MixerSettings) -> None:
    heads, groups = settings.num_heads, settings.num_key_value_heads
    if settings.dim % heads:
        raise UserError(f"dim={settings.dim} is not divisible by num_heads={heads}.")
    if settings.rotary and settings.dim // heads % 2:
        raise UserError(
            f"dim={settings.dim} with num_heads={heads} makes heads {settings.dim // heads} wide, "
            "but rotary positions turn pairs: use an even width, or rotary=False."
        )
    if settings.rotary and settings.alibi:
        raise UserError("rotary=True with alibi=True: choose one kind of positions.")
    if groups is not None and heads % groups:
        raise UserError(f"num_heads={heads} is not divisible by num_key_value_heads={groups}.")


@register_mixer(
    "softmax",
    cost="quadratic",
    summary="softmax attention with rotary positions",
    positions=("rotary", "alibi"),
)
def _softmax(settings: MixerSettings) -> nn.Module:
    return SoftmaxMixer(settings)


def _head_width(name: str, field: str, factor: float, settings: MixerSettings) -> int:
    """Return the width of one head, of a total of ``factor`` x D."""
    width = settings.dim * factor
    if width != int(width) or int(width) % settings.num_heads:
        raise UserError(
            f"{name}: {field} x dim={settings.dim} is {width:g}, not divisible by "
            f"num_heads={settings.num_heads}."
        )
    return int(width) // settings.num_heads


def _linear(mechanism: str, expand_k: float, settings: MixerSettings) -> nn.Module:
    heads = settings.num_heads
    given_k = expand_k if settings.expand_k is None else settings.expand_k
    given_v = 1.0 if settings.expand_v is None else settings.expand_v
    return LinearSelfAttention(
        LinearAttentionSettings(
            mechanism=mechanism,
            dim=settings.dim,
            num_heads=heads,
            key_dim=_head_width(mechanism, "expand_k", given_k, settings),
            value_dim=_head_width(mechanism, "expand_v", given_v, settings),
            mode=settings.mode,
            conv_size=settings.conv_size,
            gated=settings.gated,
            norm_eps=settings.norm_eps,
        )
    )


@register_mixer("gla", cost="linear", summary="gated linear attention: decay per channel")
def _gla(settings: MixerSettings) -> nn.Module:
    return _linear("gla", 0.5, settings)


@register_mixer("deltanet", cost="linear", summary="delta rule without decay")
def _deltanet(settings: MixerSettings) -> nn.Module:
    return _linear("deltanet", 1.0, settings)


@register_mixer("gated_deltanet", cost="linear", summary="delta rule, decay per head")
def _gated_deltanet(settings: MixerSettings) -> nn.Module:
    return _linear("gated_deltanet", 1.0, settings)


@register_mixer("kda", cost="linear", summary="Kimi delta attention: decay per channel")
def _kda(settings: MixerSettings) -> nn.Module:
    return _linear("kda", 1.0, settings)


def _feature_map(feature_map: str, settings: MixerSettings) -> nn.Module:
    expand_k, expand_v = settings.expand_k, settings.expand_v
    key_dim = None
    if expand_k is not None:
        key_dim = _head_width(feature_map, "expand_k", expand_k, settings)
    return FeatureMapAttention(
        FeatureMapSettings(
            dim=settings.dim,
            num_heads=settings.num_heads,
            feature_map=feature_map,
            feature_dim=key_dim,
            value_dim=_head_width(
                feature_map, "expand_v", 1.0 if expand_v is None else expand_v, settings
            ),
            mode=settings.mode,
            conv_size=settings.conv_size,
        )
    )


@register_mixer("elu", cost="linear", summary="feature-map attention with elu(x) + 1, normalised")
def _elu(settings: MixerSettings) -> nn.Module:
    return _feature_map("elu", settings)


@register_mixer("taylor", cost="linear", summary="feature-map attention, exp to second order")
def _taylor(settings: MixerSettings) -> nn.Module:
    return _feature_map("taylor", settings)


@register_mixer(
    "based",
    cost="linear",
    positions=("rotary",),
    summary="Taylor attention plus a window, after a convolution",
)
def _based(settings: MixerSettings) -> nn.Module:
    if settings.conv_size is None:
        raise UserError("mixer 'based' begins with a convolution: set conv_size, such as 3.")
    expand_k, expand_v = settings.expand_k, settings.expand_v
    key_dim = TAYLOR_DIM
    if expand_k is not None:
        key_dim = _head_width("based", "expand_k", expand_k, settings)
    return BasedMixer(
        BasedSettings(
            dim=settings.dim,
            num_heads=settings.num_heads,
            window=settings.window,
            feature_dim=key_dim,
            value_dim=_head_width(
                "based", "expand_v", 1.0 if expand_v is None else expand_v, settings
            ),
            conv_size=settings.conv_size,
            rope_base=settings.rope_base if settings.rotary else None,
            dropout=settings.dropout,
            mode=settings.mode,
        )
    )


@register_mixer(
    "gated_conv", cost="linear", summary="short gated convolution, most layers of Based"
)
def _gated_conv(settings: MixerSettings) -> nn.Module:
    if settings.conv_size is None:
        raise UserError("mixer 'gated_conv' is a convolution: set conv_size, such as 3.")
    return GatedConvolution(settings.dim, settings.conv_size)


@register_mixer(
    "local",
    cost="linear",
    summary="softmax attention to a sliding window",
    positions=("rotary",),
)
def _local(settings: MixerSettings) -> nn.Module:
    rope_base = settings.rope_base if settings.rotary else None
    return WindowAttention(_attention_settings(settings), settings.window, rope_base)
