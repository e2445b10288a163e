"""The fields of an RxT component, decoder or encoder, and what they resolve to.

Field names and defaults are those of the public RxLM reference where it has them, including the
names of its linear-attention page; what differs says so. Not here: the rules between fields
(``component_rules``) and the class to use (``component_config``). No torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, PositiveInt, field_validator

from rxlm.configuration import Config
from rxlm.rxt.attention_heads import (
    KINDS_OF_FULL_KEY_WIDTH,
    LINEAR_KINDS,
    HeadCounts,
    HeadFields,
    resolve_heads,
)

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveNumber = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Activation = Literal["relu", "gelu", "swish", "silu", "linear", "sigmoid"]
SoftmaxKind = Literal["mha", "gqa", "mqa", "sqa"]
LinearKind = Literal["gla", "deltanet", "gated_deltanet", "kda", "md_gdn"]
LayerKind = Literal[
    "mha", "gqa", "mqa", "sqa", "gma", "dma", "local",
    "gla", "deltanet", "gated_deltanet", "kda", "md_gdn",
]  # fmt: skip
# One flat list: of a union, a message would name only the last member's choices.
SelfAttentionKind = Literal[
    "mha", "gqa", "mqa", "sqa", "gma", "dma", "local",
    "gla", "deltanet", "gated_deltanet", "kda", "md_gdn", "hybrid",
]  # fmt: skip
StatelessLayerKind = Literal["dense", "moe"]
MoeBiasMode = Literal["global", "local", "off"]
Balance = Literal["loss", "bias", "both"]


Stack = Literal["initial", "memory", "final"]
"""Where a layer stands: before those with a memory, among them, or after them."""


class LayerPlan(NamedTuple):
    """What one layer is built of: its self-attention, and the inner width of its feed-forward
    network (of each expert, if that is a mixture)."""

    attention: str
    is_moe: bool
    ff_dim: int


class HeadWidths(NamedTuple):
    """Channels of one head of linear attention: of queries and keys, and of values."""

    key: int
    value: int


class ComponentFields(Config):
    """The fields of ``RxTComponentConfig``, each one valid in itself."""

    num_layers: PositiveInt = 12
    """Number of layers that have a memory (L). Stateless layers come on top."""
    vocab_size: PositiveInt = 20000
    """Number of tokens of the vocabulary."""
    embed_dim: PositiveInt = 512
    """Width D of token embeddings, hidden states and memory slots."""
    ff_dim: PositiveInt = 1536
    """Inner width of the feed-forward network."""
    att_heads: PositiveInt = 16
    """Number of attention heads H that share `embed_dim`; SQA builds fewer of them."""
    seq_len: PositiveInt = 1024
    """Longest interaction, query and answer together, in tokens."""
    stm_size: PositiveInt = 1024
    """Number of memory slots S of each layer."""
    head_dim: PositiveInt | None = None
    """Width of one attention head; unset: `embed_dim / att_heads`. Even unless `use_nope`."""
    tie_embeddings: bool = False
    """Whether the output layer uses the token embedding as its weight. Not in the reference."""

    use_gated: bool = True
    """Whether the feed-forward network is gated (SwiGLU with `ff_activation='swish'`)."""
    ff_activation: Activation = "swish"
    """Activation of the feed-forward network; `swish` and `silu` are the same function."""
    ff_dropout: Probability = 0.0
    """Probability of dropping an inner feed-forward activation in training."""
    dense_layer_dim: PositiveInt = 1536
    """Inner feed-forward width of `dense` stateless layers."""

    use_rms_norm: bool = True
    """Whether norms are RMSNorm; otherwise LayerNorm."""
    norm_eps: PositiveNumber = 1e-6
    """Epsilon of every norm of the component. Not in the reference."""
    use_head_norm: bool = False
    """Whether the last hidden state is normalised before the output layer."""
    init_identity_norm: bool = False
    """Accepted for compatibility: norms always start with scale one and shift zero."""
    head_norm_type: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """Norm before the output layer, if `use_head_norm`."""

    self_att_type: SelfAttentionKind = "sqa"
    """Type of self-attention; `hybrid` takes one name a layer from `attn_layer_types`. A linear
    type named here does what `use_linear_self_attn` does with it in `linear_attn_type`."""
    att_groups: PositiveInt = 1
    """Number of key/value heads of `gqa`, `sqa` and `local` self-attention."""
    att_query_groups: PositiveInt | None = None
    """Number of query heads of `sqa` self-attention; unset: `att_heads // 2`."""
    att_experts: PositiveInt | None = None
    """Number of key/value experts of `gma` and `dma` attention."""
    att_query_experts: PositiveInt | None = None
    """Number of query experts of `dma` attention."""
    local_window_size: PositiveInt = 256
    """Tokens that `local` self-attention sees, the token itself included: the last so many in the
    decoder, so many on each side in the encoder. Not in the reference."""
    att_dropout: Probability = 0.0
    """Probability of dropping an attention weight in training."""
    use_flash_attention: bool = False
    """Accepted for compatibility: PyTorch picks the fastest exact kernel; results do not differ."""
    use_nope: bool = False
    """Whether to leave rotary positions (RoPE) out."""
    rope_base: PositiveNumber = 10000.0
    """Base of the rotary frequencies."""
    use_attention_output_bias: bool = True
    """Whether the output projection of attention has a bias."""
    use_qk_norm: bool = False
    """Whether each query and key head is RMS-normalised. Not reachable in the reference."""

    cross_att_type: SoftmaxKind = "sqa"
    """Type of the memory cross-attention."""
    cross_att_groups: PositiveInt | None = None
    """Key/value heads of `gqa` and `sqa` memory cross-attention; unset: `att_groups`."""
    cross_att_query_groups: PositiveInt | None = None
    """Query heads of `sqa` memory cross-attention; unset: `att_query_groups`."""
    skip_memory_cross_attention: bool = False
    """Whether layers are built without memory cross-attention (a model without memory)."""
    copy_path_init: bool = True
    """Whether memory cross-attention, and the state that `md_gdn` carries, start by copying what
    was written (values and output form an identity path); from random projections, recall is
    learned very late. Not in the reference."""

    use_gated_attention: bool = False
    """Whether the result of self-attention is multiplied by a learned gate of its input."""
    gated_attention_activation: Literal["sigmoid", "silu", "tanh"] = "sigmoid"
    """Activation of attention gates."""
    use_gated_cross_attention: bool | None = None
    """The same gate for memory cross-attention; unset: `use_gated_attention`."""

    attn_layer_types: tuple[LayerKind, ...] | None = None
    """Self-attention of each layer, `num_layers` names; only with `self_att_type='hybrid'`."""
    stateless_attn_layer_types: tuple[LayerKind, ...] | None = None
    """Self-attention of each layer of `stateless_layers_config`; only with `hybrid`."""
    final_stateless_attn_layer_types: tuple[LayerKind, ...] | None = None
    """Self-attention of each layer of `final_stateless_layers_config`; only with `hybrid`."""

    use_linear_self_attn: bool = False
    """Whether every layer has linear self-attention of `linear_attn_type`."""
    linear_attn_type: LinearKind = "gla"
    """Type of linear self-attention, if `use_linear_self_attn`."""
    linear_attn_mode: Literal["chunk", "fused"] = "chunk"
    """How linear attention is computed: in chunks, or step by step in one kernel. The name
    `fused_recurrent` is accepted for `fused`. The result is the same."""
    linear_attn_expand_k: PositiveNumber = 0.5
    """Total key width of linear attention as a factor of `embed_dim`; not for `kda`, `md_gdn`."""
    linear_attn_expand_v: PositiveNumber = 1.0
    """Total value width of linear attention as a factor of `embed_dim`."""
    linear_attn_heads: PositiveInt | None = None
    """Number of heads of linear attention; unset: `att_heads`."""
    linear_attn_key_dim: PositiveInt | None = None
    """Key width of one head of `kda` and `md_gdn`; unset: `embed_dim` / heads. Wider keys hold more
    facts apart."""
    linear_attn_use_short_conv: bool = True
    """Whether linear attention convolves queries, keys and values over a few tokens first, as it
    was published; the reference leaves it out by default."""
    linear_attn_conv_size: PositiveInt = 4
    """Width of the short convolution in tokens."""
    linear_attn_use_gate: bool = True
    """Whether the output of linear attention is gated."""
    linear_attn_norm_eps: PositiveNumber = 1e-5
    """Epsilon of the output norm of linear attention."""
    linear_attn_write_stretch: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """How far the write strength b of a delta rule reaches beyond 0 and 1 before it is cut there,
    (1 + 2 s) b - s: above 0, a token may leave the state exactly as it is, so that what `md_gdn`
    carries outlasts many turns. A later stage may change it. Not in the reference."""
    linear_attn_decay_shrinkage: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Decays of linear attention slower than this a token (of the logarithm) are none, the others
    become slower by as much: log a := min(log a + d, 0). A channel that fades by a thousandth a
    token has lost nine tenths after 2,300 tokens. A later stage may change it. Not in the
    reference."""

    memory_fusion_mode: Literal["add", "concat"] = "add"
    """How memory enters the gates of `md_gdn` in the decoder: as an offset of their logits, or
    through a small network of token and memory."""

    stateless_layers_config: tuple[StatelessLayerKind, ...] | None = None
    """Feed-forward type of layers without memory before the others, one name a layer."""
    final_stateless_layers_config: tuple[StatelessLayerKind, ...] | None = None
    """Feed-forward type of layers without memory after the others, one name a layer."""

    use_moe: bool = False
    """Whether the feed-forward networks of layers with memory are mixtures of experts."""
    num_experts: PositiveInt = 1
    """Number of routed experts, each `ff_dim` wide."""
    moe_top_k: PositiveInt = 1
    """Number of experts that each token visits. Their outputs are mixed by renormalised router
    probabilities; that of a single one is multiplied by its probability."""
    num_shared_experts: Annotated[int, Field(ge=0)] = 1
    """Number of experts that every token visits besides the routed ones."""
    shared_expert_dim: PositiveInt | None = None
    """Inner width of shared experts; unset: `ff_dim`."""
    router_amp: bool = False
    """Whether mixed precision may compute the router's scores in its lower type."""
    router_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type in which the router's scores are computed; their softmax is never below float32."""
    use_vectorized_moe: bool = True
    """Whether tokens are sorted by expert and each expert computed once; otherwise experts are
    looped over. The result is the same."""
    vectorized_moe_from_legacy: bool = False
    """Accepted for compatibility: loading of the reference's old expert weights."""
    moe_grouped_gemm: bool = True
    """Whether all experts may be one grouped matrix product of PyTorch, where it has one (CUDA,
    bfloat16); otherwise there is one product for each expert. The result is the same."""
    moe_use_cutlass_grouped_gemm: bool = True
    """Accepted for compatibility: PyTorch picks what computes the grouped product."""
    moe_bias_mode: MoeBiasMode = "global"
    """Biases of routed experts: the same for all (`global`), one each (`local`), or none
    (`off`)."""
    moe_shared_experts_bias_mode: MoeBiasMode = "local"
    """Biases of shared experts, as `moe_bias_mode`."""
    moe_use_weighted_shared_experts: bool = False
    """Whether shared experts are mixed by learned weights of each token instead of their mean."""
    moe_balance: Balance = "loss"
    """What keeps experts evenly used in training: an auxiliary loss, offsets of the scores that
    follow the usage, or both. Not in the reference, whose loss does not balance."""

    legacy_stm_in_encoder: bool = False
    """Encoder with memory cross-attention, as in early checkpoints of the reference."""

    @field_validator("linear_attn_mode", mode="before")
    @classmethod
    def _mode_alias(cls, value: Any) -> Any:
        return "fused" if value == "fused_recurrent" else value

    @property
    def head_dim_resolved(self) -> int:
        """Width K of one softmax attention head."""
        return self.embed_dim // self.att_heads if self.head_dim is None else self.head_dim

    @property
    def layer_types(self) -> tuple[str, ...]:
        """Self-attention type of each of the ``num_layers`` layers with memory."""
        return self._types_of(self.attn_layer_types, self.num_layers)

    @property
    def stateless_layer_types(self) -> tuple[str, ...]:
        """Self-attention type of each layer before those with memory."""
        count = len(self.stateless_layers_config or ())
        return self._types_of(self.stateless_attn_layer_types, count)

    @property
    def final_stateless_layer_types(self) -> tuple[str, ...]:
        """Self-attention type of each layer after those with memory."""
        count = len(self.final_stateless_layers_config or ())
        return self._types_of(self.final_stateless_attn_layer_types, count)

    def layer_plan(self, stack: Stack, layer: int) -> LayerPlan:
        """Return what the layer of index ``layer`` in ``stack`` is built of."""
        if stack == "memory":
            return LayerPlan(self.layer_types[layer], self.use_moe, self.ff_dim)
        names, types = self.stateless_layers_config, self.stateless_layer_types
        if stack == "final":
            names, types = self.final_stateless_layers_config, self.final_stateless_layer_types
        is_moe = (names or ())[layer] == "moe"
        return LayerPlan(types[layer], is_moe, self.ff_dim if is_moe else self.dense_layer_dim)

    @property
    def layer_plans(self) -> tuple[tuple[Stack, LayerPlan], ...]:
        """All layers in the order in which they run."""
        counts: tuple[tuple[Stack, int], ...] = (
            ("initial", len(self.stateless_layers_config or ())),
            ("memory", self.num_layers),
            ("final", len(self.final_stateless_layers_config or ())),
        )
        return tuple(
            (stack, self.layer_plan(stack, layer))
            for stack, count in counts
            for layer in range(count)
        )

    @property
    def cross_attention_heads(self) -> HeadCounts:
        """Head counts of memory cross-attention."""
        return resolve_heads(self.cross_head_fields)

    @property
    def cross_attention_is_gated(self) -> bool:
        """Whether memory cross-attention has an output gate."""
        if self.use_gated_cross_attention is None:
            return self.use_gated_attention
        return self.use_gated_cross_attention

    @property
    def cross_head_fields(self) -> HeadFields:
        """The fields that decide the heads of memory cross-attention, fallbacks resolved."""
        own_groups = self.cross_att_groups is not None
        own_query_groups = self.cross_att_query_groups is not None
        return HeadFields(
            kind=self.cross_att_type,
            heads=self.att_heads,
            groups=self.cross_att_groups or self.att_groups,
            query_groups=self.cross_att_query_groups or self.att_query_groups,
            label="memory cross-attention",
            groups_field="cross_att_groups" if own_groups else "att_groups",
            query_groups_field="cross_att_query_groups" if own_query_groups else "att_query_groups",
        )

    def self_head_fields(self, kind: str) -> HeadFields:
        """Return the fields that decide the heads of self-attention of type ``kind``."""
        heads = self.linear_attn_heads or self.att_heads if kind in LINEAR_KINDS else self.att_heads
        return HeadFields(kind, heads, self.att_groups, self.att_query_groups)

    def self_attention_heads(self, layer: int) -> HeadCounts:
        """Head counts of the self-attention of ``layer`` (0 is the first layer with memory)."""
        return resolve_heads(self.self_head_fields(self.layer_types[layer]))

    def linear_head_widths(self, kind: str) -> HeadWidths:
        """Return K and V of one head of linear self-attention of type ``kind``."""
        heads = self.self_head_fields(kind).heads
        full = kind in KINDS_OF_FULL_KEY_WIDTH
        key_width = round(self.embed_dim * (1.0 if full else self.linear_attn_expand_k)) // heads
        return HeadWidths(
            self.linear_attn_key_dim if full and self.linear_attn_key_dim else key_width,
            round(self.embed_dim * self.linear_attn_expand_v) // heads,
        )

    def _types_of(self, names: tuple[str, ...] | None, count: int) -> tuple[str, ...]:
        if self.use_linear_self_attn:
            return (self.linear_attn_type,) * count
        return (self.self_att_type,) * count if names is None else names
