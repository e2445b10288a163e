"""Modules over :mod:`rxlm.ops`: attention, feed-forward. Knows nothing of RxT or of memory.

Layers for other people's models can be imported from here; the import costs nothing until then.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "LinearAttention": "rxlm.nn.drop_in.layer",
}
"""Name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
