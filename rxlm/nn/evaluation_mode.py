"""Dropout off for a block, whatever the number of threads that compute with one model."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

from torch import nn

_PAUSED: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()
_PAUSED_LOCK = threading.Lock()


@contextlib.contextmanager
def evaluation_mode(module: nn.Module, parts: Sequence[nn.Module] | None = None) -> Iterator[None]:
    """Switch dropout off for a block, then put every submodule's mode back.

    Safe when threads compute with one model at the same time: the first to enter switches, the
    last to leave puts back.

    Args:
        module: the model.
        parts: its ``modules()``, where they are listed already: finding them takes as long as
            decoding half a token with a small model.
    """
    with _PAUSED_LOCK:
        users, paused = _PAUSED.get(module, (0, []))
        if users == 0:
            paused = [part for part in parts or module.modules() if part.training]
            for part in paused:
                part.training = False
        _PAUSED[module] = (users + 1, paused)
    try:
        yield
    finally:
        with _PAUSED_LOCK:
            users, paused = _PAUSED.pop(module)
            if users > 1:
                _PAUSED[module] = (users - 1, paused)
            else:
                for part in paused:
                    part.training = True
