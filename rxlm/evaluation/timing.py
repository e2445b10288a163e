"""Measuring on a machine that is not quiet: interleaved rounds, quartiles, peak memory.

Everything that is compared runs once per round, in an order drawn anew, so that whatever else the
machine does meets all of it alike; ratios are taken within a round. Peak memory is that of a fresh
process. Used by the study and by ``benchmarks/``; knows nothing of what they measure.
Not here: one call in the process that is there (``measuring``).
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from rxlm.evaluation.measuring import processor_name

Key = TypeVar("Key", bound=Hashable)
Call = Callable[[], object]

SHORTEST_SAMPLE = 0.01
"""Seconds. Shorter calls are repeated to this length: timers and schedulers are too coarse."""
WARM_UP_LIMIT = 0.5
"""Seconds. A first call longer than this is not repeated."""


class Quartiles(NamedTuple):
    """Median and spread of a few samples."""

    lower: float
    median: float
    upper: float


def quartiles(samples: Sequence[float]) -> Quartiles:
    """Return the quartiles of at least one sample."""
    if len(samples) == 1:
        return Quartiles(samples[0], samples[0], samples[0])
    return Quartiles(*statistics.quantiles(samples, n=4, method="inclusive"))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Quartiles:
    """Return the quartiles of the ratios within each round."""
    return quartiles([a / b for a, b in zip(numerators, denominators, strict=True)])


def log_log_slope(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Return the exponent p of the power law ``seconds ~ size**p``, by least squares."""
    return statistics.linear_regression(
        [math.log(size) for size in sizes], [math.log(value) for value in seconds]
    ).slope


def interleave(
    groups: Sequence[Mapping[Key, Call]],
    *,
    rounds: int,
    budget: float,
    fewest_rounds: int = 3,
    target_spread: float | None = None,
    seed: int = 0,
    warm_up: Callable[[Key], bool] = lambda key: True,
    synchronize: Call = lambda: None,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[Key, list[float]]:
    """Time every call once per round.

    Args:
        groups: calls by key; those of a group run next to each other, in an order drawn anew.
        rounds: how often.
        budget: seconds after which no further round begins, once there are ``fewest_rounds``.
        fewest_rounds: see ``budget``.
        target_spread: end as soon as the quartiles of every call lie within this share of its
            median (after ``fewest_rounds``); None: all rounds.
        seed: of the order within a round.
        warm_up: which calls to try before, and to repeat within a sample if they are short.
        synchronize: waits for the device; part of each sample.
        progress: is told what has been done.

    Returns:
        For each key the seconds per call, one value per round.
    """
    start = time.perf_counter()
    repeats = {
        key: _repeats(call, synchronize) if warm_up(key) else 1
        for group in groups
        for key, call in group.items()
    }
    progress(f"warmed up in {time.perf_counter() - start:.0f} s")
    samples: dict[Key, list[float]] = {key: [] for key in repeats}
    order = random.Random(seed)
    for number in range(1, rounds + 1):
        for group in groups:
            for key in order.sample(list(group), len(group)):
                seconds = _seconds(group[key], repeats[key], synchronize)
                samples[key].append(seconds / repeats[key])
        elapsed = time.perf_counter() - start
        progress(f"round {number} of {rounds} after {elapsed:.0f} s")
        if number >= fewest_rounds and (elapsed >= budget or _settled(samples, target_spread)):
            break
    return samples


def _settled(samples: Mapping[Key, Sequence[float]], target_spread: float | None) -> bool:
    if target_spread is None:
        return False
    found = [quartiles(values) for values in samples.values()]
    return all(part.upper - part.lower <= target_spread * part.median for part in found)


def _repeats(call: Call, synchronize: Call) -> int:
    """Warm up, and return how often to run ``call`` per sample."""
    first = _seconds(call, 1, synchronize)
    if first > WARM_UP_LIMIT:
        return 1
    fastest = min(_seconds(call, 1, synchronize) for _ in range(3))
    return max(1, math.ceil(SHORTEST_SAMPLE / fastest))


def _seconds(call: Call, repeats: int, synchronize: Call) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return time.perf_counter() - start


# --- memory -------------------------------------------------------------------------------------


def extra_memory(prepare: Callable[[], Call], device: str) -> int | None:
    """Return how many bytes a call needs on top of what it is given, at the highest point.

    Only meaningful in a process that has done nothing else, see :func:`in_fresh_process`:
    allocators keep what was freed.

    Args:
        prepare: makes what the call is given, and returns the call.
        device: ``cpu`` (the resident set of this process) or ``cuda`` (what torch has allocated).

    Returns:
        Bytes; None where the operating system does not tell (``/proc`` is missing).
    """
    call = prepare()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    held = _status_bytes("VmRSS")
    call()
    return _status_bytes("VmHWM") - held


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def in_fresh_process(
    function: Callable[..., Any], *arguments: object, preload: Sequence[str] = ("torch",)
) -> Any:
    """Return ``function(*arguments)``, computed in a process of its own; None if that one died.

    Function and arguments must be such that a new interpreter can import and receive them.

    Args:
        function: of a module.
        arguments: of the function.
        preload: modules that such processes begin with; what the first call says holds for all.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, function, *arguments))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = None
    process.join()
    return result


def _send_result(sender: Connection, function: Callable[..., Any], *arguments: object) -> None:
    sender.send(function(*arguments))


# --- the machine --------------------------------------------------------------------------------


def machine_name(device: str) -> str:
    """Return the model of the processor that computes, and how many CPU cores there are."""
    text = f"{processor_name()}, {os.cpu_count()} cores"
    return text if device == "cpu" else f"{torch.cuda.get_device_name()} ({text})"


def load_average() -> float:
    """Return how many processes have wanted to run, on average over the last minute."""
    return os.getloadavg()[0]
