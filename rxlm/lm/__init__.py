"""Decoder-only language models without a memory: any token mixer, one network. No torch at import.

The baseline of everything with a memory, and the model of the linear-attention pipeline
(``rxlm train stages/lm/base.yaml``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rxlm.lm.config import LMConfig

if TYPE_CHECKING:
    from rxlm.lm.generation import TokenStream
    from rxlm.lm.language_model import LanguageModel
    from rxlm.lm.model import LMCache

__all__ = ["LMCache", "LMConfig", "LanguageModel", "TokenStream"]

_LATER = {
    "LMCache": "rxlm.lm.model",
    "LanguageModel": "rxlm.lm.language_model",
    "TokenStream": "rxlm.lm.generation",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LATER[name]), name)
