"""The configuration of memory attention, which writes an interaction into the memory.

Field names are those of the public RxLM reference. Defaults differ where the reference's make the
memory grow or hide what is written; such fields say so. Not here: the module (``rxlm.memory``) and
the whole model (``config``). No torch.
"""

from __future__ import annotations

import warnings
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from rxlm.configuration import Config
from rxlm.errors import UserError
from rxlm.rxt.attention_heads import (
    KINDS_WITH_GROUPS,
    KINDS_WITH_QUERY_GROUPS,
    SOFTMAX_KINDS,
    HeadCounts,
    HeadFields,
    alternatives,
    head_problems,
    nearest_divisors,
    one_of,
    resolve_heads,
    width_problems,
)
from rxlm.rxt.component_rules import NOT_BUILT, changed_fields

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveNumber = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
FiniteNumber = Annotated[float, Field(allow_inf_nan=False)]
MemoryAttentionKind = Literal["mha", "gqa", "mqa", "gma", "dma", "sqa"]
MemoryVariant = Literal[
    "simple", "self", "interlayer", "self-interlayer", "grouped-self-interlayer"
]
WriteStep = Literal["main", "self", "interlayer"]

_INTERLAYER_VARIANTS = ("interlayer", "self-interlayer", "grouped-self-interlayer")


class MemoryAttentionConfig(Config):
    """Memory attention of a Reactive Transformer; `variant` chooses what happens before the write.

    `simple` only writes; `self` lets the slots of a layer attend to each other first;
    `interlayer` to the mean memory of all layers; `self-interlayer` to a gated mix of both;
    `grouped-self-interlayer` to that mix with the mean over a group of layers.
    """

    variant: MemoryVariant = "interlayer"
    """What the slots attend to before the interaction is written."""
    num_layers: PositiveInt = 12
    """Number of memory layers L, the `num_layers` of decoder and encoder."""
    embed_dim: PositiveInt = 512
    """Width D of slots and encoder states."""
    att_heads: PositiveInt = 16
    """Number of attention heads H that share `embed_dim`, in each of the attentions."""
    seq_len: PositiveInt = 1024
    """Accepted for compatibility: the encoder's `seq_len` bounds what is written, in tokens."""
    stm_size: PositiveInt = 1024
    """Number of memory slots S of each layer."""
    use_flash_attention: bool = False
    """Accepted for compatibility: PyTorch picks the fastest exact kernel; results do not differ."""
    rope_base: PositiveNumber = 10000.0
    """Base of the rotary frequencies of the encoded tokens (slots have no position)."""
    norm_eps: PositiveNumber = 1e-6
    """Epsilon of every norm. Not in the reference."""

    att_type: MemoryAttentionKind = "sqa"
    """Type of the attention that writes (slots read the encoded interaction)."""
    att_groups: PositiveInt = 1
    """Number of key/value heads of `gqa` and `sqa`."""
    att_query_groups: PositiveInt | None = None
    """Number of query heads of `sqa`; unset: `att_heads // 2`."""
    att_experts: PositiveInt | None = None
    """Number of key/value experts of `gma` and `dma`."""
    att_query_experts: PositiveInt | None = None
    """Number of query experts of `dma`."""
    att_dropout: Probability = 0.0
    """Probability of dropping an attention weight in training."""

    interlayer_att_type: MemoryAttentionKind = "sqa"
    """Type of the attention to other layers' memory (the `interlayer` variants)."""
    interlayer_att_groups: PositiveInt = 1
    """Its number of key/value heads, as `att_groups`."""
    interlayer_att_query_groups: PositiveInt | None = None
    """Its number of query heads, as `att_query_groups`."""
    interlayer_att_experts: PositiveInt | None = None
    """Its number of key/value experts, as `att_experts`."""
    interlayer_att_query_experts: PositiveInt | None = None
    """Its number of query experts, as `att_query_experts`."""
    interlayer_att_dropout: Probability = 0.0
    """Its dropout, as `att_dropout`."""

    self_att_type: MemoryAttentionKind = "sqa"
    """Type of the attention among slots (variant `self`)."""
    self_att_groups: PositiveInt = 1
    """Its number of key/value heads, as `att_groups`."""
    self_att_query_groups: PositiveInt | None = None
    """Its number of query heads, as `att_query_groups`."""
    self_att_experts: PositiveInt | None = None
    """Its number of key/value experts, as `att_experts`."""
    self_att_query_experts: PositiveInt | None = None
    """Its number of query experts, as `att_query_experts`."""
    self_att_dropout: Probability = 0.0
    """Its dropout, as `att_dropout`."""
    use_gate_for_self_attention: bool = True
    """Whether the attention among slots is mixed in by a gate (variant `self`). Reference: False,
    a sum that grows each turn."""
    num_groups: PositiveInt = 1
    """Number of contiguous groups of layers whose memories are averaged
    (variant `grouped-self-interlayer`); it divides `num_layers`."""

    norm_type: Literal["layer", "rms", "adaptive", "positional", "classic-rms"] = "classic-rms"
    """Norm of slots before they are attended with."""
    norm_init_gate: FiniteNumber = -2.0
    """Initial logit of the mix of normalised and raw slots; not for `classic-rms`."""
    norm_per_dim_scale: bool = False
    """Whether the norm has one scale per feature instead of one; `classic-rms` and `layer`
    always have one per feature."""
    norm_decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9
    """Share of the mean over all slots in the size that the `adaptive` norm divides by."""

    use_gated_residual: bool = True
    """Whether a write is mixed in by a gate. Reference: False, a sum that grows each turn."""
    use_tanh_residual_gate: bool = False
    """Whether the share of the new is (1 + tanh(x)) / 2 instead of sigmoid(x). Reference: True,
    and there new and old are weighted 1 + g and 1 - g, so the memory grows each turn."""
    residual_gate_type: Literal["static", "elementwise", "linear"] = "linear"
    """Whether the gate is a learned constant, a weighted sum of old and new, or a linear map of
    both. Reference: `static`, which cannot choose what to overwrite."""
    residual_gate_init: FiniteNumber = -1.5
    """Initial logit of the gate: sigmoid(-1.5) = 0.18 of the new, the rest is kept. Reference:
    3.0, which overwrites 95 % of the memory every turn."""
    residual_gate_stretch: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """How far the gate g reaches beyond 0 and 1 before it is cut there, (1 + 2 s) g - s: above 0, a
    slot can be kept exactly, for any number of turns. A later stage may change it. Not in the
    reference."""
    residual_per_slot_gate: bool = True
    """Whether a slot has one gate value; otherwise a layer (`static`) or each feature has one."""
    residual_gate_slot_status_type: Literal["mean", "linear"] = "mean"
    """Accepted for compatibility: gates read the content of a slot, not a summary of it."""
    disable_residual: bool = False
    """Whether a write replaces the memory altogether (variant `simple`)."""

    init_type: Literal["learned", "zeros", "normal", "standard", "uniform", "ones"] = "learned"
    """Memory before the first turn: a learned parameter, zeros, ones, or seeded noise (`normal`:
    standard deviation 0.01, `standard`: 1, `uniform`: up to 0.01). Reference: `standard`,
    unseeded, so that first answers differ from run to run."""
    init_std: PositiveNumber = 0.1
    """Standard deviation with which the learned initial memory starts. Not in the reference."""
    use_slot_identity: bool = True
    """Whether each slot has a learned vector added to its query, so that slots can specialise
    before they hold anything. Not in the reference."""
    copy_path_init: bool = True
    """Whether values and output of the write start as an identity path, so that what is written
    is what was encoded. Not in the reference."""
    write_sharpness: PositiveNumber = 3.0
    """Factor on the initial query projection of the write: above one, a slot starts by choosing
    few tokens instead of averaging all. Not in the reference."""
    write_competition: bool = False
    """Whether the slots share out each token among themselves before each takes the mean of its
    shares (slot attention), so that they write different things. Not in the reference."""

    debug_mode: bool = False
    """Accepted for compatibility; has no effect."""
    debug_interval: PositiveInt = 10
    """Accepted for compatibility; has no effect."""

    @model_validator(mode="after")
    def _check_fields_together(self) -> MemoryAttentionConfig:
        problems = width_problems(
            self.embed_dim, self.att_heads, rotary=True, nope_field=None, heads_field="att_heads"
        )
        for step in self.steps:
            problems += head_problems(self.head_fields(step))
        if self.variant == "grouped-self-interlayer" and self.num_layers % self.num_groups:
            options = alternatives(nearest_divisors(self.num_layers, self.num_groups))
            problems.append(
                f"num_groups={self.num_groups} does not divide num_layers={self.num_layers}: "
                f"use num_groups={options}"
            )
        if problems:
            raise ValueError("\n".join(problems))
        growing = self.growing_fields()
        if growing:
            # Python shows one text from one place once.
            warnings.warn(
                f"{', '.join(growing)}: sums can make the memory grow from turn to turn without "
                "bound. Use use_gated_residual=True, and in variant 'self' "
                "use_gate_for_self_attention=True.",
                UserWarning,
                stacklevel=2,
            )
        return self

    def growing_fields(self) -> list[str]:
        """Return ``field=value`` of what lets the memory grow without bound; [] if nothing does.

        A gate keeps a slot between its old content and an update of bounded size; a sum does not.
        One sum beside one gate grows at best until the gate takes away as much as the sum adds,
        which may take thousands of turns.
        """
        fields = []
        replaced = self.variant == "simple" and self.disable_residual
        if not (self.use_gated_residual or replaced):
            fields.append("use_gated_residual")
        if self.variant == "self" and not self.use_gate_for_self_attention:
            fields.append("use_gate_for_self_attention")
        return [f"{name}={getattr(self, name)!r}" for name in fields]

    @property
    def steps(self) -> tuple[WriteStep, ...]:
        """The attentions of this variant, in the order in which they run."""
        if self.variant in _INTERLAYER_VARIANTS:
            return ("interlayer", "main")
        return ("self", "main") if self.variant == "self" else ("main",)

    @property
    def head_dim_resolved(self) -> int:
        """Width K of one attention head."""
        return self.embed_dim // self.att_heads

    def head_fields(self, step: WriteStep = "main") -> HeadFields:
        """Return the fields that decide the heads of one attention of the variant."""
        prefix = "att" if step == "main" else f"{step}_att"
        return HeadFields(
            kind=getattr(self, f"{prefix}_type"),
            heads=self.att_heads,
            groups=getattr(self, f"{prefix}_groups"),
            query_groups=getattr(self, f"{prefix}_query_groups"),
            label={"main": "write", "self": "attention among slots"}.get(step, f"{step} attention"),
            groups_field=f"{prefix}_groups",
            query_groups_field=f"{prefix}_query_groups",
        )

    @property
    def write_heads(self) -> HeadCounts:
        """Head counts of the attention that writes."""
        return resolve_heads(self.head_fields("main"))

    @property
    def mix_heads(self) -> HeadCounts:
        """Head counts of the attention before the write; those of the write for `simple`."""
        return resolve_heads(self.head_fields(self.steps[0]))

    @property
    def mix_dropout(self) -> float:
        """Attention dropout of the attention before the write; that of the write for `simple`."""
        step = self.steps[0]
        return float(getattr(self, "att_dropout" if step == "main" else f"{step}_att_dropout"))

    @property
    def mix_is_gated(self) -> bool:
        """Whether the attention before the write is mixed in by a gate instead of added."""
        if self.variant == "self":
            return self.use_gate_for_self_attention
        return self.use_gated_residual

    def unsupported_features(self) -> list[str]:
        """Return one sentence per setting whose part this version does not build."""
        return [
            f"{fields.groups_field.removesuffix('groups')}type='{fields.kind}': this attention "
            f"{NOT_BUILT}; use {one_of(SOFTMAX_KINDS)}."
            for fields in map(self.head_fields, self.steps)
            if fields.kind not in SOFTMAX_KINDS
        ]

    def require_supported(self) -> None:
        """Raise ``UserError`` naming every setting whose part this version does not build."""
        problems = self.unsupported_features()
        if problems:
            raise UserError("\n".join(problems))

    def ignored_fields(self) -> list[str]:
        """Return the fields that differ from their default but have no effect here."""
        unread = {
            "use_flash_attention",
            "residual_gate_slot_status_type",
            "debug_mode",
            "debug_interval",
        }

        def unless(read: bool, *fields: str) -> None:
            if not read:
                unread.update(fields)

        for prefix, step in (
            ("att", "main"),
            ("interlayer_att", "interlayer"),
            ("self_att", "self"),
        ):
            kind = getattr(self, f"{prefix}_type") if step in self.steps else None
            unless(kind is not None, f"{prefix}_type", f"{prefix}_dropout")
            unless(kind in KINDS_WITH_GROUPS, f"{prefix}_groups")
            unless(kind in KINDS_WITH_QUERY_GROUPS, f"{prefix}_query_groups")
            unless(kind in ("gma", "dma"), f"{prefix}_experts", f"{prefix}_query_experts")
        replaced = self.variant == "simple" and self.disable_residual
        write_gated = self.use_gated_residual and not replaced
        gated = write_gated or (self.variant != "simple" and self.mix_is_gated)
        unless(not replaced, "use_gated_residual")
        unless(self.variant == "self", "use_gate_for_self_attention")
        unless(self.variant == "simple", "disable_residual")
        unless(self.variant == "grouped-self-interlayer", "num_groups")
        unless(self.norm_type != "classic-rms", "norm_init_gate")
        unless(self.norm_type not in ("classic-rms", "layer"), "norm_per_dim_scale")
        unless(self.norm_type == "adaptive", "norm_decay")
        unless(
            gated,
            "use_tanh_residual_gate",
            "residual_gate_type",
            "residual_gate_init",
            "residual_gate_stretch",
            "residual_per_slot_gate",
        )
        unless(self.init_type == "learned", "init_std")
        return changed_fields(self, unread)


RxTInterlayerMemoryAttentionConfig = MemoryAttentionConfig
"""The reference's name for the same fields."""
