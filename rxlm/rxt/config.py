"""The configuration of a whole Reactive Transformer, and the one place to import its parts from.

Not here: the parts' own rules (``component_config``, ``memory_config``, ``tokenizer_config``) and
what training needs (recipes). No torch.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import field_validator, model_validator

from rxlm.configuration import Config
from rxlm.errors import UserError
from rxlm.rxt.attention_heads import HeadCounts
from rxlm.rxt.component_config import RxTComponentConfig
from rxlm.rxt.component_rules import encoder_problems
from rxlm.rxt.memory_config import MemoryAttentionConfig, RxTInterlayerMemoryAttentionConfig
from rxlm.rxt.tokenizer_config import TokenizerConfig

__all__ = [
    "FORMAT_VERSION",
    "HeadCounts",
    "MemoryAttentionConfig",
    "RxTComponentConfig",
    "RxTConfig",
    "RxTInterlayerMemoryAttentionConfig",
    "TokenizerConfig",
]

FORMAT_VERSION = 1
"""Version of the configuration file that this code reads and writes."""

_SHARED_BY_COMPONENTS = ("embed_dim", "vocab_size", "num_layers", "stm_size")
_SHARED_WITH_MEMORY = ("embed_dim", "num_layers", "stm_size")

NOT_ARCHITECTURE = frozenset(
    {
        # Limits and training.
        "seq_len", "ff_dropout", "att_dropout", "interlayer_att_dropout", "self_att_dropout",
        # Initial values, which trained weights replace.
        "init_identity_norm", "copy_path_init", "init_std", "write_sharpness",
        "residual_gate_init", "norm_init_gate",
        # How the same result is computed, and what is logged.
        "use_flash_attention", "linear_attn_mode", "use_vectorized_moe", "moe_grouped_gemm",
        "moe_use_cutlass_grouped_gemm", "vectorized_moe_from_legacy", "debug_mode",
        "debug_interval",
    }
)  # fmt: skip
"""Fields that leave what a model computes from given weights unchanged."""

CHANGED_BY_STAGES = frozenset(
    {"residual_gate_stretch", "linear_attn_write_stretch", "linear_attn_decay_shrinkage"}
)
"""Fields that change what a model computes, but no weight: a later stage may train on with them."""


class RxTConfig(Config):
    """Everything that describes a model: both components, memory attention and token ids."""

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    decoder: RxTComponentConfig
    """The component that answers, reading the memory."""
    encoder: RxTComponentConfig
    """The component that reads the finished interaction."""
    memory_attention: MemoryAttentionConfig
    """The part that writes the encoder's states into the memory."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Ids of the special tokens."""

    @field_validator("format_version")
    @classmethod
    def _known_version(cls, version: int) -> int:
        if version != FORMAT_VERSION:
            raise ValueError(
                f"format_version={version} is not {FORMAT_VERSION}, the one this rxlm reads: use "
                "the version of rxlm that wrote the file"
            )
        return version

    @model_validator(mode="after")
    def _check_parts_together(self) -> RxTConfig:
        problems = compatibility_problems(self.decoder, self.encoder, self.memory_attention)
        problems += encoder_problems(self.encoder)
        problems += self.tokenizer.vocabulary_problems(self.decoder.vocab_size)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @staticmethod
    def check_compatible(
        decoder: RxTComponentConfig, encoder: RxTComponentConfig, memory: MemoryAttentionConfig
    ) -> None:
        """Raise ``UserError`` naming every size in which the three parts do not fit together."""
        problems = compatibility_problems(decoder, encoder, memory)
        if problems:
            raise UserError("\n".join(problems))

    def unsupported_features(self) -> list[str]:
        """Return one sentence per setting whose part this version does not build."""
        return [
            f"{name}: {sentence}"
            for name in ("decoder", "encoder", "memory_attention")
            for sentence in getattr(self, name).unsupported_features()
        ]

    def require_supported(self) -> None:
        """Raise ``UserError`` naming every setting whose part this version does not build."""
        problems = self.unsupported_features()
        if problems:
            raise UserError("\n".join(problems))

    def architecture_fingerprint(self) -> str:
        """Return a SHA-256 (hex) of what decides the function that given weights compute.

        Two models with equal fingerprints can exchange weights and memory states. Dropouts,
        initial values and kernel choices do not count (:data:`NOT_ARCHITECTURE`). Fields at their
        default are left out, so a field added later does not change the fingerprint of models
        that do not use it; a changed default therefore needs a new ``FORMAT_VERSION``.
        """
        parts: dict[str, Any] = {"format_version": self.format_version}
        parts |= {
            name: getattr(self, name).model_dump(
                mode="json", exclude=set(NOT_ARCHITECTURE), exclude_defaults=True
            )
            for name in ("decoder", "encoder", "memory_attention", "tokenizer")
        }
        canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def compatibility_problems(
    decoder: RxTComponentConfig, encoder: RxTComponentConfig, memory: MemoryAttentionConfig
) -> list[str]:
    """Return one sentence per size in which the parts of a model differ but must not."""
    reasons = {
        "embed_dim": "decoder, encoder and memory share one vector space",
        "vocab_size": "decoder and encoder share one token embedding",
        "num_layers": "decoder layer l reads what encoder layer l wrote",
        "stm_size": "they share one memory",
    }
    problems = []
    for other_name, other, fields in (
        ("encoder", encoder, _SHARED_BY_COMPONENTS),
        ("memory_attention", memory, _SHARED_WITH_MEMORY),
    ):
        for field in fields:
            wanted, given = getattr(decoder, field), getattr(other, field)
            if wanted != given:
                problems.append(
                    f"decoder.{field}={wanted} but {other_name}.{field}={given}: "
                    f"{reasons[field]}, use {other_name}.{field}={wanted} "
                    f"(or decoder.{field}={given})"
                )
    return problems
