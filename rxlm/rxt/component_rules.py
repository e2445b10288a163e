"""Rules between the fields of a component: contradictions, unbuilt parts, settings without effect.

Not here: the fields (``component_fields``) and the arithmetic of heads (``attention_heads``).
"""

from __future__ import annotations

from collections.abc import Iterable

from rxlm.configuration import Config
from rxlm.rxt.attention_heads import (
    KINDS_OF_FULL_KEY_WIDTH,
    KINDS_WITH_GROUPS,
    KINDS_WITH_QUERY_GROUPS,
    LINEAR_KINDS,
    LOCAL_KIND,
    MEMORY_DRIVEN_KIND,
    SOFTMAX_KINDS,
    head_problems,
    nearest_multiples,
    one_of,
    width_problems,
)
from rxlm.rxt.component_fields import ComponentFields

NOT_BUILT = "is not built yet in rxlm 0.1"
_MOE_FIELDS = (
    "num_experts", "moe_top_k", "num_shared_experts", "shared_expert_dim", "router_amp",
    "router_dtype", "use_vectorized_moe", "vectorized_moe_from_legacy", "moe_grouped_gemm",
    "moe_use_cutlass_grouped_gemm", "moe_bias_mode", "moe_shared_experts_bias_mode",
    "moe_use_weighted_shared_experts", "moe_balance",
)  # fmt: skip
_LINEAR_FIELDS = (
    "linear_attn_mode", "linear_attn_expand_v", "linear_attn_heads", "linear_attn_use_short_conv",
    "linear_attn_use_gate", "linear_attn_norm_eps",
)  # fmt: skip
_SOFTMAX_FIELDS = (
    "head_dim", "att_dropout", "use_nope", "rope_base", "use_attention_output_bias", "use_qk_norm",
)  # fmt: skip
_CROSS_FIELDS = (
    "cross_att_type", "cross_att_groups", "cross_att_query_groups", "use_gated_cross_attention",
)  # fmt: skip


def component_problems(config: ComponentFields) -> list[str]:
    """Return one sentence per contradiction between fields, each with its remedy."""
    lists = _layer_list_problems(config)
    if lists:  # The types below would be read from these lists.
        return lists
    problems = _width_problems(config)
    attentions = [config.self_head_fields(kind) for kind in sorted(_self_kinds(config))]
    if not config.skip_memory_cross_attention:
        attentions.append(config.cross_head_fields)
    for attention in attentions:
        problems += head_problems(attention)
    problems += _linear_problems(config)
    if config.moe_top_k > config.num_experts:
        problems.append(
            f"moe_top_k={config.moe_top_k} exceeds num_experts={config.num_experts}: use "
            f"moe_top_k={config.num_experts} or num_experts={config.moe_top_k}"
        )
    return problems


def encoder_problems(config: ComponentFields) -> list[str]:
    """Return one sentence per setting that is meant for decoders only."""
    if not config.final_stateless_layers_config:
        return []
    return [
        f"encoder.final_stateless_layers_config={list(config.final_stateless_layers_config)}: "
        "memory takes the states of the num_layers layers before them, so nothing would read "
        "their output; use encoder.final_stateless_layers_config=None"
    ]


def unsupported_features(config: ComponentFields) -> list[str]:
    """Return one sentence per setting whose part this version does not build."""
    sentences = []
    softmax = (*SOFTMAX_KINDS, LOCAL_KIND)
    use_instead = f"use self_att_type={one_of(softmax)}"
    built = (*softmax, *LINEAR_KINDS)
    if not config.use_linear_self_attn and config.self_att_type not in (*built, "hybrid"):
        sentences.append(
            f"self_att_type='{config.self_att_type}': this attention {NOT_BUILT}; {use_instead}."
        )
    for field in (
        "attn_layer_types",
        "stateless_attn_layer_types",
        "final_stateless_attn_layer_types",
    ):
        unbuilt = sorted(set(getattr(config, field) or ()) - set(built))
        if unbuilt:
            names = ", ".join(f"'{name}'" for name in unbuilt)
            sentences.append(
                f"{field} with {names}: this attention {NOT_BUILT}; "
                f"use {one_of(built)} in each entry."
            )
    if config.legacy_stm_in_encoder:
        sentences.append(
            "legacy_stm_in_encoder=True: an encoder that reads memory is not part of rxlm; "
            "use legacy_stm_in_encoder=False."
        )
    return sentences


def ignored_fields(config: ComponentFields) -> list[str]:
    """Return fields that differ from their default but are not read, in field order."""
    kinds = _self_kinds(config)
    linear = kinds & set(LINEAR_KINDS)
    cross = not config.skip_memory_cross_attention
    cross_fields = config.cross_head_fields
    attentions = kinds | ({config.cross_att_type} if cross else set())
    fallback_groups = cross and config.cross_att_groups is None
    fallback_queries = cross and config.cross_att_query_groups is None
    softmax = bool(kinds - set(LINEAR_KINDS))
    fallback_gate = cross and config.use_gated_cross_attention is None
    any_gate = (softmax and config.use_gated_attention) or (
        cross and config.cross_attention_is_gated
    )
    feed_forwards = _stateless(config)

    unread = {
        "use_flash_attention",
        "init_identity_norm",
        "vectorized_moe_from_legacy",
        "moe_use_cutlass_grouped_gemm",
    }

    def unless(read: bool, *fields: str) -> None:
        if not read:
            unread.update(fields)

    unless(not config.use_linear_self_attn, "self_att_type")
    unless(
        bool(kinds & set(KINDS_WITH_GROUPS))
        or (fallback_groups and cross_fields.kind in KINDS_WITH_GROUPS),
        "att_groups",
    )
    unless(
        bool(kinds & set(KINDS_WITH_QUERY_GROUPS))
        or (fallback_queries and cross_fields.kind in KINDS_WITH_QUERY_GROUPS),
        "att_query_groups",
    )
    unless(LOCAL_KIND in kinds, "local_window_size")
    unless(bool(kinds & {"gma", "dma"}), "att_experts", "att_query_experts")
    unless(bool(attentions - set(LINEAR_KINDS)), *_SOFTMAX_FIELDS)
    unless(cross, *_CROSS_FIELDS)
    unless(cross or MEMORY_DRIVEN_KIND in config.layer_types, "copy_path_init")
    unless(cross_fields.kind in KINDS_WITH_GROUPS, "cross_att_groups")
    unless(cross_fields.kind in KINDS_WITH_QUERY_GROUPS, "cross_att_query_groups")
    unless(softmax or fallback_gate, "use_gated_attention")
    unless(any_gate, "gated_attention_activation")
    unless(not config.use_nope, "rope_base")
    unless(config.use_head_norm, "head_norm_type")
    unless(config.use_linear_self_attn, "linear_attn_type")
    unless(bool(linear), *_LINEAR_FIELDS)
    unless(bool(linear - set(KINDS_OF_FULL_KEY_WIDTH)), "linear_attn_expand_k")
    unless(bool(linear & set(KINDS_OF_FULL_KEY_WIDTH)), "linear_attn_key_dim")
    unless(bool(linear) and config.linear_attn_use_short_conv, "linear_attn_conv_size")
    unless(bool(linear - {"gla"}), "linear_attn_write_stretch")
    unless(bool(linear - {"deltanet"}), "linear_attn_decay_shrinkage")
    unless(cross and MEMORY_DRIVEN_KIND in kinds, "memory_fusion_mode")
    unless("dense" in feed_forwards, "dense_layer_dim")
    moe = config.use_moe or "moe" in feed_forwards
    unless(moe, *_MOE_FIELDS)
    unless(config.num_shared_experts > 0, "shared_expert_dim", "moe_shared_experts_bias_mode")
    unless(config.num_shared_experts > 1, "moe_use_weighted_shared_experts")
    unless(config.use_vectorized_moe, "moe_grouped_gemm")
    return changed_fields(config, unread)


def changed_fields(config: Config, names: Iterable[str]) -> list[str]:
    """Return those of ``names`` whose value differs from the default, in field order."""
    wanted = set(names)
    return [
        name
        for name, field in type(config).model_fields.items()
        if name in wanted and getattr(config, name) != field.default
    ]


def _self_kinds(config: ComponentFields) -> set[str]:
    return {
        *config.layer_types,
        *config.stateless_layer_types,
        *config.final_stateless_layer_types,
    }


def _stateless(config: ComponentFields) -> set[str]:
    return {
        *(config.stateless_layers_config or ()),
        *(config.final_stateless_layers_config or ()),
    }


def _layer_list_problems(config: ComponentFields) -> list[str]:
    problems = []
    hybrid = config.self_att_type == "hybrid"
    if hybrid and config.use_linear_self_attn:
        problems.append(
            "use_linear_self_attn=True sets every layer, self_att_type='hybrid' sets each one: "
            "use one of them (a hybrid names linear types in attn_layer_types)"
        )
    for field, count, counted in (
        ("attn_layer_types", config.num_layers, f"num_layers={config.num_layers}"),
        *(
            (f"{where}stateless_attn_layer_types", len(layers or ()), _entries(where, layers))
            for where, layers in (
                ("", config.stateless_layers_config),
                ("final_", config.final_stateless_layers_config),
            )
        ),
    ):
        names = getattr(config, field)
        if names is not None and not hybrid:
            problems.append(
                f"{field} is given but self_att_type='{config.self_att_type}': use "
                f"self_att_type='hybrid', or remove {field}"
            )
        elif hybrid and names is None and count:
            problems.append(
                f"self_att_type='hybrid' needs {field} with one name per layer ({counted}), "
                f"for example {['sqa'] * min(count, 3)}"
            )
        elif names is not None and len(names) != count:
            problems.append(
                f"{field} has {len(names)} entries but {counted}: give one name per layer"
            )
    return problems


def _entries(where: str, layers: tuple[str, ...] | None) -> str:
    return f"{where}stateless_layers_config has {len(layers or ())}"


def _width_problems(config: ComponentFields) -> list[str]:
    rotary = not config.use_nope
    if config.head_dim is None:
        return width_problems(
            config.embed_dim,
            config.att_heads,
            rotary=rotary,
            nope_field="use_nope",
            heads_field="att_heads",
        )
    if rotary and config.head_dim % 2:
        return [
            f"head_dim={config.head_dim} is odd, but RoPE rotates pairs: use "
            f"{' or '.join(str(width) for width in nearest_multiples(config.head_dim, 2))}, "
            "or use_nope=True"
        ]
    return []


def _linear_problems(config: ComponentFields) -> list[str]:
    linear = _self_kinds(config) & set(LINEAR_KINDS)
    if not linear:
        return []
    heads = config.self_head_fields(next(iter(linear))).heads
    name = "linear_attn_heads" if config.linear_attn_heads else "att_heads"
    factors = {"linear_attn_expand_v": config.linear_attn_expand_v}
    if linear - set(KINDS_OF_FULL_KEY_WIDTH):
        factors["linear_attn_expand_k"] = config.linear_attn_expand_k
    problems = []
    # Their key width is embed_dim / heads, if it is not given.
    if linear & set(KINDS_OF_FULL_KEY_WIDTH) and not config.linear_attn_key_dim:
        problems += width_problems(
            config.embed_dim, heads, rotary=False, nope_field=None, heads_field=name
        )
    for field, factor in factors.items():
        width = config.embed_dim * factor
        if round(width) < 1 or abs(width - round(width)) > 1e-6 or round(width) % heads:
            options = [step / config.embed_dim for step in _around(width, heads)]
            problems.append(
                f"{field}={factor:g} of embed_dim={config.embed_dim} is {width:g} wide, not "
                f"divisible by {name}={heads}: use {field}="
                f"{' or '.join(f'{option:.10g}' for option in options)}"
            )
    return problems


def _around(width: float, step: int) -> list[int]:
    lower = int(width // step) * step
    return [lower, lower + step] if lower else [step]
