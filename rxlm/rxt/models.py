"""The models that users build and talk to, and their configurations: the place to import them from.

``RxTAlpha`` answers queries; ``RxTBeta`` also thinks and calls tools. Both are one network.
"""

from __future__ import annotations

from rxlm.rxt.alpha import RxTAlpha
from rxlm.rxt.batch_text import MEMORY_UPDATE_BEGINS, MEMORY_UPDATED
from rxlm.rxt.beta import RxTBeta
from rxlm.rxt.config import (
    MemoryAttentionConfig,
    RxTComponentConfig,
    RxTConfig,
    RxTInterlayerMemoryAttentionConfig,
    TokenizerConfig,
)

__all__ = [
    "ARCHITECTURES",
    "MEMORY_UPDATED",
    "MEMORY_UPDATE_BEGINS",
    "MemoryAttentionConfig",
    "RxTAlpha",
    "RxTBeta",
    "RxTComponentConfig",
    "RxTConfig",
    "RxTInterlayerMemoryAttentionConfig",
    "TokenizerConfig",
]

ARCHITECTURES: dict[str, type[RxTAlpha]] = {"alpha": RxTAlpha, "beta": RxTBeta}
"""What recipes call the models."""
