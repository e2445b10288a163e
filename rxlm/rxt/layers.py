"""One layer of the decoder or the encoder (RxT, arXiv 2510.03561, 3.2).

    h1 = x  + SelfAttention(norm(x))                            # softmax, local or linear
    h2 = h1 + MemoryCrossAttention(norm(h1), norm(slots))       # layers with memory, decoder only
    y  = h2 + FeedForward(norm(h2))                             # dense or mixture of experts

Shapes: B batch, T tokens, P past and present tokens, S slots, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rxlm.nn.attention import Attention, AttentionSettings, KeyValue, initialize_copy_path
from rxlm.nn.feed_forward import FeedForward
from rxlm.nn.key_value_buffer import KeyValueBuffer
from rxlm.nn.linear_attention import LinearSelfAttention
from rxlm.nn.linear_settings import LinearAttentionSettings
from rxlm.nn.local_cache import LocalCache, attend_locally
from rxlm.nn.memory_driven import MemoryCondition
from rxlm.nn.moe import MixtureOfExperts, MoeSettings
from rxlm.nn.norms import make_norm
from rxlm.nn.recurrent_cache import CarriedLayer, RecurrentCache
from rxlm.nn.turn_layout import TurnLayout
from rxlm.ops.local_pattern import LocalPattern
from rxlm.rxt.attention_heads import (
    LINEAR_KINDS,
    LOCAL_KIND,
    MEMORY_DRIVEN_KIND,
    resolve_heads,
)
from rxlm.rxt.component_fields import LayerPlan, Stack
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
        stack: Stack = "memory",
    ) -> None:
        """Build the layer.

        Args:
            config: of the component.
            layer: which of the layers of its ``stack``, from 0.
            reads_memory: whether there is memory cross-attention.
            bidirectional: whether linear and local self-attention see later tokens; other softmax
                attention sees what its mask shows.
            stack: where it stands.
        """
        super().__init__()
        plan = config.layer_plan(stack, layer)
        self.norm_self = _norm(config)
        self.self_attention: Attention | LinearSelfAttention = (
            LinearSelfAttention(
                _linear_settings(
                    config,
                    plan.attention,
                    bidirectional=bidirectional,
                    reads_memory=reads_memory,
                    # A decoder's layers without memory, and an encoder's, know one turn only.
                    may_carry=stack == "memory" and not bidirectional,
                )
            )
            if plan.attention in LINEAR_KINDS
            else Attention(_self_attention_settings(config, plan.attention))
        )
        self.local_pattern = (
            LocalPattern.sliding(config.local_window_size, causal=not bidirectional)
            if plan.attention == LOCAL_KIND
            else None
        )
        self.reads_memory = reads_memory
        if reads_memory:
            self.norm_cross = _norm(config)
            self.norm_slots = _norm(config)
            self.cross_attention = Attention(_cross_attention_settings(config))
        self.norm_feed_forward = _norm(config)
        self.feed_forward: FeedForward | MixtureOfExperts = (
            MixtureOfExperts(_moe_settings(config, plan))
            if plan.is_moe
            else FeedForward(
                config.embed_dim,
                plan.ff_dim,
                activation=config.ff_activation,
                gated=config.use_gated,
                dropout=config.ff_dropout,
            )
        )
        self._initialize(config)

    def _initialize(self, config: RxTComponentConfig) -> None:
        # Residual branches start small, so that the sum over all of them keeps unit scale.
        scale = (2 * len(config.layer_plans)) ** -0.5
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
            if isinstance(attention, LinearSelfAttention):
                self._initialize_linear(attention, scale, config.copy_path_init)
        if isinstance(self.feed_forward, MixtureOfExperts):
            self.feed_forward.initialize(scale)
        else:
            self.feed_forward.down.weight.data.mul_(scale)
        if self.reads_memory and config.copy_path_init:
            initialize_copy_path(self.cross_attention, scale)

    @staticmethod
    def _initialize_linear(attention: LinearSelfAttention, scale: float, copies: bool) -> None:
        if attention.settings.memory_fusion is not None:
            attention.memory_fusion.initialize()
        if attention.settings.carried and copies:
            # The state that it carries is a memory, too. Output gates start half open.
            attention.initialize_copy_path((2 if attention.settings.gated else 1) * scale)

    def _attentions(self) -> list[Attention | LinearSelfAttention]:
        both = [self.self_attention]
        if self.reads_memory:
            both.append(self.cross_attention)
        return both

    def read_slots(self, slots: Tensor) -> KeyValue:
        """Project this layer's slots ``[B, S, D]`` once for all tokens of a turn."""
        return self.cross_attention.project(self._normed_slots(slots), None)

    def _normed_slots(self, slots: Tensor) -> Tensor:
        # A memory in float32 meets weights in bfloat16 (train.precision=bf16_pure).
        dtype = next(self.norm_slots.parameters()).dtype
        normed: Tensor = self.norm_slots(slots.to(dtype))
        return normed

    def condition(self, slots: Tensor, slot_mask: Tensor | None) -> MemoryCondition | None:
        """Read what self-attention takes from slots ``[B, S, D]`` once for all tokens of a turn.

        Args:
            slots: as for :meth:`read_slots`.
            slot_mask: bool ``[B, S]``, which slots exist; None = all.

        Returns:
            None unless self-attention is MD-GDN's.
        """
        attention = self.self_attention
        if isinstance(attention, LinearSelfAttention) and attention.settings.memory_fusion:
            return attention.memory_fusion(self._normed_slots(slots), slot_mask)
        return None

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None,
        phases: Tensor | None,
        key_mask: Tensor | None = None,
        past: LayerCache | KeyValueBuffer | None = None,
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
                self-attention, and for the statistics of experts.
            past: what this layer kept of earlier tokens; unchanged, except for a buffer, which
                gets the new token.
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
        x = self._after_self_attention(x, mixed, phases, memory, memory_mask, key_mask)
        return x, present

    def forward_turns(
        self,
        x: Tensor,
        *,
        layout: TurnLayout,
        phases: Tensor | None,
        memory: KeyValue | None = None,
        memory_mask: Tensor | None = None,
        condition: MemoryCondition | None = None,
        carried: CarriedLayer | None = None,
        backprop_turns: int | None = None,
    ) -> tuple[Tensor, CarriedLayer]:
        """Run a layer that carries a state over whole turns, in their order.

        Args:
            x: ``[B, P, D]``, the tokens in their ``layout``.
            layout: where the turns begin.
            phases: rotary phases of the places in their turns, ``[B, P, K/2]``; None without
                rotary embedding.
            memory: of each flat turn, as for :meth:`forward`.
            memory_mask: of each flat turn.
            condition: of each flat turn.
            carried: of the B conversations before their first turn.
            backprop_turns: cut the gradient of the state after so many turns; None = never.

        Returns:
            ``[B, P, D]`` and what is carried, see
            :meth:`rxlm.nn.linear_attention.LinearSelfAttention.forward_turns`.
        """
        attention = self.self_attention
        assert isinstance(attention, LinearSelfAttention)
        mixed, history = attention.forward_turns(
            self.norm_self(x), layout, condition, carried, backprop_turns
        )
        # Chunks are rows from here on: each reads the memory of its turn.
        chunks, place = layout.turn.shape[1], layout.place
        if memory is not None:
            memory = KeyValue(*(part.index_select(0, place) for part in memory))
        if memory_mask is not None:
            memory_mask = memory_mask.index_select(0, place)

        def rows(part: Tensor) -> Tensor:
            return part.unflatten(1, (chunks, -1)).flatten(0, 1)

        x = self._after_self_attention(
            rows(x),
            rows(mixed),
            None if phases is None else rows(phases),
            memory,
            memory_mask,
            rows(layout.mask),
        )
        return x.unflatten(0, layout.turn.shape).flatten(1, 2), history

    def slot_weights(
        self,
        x: Tensor,
        *,
        mask: Tensor | None,
        phases: Tensor | None,
        memory: KeyValue,
        memory_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        condition: MemoryCondition | None = None,
        carried: CarriedLayer | None = None,
    ) -> Tensor:
        """Return which slots each token of a turn reads, computed anew beside :meth:`forward`.

        Arguments are those of :meth:`forward`.

        Returns:
            ``[B, heads, T, S]``, see :meth:`rxlm.nn.attention.Attention.weights`.
        """
        normed = self.norm_self(x)
        mixed, _ = self._attend_to_self(normed, mask, phases, key_mask, None, condition, carried)
        attending = self.norm_cross(x + mixed)
        return self.cross_attention.weights(attending, memory, memory_mask, phases)

    def _after_self_attention(
        self,
        x: Tensor,
        mixed: Tensor,
        phases: Tensor | None,
        memory: KeyValue | None,
        memory_mask: Tensor | None,
        token_mask: Tensor | None,
    ) -> Tensor:
        x = x + mixed
        if self.reads_memory and memory is not None:
            x = x + self.cross_attention(self.norm_cross(x), memory, memory_mask, phases)
        normed = self.norm_feed_forward(x)
        if isinstance(self.feed_forward, MixtureOfExperts):
            return x + self.feed_forward(normed, token_mask)
        return x + self.feed_forward(normed)

    def _attend_to_self(
        self,
        normed: Tensor,
        mask: Tensor | None,
        phases: Tensor | None,
        key_mask: Tensor | None,
        past: LayerCache | KeyValueBuffer | None,
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
            assert isinstance(past, KeyValue | KeyValueBuffer)
            present = past.append(present)
        return attention(normed, present, mask, phases), present


def _norm(config: RxTComponentConfig) -> nn.Module:
    return make_norm(config.embed_dim, rms=config.use_rms_norm, eps=config.norm_eps)


def _moe_settings(config: RxTComponentConfig, plan: LayerPlan) -> MoeSettings:
    return MoeSettings(
        dim=config.embed_dim,
        hidden_dim=plan.ff_dim,
        num_experts=config.num_experts,
        top_k=config.moe_top_k,
        num_shared=config.num_shared_experts,
        shared_hidden_dim=config.shared_expert_dim or config.ff_dim,
        activation=config.ff_activation,
        gated=config.use_gated,
        dropout=config.ff_dropout,
        bias=config.moe_bias_mode,
        shared_bias=config.moe_shared_experts_bias_mode,
        weighted_shared=config.moe_use_weighted_shared_experts,
        router_dtype=getattr(torch, config.router_dtype),
        router_follows_autocast=config.router_amp,
        balance=config.moe_balance,
        backend=None if config.use_vectorized_moe else "loop",
        use_kernel=config.moe_grouped_gemm,
    )


def _self_attention_settings(config: RxTComponentConfig, kind: str) -> AttentionSettings:
    heads = resolve_heads(config.self_head_fields(kind))
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
    config: RxTComponentConfig,
    kind: str,
    *,
    bidirectional: bool,
    reads_memory: bool,
    may_carry: bool,
) -> LinearAttentionSettings:
    widths = config.linear_head_widths(kind)
    memory_driven = kind == MEMORY_DRIVEN_KIND
    return LinearAttentionSettings(
        mechanism="kda" if memory_driven else kind,
        dim=config.embed_dim,
        num_heads=config.self_head_fields(kind).heads,
        key_dim=widths.key,
        value_dim=widths.value,
        mode=config.linear_attn_mode,
        conv_size=config.linear_attn_conv_size if config.linear_attn_use_short_conv else None,
        gated=config.linear_attn_use_gate,
        bidirectional=bidirectional,
        norm_eps=config.linear_attn_norm_eps,
        # Without a memory to read, md_gdn is KDA (in both directions in the encoder).
        memory_fusion=config.memory_fusion_mode if memory_driven and reads_memory else None,
        carried=memory_driven and may_carry,
        write_stretch=config.linear_attn_write_stretch,
        decay_shrinkage=config.linear_attn_decay_shrinkage,
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
