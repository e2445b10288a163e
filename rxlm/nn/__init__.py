"""Modules over :mod:`rxlm.ops`: attention, feed-forward. Knows nothing of RxT or of memory."""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "LocalAttention": "rxlm.nn.local_attention",
    "LocalMHA": "rxlm.nn.local_mha",
}
"""What ``from rxlm.nn import ...`` finds, by the module that is then imported (torch with it)."""


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
