"""One layer of the decoder or the encoder (RxT, arXiv 2510.03561, 3.2).

    h1 = x  + SelfAttention(norm(x))                            # softmax, local or linear
    h2 = h1 + MemoryCrossAttention(norm(h1), norm(slots))       # decoder only
    y  = h2 + FeedForward(norm(h2))

Shapes: B batch, T tokens, P past and present tokens, S slots, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from rxlm.nn.attention import Attention, AttentionSettings, KeyValue, initialize_copy_path
from rxlm.nn.feed_forward import FeedForward
from rxlm.nn.linear_attention import LinearAttentionSettings, LinearSelfAttention
from rxlm.nn.local_cache import LocalCache, attend_locally
from rxlm.nn.memory_driven import MemoryCondition
from rxlm.nn.norms import make_norm
from rxlm.nn.recurrent_cache import CarriedLayer, RecurrentCache
from rxlm.ops.local_attention import LocalPattern
from rxlm.rxt.attention_heads import LINEAR_KINDS, LOCAL_KIND, MEMORY_DRIVEN_KIND
from rxlm.rxt.config import RxTComponentConfig

LayerCache = KeyValue | LocalCache | RecurrentCache
"""The past of one layer, a value: keys and values of all tokens, or something of constant size."""


HALF_OPEN = {"sigmoid": 0.0, "tanh": 0.5493061443340548, "silu": 0.7388350311316076}
"""Bias at which each gate activation is 1/2."""


class ReactiveLayer(nn.Module):
    """Self-attention, optional memory cross-attention, feed-forward; pre-norm residuals."""

    def __init__(
        self,
        config: RxTComponentConfig,
        layer: int,
        *,
        reads_memory: bool,
        bidirectional: bool = False,
    ) -> None:
        """Build the layer.

        Args:
            config: of the component.
            layer: which of its layers with memory, from 0.
            reads_memory: whether there is memory cross-attention.
            bidirectional: whether linear and local self-attention see later tokens; other softmax
                attention sees what its mask shows.
        """
        super().__init__()
        self.norm_self = _norm(config)
        self.self_attention: Attention | LinearSelfAttention = (
            LinearSelfAttention(_linear_settings(config, layer, bidirectional, reads_memory))
            if config.layer_types[layer] in LINEAR_KINDS
            else Attention(_self_attention_settings(config, layer))
        )
        self.local_pattern = (
            LocalPattern.sliding(config.local_window_size, causal=not bidirectional)
            if config.layer_types[layer] == LOCAL_KIND
            else None
        )
        self.reads_memory = reads_memory
        if reads_memory:
            self.norm_cross = _norm(config)
            self.norm_slots = _norm(config)
            self.cross_attention = Attention(_cross_attention_settings(config))
        self.norm_feed_forward = _norm(config)
        self.feed_forward = FeedForward(
            config.embed_dim,
            config.ff_dim,
            activation=config.ff_activation,
            gated=config.use_gated,
            dropout=config.ff_dropout,
        )
        self._initialize(config)

    def _initialize(self, config: RxTComponentConfig) -> None:
        # Residual branches start small, so that the sum over 2 L of them keeps unit scale.
        scale = (2 * config.num_layers) ** -0.5
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for attention in self._attentions():
            attention.output.weight.data.mul_(scale)
            if isinstance(attention, Attention) and attention.settings.gated:
                # Half open for every input; a gate that starts at 0 passes no gradient.
                nn.init.zeros_(attention.gate.weight)
                nn.init.constant_(
                    attention.gate.bias, HALF_OPEN[attention.settings.gate_activation]
                )
            if isinstance(attention, LinearSelfAttention) and attention.settings.memory_fusion:
                attention.memory_fusion.initialize()
        self.feed_forward.down.weight.data.mul_(scale)
        if self.reads_memory and config.copy_path_init:
            initialize_copy_path(self.cross_attention, scale)

    def _attentions(self) -> list[Attention | LinearSelfAttention]:
        both = [self.self_attention]
        if self.reads_memory:
            both.append(self.cross_attention)
        return both

    def read_slots(self, slots: Tensor) -> KeyValue:
        """Project this layer's slots ``[B, S, D]`` once for all tokens of a turn."""
        return self.cross_attention.project(self.norm_slots(slots), None)

    def condition(self, slots: Tensor, slot_mask: Tensor | None) -> MemoryCondition | None:
        """Read what self-attention takes from slots ``[B, S, D]`` once for all tokens of a turn.

        Args:
            slots: as for :meth:`read_slots`.
            slot_mask: bool ``[B, S]``, which slots exist; None = all.

        Returns:
            None unless self-attention is MD-GDN's.
        """
        attention = self.self_attention
        if (
            not isinstance(attention, LinearSelfAttention)
            or attention.settings.memory_fusion is None
        ):
            return None
        return attention.memory_fusion(self.norm_slots(slots), slot_mask)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None,
        phases: Tensor | None,
        key_mask: Tensor | None = None,
        past: LayerCache | None = None,
        memory: KeyValue | None = None,
        memory_mask: Tensor | None = None,
        condition: MemoryCondition | None = None,
        carried: CarriedLayer | None = None,
    ) -> tuple[Tensor, LayerCache | None]:
        """Run the layer on ``x`` ``[B, T, D]``.

        Args:
            x: hidden states.
            mask: what each token sees of past and present, bool ``[., 1, T, P]`` or None; for
                softmax self-attention.
            phases: rotary phases of the T positions, or None without rotary embedding.
            key_mask: bool ``[B, T]``, True at real tokens, or None; for linear and local
                self-attention.
            past: what this layer kept of earlier tokens; unchanged.
            memory: projected slots from :meth:`read_slots`; None skips the memory.
            memory_mask: bool ``[B, 1, 1, S]``, which slots are visible; None = all.
            condition: from :meth:`condition`; None leaves self-attention without memory.
            carried: the state of linear self-attention after the interaction before, for the
                first tokens of a turn.

        Returns:
            hidden states ``[B, T, D]`` and what to keep of past and present tokens (None for linear
            and local attention in both directions).
        """
        normed = self.norm_self(x)
        mixed, present = self._attend_to_self(
            normed, mask, phases, key_mask, past, condition, carried
        )
        x = x + mixed
        if self.reads_memory and memory is not None:
            x = x + self.cross_attention(self.norm_cross(x), memory, memory_mask, phases)
        return x + self.feed_forward(self.norm_feed_forward(x)), present

    def _attend_to_self(
        self,
        normed: Tensor,
        mask: Tensor | None,
        phases: Tensor | None,
        key_mask: Tensor | None,
        past: LayerCache | None,
        condition: MemoryCondition | None,
        carried: CarriedLayer | None,
    ) -> tuple[Tensor, LayerCache | None]:
        attention = self.self_attention
        if isinstance(attention, LinearSelfAttention):
            assert past is None or isinstance(past, RecurrentCache)
            # Not rotated: the recurrence knows the order.
            return attention(normed, key_mask, past, condition, carried)
        if self.local_pattern is not None:
            assert past is None or isinstance(past, LocalCache)
            return attend_locally(attention, normed, self.local_pattern, phases, key_mask, past)
        present = attention.project(normed, phases)
        if past is not None:
            assert isinstance(past, KeyValue)
            present = past.append(present)
        return attention(normed, present, mask, phases), present


def _norm(config: RxTComponentConfig) -> nn.Module:
    return make_norm(config.embed_dim, rms=config.use_rms_norm, eps=config.norm_eps)


def _self_attention_settings(config: RxTComponentConfig, layer: int) -> AttentionSettings:
    heads = config.self_attention_heads(layer)
    return AttentionSettings(
        dim=config.embed_dim,
        num_heads=heads.query,
        num_key_value_heads=heads.key_value,
        head_dim=config.head_dim_resolved,
        rotary="none" if config.use_nope else "both",
        output_bias=config.use_attention_output_bias,
        dropout=config.att_dropout,
        query_key_norm=config.use_qk_norm,
        gated=config.use_gated_attention,
        gate_activation=config.gated_attention_activation,
        norm_eps=config.norm_eps,
    )


def _linear_settings(
    config: RxTComponentConfig, layer: int, bidirectional: bool, reads_memory: bool
) -> LinearAttentionSettings:
    kind = config.layer_types[layer]
    widths = config.linear_head_widths(kind)
    memory_driven = kind == MEMORY_DRIVEN_KIND
    return LinearAttentionSettings(
        mechanism="kda" if memory_driven else kind,
        dim=config.embed_dim,
        num_heads=config.self_attention_heads(layer).query,
        key_dim=widths.key,
        value_dim=widths.value,
        mode=config.linear_attn_mode,
        conv_size=config.linear_attn_conv_size if config.linear_attn_use_short_conv else None,
        gated=config.linear_attn_use_gate,
        bidirectional=bidirectional,
        norm_eps=config.linear_attn_norm_eps,
        # Only the decoder reads a memory: the encoder's md_gdn is KDA in both directions.
        memory_fusion=config.memory_fusion_mode if memory_driven and reads_memory else None,
    )


def _cross_attention_settings(config: RxTComponentConfig) -> AttentionSettings:
    heads = config.cross_attention_heads
    gated = config.use_gated_cross_attention
    return AttentionSettings(
        dim=config.embed_dim,
        num_heads=heads.query,
        num_key_value_heads=heads.key_value,
        head_dim=config.head_dim_resolved,
        rotary="none" if config.use_nope else "queries",
        output_bias=config.use_attention_output_bias,
        dropout=config.att_dropout,
        query_key_norm=config.use_qk_norm,
        gated=config.use_gated_attention if gated is None else gated,
        gate_activation=config.gated_attention_activation,
        norm_eps=config.norm_eps,
    )
