"""How much memory a computation holds at its highest point, on any device.

On a CPU torch keeps no account of what it hands out, so :class:`HeldBytes` does: every tensor that
an operator returns is counted until its storage is freed. What an operator takes for itself while
it runs is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HeldBytes(TorchDispatchMode):
    """Counts the storages that are made inside its block.

    Attributes:
        held: bytes made inside and not freed yet.
        peak: the most that ``held`` has been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        output = func(*args, **options)
        given = {
            item.untyped_storage()._cdata
            for item in tree_leaves((args, options))
            if isinstance(item, Tensor)
        }
        for item in tree_leaves(output):
            # A view of what was given, such as a slice of a weight, is nothing new.
            if isinstance(item, Tensor) and item.untyped_storage()._cdata not in given:
                self._count(item.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.held -= size


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    """Return how many bytes ``call`` holds at its highest point, beyond what was held before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return int(torch.cuda.max_memory_allocated(device) - before)
    with HeldBytes() as counter:
        call()
    return counter.peak
