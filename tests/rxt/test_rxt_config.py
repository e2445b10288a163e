"""Configurations of components, memory attention, token ids and whole models.

Not here: what models do with them (test_rxt_components) and the page about them
(test_rxt_config_page).
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rxlm.errors import UserError
from rxlm.rxt.config import (
    HeadCounts,
    MemoryAttentionConfig,
    RxTComponentConfig,
    RxTConfig,
    RxTInterlayerMemoryAttentionConfig,
    TokenizerConfig,
)

FINGERPRINT = "e8176d2600b0d3137d04543c9317b21fbd7ca40662e2d4ce8076fde7f81a7d1f"

COMPONENT_DEFAULTS: dict[str, Any] = {
    "num_layers": 12, "vocab_size": 20000, "embed_dim": 512, "ff_dim": 1536, "att_heads": 16,
    "seq_len": 1024, "stm_size": 1024, "use_gated": True, "ff_activation": "swish",
    "ff_dropout": 0.0, "dense_layer_dim": 1536, "use_rms_norm": True, "use_head_norm": False,
    "init_identity_norm": False, "head_norm_type": "layer_norm", "self_att_type": "sqa",
    "att_groups": 1, "att_query_groups": None, "att_dropout": 0.0, "use_flash_attention": False,
    "use_nope": False, "rope_base": 10000, "use_attention_output_bias": True,
    "cross_att_type": "sqa", "cross_att_groups": None, "cross_att_query_groups": None,
    "skip_memory_cross_attention": False, "use_gated_attention": False,
    "gated_attention_activation": "sigmoid", "use_gated_cross_attention": None,
    "attn_layer_types": None, "stateless_attn_layer_types": None,
    "final_stateless_attn_layer_types": None, "linear_attn_mode": "chunk",
    "linear_attn_expand_k": 0.5, "linear_attn_expand_v": 1.0, "linear_attn_use_short_conv": True,
    "linear_attn_conv_size": 4, "linear_attn_use_gate": True, "linear_attn_norm_eps": 1e-5,
    "linear_attn_write_stretch": 0.0,
    "linear_attn_decay_shrinkage": 0.0,
    "memory_fusion_mode": "add",
    "linear_attn_heads": None, "linear_attn_key_dim": None, "stateless_layers_config": None,
    "final_stateless_layers_config": None, "use_moe": False, "num_experts": 1, "moe_top_k": 1,
    "num_shared_experts": 1, "shared_expert_dim": None, "router_amp": False,
    "router_dtype": "float32", "use_vectorized_moe": True, "vectorized_moe_from_legacy": False,
    "moe_grouped_gemm": True, "moe_use_cutlass_grouped_gemm": True, "moe_bias_mode": "global",
    "moe_shared_experts_bias_mode": "local", "moe_use_weighted_shared_experts": False,
    "moe_balance": "loss",
    "legacy_stm_in_encoder": False,
    # Names of the linear-attention page that the reference dropped.
    "use_linear_self_attn": False, "linear_attn_type": "gla", "att_experts": None,
    "att_query_experts": None,
    # Ours.
    "tie_embeddings": False, "copy_path_init": True, "use_qk_norm": False, "head_dim": None,
    "norm_eps": 1e-6, "local_window_size": 256,
}  # fmt: skip

MEMORY_DEFAULTS: dict[str, Any] = {
    "num_layers": 12, "embed_dim": 512, "att_heads": 16, "seq_len": 1024, "stm_size": 1024,
    "use_flash_attention": False, "att_dropout": 0.0, "att_groups": 1, "att_type": "sqa",
    "att_experts": None, "att_query_experts": None, "att_query_groups": None,
    "norm_type": "classic-rms", "norm_init_gate": -2.0, "norm_per_dim_scale": False,
    "norm_decay": 0.9, "residual_per_slot_gate": True, "residual_gate_slot_status_type": "mean",
    "debug_mode": False, "debug_interval": 10, "rope_base": 10000, "disable_residual": False,
    "interlayer_att_dropout": 0.0, "interlayer_att_groups": 1, "interlayer_att_type": "sqa",
    "interlayer_att_experts": None, "interlayer_att_query_experts": None,
    "interlayer_att_query_groups": None, "self_att_dropout": 0.0, "self_att_groups": 1,
    "self_att_type": "sqa", "self_att_experts": None, "self_att_query_experts": None,
    "self_att_query_groups": None, "num_groups": 1,
    # Ours, or corrected: in the reference these make the memory grow or be overwritten.
    "variant": "interlayer", "use_gated_residual": True, "use_tanh_residual_gate": False,
    "residual_gate_type": "linear", "residual_gate_init": -1.5, "residual_gate_stretch": 0.0,
    "use_gate_for_self_attention": True, "init_type": "learned", "init_std": 0.1,
    "use_slot_identity": True, "copy_path_init": True, "write_sharpness": 3.0, "norm_eps": 1e-6,
    "write_competition": False,
}  # fmt: skip

LINEAR_ATTENTION_PAGE: dict[str, Any] = {
    "num_layers": 12, "vocab_size": 32000, "embed_dim": 768, "ff_dim": 3072, "att_heads": 12,
    "seq_len": 8192, "stm_size": 512, "use_flash_attention": True, "use_gated": True,
    "ff_activation": "swish", "ff_dropout": 0.0, "att_dropout": 0.0, "use_rms_norm": True,
    "att_groups": 4, "use_moe": False, "num_experts": 8, "moe_top_k": 2, "self_att_type": "gqa",
    "cross_att_type": "mqa", "att_experts": None, "att_query_experts": None,
    "att_query_groups": 4, "cross_att_groups": None, "cross_att_query_groups": 1,
    "use_head_norm": True, "init_identity_norm": False, "use_linear_self_attn": True,
    "linear_attn_type": "kda", "linear_attn_mode": "chunk", "linear_attn_expand_k": 0.5,
    "linear_attn_expand_v": 1.0,
}  # fmt: skip
"""The decoder of the reference's linear-attention page, as written there."""


def component_error(**fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        RxTComponentConfig.parse(fields)
    return str(caught.value)


def memory_error(**fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        MemoryAttentionConfig.parse(fields)
    return str(caught.value)


def model_error(**fields: Any) -> str:
    parts: dict[str, Any] = {"decoder": {}, "encoder": {}, "memory_attention": {}}
    with pytest.raises(UserError) as caught:
        RxTConfig.parse({**parts, **fields}, "config.json")
    return str(caught.value)


def model_config(**fields: Any) -> RxTConfig:
    parts: dict[str, Any] = {"decoder": {}, "encoder": {}, "memory_attention": {}}
    return RxTConfig(**{**parts, **fields})


@pytest.mark.parametrize(
    ("config", "table"),
    [(RxTComponentConfig, COMPONENT_DEFAULTS), (MemoryAttentionConfig, MEMORY_DEFAULTS)],
)
def test_field_tables(config: type[Any], table: dict[str, Any]) -> None:
    """Catches a renamed or lost field and a changed default, which break other people's files."""
    assert config().model_dump() == table


def test_defaults_describe_a_buildable_model() -> None:
    """Catches defaults that contradict each other or ask for what is not built (reference: sqa
    without query heads)."""
    config = RxTComponentConfig()
    assert config.unsupported_features() == []
    assert config.ignored_fields() == []
    assert config.self_attention_heads(0) == HeadCounts(8, 1)
    assert config.cross_attention_heads == HeadCounts(8, 1)
    assert MemoryAttentionConfig().unsupported_features() == []
    assert MemoryAttentionConfig().ignored_fields() == []


def test_linear_attention_page_is_supported() -> None:
    """Catches strictness that refuses a published configuration, and silence about its parts."""
    config = RxTComponentConfig.parse(LINEAR_ATTENTION_PAGE)
    assert config.layer_types == ("kda",) * 12
    assert config.cross_attention_heads == HeadCounts(12, 1)
    config.require_supported()
    assert config.linear_head_widths("kda") == (64, 64)
    assert set(config.ignored_fields()) == {
        "self_att_type", "att_groups", "att_query_groups", "cross_att_query_groups",
        "use_flash_attention", "num_experts", "moe_top_k",
    }  # fmt: skip


def test_linear_attention_page_without_linear_attention_is_supported() -> None:
    """Catches a head count taken from the wrong field of the same configuration."""
    config = RxTComponentConfig(**{**LINEAR_ATTENTION_PAGE, "use_linear_self_attn": False})
    config.require_supported()
    assert config.self_attention_heads(11) == HeadCounts(12, 4)
    assert "att_groups" not in config.ignored_fields()
    assert "linear_attn_type" in config.ignored_fields()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"self_att_type": "mha", "att_groups": 3}, HeadCounts(12, 12)),
        ({"self_att_type": "gqa", "att_groups": 3, "cross_att_type": "mha"}, HeadCounts(12, 3)),
        ({"self_att_type": "mqa", "att_groups": 3}, HeadCounts(12, 1)),
        ({"self_att_type": "sqa", "att_groups": 3}, HeadCounts(6, 3)),
        ({"self_att_type": "sqa", "att_groups": 6, "att_query_groups": 3}, HeadCounts(3, 6)),
    ],
)
def test_self_attention_heads(fields: dict[str, Any], expected: HeadCounts) -> None:
    """Catches swapped query and key/value heads, and groups read by types without groups."""
    config = RxTComponentConfig(embed_dim=96, att_heads=12, **fields)
    assert config.self_attention_heads(0) == expected


def test_one_head_has_one_query_head() -> None:
    """Catches SQA with half of one head, i.e. none."""
    config = RxTComponentConfig(embed_dim=8, att_heads=1)
    assert config.self_attention_heads(0) == HeadCounts(1, 1)


def test_cross_attention_falls_back_to_self_attention_fields() -> None:
    """Catches fallbacks that stop at the default and own values that are overruled."""
    shared = {"embed_dim": 96, "att_heads": 12, "att_groups": 2, "att_query_groups": 4}
    assert RxTComponentConfig(**shared).cross_attention_heads == HeadCounts(4, 2)
    own = RxTComponentConfig(**shared, cross_att_groups=3, cross_att_query_groups=6)
    assert own.cross_attention_heads == HeadCounts(6, 3)
    assert own.self_attention_heads(0) == HeadCounts(4, 2)
    gated = RxTComponentConfig(use_gated_attention=True)
    assert gated.cross_attention_is_gated
    assert not gated.model_copy(
        update={"use_gated_cross_attention": False}
    ).cross_attention_is_gated


def test_hybrid_layers_are_taken_one_by_one() -> None:
    """Catches a per-layer list that is ignored or read with a shifted index."""
    config = RxTComponentConfig(
        num_layers=3, self_att_type="hybrid", attn_layer_types=["mha", "mqa", "sqa"]
    )
    config.require_supported()
    counts = [config.self_attention_heads(layer) for layer in range(3)]
    assert counts == [HeadCounts(16, 16), HeadCounts(16, 1), HeadCounts(8, 1)]


def test_width_remedies() -> None:
    """Catches a message without its remedy, and a remedy that the next rule refuses."""
    text = component_error(embed_dim=100, att_heads=12)
    assert "embed_dim=100 is not divisible by att_heads=12: use 96 or 108" in text
    assert "108 only with use_nope=True" in text
    assert component_error(embed_dim=100, att_heads=12, use_nope=True).endswith("use 96 or 108")
    assert "use embed_dim=24 or 48, or use_nope=True" in component_error(embed_dim=36, att_heads=12)
    RxTComponentConfig(embed_dim=36, att_heads=12, use_nope=True)
    assert "use 6 or 8" in component_error(head_dim=7)
    assert RxTComponentConfig(embed_dim=100, att_heads=12, head_dim=8).head_dim_resolved == 8
    assert memory_error(embed_dim=100, att_heads=12).endswith("use 96 or 120")


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["gqa", "sqa"]),
    heads=st.integers(1, 24),
    groups=st.integers(1, 30),
    query_groups=st.none() | st.integers(1, 30),
)
def test_every_suggested_head_count_is_accepted(
    kind: str, heads: int, groups: int, query_groups: int | None
) -> None:
    """Catches an error whose remedy fails in turn, at any combination of head counts."""
    fields = {
        "embed_dim": heads * 2, "att_heads": heads, "self_att_type": kind,
        "cross_att_type": "mha", "att_groups": groups, "att_query_groups": query_groups,
    }  # fmt: skip
    try:
        counts = RxTComponentConfig.parse(fields).self_attention_heads(0)
    except UserError as error:
        text = str(error)
    else:
        assert counts.query % counts.key_value == 0 or counts.key_value % counts.query == 0
        return
    assume("at most" not in text)
    suggestions = re.findall(r"(att_(?:query_)?groups)=(\d+)(?: or (\d+))?", text.split("use ")[1])
    assert suggestions
    for field, *values in suggestions:
        for value in filter(None, values):
            RxTComponentConfig.parse({**fields, field: int(value)})


def test_errors_name_the_attention_they_are_about() -> None:
    """Catches a report that sends the reader to the self-attention fields for another part."""
    text = component_error(
        embed_dim=96, att_heads=12, self_att_type="gqa", att_groups=4, cross_att_type="sqa"
    )
    assert text.startswith("RxTComponentConfig: memory cross-attention 'sqa': att_query_groups")
    assert "unset, so att_heads // 2 = 6" in text
    text = memory_error(interlayer_att_type="gqa", interlayer_att_groups=5)
    assert "interlayer attention 'gqa'" in text
    assert "use interlayer_att_groups=4 or 8" in text


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"self_att_type": "hybrid"}, "needs attn_layer_types with one name per layer"),
        ({"attn_layer_types": ["mha"] * 12}, "use self_att_type='hybrid', or remove"),
        ({"self_att_type": "hybrid", "attn_layer_types": ["mha"]}, "1 entries but num_layers=12"),
        (
            {
                "self_att_type": "hybrid",
                "attn_layer_types": ["mha"] * 12,
                "final_stateless_layers_config": ["dense"],
            },
            "needs final_stateless_attn_layer_types",
        ),
        (
            {
                "self_att_type": "hybrid",
                "attn_layer_types": ["mha"] * 12,
                "use_linear_self_attn": True,
            },
            "use one of them",
        ),
        ({"att_groups": 17}, "use at most 16"),
        ({"att_query_groups": 17}, "use at most 16"),
        ({"moe_top_k": 2}, "use moe_top_k=1 or num_experts=2"),
        (
            {"use_linear_self_attn": True, "linear_attn_expand_k": 0.3},
            "use linear_attn_expand_k=0.28125 or 0.3125",
        ),
        (
            {"use_linear_self_attn": True, "linear_attn_type": "kda", "linear_attn_heads": 7},
            "embed_dim=512 is not divisible by linear_attn_heads=7: use 511 or 518",
        ),
        ({"linear_attn_type": "mamba"}, "'gla', 'deltanet', 'gated_deltanet', 'kda' or 'md_gdn'"),
        ({"num_layers": 0}, "greater than 0"),
        ({"ff_dropout": 1.0}, "less than 1"),
        ({"rope_base": float("inf")}, "finite"),
        ({"att_droput": 0.1}, "did you mean 'att_dropout'?"),
        ({"linear_attn_typ": "kda"}, "did you mean 'linear_attn_type'?"),
    ],
)
def test_component_errors_name_the_remedy(fields: dict[str, Any], remedy: str) -> None:
    """Catches a contradiction that is accepted, and a refusal that does not help."""
    assert remedy in component_error(**fields)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"self_att_type": "gma"}, ["self_att_type='gma'"]),
        (
            {"num_layers": 2, "self_att_type": "hybrid", "attn_layer_types": ["dma", "md_gdn"]},
            ["attn_layer_types with 'dma':"],
        ),
        ({"legacy_stm_in_encoder": True}, ["legacy_stm_in_encoder=True"]),
    ],
)
def test_unbuilt_parts_validate_and_are_named(fields: dict[str, Any], names: list[str]) -> None:
    """Catches a part that is silently left out of the model, and one refused at validation."""
    config = RxTComponentConfig(**fields)
    sentences = config.unsupported_features()
    assert all(name in text for name, text in zip(names, sentences, strict=True))
    for name in names:
        with pytest.raises(UserError, match=re.escape(name)):
            config.require_supported()
    assert all("; use " in sentence for sentence in sentences)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_nope": True, "use_gated_attention": True, "use_qk_norm": True},
        {"use_head_norm": True, "head_norm_type": "rms_norm", "tie_embeddings": True},
        {"skip_memory_cross_attention": True},
        {"use_linear_self_attn": True, "linear_attn_expand_k": 1.0, "use_nope": True},
        {"use_moe": True, "num_experts": 4, "moe_top_k": 2, "num_shared_experts": 2,
         "shared_expert_dim": 64, "router_amp": True, "router_dtype": "bfloat16",
         "moe_grouped_gemm": False, "moe_bias_mode": "local", "moe_balance": "bias",
         "moe_shared_experts_bias_mode": "off", "moe_use_weighted_shared_experts": True},
        {"stateless_layers_config": ["dense", "moe"], "final_stateless_layers_config": ["moe"],
         "num_experts": 4, "dense_layer_dim": 64, "use_vectorized_moe": False},
        {"use_linear_self_attn": True, "linear_attn_type": "kda", "linear_attn_mode": "fused",
         "linear_attn_use_short_conv": True, "linear_attn_conv_size": 3,
         "linear_attn_use_gate": False, "linear_attn_heads": 4, "linear_attn_expand_v": 2.0,
         "linear_attn_key_dim": 24},
    ],
)  # fmt: skip
def test_built_parts_are_supported_and_read(fields: dict[str, Any]) -> None:
    """Catches built parts that are reported as missing or as having no effect."""
    config = RxTComponentConfig(**fields)
    assert config.unsupported_features() == []
    assert config.ignored_fields() == []


def test_settings_without_effect_are_reported() -> None:
    """Catches a switched-off part whose settings look as if they worked."""
    config = RxTComponentConfig(
        skip_memory_cross_attention=True, cross_att_type="mha", use_nope=True, rope_base=500.0,
        head_norm_type="rms_norm", dense_layer_dim=64, linear_attn_conv_size=8,
    )  # fmt: skip
    assert config.ignored_fields() == [
        "dense_layer_dim", "head_norm_type", "rope_base", "cross_att_type",
        "linear_attn_conv_size",
    ]  # fmt: skip
    linear = RxTComponentConfig(
        use_linear_self_attn=True, linear_attn_type="kda", linear_attn_expand_k=1.0,
        use_gated_attention=True, use_gated_cross_attention=False, self_att_type="mha",
    )  # fmt: skip
    assert linear.ignored_fields() == [
        "self_att_type", "use_gated_attention", "linear_attn_expand_k",
    ]  # fmt: skip
    alone = RxTComponentConfig(
        use_linear_self_attn=True, skip_memory_cross_attention=True, use_nope=True, att_dropout=0.1,
    )  # fmt: skip
    assert alone.ignored_fields() == ["att_dropout", "use_nope"]
    memory = MemoryAttentionConfig(
        variant="simple", interlayer_att_type="mha", num_groups=5, norm_decay=0.5,
        disable_residual=True, residual_gate_init=0.0, residual_gate_stretch=0.1,
    )  # fmt: skip
    assert memory.ignored_fields() == [
        "interlayer_att_type", "num_groups", "norm_decay", "residual_gate_init",
        "residual_gate_stretch",
    ]  # fmt: skip


def test_fused_recurrent_is_an_alias() -> None:
    """Catches the kernel's own name for the mode being refused or kept as a third mode."""
    assert RxTComponentConfig(linear_attn_mode="fused_recurrent").linear_attn_mode == "fused"


@pytest.mark.parametrize(
    "config", [RxTComponentConfig(), MemoryAttentionConfig(), TokenizerConfig(), model_config()]
)
def test_configurations_are_frozen(config: Any) -> None:
    """Catches configurations that can change under a built model."""
    name = next(iter(type(config).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, name, getattr(config, name))


def test_memory_attentions_of_each_variant() -> None:
    """Catches head counts of one attention being used for another."""
    fields = {
        "att_type": "mha", "interlayer_att_type": "mqa", "self_att_type": "gqa",
        "self_att_groups": 4, "self_att_dropout": 0.25, "interlayer_att_dropout": 0.5,
    }  # fmt: skip

    def mixing(variant: str) -> tuple[HeadCounts, float]:
        config = MemoryAttentionConfig(variant=variant, **fields)
        assert config.write_heads == HeadCounts(16, 16)
        return config.mix_heads, config.mix_dropout

    assert mixing("interlayer") == (HeadCounts(16, 1), 0.5)
    assert mixing("self-interlayer") == (HeadCounts(16, 1), 0.5)
    assert mixing("self") == (HeadCounts(16, 4), 0.25)
    assert mixing("simple") == (HeadCounts(16, 16), 0.0)


def test_memory_gates_of_each_variant() -> None:
    """Catches the gate among slots following the gate of the write."""
    assert MemoryAttentionConfig(variant="self", use_gated_residual=False).mix_is_gated
    ungated = MemoryAttentionConfig(variant="self", use_gate_for_self_attention=False)
    assert not ungated.mix_is_gated
    assert not MemoryAttentionConfig(use_gated_residual=False).mix_is_gated


def test_memory_groups_divide_the_layers() -> None:
    """Catches groups of unequal size (the reference fails later, in a stack of tensors)."""
    text = memory_error(variant="grouped-self-interlayer", num_groups=5)
    assert text.endswith("num_groups=5 does not divide num_layers=12: use num_groups=4 or 6")
    MemoryAttentionConfig(variant="grouped-self-interlayer", num_groups=4)


def test_memory_reports_unbuilt_attention_only_where_used() -> None:
    """Catches a refusal because of an attention that the variant does not have."""
    unused = MemoryAttentionConfig(self_att_type="gma")
    unused.require_supported()
    with pytest.raises(UserError, match="interlayer_att_type='dma'"):
        MemoryAttentionConfig(interlayer_att_type="dma").require_supported()
    assert RxTInterlayerMemoryAttentionConfig is MemoryAttentionConfig
    assert "did you mean 'use_gated_residual'?" in memory_error(use_gated_residuals=True)


def test_token_ids_are_distinct_and_not_negative() -> None:
    """Catches two roles on one id, which trains without error and answers nonsense."""
    with pytest.raises(UserError, match=r"query_token_id and mask_token_id are both 5.*=None"):
        TokenizerConfig.parse({"mask_token_id": 5})
    with pytest.raises(UserError, match="bos_token_id and eos_token_id are both 3"):
        TokenizerConfig.parse({"bos_token_id": 3})
    with pytest.raises(UserError, match=r"pad_token_id.*greater than or equal to 0"):
        TokenizerConfig.parse({"pad_token_id": -1})


def test_foreign_layouts_leave_optional_tokens_unset() -> None:
    """Catches our conventional [MASK] id pointing at a word of somebody else's tokenizer."""
    five = {
        "pad_token_id": 50, "bos_token_id": 51, "eos_token_id": 52, "query_token_id": 53,
        "answer_token_id": 54,
    }  # fmt: skip
    assert TokenizerConfig(**five).mask_token_id is None
    assert TokenizerConfig(**five, mask_token_id=4).mask_token_id == 4
    assert TokenizerConfig(bos_token_id=2, answer_token_id=6) == TokenizerConfig()


def test_token_ids_lie_in_the_vocabulary() -> None:
    """Catches an id beyond the embedding, an index error on the first turn."""
    TokenizerConfig().check_vocabulary(11)
    with pytest.raises(UserError, match=r"internal_token_id=10 .*vocab_size=10.*at least 11"):
        TokenizerConfig().check_vocabulary(10)
    assert "answer_token_id=30000" in model_error(tokenizer={"answer_token_id": 30000})


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"encoder": {"embed_dim": 256}}, ["decoder.embed_dim=512", "encoder.embed_dim=256"]),
        ({"encoder": {"vocab_size": 99}}, ["decoder.vocab_size=20000", "use encoder.vocab_size"]),
        ({"encoder": {"num_layers": 6}}, ["encoder.num_layers=6", "(or decoder.num_layers=6)"]),
        ({"encoder": {"stm_size": 8}}, ["encoder.stm_size=8"]),
        ({"memory_attention": {"embed_dim": 64}}, ["memory_attention.embed_dim=64"]),
        ({"memory_attention": {"num_layers": 6}}, ["memory_attention.num_layers=6"]),
        ({"memory_attention": {"stm_size": 8}}, ["use memory_attention.stm_size=1024"]),
        ({"decoder": {"embed_dims": 3}}, ["config.json: decoder", "did you mean 'embed_dim'?"]),
        ({"decoder": {"ff_dim": "wide"}}, ["config.json: decoder.ff_dim", "'wide'"]),
        ({"format_version": 2}, ["format_version=2", "the version of rxlm that wrote"]),
    ],
)
def test_parts_of_a_model_fit_together(fields: dict[str, Any], names: list[str]) -> None:
    """Catches parts that fail as a shape error deep in the model, and messages without values."""
    text = model_error(**fields)
    for name in names:
        assert name in text


def test_check_compatible_reports_every_size_at_once() -> None:
    """Catches a check that makes the reader fix one size after the other."""
    with pytest.raises(UserError) as caught:
        RxTConfig.check_compatible(
            RxTComponentConfig(),
            RxTComponentConfig(num_layers=2),
            MemoryAttentionConfig(stm_size=4),
        )
    assert len(str(caught.value).splitlines()) == 2
    RxTConfig.check_compatible(
        RxTComponentConfig(), RxTComponentConfig(ff_dim=4), MemoryAttentionConfig()
    )


def test_model_names_the_part_with_an_unbuilt_feature() -> None:
    """Catches a report that does not say whether decoder or encoder is meant."""
    config = model_config(encoder={"self_att_type": "gma"})
    assert [text.split(":")[0] for text in config.unsupported_features()] == ["encoder"]
    with pytest.raises(UserError, match="encoder: self_att_type='gma'"):
        config.require_supported()


def test_layers_behind_an_encoders_memory_are_refused() -> None:
    """Catches layers that cost parameters and time and whose output nothing reads."""
    with pytest.raises(UserError, match=r"encoder\.final_stateless_layers_config=None"):
        RxTConfig.parse(
            {
                "decoder": {"final_stateless_layers_config": ["dense"]},
                "encoder": {"final_stateless_layers_config": ["dense"]},
                "memory_attention": {},
            }
        )


def test_layer_plans() -> None:
    """Catches a stateless layer with the feed-forward network of another kind or stack, and one
    whose attention is taken from the wrong list."""
    config = RxTComponentConfig(
        num_layers=2,
        ff_dim=8,
        dense_layer_dim=30,
        use_moe=True,
        num_experts=3,
        stateless_layers_config=["dense", "moe"],
        final_stateless_layers_config=["moe"],
        self_att_type="hybrid",
        attn_layer_types=["mha", "kda"],
        stateless_attn_layer_types=["gqa", "mqa"],
        final_stateless_attn_layer_types=["sqa"],
    )
    assert config.layer_plans == (
        ("initial", ("gqa", False, 30)),
        ("initial", ("mqa", True, 8)),
        ("memory", ("mha", True, 8)),
        ("memory", ("kda", True, 8)),
        ("final", ("sqa", True, 8)),
    )
    dense = RxTComponentConfig(num_layers=1, ff_dim=8)
    assert dense.layer_plans == (("memory", ("sqa", False, 8)),)


@settings(max_examples=40, deadline=None)
@given(
    num_layers=st.integers(1, 6),
    head_dim=st.sampled_from([2, 8, 32]),
    heads=st.integers(1, 8),
    kinds=st.lists(st.sampled_from(["mha", "mqa", "kda"]), min_size=6, max_size=6),
    dropout=st.floats(0.0, 0.9),
    variant=st.sampled_from(["simple", "self", "interlayer", "self-interlayer"]),
    tied=st.booleans(),
)
def test_json_round_trip(
    num_layers: int,
    head_dim: int,
    heads: int,
    kinds: list[str],
    dropout: float,
    variant: str,
    tied: bool,
) -> None:
    """Catches fields that come back from a file changed, or as another type."""
    sizes = {"num_layers": num_layers, "embed_dim": heads * head_dim, "att_heads": heads}
    component = {
        **sizes, "self_att_type": "hybrid", "attn_layer_types": kinds[:num_layers],
        "ff_dropout": dropout, "tie_embeddings": tied,
    }  # fmt: skip
    config = model_config(
        decoder=component, encoder=component, memory_attention={**sizes, "variant": variant}
    )
    again = RxTConfig.model_validate_json(config.model_dump_json())
    assert again == config
    assert RxTConfig.parse(config.model_dump(mode="json")) == config
    assert again.architecture_fingerprint() == config.architecture_fingerprint()


def test_fingerprint_is_stable() -> None:
    """Catches a change that makes every stored session look foreign."""
    component = {"tie_embeddings": True, "rope_base": 500.0, "vocab_size": 64}
    config = model_config(
        decoder=component,
        encoder=component,
        memory_attention={"variant": "self"},
        tokenizer={"answer_token_id": 11},
    )
    assert config.architecture_fingerprint() == FINGERPRINT


@pytest.mark.parametrize(
    "fields",
    [
        {"decoder": {"ff_dropout": 0.1, "seq_len": 64, "use_flash_attention": True}},
        {"encoder": {"att_dropout": 0.1, "linear_attn_mode": "fused"}},
        {"memory_attention": {"init_std": 0.2, "write_sharpness": 1.0, "debug_mode": True}},
    ],
)
def test_fingerprint_ignores_what_leaves_the_function_unchanged(fields: dict[str, Any]) -> None:
    """Catches a session that is refused because of a dropout rate."""
    fingerprint = model_config(**fields).architecture_fingerprint()
    assert fingerprint == model_config().architecture_fingerprint()


@pytest.mark.parametrize(
    "fields",
    [
        {"decoder": {"self_att_type": "mha"}},
        {"decoder": {"rope_base": 500.0}},
        {"encoder": {"ff_dim": 64}},
        {"memory_attention": {"variant": "simple"}},
        {"memory_attention": {"init_type": "zeros"}},
        {"memory_attention": {"write_competition": True}},
        {"tokenizer": {"unk_token_id": None}},
    ],
)
def test_fingerprint_tells_models_apart(fields: dict[str, Any]) -> None:
    """Catches a session that is loaded into a model which reads it differently."""
    fingerprint = model_config(**fields).architecture_fingerprint()
    assert fingerprint != model_config().architecture_fingerprint()


@pytest.mark.parametrize("kind", ["gla", "deltanet", "gated_deltanet", "kda", "md_gdn"])
def test_one_line_makes_self_attention_linear(kind: str) -> None:
    """Catches a linear type that self_att_type takes but does not build, or builds differently."""
    short = RxTComponentConfig(self_att_type=kind)
    long = RxTComponentConfig(use_linear_self_attn=True, linear_attn_type=kind)
    assert short.layer_types == long.layer_types == (kind,) * 12
    assert short.self_attention_heads(0) == long.self_attention_heads(0)
    short.require_supported()
    assert not short.ignored_fields()


def test_a_misspelt_self_attention_names_all_types() -> None:
    """Catches a message that lists only some of the choices."""
    with pytest.raises(UserError, match=r"'mha'.*'md_gdn'.*'hybrid'"):
        RxTComponentConfig.parse({"self_att_type": "kdaa"})
