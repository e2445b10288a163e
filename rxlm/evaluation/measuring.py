"""Seconds and bytes of one call, in the process that is there.

For comparisons of many contenders see ``timing``, which interleaves rounds and takes a fresh
process for memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class Rate(NamedTuple):
    """Tokens per second: median and quartiles of some rounds."""

    lower: float
    median: float
    upper: float


def measure_rate(
    call: Callable[[], object], num_tokens: int, rounds: int, device: torch.device
) -> Rate:
    """Return how many tokens a second ``call`` deals with; it runs once before, unmeasured."""
    call()
    rates = []
    for _ in range(rounds):
        _synchronize(device)
        begin = time.perf_counter()
        call()
        _synchronize(device)
        rates.append(num_tokens / (time.perf_counter() - begin))
    if rounds == 1:
        return Rate(rates[0], rates[0], rates[0])
    return Rate(*statistics.quantiles(rates, n=4, method="inclusive"))


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the most memory that is held during ``call``, what was held before included.

    On the CPU the resident set of the process, on CUDA what torch has allocated.

    Returns:
        bytes; None where the operating system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device)
    try:
        _CLEAR.write_text("5")  # the peak starts again from what is held now
    except OSError:
        return None
    call()
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def processor_name() -> str:
    """Return what the machine calls its processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    import platform

    return platform.processor() or platform.machine()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
