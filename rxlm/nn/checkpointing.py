"""Gradient checkpointing: forget intermediate results, compute them again in the backward pass.

One forward pass more per block buys memory: only what enters a block is kept. Nothing else
changes: the same numbers are drawn (dropout), the same autocast applies, and loss and gradients
are equal bit for bit. What is a block is decided by the caller: a layer, or a turn of a dialogue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rxlm.nn.expert_routing import RoutingStatistics, active_record, record_routing

Result = TypeVar("Result")


def recompute(function: Callable[..., Result], *arguments: Any, **keywords: Any) -> Result:
    """Call ``function`` such that what it computes is not kept for the backward pass.

    Without gradients this is a plain call.

    Args:
        function: its result depends on its arguments, on weights and on the global random
            generators only; it is called a second time in the backward pass.
        arguments: as for ``function``; gradients flow to all tensors in them.
        keywords: as for ``function``.
    """
    if not torch.is_grad_enabled():
        return function(*arguments, **keywords)
    record = active_record()
    if record is None:
        result: Result = checkpoint(lambda: function(*arguments, **keywords), use_reentrant=False)
        return result

    # Statistics of routers are part of what a block returns: the second time must not add any.
    def block() -> tuple[Result, list[tuple[nn.Module, RoutingStatistics]]]:
        with record_routing() as inner:
            return function(*arguments, **keywords), inner.entries

    result, entries = checkpoint(block, use_reentrant=False)
    record.entries.extend(entries)
    return result
