"""Where and how the arithmetic runs: device, CPU threads, autocast, moving a batch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rxlm.errors import UserError


def resolve_device(name: str, local_rank: int | None = None) -> torch.device:
    """Return the device that a setting names; ``auto`` is CUDA if there is one, else the CPU.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        local_rank: of one of several processes; each takes the CUDA device of that index.

    Raises:
        UserError: for a name that torch does not know or a CUDA device that is not there.
    """
    if local_rank is not None and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{local_rank}"
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device='{name}': expected auto, cpu, cuda or cuda:<index>.") from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(
            f"device='{name}': this machine offers {count} CUDA devices to torch. Use device=auto."
        )
    return device


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context of a precision setting (``fp32`` = switched off).

    Also for weights that are bfloat16: what stays float32 (gates, states, losses) meets them.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision != "fp32")


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Use ``count`` CPU threads inside the block; ``None`` changes nothing."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def move_to_device(batch: Any, device: torch.device) -> Any:
    """Return ``batch`` with every tensor in its dictionaries, lists, tuples and dataclasses moved.

    Other values are returned as they are.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: move_to_device(item, device) for key, item in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move_to_device(item, device) for item in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(move_to_device(item, device) for item in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        moved = {
            field.name: move_to_device(getattr(batch, field.name), device)
            for field in dataclasses.fields(batch)
            if field.init
        }
        return dataclasses.replace(batch, **moved)
    return batch
