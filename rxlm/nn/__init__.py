"""Modules over :mod:`rxlm.ops`: attention, feed-forward. Knows nothing of RxT or of memory.

The layers for other people's models are imported from here, when they are first asked for:

    from rxlm.nn import LinearAttention, LocalAttention
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rxlm.nn.drop_in.layer import LinearAttention as LinearAttention
    from rxlm.nn.local_attention import LocalAttention as LocalAttention
    from rxlm.nn.local_mha import LocalMHA as LocalMHA

_EXPORTS = {
    "LinearAttention": "rxlm.nn.drop_in.layer",
    "LocalAttention": "rxlm.nn.local_attention",
    "LocalMHA": "rxlm.nn.local_mha",
}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
