"""From a configuration to the memory attention that it describes (``rxlm.memory`` knows no RxT)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rxlm.memory.attention import HeadSettings, MemoryAttention, MemorySettings
from rxlm.memory.gates import GateSettings
from rxlm.rxt.component_saving import StoredComponent
from rxlm.rxt.config import HeadCounts, MemoryAttentionConfig
from rxlm.rxt.freezing import FreezingMethods


class RxTMemoryAttention(StoredComponent, FreezingMethods, MemoryAttention):
    """Memory attention that knows its configuration, and can be saved by itself."""

    KIND = "RxTMemoryAttention"
    CONFIG = MemoryAttentionConfig

    def __init__(self, config: MemoryAttentionConfig | dict[str, Any]) -> None:
        """Build it with fresh weights.

        Raises:
            UserError: if the configuration is invalid, or names what is not built.
        """
        config = MemoryAttentionConfig.parse(config)
        config.require_supported()
        MemoryAttention.__init__(self, memory_settings(config))
        self.config = config

    def freeze(self) -> None:
        """Freeze every parameter; the reference's name."""
        self.freeze_all()

    def unfreeze(self) -> None:
        """Let every parameter train; the reference's name."""
        self.unfreeze_all()


def build_memory_attention(config: MemoryAttentionConfig | dict[str, Any]) -> RxTMemoryAttention:
    """Build the memory attention that a configuration describes."""
    return RxTMemoryAttention(config)


def memory_settings(config: MemoryAttentionConfig) -> MemorySettings:
    """Return ``config`` in the terms of :mod:`rxlm.memory`."""

    def heads(counts: HeadCounts, dropout: float) -> HeadSettings:
        return HeadSettings(counts.query, counts.key_value, config.head_dim_resolved, dropout)

    gate = GateSettings(
        enabled=config.use_gated_residual,
        gate_type=config.residual_gate_type,
        per_slot=config.residual_per_slot_gate,
        init=config.residual_gate_init,
        tanh=config.use_tanh_residual_gate,
        stretch=config.residual_gate_stretch,
    )
    replaces = config.variant == "simple" and config.disable_residual
    return MemorySettings(
        num_layers=config.num_layers,
        num_slots=config.stm_size,
        dim=config.embed_dim,
        variant=config.variant,
        write_heads=heads(config.write_heads, config.att_dropout),
        mix_heads=heads(config.mix_heads, config.mix_dropout),
        gate=replace(gate, residual=not replaces),
        mix_gate=replace(gate, enabled=config.mix_is_gated),
        norm_type=config.norm_type,
        norm_init_gate=config.norm_init_gate,
        norm_per_dim_scale=config.norm_per_dim_scale,
        norm_decay=config.norm_decay,
        num_groups=config.num_groups,
        init_type=config.init_type,
        init_std=config.init_std,
        slot_identity=config.use_slot_identity,
        copy_path_init=config.copy_path_init,
        write_sharpness=config.write_sharpness,
        write_competition=config.write_competition,
        rope_base=config.rope_base,
        eps=config.norm_eps,
    )
